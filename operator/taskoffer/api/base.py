"""Ground rules of every type on a wire: camelCase outside, snake_case inside, unknown fields refused."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer
from pydantic.alias_generators import to_camel

# Words that are written in capitals on the wire, where the generated alias would read "taskId".
_CAPITALS = {"task_id": "taskID"}


def wire_name(name: str) -> str:
    """Give the wire name of a field: ``eval_steps`` becomes ``evalSteps``, ``task_id`` becomes ``taskID``."""
    return _CAPITALS.get(name) or to_camel(name)


class WireModel(BaseModel):
    """An immutable value with camelCase names on the wire that refuses fields it does not know."""

    model_config = ConfigDict(
        alias_generator=wire_name,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        use_enum_values=False,
        protected_namespaces=(),
    )

    def to_wire(self) -> dict[str, Any]:
        """Return the JSON-ready form with wire names; fields that are ``None`` are left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


_REMEDIES: dict[str, str] = {}
"""What is said of a text that does not match, by pattern; filled while the types are declared."""


def remedy_for(pattern: str) -> str | None:
    """Return the sentence for texts that do not match a pattern, or None where the types declare none."""
    return _REMEDIES.get(pattern)


def explained(pattern: str, remedy: str) -> str:
    """Return a pattern, and keep the sentence for those whose text does not match it."""
    _REMEDIES[pattern] = remedy
    return pattern


def spelled(pattern: str, remedy: str) -> Any:
    """Constrain a text (in ``Annotated``) to a pattern, with a sentence for those whose text does not match.

    The API server's own message for a pattern is the bare expression, so a CEL rule with the sentence goes
    beside it into the schema. The pattern must mean the same in Python, Rust's regex and RE2, and hold no
    quotes.
    """
    check: dict[str, Any] = {"rule": f"self.matches(r'{pattern}')", "message": remedy}
    return Field(pattern=explained(pattern, remedy), json_schema_extra={"x-kubernetes-validations": [check]})


def _utc(value: datetime) -> datetime:
    if value.tzinfo is None:
        raise ValueError("needs a time zone, for example 2026-01-31T12:00:00Z")
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise ValueError("lies outside of the years 1 to 9999 once it is turned into UTC") from None


def rfc3339(value: datetime) -> str:
    """Format a time as Kubernetes does: UTC, ``Z``, microseconds only where there are any."""
    text = value.astimezone(UTC).isoformat()
    return text.replace("+00:00", "Z")


Time = Annotated[datetime, AfterValidator(_utc), PlainSerializer(rfc3339, return_type=str)]
"""A moment with a time zone, written in RFC 3339 with ``Z``."""
