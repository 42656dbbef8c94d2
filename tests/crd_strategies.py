"""Hypothesis strategies for stored objects: such as our schemas allow, and such as no schema would allow.

``fitting`` makes values of a structural schema, CEL rules aside. ``spoiled`` makes what an older or a newer version,
or somebody's hand, would leave behind: a good value with a few places turned into something else. Values that a draw
would make slowly (long texts, deep nests) and values that are known to hurt come from lists.
"""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st

from crd_schema import Schema, key_of, schema_of

Draw = st.DrawFn
Strategy = st.SearchStrategy[Any]

TIMES = (
    "2026-01-31T12:00:00Z",
    "2026-01-31T12:30:00+02:00",
    "2026-01-31T12:00:00.123456Z",
    "1970-01-01T00:00:00Z",
    "0001-01-01T00:00:00Z",
    "9999-12-31T23:59:59Z",
    # Outside of what a datetime can hold once it is turned into UTC.
    "0001-01-01T00:00:00+14:00",
    "9999-12-31T23:59:59-12:00",
)
NODES = ("fuzz-1", "fuzz-2", "no-such-node")
"""Nodes that drawn objects may be placed on. Healthy offers use others."""
RESOURCE = "nvidia.com/gpu"

BY_PATTERN: dict[str, tuple[str, ...]] = {
    r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$": (*NODES, "a", "lab", "fuzz", "a.b-c", "0", "n" * 253),
    r"^[A-Za-z0-9][A-Za-z0-9._:-]*$": ("task", "T.1_2:3-4", "0", "t" * 128),
    r"^[^/].*$|^$": ("", "models/x", "a b", "ü/ñ", "../up", "p" * 1024),
    r"^\d+(\.\d+)?$": ("0", "0.5", "1", "99999999"),
    r"^\d{1,8}(\.\d{1,6})?$": ("0", "0.5", "1", "0.35", "2.5", "99999999", "99999999.999999"),
    r"^\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$": ("0", "1", "500m", "1.5Gi", "110Gi", "9" * 32),
    r"^[a-z0-9][a-z0-9._-]*$": ("llama", "qwen", "a0", "x.y_z-1"),
    r"^[0-9a-f]{64}$": ("0" * 64, "ab" * 32),
    r"^[0-9a-f]{40}$": ("0" * 40, "ab" * 20),
    r"^(https|http|s3)://.+": ("https://x.invalid/a", "s3://bucket/key", "http://ü"),
    r"^https?://.+": ("https://x.invalid/a", "https://x.invalid/%2e%2e/a?b#c", "http://ü"),
    r"^https?://[A-Za-z0-9.-]+(:[0-9]+)?(/[A-Za-z0-9._~-]+)*/?$": ("https://x.invalid/team/", "http://x.invalid:99999"),
    r"^([A-Za-z0-9_][A-Za-z0-9_.-]*/)*[A-Za-z0-9_][A-Za-z0-9_.-]*[.]py$": ("train.py", "a/b.c/_.py"),
    r"^[^/.][^.]*$": ("sub", "a/b", "ü"),
    r"^s3://[^/]+/.+/$": ("s3://bucket/folder/", "s3://B/ü/", "s3://b//"),
    r"^https?://[^/ ].*$": ("https://hub.invalid", "http://x y"),
    r"^[-._a-zA-Z0-9]+$": ("token", "a.b_c-d", "-"),
    r"^[a-z0-9-]+$": ("us-east-1", "auto", "-"),
}
"""Texts for each pattern that our schemas have, by the pattern."""
_BY_NAME: dict[str, tuple[str, ...]] = {
    "reason": ("Admitted", "WaitingForCapacity", "Rejected", "Expired", "SomethingElse"),
    "jobName": ("fuzz-0-fuzz-0-u", "fuzz-1", "x"),
    "resourceName": (RESOURCE,),
}
_CONDITIONS = ("Admitted", "Evicted", "Finished", "Running", "Complete", "Failed", "Ready", "Linted")
_TEXTS = ("", "x", "meta-llama/Llama-3.1-8B", "ünïcødé ☃ \u202e", "NaN", "8x7B", "9" * 63 + "b", " ")


def _nested(depth: int, kind: type) -> Any:
    made: Any = kind()
    for _ in range(depth):
        made = [made] if kind is list else {"a": made}
    return made


GARBAGE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 7, 2**31, 2**63 - 1, -(2**63), 10**30, 0.5, -0.5, 1e308, 5e-324),
    *("", " ", "x", "0", "-1", "1e9", "NaN", "Infinity", "-Infinity", "null", "True", "ünïcødé ☃ \u202e", "٣.٥", "²"),
    *("yesterday", "2026-02-30T25:61:00Z", "2026-01-31T12:00:00", "2026-01-31", *TIMES[-3:]),
    *("x" * 100_000, "☃" * 33_000, "9" * 5_000, "a\nb\tc", "nul\x00", "{}", "../../etc", "$(reboot)"),
    *([], {}, [None], [[]], [{}], [17, "x", {"type": 4}], {"a": 1}, {"type": {"a": 1}}, {"": ""}, [{"type": []}]),
    *(_nested(150, list), _nested(150, dict), ["x"] * 2_000, {f"k{n}": n for n in range(500)}),
)
"""What stands where something else was expected."""
_GARBAGE = st.sampled_from(GARBAGE).map(copy.deepcopy)


_KNOWN: dict[tuple[int, str], Strategy] = {}


def fitting(schema: Schema, name: str = "") -> Strategy:
    """Return values that a structural schema allows; ``name`` is the field that they are for."""
    # Schemas are kept for ever, and hypothesis is quicker with a strategy that it knows.
    if (id(schema), name) not in _KNOWN:
        _KNOWN[id(schema), name] = _fitting(schema, name)
    return _KNOWN[id(schema), name]


def _fitting(schema: Schema, name: str) -> Strategy:
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    match schema.get("type"):
        case "object":
            return _objects(schema)
        case "array":
            return _lists(schema, name)
        case "string":
            return _texts(schema, name)
        case "boolean":
            return st.booleans()
        case "integer":
            low, high = schema.get("minimum", -(2**63)), schema.get("maximum", 2**63 - 1)
            some = [n for n in (low, low + 1, 1, 2, 4, 8, 100, 3600, 10**9, high) if low <= n <= high]
            return st.sampled_from(some) | st.integers(low, high)
        case "number":
            return st.floats(
                schema.get("minimum"),
                schema.get("maximum"),
                exclude_min=schema.get("exclusiveMinimum", False),
                exclude_max=schema.get("exclusiveMaximum", False),
                allow_nan=False,
                allow_infinity=False,
            )
    raise AssertionError(f"{name}: no strategy for {schema}")


def _texts(schema: Schema, name: str) -> Strategy:
    if schema.get("format") == "date-time":
        return st.sampled_from(TIMES)
    some = BY_PATTERN[schema["pattern"]] if "pattern" in schema else _TEXTS
    some = (*_BY_NAME.get(name, ()), *(("v" * schema["maxLength"],) if "pattern" not in schema else ()), *some)
    low, high = schema.get("minLength", 0), schema.get("maxLength", 10**6)
    known = st.sampled_from([text for text in some if low <= len(text) <= high])
    return known if "pattern" in schema else known | st.text(min_size=low, max_size=min(high, 8))


def _lists(schema: Schema, name: str) -> Strategy:
    low, high = schema.get("minItems", 0), schema.get("maxItems", 8)
    items = fitting(schema["items"])
    if name == "conditions":
        kinds = st.sampled_from(_CONDITIONS) | st.text("ABCxyz", min_size=1, max_size=6)
        items = st.tuples(items, kinds).map(lambda pair: pair[0] | {"type": pair[1]})
    if schema.get("x-kubernetes-list-type", "atomic") == "atomic":
        return st.lists(items, min_size=low, max_size=min(high, low + 2))
    # A full list is no rarity where something is to be added to it.
    most = high if name == "conditions" else min(high, low + 2)
    return st.lists(items, min_size=low, max_size=most, unique_by=lambda item: repr(key_of(schema, item)))


def _objects(schema: Schema) -> Strategy:
    properties, required = schema.get("properties") or {}, schema.get("required") or ()
    if not properties:
        return st.dictionaries(st.sampled_from(("a", "b/c", "zone")), st.sampled_from(("", "x", "y")), max_size=2)
    made = {name: fitting(part, name) for name, part in properties.items()}
    return st.fixed_dictionaries(
        {name: made[name] for name in required},
        optional={name: part for name, part in made.items() if name not in required},
    )


@st.composite
def regrown(draw: Draw, base: Any, schema: Schema) -> Any:
    """Return a good value in which a few fields were drawn anew, each as the schema allows."""
    made = copy.deepcopy(base)
    for _ in range(draw(st.integers(1, 4))):
        holder, part = made, schema
        while True:
            name = draw(st.sampled_from(sorted(part["properties"])))
            inner = part["properties"][name]
            if isinstance(holder.get(name), dict) and inner.get("properties") and draw(st.booleans()):
                holder, part = holder[name], inner
                continue
            holder[name] = draw(fitting(inner, name))
            break
    return made


@st.composite
def spoiled(draw: Draw, values: Strategy) -> Any:
    """Return a value of another strategy with one to four places turned into something else."""
    box = {"value": copy.deepcopy(draw(values))}
    for _ in range(draw(st.integers(1, 4))):
        places = list(_places(box))
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        _spoil(draw, holder, key)
    return box["value"]


def _places(holder: Any) -> Any:
    for key, value in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
        yield holder, key
        # Nothing is gained by a change deep inside of what is garbage already.
        if isinstance(value, dict | list) and 0 < len(value) < 60:
            yield from _places(value)


_WAYS = ("replace", "replace", "replace", "remove", "extend", "repeat", "distort")


def _spoil(draw: Draw, holder: Any, key: Any) -> None:
    value = holder[key]
    match draw(st.sampled_from(_WAYS)):
        case "remove" if isinstance(holder, list) or key != "value":
            del holder[key]
        case "extend" if isinstance(value, dict):
            value[draw(st.sampled_from(("unknownField", "", "x" * 300, "ü")))] = draw(_GARBAGE)
        case "extend" if isinstance(value, list):
            value.append(draw(_GARBAGE))
        case "repeat" if isinstance(value, list):
            value.extend(copy.deepcopy(value) * draw(st.sampled_from((1, 2, 20))))
        case "distort" if isinstance(value, str):
            holder[key] = draw(st.sampled_from((value + "X", value.swapcase(), value * 40, f" {value}\n")))
        case "distort" if isinstance(value, int | float):
            holder[key] = draw(st.sampled_from((-value, str(value), value * 1000, value + 0.5)))
        case _:
            holder[key] = draw(_GARBAGE)


def parts(kind: str, base: Any) -> Strategy:
    """Return ``(spec, status)`` of stored objects of a kind; one that is None is absent.

    Args:
        kind: One of our kinds.
        base: A good object of the kind, to start from.
    """
    made = {}
    for part in ("spec", "status"):
        schema = schema_of(kind)["properties"][part]
        good = st.just(base.get(part, {})) | regrown(base.get(part, {}), schema) | fitting(schema)
        absent = [st.none()] if part == "status" else []
        made[part] = st.one_of(*absent, good, spoiled(good), spoiled(good))
    return st.tuples(made["spec"], made["status"])
