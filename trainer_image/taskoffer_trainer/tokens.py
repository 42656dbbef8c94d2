"""From examples to token ids and labels: chat templates, and the border between prompt and answer."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from taskoffer.api.contract import RunConfig
from taskoffer_trainer.data import Split, bad_data
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.instruct_data import Example

__all__ = [
    "ANSWER_TOKENS",
    "IGNORED",
    "Cuts",
    "TextData",
    "TokenRow",
    "common_prefix",
    "end_of",
    "full_text",
    "left_out_of",
    "parts",
    "prompt_of",
    "prompt_room",
    "sample_prompt",
    "tokenize",
    "tokenize_split",
]

T = TypeVar("T")

IGNORED = -100
"""Label of a token that the loss leaves out."""

_NOTHING = "what the model's tokenizer and chat template make of them has no answer that could be learnt"

ANSWER_TOKENS = 64
"""Longest sample answer in tokens."""


@dataclass(frozen=True)
class TokenRow:
    """Token ids of a row and its labels, :data:`IGNORED` where the model is only given the token."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class TextData:
    """Tokenized rows, and the prompts that are answered before and after the training."""

    train: list[TokenRow]
    held_out: list[TokenRow]
    prompts: list[str]
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Rows that are in neither, by the reason in camelCase."""

    def longest_first(self) -> list[TokenRow]:
        """Return the held-out rows by their length: those of like length together, and what needs most memory first."""
        return sorted(self.held_out, key=lambda row: -len(row.input_ids))


@dataclass
class Cuts:
    """What became of rows that are longer than they may be, or of which nothing can be learnt.

    Attributes:
        max_length: most tokens of a row.
        what: which part of the data this is, for messages.
        rows: how many there are.
        cut: rows that are longer.
        too_long: those of them that are left out, because their answer would be gone.
        nothing: rows that are left out although they are short enough.
    """

    max_length: int
    what: str
    rows: int = 0
    cut: int = 0
    too_long: int = 0
    nothing: int = 0

    def leave_out(self, length: int) -> None:
        """Count a row of so many tokens that is left out."""
        if length > self.max_length:
            self.too_long += 1
        else:
            self.nothing += 1

    def say(self) -> None:
        """Print a line when there were any."""
        if self.nothing:
            print(f"data: {self.nothing} of {self.rows} {self.what} rows are left out: {_NOTHING}")
        if self.cut:
            print(
                f"data: {self.cut} of {self.rows} {self.what} rows are longer than {self.max_length} tokens; "
                f"{self.cut - self.too_long} were cut and {self.too_long} left out, because their answer would be gone"
            )

    def nothing_left(self) -> TrainerError:
        """Build the error for a part of the data of which no row is left."""
        if self.nothing:
            return bad_data(
                "DataEmpty",
                f"none of {self.rows} {self.what} rows is left: of {self.nothing}, {_NOTHING}; {self.too_long} have "
                f"prompts of {self.max_length} tokens and more (train.maxLength)",
            )
        return bad_data(
            "DataTooLong",
            f"all {self.rows} {self.what} rows have prompts of {self.max_length} tokens and more (train.maxLength)",
        )


def parts(items: Sequence[T], what: str) -> Iterator[Sequence[T]]:
    """Yield a thousand items at a time, and say every two seconds how many were asked for."""
    said = time.monotonic()
    for start in range(0, len(items), 1000):
        yield items[start : start + 1000]
        if time.monotonic() - said > 2:
            print(f"data: {min(start + 1000, len(items))} of {len(items)} {what} rows tokenized", flush=True)
            said = time.monotonic()


def prompt_of(example: Example, tokenizer: Any) -> str:
    """Return the text before the answer, in the model's own chat template where it has one.

    Raises:
        TrainerError: ``BAD_DATA`` when the template refuses the messages.
    """
    if not example.user and not example.system:
        return ""
    if not tokenizer.chat_template:
        return "".join(f"{part}\n" for part in (example.system, example.user) if part)
    return _in_template(example, tokenizer, ask=True)


def full_text(example: Example, prompt: str, tokenizer: Any) -> str:
    """Return prompt and answer as one text that ends as the model's texts do."""
    if not prompt or not tokenizer.chat_template:
        return f"{prompt}{example.answer}{tokenizer.eos_token}"
    return _in_template(example, tokenizer, ask=False)


def end_of(answer: Sequence[int], tokenizer: Any) -> list[int]:
    """Return what has to follow an answer for the model to learn to stop: its end token, if that was not said yet.

    Some chat templates end a turn with a marker that the model does not stop at (those that base models such as
    Qwen2.5 come with, whose end token is another one).
    """
    return [] if tokenizer.eos_token_id in answer else [tokenizer.eos_token_id]


def _in_template(example: Example, tokenizer: Any, ask: bool) -> str:
    from jinja2 import TemplateError

    messages = [{"role": "user", "content": example.user}]
    if example.system:
        messages.insert(0, {"role": "system", "content": example.system})
    if not ask:
        messages.append({"role": "assistant", "content": example.answer})
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))
    except TemplateError as error:
        remedy = "; models without a system role need rows without a system prompt" if example.system else ""
        raise bad_data(
            "ChatTemplateRefuses",
            f"the model's chat template refuses the row that begins {example.user[:60]!r}: {error}{remedy}",
        ) from error


def tokenize(examples: list[Example], tokenizer: Any, cuts: Cuts) -> list[TokenRow]:
    """Turn examples into token ids and labels; only the answer counts for the loss.

    The answer starts where the tokens of the prompt and of the whole text part, which is not always at the
    end of the prompt, because tokens can merge across the border. Rows are cut at ``max_length`` tokens; a
    row whose answer lies wholly behind that is left out and counted aloud.

    Raises:
        TrainerError: ``BAD_DATA`` when no row is left.
    """
    rows: list[TokenRow] = []
    max_length = cuts.max_length
    for part in parts(examples, cuts.what):
        prompts = [prompt_of(example, tokenizer) for example in part]
        texts = [full_text(example, prompt, tokenizer) for example, prompt in zip(part, prompts, strict=True)]
        # Chat templates write the special tokens themselves; plain text needs the tokenizer's own.
        special = not tokenizer.chat_template or not any(prompts)
        whole = tokenizer(texts, add_special_tokens=special)["input_ids"]
        given = tokenizer(prompts, add_special_tokens=special)["input_ids"]
        for prompt, ids, prompt_ids in zip(prompts, whole, given, strict=True):
            begin = common_prefix(prompt_ids, ids) if prompt else 0
            ids += end_of(ids[begin:], tokenizer)
            labels = [IGNORED] * begin + ids[begin:]
            cuts.cut += len(ids) > max_length
            if begin >= max_length or len(ids) < 2:
                cuts.leave_out(len(ids))
                continue
            rows.append(TokenRow(ids[:max_length], labels[:max_length]))
    cuts.say()
    if not rows:
        raise cuts.nothing_left()
    return rows


def common_prefix(left: list[int], right: list[int]) -> int:
    """Return how many tokens two texts have in common at their beginnings."""
    for place, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return place
    return min(len(left), len(right))


def prompt_room(longest: int) -> int:
    """Return the most tokens of a sample prompt, so that there is room for an answer within the longest row."""
    return max(longest // 2, longest - ANSWER_TOKENS)


def sample_prompt(texts: Sequence[str], tokenizer: Any, longest: int) -> str:
    """Return the first text that a row has room for, else the shortest.

    A text of the data can be of any length, and one that is left out of the training for that must not be answered
    either: no memory is planned for it.

    Args:
        texts: what users have said, at least one.
        tokenizer: the model's.
        longest: tokens of the longest row.
    """
    room = prompt_room(longest)

    def fits(text: str) -> bool:
        asked = prompt_of(Example("", text, ""), tokenizer)
        return len(tokenizer([asked], add_special_tokens=False)["input_ids"][0]) <= room

    return next((text for text in texts if fits(text)), min(texts, key=len))


def tokenize_split(split: Split[Example], config: RunConfig, tokenizer: Any) -> TextData:
    """Tokenize both parts. Without sample prompts the first held-out row gives one.

    Raises:
        TrainerError: ``BAD_DATA`` when no row of a part is short enough.
    """
    length = config.train.max_length
    said = [one.user or one.answer[:80] for one in split.held_out]
    prompts = list(config.sample_prompts) or [sample_prompt(said, tokenizer, length)]
    cuts = [Cuts(length, "training", len(split.train)), Cuts(length, "held-out", len(split.held_out))]
    train = tokenize(split.train, tokenizer, cuts[0])
    held_out = tokenize(split.held_out, tokenizer, cuts[1])
    return TextData(train, held_out, prompts, {**split.left_out, **left_out_of(cuts)})


def left_out_of(cuts: Sequence[Cuts]) -> dict[str, int]:
    """Return the rows that were left out in the shape of :attr:`TextData.left_out`."""
    counts = {"tooLong": sum(one.too_long for one in cuts), "nothingToLearn": sum(one.nothing for one in cuts)}
    return {reason: count for reason, count in counts.items() if count}
