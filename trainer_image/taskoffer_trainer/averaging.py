"""An exponential moving average of the adapter's weights, kept beside those that are trained."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from taskoffer.api.contract import RunState
from taskoffer_trainer.checkpoints import (
    AVERAGED_FILE,
    Checkpoint,
    best_checkpoint,
    complete_checkpoints,
    is_refused,
    write_json,
)
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.rewards import REWARD_FAILED
from taskoffer_trainer.sharding import gathered, is_shared_out, local, read_adapter

if TYPE_CHECKING:
    from taskoffer_trainer.course import Course

__all__ = ["Average", "chosen", "decay_of"]

_COUNT = "averaged.json"
"""File of a checkpoint with the number of updates."""


def decay_of(ceiling: float, updates: int) -> float:
    """Return the decay of an update after so many others: ``min(ceiling, (1 + n) / (10 + n))``, and 0 for the first.

    The warm-up is that of TensorFlow's ``ExponentialMovingAverage`` (``num_updates``), which diffusers' ``EMAModel``
    has as well. With a constant decay of 0.9999 and an update every 5 steps, an average would after 1,000 steps
    still be 98 % of what the weights were at the beginning.
    """
    return 0.0 if updates == 0 else min(ceiling, (1 + updates) / (10 + updates))


class Average(TrainerCallback):  # type: ignore[misc]
    """Keeps the average, in single precision, and writes it into each checkpoint as an adapter of its own.

    Every rank keeps one of the weights that it holds: of all, or of its part where the model is shared out.

    Args:
        decay: the largest decay.
        every: steps between two updates.
        model: the model with its adapter.
        writes: whether this rank writes into checkpoints.
    """

    def __init__(self, decay: float, every: int, model: Any, writes: bool) -> None:
        self.decay, self.every, self.model, self.writes = decay, every, model, writes
        self.updates = 0
        self._values = [value.float().clone() for value in self._trained()]

    def _trained(self) -> list[torch.Tensor]:
        return [local(one.detach()) for one in self.model.parameters() if one.requires_grad]

    def update(self) -> None:
        """Move the average towards the weights as they are."""
        weight = 1.0 - decay_of(self.decay, self.updates)
        torch._foreach_lerp_(self._values, [value.float() for value in self._trained()], weight)
        self.updates += 1

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the model the averaged weights for the time of the context."""
        trained = [value.clone() for value in self._trained()]
        self._put(self._values)
        try:
            yield
        finally:
            self._put(trained)

    def _put(self, values: list[torch.Tensor]) -> None:
        for weight, value in zip(self._trained(), values, strict=True):
            weight.copy_(value)

    def keep(self, folder: Path) -> None:
        """Write the average into a checkpoint, in the form of its adapter file; all ranks call it."""
        whole = None
        with self.in_place():
            if is_shared_out(self.model):
                named = self.model.named_parameters()
                whole = gathered({name: parameter for name, parameter in named if parameter.requires_grad})
            if not self.writes:
                return
            tensors = get_peft_model_state_dict(self.model, state_dict=whole, save_embedding_layers=False)
            on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(on_cpu, folder / AVERAGED_FILE)
        write_json(folder / _COUNT, {"updates": self.updates})

    def restore(self, folder: Path) -> None:
        """Read what :meth:`keep` wrote."""
        with self.in_place():
            if is_shared_out(self.model):
                read_adapter(self.model, folder / AVERAGED_FILE)
            else:
                set_peft_model_state_dict(self.model, load_file(folder / AVERAGED_FILE))
            self._values = [value.float().clone() for value in self._trained()]
        self.updates = int(json.loads((folder / _COUNT).read_text(encoding="utf-8"))["updates"])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Update after every so many steps."""
        if state.global_step % self.every == 0:
            self.update()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write into the checkpoint; must come before the callback that checks and completes it."""
        self.keep(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def chosen(course: Course, between: Callable[[], None]) -> Checkpoint:
    """Choose what is exported: the best checkpoint, or the average of the weights where that is better.

    The average at the end of the training is measured like any checkpoint; all ranks take part.

    Args:
        course: the run, whose training has ended.
        between: called between pieces of the measurement.
    """
    found = course.world.share(complete_checkpoints(course.config) if course.rank == 0 else None)
    best, newest = best_checkpoint(found), found[0]
    if course.average is None or not (newest.folder / AVERAGED_FILE).is_file():
        return best
    if is_refused(newest.folder, AVERAGED_FILE):
        # An attempt before this one has verified it in vain.
        return best
    course.progress.enter(RunState.EVALUATING)
    loss = _measured(course, course.average, newest, between)
    trained = math.inf if best.eval_loss is None or best.refused else best.eval_loss
    course.candidates = {
        name: value for name, value in {"trained": trained, "averaged": loss}.items() if math.isfinite(value)
    }
    course.progress.note(eval_loss_trained=trained, eval_loss_averaged=loss)
    better = loss < trained
    name = "the average" if better else f"the weights of step {best.step}"
    print(f"train: held-out loss trained {trained:.4f}, averaged {loss:.4f}; exported: {name}", flush=True)
    return Checkpoint(newest.folder, newest.step, loss, AVERAGED_FILE) if better else best


def _measured(course: Course, average: Average, newest: Checkpoint, between: Callable[[], None]) -> float:
    """Return the held-out loss of the average; infinite, so that it is not chosen, where it cannot be measured."""
    average.restore(newest.folder)
    try:
        with average.in_place():
            return course.measure(course.trainer.model, True, between).get("eval_loss", math.inf)
    except TrainerError as error:
        # Rewards that fail in an evaluation fail for all ranks at once, and the training is over: nothing is in vain.
        if error.reason != REWARD_FAILED:
            raise
        print(f"train: the average is not measured: {error.message}", flush=True)
        return math.inf
