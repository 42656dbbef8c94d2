"""Builders of small traces whose outcome can be worked out by hand.

    entry("a", at=0, gpus=4, seconds=1000)

is an offer that really takes 1000 seconds on 4 GPUs under ``POLICY``: the lab preset, which predicts nothing and
refuses little, so that a test names all that matters.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from core_builders import ONE_GPU, policy_spec, spec_of
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec
from taskoffer.simulation.engine import Fleet, Result, simulate
from taskoffer.simulation.trace import Header, Losses, Trace, TraceOffer, Truth
from taskoffer.simulation.truth import duration_of, settings_under

POLICY = policy_spec()


def entry(
    name: str,
    *,
    at: float = 0.0,
    seconds: float = 1000.0,
    gpus: int = 1,
    patience: float | None = None,
    worth: float = 1.0,
    fails_after: float | None = None,
    losses: tuple[float, float] | None = None,
    policy: CapacityPolicySpec = POLICY,
    **fields: Any,
) -> TraceOffer:
    """Return an offer that really takes so many seconds on its GPUs; further keywords are those of ``make_offer``."""
    spec = spec_of(**{"name": name, "parameters": ONE_GPU, "rows": 1000, "gpus": gpus, **fields})
    plain = TraceOffer(name, at, spec)
    factor = seconds / duration_of(plain, settings_under(policy, spec, gpus), gpus)
    return replace(
        plain,
        patience=patience,
        worth=worth,
        truth=Truth(factor=factor, fails_after=fails_after),
        losses=Losses(own=losses[0], best_other=losses[1]) if losses else None,
    )


def trace_of(*offers: TraceOffer, seconds: float | None = None) -> Trace:
    """Return a trace of these offers."""
    return Trace(Header(seconds=seconds), tuple(sorted(offers, key=lambda one: one.at)))


def run_of(*offers: TraceOffer, nodes: int = 1, gpus: int = 4, policy: CapacityPolicySpec = POLICY) -> Result:
    """Run a trace of these offers on nodes with so many GPUs."""
    return simulate(trace_of(*offers), policy, fleet=Fleet(nodes, gpus))


def timeline(result: Result) -> dict[str, tuple[float, float, str]]:
    """Return start, end and outcome of every accepted offer, in whole seconds."""
    return {run.name: (round(run.start), round(run.end), run.outcome) for run in result.runs}


def refusals(result: Result) -> dict[str, str]:
    """Return the reasons of all refusals."""
    return {name: reason.value for name, reason in result.refusals.items()}
