"""What transformers' trainer gets from us, whichever method it trains: settings, callbacks, evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import PrinterCallback

from taskoffer.api.contract import Clamp, RunConfig, RunState
from taskoffer_trainer.callbacks import CheckpointKeeper, DutyCycle, NaNGuard, StopWatch
from taskoffer_trainer.checkpoints import ADAPTER_FILE
from taskoffer_trainer.compiling import Compiling, compile_failed
from taskoffer_trainer.config import global_batch
from taskoffer_trainer.failures import StopRequestedError
from taskoffer_trainer.figures import as_held_out
from taskoffer_trainer.in_time import InTime
from taskoffer_trainer.models import Device
from taskoffer_trainer.pace import EvaluationPace
from taskoffer_trainer.schedule import LearningRate
from taskoffer_trainer.sharding import gathered, is_shared_out, put_back, read_adapter
from taskoffer_trainer.steps import Steps, StepTrainer
from taskoffer_trainer.telemetry import Telemetry
from taskoffer_trainer.timings import UNNOTICED_SECONDS

if TYPE_CHECKING:
    from taskoffer_trainer.course import Course

__all__ = ["CourseTrainer", "training_arguments"]


class CourseTrainer(StepTrainer):
    """Steps as this package defines them, measured and stopped as the course of a run wants it.

    Attributes:
        loss_before: held-out loss of the base model, where it is known.
    """

    loss_before = math.inf

    def take_over(self, course: Course, keeper: CheckpointKeeper) -> None:
        """Add the callbacks.

        Their order matters: a rest belongs to its step, which is measured next; evaluations are put off, and the
        training stopped, after transformers' own callback has planned evaluation and checkpoint of the step; and a
        checkpoint is complete when everything else is in it.
        """
        self.course, self.keeper = course, keeper
        self.compiling = Compiling()
        self._loss: torch.Tensor | None = None
        course.progress.steps = course.steps
        self.args.max_steps = course.steps.plan.total_steps  # type: ignore[attr-defined]
        for callback in (
            DutyCycle(course.steps, course.stop),
            course.progress,
            NaNGuard(course.progress),
            EvaluationPace(course.steps, course.timings, course.progress),
            InTime(course.config, course.stop.clock, course.timings, course.steps.world),
            StopWatch(course.stop, course.timings, course.steps),
            course.average,
            keeper,
            Telemetry(course.config, course.run_dir, course.rank, course.timings),
        ):
            if callback is not None:
                self.add_callback(callback)  # type: ignore[attr-defined]
        self.remove_callback(PrinterCallback)  # type: ignore[attr-defined]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """Let one object say every learning rate of the run."""
        self.learning_rate = LearningRate(self.course.config.train, num_training_steps, self.loss_before)
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self.learning_rate)  # type: ignore[attr-defined]
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _set_learning_rate(self) -> None:
        """Make the learning rate of the next step what the settings and observations of this moment say.

        The scheduler has set it with its last step; an evaluation since then, or a checkpoint of an attempt that had
        another peak, knew another one.
        """
        scheduler, peak = self.lr_scheduler, self.course.config.train.learning_rate
        scheduler.base_lrs = [peak for _ in scheduler.base_lrs]
        rates = [peak * factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["initial_lr"], group["lr"] = peak, rate
        scheduler._last_lr = rates

    def training_step(self, model: Any, rows: list[Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Compute the gradient of one step, with the compiled model for as long as that pays.

        Raises:
            TrainerError: ``RESTART`` when the model cannot be compiled, and when not even one row fits into memory.
        """
        loss = self._compiled_step(model, rows, num_items_in_batch)
        if bool(torch.isfinite(loss)):
            self._loss = loss
        # transformers logs 0 for a loss that is no number; the guard has counted the step, which is left out.
        return self._loss if self._loss is not None else loss

    def _compiled_step(self, model: Any, rows: list[Any], num_items_in_batch: Any) -> torch.Tensor:
        if not self.course.config.train.torch_compile:
            return super().training_step(model, rows, num_items_in_batch)
        before = self.compiling.given_up
        model = self.compiling.choose(model, self.steps.micro_batch.size)
        clamp = self.compiling.clamp()
        if clamp is not None and not before:
            self._report_plain(clamp)
        try:
            return super().training_step(model, rows, num_items_in_batch)
        except Exception as error:
            failure = compile_failed(error)
            if failure is None:
                raise
            raise failure from error

    def _report_plain(self, clamp: Clamp) -> None:
        """Say that the model is no longer compiled."""
        progress = self.course.progress
        progress.clamps = (*progress.clamps, clamp)
        progress.in_force["torchCompile"] = "off"
        print(f"clamp: train.torchCompile true -> false (CompileOff) {clamp.message}", flush=True)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure the held-out rows over all ranks; called by the training loop."""
        course, state = self.course, self.state  # type: ignore[attr-defined]
        course.progress.enter(RunState.EVALUATING)
        began = time.monotonic()
        try:
            figures = course.measure(self.model, True, self._between())  # type: ignore[attr-defined]
        except StopRequestedError:
            return self._owe()
        course.timings.evaluate = time.monotonic() - began
        # Without it nothing was measured that could be compared: no checkpoint is the best by it, no rate follows it.
        if (loss := figures.get("eval_loss")) is not None:
            self.keeper.evaluated = (state.global_step, loss)
            if self.learning_rate.observe(loss) is not None:
                self._set_learning_rate()
        held_out = as_held_out(figures)
        course.progress.note(**held_out, learning_rate_factor=self.learning_rate.factor)
        course.progress.enter(RunState.TRAINING)
        said = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in sorted(figures.items()))
        print(f"train: step {state.global_step}, {said}", flush=True)
        state.log_history.append({**held_out, "step": state.global_step})
        self.control: Any = self.callback_handler.on_evaluate(self.args, state, self.control, figures)  # type: ignore[attr-defined]
        if self.steps.owed:
            self.steps.owed = False
            self.keeper.make_up(Path(self.args.output_dir) / f"checkpoint-{state.global_step}")  # type: ignore[attr-defined]
        return figures

    def begin(self, steps: Steps, first: int) -> None:
        """Begin with the evaluation that the attempt before has left out; every rate after it follows from it."""
        super().begin(steps, first)
        self.args.eval_on_start = steps.owed  # type: ignore[attr-defined]

    def _between(self) -> Callable[[], None]:
        """Return what is called between pieces of an evaluation: one that takes long is left on a signal.

        Not the last one, nor one that is made up for: the steps after it would take another course.
        """
        course, steps = self.course, self.steps
        last = self.state.global_step >= steps.plan.total_steps  # type: ignore[attr-defined]
        if steps.owed or last or course.timings.evaluate <= UNNOTICED_SECONDS:
            return lambda: None
        return course.between()

    def _owe(self) -> dict[str, float]:
        """Leave an evaluation for the next attempt, and have the checkpoint written now."""
        step = self.state.global_step  # type: ignore[attr-defined]
        print(f"train: step {step}, the evaluation is left to the next attempt", flush=True)
        self.steps.owed = True
        self.course.stop.agree()
        self.course.progress.enter(RunState.TRAINING)
        self.control.should_evaluate = False
        self.control.should_save = self.control.should_training_stop = True
        return {}

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint, and measure how long that takes."""
        began = time.monotonic()
        super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]
        if self.course.rank == 0:
            step = self.state.global_step  # type: ignore[attr-defined]
            self.course.remember(Path(self.args.output_dir) / f"checkpoint-{step}")  # type: ignore[attr-defined]
        self.course.timings.write = max(self.course.timings.write, time.monotonic() - began)

    def _move_model_to_device(self, _model: Any, _device: Any) -> None:
        """Leave the model where it is; the course of a run places it, whole or in parts."""

    # Of a model that is shared out every rank writes and reads its part; the files are those of any other run.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter, whole."""
        if not is_shared_out(self.model):  # type: ignore[attr-defined]
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
            return
        named = self.model.named_parameters()  # type: ignore[attr-defined]
        adapter = gathered({name: parameter for name, parameter in named if parameter.requires_grad})
        self._save(output_dir, state_dict=adapter)  # type: ignore[attr-defined]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_shared_out(self.model):  # type: ignore[attr-defined]
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        optimizer = self.optimizer.state_dict()  # type: ignore[attr-defined]
        state = {number: gathered(values) for number, values in optimizer["state"].items()}
        if self.args.should_save:  # type: ignore[attr-defined]
            torch.save({**optimizer, "state": state}, Path(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if is_shared_out(self.model):  # type: ignore[attr-defined]
            read_adapter(self.model, Path(resume_from_checkpoint, ADAPTER_FILE))  # type: ignore[attr-defined]
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if is_shared_out(self.model):  # type: ignore[attr-defined]
            self._load_parts(checkpoint)
        else:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        self._set_learning_rate()

    def _load_parts(self, checkpoint: str) -> None:
        # Mapped into memory, so that a rank reads no more than it takes at a time.
        saved = torch.load(Path(checkpoint, OPTIMIZER_NAME), map_location="cpu", weights_only=True, mmap=True)
        groups = self.optimizer.param_groups  # type: ignore[attr-defined]
        for number, parameter in enumerate(one for group in groups for one in group["params"]):
            values = saved["state"].get(number, {})
            values.update({name: put_back(value, parameter) for name, value in values.items()})
        self.optimizer.load_state_dict(saved)  # type: ignore[attr-defined]
        scheduler = torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True)
        self.lr_scheduler.load_state_dict(scheduler)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write no card into checkpoints; the exported adapter gets one of its own."""


def training_arguments(config: RunConfig, device: Device) -> dict[str, Any]:
    """Return the settings that all methods share, by their names in transformers' TrainingArguments.

    Everything that the libraries default differently from us, or change from version to version, is said
    explicitly.
    """
    train = config.train
    distributed: dict[str, Any] = {}
    if config.gpus > 1:
        # In a run of one process transformers refuses it.
        distributed = {"ddp_backend": "nccl" if device.cuda else "gloo"}
    return {
        "output_dir": config.checkpoint_dir,
        "use_cpu": not device.cuda,
        # The plan of the steps says when to end; this is set once the rows are counted.
        "max_steps": 1,
        # A step's rows come as one batch and are cut here, so transformers has nothing to accumulate.
        "per_device_train_batch_size": max(1, global_batch(config) // config.gpus),
        "gradient_accumulation_steps": 1,
        "average_tokens_across_devices": False,
        "ignore_data_skip": True,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.lr_scheduler_type,
        "warmup_steps": train.warmup_steps,
        "optim": train.optim,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "bf16": device.dtype is torch.bfloat16,
        "fp16": False,
        "torch_compile": train.torch_compile,
        "eval_strategy": "steps",
        "eval_steps": train.eval_steps,
        "save_strategy": "steps",
        "save_steps": train.save_steps,
        "save_total_limit": None,  # CheckpointKeeper removes old ones, and only after the new one was checked.
        "dataloader_num_workers": train.dataloader_num_workers,
        "dataloader_pin_memory": False,  # Rows are collated after they were loaded.
        "seed": train.seed,
        "data_seed": train.seed,
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": "none",
        **distributed,
    }
