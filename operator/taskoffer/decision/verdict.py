"""The three answers to an offer, as values."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum

from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.taskoffer import Admission, ExplanationItem


class Verdict(StrEnum):
    """Admit: GPUs are booked. Wait: cannot now. Reject: can never."""

    ADMIT = "Admit"
    WAIT = "Wait"
    REJECT = "Reject"


@dataclass(frozen=True, slots=True)
class Refusal:
    """One cause why an offer is not taken: the reason, the numbers, and what would have changed the answer."""

    reason: Reason
    message: str
    counterfactual: str = ""


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
