"""Supervised fine-tuning of a LoRA adapter with TRL and PEFT: one method, read from top to bottom.

Data, model and baseline come first, then the training with checkpoints that can be continued exactly, then the
verified adapter. Every rank runs this; rank 0 writes.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import get_peft_model, get_peft_model_state_dict
from torch.utils.data import Sampler
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as transformers_logging
from trl import SFTConfig, SFTTrainer

from taskoffer.api.contract import ExitCode, RunConfig, RunState, Termination
from taskoffer_trainer.callbacks import CheckpointKeeper, NaNGuard, Progress, StopWatch, Timings
from taskoffer_trainer.checkpoints import (
    Checkpoint,
    best_checkpoint,
    complete_checkpoints,
    mark_finished,
    read_run,
    write_run,
)
from taskoffer_trainer.data import TokenRow, build_examples, read_rows, split_rows, tokenize
from taskoffer_trainer.export import Result, prepared, publish
from taskoffer_trainer.failures import COMPLETED, DEADLINE_REACHED, STOPPED, StopRequestedError, TrainerError
from taskoffer_trainer.held_out import answers, batches_of, held_out_loss
from taskoffer_trainer.lora import lora_config
from taskoffer_trainer.models import Device, choose_device, load_model, load_tokenizer
from taskoffer_trainer.stop import Stop, StopCause
from taskoffer_trainer.verify import verify_adapter

__all__ = ["train"]


class EpochSampler(Sampler[int]):  # type: ignore[misc]
    """The order of the rows as a pure function of seed and epoch, so that a resumed run sees the same order.

    With lengths, rows are sorted by length within groups of 64 shuffled rows, which keeps padding small.
    """

    GROUP = 64

    def __init__(self, count: int, seed: int, lengths: list[int] | None) -> None:
        self.count, self.seed, self.lengths, self.epoch = count, seed, lengths, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; the data loader calls it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order: list[int] = torch.randperm(self.count, generator=generator).tolist()
        if self.lengths is None:
            return iter(order)
        lengths = self.lengths
        groups = (order[start : start + self.GROUP] for start in range(0, self.count, self.GROUP))
        return iter([row for group in groups for row in sorted(group, key=lambda row: -lengths[row])])

    def __len__(self) -> int:
        return self.count


class Trainer(SFTTrainer):  # type: ignore[misc]
    """TRL's trainer with our order of rows and our held-out loss."""

    def prepare_ours(
        self, batches: list[list[TokenRow]], keeper: CheckpointKeeper, progress: Progress
    ) -> None:
        """Hand over what the overridden methods need."""
        self.held_out, self.keeper, self.progress = batches, keeper, progress

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        rows = self.train_dataset
        lengths = (
            [len(ids) for ids in rows["input_ids"]] if self.args.train_sampling_strategy != "random" else None
        )
        return EpochSampler(len(rows), self.args.seed, lengths)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure the held-out loss over all ranks; called by the training loop."""
        self.progress.enter(RunState.EVALUATING)
        began = time.monotonic()
        loss = held_out_loss(self.model, self.held_out, self.processing_class.pad_token_id, shared=True)
        self.progress.timings.evaluate = time.monotonic() - began
        self.keeper.evaluated = (self.state.global_step, loss)
        self.progress.note(eval_loss=loss)
        self.progress.enter(RunState.TRAINING)
        if self.is_world_process_zero():
            print(f"train: step {self.state.global_step}, held-out loss {loss:.4f}", flush=True)
        metrics = {"eval_loss": loss}
        self.state.log_history.append({**metrics, "step": self.state.global_step})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write no card into checkpoints; the exported adapter gets one of its own."""


def _arguments(config: RunConfig, device: Device) -> SFTConfig:
    """Translate the settings. Everything that the libraries default differently from us is said explicitly."""
    train = config.train
    distributed: dict[str, Any] = {}
    if config.gpus > 1:
        # In a run of one process transformers refuses these.
        distributed = {"ddp_backend": "nccl" if device.cuda else "gloo", "ddp_find_unused_parameters": False}
    return SFTConfig(
        output_dir=config.checkpoint_dir,
        use_cpu=not device.cuda,
        num_train_epochs=train.num_train_epochs,
        max_steps=train.max_steps,
        per_device_train_batch_size=train.per_device_train_batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        max_length=train.max_length,
        packing=train.packing,
        eval_packing=False,
        train_sampling_strategy="group_by_length" if train.group_by_length else "random",
        bf16=device.dtype is torch.bfloat16,
        fp16=False,
        activation_checkpointing=train.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if train.gradient_checkpointing else None,
        torch_compile=train.torch_compile,
        eval_strategy="steps",
        eval_steps=train.eval_steps,
        save_strategy="steps",
        save_steps=train.save_steps,
        save_total_limit=None,  # CheckpointKeeper removes old ones, and only after the new one was checked.
        dataloader_num_workers=train.dataloader_num_workers,
        dataloader_pin_memory=device.cuda,
        seed=train.seed,
        data_seed=train.seed,
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        dataset_kwargs=None if train.packing else {"skip_prepare_dataset": True},
        **distributed,
    )


def _dataset(rows: list[TokenRow]) -> Dataset:
    return Dataset.from_dict(
        {"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]}
    )


def _resume_point(config: RunConfig, rank: int) -> Checkpoint | None:
    """Find the newest checkpoint that can be trusted; rank 0 looks and removes broken ones, the others follow it."""
    found: list[Any] = [None]
    if rank == 0:
        found = [next(iter(complete_checkpoints(config, remove_broken=True)), None)]
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    return found[0] if isinstance(found[0], Checkpoint) else None


def _baseline(
    config: RunConfig,
    rank: int,
    model: Any,
    tokenizer: Any,
    batches: list[list[TokenRow]],
    prompts: list[str],
    timings: Timings,
) -> tuple[float, list[str]]:
    """Return held-out loss and answers of the base model; measured once, then read from the checkpoint folder."""
    known: list[Any] = [None]
    if rank == 0:
        run = read_run(config)
        if isinstance(run.get("eval_loss_before"), float) and run.get("prompts") == prompts:
            known = [(run["eval_loss_before"], run["answers_before"])]
    if dist.is_initialized():
        dist.broadcast_object_list(known, src=0)
    if known[0] is not None:
        return known[0][0], known[0][1]
    began = time.monotonic()
    with model.disable_adapter():
        loss = held_out_loss(model, batches, tokenizer.pad_token_id, shared=True)
        timings.evaluate = time.monotonic() - began
        if not math.isfinite(loss):
            raise TrainerError(
                ExitCode.NO_MODEL,
                "ModelUnusable",
                f"the held-out loss of the base model {config.model.name} is {loss}; are its weights whole?",
            )
        texts: list[str] = []
        if rank == 0:
            began = time.monotonic()
            texts = answers(model, tokenizer, prompts)
            timings.answer = time.monotonic() - began
            write_run(config, {"eval_loss_before": loss, "prompts": prompts, "answers_before": texts})
    return loss, texts


def train(config: RunConfig, run_dir: Path, rank: int, stop: Stop) -> Termination:
    """Train, verify and export one adapter; or leave a checkpoint when asked to stop.

    Raises:
        TrainerError: for every failure that has a place in the contract.
        StopRequestedError: when asked to stop outside of the training loop.
    """
    transformers_logging.set_verbosity_error()
    timings = Timings()
    progress = Progress(config, run_dir / "progress.json" if rank == 0 else None, timings)

    # Data: the same rows, split and tokens in every rank.
    device = choose_device(config)
    tokenizer = load_tokenizer(config)
    columns = config.data.instruct
    if columns is None:
        raise TrainerError(ExitCode.BAD_CONFIG, "ConfigInvalid", "data.instruct is missing")
    examples = build_examples(read_rows(config.data, columns), columns)
    split = split_rows(examples, config.data, config.train.seed)
    train_rows = tokenize(split.train, tokenizer, config.train.max_length, "training")
    held_rows = tokenize(split.held_out, tokenizer, config.train.max_length, "held-out")
    batches = batches_of(held_rows, config.train.per_device_train_batch_size)
    prompts = list(config.sample_prompts) or [split.held_out[0].user or split.held_out[0].answer[:80]]
    stop.check()

    # Model: the base with an adapter whose ranks fit its layers. The arguments come first, since they open the
    # process group.
    arguments = _arguments(config, device)
    began = time.monotonic()
    base = load_model(config, device)
    timings.load = time.monotonic() - began
    adapter, clamps = lora_config(base, config.lora)
    progress.clamps = (*device.clamps, *clamps)
    set_seed(config.train.seed)
    model = get_peft_model(base, adapter)
    expected_tensors = len(get_peft_model_state_dict(model, save_embedding_layers=False))
    keeper = CheckpointKeeper(config, expected_tensors, rank, timings)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=_dataset(train_rows),
        eval_dataset=_dataset(held_rows),
        processing_class=tokenizer,
        callbacks=[progress, NaNGuard(progress), StopWatch(stop, timings), keeper],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.prepare_ours(batches, keeper, progress)
    if rank == 0:
        for clamp in progress.clamps:
            print(
                f"clamp: {clamp.field} {clamp.requested} -> {clamp.effective} ({clamp.reason}) {clamp.message}"
            )
        print(
            f"train: {len(train_rows)} rows to train, {len(held_rows)} held out, {expected_tensors} adapter tensors, "
            f"{config.gpus} process(es) on {device.why}",
            flush=True,
        )
    _leave_together(stop)
    progress.enter(RunState.EVALUATING)
    loss_before, answers_before = _baseline(config, rank, trainer.model, tokenizer, batches, prompts, timings)
    progress.note(eval_loss_before=loss_before)
    if rank == 0:
        print(f"train: held-out loss of the base model {loss_before:.4f}", flush=True)
    _leave_together(stop)

    # Training, from the newest checkpoint that can be trusted.
    resume = _resume_point(config, rank)
    train_loss: float | None = None
    step = resume.step if resume else 0
    total = _planned_steps(trainer, config)
    progress.total, progress.step, progress.resumed_from = total, step, resume.step if resume else None
    if step < total and not (resume and stop.agree(timings.reserve) is StopCause.DEADLINE):
        if rank == 0 and resume:
            print(f"train: going on from step {step} of {total}", flush=True)
        output = trainer.train(resume_from_checkpoint=str(resume.folder) if resume else None)
        step = trainer.state.global_step
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        train_loss = losses[-1] if losses else output.training_loss
    if stop.cause is StopCause.SIGNAL:
        return Termination(
            exit_code=ExitCode.STOPPED,
            reason=STOPPED,
            message=f"stopped by a signal with a checkpoint of step {step} of {total}",
            step=step,
            total_steps=total,
            train_loss=train_loss,
            eval_loss_before=loss_before,
            resumed_from_step=progress.resumed_from,
            clamps=progress.clamps,
        )

    # The result: the best checkpoint, verified as its user will meet it. Rank 0 alone; the others are done.
    reason = COMPLETED if step >= total else DEADLINE_REACHED
    summary = Termination(
        exit_code=ExitCode.DONE,
        reason=reason,
        step=step,
        total_steps=total,
        train_loss=train_loss,
        eval_loss_before=loss_before,
        resumed_from_step=progress.resumed_from,
        clamps=progress.clamps,
    )
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    if rank != 0:
        return summary
    # Only one base model at a time has to fit.
    del trainer, model, base
    gc.collect()
    if device.cuda:
        torch.cuda.empty_cache()
    rows = {"train": len(train_rows), "held_out": len(held_rows)}
    figures = Result(step, total, train_loss, loss_before, math.nan, reason, [], progress.clamps, rows)
    pairs = list(zip(prompts, answers_before, strict=True))
    return _finish(
        config, device, tokenizer, batches, pairs, expected_tensors, figures, summary, progress, stop
    )


def _leave_together(stop: Stop) -> None:
    """End all ranks when one of them got a signal, before there is anything to save."""
    if stop.agree() is StopCause.SIGNAL:
        raise StopRequestedError


def _planned_steps(trainer: Trainer, config: RunConfig) -> int:
    """Return the number of optimizer steps, counted exactly as the training loop will."""
    if config.train.max_steps > 0:
        return config.train.max_steps
    values = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    return int(values[-1])


def _finish(
    config: RunConfig,
    device: Device,
    tokenizer: Any,
    batches: list[list[TokenRow]],
    prompts: list[tuple[str, str]],
    expected_tensors: int,
    figures: Result,
    summary: Termination,
    progress: Progress,
    stop: Stop,
) -> Termination:
    """Verify the best checkpoint on a fresh base model and publish it."""
    progress.enter(RunState.VERIFYING)
    checkpoints = complete_checkpoints(config)
    if not checkpoints:
        raise TrainerError(
            ExitCode.BAD_CONFIG,
            "DeadlinePassed",
            f"the deadline {config.deadline} leaves no time to train; not one step was made",
        )
    best = best_checkpoint(checkpoints)
    base = load_model(config, device)
    if device.cuda:
        base.to("cuda")
    with prepared(config, best) as folder:
        verified = verify_adapter(
            folder,
            base,
            tokenizer,
            batches,
            [prompt for prompt, _ in prompts],
            expected_tensors,
            best.eval_loss,
            stop.check,
        )
        progress.enter(RunState.SAVING)
        pairs = [
            {"prompt": prompt, "before": before, "after": after}
            for (prompt, before), after in zip(prompts, verified.answers, strict=True)
        ]
        final, digest = publish(
            config, folder, replace(figures, eval_loss_after=verified.eval_loss, answers=pairs)
        )
    message = f"adapter of step {best.step} verified: held-out loss {figures.eval_loss_before:.4f} -> {verified.eval_loss:.4f}"
    done = summary.model_copy(
        update={
            "message": message,
            "eval_loss_after": verified.eval_loss,
            "adapter_dir": str(final),
            "adapter_sha256": digest,
        }
    )
    mark_finished(config, done)
    progress.note(eval_loss=verified.eval_loss)
    progress.enter(RunState.DONE)
    return done
