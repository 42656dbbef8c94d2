"""What an adapter must have learned: figures of its own method, and an exam that shares nothing with the trainer."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from taskoffer_lab.demo.checks import Adapter
from taskoffer_lab.demo.material import Material
from taskoffer_lab.demo.script import LOSS_MARGIN
from taskoffer_lab.errors import LabError
from taskoffer_lab.install import project_root
from taskoffer_lab.paths import package_root

EXAM_SECONDS = 300.0


@dataclass(frozen=True)
class Figure:
    """A figure that a training must have moved.

    Attributes:
        key: Its name where it is reported.
        words: Its name for people.
        change: By how much it must have changed at least; below 0 it must have fallen.
        share: Whether the change is a share of the figure before.
    """

    key: str
    words: str
    change: float
    share: bool = False

    def problem(self, offer: str, before: float, after: float) -> str | None:
        """Return what is wrong with a change, if anything is."""
        wanted = self.change * before if self.share else self.change
        moved = after - before
        if math.isfinite(moved) and wanted != 0 and moved / wanted >= 1:
            return None
        least = f"{self.change:+.0%}" if self.share else f"{self.change:+g}"
        return f"{offer}: {self.words} went from {before:.4f} to {after:.4f}; meant is a change of {least} at least"


_LOSS = Figure("eval_loss", "held-out loss", -LOSS_MARGIN, share=True)

FIGURES: Mapping[str, tuple[Figure, ...]] = {
    "InstructText": (_LOSS,),
    "Chat": (_LOSS,),
    "DPO": (Figure("eval_accuracy", "held-out accuracy", 0.3), Figure("eval_margin", "held-out margin", 0.5)),
    "GRPO": (Figure("reward", "held-out reward", 0.05),),
    # Most of the error is noise that nobody can foresee.
    "Image": (Figure("eval_loss", "held-out loss", -0.01, share=True),),
}
"""Type of the task → the figures of its method, as the trainer reports them."""

EXAM_FIGURES: Mapping[str, Figure] = {
    "InstructText": Figure("after", "loss", -LOSS_MARGIN, share=True),
    "Chat": Figure("after", "loss", -LOSS_MARGIN, share=True),
    "DPO": Figure("after", "accuracy", 0.3),
    "GRPO": Figure("after", "reward", 0.05),
    "Image": Figure("after", "difference of the pictures", 0.5),
}
"""Type of the task → what its exam measures."""


def figures_of(adapter: Adapter) -> list[tuple[Figure, float, float]]:
    """Return the figures of an adapter's method before and after, from its manifest.

    Raises:
        LabError: The manifest is missing or lacks one of them.
    """
    path = adapter.folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        before, after = manifest["figuresBefore"], manifest["figuresAfter"]
        return [(figure, float(before[figure.key]), float(after[figure.key])) for figure in FIGURES[adapter.task]]
    except (OSError, ValueError, KeyError) as error:
        raise LabError(f"{adapter.offer}: {path} does not say what the training came to: {error!r}") from error


def check_figures(adapter: Adapter) -> list[str]:
    """Return which figures of its own method an adapter has not moved as it must."""
    try:
        found = figures_of(adapter)
    except LabError as error:
        return [error.message]
    problems = (figure.problem(adapter.offer, before, after) for figure, before, after in found)
    return [problem for problem in problems if problem is not None]


def check_exam(adapter: Adapter, exam: Mapping[str, Any]) -> list[str]:
    """Return a problem unless the exam shows what an adapter of its type must have learned."""
    figure = EXAM_FIGURES[adapter.task]
    problem = figure.problem(adapter.offer, exam["before"], exam["after"])
    return [] if problem is None else [f"in the exam, {problem}"]


def examine(target: Material, adapters: Sequence[Adapter]) -> dict[str, dict[str, Any]]:
    """Load every adapter on this machine, with PEFT or diffusers, and measure what it does where no trainer looked.

    Raises:
        LabError: An adapter cannot be loaded; carries the last lines.
    """
    pupils = [
        {
            "name": adapter.offer,
            "model": str(target.models / adapter.model.rpartition("/")[2]),
            "adapter": str(adapter.folder),
            "task": adapter.task,
        }
        for adapter in adapters
    ]
    request = json.dumps({"rows": str(target.exam), "pupils": pupils})
    path = os.pathsep.join(filter(None, [str(package_root()), os.environ.get("PYTHONPATH", "")]))
    result = subprocess.run(
        [sys.executable, "-m", "taskoffer_lab.demo.exam"],
        input=request,
        capture_output=True,
        text=True,
        # Models this small gain nothing from threads, and on a busy machine threads wait for each other.
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        timeout=EXAM_SECONDS,
        check=False,
        cwd=project_root(),
    )
    if result.returncode != 0:
        raise LabError(f"the examination failed ({result.returncode}):\n{result.stderr[-2000:]}")
    answers: dict[str, dict[str, Any]] = json.loads(result.stdout)
    return answers
