"""What happens between the steps: progress, guard against NaN, stop and deadline, trustworthy checkpoints.

Imported by the ranks only, since the base class comes with transformers.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from taskoffer.api.contract import (
    POD_UID_VARIABLE,
    Clamp,
    ExitCode,
    InForce,
    ProgressReport,
    RunConfig,
    RunState,
)
from taskoffer_trainer.checkpoints import mark_complete, rotate
from taskoffer_trainer.clock import Clock, now
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.fallback import GRADIENTS_NOT_FINITE
from taskoffer_trainer.figures import metrics_of
from taskoffer_trainer.mirror import mirror_best
from taskoffer_trainer.progress import Spoken, write_report
from taskoffer_trainer.sharding import is_shared_out, local
from taskoffer_trainer.steps import Counters, Steps
from taskoffer_trainer.stop import Stop, StopCause
from taskoffer_trainer.timings import UNNOTICED_SECONDS, Timings
from taskoffer_trainer.tuning import rest

__all__ = ["CheckpointKeeper", "DutyCycle", "NaNGuard", "Progress", "StopWatch"]


class Progress(TrainerCallback):  # type: ignore[misc]
    """Keeps the progress report up to date (rank 0) and measures durations (all ranks)."""

    def __init__(self, config: RunConfig, path: Path | None, timings: Timings, clock: Clock) -> None:
        self.config, self.path, self.timings, self.clock = config, path, timings, clock
        self.state, self._entered = RunState.STARTING, time.monotonic()
        self.clamps: tuple[Clamp, ...] = ()
        self.in_force: dict[str, str] = {}
        self.metrics: dict[str, float] = {}
        self.step = 0
        self.total: int | None = None
        self.resumed_from: int | None = None
        self.steps: Steps | None = None
        self._step_began = self._tokens_at = self._said = self._written = 0.0
        self._tokens = 0.0
        self._train_began: float | None = None
        self._stepped = 0.0
        self._first_tokens: tuple[float, float] | None = None
        self._last_tokens: tuple[float, float] | None = None
        self._spoken = Spoken()

    def took(self) -> dict[str, float | None]:
        """Return this attempt's time since its first step and its rate, by their names in a termination.

        The rate is a mean over the time in steps; the first one, which warms up, is left out.
        """
        seconds = None if self._train_began is None else time.monotonic() - self._train_began
        rate = None
        if self._first_tokens is not None and self._last_tokens is not None:
            tokens, stepped = (b - a for a, b in zip(self._first_tokens, self._last_tokens, strict=True))
            rate = tokens / stepped if stepped > 0 else None
        return {"training_seconds": seconds, "tokens_per_second": rate}

    def enter(self, state: RunState) -> None:
        """Report a new state at once."""
        self.state, self._entered = state, time.monotonic()
        self.write()

    def note(self, **values: float) -> None:
        """Add figures to the report; figures that are not finite are left out."""
        self.metrics.update({name: value for name, value in values.items() if math.isfinite(value)})

    def remaining(self) -> int | None:
        """Estimate the seconds to the end, or ``None`` while nothing is known of it.

        Before the base model was measured it is what the operator predicted, before the first step what the base
        model's evaluation lets expect, then what the last steps took. A deadline ends every run.
        """
        seconds = self._expected()
        left = self.clock.planned_left()
        if seconds is None:
            return None
        if left is not None and self.state is not RunState.DONE:
            seconds = min(seconds, max(0.0, left))
        return math.ceil(seconds)

    def _expected(self) -> float | None:
        times = self.timings
        if self.state is RunState.DONE:
            return 0.0
        if self.state is RunState.VERIFYING:
            return max(0.0, times.finish - (time.monotonic() - self._entered))
        if self.state is RunState.SAVING:
            return times.save
        if self.total is None or not times.step:
            return self.config.expected_seconds
        return times.seconds(self.config, max(0, self.total - self.step))

    def _reach(self, step: int) -> None:
        """Take over the step and its rows together, for a failure is told with what was written last."""
        self.step = step
        if self.steps is not None:
            self.note(samples_total=self.steps.counters.samples)

    def _count(self, counters: Counters) -> None:
        """Take over what was done so far, and the rate since the last time."""
        here = time.monotonic()
        if counters.tokens and here > self._tokens_at:
            self.note(tokens_per_second=(counters.tokens - self._tokens) / (here - self._tokens_at))
        self._tokens, self._tokens_at = float(counters.tokens), here
        self._last_tokens = self._tokens, self._stepped
        self._first_tokens = self._first_tokens or self._last_tokens
        self.note(tokens_total=counters.tokens, out_of_memory=counters.out_of_memory)

    def report(self) -> ProgressReport:
        """Build the report. 100 % is only said when the adapter is verified and in place."""
        share = 0
        if self.state is RunState.DONE:
            share = 100
        elif self.total:
            share = min(99, 100 * self.step // self.total)
        return ProgressReport(
            job_name=self.config.job_name,
            attempt=self.config.attempt,
            state=self.state,
            progress_percentage=share,
            estimated_remaining_seconds=self.remaining(),
            metrics=metrics_of(self.metrics),
            last_updated_time=now(),
            step=self.step,
            total_steps=self.total,
            resumed_from_step=self.resumed_from,
            pod_uid=os.environ.get(POD_UID_VARIABLE),
            tuning=self.steps.applied if self.steps is not None else None,
            clamps=self.clamps,
            in_force=tuple(InForce(name=name, value=value) for name, value in sorted(self.in_force.items())),
        )

    def write(self) -> None:
        """Write the report where the launcher serves it from."""
        self._written = time.monotonic()
        if (path := self.path) is not None:
            self._spoken(lambda: write_report(path, self.report()))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Learn how many steps there are."""
        self.total = state.max_steps
        self._reach(state.global_step)
        self._tokens_at = self._train_began = time.monotonic()
        self._tokens = float(self.steps.counters.tokens) if self.steps is not None else 0.0
        self.enter(RunState.TRAINING)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock of a step."""
        self._step_began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock of a step."""
        took = time.monotonic() - self._step_began
        self.timings.steps.append(took)
        self._stepped += took
        self._reach(state.global_step)
        if self.steps is not None:
            # transformers knows nothing of epochs here: one pass of its loop is the whole run.
            state.epoch = self.steps.counters.samples / self.steps.plan.rows

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Take over the figures that the trainer logs, at most four times a second onto the disk."""
        logs = logs or {}
        self.note(**{name: float(logs[name]) for name in ("loss", "learning_rate", "grad_norm") if name in logs})
        self.note(epoch=float(state.epoch or 0.0), step_seconds=self.timings.step)
        if "loss" in logs and self.steps is not None:
            self._count(self.steps.counters)
        if time.monotonic() - self._written > 0.25:
            self.write()
        if self.path is not None and time.monotonic() - self._said > 5:
            self._said = time.monotonic()
            loss = self.metrics.get("loss", math.nan)
            print(
                f"train: step {self.step}/{self.total}, loss {loss:.4f}, about {self.remaining()} s left",
                flush=True,
            )


class DutyCycle(TrainerCallback):  # type: ignore[misc]
    """Rests after each step for as long as the tuning in force wants it; nothing else changes."""

    def __init__(self, steps: Steps, stop: Stop) -> None:
        self.steps, self.stop = steps, stop

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Rest; must come before the step's duration is measured, so that the predicted end knows of it."""
        applied = self.steps.applied
        if applied is not None and applied.duty_cycle < 1:
            rest(self.steps.worked, applied.duty_cycle, lambda: self.stop.signalled)


class NaNGuard(TrainerCallback):  # type: ignore[misc]
    """Leaves a step out when its gradients are not finite, which would spoil the weights for good.

    The gradients are added up over the ranks before this is called, so all ranks see the same, or together all of it.
    """

    LIMIT = 10
    """Steps in a row that may be left out before the run gives up."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.skipped = 0
        self.in_a_row = 0

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        """Drop gradients that are not finite; an optimizer leaves parameters without a gradient as they are.

        Raises:
            TrainerError: ``RESTART`` after :attr:`LIMIT` such steps in a row.
        """
        gradients = [local(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
        # One number for all tensors: a sum is not finite when any of its terms is not.
        finite = not gradients or bool(torch.isfinite(torch.stack([_sum(one) for one in gradients])).all())
        if is_shared_out(model) and self.progress.steps is not None:
            # Each rank sees its part of them.
            finite = not self.progress.steps.world.largest(not finite)[0]
        if finite:
            self.in_a_row = 0
            return
        optimizer.zero_grad(set_to_none=True)
        self.skipped += 1
        self.in_a_row += 1
        self.progress.note(skipped_steps=self.skipped)
        if self.skipped == 1:
            print(f"train: the gradients of step {state.global_step + 1} are not finite, the step is left out")
        if self.in_a_row >= self.LIMIT:
            raise TrainerError(
                ExitCode.RESTART,
                GRADIENTS_NOT_FINITE,
                f"the gradients of {self.in_a_row} steps in a row up to step {state.global_step + 1} are not "
                "finite; a smaller train.learningRate may help",
            )


def _sum(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.sum(dtype=torch.float32)


class StopWatch(TrainerCallback):  # type: ignore[misc]
    """Ends the training after the present step or evaluation on a signal or before the deadline, all ranks together."""

    def __init__(self, stop: Stop, timings: Timings, steps: Steps) -> None:
        self.stop, self.timings, self.steps = stop, timings, steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask all ranks; must come after the callback that plans evaluation and checkpoints."""
        cause = self._agree(control)
        if cause is StopCause.DEADLINE:
            # What is exported is the best checkpoint, so this one has to be measured as well.
            control.should_evaluate = True
        elif cause is StopCause.SIGNAL and control.should_evaluate and state.global_step < self.steps.plan.total_steps:
            # The checkpoint has to be there before the grace of a signal is over.
            self.steps.owed = bool(self.steps.world.largest(float(self.timings.evaluate > UNNOTICED_SECONDS))[0])
            control.should_evaluate = not self.steps.owed
            if self.steps.owed:
                print(f"train: step {state.global_step}, the evaluation is left to the next attempt", flush=True)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask again: who waits for the end of a signalled run is not to wait for a step that began after it."""
        if not control.should_training_stop:
            self._agree(control)

    def _agree(self, control: Any) -> StopCause:
        cause = self.stop.agree(self.timings.reserve)
        if cause is not StopCause.NONE:
            control.should_save = True
            control.should_training_stop = True
        return cause


class CheckpointKeeper(TrainerCallback):  # type: ignore[misc]
    """Lets a checkpoint count once all ranks have written it and it was checked, then removes old ones.

    The best one is copied to the output folder at once, so that a kill leaves a result there.
    """

    def __init__(
        self,
        config: RunConfig,
        expected_tensors: int,
        steps: Steps,
        timings: Timings,
        accompany: Callable[[Path], None],
    ) -> None:
        self.config, self.expected, self.steps, self.timings = config, expected_tensors, steps, timings
        self.accompany = accompany
        self.evaluated: tuple[int, float] | None = None

    def make_up(self, folder: Path) -> None:
        """Note in the checkpoint that the run goes on from what its evaluation, which was owed, has given."""
        world = self.steps.world
        if world.rank == 0 and self.evaluated is not None:
            mark_complete(folder, *self.evaluated, self.expected)
            mirror_best(self.config, self.accompany)
        world.wait()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check, mark and rotate on rank 0, while the others wait.

        Raises:
            TrainerError: ``RESTART`` when the checkpoint does not pass its check.
        """
        began = time.monotonic()
        world = self.steps.world
        world.wait()
        if world.rank == 0:
            loss = None
            if self.evaluated is not None and self.evaluated[0] == state.global_step:
                loss = self.evaluated[1]
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self.steps.keep(folder)
            mark_complete(folder, state.global_step, loss, self.expected)
            rotate(self.config)
            mirror_best(self.config, self.accompany)
        world.wait()
        took = time.monotonic() - began
        self.timings.save = max(self.timings.save, took)
        if took > 2:
            print(f"train: checking the checkpoint of step {state.global_step} took {took:.1f} s", flush=True)
