"""What the base model does before any training: measured once for all attempts of a run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from taskoffer.api.contract import ExitCode
from taskoffer_trainer.checkpoints import read_run, write_run
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.sharding import is_shared_out

if TYPE_CHECKING:
    from taskoffer_trainer.course import Course

__all__ = ["Baseline", "measured_base"]


@dataclass(frozen=True)
class Baseline:
    """What the base model does before any training: held-out figures, and answers to the sample prompts."""

    figures: dict[str, float]
    answers: list[str]

    @property
    def loss(self) -> float:
        """The figure that is to become smaller."""
        return self.figures["eval_loss"]


def measured_base(course: Course, between: Callable[[], None]) -> Baseline:
    """Return figures and answers of the base model; measured once, then read from disk.

    Args:
        course: the run, up to its first step.
        between: called between pieces of the work.

    Raises:
        TrainerError: ``NO_MODEL`` when the loss is not finite.
    """
    config, timings, prompts = course.config, course.timings, course.prompts()
    known = course.world.share(read_run(config) if course.rank == 0 else None)
    if isinstance(known.get("figures_before"), dict) and known.get("prompts") == prompts:
        timings.evaluate, timings.answer = known["evaluate_seconds"], known["answer_seconds"]
        found = Baseline(known["figures_before"], known["answers_before"])
        course.measured(found.figures)
        return found
    texts: list[str] = []
    began = time.monotonic()
    model = course.trainer.model
    with model.disable_adapter():
        figures = course.measure(model, True, between)
        timings.evaluate = time.monotonic() - began
        if not math.isfinite(figures["eval_loss"]):
            raise TrainerError(
                ExitCode.NO_MODEL,
                "ModelUnusable",
                f"the held-out loss of the base model {config.model.name} is {figures['eval_loss']}; are its "
                "weights whole?",
            )
        if course.rank == 0 or is_shared_out(model):
            texts = course.answer(model, between)
    timings.answer = time.monotonic() - began - timings.evaluate
    if course.rank == 0:
        seconds = {"evaluate_seconds": timings.evaluate, "answer_seconds": timings.answer}
        write_run(course.asked, {"figures_before": figures, "prompts": prompts, "answers_before": texts, **seconds})
    course.measured(figures)
    said = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in sorted(figures.items()))
    print(f"train: the base model: {said}", flush=True)
    return Baseline(figures, texts)
