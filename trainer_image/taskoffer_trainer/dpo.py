"""Direct preference optimisation of a LoRA adapter with TRL and PEFT.

The reference is the base model, that is the model with its adapter switched off, so there is no second copy of it.
What the reference says of a piece is computed beside what the model says of it, from the same tensors: then a model
that did not change has ratios of exactly one whatever the size of the pieces, nothing has to be computed for all rows
before the first step, and a resumed run needs nothing of the former. The price is a forward pass per row and epoch.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from taskoffer.api.contract import RunConfig, Termination
from taskoffer_trainer.balancing import balanced_by_row
from taskoffer_trainer.checkpoints import Checkpoint
from taskoffer_trainer.course import Course
from taskoffer_trainer.data import Split
from taskoffer_trainer.dpo_data import Pair
from taskoffer_trainer.dpo_tokens import PairData, TokenPair, tokenize_pair_split
from taskoffer_trainer.held_out import answers
from taskoffer_trainer.lora import lora_config
from taskoffer_trainer.models import load_again, load_model, load_tokenizer
from taskoffer_trainer.pair_figures import PairFigures
from taskoffer_trainer.steps import PieceLoss
from taskoffer_trainer.stop import Stop
from taskoffer_trainer.trainer import CourseTrainer, training_arguments
from taskoffer_trainer.verify import Verified, check_figures, load_adapter, verify_failed
from taskoffer_trainer.without_effect import without_effect

__all__ = ["BETA", "PreferenceTrainer", "check_change", "train"]

BETA = 0.1
"""Default of ``beta``: TRL's, and that of most published runs."""


@contextlib.contextmanager
def _checkpointing_stays(model: Any) -> Iterator[None]:
    """Keep TRL from switching gradient checkpointing off and on again around the reference's pass.

    Each time transformers 5.23 switches it on it adds one more hook to the embedding and keeps the old ones, so that
    steps would become slower and slower. Without gradients there is nothing to checkpoint anyway.
    """

    def nothing(*_: Any, **__: Any) -> None:
        return None

    names = ("gradient_checkpointing_disable", "gradient_checkpointing_enable")
    for name in names:
        setattr(model, name, nothing)
    try:
        yield
    finally:
        for name in names:
            delattr(model, name)


class PreferenceTrainer(CourseTrainer, DPOTrainer):  # type: ignore[misc]
    """TRL's trainer, whose loss is a mean over the pairs of the whole step."""

    def lengths_of(self, inputs: list[dict[str, Any]]) -> list[int]:
        """Return the tokens of each pair, which goes through the model as two rows of one length."""
        return [2 * (len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))) for row in inputs]

    def piece_loss(self, model: Any, piece: list[dict[str, Any]]) -> PieceLoss:
        """Return the sum of the pairs' losses."""
        batch = self.data_collator(piece)
        tokens = int(batch["attention_mask"].sum())
        # Rows of both answers come one after the other, each pair's share is that of its loss.
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        with _checkpointing_stays(self.model), balanced_by_row(self, lengths, 1 / len(piece), rows_of_unit=2):
            loss = self.compute_loss(model, self._prepare_inputs(batch))
        return PieceLoss(loss * len(piece), len(piece), tokens)

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        """Keep the pairs as they are: they are tokenized already, by the same rule as TRL's."""
        return dataset


def train(config: RunConfig, split: Split[Pair], run_dir: Path, rank: int, stop: Stop) -> Termination:
    """Train, verify and export one adapter; or leave a checkpoint when asked to stop.

    Args:
        config: what to do.
        split: the pairs, the same in every rank.
        run_dir: folder for the progress report.
        rank: number of this process, from 0.
        stop: where signals are noted.

    Raises:
        TrainerError: for every failure that has a place in the contract.
        StopRequestedError: when asked to stop outside of the training loop.
    """
    return _Preferences(config, split, run_dir, rank, stop).run()


class _Preferences(Course):
    """Pairs of answers: the model learns which of two to prefer."""

    def __init__(self, config: RunConfig, split: Split[Pair], run_dir: Path, rank: int, stop: Stop) -> None:
        super().__init__(config, run_dir, rank, stop)
        self.split = split
        self.beta = BETA if config.train.beta is None else config.train.beta
        self.tokenizer: Any
        self.data: PairData
        self.figures: PairFigures

    def read(self) -> None:
        self.tokenizer = load_tokenizer(self.config)
        self.data = tokenize_pair_split(self.split, self.config, self.tokenizer)
        self.figures = self._figures()

    def _figures(self) -> PairFigures:
        return PairFigures(self.data.longest_first(), self.tokenizer.pad_token_id, self.beta)

    def arguments(self) -> DPOConfig:
        train = self.config.train
        return DPOConfig(
            **training_arguments(self.config, self.device),
            activation_checkpointing=train.gradient_checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False} if train.gradient_checkpointing else None,
            max_length=train.max_length,
            beta=self.beta,
            loss_type=[train.loss_type.value],
            label_smoothing=train.label_smoothing,
            precompute_ref_log_probs=False,
            disable_dropout=True,
        )

    def prepare(self, arguments: DPOConfig) -> PreferenceTrainer:
        began = time.monotonic()
        base = load_model(self.config, self.device, self.rank)
        self.timings.load = time.monotonic() - began
        settings, clamps = lora_config(base, self.config.lora)
        self.progress.clamps = (*self.device.clamps, *without_effect(self.config), *clamps)
        # TRL is to make the adapter: of one that is there already it would keep a copy as the reference.
        return PreferenceTrainer(
            model=base,
            args=arguments,
            train_dataset=_dataset(self.data.train),
            eval_dataset=_dataset(self.data.held_out),
            processing_class=self.tokenizer,
            peft_config=settings,
        )

    def lengths(self) -> list[int]:
        return [pair.length for pair in self.data.train]

    def counts(self) -> dict[str, int]:
        return {"train": len(self.data.train), "held_out": len(self.data.held_out), **self.data.left_out}

    def prompts(self) -> list[str]:
        return self.data.prompts

    def measure(self, model: Any, shared: bool, between: Callable[[], None]) -> dict[str, float]:
        return self.figures.measure(model, self.evaluation, shared, between)

    def answer(self, model: Any, between: Callable[[], None]) -> list[str]:
        return answers(model, self.tokenizer, self.data.prompts, self.config.train.max_length, between)

    def verify(self, folder: Path, checkpoint: Checkpoint) -> Verified:
        from trl.trainer.utils import add_fused_lm_head

        base = load_again(self.config, self.device)
        add_fused_lm_head(base)
        self.stop.check()
        model, parameters = load_adapter(folder, base, self.tensors)
        # The base model's figures as well come from what was just loaded.
        figures = self._figures().measure(model, self.evaluation, False, self.stop.check)
        check_figures(figures, checkpoint.eval_loss)
        check_change(figures)
        texts = self.answer(model, self.stop.check)
        return Verified(figures, texts, parameters)


def check_change(figures: dict[str, float]) -> None:
    """Refuse an adapter that changes nothing at all.

    Raises:
        TrainerError: ``VERIFY_FAILED``.
    """
    if figures["eval_reward_chosen"] == figures["eval_reward_rejected"] == 0:
        raise verify_failed("with it the model says of every held-out answer just what it says without it")


def _dataset(pairs: list[TokenPair]) -> Dataset:
    return Dataset.from_list([asdict(pair) for pair in pairs])
