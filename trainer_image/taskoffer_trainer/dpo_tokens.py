"""From pairs to token ids: one prompt and two answers, cut where their tokens part ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from taskoffer.api.contract import RunConfig
from taskoffer_trainer.data import Split
from taskoffer_trainer.dpo_data import Pair
from taskoffer_trainer.instruct_data import Example
from taskoffer_trainer.tokens import (
    Cuts,
    common_prefix,
    end_of,
    full_text,
    left_out_of,
    parts,
    prompt_of,
    sample_prompt,
)

__all__ = ["PairData", "TokenPair", "tokenize_pair_split", "tokenize_pairs"]


@dataclass(frozen=True)
class TokenPair:
    """Token ids of a pair, named as in TRL's DPO data sets."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def length(self) -> int:
        """Tokens of the longer of both sequences."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


@dataclass(frozen=True)
class PairData:
    """Tokenized pairs, and the prompts that are answered before and after the training."""

    train: list[TokenPair]
    held_out: list[TokenPair]
    prompts: list[str]
    left_out: dict[str, int]

    def longest_first(self) -> list[TokenPair]:
        """Return the held-out pairs by length: those of like length together, and what needs most memory first."""
        return sorted(self.held_out, key=lambda pair: -pair.length)


def tokenize_pairs(pairs: Sequence[Pair], tokenizer: Any, cuts: Cuts) -> list[TokenPair]:
    """Turn pairs into token ids.

    The answers start where the tokens of the prompt and of either whole text part, which is not always at the end
    of the prompt, because tokens can merge across the border. Both are cut at the longest length; a pair that has
    no answers before that, or the same ones, is left out and counted aloud.

    Raises:
        TrainerError: ``BAD_DATA`` when no pair is left.
    """
    rows: list[TokenPair] = []
    for part in parts(pairs, cuts.what):
        chosen = [Example(pair.system, pair.prompt, pair.chosen) for pair in part]
        rejected = [Example(pair.system, pair.prompt, pair.rejected) for pair in part]
        prompts = [prompt_of(example, tokenizer) for example in chosen]
        texts = [
            full_text(example, prompt, tokenizer)
            for answers in (chosen, rejected)
            for example, prompt in zip(answers, prompts, strict=True)
        ]
        special = not tokenizer.chat_template
        whole = tokenizer(texts, add_special_tokens=special)["input_ids"]
        given = tokenizer(prompts, add_special_tokens=special)["input_ids"]
        for prompt, good, bad in zip(given, whole[: len(part)], whole[len(part) :], strict=True):
            begin = min(common_prefix(prompt, good), common_prefix(prompt, bad))
            for answer in (good, bad):
                answer += end_of(answer[begin:], tokenizer)
            longest = max(len(good), len(bad))
            cuts.cut += longest > cuts.max_length
            pair = TokenPair(good[:begin], good[begin : cuts.max_length], bad[begin : cuts.max_length])
            if pair.chosen_ids == pair.rejected_ids or not (pair.chosen_ids and pair.rejected_ids):
                cuts.leave_out(longest)
                continue
            rows.append(pair)
    cuts.say()
    if not rows:
        raise cuts.nothing_left()
    return rows


def tokenize_pair_split(split: Split[Pair], config: RunConfig, tokenizer: Any) -> PairData:
    """Tokenize both parts. Without sample prompts the first held-out pair gives one.

    Raises:
        TrainerError: ``BAD_DATA`` when no pair of a part is short enough.
    """
    length = config.train.max_length
    cuts = [Cuts(length, "training", len(split.train)), Cuts(length, "held-out", len(split.held_out))]
    train = tokenize_pairs(split.train, tokenizer, cuts[0])
    held_out = tokenize_pairs(split.held_out, tokenizer, cuts[1])
    prompts = list(config.sample_prompts) or [sample_prompt([one.prompt for one in split.held_out], tokenizer, length)]
    return PairData(train, held_out, prompts, {**split.left_out, **left_out_of(cuts)})
