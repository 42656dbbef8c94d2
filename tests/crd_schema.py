"""The schemas of our kinds as the API server reads them: where they are, and what in a value breaks them.

This is the part of Kubernetes' structural schemas that ``crds/`` uses, without CEL rules. As the server does, a write
is judged by what it changes: what was stored before and stays as it was is let through.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

Schema = dict[str, Any]
CRDS = Path(__file__).resolve().parent.parent / "crds"
PLURALS = {"TaskOffer": "taskoffers", "TrainingJob": "trainingjobs", "CapacityPolicy": "capacitypolicies"}

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
}
_NOTHING = object()


@functools.cache
def schema_of(kind: str) -> Schema:
    """Return the openAPIV3Schema of one of our kinds."""
    manifest = yaml.safe_load((CRDS / f"taskoffer.dev_{PLURALS[kind]}.yaml").read_text(encoding="utf-8"))
    made: Schema = manifest["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return made


def faults(schema: Schema, value: Any, before: Any = _NOTHING, path: str = "") -> Iterator[str]:
    """Yield what in a value breaks its schema, each with its path.

    Args:
        schema: A structural schema.
        value: The value that is to be stored.
        before: What is stored now; parts that are equal to it are not judged.
        path: Where the value is, for the words.
    """
    if before is not _NOTHING and value == before and type(value) is type(before):
        return
    kind = schema.get("type")
    if kind is not None and (not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "boolean")):
        yield f"{path}: {type(value).__name__} instead of {kind}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{path}: {value!r:.60} is not one of {schema['enum']}"
    if isinstance(value, str):
        yield from _text(schema, value, path)
    elif isinstance(value, list):
        yield from _list(schema, value, before, path)
    elif isinstance(value, dict):
        yield from _object(schema, value, before, path)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield from _number(schema, value, path)


def _text(schema: Schema, value: str, path: str) -> Iterator[str]:
    if len(value) > schema.get("maxLength", len(value)):
        yield f"{path}: {len(value)} characters, at most {schema['maxLength']}"
    if len(value) < schema.get("minLength", 0):
        yield f"{path}: {len(value)} characters, at least {schema['minLength']}"
    # As RE2 does, \d takes ASCII digits only and $ takes no line break.
    if "pattern" in schema and not re.search(schema["pattern"].replace("$", r"\Z"), value, re.ASCII):
        yield f"{path}: {value!r:.60} does not match {schema['pattern']}"
    if schema.get("format") == "date-time":
        try:
            known = datetime.fromisoformat(value).tzinfo is not None
        except ValueError:
            known = False
        if not known:
            yield f"{path}: {value!r:.60} is no time"


def _number(schema: Schema, value: float, path: str) -> Iterator[str]:
    if schema.get("format") == "int64" and not -(2**63) <= value < 2**63:
        yield f"{path}: {value} is no int64"
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and (value <= low if schema.get("exclusiveMinimum") else value < low):
        yield f"{path}: {value} is below {low}"
    if high is not None and (value >= high if schema.get("exclusiveMaximum") else value > high):
        yield f"{path}: {value} is above {high}"


def _list(schema: Schema, value: list[Any], before: Any, path: str) -> Iterator[str]:
    if len(value) > schema.get("maxItems", len(value)):
        yield f"{path}: {len(value)} items, at most {schema['maxItems']}"
    if len(value) < schema.get("minItems", 0):
        yield f"{path}: {len(value)} items, at least {schema['minItems']}"
    kind = schema.get("x-kubernetes-list-type", "atomic")
    keys = [key_of(schema, item) for item in value]
    if kind != "atomic" and any(key in keys[:number] for number, key in enumerate(keys)):
        yield f"{path}: an item occurs twice"
    known = [(key_of(schema, item), item) for item in before] if kind == "map" and isinstance(before, list) else []
    for number, (key, item) in enumerate(zip(keys, value, strict=True)):
        was = next((old for other, old in known if other == key), _NOTHING)
        yield from faults(schema["items"], item, was, f"{path}[{number}]")


def key_of(schema: Schema, item: Any) -> Any:
    """Return what tells an item of a list from the others."""
    keys = schema.get("x-kubernetes-list-map-keys")
    return [item.get(key) for key in keys] if keys and isinstance(item, dict) else item


def _object(schema: Schema, value: Schema, before: Any, path: str) -> Iterator[str]:
    properties, rest = schema.get("properties") or {}, schema.get("additionalProperties")
    yield from (f"{path}.{name}: missing" for name in schema.get("required") or () if name not in value)
    if len(value) > schema.get("maxProperties", len(value)):
        yield f"{path}: {len(value)} properties, at most {schema['maxProperties']}"
    for name, part in value.items():
        inner, was = properties.get(name, rest), before.get(name, _NOTHING) if isinstance(before, dict) else _NOTHING
        if inner:
            yield from faults(inner, part, was, f"{path}.{name}")
        elif properties and part != was:
            yield f"{path}.{name:.60}: unknown field"
