"""The three answers to an offer, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from typing import Any, NamedTuple

from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.taskoffer import Admission, ExplanationItem


class Verdict(StrEnum):
    """Admit: GPUs are booked. Wait: cannot now. Reject: can never."""

    ADMIT = "Admit"
    WAIT = "Wait"
    REJECT = "Reject"


class Remedy(NamedTuple):
    """Something with which one filter passes; whether the offer is accepted then takes another look at it."""

    says: str
    """In words that follow "accepted"."""
    change: Mapping[str, Any] | None = None
    """Fields of the spec that say it, where they are known."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """One cause why an offer is not taken: the reason, the numbers, and what would have changed the answer."""

    reason: Reason
    message: str
    counterfactual: str = ""
    remedies: tuple[Remedy, ...] = ()
    """What ``remedies.told`` makes the counterfactual of, where a filter has not said it itself."""


@dataclass(frozen=True, slots=True)
class Score:
    """A score and its terms; the terms' values sum to ``total``."""

    total: Decimal
    terms: tuple[ExplanationItem, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """A verdict with everything that the offer's status says about it."""

    verdict: Verdict
    reason: Reason
    message: str
    score: Decimal | None = None
    explanation: tuple[ExplanationItem, ...] = ()
    admission: Admission | None = None
