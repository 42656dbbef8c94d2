"""Reinforcement of a LoRA adapter with TRL's GRPO loss: completions are drawn, rewarded, and compared in groups.

Completions are drawn for a whole step, and rewarded, before anything is cut; so how many go through the model at
once changes nothing but rounding, and any number is allowed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import set_seed
from trl import GRPOConfig, GRPOTrainer

from taskoffer.api.contract import DRAWN_PER_TRAINED, Clamp, GRPOSettings, RunConfig, Termination
from taskoffer_trainer.balancing import balanced_by_row
from taskoffer_trainer.checkpoints import AVERAGED_FILE, Checkpoint
from taskoffer_trainer.config import global_batch
from taskoffer_trainer.course import Course
from taskoffer_trainer.data import Split
from taskoffer_trainer.drawing import (
    Completion,
    Drawer,
    KeptTokens,
    divergence_of,
    left_padded,
    right_padded,
    settled_at_once,
    token_log_probs,
)
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.fallback import SMALLEST_PIECE
from taskoffer_trainer.grpo_data import Prompt, TokenPrompt, tokenize_prompts
from taskoffer_trainer.held_out import answers, turns
from taskoffer_trainer.kept_completions import KeptCompletions
from taskoffer_trainer.lora import lora_config
from taskoffer_trainer.models import load_again, load_model, load_tokenizer
from taskoffer_trainer.reward_figures import RewardFigures, RewardSums
from taskoffer_trainer.rewards import REWARD_FAILED, Asked, RewardSet, advantages, weighted
from taskoffer_trainer.sharding import is_shared_out
from taskoffer_trainer.steps import PieceLoss, step_seed
from taskoffer_trainer.stop import Stop
from taskoffer_trainer.trainer import CourseTrainer, training_arguments
from taskoffer_trainer.verify import Verified, check_figures, load_adapter
from taskoffer_trainer.without_effect import without_effect

__all__ = ["ReinforcementTrainer", "train"]

EVALUATION = -1
"""The step whose random numbers evaluations use: the same ones every time, so that only the model differs."""


def train(
    config: RunConfig, split: Split[Prompt], rewards: RewardSet, run_dir: Path, rank: int, stop: Stop
) -> Termination:
    """Train, verify and export one adapter; or leave a checkpoint when asked to stop.

    Args:
        config: what to do.
        split: the prompts, the same in every rank.
        rewards: what makes a completion good; this rank's own.
        run_dir: folder for the progress report.
        rank: number of this process, from 0.
        stop: where signals are noted.

    Raises:
        TrainerError: for every failure that has a place in the contract.
        StopRequestedError: when asked to stop outside of the training loop.
    """
    return _Reinforcement(config, split, rewards, run_dir, rank, stop).run()


class ReinforcementTrainer(CourseTrainer, GRPOTrainer):  # type: ignore[misc]
    """TRL's trainer, of which the loss is used; draws, rewards and advantages are those of the course."""

    course: _Reinforcement
    _tokens_of_row = 0.0

    def take_over(self, course: Any, keeper: Any) -> None:
        """Let the pieces have any size: advantages are known before a step is cut."""
        course.steps.micro_batch.unit = 1
        super().take_over(course, keeper)

    def step_inputs(self, rows: list[dict[str, Any]]) -> list[Completion]:
        """Draw the completions of this rank's prompts, reward them, and compare those of each prompt."""
        course, number = self.course, self.state.global_step
        model = self.accelerator.unwrap_model(self.model)
        places = [row["row"] for row in rows]
        drawn = course.draw(model, course.train, places, number, lambda: None)
        prompts = [course.train[place].prompt for place in places]
        rewards = course.reward(prompts, drawn, course.settings.num_generations) if drawn else {}
        totals = weighted(rewards, course.rewards.weights)
        idle = self.steps.plan.idle(number, self.steps.world.rank)
        self._tell([] if idle else totals, [] if idle else drawn)
        scale = course.settings.scale_rewards == "group"
        better = advantages(totals, course.settings.num_generations, scale)
        return [replace(one, advantage=value) for one, value in zip(drawn, better, strict=True)]

    def lengths_of(self, inputs: Sequence[Completion]) -> list[int]:
        """Return the tokens of each completion with the longest prompt of the step, to which prompts are padded."""
        longest = max((len(one.prompt_ids) for one in inputs), default=0)
        return [longest + len(one.ids) for one in inputs]

    def _tell(self, totals: Sequence[float | None], drawn: Sequence[Completion]) -> None:
        """Count and report the mean reward and length of a step over all ranks, beside TRL's own figures."""
        known = [value for value in totals if value is not None]
        cut = sum(1 for one in drawn if one.ids[-1] not in self.course.drawer.tokens.ends)
        lengths = sum(len(one.ids) for one in drawn)
        world = self.course.world
        total, scored, tokens, cuts, count = world.total(math.fsum(known), len(known), lengths, cut, len(drawn))
        self._tokens_of_row = tokens / max(count, 1)
        if scored:
            reward = total / scored
            self.course.progress.note(reward=reward)
            self._metrics["train"]["reward"].append(reward)
        figures = {"completion_length": tokens / max(count, 1), "completions_cut_share": cuts / max(count, 1)}
        self.course.progress.note(**figures)
        for name, value in figures.items():
            self._metrics["train"][name].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Report the KL divergence from the base model, which TRL measures with the loss."""
        super().log(logs, start_time)
        if isinstance(logs.get("kl"), float):
            self.course.progress.note(kl=logs["kl"])

    def piece_loss(self, model: Any, piece: list[Completion]) -> PieceLoss:
        """Return TRL's loss of some completions as a sum over what its mean is taken of."""
        pad, beta = self.course.drawer.tokens.pad, self.beta
        device = self.accelerator.device
        prompts, prompt_mask = left_padded([one.prompt_ids for one in piece], pad, device)
        ids, mask = right_padded([one.ids for one in piece], pad, device)
        inputs: dict[str, Any] = {
            "prompt_ids": prompts,
            "prompt_mask": prompt_mask,
            "completion_ids": ids,
            "completion_mask": mask,
            "advantages": torch.tensor([one.advantage for one in piece], device=device),
            # TRL divides by it and multiplies by the number of processes: as it is here, its sum stays a sum.
            "num_items_in_batch": torch.tensor(float(self.accelerator.num_processes), device=device),
        }
        if beta:
            with torch.no_grad(), self.accelerator.unwrap_model(model).disable_adapter():
                inputs["ref_per_token_logps"], _ = token_log_probs(model, piece, pad)
        tokens, rows = int(mask.sum()), len(piece)
        through = tokens + int(prompt_mask.sum())
        # What each of TRL's losses is a mean over: tokens of the step, or rows (each a mean over its own tokens). The
        # first of them comes as a sum.
        by_tokens = self.loss_type in ("dapo", "bnpo")
        count = tokens if by_tokens else rows
        factor = 1 if self.loss_type == "dapo" else count
        lengths = (prompt_mask.sum(dim=1) + mask.sum(dim=1)).tolist()
        with balanced_by_row(self, lengths, (self._tokens_of_row if by_tokens else 1.0) / factor):
            loss = self._compute_loss(model, inputs)
        return PieceLoss(loss * factor, count, through)


def _dataset(prompts: list[TokenPrompt]) -> Dataset:
    """Return the prompts with their numbers; the extra column may hold what no Arrow column can."""
    return Dataset.from_dict({"prompt": [one.prompt.text for one in prompts], "row": list(range(len(prompts)))})


class _Reinforcement(Course):
    """Prompts without an answer: the model learns to say what is rewarded."""

    def __init__(
        self,
        config: RunConfig,
        split: Split[Prompt],
        rewards: RewardSet,
        run_dir: Path,
        rank: int,
        stop: Stop,
    ) -> None:
        super().__init__(config, run_dir, rank, stop)
        self.split, self.rewards = split, rewards
        self.settings = config.train.grpo or GRPOSettings()
        self.unit = self.settings.num_generations
        self.reward_figures = RewardFigures(rewards.weights, self.settings.beta, self.settings.reward_failures)
        self.kept: KeptCompletions | None = None
        self.verification: dict[str, float] = {}
        self.tokenizer: Any
        self.drawer: Drawer
        self.drawn_at_once = 0
        """Completions of a step that are drawn together."""
        self.train: list[TokenPrompt] = []
        self.held_out: list[TokenPrompt] = []

    def read(self) -> None:
        self.tokenizer = load_tokenizer(self.config)
        longest = self.config.train.max_length - self.settings.max_completion_length
        self.train = tokenize_prompts(self.split.train, self.tokenizer, longest, "training")
        self.held_out = tokenize_prompts(self.split.held_out, self.tokenizer, longest, "held-out")

    def arguments(self) -> GRPOConfig:
        train, settings = self.config.train, self.settings
        shared = training_arguments(self.config, self.device)
        # TRL wants whole groups here and does nothing else with it, since the steps are cut by us.
        shared["per_device_train_batch_size"] = self.unit
        return GRPOConfig(
            **shared,
            activation_checkpointing=train.gradient_checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False} if train.gradient_checkpointing else None,
            num_generations=settings.num_generations,
            max_completion_length=settings.max_completion_length,
            temperature=settings.temperature,
            loss_type=settings.loss_type,
            scale_rewards=settings.scale_rewards,
            steps_per_generation=1,
            num_iterations=1,
            # With a weight TRL would put a second adapter beside ours; the reference is the base model itself.
            beta=0.0,
        )

    def prepare(self, arguments: GRPOConfig) -> ReinforcementTrainer:
        began = time.monotonic()
        base = load_model(self.config, self.device, self.rank)
        self.timings.load = time.monotonic() - began
        settings, clamps = lora_config(base, self.config.lora)
        self.progress.clamps = (*self.device.clamps, *clamps, *self._clamps())
        set_seed(self.config.train.seed)
        self.drawer = Drawer(self._kept_tokens(base), self.world, Path(self.config.checkpoint_dir))
        most = DRAWN_PER_TRAINED * self.unit if self.profile >= SMALLEST_PIECE else None
        self.drawn_at_once = settled_at_once(self.asked, self.world, most)
        trainer = ReinforcementTrainer(
            model=get_peft_model(base, settings),
            args=arguments,
            reward_funcs=[self._total],
            train_dataset=_dataset(self.train),
            eval_dataset=_dataset(self.held_out),
            processing_class=self.tokenizer,
        )
        trainer.beta = self.settings.beta
        return trainer

    def _clamps(self) -> Iterator[Clamp]:
        """Say which settings cannot be taken literally."""
        train = self.config.train
        yield from without_effect(self.config)
        asked = train.per_device_train_batch_size * train.gradient_accumulation_steps * self.config.gpus
        whole = global_batch(self.config)
        if asked != whole:
            yield Clamp(
                field="globalBatch",
                requested=str(asked),
                effective=str(whole),
                reason="WholeGroups",
                message=f"The {self.unit} completions of a prompt (train.grpo.numGenerations) belong to one step.",
            )

    def _total(self, prompts: list[str], completions: list[str], **_: Any) -> list[float | None]:
        """Return the weighted sums under TRL's contract for reward functions; the step asks for them itself."""
        return weighted(self.rewards(Asked(prompts, completions, [None] * len(prompts))), self.rewards.weights)

    def _kept_tokens(self, base: Any) -> KeptTokens:
        settings = self.settings
        return KeptTokens.of(base, self.tokenizer, settings.max_completion_length, settings.temperature)

    def lengths(self) -> list[int]:
        return [len(one.ids) for one in self.train]

    def counts(self) -> dict[str, int]:
        there = {"train": len(self.train), "held_out": len(self.held_out), **self.split.left_out}
        too_long = len(self.split.train) + len(self.split.held_out) - there["train"] - there["held_out"]
        return {**there, "tooLong": too_long} if too_long else there

    def rows_measured(self) -> int:
        return self.settings.num_generations_eval * len(self.held_out)

    def outcome(self, before: dict[str, float], after: dict[str, float]) -> str:
        return f"held-out reward {before['reward']:.4f} -> {after['reward']:.4f}, KL divergence {after['kl']:.4f}"

    def remedy(self) -> str:
        said = self.progress.metrics.get("reward")
        mean = "" if said is None else f"; the mean reward of the last step was {said:.4g}"
        return (
            "only completions of a prompt with unlike rewards move the model: give rewards that tell them apart "
            "(data.grpo.rewardFunctions), draw more of them (train.grpo.numGenerations), or train longer "
            f"(train.maxSteps){mean}"
        )

    def details(self) -> dict[str, Any]:
        return {"rewards": {**self.rewards.report(), **self.verification}}

    def prompts(self) -> list[str]:
        return list(self.config.sample_prompts) or [self.held_out[0].prompt.text]

    def draw(
        self, model: Any, prompts: list[TokenPrompt], places: Sequence[int], step: int, between: Callable[[], None]
    ) -> list[Completion]:
        """Draw the completions of some prompts, those of a prompt side by side; a pure function of step and row."""
        count = self.settings.num_generations_eval if step == EVALUATION else self.settings.num_generations
        seed = step_seed(self.config.train.seed, step, 0)
        asked = [
            Completion(prompts[place].ids, step_seed(seed, place, one)) for place in places for one in range(count)
        ]
        at_once = DRAWN_PER_TRAINED * self.evaluation.size if step == EVALUATION else self.drawn_at_once
        return self.drawer(model, asked, at_once, between)

    def _asked(self, prompts: Sequence[Prompt], drawn: Sequence[Completion], count: int) -> Asked:
        texts = self.tokenizer.batch_decode([list(one.ids) for one in drawn], skip_special_tokens=True)
        each = [prompt for prompt in prompts for _ in range(count)]
        return Asked([one.text for one in each], texts, [one.extra for one in each])

    def reward(self, prompts: Sequence[Prompt], drawn: Sequence[Completion], count: int) -> dict[str, Any]:
        """Reward completions, ``count`` of which belong to each prompt."""
        return self.rewards(self._asked(prompts, drawn, count))

    def measured(self, figures: dict[str, float]) -> None:
        self.reward_figures.expect(figures)
        super().measured(figures)

    def measure(self, model: Any, shared: bool, between: Callable[[], None]) -> dict[str, float]:
        """Return the mean reward of held-out prompts, the KL divergence from the base model, and the score of both.

        The score is the weighted sum of the rewards' means less ``beta`` times the divergence, as the task market's
        evaluator has it; ``eval_loss`` is minus the score. Both are left out where a reward failed. The base model is
        measured again then, for without its figures there is nothing to compare with.
        """
        while True:
            figures = self._measured_once(model, shared, between)
            if "eval_loss" in figures or self.reward_figures.expected is not None:
                return figures

    def _measured_once(self, model: Any, shared: bool, between: Callable[[], None]) -> dict[str, float]:
        rank, size = (self.world.rank, self.world.size) if shared else (0, 1)
        count = self.settings.num_generations_eval
        at_once = max(1, self.evaluation.size // count)
        order = sorted(range(len(self.held_out)), key=lambda place: -len(self.held_out[place].ids))
        batches = [order[start : start + at_once] for start in range(0, len(order), at_once)]
        sums = RewardSums(list(self.rewards.weights))
        first: tuple[list[Completion], float] | None = None
        for places, weight in turns(batches, rank, size, is_shared_out(model)):
            between()
            drawn = self.draw(model, self.held_out, places, EVALUATION, between)
            work = partial(divergence_of, model, pad=self.drawer.tokens.pad)
            divergence, log_prob, tokens = self.evaluation.add_up(model, drawn, work, between, count)
            if weight:
                asked = self._asked([self.held_out[place].prompt for place in places], drawn, count)
                sums.add(self.rewards.measured(asked, sums.failed))
                sums.diverge(divergence, tokens)
                first = first or (drawn, log_prob / max(tokens, 1.0))
        numbers = sums.numbers()
        figures = self.reward_figures.of(self.evaluation.together(numbers) if shared else numbers)
        if shared and first is not None:
            self.kept = KeptCompletions(self.trainer.state.global_step, *first, figures)
        return figures

    def remember(self, folder: Path) -> None:
        if self.kept is not None and self.kept.step == self.trainer.state.global_step:
            self.kept.write(folder)

    def answer(self, model: Any, between: Callable[[], None]) -> list[str]:
        return answers(model, self.tokenizer, self.prompts(), self.config.train.max_length, between)

    def verify(self, folder: Path, checkpoint: Checkpoint) -> Verified:
        """See the base class; compared are log-probabilities, for a reward may be another one at every call."""
        from trl.trainer.utils import add_fused_lm_head

        # The average was measured a moment ago, and what its checkpoint keeps is of the weights that were trained.
        kept = self.kept if checkpoint.weights == AVERAGED_FILE else KeptCompletions.read(checkpoint.folder)
        base = load_again(self.config, self.device)
        add_fused_lm_head(base, temperature=self.settings.temperature)
        self.stop.check()
        model, parameters = load_adapter(folder, base, self.tensors)
        if kept is not None:
            work = partial(divergence_of, model, pad=self.drawer.tokens.pad)
            _, total, tokens = self.evaluation.add_up(model, kept.completions, work, self.stop.check)
            kept.check(total / max(tokens, 1.0))
        figures = self._rewarded_again(model, kept)
        check_figures(figures, None)
        texts = self.answer(model, self.stop.check)
        return Verified(figures, texts, parameters)

    def _rewarded_again(self, model: Any, kept: KeptCompletions | None) -> dict[str, float]:
        """Return the figures of a loaded adapter, or those of its evaluation in training where the rewards fail.

        Raises:
            TrainerError: ``BAD_CONFIG`` when they fail and there are none.
        """
        known = kept is not None and "eval_loss" in kept.figures
        figures: dict[str, float] = {}
        while "eval_loss" not in figures:
            try:
                figures = self.measure(model, False, self.stop.check)
            except TrainerError as error:
                if error.reason != REWARD_FAILED or not known:
                    raise
            if kept is not None and known:
                self.verification = {"rewardInTraining": kept.figures["reward"]}
                return kept.compared(figures)
        return figures
