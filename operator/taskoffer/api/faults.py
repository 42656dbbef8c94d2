"""What is wrong with a value that does not fit its type, in words: ``field.path: what is wrong: remedy``.

pydantic's own words name Python's types and lead to its website. Here each fault is one line for somebody who wrote a
manifest: where, what, and what helps.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ValidationError

from taskoffer.api.base import remedy_for

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_SHOWN = 40
"""Characters that are repeated of a value."""
_LONGEST = 300
"""Characters of a path or a sentence: names of fields that do not belong there can be of any length."""


def faults_of(
    error: ValidationError,
    model: type[BaseModel] | None = None,
    *,
    prefix: Sequence[str] = (),
    values: bool = False,
    most: int = 30,
) -> list[str]:
    """Return one line for each fault, in the order in which they were found.

    Args:
        error: The failed validation.
        model: What was validated, to suggest the field that was meant by one that does not exist.
        prefix: Where the value stands in what its author wrote.
        values: Repeat the value that is wrong. Not meant for a status, which more people may read than the spec.
        most: Faults that are told; one more line counts the others.
    """
    found = error.errors(include_url=False)
    places = {item["loc"][:length] for item in found for length in range(len(item["loc"]))}
    # A list whose items are wrong counts as too short as well.
    kept = [item for item in found if item["type"] != "too_short" or item["loc"] not in places]
    lines = [_line(item, model, prefix, values=values) for item in kept[:most]]
    return lines if len(kept) <= most else [*lines, f"and {len(kept) - most} more"]


def what_is_wrong(item: ErrorDetails) -> tuple[str, str]:
    """Return what is wrong with a value, and what helps where that is not said with it."""
    kind, told = item["type"], item.get("ctx", {})
    if kind == "value_error":
        return item["msg"].removeprefix("Value error, "), ""
    if kind == "string_pattern_mismatch":
        known = remedy_for(str(told["pattern"]))
        # Some of the sentences name the field, which stands before them here.
        field = f"{item['loc'][-1]} " if item["loc"] else ""
        return (known.removeprefix(field), "") if known else (f"must match {told['pattern']}", "correct it")
    known_kind = _WORDS.get(kind)
    if known_kind is not None:
        return known_kind(told)
    family = next((words for start, words in _FAMILIES.items() if kind.startswith(start)), None)
    return family or (item["msg"][:1].lower() + item["msg"][1:], "correct it")


def path_of(parts: Sequence[str | int]) -> str:
    """Write a place as a path: ``sizeClasses[0].lora.r``."""
    text = ""
    for part in parts:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part != "[key]":
            text += f".{part}" if text else str(part)
    return text


def _line(item: ErrorDetails, model: type[BaseModel] | None, prefix: Sequence[str], *, values: bool) -> str:
    what, remedy = what_is_wrong(item)
    if item["type"] == "extra_forbidden" and model is not None:
        meant = _meant(model, item["loc"])
        remedy = f"did you mean {meant}?" if meant is not None else remedy
    text = (f"{what}: {remedy}" if remedy else what)[:_LONGEST]
    if values and item["type"] not in _WITHOUT_VALUE:
        text += f" (given: {_shown(item['input'])})"
    return f"{_place(item, what, model, prefix)}{text}"


def _place(item: ErrorDetails, what: str, model: type[BaseModel] | None, prefix: Sequence[str]) -> str:
    """Return where a fault is, as what stands before the words about it."""
    loc = item["loc"]
    if item["type"] == "value_error":
        # A check of a whole object names a field itself: one of the object's, or one seen from the top.
        named = re.split(r"[^A-Za-z0-9_]", what, maxsplit=1)[0]
        if not loc or named == loc[0]:
            return f"{path_of(prefix)}." if prefix else ""
        if named in _fields(_model_at(model, loc)):
            return f"{path_of([*prefix, *loc])[:_LONGEST]}."
    place = path_of([*prefix, *loc])[:_LONGEST]
    return f"{place}: " if place else ""


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return "fields"
    if isinstance(value, list | tuple):
        return "a list"
    if value is None:
        return "nothing"
    text = repr(value) if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _meant(model: type[BaseModel], loc: Sequence[str | int]) -> str | None:
    """Return the field whose name is nearest to one that does not exist, or None where none is near."""
    near = difflib.get_close_matches(str(loc[-1])[:_LONGEST], _fields(_model_at(model, loc[:-1])), n=1)
    return near[0] if near else None


def _model_at(model: type[BaseModel] | None, loc: Sequence[str | int]) -> type[BaseModel] | None:
    """Return the type of the object at a place, or None where that is no object."""
    for part in loc:
        if isinstance(part, str):
            model = next(_models_in(_fields(model).get(part)), None)
    return model


def _fields(model: type[BaseModel] | None) -> Mapping[str, Any]:
    if model is None:
        return {}
    return {field.alias or name: field.annotation for name, field in model.model_fields.items()}


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models that an annotation is made of: of ``tuple[Lane, ...] | None`` that is ``Lane``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _items(number: int) -> str:
    return f"{number} item" if number == 1 else f"{number} items"


def _characters(number: int) -> str:
    return f"{number} character" if number == 1 else f"{number} characters"


_HOLDS_FIELDS = ("must hold fields", "write 'name: value' lines below it")
_WITHOUT_VALUE = frozenset({"missing", "extra_forbidden", "value_error", "too_short", "too_long", "json_invalid"})
_WORDS: Mapping[str, Callable[[Mapping[str, Any]], tuple[str, str]]] = {
    "missing": lambda _: ("is missing", "set it"),
    "extra_forbidden": lambda _: ("there is no such field", "remove it or correct its name"),
    "invalid_key": lambda _: ("is no name of a field", "put it into quotes or remove it"),
    "model_type": lambda _: _HOLDS_FIELDS,
    "dict_type": lambda _: _HOLDS_FIELDS,
    "tuple_type": lambda _: ("must be a list", "begin each item with '- '"),
    "list_type": lambda _: ("must be a list", "begin each item with '- '"),
    "string_type": lambda _: ("must be a text", "put it into quotes"),
    "enum": lambda told: (f"must be {told['expected']}", "choose one"),
    "literal_error": lambda told: (f"must be {told['expected']}", "write that"),
    "too_short": lambda told: (f"has {_items(told['actual_length'])}", f"give at least {told['min_length']}"),
    "too_long": lambda told: (f"has {_items(told['actual_length'])}", f"give at most {told['max_length']}"),
    "string_too_short": lambda told: ("is too short", f"give at least {_characters(told['min_length'])}"),
    "string_too_long": lambda told: ("is too long", f"give at most {_characters(told['max_length'])}"),
    "greater_than_equal": lambda told: (f"must be at least {told['ge']:g}", "raise it"),
    "greater_than": lambda told: (f"must be above {told['gt']:g}", "raise it"),
    "less_than_equal": lambda told: (f"must be at most {told['le']:.15g}", "lower it"),
    "less_than": lambda told: (f"must be below {told['lt']:.15g}", "lower it"),
    "finite_number": lambda _: ("must be a finite number", "give another one"),
    "json_invalid": lambda told: (f"is no JSON ({told['error']})", "correct it"),
}
_FAMILIES: Mapping[str, tuple[str, str]] = {
    "int_": ("must be a whole number", "write only its digits"),
    "float_": ("must be a number", "write it without quotes or a unit"),
    "bool_": ("must be true or false", "write one of them"),
    "datetime_": ("must be a moment with its time zone", "write for example 2026-01-31T12:00:00Z"),
}
"""Words for all faults whose type begins so."""
