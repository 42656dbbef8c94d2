"""Rows of preference data: a prompt with an answer to move towards and one to move away from."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from taskoffer.api.contract import DPOColumns, ExitCode, RunConfig
from taskoffer_trainer.data import LeftOut, Row, Split, bad_data, cell_text, read_rows, split_rows
from taskoffer_trainer.failures import TrainerError

__all__ = ["Pair", "build_pairs", "read_dpo"]


@dataclass(frozen=True)
class Pair:
    """A prompt with two answers that differ."""

    system: str
    prompt: str
    chosen: str
    rejected: str

    @property
    def digest(self) -> str:
        """SHA-256 of system and prompt: all pairs of a prompt are trained, or all are held out."""
        return hashlib.sha256(f"{self.system}\0{self.prompt}".encode()).hexdigest()


def _wanted(columns: DPOColumns) -> list[str]:
    names = (columns.field_prompt, columns.field_chosen, columns.field_rejected, columns.field_system)
    return [name for name in names if name is not None]


def _pair(row: Row, columns: DPOColumns, number: int) -> Pair | None:
    """Apply columns and templates to one row; None where a text is missing."""
    prompt = cell_text(row, columns.field_prompt, number)
    chosen = cell_text(row, columns.field_chosen, number)
    rejected = cell_text(row, columns.field_rejected, number)
    system = cell_text(row, columns.field_system, number)
    if not (prompt and chosen and rejected):
        return None
    texts = {"prompt": prompt, "system": system}
    # One pass over the template, so that braces in the texts stay as they are.
    user = re.sub(r"\{(prompt|system)\}", lambda match: texts[match[1]], columns.prompt_format)
    return Pair(
        "" if "{system}" in columns.prompt_format else system,
        user.strip(),
        columns.chosen_format.replace("{chosen}", chosen).strip(),
        columns.rejected_format.replace("{rejected}", rejected).strip(),
    )


def build_pairs(rows: list[Row], columns: DPOColumns, left_out: LeftOut | None = None) -> list[Pair]:
    """Turn rows into pairs; rows with a missing text or two equal answers are left out and counted aloud.

    Raises:
        TrainerError: ``BAD_DATA`` when a cell is not text or no row is left.
    """
    left_out = LeftOut() if left_out is None else left_out
    pairs = []
    for number, row in enumerate(rows, 1):
        pair = _pair(row, columns, number)
        if pair is None:
            left_out.add("noText", "have no text in a needed column", number)
        elif pair.chosen == pair.rejected:
            left_out.add("equalAnswers", "have equal chosen and rejected answers, which teach nothing", number)
        else:
            pairs.append(pair)
    left_out.say(len(rows))
    if not pairs:
        raise bad_data("DataEmpty", f"none of the {len(rows)} rows has two answers to compare: {left_out.in_words()}")
    return pairs


def read_dpo(config: RunConfig) -> Split[Pair]:
    """Read the pairs of a run and hold some out. Needs none of the heavy libraries.

    Raises:
        TrainerError: ``BAD_DATA``, or ``BAD_CONFIG`` without columns.
    """
    columns = config.data.dpo
    if columns is None:
        raise TrainerError(ExitCode.BAD_CONFIG, "ConfigInvalid", "data.dpo: the columns are missing")
    left_out = LeftOut()
    pairs = build_pairs(read_rows(config.data, _wanted(columns)), columns, left_out)
    return split_rows(pairs, config.data, config.train.seed, left_out)
