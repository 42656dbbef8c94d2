"""The rewards of a GRPO task: built-in ones, source text in its sandbox, their weighted sum and the advantages.

A call that fails gives no reward to any of its completions (``None``, TRL's word for not applicable), so it moves
the model nowhere. In an evaluation it is made once more, and the evaluation is none when that fails too. A reward that
fails several times in a row ends the run, because it would only be trained for what is left of its task. It ends in a
step: an evaluation is counted by all ranks alike (``reward_figures.py``), and the last one must not cost the training.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from taskoffer.api.contract import ExitCode, GRPOColumns, GRPOSettings, RewardFunction, RunConfig
from taskoffer_trainer.builtin_rewards import builtin_function, pattern_source
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.grpo_data import Prompt
from taskoffer_trainer.sandbox import Sandbox, SandboxError, SandboxLimits
from taskoffer_trainer.sandbox_child import find_function

__all__ = [
    "REWARD_FAILED",
    "Asked",
    "RewardSet",
    "Rewards",
    "advantages",
    "check_rewards",
    "normalised_weights",
    "open_rewards",
    "weighted",
]

REWARD_FAILED = "RewardFailed"
"""A reward failed too often in a row (exit code 64)."""

Rewards = list[float | None]

TRIED_OUT = 2
"""Prompts that rewards are tried out on."""
STABILISER = 1e-4
"""Added to the standard deviation of a group, as TRL does, so that a group of equals has no advantage."""


@dataclass(frozen=True)
class Asked:
    """Completions to reward, each with its prompt and its row's extra column."""

    prompts: list[str]
    completions: list[str]
    extras: list[Any]


class _Reward(Protocol):
    def __call__(self, asked: Asked) -> Rewards | None: ...

    def tried(self, asked: Asked) -> Rewards | None:
        """Return the rewards, or ``None`` when the call fails, however often."""


def _source_of(reward: RewardFunction) -> str | None:
    """Return what has to run in a sandbox, or ``None`` for a reward that is computed here.

    Raises:
        ValueError: for a pattern that is none.
    """
    if reward.builtin is not None and reward.builtin.pattern is not None:
        return pattern_source(reward.builtin.pattern)
    return reward.source


def check_rewards(columns: GRPOColumns) -> None:
    """Check all that can be checked without running anything; source text is read only.

    Raises:
        TrainerError: ``BAD_CONFIG`` with the reward's name.
    """
    for place, reward in enumerate(columns.reward_functions):
        field = f"data.grpo.rewardFunctions[{place}] ({reward.name})"
        try:
            source = _source_of(reward)
            if source is not None:
                find_function(source)
            found = hashlib.sha256((source or "").encode()).hexdigest()
        except ValueError as error:
            raise _invalid(f"{field}: {error}") from error
        if reward.sha256 not in (None, found):
            raise _invalid(f"{field}: the SHA-256 of source is {found}, and sha256 says {reward.sha256}")


def _invalid(message: str) -> TrainerError:
    return TrainerError(ExitCode.BAD_CONFIG, "RewardInvalid", message)


class SourceReward:
    """Source text in a sandbox, with a count of the calls that failed."""

    def __init__(self, name: str, source: str, settings: GRPOSettings, extra_column: str | None) -> None:
        self.name, self.limit, self.extra_column = name, settings.reward_failures, extra_column
        seconds = settings.reward_call_seconds
        # A process that comes near its limit of CPU time is replaced; that should be seldom, also for slow rewards.
        cpu_seconds = max(3600, math.ceil(20 * seconds))
        self.sandbox = Sandbox(source, SandboxLimits(seconds, 60.0, settings.reward_memory_bytes, cpu_seconds))
        self.calls = self.failed = self.in_a_row = 0
        self.last_failure: str | None = None

    def try_out(self, asked: Asked) -> None:
        """Load the source text and call it once.

        Raises:
            TrainerError: ``BAD_CONFIG`` when any of it fails.
        """
        try:
            self.sandbox.start()
            self.sandbox.call(asked.completions, self._arguments(asked))
        except SandboxError as error:
            raise _invalid(f"data.grpo.rewardFunctions: {self.name} fails when it is tried out: {error}") from error

    def __call__(self, asked: Asked) -> Rewards | None:
        """Return the rewards, or ``None`` when the call fails.

        Raises:
            TrainerError: ``BAD_CONFIG`` when so many calls in a row failed that the run makes no sense any more.
        """
        rewards = self.tried(asked)
        if rewards is None and self.in_a_row >= self.limit:
            raise TrainerError(
                ExitCode.BAD_CONFIG,
                REWARD_FAILED,
                f"data.grpo.rewardFunctions: {self.name} failed {self.in_a_row} times in a row, the last time because "
                f"{self.last_failure}; mend it or remove it",
            )
        return rewards

    def tried(self, asked: Asked) -> Rewards | None:
        """Return the rewards, or ``None`` when the call fails; it counts as one in a row, and does not end the run."""
        self.calls += 1
        try:
            rewards = self.sandbox.call(asked.completions, self._arguments(asked))
        except SandboxError as error:
            self.failed += 1
            self.in_a_row += 1
            self.last_failure = str(error)
            print(f"reward: a call of {self.name} failed ({self.in_a_row} in a row): {error}", flush=True)
            return None
        self.in_a_row = 0
        return rewards

    def _arguments(self, asked: Asked) -> dict[str, Any]:
        arguments: dict[str, Any] = {"prompts": asked.prompts}
        if self.extra_column is not None:
            # The task market's name for it, and TRL's, which is that of the column.
            arguments["extra_data"] = asked.extras
            if self.extra_column.isidentifier() and self.extra_column not in ("completions", "prompts"):
                arguments[self.extra_column] = asked.extras
        return arguments


class _Builtin:
    def __init__(self, function: Callable[[str, Any], float | None]) -> None:
        self.function = function

    def __call__(self, asked: Asked) -> Rewards:
        return [self.function(text, extra) for text, extra in zip(asked.completions, asked.extras, strict=True)]

    tried = __call__


def normalised_weights(functions: Sequence[RewardFunction]) -> dict[str, float]:
    """Return the weights by name, scaled to a sum of 1."""
    weights = {reward.name: float(reward.weight) for reward in functions}
    total = math.fsum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


class RewardSet:
    """The rewards of a task, ready to be called.

    Attributes:
        weights: weight of each reward by name, with a sum of 1. What has weight 0 is computed and reported too.
    """

    def __init__(self, columns: GRPOColumns, settings: GRPOSettings) -> None:
        self.weights = normalised_weights(columns.reward_functions)
        self._rewards: dict[str, _Reward] = {}
        for reward in columns.reward_functions:
            source = _source_of(reward)
            if source is not None:
                self._rewards[reward.name] = SourceReward(reward.name, source, settings, columns.extra_column)
            elif reward.builtin is not None:
                self._rewards[reward.name] = _Builtin(builtin_function(reward.builtin))

    def __enter__(self) -> RewardSet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def try_out(self, asked: Asked) -> None:
        """Start all sandboxes, call each reward once, and say which layers keep source text in.

        Raises:
            TrainerError: ``BAD_CONFIG`` with the reward that fails.
        """
        for reward in self._sources():
            reward.try_out(asked)
        for reward in self._sources()[:1]:
            confined = reward.sandbox.confinement
            print(f"reward: source text is confined: {confined.describe() if confined else ''}", flush=True)

    def __call__(self, asked: Asked) -> dict[str, Rewards]:
        """Return what each reward gives to each completion, by the reward's name; nothing when its call fails.

        Raises:
            TrainerError: ``BAD_CONFIG`` when one of them failed too often.
        """
        none: Rewards = [None] * len(asked.completions)
        return {name: none if (found := reward(asked)) is None else found for name, reward in self._rewards.items()}

    def measured(self, asked: Asked, without: Collection[str] = ()) -> dict[str, Rewards | None]:
        """Return what each reward gives in an evaluation, where a call that fails is made once more.

        It does not end the run, however often a call has failed: whether there is a figure is found over all ranks.

        Args:
            asked: what to reward.
            without: rewards that are not asked any more.

        Returns:
            The rewards by their name; ``None`` for one that failed twice.
        """
        found: dict[str, Rewards | None] = {}
        for name, reward in self._rewards.items():
            if name not in without:
                first = reward.tried(asked)
                found[name] = reward.tried(asked) if first is None else first
        return found

    def report(self) -> dict[str, Any]:
        """Return what the report of the run says: weights, failed calls, and what confines source text."""
        sources = {reward.name: reward for reward in self._sources()}
        functions = []
        for name, weight in self.weights.items():
            said: dict[str, Any] = {"name": name, "weight": weight, "sandboxed": name in sources}
            if name in sources:
                one = sources[name]
                said |= {"calls": one.calls, "failedCalls": one.failed, "lastFailure": one.last_failure}
            functions.append(said)
        confined = next((one.sandbox.confinement for one in sources.values()), None)
        return {"functions": functions, "sandbox": confined.to_wire() if confined else None}

    def close(self) -> None:
        """End all sandboxes."""
        for reward in self._sources():
            reward.sandbox.close()

    def _sources(self) -> list[SourceReward]:
        return [reward for reward in self._rewards.values() if isinstance(reward, SourceReward)]


def open_rewards(config: RunConfig, prompts: Sequence[Prompt]) -> RewardSet:
    """Return the rewards of a run after trying each of them out on two prompts, in the place of completions.

    Raises:
        TrainerError: ``BAD_CONFIG`` with the reward that fails.
    """
    if config.data.grpo is None:
        raise TrainerError(ExitCode.BAD_CONFIG, "ConfigInvalid", "data.grpo: the columns are missing")
    rewards = RewardSet(config.data.grpo, config.train.grpo or GRPOSettings())
    texts = [prompt.text for prompt in prompts[:TRIED_OUT]]
    try:
        rewards.try_out(Asked(texts, texts, [prompt.extra for prompt in prompts[:TRIED_OUT]]))
    except BaseException:
        rewards.close()
        raise
    return rewards


def weighted(rewards: dict[str, Rewards], weights: dict[str, float]) -> Rewards:
    """Return the weighted sum for each completion; a reward that does not apply adds nothing.

    ``None`` where none applies, as in TRL.
    """
    sums: Rewards = []
    names = list(rewards)
    for row in zip(*rewards.values(), strict=True):
        terms = [weights[name] * value for name, value in zip(names, row, strict=True) if value is not None]
        sums.append(math.fsum(terms) if terms else None)
    return sums


def advantages(totals: Rewards, group: int, scale: bool) -> list[float]:
    """Return how much better each completion is than the others of its prompt.

    Reward minus the mean of its group, by the group's standard deviation where ``scale`` is set (DeepSeekMath,
    arXiv:2402.03300, section 4.1; sample deviation and :data:`STABILISER` as in TRL 1.16). A completion without a
    reward counts in neither and has the advantage 0.

    Args:
        totals: weighted sums, the completions of a prompt side by side.
        group: completions of a prompt.
        scale: divide by the standard deviation.
    """
    found: list[float] = []
    for start in range(0, len(totals), group):
        members = totals[start : start + group]
        known = [value for value in members if value is not None]
        mean = statistics.fmean(known) if known else 0.0
        spread = statistics.stdev(known) if len(known) > 1 and scale else 0.0
        divisor = spread + STABILISER if scale else 1.0
        found += [0.0 if value is None else (value - mean) / divisor for value in members]
    return found
