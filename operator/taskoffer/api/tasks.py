"""What a training task is about: its type and the description of its data.

The members and their defaults follow the dataset descriptors of the historic task market (instruct, chat,
DPO, GRPO and image requests), so that an offer from there translates field by field.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field, StringConstraints

from taskoffer.api.base import WireModel, spelled

Column = Annotated[str, StringConstraints(min_length=1, max_length=253)]
Format = Annotated[str, StringConstraints(max_length=4096)]


class TaskType(StrEnum):
    """What kind of training an offer asks for."""

    INSTRUCT_TEXT = "InstructText"
    CHAT = "Chat"
    DPO = "DPO"
    GRPO = "GRPO"
    IMAGE = "Image"


class DatasetType(StrEnum):
    """Which member of the dataset is set. Each belongs to one task type."""

    INSTRUCT = "Instruct"
    CHAT = "Chat"
    DPO = "DPO"
    GRPO = "GRPO"
    IMAGE = "Image"


DATASET_OF_TASK: dict[TaskType, DatasetType] = {
    TaskType.INSTRUCT_TEXT: DatasetType.INSTRUCT,
    TaskType.CHAT: DatasetType.CHAT,
    TaskType.DPO: DatasetType.DPO,
    TaskType.GRPO: DatasetType.GRPO,
    TaskType.IMAGE: DatasetType.IMAGE,
}


class FileFormat(StrEnum):
    """How the rows are stored."""

    JSON = "json"
    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"
    ZIP = "zip"


class InstructColumns(WireModel):
    """Columns of instruction data. Without an output column the text is trained as plain completion."""

    field_instruction: Column = Field("instruction", description="Column with the instruction or question.")
    field_input: Column | None = Field(None, description="Column with additional input for the instruction.")
    field_output: Column | None = Field(
        None,
        description="Column with the wanted answer; absent trains the instruction column as plain text.",
    )
    field_system: Column | None = Field(None, description="Column with a system prompt of its own for each row.")
    system_prompt: Format = Field("", description="System prompt for rows that have none of their own.")
    system_format: Format = Field("{system}", description="Template of the system message; {system} is replaced.")
    format: Format | None = Field(
        None,
        description="Template of the user message with {instruction} and {input}; default joins both.",
    )
    no_input_format: Format | None = Field(
        None, description="Template of the user message for rows without input; {instruction} is replaced."
    )


class ChatColumns(WireModel):
    """Columns of conversation data: a list of messages, each with a role and a text."""

    chat_template: Column = Field("chatml", description="Name of the chat template that the model is trained with.")
    chat_column: Column = Field("conversations", description="Column that holds the list of messages.")
    chat_role_field: Column = Field("from", description="Key of a message's role.")
    chat_content_field: Column = Field("value", description="Key of a message's text.")
    chat_user_reference: Column = Field("user", description="Role value of the user's messages.")
    chat_assistant_reference: Column = Field("assistant", description="Role value of the assistant's messages.")


class DPOColumns(WireModel):
    """Columns of preference data: a prompt, a chosen and a rejected answer."""

    field_prompt: Column = Field("prompt", description="Column with the prompt.")
    field_system: Column | None = Field(None, description="Column with the system prompt.")
    field_chosen: Column = Field("chosen", description="Column with the preferred answer.")
    field_rejected: Column = Field("rejected", description="Column with the answer to move away from.")
    prompt_format: Format = Field("{prompt}", description="Template of the prompt; {prompt} is replaced.")
    chosen_format: Format = Field("{chosen}", description="Template of the preferred answer; {chosen} is replaced.")
    rejected_format: Format = Field("{rejected}", description="Template of the other answer; {rejected} is replaced.")


class RewardFunction(WireModel):
    """One reward of a GRPO task. Its source is foreign code and runs only in the sandboxed training pod."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=63)] = Field(description="Name of the reward.")
    weight: Annotated[
        str,
        StringConstraints(max_length=16),
        spelled(r"^\d+(\.\d+)?$", "weight must be a decimal number in a string: write for example '0.5'"),
    ] = Field("1", description="Weight of the reward as a decimal string; weights are normalised to a sum of 1.")
    source: Annotated[str, StringConstraints(min_length=1, max_length=16384)] = Field(
        description="Python source text of a function that takes completions and returns a list of numbers."
    )
    sha256: (
        Annotated[
            str,
            StringConstraints(max_length=64),
            spelled(r"^[0-9a-f]{64}$", "sha256 must be 64 hexadecimal digits: write what sha256sum prints"),
        ]
        | None
    ) = Field(None, description="SHA-256 of the source text; a source that does not match is refused.")


class GRPOColumns(WireModel):
    """Columns and rewards of a reinforcement task."""

    field_prompt: Column = Field("prompt", description="Column with the prompt.")
    extra_column: Column | None = Field(None, description="Column that is handed to the reward functions as it is.")
    reward_functions: Annotated[tuple[RewardFunction, ...], Field(min_length=1, max_length=8)] = Field(
        description="The rewards whose weighted sum is maximised."
    )


class ImageColumns(WireModel):
    """Picture data: an archive of N.png, N.jpg or N.jpeg files with a caption in N.txt beside each."""

    resolution: Annotated[int, Field(ge=64, le=4096)] = Field(1024, description="Edge length in pixels.")
    trigger_word: Annotated[str, StringConstraints(min_length=1, max_length=63)] | None = Field(
        None, description="Word that calls up the trained style or person."
    )
