"""Supervised fine-tuning of a LoRA adapter with TRL and PEFT: one method, read from top to bottom.

Tokens, model and baseline come first, then the training with checkpoints that can be continued exactly, then
the verified adapter. Every rank runs this; rank 0 writes.
"""

from __future__ import annotations

import gc
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model, get_peft_model_state_dict
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from taskoffer.api.contract import ExitCode, RunConfig, RunState, Termination
from taskoffer_trainer.callbacks import CheckpointKeeper, Progress, Timings
from taskoffer_trainer.checkpoints import (
    Checkpoint,
    best_checkpoint,
    complete_checkpoints,
    mark_finished,
    read_run,
    write_run,
)
from taskoffer_trainer.data import Split
from taskoffer_trainer.export import Result, prepared, publish
from taskoffer_trainer.failures import COMPLETED, DEADLINE_REACHED, STOPPED, StopRequestedError, TrainerError
from taskoffer_trainer.figures import peaks
from taskoffer_trainer.held_out import answers, held_out_loss
from taskoffer_trainer.lora import lora_config
from taskoffer_trainer.models import Device, choose_device, load_model, load_tokenizer
from taskoffer_trainer.stop import Stop, StopCause
from taskoffer_trainer.tokens import TextData, tokenize_split
from taskoffer_trainer.trainer import Trainer, build_trainer, training_arguments
from taskoffer_trainer.verify import verify_adapter

__all__ = ["train"]


@dataclass(frozen=True)
class _Run:
    """What the stages of one run share."""

    config: RunConfig
    rank: int
    stop: Stop
    progress: Progress
    device: Device
    tokenizer: Any
    data: TextData

    @property
    def timings(self) -> Timings:
        return self.progress.timings


@dataclass(frozen=True)
class _Baseline:
    """What the base model does before any training."""

    loss: float
    answers: list[str]


def train(config: RunConfig, split: Split, run_dir: Path, rank: int, stop: Stop) -> Termination:
    """Train, verify and export one adapter; or leave a checkpoint when asked to stop.

    Args:
        config: what to do.
        split: the rows, the same in every rank.
        run_dir: folder for the progress report.
        rank: number of this process, from 0.
        stop: where signals are noted.

    Raises:
        TrainerError: for every failure that has a place in the contract.
        StopRequestedError: when asked to stop outside of the training loop.
    """
    transformers_logging.set_verbosity_error()
    progress = Progress(config, run_dir / "progress.json" if rank == 0 else None, Timings())
    device = choose_device(config)
    tokenizer = load_tokenizer(config)
    data = tokenize_split(split, config, tokenizer)
    run = _Run(config, rank, stop, progress, device, tokenizer, data)
    stop.check()

    trainer, tensors = _prepare(run)
    _leave_together(stop)
    progress.enter(RunState.EVALUATING)
    baseline = _baseline(run, trainer.model)
    _leave_together(stop)

    summary = _train_steps(run, trainer, baseline)
    if summary.exit_code == ExitCode.STOPPED:
        return summary

    # The adapter is verified by rank 0 alone, and only one base model at a time has to fit.
    stop.part()
    if rank != 0:
        return summary
    del trainer
    gc.collect()
    if device.cuda:
        torch.cuda.empty_cache()
    return _finish(run, baseline, tensors, summary)


def _leave_together(stop: Stop) -> None:
    """End all ranks when one of them got a signal, before there is anything to save."""
    if stop.agree() is StopCause.SIGNAL:
        raise StopRequestedError


def _prepare(run: _Run) -> tuple[Trainer, int]:
    """Load the model, put an adapter on it whose ranks fit its layers, and count the adapter's tensors."""
    config, progress = run.config, run.progress
    arguments = training_arguments(config, run.device)
    began = time.monotonic()
    base = load_model(config, run.device)
    run.timings.load = time.monotonic() - began
    settings, clamps = lora_config(base, config.lora)
    progress.clamps = (*run.device.clamps, *clamps)
    set_seed(config.train.seed)
    model = get_peft_model(base, settings)
    tensors = len(get_peft_model_state_dict(model, save_embedding_layers=False))
    keeper = CheckpointKeeper(config, tensors, run.rank, run.timings)
    trainer = build_trainer(config, arguments, model, run.tokenizer, run.data, progress, run.stop, keeper)
    for clamp in progress.clamps:
        change = f"{clamp.field} {clamp.requested} -> {clamp.effective}"
        print(f"clamp: {change} ({clamp.reason}) {clamp.message}")
    rows, held_out = len(run.data.train), len(run.data.held_out)
    print(
        f"train: {rows} rows, {held_out} held out, {tensors} adapter tensors, {config.gpus} process(es)",
        flush=True,
    )
    return trainer, tensors


def _baseline(run: _Run, model: Any) -> _Baseline:
    """Return held-out loss and answers of the base model; measured once, then read from disk.

    Raises:
        TrainerError: ``NO_MODEL`` when the loss is not finite.
    """
    config, timings, prompts = run.config, run.timings, run.data.prompts
    shared: list[Any] = [read_run(config) if run.rank == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(shared, src=0)
    known = shared[0]
    if isinstance(known.get("eval_loss_before"), float) and known.get("prompts") == prompts:
        timings.evaluate, timings.answer = known["evaluate_seconds"], known["answer_seconds"]
        run.progress.note(eval_loss_before=known["eval_loss_before"])
        return _Baseline(known["eval_loss_before"], known["answers_before"])
    batches = run.data.batches(config.train.per_device_train_batch_size)
    texts: list[str] = []
    began = time.monotonic()
    with model.disable_adapter():
        loss = held_out_loss(model, batches, run.tokenizer.pad_token_id, shared=True)
        timings.evaluate = time.monotonic() - began
        if not math.isfinite(loss):
            raise TrainerError(
                ExitCode.NO_MODEL,
                "ModelUnusable",
                f"the held-out loss of the base model {config.model.name} is {loss}; are its weights whole?",
            )
        if run.rank == 0:
            texts = answers(model, run.tokenizer, prompts)
    timings.answer = time.monotonic() - began - timings.evaluate
    if run.rank == 0:
        figures = {"eval_loss_before": loss, "prompts": prompts, "answers_before": texts}
        seconds = {"evaluate_seconds": timings.evaluate, "answer_seconds": timings.answer}
        write_run(config, {**figures, **seconds})
    run.progress.note(eval_loss_before=loss)
    print(f"train: held-out loss of the base model {loss:.4f}", flush=True)
    return _Baseline(loss, texts)


def _resume_point(run: _Run) -> Checkpoint | None:
    """Find the newest checkpoint that can be trusted; rank 0 removes broken ones, the others follow it."""
    found: list[Any] = [None]
    if run.rank == 0:
        found = [next(iter(complete_checkpoints(run.config, remove_broken=True)), None)]
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    return found[0] if isinstance(found[0], Checkpoint) else None


def _planned_steps(run: _Run, trainer: Trainer) -> int:
    """Return the number of optimizer steps, counted exactly as the training loop will."""
    if run.config.train.max_steps > 0:
        return run.config.train.max_steps
    return int(trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1])


def _train_steps(run: _Run, trainer: Trainer, baseline: _Baseline) -> Termination:
    """Train from the newest trustworthy checkpoint until the end, a signal or the deadline.

    Raises:
        TrainerError: ``BAD_CONFIG`` when the deadline leaves no time for a single step.
    """
    progress, stop = run.progress, run.stop
    resume = _resume_point(run)
    total = _planned_steps(run, trainer)
    step = resume.step if resume else 0
    progress.total, progress.step, progress.resumed_from = total, step, resume.step if resume else None
    train_loss: float | None = None
    if stop.agree(run.timings.reserve) is StopCause.DEADLINE and resume is None:
        raise TrainerError(
            ExitCode.BAD_CONFIG,
            "DeadlinePassed",
            f"deadline: {run.config.deadline:%Y-%m-%dT%H:%M:%SZ} leaves {stop.seconds_left():.0f} s, and one "
            f"step with evaluation and verification takes {run.timings.reserve:.0f} s",
        )
    if step < total and stop.cause is StopCause.NONE:
        if resume:
            print(f"train: going on from step {step} of {total}", flush=True)
        output = trainer.train(resume_from_checkpoint=str(resume.folder) if resume else None)
        step = trainer.state.global_step
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        train_loss = losses[-1] if losses else output.training_loss
    stopped = stop.cause is StopCause.SIGNAL
    summary = Termination(
        exit_code=ExitCode.STOPPED if stopped else ExitCode.DONE,
        reason=STOPPED if stopped else COMPLETED if step >= total else DEADLINE_REACHED,
        message=f"stopped by a signal with a checkpoint of step {step} of {total}" if stopped else "",
        step=step,
        total_steps=total,
        train_loss=train_loss,
        eval_loss_before=baseline.loss,
        resumed_from_step=progress.resumed_from,
        clamps=progress.clamps,
    )
    return summary.model_copy(update={**progress.took(), **peaks()})


def _finish(run: _Run, baseline: _Baseline, tensors: int, summary: Termination) -> Termination:
    """Verify the best checkpoint on a fresh base model and publish it.

    Raises:
        TrainerError: ``VERIFY_FAILED``.
        StopRequestedError: on a signal; the next attempt comes straight here.
    """
    config, progress = run.config, run.progress
    progress.enter(RunState.VERIFYING)
    best = best_checkpoint(complete_checkpoints(config))
    base = load_model(config, run.device)
    if run.device.cuda:
        base.to("cuda")
    result = Result(
        summary.step,
        summary.total_steps or summary.step,
        summary.train_loss,
        baseline.loss,
        math.nan,
        summary.reason,
        clamps=summary.clamps,
        rows={"train": len(run.data.train), "held_out": len(run.data.held_out)},
    )
    batches = run.data.batches(config.train.per_device_train_batch_size)
    with prepared(config, best) as folder:
        verified = verify_adapter(
            folder, base, run.tokenizer, batches, run.data.prompts, tensors, best.eval_loss, run.stop.check
        )
        progress.enter(RunState.SAVING)
        pairs = [
            {"prompt": prompt, "before": before, "after": after}
            for prompt, before, after in zip(run.data.prompts, baseline.answers, verified.answers, strict=True)
        ]
        final, digest = publish(config, folder, replace(result, eval_loss_after=verified.eval_loss, answers=pairs))
    fall = f"held-out loss {baseline.loss:.4f} -> {verified.eval_loss:.4f}"
    done = summary.model_copy(
        update={
            "message": f"adapter of step {best.step} verified: {fall}",
            "eval_loss_after": verified.eval_loss,
            "adapter_dir": str(final),
            "adapter_sha256": digest,
            "training_seconds": progress.took()["training_seconds"],
            **peaks(),
        }
    )
    mark_finished(config, done)
    progress.note(eval_loss=verified.eval_loss)
    progress.enter(RunState.DONE)
    return done
