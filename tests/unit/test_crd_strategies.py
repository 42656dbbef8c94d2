"""The texts that fuzzed objects are made of keep step with the patterns of the schemas."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from crd_schema import PLURALS, Schema, faults, schema_of
from crd_strategies import BY_PATTERN


def _patterned(schema: Schema) -> Iterator[Schema]:
    if "pattern" in schema and "enum" not in schema:
        yield schema
    inner = [*schema.get("properties", {}).values(), schema.get("items"), schema.get("additionalProperties")]
    for part in inner:
        if isinstance(part, dict):
            yield from _patterned(part)


@pytest.mark.parametrize("kind", PLURALS)
def test_each_pattern_of_a_schema_has_texts_that_it_allows(kind: str) -> None:
    met = list(_patterned(schema_of(kind)))
    assert met
    for schema in met:
        texts = BY_PATTERN.get(schema["pattern"], ())
        assert [text for text in texts if not list(faults(schema, text))], schema["pattern"]


def test_no_text_stands_for_a_pattern_that_no_schema_has() -> None:
    assert set(BY_PATTERN) == {schema["pattern"] for kind in PLURALS for schema in _patterned(schema_of(kind))}
