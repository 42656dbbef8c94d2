"""What a training task is about: its type and the description of its data.

The members and their defaults follow the dataset descriptors of the historic task market (instruct, chat,
DPO, GRPO and image requests), so that an offer from there translates field by field.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from pydantic import ConfigDict, Field, StringConstraints, model_validator

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


class Architecture(StrEnum):
    """Architecture of an image model."""

    SDXL = "sdxl"
    FLUX = "flux"


class FileFormat(StrEnum):
    """How the rows are stored."""

    JSON = "json"
    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"
    HF = "hf"
    ZIP = "zip"


class InstructColumns(WireModel):
    """Columns of instruction data. Without an output column the text is trained as plain completion."""

    field_instruction: Column = Field("instruction", description="Column with the instruction or question.")
    field_input: Column | None = Field(None, description="Column with additional input for the instruction.")
    field_output: Column | None = Field(
        None,
        description="Column with the wanted answer; absent trains the instruction column as plain text.",
    )
    field: Column | None = Field(
        None,
        description="Column that is trained as plain text where there is no fieldOutput; default fieldInstruction.",
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


CHAT_TEMPLATES: tuple[str, ...] = ("chatml", "gemma", "llama-3", "mistral", "phi-3", "tokenizer-default")
"""Chat templates that the trainer knows by name; the last one stands for the model's own."""

_OTHER_TEMPLATE_NAMES = {"llama3": "llama-3", "phi3": "phi-3", "default": "tokenizer-default"}


def chat_template_of(name: str) -> str | None:
    """Return the template that a name stands for, in whatever spelling; None when it is not known."""
    plain = name.strip().lower().replace("_", "-")
    plain = _OTHER_TEMPLATE_NAMES.get(plain, plain)
    return plain if plain in CHAT_TEMPLATES else None


class ChatColumns(WireModel):
    """Columns of conversation data: a list of messages, each with a role and a text."""

    chat_template: Column = Field(
        "chatml",
        description="Name of the chat template that the model is trained with: chatml, llama-3, mistral, gemma, phi-3, "
        "or tokenizer-default for the model's own.",
    )
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
    prompt_format: Format = Field(
        "{prompt}",
        description="Template of the prompt; {prompt} is replaced, and {system} where it holds the system prompt.",
    )
    chosen_format: Format = Field("{chosen}", description="Template of the preferred answer; {chosen} is replaced.")
    rejected_format: Format = Field("{rejected}", description="Template of the other answer; {rejected} is replaced.")


class BuiltinName(StrEnum):
    """The rewards that the trainer brings along."""

    LENGTH_TARGET = "LengthTarget"
    PATTERN_MATCH = "PatternMatch"
    EXACT_MATCH = "ExactMatch"
    NUMBER_MATCH = "NumberMatch"
    JSON_VALID = "JSONValid"
    KEYWORD_SHARE = "KeywordShare"
    READABILITY = "Readability"
    VOCABULARY_DIVERSITY = "VocabularyDiversity"
    REPETITION_PENALTY = "RepetitionPenalty"


NEEDED_PARAMETER: dict[str, BuiltinName] = {
    "words": BuiltinName.LENGTH_TARGET,
    "pattern": BuiltinName.PATTERN_MATCH,
    "keywords": BuiltinName.KEYWORD_SHARE,
}
"""Parameters that one built-in reward cannot do without, and no other one has."""

OPTIONAL_PARAMETER: dict[str, BuiltinName] = {
    "ease": BuiltinName.READABILITY,
    "ngram": BuiltinName.REPETITION_PENALTY,
}
"""Parameters that one built-in reward may have, and no other one has."""

COMPARING_BUILTINS: tuple[BuiltinName, ...] = (BuiltinName.EXACT_MATCH, BuiltinName.NUMBER_MATCH)
"""Built-in rewards that compare a completion with the extra column."""


def _needed(parameter: str) -> str:
    name = NEEDED_PARAMETER[parameter].value
    return f"builtin.{parameter} goes with {name} and with nothing else: set it for {name} or remove it"


def _optional(parameter: str) -> str:
    name = OPTIONAL_PARAMETER[parameter].value
    return f"builtin.{parameter} is a parameter of {name} alone: remove it or set name to {name}"


def _checks(*made: tuple[str, str]) -> dict[str, Any]:
    return {"x-kubernetes-validations": [{"rule": rule, "message": message} for rule, message in made]}


class BuiltinReward(WireModel):
    """A reward that the trainer brings along, by its name. Each gives a number for every completion."""

    model_config = ConfigDict(
        json_schema_extra=_checks(
            *(
                (f"has(self.{parameter}) == (self.name == '{name.value}')", _needed(parameter))
                for parameter, name in NEEDED_PARAMETER.items()
            ),
            *(
                (f"!has(self.{parameter}) || self.name == '{name.value}'", _optional(parameter))
                for parameter, name in OPTIONAL_PARAMETER.items()
            ),
        )
    )

    name: BuiltinName = Field(description="Which reward.")
    words: Annotated[int, Field(ge=1, le=100000)] | None = Field(
        None, description="LengthTarget: the wanted number of words."
    )
    pattern: Annotated[str, StringConstraints(min_length=1, max_length=512)] | None = Field(
        None, description="PatternMatch: regular expression (Python's re) that a good completion contains."
    )
    keywords: (
        Annotated[
            tuple[Annotated[str, StringConstraints(min_length=1, max_length=63)], ...],
            Field(min_length=1, max_length=32),
        ]
        | None
    ) = Field(None, description="KeywordShare: words or phrases that a good completion contains.")
    ease: Annotated[int, Field(ge=0, le=100)] | None = Field(
        None, description="Readability: the wanted Flesch reading ease; absent means the easier the better."
    )
    ngram: Annotated[int, Field(ge=1, le=16)] | None = Field(
        None, description="RepetitionPenalty: how many words in a row count as one piece; default 4."
    )

    @model_validator(mode="after")
    def _check_parameters(self) -> BuiltinReward:
        for parameter, name in NEEDED_PARAMETER.items():
            if (getattr(self, parameter) is not None) != (self.name is name):
                raise ValueError(_needed(parameter))
        for parameter, name in OPTIONAL_PARAMETER.items():
            if getattr(self, parameter) is not None and self.name is not name:
                raise ValueError(_optional(parameter))
        return self


_ONE_REWARD = "a reward function needs exactly one of builtin and source: set one and remove the other"
_HASH_OF_NOTHING = "sha256 is the hash of source: remove it from a reward function without source"


class RewardFunction(WireModel):
    """One reward of a GRPO task: a built-in one by name, or source text.

    Source text is foreign code. The operator and the trainer never execute it; a confined child process in the
    training pod does.
    """

    model_config = ConfigDict(
        json_schema_extra=_checks(
            ("has(self.builtin) != has(self.source)", _ONE_REWARD),
            ("!has(self.sha256) || has(self.source)", _HASH_OF_NOTHING),
        )
    )

    name: Annotated[str, StringConstraints(min_length=1, max_length=63)] = Field(description="Name of the reward.")
    weight: Annotated[
        str,
        StringConstraints(max_length=16),
        spelled(r"^\d+(\.\d+)?$", "weight must be a decimal number in a string: write for example '0.5'"),
    ] = Field("1", description="Weight of the reward as a decimal string; weights are normalised to a sum of 1.")
    builtin: BuiltinReward | None = Field(None, description="A reward that the trainer brings along.")
    source: Annotated[str, StringConstraints(min_length=1, max_length=16384)] | None = Field(
        None, description="Python source text of a function that takes completions and returns a list of numbers."
    )
    sha256: (
        Annotated[
            str,
            StringConstraints(max_length=64),
            spelled(r"^[0-9a-f]{64}$", "sha256 must be 64 hexadecimal digits: write what sha256sum prints"),
        ]
        | None
    ) = Field(None, description="SHA-256 of the source text; a source that does not match is refused.")

    @model_validator(mode="after")
    def _check_kind(self) -> RewardFunction:
        if (self.builtin is None) == (self.source is None):
            raise ValueError(_ONE_REWARD)
        if self.sha256 is not None and self.source is None:
            raise ValueError(_HASH_OF_NOTHING)
        return self


_NO_WEIGHT = "the weights of rewardFunctions are all 0: give at least one of them a weight above 0"
_SAME_NAME = "rewardFunctions with equal names cannot be told apart: give each of them a name of its own"
_NOTHING_TO_COMPARE = (
    f"{' and '.join(name.value for name in COMPARING_BUILTINS)} compare with the extra column: "
    "set grpo.extraColumn to the column with the answers"
)


class GRPOColumns(WireModel):
    """Columns and rewards of a reinforcement task."""

    model_config = ConfigDict(
        json_schema_extra=_checks(
            ("self.rewardFunctions.exists(f, !has(f.weight) || double(f.weight) > 0.0)", _NO_WEIGHT),
            ("self.rewardFunctions.all(f, self.rewardFunctions.exists_one(g, g.name == f.name))", _SAME_NAME),
            (
                "has(self.extraColumn) || !self.rewardFunctions.exists(f, has(f.builtin) && "
                f"f.builtin.name in [{', '.join(repr(name.value) for name in COMPARING_BUILTINS)}])",
                _NOTHING_TO_COMPARE,
            ),
        )
    )

    field_prompt: Column = Field("prompt", description="Column with the prompt.")
    extra_column: Column | None = Field(None, description="Column that is handed to the reward functions as it is.")
    reward_functions: Annotated[tuple[RewardFunction, ...], Field(min_length=1, max_length=8)] = Field(
        description="The rewards whose weighted sum is maximised."
    )

    @model_validator(mode="after")
    def _check_rewards(self) -> GRPOColumns:
        rewards = self.reward_functions
        if not any(float(reward.weight) > 0 for reward in rewards):
            raise ValueError(_NO_WEIGHT)
        if len({reward.name for reward in rewards}) < len(rewards):
            raise ValueError(_SAME_NAME)
        compared = any(reward.builtin and reward.builtin.name in COMPARING_BUILTINS for reward in rewards)
        if compared and self.extra_column is None:
            raise ValueError(_NOTHING_TO_COMPARE)
        return self


class ImageColumns(WireModel):
    """Picture data: an archive of N.png, N.jpg or N.jpeg files with a caption in N.txt beside each."""

    resolution: Annotated[int, Field(ge=64, le=4096)] = Field(1024, description="Edge length in pixels.")
    trigger_word: Annotated[str, StringConstraints(min_length=1, max_length=63)] | None = Field(
        None, description="Word that calls up the trained style or person."
    )
