"""TRL's SFTTrainer with our settings, our order of rows and our held-out loss."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from taskoffer.api.contract import RunConfig, RunState
from taskoffer_trainer.callbacks import CheckpointKeeper, NaNGuard, Progress, StopWatch
from taskoffer_trainer.held_out import held_out_loss
from taskoffer_trainer.models import Device
from taskoffer_trainer.stop import Stop
from taskoffer_trainer.tokens import TextData, TokenRow

__all__ = ["EpochSampler", "Trainer", "build_trainer", "training_arguments"]


class EpochSampler(Sampler):  # type: ignore[misc]
    """The order of the rows as a pure function of seed and epoch, so that a resumed run sees the same order.

    With lengths, rows are sorted by length within groups of 64 shuffled rows, which keeps padding small.
    """

    GROUP = 64

    def __init__(self, count: int, seed: int, lengths: list[int] | None) -> None:
        self.count, self.seed, self.lengths, self.epoch = count, seed, lengths, 0

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


class _EpochOrder(TrainerCallback):  # type: ignore[misc]
    """Tells the sampler its epoch.

    The data loader would do so too, but not through the wrapper that skips batches after a resume with
    several processes: the rest of that epoch would come in the order of the first one.
    """

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set the epoch before the data loader is asked for its first batch."""
        self.sampler.epoch = int(state.epoch or 0)


class Trainer(SFTTrainer):  # type: ignore[misc]
    """TRL's trainer with the parts replaced that must be the same in every attempt."""

    def attach(
        self,
        sampler: EpochSampler,
        batches: list[list[TokenRow]],
        keeper: CheckpointKeeper,
        progress: Progress,
    ) -> None:
        """Hand over what the overridden methods need."""
        self.sampler, self.batches, self.keeper, self.progress = sampler, batches, keeper, progress
        self.add_callback(_EpochOrder(sampler))

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        return self.sampler

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure the held-out loss over all ranks; called by the training loop."""
        self.progress.enter(RunState.EVALUATING)
        began = time.monotonic()
        loss = held_out_loss(self.model, self.batches, self.processing_class.pad_token_id, shared=True)
        self.progress.timings.evaluate = time.monotonic() - began
        self.keeper.evaluated = (self.state.global_step, loss)
        self.progress.note(eval_loss=loss)
        self.progress.enter(RunState.TRAINING)
        print(f"train: step {self.state.global_step}, held-out loss {loss:.4f}", flush=True)
        metrics = {"eval_loss": loss}
        self.state.log_history.append({**metrics, "step": self.state.global_step})
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write no card into checkpoints; the exported adapter gets one of its own."""


def training_arguments(config: RunConfig, device: Device) -> SFTConfig:
    """Translate the settings; with several processes this also opens the process group.

    Everything that the libraries default differently from us, or change from version to version, is said
    explicitly.
    """
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
        # The rows are tokenized already; only packing is left to TRL.
        dataset_kwargs=None if train.packing else {"skip_prepare_dataset": True},
        **distributed,
    )


def _dataset(rows: list[TokenRow]) -> Dataset:
    return Dataset.from_dict({"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]})


def build_trainer(
    config: RunConfig,
    arguments: SFTConfig,
    model: Any,
    tokenizer: Any,
    data: TextData,
    progress: Progress,
    stop: Stop,
    keeper: CheckpointKeeper,
) -> Trainer:
    """Put model, data and callbacks together.

    The order of the callbacks matters: the progress is measured first, and the stop comes after transformers'
    own callback has planned evaluation and checkpoint of the step.
    """
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=_dataset(data.train),
        eval_dataset=_dataset(data.held_out),
        processing_class=tokenizer,
        callbacks=[progress, NaNGuard(progress), StopWatch(stop, progress.timings), keeper],
    )
    trainer.remove_callback(PrinterCallback)
    rows = trainer.train_dataset["input_ids"]
    lengths = [len(ids) for ids in rows] if config.train.group_by_length else None
    batches = data.batches(config.train.per_device_train_batch_size)
    trainer.attach(EpochSampler(len(rows), config.train.seed, lengths), batches, keeper, progress)
    return trainer
