"""What the operator answers when it is asked: why an offer stands as it does, and who waits for what.

These are the bodies of ``GET /v1/offers/{namespace}/{name}`` and ``GET /v1/queue``. They are computed at the moment of
asking and stored nowhere.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from taskoffer.api.base import Time, WireModel
from taskoffer.api.v1alpha1.taskoffer import Admission, ExplanationItem

LISTED = 50
"""Offers that a question about the queue lists unless it says otherwise."""
MOST_LISTED = 1000


class Term(WireModel):
    """A part of a score; all parts sum to it."""

    name: str = Field(description="The term.")
    points: str = Field(description="What it adds to the score, as a decimal string.")
    how: str = Field("", description="How that comes about: weight x value, or the expectation.")


class Cause(WireModel):
    """Something that stands against an offer."""

    reason: str = Field(description="The reason, one of the list of reasons.")
    message: str = Field(description="The numbers.")
    remedy: str = Field("", description="What would remove this one cause; other causes may remain.")


class Counterfactual(WireModel):
    """A change with which the answer would be another one, confirmed by deciding again with the change made."""

    change: str = Field(description="The change, in words.")
    spec: dict[str, Any] = Field(
        default_factory=dict, description="The change as a merge patch of the offer's spec; empty changes nothing."
    )
    replaces: bool = Field(
        False,
        description="Whether it takes a new offer in place of this one: a refusal is final, and most of a spec never "
        "changes.",
    )
    after: tuple[str, ...] = Field((), description="Running offers (namespace/name) whose GPUs have to come free.")
    at: Time | None = Field(None, description="When the last of them is predicted to end.")
    verdict: Literal["Admit", "Wait"] = Field(description="Admit: admitted now. Wait: accepted, and then it waits.")
    reason: str = Field(description="The reason that comes with the verdict.")
    message: str = Field(description="The message that comes with the verdict.")


class Start(WireModel):
    """When a waiting offer is predicted to be admitted. Offers that are yet to come are in none of the times."""

    expected: Time = Field(description="If running jobs take as long as predicted.")
    earliest: Time = Field(description="The earliest of the three runs: shorter by the spread, as predicted, longer.")
    latest: Time | None = Field(None, description="The latest of the three runs; absent when not all of them place it.")


class Queued(WireModel):
    """An offer that waits."""

    namespace: str = Field(description="Its namespace.")
    name: str = Field(description="Its name.")
    position: int | None = Field(
        None, description="Place in the order of admission, from 1, over all policies; absent while it is in no order."
    )
    policy: str | None = Field(None, description="The CapacityPolicy that decides it.")
    reason: str = Field(description="What it waits for.")
    gpus: int | None = Field(None, description="GPUs that it needs on one node.")
    score: str | None = Field(None, description="Its score.")
    since: Time = Field(description="When it was created.")
    start: Start | None = Field(None, description="When it is predicted to be admitted.")
    outlook: str = Field("", description="Why there is no predicted start.")


class QueueAnswer(WireModel):
    """Who waits, in the order of admission."""

    leading: bool = Field(description="Whether the replica that answers is the one that decides.")
    now: Time = Field(description="When this was computed.")
    waiting: int = Field(description="Offers that wait, over all policies and namespaces.")
    matching: int = Field(description="Those of them that the query asks for.")
    estimated: int = Field(description="Starts are estimated for so many offers from the first on.")
    notes: tuple[str, ...] = Field((), description="What the estimates do not know.")
    offers: tuple[Queued, ...] = Field((), description="The first of those that match.")


class Explained(WireModel):
    """Why an offer stands as it does."""

    namespace: str = Field(description="Its namespace.")
    name: str = Field(description="Its name.")
    state: Literal["Pending", "Admitted", "Finished"] = Field(description="Where the offer stands.")
    verdict: Literal["Admit", "Wait", "Reject"] = Field(
        description="The answer; for a refused offer the one that it would get if it were offered again now."
    )
    reason: str = Field(description="The reason of that answer.")
    message: str = Field(description="Its numbers.")
    stored_reason: str | None = Field(
        None, description="The reason in the object's status, where it is another one, and of a refused offer."
    )
    stored_message: str | None = Field(None, description="The message with which a refused offer was refused.")
    accepted: bool | None = Field(
        None, description="Whether the offer passes all filters; absent where no policy has looked at it."
    )
    policy: str | None = Field(None, description="The CapacityPolicy that decides it.")
    size_class: str | None = Field(None, description="Its size class.")
    lane: str | None = Field(None, description="Its lane.")
    gpus: int | None = Field(None, description="GPUs that it needs, or holds.")
    score: str | None = Field(None, description="Its score: the sum of the terms.")
    terms: tuple[Term, ...] = Field((), description="The parts of the score.")
    estimates: tuple[ExplanationItem, ...] = Field((), description="Predicted memory and time, and what was clamped.")
    refusals: tuple[Cause, ...] = Field((), description="All filters that the offer fails.")
    binding: Cause | None = Field(None, description="What decides the answer.")
    counterfactuals: tuple[Counterfactual, ...] = Field(
        (), description="What would change the answer, each confirmed by deciding again."
    )
    queued: Queued | None = Field(None, description="Its place in the queue, while it waits.")
    admission: Admission | None = Field(None, description="Its booking, while it is admitted.")
    ends: Time | None = Field(None, description="When its GPUs are predicted to come free.")


class Unanswered(WireModel):
    """The body of every answer whose status is 400 or more; the probes alone stay plain text."""

    error: str = Field(description="What is wrong, and what helps.")


class OfferAnswer(WireModel):
    """The answer to a question about one offer."""

    leading: bool = Field(description="Whether the replica that answers is the one that decides.")
    now: Time = Field(description="When this was computed.")
    offer: Explained = Field(description="The offer.")
