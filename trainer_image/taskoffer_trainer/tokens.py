"""From examples to token ids and labels: chat templates, and the border between prompt and answer."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from taskoffer.api.contract import RunConfig
from taskoffer_trainer.data import Example, Split, bad_data

__all__ = ["TextData", "TokenRow", "prompt_of", "tokenize", "tokenize_split"]

IGNORED = -100
"""Label of a token that the loss leaves out."""


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

    def batches(self, size: int) -> list[list[TokenRow]]:
        """Group the held-out rows by length, longest first: too little memory shows at once."""
        ordered = sorted(self.held_out, key=lambda row: -len(row.input_ids))
        return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def prompt_of(example: Example, tokenizer: Any) -> str:
    """Return the text before the answer, in the model's own chat template where it has one."""
    if not example.user and not example.system:
        return ""
    if not tokenizer.chat_template:
        return "".join(f"{part}\n" for part in (example.system, example.user) if part)
    messages = [{"role": "user", "content": example.user}]
    if example.system:
        messages.insert(0, {"role": "system", "content": example.system})
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _full_text(example: Example, prompt: str, tokenizer: Any) -> str:
    if not prompt or not tokenizer.chat_template:
        return f"{prompt}{example.answer}{tokenizer.eos_token}"
    messages = [{"role": "user", "content": example.user}, {"role": "assistant", "content": example.answer}]
    if example.system:
        messages.insert(0, {"role": "system", "content": example.system})
    return str(tokenizer.apply_chat_template(messages, tokenize=False))


def tokenize(examples: list[Example], tokenizer: Any, max_length: int, what: str) -> list[TokenRow]:
    """Turn examples into token ids and labels; only the answer counts for the loss.

    The answer starts where the tokens of the prompt and of the whole text part, which is not always at the
    end of the prompt, because tokens can merge across the border. Rows are cut at ``max_length`` tokens; a
    row whose answer lies wholly behind that is left out and counted aloud.

    Raises:
        TrainerError: ``BAD_DATA`` when no row is left.
    """
    rows: list[TokenRow] = []
    cut = too_long = 0
    said = time.monotonic()
    for start in range(0, len(examples), 1000):
        part = examples[start : start + 1000]
        prompts = [prompt_of(example, tokenizer) for example in part]
        texts = [_full_text(example, prompt, tokenizer) for example, prompt in zip(part, prompts, strict=True)]
        # Chat templates write the special tokens themselves; plain text needs the tokenizer's own.
        special = not tokenizer.chat_template or not any(prompts)
        whole = tokenizer(texts, add_special_tokens=special)["input_ids"]
        given = tokenizer(prompts, add_special_tokens=special)["input_ids"]
        for prompt, ids, prompt_ids in zip(prompts, whole, given, strict=True):
            begin = _common_prefix(prompt_ids, ids) if prompt else 0
            labels = [IGNORED] * begin + ids[begin:]
            cut += len(ids) > max_length
            if begin >= max_length or len(ids) < 2:
                too_long += 1
                continue
            rows.append(TokenRow(ids[:max_length], labels[:max_length]))
        if time.monotonic() - said > 2:
            print(f"data: {start + len(part)} of {len(examples)} {what} rows tokenized", flush=True)
            said = time.monotonic()
    if cut:
        print(
            f"data: {cut} of {len(examples)} {what} rows are longer than {max_length} tokens; "
            f"{cut - too_long} were cut and {too_long} left out, because their answer would be gone"
        )
    if not rows:
        raise bad_data(
            "DataTooLong",
            f"all {len(examples)} {what} rows have prompts of {max_length} tokens and more (train.maxLength)",
        )
    return rows


def _common_prefix(left: list[int], right: list[int]) -> int:
    for place, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return place
    return min(len(left), len(right))


def tokenize_split(split: Split, config: RunConfig, tokenizer: Any) -> TextData:
    """Tokenize both parts. Without sample prompts the first held-out row gives one.

    Raises:
        TrainerError: ``BAD_DATA`` when no row of a part is short enough.
    """
    length = config.train.max_length
    first = split.held_out[0]
    prompts = list(config.sample_prompts) or [first.user or first.answer[:80]]
    return TextData(
        tokenize(split.train, tokenizer, length, "training"),
        tokenize(split.held_out, tokenizer, length, "held-out"),
        prompts,
    )
