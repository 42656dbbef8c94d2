"""Rows of a GRPO task: a prompt, and what the rewards are handed along with its completions."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from taskoffer.api.contract import COMPARING_BUILTINS, ExitCode, GRPOColumns, RunConfig
from taskoffer_trainer.data import LeftOut, Row, Split, bad_data, cell_text, read_rows, split_rows
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.instruct_data import Example
from taskoffer_trainer.tokens import prompt_of

__all__ = ["Prompt", "TokenPrompt", "build_prompts", "read_grpo", "tokenize_prompts"]


@dataclass(frozen=True)
class Prompt:
    """What the model is asked, and the extra column as it is in the data (any JSON value)."""

    text: str
    extra: Any = None

    @property
    def digest(self) -> str:
        """SHA-256 of the prompt: all rows of a prompt are trained, or all are held out."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class TokenPrompt:
    """A prompt and its tokens, as the model is given them."""

    prompt: Prompt
    ids: list[int]


def _check_extra(extra: Any, columns: GRPOColumns, number: int) -> None:
    """Make sure that the extra column can be handed over, and compared where a reward compares."""
    try:
        json.dumps(extra)
    except (TypeError, ValueError) as error:
        raise bad_data(
            "DataUnreadable",
            f"row {number}: column {columns.extra_column!r} holds {type(extra).__name__}, which cannot be handed to "
            f"the reward functions: {error}; write it as text",
        ) from error
    comparing = [one.name for one in columns.reward_functions if one.builtin and one.builtin.name in COMPARING_BUILTINS]
    if comparing and (isinstance(extra, bool) or not isinstance(extra, (str, int, float, type(None)))):
        raise bad_data(
            "DataUnreadable",
            f"row {number}: column {columns.extra_column!r} holds {type(extra).__name__}, and the reward "
            f"{comparing[0]} compares it as text",
        )


def build_prompts(rows: list[Row], columns: GRPOColumns, left_out: LeftOut | None = None) -> list[Prompt]:
    """Turn rows into prompts; rows without a prompt are left out and counted aloud.

    Raises:
        TrainerError: ``BAD_DATA`` when a cell does not fit or no row is left.
    """
    left_out = LeftOut() if left_out is None else left_out
    prompts = []
    for number, row in enumerate(rows, 1):
        text = cell_text(row, columns.field_prompt, number)
        if not text:
            left_out.add("noText", "have no text in the prompt column", number)
            continue
        extra = row.get(columns.extra_column) if columns.extra_column is not None else None
        _check_extra(extra, columns, number)
        prompts.append(Prompt(text, extra))
    left_out.say(len(rows))
    if not prompts:
        raise bad_data("DataEmpty", f"none of the {len(rows)} rows has text in the column {columns.field_prompt!r}")
    return prompts


def read_grpo(config: RunConfig) -> Split[Prompt]:
    """Read the prompts of a run and hold some out. Needs none of the heavy libraries.

    Raises:
        TrainerError: ``BAD_DATA``, or ``BAD_CONFIG`` without columns.
    """
    columns = config.data.grpo
    if columns is None:
        raise TrainerError(ExitCode.BAD_CONFIG, "ConfigInvalid", "data.grpo: the columns are missing")
    wanted = [name for name in (columns.field_prompt, columns.extra_column) if name is not None]
    left_out = LeftOut()
    prompts = build_prompts(read_rows(config.data, wanted), columns, left_out)
    return split_rows(prompts, config.data, config.train.seed, left_out)


def tokenize_prompts(prompts: list[Prompt], tokenizer: Any, longest: int, what: str) -> list[TokenPrompt]:
    """Tokenize prompts, in the model's chat template where it has one; too long ones are left out and counted aloud.

    Args:
        prompts: at least one.
        tokenizer: the model's.
        longest: most tokens of a prompt, which is ``train.maxLength`` less ``train.grpo.maxCompletionLength``.
        what: which part of the data this is, for messages.

    Raises:
        TrainerError: ``BAD_DATA`` when no prompt is left.
    """
    chat = bool(tokenizer.chat_template)
    texts = [prompt_of(Example("", one.text, ""), tokenizer) if chat else one.text for one in prompts]
    rows = tokenizer(texts, add_special_tokens=not chat)["input_ids"]
    kept = [TokenPrompt(prompt, ids) for prompt, ids in zip(prompts, rows, strict=True) if 0 < len(ids) <= longest]
    why = f"longer than {longest} tokens, which is train.maxLength less train.grpo.maxCompletionLength"
    if not kept:
        raise bad_data("DataTooLong", f"all {len(prompts)} {what} prompts are {why}; give one of them another value")
    if len(kept) < len(prompts):
        print(f"data: {len(prompts) - len(kept)} of {len(prompts)} {what} prompts are {why}, left out")
    return kept
