"""Whether the step that hands results over has the time and the memory for what it verifies itself.

That is what another's trainer has left, and the best adapter so far of a training of ours that ends without a result.
What our trainer has verified needs neither.
"""

from __future__ import annotations

from collections.abc import Iterator

from taskoffer.api.quantity import whole
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec, LintFinding
from taskoffer.decision.lint_profiles import finding
from taskoffer.decision.sizing import billions

_BYTES_PER_PARAMETER = 2
"""A base model in half precision, which is the least that a result is tried on."""


def lint_hand_over(spec: CapacityPolicySpec) -> Iterator[LintFinding]:
    """Yield what keeps the submit step from verifying a result; every offer may ask for one to be handed over."""
    steps = spec.steps
    if steps is None:
        return
    if steps.submit_seconds == 0:
        yield finding("steps.submitSeconds", _no_time(others=spec.trainers is not None))
    room = whole(steps.memory)
    if not room:
        return  # No limit is stated, or none in whole units.
    for size in sorted(spec.size_classes, key=lambda size: size.min_parameters):
        least = size.min_parameters * _BYTES_PER_PARAMETER
        if least > room:
            which = f"sizeClasses[{size.name}], from {billions(size.min_parameters)} parameters ({least / 1e9:.3g} GB)"
            why = _no_memory(others=spec.trainers is not None)
            yield finding("steps.memory", f"{steps.memory} holds no model of {which}: {why}")
            return


def _no_time(*, others: bool) -> str:
    """Say what comes of a submit step that no time is kept for."""
    if others:
        return (
            "0 leaves no time to verify what another's trainer has left: one that is stopped when its time is over has "
            "missed its deadline; set it"
        )
    return (
        "0 leaves no time to hand over the best adapter so far: a training that is stopped when its time is over has "
        "missed its deadline; set it"
    )


def _no_memory(*, others: bool) -> str:
    """Say what the submit step needs its memory for."""
    if others:
        return "a result of another's trainer is tried on its base model there"
    return (
        "the best adapter so far, which is handed over when time or attempts run out, is tried on its base model "
        "there; give it more"
    )
