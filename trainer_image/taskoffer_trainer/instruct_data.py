"""Rows of instruction data: columns and templates make what the model is given and what it should say."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from taskoffer.api.contract import ExitCode, InstructColumns, RunConfig
from taskoffer_trainer.data import LeftOut, Row, Split, bad_data, cell_text, read_rows, split_rows
from taskoffer_trainer.failures import TrainerError

__all__ = ["Example", "build_examples", "read_instruct"]


@dataclass(frozen=True)
class Example:
    """One row ready for the tokenizer: what the model is given, and what it should say.

    ``system`` and ``user`` are empty for plain completion, where the whole text is what the model should say.
    """

    system: str
    user: str
    answer: str

    @property
    def digest(self) -> str:
        """SHA-256 of the texts; equal rows have equal digests."""
        return hashlib.sha256("\0".join((self.system, self.user, self.answer)).encode()).hexdigest()


def _wanted(columns: InstructColumns) -> list[str]:
    if columns.field_output is None:
        return [columns.field or columns.field_instruction]
    names = (columns.field_instruction, columns.field_input, columns.field_output, columns.field_system)
    return [name for name in names if name is not None]


def _user_message(columns: InstructColumns, instruction: str, context: str) -> str:
    if context:
        if columns.format is None:
            return f"{instruction}\n{context}" if instruction else context
        texts = {"instruction": instruction, "input": context}
        # One pass over the template, so that braces in the texts stay as they are.
        return re.sub(r"\{(instruction|input)\}", lambda match: texts[match[1]], columns.format)
    return (columns.no_input_format or "{instruction}").replace("{instruction}", instruction)


def build_examples(rows: list[Row], columns: InstructColumns, left_out: LeftOut | None = None) -> list[Example]:
    """Apply columns and templates; rows without instruction or answer are left out and counted aloud.

    Raises:
        TrainerError: ``BAD_DATA`` when a cell is not text or no row is left.
    """
    left_out = LeftOut() if left_out is None else left_out
    examples = []
    for number, row in enumerate(rows, 1):
        plain = columns.field_output is None
        instruction = cell_text(row, _wanted(columns)[0], number)
        answer = instruction if plain else cell_text(row, columns.field_output, number)
        context = "" if plain else cell_text(row, columns.field_input, number)
        if not answer or not (instruction or context):
            left_out.add("noText", "have no text in a needed column", number)
            continue
        if plain:
            examples.append(Example("", "", answer))
            continue
        system = cell_text(row, columns.field_system, number) or columns.system_prompt
        if system:
            system = columns.system_format.replace("{system}", system)
        examples.append(Example(system, _user_message(columns, instruction, context), answer))
    left_out.say(len(rows))
    if not examples:
        raise bad_data("DataEmpty", f"none of the {len(rows)} rows has text in the needed columns {_wanted(columns)}")
    return examples


def read_instruct(config: RunConfig) -> Split[Example]:
    """Read the rows of a run and hold some out. Needs none of the heavy libraries.

    Raises:
        TrainerError: ``BAD_DATA``, or ``BAD_CONFIG`` without columns.
    """
    columns = config.data.instruct
    if columns is None:
        raise TrainerError(ExitCode.BAD_CONFIG, "ConfigInvalid", "data.instruct: the columns are missing")
    left_out = LeftOut()
    examples = build_examples(read_rows(config.data, _wanted(columns)), columns, left_out)
    return split_rows(examples, config.data, config.train.seed, left_out)
