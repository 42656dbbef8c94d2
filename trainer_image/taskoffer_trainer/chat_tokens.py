"""From conversations to token ids and labels: only what the assistant says counts for the loss."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from taskoffer.api.contract import RunConfig
from taskoffer_trainer.chat_data import Conversation
from taskoffer_trainer.chat_template import Rendered, render
from taskoffer_trainer.data import Split
from taskoffer_trainer.tokens import (
    IGNORED,
    Cuts,
    TextData,
    TokenRow,
    common_prefix,
    end_of,
    left_out_of,
    parts,
    sample_prompt,
)

__all__ = ["tokenize_chat_split", "tokenize_conversations", "turns_by_offsets", "turns_by_prefixes"]

Turns = list[tuple[int, int]]
"""Ranges of tokens."""


def turns_by_offsets(ends: Sequence[int], spans: Sequence[tuple[int, int]]) -> Turns:
    """Return the tokens of each span from where in the text every token ends.

    A token across the beginning of a span belongs to it, for it is not among the tokens of the text before; one
    across the end does not, for the model has not said it.

    Args:
        ends: for each token the character behind it, in order.
        spans: ranges of characters.
    """
    return [(bisect_right(ends, begin), bisect_right(ends, end)) for begin, end in spans]


def turns_by_prefixes(tokenizer: Any, text: str, ids: list[int], spans: Sequence[tuple[int, int]]) -> Turns:
    """Return the tokens of each span by tokenizing the text up to its ends: for tokenizers that know no offsets."""
    ends = [end for span in spans for end in span]
    prefixes = tokenizer([text[:end] for end in ends], add_special_tokens=False)["input_ids"] if ends else []
    places = [common_prefix(prefix, ids) for prefix in prefixes]
    return list(zip(places[::2], places[1::2], strict=True))


def _with_turns(tokenizer: Any, rendered: Sequence[Rendered]) -> list[tuple[list[int], Turns]]:
    """Tokenize rendered conversations; the template has written the special tokens already."""
    texts = [one.text for one in rendered]
    if not tokenizer.is_fast:
        whole = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [
            (ids, turns_by_prefixes(tokenizer, one.text, ids, one.spans))
            for ids, one in zip(whole, rendered, strict=True)
        ]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    return [
        (ids, turns_by_offsets([end for _, end in offsets], one.spans))
        for ids, offsets, one in zip(encoded["input_ids"], encoded["offset_mapping"], rendered, strict=True)
    ]


def _row(ids: list[int], turns: Turns, tokenizer: Any) -> TokenRow:
    labels = [IGNORED] * len(ids)
    for begin, end in turns:
        labels[begin:end] = ids[begin:end]
    lacking = end_of(ids[slice(*turns[-1])], tokenizer) if turns else []
    return TokenRow(ids + lacking, labels + lacking)


def tokenize_conversations(conversations: Sequence[Conversation], tokenizer: Any, cuts: Cuts) -> list[TokenRow]:
    """Turn conversations into token ids and labels.

    Rows are cut at the longest length; a row without a token of the assistant before that is left out and counted
    aloud. A turn that the template renders differently once more follows is given to the model and not learnt.

    Raises:
        TrainerError: ``BAD_DATA`` when no row is left, or the template refuses one.
    """
    rows: list[TokenRow] = []
    unclear = 0
    for part in parts(conversations, cuts.what):
        rendered = [render(conversation, tokenizer) for conversation in part]
        unclear += sum(one.unclear for one in rendered)
        for ids, turns in _with_turns(tokenizer, rendered):
            row = _row(ids, turns, tokenizer)
            cuts.cut += len(row.input_ids) > cuts.max_length
            labels = row.labels[: cuts.max_length]
            if all(label == IGNORED for label in labels[1:]):
                cuts.leave_out(len(row.input_ids))
                continue
            rows.append(TokenRow(row.input_ids[: cuts.max_length], labels))
    cuts.say()
    if unclear:
        print(
            f"data: {unclear} turns of {cuts.rows} {cuts.what} conversations are not learnt, because the chat template "
            "renders them differently when more follows"
        )
    if not rows:
        raise cuts.nothing_left()
    return rows


def tokenize_chat_split(split: Split[Conversation], config: RunConfig, tokenizer: Any) -> TextData:
    """Tokenize both parts. Without sample prompts the first held-out conversation gives one.

    Raises:
        TrainerError: ``BAD_DATA`` when no row of a part is short enough, or the template refuses one.
    """
    length = config.train.max_length
    said = [one.first_prompt for one in split.held_out]
    prompts = list(config.sample_prompts) or [sample_prompt(said, tokenizer, length)]
    cuts = [Cuts(length, "training", len(split.train)), Cuts(length, "held-out", len(split.held_out))]
    train = tokenize_conversations(split.train, tokenizer, cuts[0])
    held_out = tokenize_conversations(split.held_out, tokenizer, cuts[1])
    return TextData(train, held_out, prompts, {**split.left_out, **left_out_of(cuts)})
