"""Some completions of an evaluation, and how likely they were: what a verification finds again.

A reward may be another one at every call, and a rounded probability may lead to another completion; but the same
weights give the same completion the same probability.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from taskoffer_trainer.checkpoints import write_json
from taskoffer_trainer.drawing import Completion
from taskoffer_trainer.verify import TOLERANCE, verify_failed

__all__ = ["KeptCompletions"]

_FILE = "completions.json"
"""File of a checkpoint that was evaluated."""


@dataclass(frozen=True)
class KeptCompletions:
    """Completions that a model drew.

    Attributes:
        step: the step after which it did.
        completions: prompts and what it said.
        log_prob: mean log-probability of their tokens, in nats.
        figures: all figures of that evaluation.
    """

    step: int
    completions: Sequence[Completion]
    log_prob: float
    figures: dict[str, float] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write into a checkpoint."""
        rows = [[list(one.prompt_ids), list(one.ids)] for one in self.completions]
        about = {"step": self.step, "logProb": self.log_prob, "figures": self.figures}
        write_json(folder / _FILE, {**about, "completions": rows})

    @classmethod
    def read(cls, folder: Path) -> KeptCompletions | None:
        """Read from a checkpoint; ``None`` where it was not evaluated."""
        if not (folder / _FILE).is_file():
            return None
        said = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        drawn = [Completion(prompt, 0, ids) for prompt, ids in said["completions"]]
        return cls(said["step"], drawn, said["logProb"], said["figures"])

    def check(self, log_prob: float) -> None:
        """Compare with how likely a loaded adapter finds the same completions.

        Raises:
            TrainerError: ``VERIFY_FAILED``.
        """
        if not abs(log_prob - self.log_prob) <= TOLERANCE * max(abs(self.log_prob), 1.0):
            raise verify_failed(
                f"the mean log-probability of {len(self.completions)} completions is {log_prob:.4f} after loading, and "
                f"was {self.log_prob:.4f} in training"
            )

    def compared(self, figures: dict[str, float]) -> dict[str, float]:
        """Return the figures of a loaded adapter, or those of the training where its rewards failed.

        A reward that is another one than in training is said and no fault: it may be random, or judge by what it saw
        before.
        """
        if "eval_loss" not in figures:
            print("train: the rewards fail in the verification; reported is what they gave in training", flush=True)
            return self.figures
        now, then = figures["reward"], self.figures["reward"]
        if abs(now - then) > TOLERANCE * max(abs(then), 1.0):
            print(f"train: the held-out reward is {now:.4f} after loading, and was {then:.4f} in training", flush=True)
        return figures
