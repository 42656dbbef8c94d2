"""The course of a run, the same for every method: prepare, measure, train, verify, publish.

Every rank runs it; rank 0 writes. What differs between the methods stands in one file for each (``sft.py``, …) as
a class that fills in the steps below.
"""

from __future__ import annotations

import contextlib
import gc
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from transformers.utils import logging as transformers_logging

from taskoffer.api.contract import Clamp, ExitCode, RunConfig, RunState, Termination
from taskoffer_trainer.attention import attention_clamp
from taskoffer_trainer.averaging import Average, chosen
from taskoffer_trainer.baseline import Baseline, measured_base
from taskoffer_trainer.callbacks import CheckpointKeeper, Progress
from taskoffer_trainer.checkpoints import (
    Checkpoint,
    complete_checkpoints,
    logged,
)
from taskoffer_trainer.clock import reserve_clamp
from taskoffer_trainer.concluding import concluded
from taskoffer_trainer.config import global_batch, rows_at_once
from taskoffer_trainer.effective import effective, in_force
from taskoffer_trainer.evaluating import Evaluation
from taskoffer_trainer.failures import COMPLETED, DEADLINE_REACHED, STOPPED, StopRequestedError, TrainerError
from taskoffer_trainer.fallback import SMALLEST_PIECE
from taskoffer_trainer.figures import as_held_out, metrics_of, peaks
from taskoffer_trainer.mirror import mirror_best
from taskoffer_trainer.models import Device, choose_device
from taskoffer_trainer.sharding import share_out
from taskoffer_trainer.steps import Steps
from taskoffer_trainer.stop import Stop, StopCause
from taskoffer_trainer.stream import StepPlan
from taskoffer_trainer.timings import Timings
from taskoffer_trainer.tuning import MicroBatch
from taskoffer_trainer.verify import Verified
from taskoffer_trainer.volume import checkpoints_that_fit
from taskoffer_trainer.world import World

__all__ = ["Course"]


class Course(ABC):
    """One attempt of a run. A method fills in what stands below as abstract.

    Attributes:
        asked: what to do; what checkpoints belong to is said in terms of it.
        config: what this attempt does of that: with the settings of the pod and of the fallback profile.
        profile: the fallback profile, 0 for none.
        run_dir: folder for what the launcher serves.
        rank: number of this process, from 0.
        stop: where signals are noted and the deadline is known.
        progress: the report to the world.
        device: where and in which precision is computed.
        world: all ranks; opened with the process group.
        evaluation: how the held-out rows are gone through.
        trainer: transformers' or TRL's trainer with :class:`~taskoffer_trainer.steps.StepTrainer`.
        average: the average of the weights, where one is asked for.
        candidates: held-out loss of each that could be exported, where there was a choice.
    """

    unit = 1
    """Rows that cannot be parted (the completions of a prompt under GRPO)."""

    def __init__(self, config: RunConfig, run_dir: Path, rank: int, stop: Stop) -> None:
        transformers_logging.set_verbosity_error()
        found = effective(config)
        self.asked, self.config, self.profile, self._changed = config, found.config, found.profile, found.clamps
        self.run_dir, self.rank, self.stop = run_dir, rank, stop
        self.timings = Timings(self.config)
        report = run_dir / "progress.json" if rank == 0 else None
        self.progress = Progress(self.config, report, self.timings, stop.clock)
        self.device: Device = choose_device(self.config)
        self.world: World
        self.trainer: Any
        self.steps: Steps
        self.evaluation: Evaluation
        self.average: Average | None = None
        self.candidates: dict[str, float] = {}
        self.tensors = 0

    @abstractmethod
    def read(self) -> None:
        """Make of the rows what the model is given; light work that every rank does alone."""

    @abstractmethod
    def arguments(self) -> Any:
        """Return the trainer's arguments; with several processes this opens the process group."""

    @abstractmethod
    def prepare(self, arguments: Any) -> Any:
        """Load the base model, put an adapter on it, and return the trainer."""

    @abstractmethod
    def lengths(self) -> list[int] | None:
        """Return the length of each training row, or ``None`` where rows are alike."""

    @abstractmethod
    def measure(self, model: Any, shared: bool, between: Callable[[], None]) -> dict[str, float]:
        """Measure a model on the held-out rows; ``eval_loss`` is what is to become smaller.

        It may be left out where it cannot be measured this time, but not for the base model.

        Args:
            model: the model, with or without its adapter in force.
            shared: the ranks share the work; all of them call it.
            between: called between pieces of work; may raise to leave early.
        """

    @abstractmethod
    def answer(self, model: Any, between: Callable[[], None]) -> list[str]:
        """Let the model answer the sample prompts; of one that is shared out, all ranks call it."""

    @abstractmethod
    def prompts(self) -> list[str]:
        """Return the sample prompts."""

    @abstractmethod
    def verify(self, folder: Path, checkpoint: Checkpoint) -> Verified:
        """Load an adapter from disk onto a fresh base model and check what it does.

        Args:
            folder: the adapter as its user will load it.
            checkpoint: where it comes from, with what was measured there.

        Raises:
            TrainerError: ``VERIFY_FAILED``.
        """

    def remember(self, folder: Path) -> None:  # noqa: B027 - most methods have nothing to add.
        """Write into a checkpoint, on rank 0, what the verification needs to know of it; nothing by default."""

    def accompany(self, folder: Path) -> None:  # noqa: B027 - most methods have nothing to add.
        """Write into the adapter's folder what its user needs beside it; nothing by default."""

    @abstractmethod
    def counts(self) -> dict[str, int]:
        """Return how many rows there are: ``train`` and ``held_out``."""

    def rows_measured(self) -> int:
        """Return how many rows go through the model in an evaluation, as rows of a step are counted."""
        return self.counts()["held_out"]

    def outcome(self, before: dict[str, float], after: dict[str, float]) -> str:
        """Say in a few words what the training changed on the held-out rows."""
        return f"held-out loss {before['eval_loss']:.4f} -> {after['eval_loss']:.4f}"

    def remedy(self) -> str:
        """Say what may help when nothing was learned."""
        return "train longer (train.numTrainEpochs, train.maxSteps) or with a higher train.learningRate"

    def details(self) -> dict[str, Any]:
        """Return what the manifest says of this method alone, by names of its own."""
        return {}

    def run(self) -> Termination:
        """Train, verify and export one adapter; or leave a checkpoint when asked to stop.

        Raises:
            TrainerError: for every failure that has a place in the contract.
            StopRequestedError: when asked to stop outside of the training loop.
        """
        try:
            return self._run()
        finally:
            # A report is written now and then; the last one says how far the attempt came, whatever has ended it.
            with contextlib.suppress(OSError):
                self.progress.write()

    def _run(self) -> Termination:
        self.read()
        self.stop.check()
        arguments = self.arguments()
        self.world = self.stop.world = World()
        self.trainer = self.prepare(arguments)
        self._place()
        self._announce()
        self._leave_together()
        self.progress.enter(RunState.EVALUATING)
        baseline = measured_base(self, self.between())
        self._leave_together()
        summary = self._train(baseline)
        if summary.exit_code == ExitCode.STOPPED:
            return summary
        best = chosen(self, self.between())
        # The adapter is verified by rank 0 alone, on all GPUs if need be, and only one base model at a time has to fit.
        self.average = None
        del self.trainer
        gc.collect()
        if self.device.cuda:
            torch.cuda.empty_cache()
        self.world.part()
        return concluded(self, baseline, summary, best) if self.rank == 0 else summary

    def _place(self) -> None:
        """Put the model where it computes: all of it on this rank's device, or this rank's part of it."""
        model, device = self.trainer.model, self.trainer.args.device
        if self.config.train.fsdp:
            share_out(model, self.world, device)
        else:
            model.to(device)

    def between(self) -> Callable[[], None]:
        """Return what is called between pieces of work outside of the training: one process leaves there on a signal.

        Of several none may leave alone, for the others would wait for it.
        """
        return self.stop.check if self.world.size == 1 else lambda: None

    def _leave_together(self) -> None:
        """End all ranks when one of them got a signal, before there is anything to save."""
        if self.stop.agree() is StopCause.SIGNAL:
            raise StopRequestedError

    def _announce(self) -> None:
        """Count the adapter's tensors, plan the steps, and say what was changed."""
        trainer = self.trainer
        self.tensors = len(get_peft_model_state_dict(trainer.model, save_embedding_layers=False))
        self._settle()
        self._plan_evaluations()
        config, train, rows = self.config, self.config.train, len(trainer.train_dataset)
        plan = StepPlan.of(rows, global_batch(config) // self.unit, train.num_train_epochs, train.max_steps)
        micro_batch = MicroBatch(train.per_device_train_batch_size, self.unit)
        micro_batch.most_tokens = train.per_device_train_max_tokens
        micro_batch.fits = self.unit if self.profile >= SMALLEST_PIECE else None
        micro_batch.most = self.unit * -(-plan.global_batch // self.world.size)
        self.steps = Steps(config, plan, self.world, micro_batch, self.lengths())
        if train.ema_decay is not None:
            self.average = Average(train.ema_decay, train.ema_update_every, trainer.model, self.rank == 0)
            self.timings.candidates = 2
        keeper = CheckpointKeeper(config, self.tensors, self.steps, self.timings, self.accompany)
        trainer.take_over(self, keeper)
        for clamp in self.progress.clamps:
            print(f"clamp: {clamp.field} {clamp.requested} -> {clamp.effective} ({clamp.reason}) {clamp.message}")
        counts = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in self.counts().items())
        print(
            f"train: rows {counts}; {plan.total_steps} steps of {global_batch(config)}; {self.tensors} adapter "
            f"tensors, {config.gpus} process(es)",
            flush=True,
        )
        print(f"train: {', '.join(f'{name} {value}' for name, value in self.progress.in_force.items())}", flush=True)

    def _settle(self) -> None:
        """Find what only the loaded model shows: attention, room for checkpoints; and collect what was changed."""
        model, config = self.trainer.model, self.config
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        # Rank 0 looks alone: the others would see what it writes.
        limit, room = self.world.share(checkpoints_that_fit(config, trained) if self.rank == 0 else None)
        train = config.train.model_copy(update={"save_total_limit": limit})
        self.config = self.progress.config = config.model_copy(update={"train": train})
        found = (*self._changed, *self.progress.clamps, *attention_clamp(config, model), *room)
        found = (*found, *reserve_clamp(config, self.stop.clock))
        self.progress.clamps = tuple(clamp for clamp in found if self._matters(clamp))
        self.progress.in_force = in_force(self.config, self.profile, model)

    def _plan_evaluations(self) -> None:
        """Measure as many rows at once as are asked for, as far as memory allows, and say when it does not."""

        def told(evaluation: Evaluation) -> None:
            others = (one for one in self.progress.clamps if one not in shrunk)
            shrunk[:] = [one for one in [evaluation.clamp()] if one is not None]
            self.progress.clamps = (*others, *shrunk)
            self.progress.note(evaluation_out_of_memory=evaluation.repeated)

        asked = self.config.train.per_device_eval_batch_size or rows_at_once(self.config)
        shrunk: list[Clamp] = []
        self.evaluation = Evaluation(asked, self.world, Path(self.config.checkpoint_dir), told)
        told(self.evaluation)

    def _matters(self, clamp: Clamp) -> bool:
        """Leave out that no more rows may be held out where there are not even that many."""
        return clamp.field != "data.evalRowsMax" or self.counts()["held_out"] >= int(clamp.effective)

    def measured(self, figures: dict[str, float]) -> None:
        """Report what the base model does, and how long a step and the whole may take then."""
        self.timings.guess_step(self.config, self.steps.plan.global_batch * self.unit, self.rows_measured())
        self.progress.total = self.steps.plan.total_steps
        self.progress.note(**{f"{name}_before": value for name, value in as_held_out(figures).items()})
        self.progress.write()

    def _resume_point(self) -> Checkpoint | None:
        """Find the newest checkpoint that can be trusted; rank 0 removes broken ones, the others follow it."""
        found = None
        if self.rank == 0:
            found = next(iter(complete_checkpoints(self.config, remove_broken=True)), None)
            # An attempt that was killed may have had no time for that.
            mirror_best(self.config, self.accompany)
        found = self.world.share(found)
        return found if isinstance(found, Checkpoint) else None

    def _train(self, baseline: Baseline) -> Termination:
        """Train from the newest trustworthy checkpoint until the end, a signal or the deadline.

        Raises:
            TrainerError: ``BAD_CONFIG`` when the deadline leaves no time for a single step.
        """
        progress, stop, total = self.progress, self.stop, self.steps.plan.total_steps
        resume = self._resume_point()
        step = resume.step if resume else 0
        progress.total, progress.step, progress.resumed_from = total, step, resume.step if resume else None
        log = logged(resume) if resume else []
        if stop.agree(self.timings.reserve) is StopCause.DEADLINE and resume is None:
            self._begin_late()
        if resume:
            self.steps.restore(resume.folder)
        if step < total and stop.cause is StopCause.NONE:
            if resume:
                print(f"train: going on from step {step} of {total}", flush=True)
                self.timings.stretch = self.steps.stretch or 1
                if self.average is not None:
                    self.average.restore(resume.folder)
            self.steps.take_word()
            self.trainer.loss_before = baseline.loss
            self.trainer.begin(self.steps, step)
            self.trainer.train(resume_from_checkpoint=str(resume.folder) if resume else None)
            step, log = self.trainer.state.global_step, self.trainer.state.log_history
        losses = [entry["loss"] for entry in log if "loss" in entry]
        stopped = stop.cause is StopCause.SIGNAL
        summary = Termination(
            exit_code=ExitCode.STOPPED if stopped else ExitCode.DONE,
            reason=STOPPED if stopped else COMPLETED if step >= total else DEADLINE_REACHED,
            message=_stopped_at(step, total) if stopped else "",
            step=step,
            total_steps=total,
            samples=self.steps.counters.samples,
            train_loss=losses[-1] if losses else None,
            eval_loss_before=baseline.loss,
            figures_before=metrics_of(as_held_out(baseline.figures)),
            resumed_from_step=progress.resumed_from,
            clamps=progress.clamps,
        )
        return summary.model_copy(update={**progress.took(), **peaks()})

    def _begin_late(self) -> None:
        """Use up the reserve where there is nothing to hand over yet: one step is better than none.

        Raises:
            TrainerError: ``BAD_CONFIG`` when the deadline leaves no time for a single step.
        """
        clock, needed = self.stop.clock, self.timings.reserve
        if self.stop.agree(needed, at_the_latest=True) is StopCause.DEADLINE:
            raise TrainerError(
                ExitCode.BAD_CONFIG,
                "DeadlinePassed",
                f"deadline: {clock.deadline:%Y-%m-%dT%H:%M:%SZ} leaves {clock.left():.0f} s, and one step with "
                f"evaluation and verification takes {needed:.0f} s",
            )


def _stopped_at(step: int, total: int) -> str:
    if step == 0:
        return f"stopped by a signal before the first of {total} steps"
    return f"stopped by a signal with a checkpoint of step {step} of {total}"
