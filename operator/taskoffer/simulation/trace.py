"""A trace: offers with the moment at which each arrives and what would come of it, as lines of JSON.

The first line is a header, every other line one offer::

    {"trace": {"seed": 0, "load": 1.0, "offers": 1, "gpus": 8, "seconds": 3600.0}}
    {"at": 12.5, "offer": {"metadata": {...}, "spec": {...}}, "patience": 1800, "worth": 1.9,
     "truth": {"factor": 1.1, "fails_after": null}}

Moments are seconds since the start of the trace.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, TextIO

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from taskoffer.api.faults import faults_of
from taskoffer.api.v1alpha1.meta import Name
from taskoffer.api.v1alpha1.taskoffer import TaskOfferSpec
from taskoffer.decision.sizing import parameters_of

Seconds = Annotated[FiniteFloat, Field(ge=0, le=1e11)]
"""At most three thousand years, so that every moment of a trace is a date."""


class TraceError(ValueError):
    """A trace that cannot be used; the message names line and field."""


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Header(_Line):
    """What the first line says of a trace."""

    model_config = ConfigDict(extra="allow")

    seed: int | None = None
    load: FiniteFloat | None = None
    """Offered load, where the trace was generated for one."""
    offers: Annotated[int, Field(ge=0)] | None = None
    """Number of offers that follow, so that a file that was cut off is noticed."""
    gpus: Annotated[int, Field(ge=1)] = 8
    """GPUs that the load refers to."""
    seconds: Seconds | None = None
    """Length of the trace; absent means until the last arrival."""


class Truth(_Line):
    """What no policy sees: how the task really goes."""

    factor: Annotated[FiniteFloat, Field(gt=0, le=1e6)] = 1.0
    """The real duration as a multiple of the predicted one."""
    fails_after: Annotated[FiniteFloat, Field(ge=0, lt=1)] | None = None
    """Share of its duration after which the job fails; absent does not fail."""


class Losses(_Line):
    """Held-out losses of the own result and of the best other one: the lower one wins the task."""

    own: FiniteFloat
    best_other: FiniteFloat


class _Metadata(BaseModel):
    name: Name
    namespace: Name = "default"


class _Manifest(BaseModel):
    """A TaskOffer as kubectl prints it; of its metadata only the name counts, and its status not at all."""

    metadata: _Metadata
    spec: TaskOfferSpec

    @model_validator(mode="after")
    def _check(self) -> _Manifest:
        # Without these nobody knows how long the task really takes.
        if self.spec.dataset.rows is None:
            raise ValueError("spec.dataset.rows is not set: the simulator needs the number of rows")
        if parameters_of(self.spec.model, None) is None:
            raise ValueError("spec.model.parameters is not set, and the model's name does not say it: set it")
        return self


class _OfferLine(_Line):
    at: Seconds
    offer: _Manifest
    patience: Annotated[FiniteFloat, Field(gt=0, le=1e11)] | None = None
    worth: Annotated[FiniteFloat, Field(ge=0)] = 1.0
    truth: Truth = field(default_factory=Truth)
    losses: Losses | None = None


@dataclass(frozen=True, slots=True)
class TraceOffer:
    """One offer of a trace."""

    name: str
    """Name of the TaskOffer, with its namespace in front unless that is ``default``."""
    at: float
    """Seconds after the trace's start at which it arrives."""
    spec: TaskOfferSpec
    patience: float | None = None
    """Seconds after its arrival at which it is gone; None waits for ever, or for the spec's own expiresAt."""
    worth: float = 1.0
    """What it earns when it is done in time."""
    truth: Truth = field(default_factory=Truth)
    losses: Losses | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """Offers in the order of their arrival."""

    header: Header
    offers: tuple[TraceOffer, ...]

    @property
    def seconds(self) -> float:
        """Length: what the header says, but at least until the last arrival."""
        return max(self.header.seconds or 0.0, self.offers[-1].at if self.offers else 0.0)


def read_trace(lines: Iterable[str], source: str) -> Trace:
    """Read a trace.

    Args:
        lines: The file's lines.
        source: What the trace is called in errors.

    Raises:
        TraceError: naming the line and the field that is not as it should be.
    """
    numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    first = next(numbered, None)
    if first is None:
        raise TraceError(f'{source} is empty: a trace begins with a line {{"trace": {{...}}}}')
    header = _header(*first, source)
    offers: list[TraceOffer] = []
    seen: dict[str, int] = {}
    for number, line in numbered:
        made = _offer(number, line, source)
        if made.name in seen:
            raise TraceError(
                f"{source}, line {number}: offer.metadata.name {made.name} was used in line {seen[made.name]} "
                "already: give each offer a name of its own"
            )
        seen[made.name] = number
        offers.append(made)
    if header.offers is not None and header.offers != len(offers):
        raise TraceError(
            f"{source}: trace.offers in line 1 says {header.offers}, but {len(offers)} follow: the file was cut off, "
            "or the number is to be corrected"
        )
    return Trace(header, tuple(sorted(offers, key=lambda one: one.at)))


def write_trace(trace: Trace, file: TextIO) -> None:
    """Write a trace so that ``read_trace`` gives it back."""
    for line in lines_of(trace):
        file.write(line + "\n")


def lines_of(trace: Trace) -> Iterator[str]:
    """Yield a trace's lines without their ends."""
    yield json.dumps({"trace": trace.header.model_dump(exclude_none=True)})
    for offer in trace.offers:
        namespace, _, name = offer.name.rpartition("/")
        line: dict[str, Any] = {
            "at": offer.at,
            "offer": {"metadata": {"name": name, "namespace": namespace or "default"}, "spec": offer.spec.to_wire()},
            "patience": offer.patience,
            "worth": offer.worth,
            "truth": offer.truth.model_dump(),
        }
        if offer.losses is not None:
            line["losses"] = offer.losses.model_dump()
        yield json.dumps(line)


def _object(number: int, line: str, source: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{source}, line {number} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise TraceError(f"{source}, line {number} is no JSON object")
    return value


def _header(number: int, line: str, source: str) -> Header:
    value = _object(number, line, source)
    if set(value) != {"trace"}:
        raise TraceError(f'{source}, line {number}: the first line is to be {{"trace": {{...}}}} and nothing else')
    try:
        return Header.model_validate(value["trace"])
    except ValidationError as error:
        raise _told(error, f"{source}, line {number}", Header, "trace") from None


def _offer(number: int, line: str, source: str) -> TraceOffer:
    value = _object(number, line, source)
    try:
        read = _OfferLine.model_validate(value)
    except ValidationError as error:
        raise _told(error, f"{source}, line {number}", _OfferLine) from None
    metadata = read.offer.metadata
    prefix = "" if metadata.namespace == "default" else f"{metadata.namespace}/"
    return TraceOffer(
        f"{prefix}{metadata.name}", read.at, read.offer.spec, read.patience, read.worth, read.truth, read.losses
    )


def _told(error: ValidationError, where: str, model: type[BaseModel], *prefix: str) -> TraceError:
    faults = faults_of(error, model, prefix=prefix, values=True)
    return TraceError(f"{where}: {faults[0]}" if len(faults) == 1 else "\n  ".join([f"{where}:", *faults]))
