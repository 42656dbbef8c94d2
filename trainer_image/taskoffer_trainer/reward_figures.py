"""What an evaluation measures of the rewards, and whether it may be compared with others.

The figure that checkpoints are compared by is a weighted sum. Where one of its terms is missing it is another figure,
so such an evaluation counts as not made: no checkpoint is the best by it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from taskoffer.api.contract import ExitCode
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.rewards import REWARD_FAILED, Rewards

__all__ = ["RewardFigures", "RewardSums"]

_PREFIX = "reward_"
_EACH = 3
"""Numbers for each reward: sum, completions that it applies to, calls that failed."""


class RewardSums:
    """Sums of one evaluation on this rank.

    Attributes:
        failed: rewards of which a call failed, which are not asked any more in this evaluation.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.failed: set[str] = set()
        self._sums = dict.fromkeys(self.names, (0.0, 0))
        self._divergence = self._tokens = 0.0

    def add(self, rewards: Mapping[str, Rewards | None]) -> None:
        """Add what some completions were given, by the reward's name; ``None`` for a reward that failed."""
        for name, values in rewards.items():
            if values is None:
                self.failed.add(name)
                continue
            known = [value for value in values if value is not None]
            total, count = self._sums[name]
            self._sums[name] = total + math.fsum(known), count + len(known)

    def diverge(self, divergence: float, tokens: float) -> None:
        """Add a sum of KL divergences in nats over so many tokens."""
        self._divergence += divergence
        self._tokens += tokens

    def numbers(self) -> list[float]:
        """Return all of it as numbers that can be added up over ranks."""
        each = [number for name in self.names for number in (*self._sums[name], float(name in self.failed))]
        return [*each, self._divergence, self._tokens]


class RewardFigures:
    """Makes figures of sums over all ranks, and counts the evaluations in a row that were none.

    Args:
        weights: weight of each reward by name, with a sum of 1.
        beta: weight of the KL divergence.
        limit: evaluations without a figure in a row that end the run.

    Attributes:
        expected: rewards that had a value when the base model was measured; ``None`` before that.
    """

    def __init__(self, weights: Mapping[str, float], beta: float, limit: int) -> None:
        self.weights, self.beta, self.limit = weights, beta, limit
        self.expected: frozenset[str] | None = None
        self.missed = 0

    def expect(self, base: Mapping[str, float]) -> None:
        """Learn from the base model's figures which rewards apply to the held-out prompts."""
        self.expected = frozenset(name.removeprefix(_PREFIX) for name in base if name.startswith(_PREFIX))

    def of(self, numbers: Sequence[float]) -> dict[str, float]:
        """Return the figures of an evaluation: ``kl``, the mean of each reward, and ``reward`` and ``eval_loss``.

        The last two are left out where a reward is missing that has a weight.

        Args:
            numbers: those of :meth:`RewardSums.numbers`, over all ranks.

        Raises:
            TrainerError: ``BAD_CONFIG`` when so many evaluations in a row had no such figure.
        """
        each = {name: numbers[_EACH * place : _EACH * (place + 1)] for place, name in enumerate(self.weights)}
        means = {name: total / count for name, (total, count, failed) in each.items() if count and not failed}
        kl = max(0.0, numbers[-2] / max(numbers[-1], 1.0))
        figures = {**{f"{_PREFIX}{name}": mean for name, mean in means.items()}, "kl": kl}
        if missing := self._missing(means, {name for name, (_, _, failed) in each.items() if failed}):
            self._miss(missing)
            return figures
        self.missed = 0
        reward = math.fsum(self.weights[name] * mean for name, mean in means.items())
        return {**figures, "eval_loss": self.beta * kl - reward, "reward": reward}

    def _missing(self, means: Mapping[str, float], failed: set[str]) -> list[str]:
        """Return the rewards without which there is no sum to compare: all of them where none has a value."""
        weighed = [name for name, weight in self.weights.items() if weight]
        if not any(name in means for name in weighed):
            return weighed
        return [name for name in weighed if name in failed or (name in (self.expected or ()) and name not in means)]

    def _miss(self, missing: Sequence[str]) -> None:
        self.missed += 1
        names = ", ".join(missing)
        print(f"train: {names} gave no value, so this evaluation counts as not made", flush=True)
        if self.missed >= self.limit:
            raise TrainerError(
                ExitCode.BAD_CONFIG,
                REWARD_FAILED,
                f"data.grpo.rewardFunctions: in {self.missed} evaluations in a row {names} gave no value for the "
                "held-out prompts, so that nothing can be learned from it; see the log for calls that failed, and mend "
                "it or remove it",
            )
