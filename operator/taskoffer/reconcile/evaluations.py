"""Evaluations of offers, kept with them for as long as what they rest on stays as it is."""

from __future__ import annotations

from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec
from taskoffer.decision.evaluate import Evaluation, evaluate
from taskoffer.decision.outcomes import Learned
from taskoffer.decision.snapshot import PolicyView
from taskoffer.reconcile.views import KeptEvaluation, OfferEntry


def evaluation_of(entry: OfferEntry, policy: PolicyView, spec: CapacityPolicySpec, learned: Learned) -> Evaluation:
    """Return an offer's evaluation under a policy; made once for each generation of both and what was learned."""
    kept = entry.evaluation
    if kept is None or not kept.holds(policy, learned):
        offered = entry.fresh_spec or entry.read_spec()[0]
        assert offered is not None  # noqa: S101 - its terms were read
        made = evaluate(offered, spec, entry.key.namespace, learned)
        kept = entry.evaluation = KeptEvaluation(policy.uid, policy.generation, learned.version(made.group), made)
    entry.fresh_spec = None
    return kept.made
