"""Supervised fine-tuning of a LoRA adapter with TRL and PEFT: instructions, conversations and plain text."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from peft import get_peft_model
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from taskoffer.api.contract import ChatColumns, Clamp, RunConfig, TaskType, Termination
from taskoffer_trainer.attention import attention_in_use
from taskoffer_trainer.balancing import balanced_by_row
from taskoffer_trainer.chat_data import Conversation
from taskoffer_trainer.chat_template import use_template
from taskoffer_trainer.chat_tokens import tokenize_chat_split
from taskoffer_trainer.checkpoints import Checkpoint
from taskoffer_trainer.course import Course
from taskoffer_trainer.data import Split
from taskoffer_trainer.held_out import answer_losses, answers
from taskoffer_trainer.instruct_data import Example
from taskoffer_trainer.lora import lora_config
from taskoffer_trainer.models import load_again, load_model, load_tokenizer
from taskoffer_trainer.packing import PackedRows
from taskoffer_trainer.steps import PieceLoss
from taskoffer_trainer.stop import Stop
from taskoffer_trainer.tokens import TextData, TokenRow, tokenize_split
from taskoffer_trainer.trainer import CourseTrainer, training_arguments
from taskoffer_trainer.verify import Verified, check_figures, load_adapter
from taskoffer_trainer.without_effect import without_effect

__all__ = ["SupervisedTrainer", "train"]


class SupervisedTrainer(CourseTrainer, SFTTrainer):  # type: ignore[misc]
    """TRL's trainer, whose loss is a mean over the answer tokens of the whole step."""

    _tokens_of_row = 0.0

    def step_inputs(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Count the answer tokens of a row: a step is divided by all of them, and what is a mean over rows is not."""
        if self.aux_loss_enabled:
            world = self.steps.world
            there = bool(rows) and not self.steps.plan.idle(self.state.global_step, world.rank)
            mine = _answer_tokens(self.data_collator(rows)) if there else 0
            tokens, count = world.total(mine, len(rows) if there else 0)
            self._tokens_of_row = tokens / count
        return rows

    def lengths_of(self, inputs: list[dict[str, Any]]) -> list[int]:
        """Return the tokens of each row."""
        return [len(row["input_ids"]) for row in inputs]

    def piece_loss(self, model: Any, piece: list[dict[str, Any]]) -> PieceLoss:
        """Return the sum of the answer tokens' losses in nats."""
        batch = self.data_collator(piece)
        count = _answer_tokens(batch)
        tokens = sum(len(row["input_ids"]) for row in piece)
        inputs = self._prepare_inputs(batch)
        with balanced_by_row(self, self.lengths_of(piece), self._tokens_of_row):
            loss = self.compute_loss(model, inputs, num_items_in_batch=1)
        return PieceLoss(loss, count, tokens)


def _answer_tokens(batch: dict[str, Any]) -> int:
    """Count the labels that are predicted: not the first one of a row; packed rows have those left out already."""
    return int((batch["labels"][..., 1:] != -100).sum())


Rows = Split[Example] | Split[Conversation]


def train(config: RunConfig, split: Rows, run_dir: Path, rank: int, stop: Stop) -> Termination:
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
    return _Supervised(config, split, run_dir, rank, stop).run()


class _Supervised(Course):
    """Rows with an answer, or with several: the model learns to give them."""

    def __init__(self, config: RunConfig, split: Rows, run_dir: Path, rank: int, stop: Stop) -> None:
        super().__init__(config, run_dir, rank, stop)
        self.split = split
        self.tokenizer: Any
        self.data: TextData
        self.clamps: tuple[Clamp, ...] = ()

    def read(self) -> None:
        config, split = self.config, self.split
        self.tokenizer = load_tokenizer(config)
        if (columns := self._conversations()) is not None:
            self.clamps = use_template(self.tokenizer, columns.chat_template)
            self.data = tokenize_chat_split(cast("Split[Conversation]", split), config, self.tokenizer)
        else:
            self.data = tokenize_split(cast("Split[Example]", split), config, self.tokenizer)

    def _conversations(self) -> ChatColumns | None:
        return self.config.data.chat if self.config.task_type is TaskType.CHAT else None

    def arguments(self) -> SFTConfig:
        train = self.config.train
        return SFTConfig(
            **training_arguments(self.config, self.device),
            activation_checkpointing=train.gradient_checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False} if train.gradient_checkpointing else None,
            max_length=train.max_length,
            packing=train.packing,
            eval_packing=False,
            # The rows are tokenized already; only packing is left to TRL.
            dataset_kwargs=None if train.packing else {"skip_prepare_dataset": True},
        )

    def prepare(self, arguments: SFTConfig) -> SupervisedTrainer:
        began = time.monotonic()
        base = load_model(self.config, self.device, self.rank)
        self.timings.load = time.monotonic() - began
        settings, clamps = lora_config(base, self.config.lora)
        self.progress.clamps = (*self.device.clamps, *self.clamps, *without_effect(self.config), *clamps)
        set_seed(self.config.train.seed)
        trainer = SupervisedTrainer(
            model=get_peft_model(base, settings),
            args=arguments,
            train_dataset=_dataset(self.data.train),
            eval_dataset=_dataset(self.data.held_out),
            processing_class=self.tokenizer,
        )
        if self.config.train.packing and not attention_in_use(base).startswith("flash"):
            trainer.data_collator = PackedRows(self.tokenizer.pad_token_id)
        return trainer

    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.trainer.train_dataset["input_ids"]]

    def counts(self) -> dict[str, int]:
        return {"train": len(self.data.train), "held_out": len(self.data.held_out), **self.data.left_out}

    def prompts(self) -> list[str]:
        return self.data.prompts

    def measure(self, model: Any, shared: bool, between: Callable[[], None]) -> dict[str, float]:
        """Return the mean over all answer tokens, and not over batches, so that it depends on nothing but the model."""

        def work(rows: Sequence[TokenRow]) -> tuple[float, float]:
            return answer_losses(model, rows, self.tokenizer.pad_token_id)

        total, tokens = self.evaluation.over(model, self.data.longest_first(), work, 2, shared, between)
        if not tokens:
            raise ValueError("none of the held-out rows has an answer token")
        return {"eval_loss": total / tokens}

    def answer(self, model: Any, between: Callable[[], None]) -> list[str]:
        return answers(model, self.tokenizer, self.data.prompts, self.config.train.max_length, between)

    def accompany(self, folder: Path) -> None:
        if self._conversations() is not None:
            # Named as transformers looks for it in a tokenizer's folder: the adapter is used with this one.
            (folder / "chat_template.jinja").write_text(self.tokenizer.chat_template, encoding="utf-8")

    def verify(self, folder: Path, checkpoint: Checkpoint) -> Verified:
        from trl.trainer.utils import add_fused_lm_head

        base = load_again(self.config, self.device)
        add_fused_lm_head(base)
        self.stop.check()
        model, parameters = load_adapter(folder, base, self.tensors)
        figures = self.measure(model, False, self.stop.check)
        check_figures(figures, checkpoint.eval_loss)
        texts = self.answer(model, self.stop.check)
        return Verified(figures, texts, parameters)


def _dataset(rows: list[TokenRow]) -> Dataset:
    return Dataset.from_dict({"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]})
