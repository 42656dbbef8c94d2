"""The score of an offer: the weighted sum of a policy's terms, or the expected value for each GPU-hour."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal
from functools import lru_cache

from taskoffer.api.v1alpha1.scoring import TermName
from taskoffer.api.v1alpha1.taskoffer import ExplanationItem
from taskoffer.decision.facts import Facts
from taskoffer.decision.verdict import Score

PLACES = Decimal("0.0001")
"""Scores have four decimal places."""
_HIGHEST = Decimal("99999999.9999")
"""The most that status.score can hold."""


def score_of(facts: Facts) -> Score | None:
    """Return the offer's score and its terms, which sum to it; None when the offer lacks what a term needs."""
    items = _expected_terms(facts) if facts.policy.scoring.expected_value is not None else _weighted_terms(facts)
    if items is None:
        return None
    total = sum((Decimal(item.value) for item in items), Decimal(0))
    cap = facts.policy.scoring.cap
    highest = min(Decimal(cap), _HIGHEST) if cap is not None else _HIGHEST
    if total > highest:
        excess = (highest - total).quantize(PLACES)
        message = f"the policy caps scores at {cap}" if highest < _HIGHEST else f"no score can be above {_HIGHEST}"
        items.append(ExplanationItem(type="Term", name="Cap", value=str(excess), message=message))
        total += excess
    elif total < 0:
        items.append(ExplanationItem(type="Term", name="Floor", value=str(-total), message="no score is below 0"))
        total = Decimal(0)
    return Score(total.quantize(PLACES), tuple(items))


def _weighted_terms(facts: Facts) -> list[ExplanationItem] | None:
    values = _term_values(facts)
    if values is None:
        return None
    items: list[ExplanationItem] = []
    for term in facts.policy.scoring.terms:
        value = values[term.name]
        if term.table:
            value = str(term.at(_input_of(term.name, facts)))
        elif term.value is not None:
            value = term.value
        basis = _success_basis(facts) if term.name is TermName.TASK_SUCCESS_RATE else ""
        items.append(_weighted(term.name, term.weight, value, basis))
    return items


@lru_cache(maxsize=4096)
def _weighted(name: TermName, weight: str, text: str, basis: str) -> ExplanationItem:
    """Return a term of a weighted sum. Numbers come as text: to hash a Decimal takes longer than to read it."""
    value = Decimal(text)
    part = (Decimal(weight) * value).quantize(PLACES, ROUND_HALF_UP)
    return _term(name.value, str(part), f"{weight} x {value.normalize():f}{basis}")


def _expected_terms(facts: Facts) -> list[ExplanationItem] | None:
    scoring, stakes, found = facts.policy.scoring.expected_value, facts.stakes, facts.prediction
    if scoring is None or stakes is None or found is None or found.finish is None:
        return None
    expected = stakes.on(found.finish, facts.known)
    odds = f"{expected.in_time:.2f} in time x {expected.success:.2f} success{_success_basis(facts)}"
    hours = f"{expected.gpu_hours:.3g} GPU-hours"
    return [
        _term("ExpectedGain", str(expected.gain), f"{odds} x value {expected.value:.3g} / {hours}"),
        _term("ExpectedLoss", str(expected.loss), f"-(1 - {expected.probability:.2f}) x {scoring.penalty} / {hours}"),
    ]


def _success_basis(facts: Facts) -> str:
    """Say what a success rate was made of, where outcomes have changed it."""
    if facts.known.judged == 0 or facts.task is None:
        return ""
    return f" (policy {facts.task.success_rate}, {facts.known.successes} of {facts.known.judged} succeeded)"


@lru_cache(maxsize=4096)
def _term(name: str, value: str, message: str) -> ExplanationItem:
    """Return a term of a score. Offers of a queue share most of theirs, and the values are immutable."""
    return ExplanationItem(type="Term", name=name, value=value, message=message)


def _input_of(term: TermName, facts: Facts) -> Decimal:
    """Return what a term's table goes over."""
    if term is TermName.TIME_EFFICIENCY:
        return Decimal(facts.spec.time_limit_seconds) / 3600
    if term is TermName.SIZE_EFFICIENCY:
        return Decimal(facts.parameters or 0) / 10**9
    return Decimal(facts.gpus or 0)


def _term_values(facts: Facts) -> dict[TermName, str] | None:
    """Return the values of the terms as text, or None when the offer lacks what one needs."""
    family_rate = facts.family.success_rate if facts.family else facts.policy.filters.unknown_family
    if facts.task is None or facts.size is None or family_rate is None:
        return None
    longest = facts.policy.filters.max_time_limit_seconds
    return {
        TermName.TASK_WEIGHT: facts.task.weight,
        TermName.MODEL_PERFORMANCE: family_rate,
        TermName.TASK_SUCCESS_RATE: str(facts.learned.success_rate(facts.known, Decimal(facts.task.success_rate))),
        TermName.TIME_EFFICIENCY: _time_efficiency(facts.spec.time_limit_seconds, longest),
        TermName.SIZE_EFFICIENCY: facts.size.size_efficiency,
        TermName.BONUS: "1",
        TermName.ACCURACY_BONUS: "1",
    }


@lru_cache(maxsize=4096)
def _time_efficiency(seconds: int, longest: int | None) -> str:
    if longest is None:
        return "1"
    return str(max(Decimal(0), 1 - Decimal(seconds) / longest).quantize(PLACES))
