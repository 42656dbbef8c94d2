"""Rows of conversation data: a list of messages becomes a conversation of which the assistant's turns are learnt."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Final

from taskoffer.api.contract import ChatColumns, ExitCode, RunConfig
from taskoffer_trainer.data import LeftOut, Row, Split, bad_data, parsed_json, read_rows, split_rows
from taskoffer_trainer.failures import TrainerError

__all__ = ["ASSISTANT", "SYSTEM", "USER", "Conversation", "Message", "build_conversations", "read_chat"]

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"

_KNOWN_ROLES: Final = {
    SYSTEM: SYSTEM,
    "developer": SYSTEM,
    USER: USER,
    "human": USER,
    "prompter": USER,
    ASSISTANT: ASSISTANT,
    "gpt": ASSISTANT,
    "model": ASSISTANT,
    "bot": ASSISTANT,
    "chatgpt": ASSISTANT,
}
"""Role values that public data sets use, beside those that the columns name."""


@dataclass(frozen=True)
class Message:
    """One turn. The role is :data:`SYSTEM`, :data:`USER` or :data:`ASSISTANT`."""

    role: str
    content: str

    def for_template(self) -> dict[str, str]:
        """Return the message as chat templates take it."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class Conversation:
    """Perhaps a system message, then user and assistant in turns; the last turn is the assistant's."""

    messages: tuple[Message, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of roles and texts; equal conversations have equal digests."""
        texts = [text for message in self.messages for text in (message.role, message.content)]
        return hashlib.sha256("\0".join(texts).encode()).hexdigest()

    @property
    def first_prompt(self) -> str:
        """What the user says first."""
        return next(message.content for message in self.messages if message.role == USER)


def _list_of_messages(value: Any, column: str, number: int) -> list[Any]:
    """Return the messages of a cell; a text, as CSV has it, is read as JSON."""
    if isinstance(value, str) and value.strip():
        try:
            value, _ = parsed_json(value)
        except ValueError as error:
            raise bad_data(
                "DataUnreadable", f"row {number}: column {column!r} is text that is not JSON: {error}"
            ) from error
    if value is None or value == "":
        return []
    if not isinstance(value, list):
        raise bad_data(
            "DataUnreadable",
            f"row {number}: column {column!r} holds {type(value).__name__}; it should hold a list of messages",
        )
    return value


def _message(value: Any, columns: ChatColumns, where: str) -> Message:
    if not isinstance(value, dict):
        raise bad_data("DataUnreadable", f"{where} is not an object but {type(value).__name__}")
    for key, setting in (
        (columns.chat_role_field, "chatRoleField"),
        (columns.chat_content_field, "chatContentField"),
    ):
        if key not in value:
            keys = ", ".join(sorted(map(str, value))) or "none"
            raise bad_data(
                "FieldMissing", f"{where} has no key {key!r}, its keys are {keys}; name the right one in chat.{setting}"
            )
    content = value[columns.chat_content_field]
    if content is not None and not isinstance(content, str):
        raise bad_data(
            "DataUnreadable",
            f"{where}: {columns.chat_content_field!r} holds {type(content).__name__}, not text",
        )
    role = _role(value[columns.chat_role_field], columns, where)
    return Message(role, (content or "").strip())


def _role(value: Any, columns: ChatColumns, where: str) -> str:
    if value == columns.chat_user_reference:
        return USER
    if value == columns.chat_assistant_reference:
        return ASSISTANT
    known = _KNOWN_ROLES.get(value.strip().lower()) if isinstance(value, str) else None
    if known is None:
        raise bad_data(
            "RoleUnknown",
            f"{where} has the role {value!r}; known are system, {columns.chat_user_reference} and "
            f"{columns.chat_assistant_reference}: name the right ones in chat.chatUserReference and "
            "chat.chatAssistantReference, or leave such rows out",
        )
    return known


def _in_turns(messages: list[Message]) -> bool:
    turns = [message.role for message in messages if message.role != SYSTEM]
    system_first = all(message.role != SYSTEM for message in messages[1:])
    return system_first and turns == [USER, ASSISTANT] * (len(turns) // 2)


def build_conversations(rows: list[Row], columns: ChatColumns, left_out: LeftOut | None = None) -> list[Conversation]:
    """Turn rows into conversations.

    What the user says last has no answer to learn from and is cut off. Rows without an answer, with an empty
    message, or whose turns do not alternate are left out and counted aloud.

    Raises:
        TrainerError: ``BAD_DATA`` when a cell holds no messages, a message lacks a field or has an unknown
            role, or no row is left.
    """
    left_out = LeftOut() if left_out is None else left_out
    conversations, unanswered = [], 0
    for number, row in enumerate(rows, 1):
        cell = _list_of_messages(row.get(columns.chat_column), columns.chat_column, number)
        messages = [_message(value, columns, f"row {number}, message {n}") for n, value in enumerate(cell, 1)]
        if messages and messages[-1].role == USER:
            unanswered += 1
            while messages and messages[-1].role == USER:
                messages.pop()
        if not any(message.role == ASSISTANT for message in messages):
            left_out.add("noAnswer", "have no message of the assistant", number)
        elif not all(message.content for message in messages):
            left_out.add("emptyMessage", "have an empty message", number)
        elif not _in_turns(messages):
            left_out.add("notInTurns", "do not go system (at most once), user, assistant, user, assistant", number)
        else:
            conversations.append(Conversation(tuple(messages)))
    left_out.say(len(rows))
    if unanswered:
        print(f"data: {unanswered} of {len(rows)} conversations end with the user, whose last words were cut off")
    if not conversations:
        raise bad_data("DataEmpty", f"none of the {len(rows)} rows is a conversation: {left_out.in_words()}")
    return conversations


def read_chat(config: RunConfig) -> Split[Conversation]:
    """Read the conversations of a run and hold some out. Needs none of the heavy libraries.

    Raises:
        TrainerError: ``BAD_DATA``, or ``BAD_CONFIG`` without columns.
    """
    columns = config.data.chat
    if columns is None:
        raise TrainerError(ExitCode.BAD_CONFIG, "ConfigInvalid", "data.chat: the columns are missing")
    left_out = LeftOut()
    conversations = build_conversations(read_rows(config.data, [columns.chat_column]), columns, left_out)
    return split_rows(conversations, config.data, config.train.seed, left_out)
