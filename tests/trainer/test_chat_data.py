"""Rows become conversations as their columns say; what is no conversation is counted or refused by its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from taskoffer.api.contract import ChatColumns, DataConfig
from taskoffer_trainer.chat_data import Conversation, Message, build_conversations
from taskoffer_trainer.data import LeftOut, read_rows
from taskoffer_trainer.failures import TrainerError

pytestmark = pytest.mark.trainer

SHARED = ChatColumns()
OPENAI = ChatColumns(chat_column="messages", chat_role_field="role", chat_content_field="content")


def shared(*turns: tuple[str, Any]) -> dict[str, Any]:
    """A row as ShareGPT has it."""
    return {"conversations": [{"from": role, "value": text} for role, text in turns]}


def conversation(*turns: tuple[str, str]) -> Conversation:
    return Conversation(tuple(Message(role, text) for role, text in turns))


GOOD = conversation(("user", "Hi"), ("assistant", "Hello"))

READ: dict[str, tuple[ChatColumns, dict[str, Any], Conversation]] = {
    "the references": (SHARED, shared(("user", "Hi"), ("assistant", "Hello")), GOOD),
    "names of public data sets": (SHARED, shared(("human", " Hi\n"), ("gpt", "Hello")), GOOD),
    "any case": (SHARED, shared(("Human", "Hi"), ("GPT", "Hello")), GOOD),
    "own references": (
        ChatColumns(chat_user_reference="kunde", chat_assistant_reference="hilfe"),
        shared(("kunde", "Hi"), ("hilfe", "Hello")),
        GOOD,
    ),
    "a reference beats a known name": (
        ChatColumns(chat_user_reference="bot", chat_assistant_reference="human"),
        shared(("bot", "Hi"), ("human", "Hello")),
        GOOD,
    ),
    "own keys": (
        OPENAI,
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "id": 7}]},
        GOOD,
    ),
    "a system message": (
        SHARED,
        shared(("system", "Be kind"), ("human", "Hi"), ("gpt", "Hello")),
        conversation(("system", "Be kind"), ("user", "Hi"), ("assistant", "Hello")),
    ),
    "several turns": (
        SHARED,
        shared(("human", "Hi"), ("gpt", "Hello"), ("human", "Bye"), ("gpt", "See you")),
        conversation(("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "See you")),
    ),
    "the user has the last word": (SHARED, shared(("human", "Hi"), ("gpt", "Hello"), ("human", "Bye")), GOOD),
    "JSON in a cell": (
        SHARED,
        {"conversations": json.dumps(shared(("human", "Hi"), ("gpt", "Hello"))["conversations"])},
        GOOD,
    ),
}


@pytest.mark.parametrize(("columns", "row", "wanted"), READ.values(), ids=READ.keys())
def test_columns_make_the_conversation(columns: ChatColumns, row: dict[str, Any], wanted: Conversation) -> None:
    assert build_conversations([row], columns) == [wanted]


COUNTED: dict[str, tuple[dict[str, Any], str]] = {
    "no messages": (shared(), "noAnswer"),
    "an empty cell": ({"conversations": None}, "noAnswer"),
    "only the user": (shared(("human", "Hi")), "noAnswer"),
    "only a system message": (shared(("system", "Be kind")), "noAnswer"),
    "an empty answer": (shared(("human", "Hi"), ("gpt", "  ")), "emptyMessage"),
    "no text": (shared(("human", "Hi"), ("gpt", None)), "emptyMessage"),
    "the user twice": (shared(("human", "Hi"), ("human", "You there?"), ("gpt", "Hello")), "notInTurns"),
    "the assistant first": (shared(("gpt", "Hello"), ("human", "Hi"), ("gpt", "Hello")), "notInTurns"),
    "the assistant twice": (shared(("human", "Hi"), ("gpt", "Hello"), ("gpt", "Hello?")), "notInTurns"),
    "a late system message": (shared(("human", "Hi"), ("system", "Be kind"), ("gpt", "Hello")), "notInTurns"),
    "two system messages": (shared(("system", "a"), ("system", "b"), ("human", "Hi"), ("gpt", "Hello")), "notInTurns"),
}


@pytest.mark.parametrize(("row", "reason"), COUNTED.values(), ids=COUNTED.keys())
def test_rows_that_teach_nothing_are_left_out_and_counted(
    row: dict[str, Any], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    left_out = LeftOut()
    good = shared(("human", "Hi"), ("gpt", "Hello"))
    assert build_conversations([good, row, row], SHARED, left_out) == [GOOD]
    assert left_out.counts == {reason: 2}
    assert "data: 2 of 3 rows " in (said := capsys.readouterr().out)
    assert "left out; the first is row 2" in said
    with pytest.raises(TrainerError, match="none of the 1 rows is a conversation: 1 ") as error:
        build_conversations([row], SHARED)
    assert (error.value.code, error.value.reason) == (65, "DataEmpty")


REFUSED: dict[str, tuple[Any, str, list[str]]] = {
    "an unknown role": (
        [{"from": "human", "value": "Hi"}, {"from": "tool", "value": "42"}],
        "RoleUnknown",
        ["row 2, message 2", "'tool'", "chat.chatUserReference"],
    ),
    "a role that is no text": ([{"from": 1, "value": "Hi"}], "RoleUnknown", ["row 2, message 1 has the role 1"]),
    "other keys": (
        [{"role": "user", "content": "Hi"}],
        "FieldMissing",
        ["row 2, message 1", "'from'", "content, role", "chat.chatRoleField"],
    ),
    "no text field": ([{"from": "human", "text": "Hi"}], "FieldMissing", ["'value'", "chat.chatContentField"]),
    "parts instead of text": ([{"from": "human", "value": [{"type": "text"}]}], "DataUnreadable", ["holds list"]),
    "no object": (["Hi"], "DataUnreadable", ["row 2, message 1 is not an object but str"]),
    "text that nobody can mean": ("[" * 100_000, "DataUnreadable", ["row 2", "nested too deeply"]),
    "text that is not JSON": ("Hi", "DataUnreadable", ["row 2", "text that is not JSON"]),
    "an object": ({"from": []}, "DataUnreadable", ["row 2", "holds dict", "a list of messages"]),
}


@pytest.mark.parametrize(("cell", "reason", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_the_columns_do_not_fit_is_refused_by_row_and_message(cell: Any, reason: str, words: list[str]) -> None:
    rows = [shared(("human", "Hi"), ("gpt", "Hello")), {"conversations": cell}]
    with pytest.raises(TrainerError) as error:
        build_conversations(rows, SHARED)
    assert (error.value.code, error.value.reason) == (65, reason)
    for word in words:
        assert word in error.value.message


def test_conversations_come_the_same_out_of_every_format(tmp_path: Path) -> None:
    import csv

    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [shared(("human", "Hi, “you”"), ("gpt", "Hello")), shared(("human", "a"), ("gpt", "b"))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["conversations"], *([json.dumps(row["conversations"])] for row in rows)])
    wanted = build_conversations(rows, SHARED)
    for file_format in ("jsonl", "json", "csv", "parquet"):
        data = DataConfig.model_validate({"path": str(tmp_path), "fileFormat": file_format})
        assert build_conversations(read_rows(data, ["conversations"]), SHARED) == wanted
