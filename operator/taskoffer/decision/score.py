"""The score of an offer: the weighted sum of a policy's terms, or the expected value for each GPU-hour."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal
from functools import lru_cache
from typing import NamedTuple

from taskoffer.api.v1alpha1.profiles import TaskTypeRule
from taskoffer.api.v1alpha1.scoring import TermName
from taskoffer.api.v1alpha1.taskoffer import ExplanationItem
from taskoffer.decision.facts import Facts
from taskoffer.decision.verdict import Score

PLACES = Decimal("0.0001")
"""Scores have four decimal places."""
_MOST = Decimal("99999999.9999")
"""The most that status.score can hold."""
_NOTHING = Decimal(0)


class _Part(NamedTuple):
    """A term and what it adds to the score: to read that from the term's text takes longer than to keep it."""

    item: ExplanationItem
    value: Decimal


def score_of(facts: Facts) -> Score | None:
    """Return the offer's score and its terms, which sum to it; None when the offer lacks what a term needs."""
    parts = _expected_terms(facts) if facts.policy.scoring.expected_value is not None else _weighted_terms(facts)
    if parts is None:
        return None
    total = sum([part.value for part in parts], _NOTHING)
    highest = _highest(facts.policy.scoring.cap)
    terms = tuple([part.item for part in parts])
    if total > highest:
        excess = (highest - total).quantize(PLACES)
        cap = facts.policy.scoring.cap
        message = f"the policy caps scores at {cap}" if highest < _MOST else f"no score can be above {_MOST}"
        terms = (*terms, ExplanationItem(type="Term", name="Cap", value=str(excess), message=message))
        total += excess
    elif total < 0:
        terms = (*terms, ExplanationItem(type="Term", name="Floor", value=str(-total), message="no score is below 0"))
        total = _NOTHING
    return Score(total.quantize(PLACES), terms)


@lru_cache(maxsize=64)
def _highest(cap: str | None) -> Decimal:
    return min(Decimal(cap), _MOST) if cap is not None else _MOST


def _weighted_terms(facts: Facts) -> list[_Part] | None:
    family_rate = facts.family.success_rate if facts.family else facts.policy.filters.unknown_family
    if facts.task is None or facts.size is None or family_rate is None:
        return None
    parts: list[_Part] = []
    for term in facts.policy.scoring.terms:
        name, basis = term.name, ""
        if term.table:
            value = str(term.at(_input_of(name, facts)))
        elif name is TermName.TASK_WEIGHT:
            value = facts.task.weight
        elif name is TermName.MODEL_PERFORMANCE:
            value = family_rate
        elif name is TermName.TASK_SUCCESS_RATE:
            value, basis = _success_rate(facts, facts.task), _success_basis(facts)
        elif name is TermName.TIME_EFFICIENCY:
            value = _time_efficiency(facts.spec.time_limit_seconds, facts.policy.filters.max_time_limit_seconds)
        elif name is TermName.SIZE_EFFICIENCY:
            value = facts.size.size_efficiency
        else:
            value = term.value if term.value is not None else "1"
        parts.append(_weighted(name, term.weight, value, basis))
    return parts


@lru_cache(maxsize=4096)
def _weighted(name: TermName, weight: str, text: str, basis: str) -> _Part:
    """Return a term of a weighted sum. Numbers come as text: to hash a Decimal takes longer than to read it.

    Offers of a queue share most of their terms, and the values are immutable.
    """
    value = Decimal(text)
    part = (Decimal(weight) * value).quantize(PLACES, ROUND_HALF_UP)
    return _term(name.value, part, f"{weight} x {value.normalize():f}{basis}")


def _term(name: str, value: Decimal, message: str) -> _Part:
    return _Part(ExplanationItem(type="Term", name=name, value=str(value), message=message), value)


def _expected_terms(facts: Facts) -> list[_Part] | None:
    scoring, stakes, found = facts.policy.scoring.expected_value, facts.stakes, facts.prediction
    if scoring is None or stakes is None or found is None or found.finish is None:
        return None
    expected = stakes.on(found.finish, facts.known)
    odds = f"{expected.in_time:.2f} in time x {expected.success:.2f} success{_success_basis(facts)}"
    hours = f"{expected.gpu_hours:.3g} GPU-hours"
    return [
        _term("ExpectedGain", expected.gain, f"{odds} x value {expected.value:.3g} / {hours}"),
        _term("ExpectedLoss", expected.loss, f"-(1 - {expected.probability:.2f}) x {scoring.penalty} / {hours}"),
    ]


def _success_basis(facts: Facts) -> str:
    """Say what a success rate was made of, where outcomes have changed it."""
    if facts.known.judged == 0 or facts.task is None:
        return ""
    return f" (policy {facts.task.success_rate}, {facts.known.successes} of {facts.known.judged} succeeded)"


def _input_of(term: TermName, facts: Facts) -> Decimal:
    """Return what a term's table goes over."""
    if term is TermName.TIME_EFFICIENCY:
        return Decimal(facts.spec.time_limit_seconds) / 3600
    if term is TermName.SIZE_EFFICIENCY:
        return Decimal(facts.parameters or 0) / 10**9
    return Decimal(facts.gpus or 0)


def _success_rate(facts: Facts, task: TaskTypeRule) -> str:
    """Return the success rate of the offer's kind of task, as text."""
    if facts.known.judged == 0:
        return task.success_rate
    return str(facts.learned.success_rate(facts.known, Decimal(task.success_rate)))


@lru_cache(maxsize=16_384)
def _time_efficiency(seconds: int, longest: int | None) -> str:
    if longest is None:
        return "1"
    return str(max(Decimal(0), 1 - Decimal(seconds) / longest).quantize(PLACES))
