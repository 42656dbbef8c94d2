"""Why one offer stands as it does, and what would change that: every change is tried by deciding again.

A counterfactual that the next decision does not confirm is not told.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from taskoffer.api.base import rfc3339
from taskoffer.api.inquiry import Cause, Counterfactual, Explained, Queued, Term
from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.taskoffer import Admission, ExplanationItem, TaskOfferSpec
from taskoffer.decision.changes import Case, Change, changes_for, patched
from taskoffer.decision.conditions import condition_of
from taskoffer.decision.evaluate import Evaluation
from taskoffer.decision.ledger import Release
from taskoffer.decision.outcomes import NOTHING
from taskoffer.decision.queue import place_of
from taskoffer.decision.rerun import Rerun, Verified
from taskoffer.decision.room import CAPACITY_REASONS
from taskoffer.decision.snapshot import OfferView, PolicyView, Snapshot, end_of
from taskoffer.decision.timeline import end_expected
from taskoffer.decision.verdict import Answer, Verdict

MOST_ENDS = 16
"""Ends of jobs that are tried, the soonest first."""
MOST_TOLD = 8
_STEPS_OF_A_COMBINATION = 8


def explain(snapshot: Snapshot, offer: OfferView) -> Explained:
    """Explain a pending offer, or one that is looked at as if it were pending.

    Args:
        snapshot: What a cycle would decide on, with or without the offer.
        offer: The offer with its full spec, or with None and what is wrong with it.
    """
    spec = offer.full_spec
    again = Rerun.of(snapshot, offer)
    now = again.decide(spec)
    assert now is not None  # noqa: S101 - the first run
    answer, evaluation = now.answer, now.evaluation
    told = _Search(again, spec, now).run() if spec is not None and answer.verdict is not Verdict.ADMIT else ()
    admission = answer.admission
    return Explained(
        namespace=offer.key.namespace,
        name=offer.key.name,
        state="Pending",
        verdict=answer.verdict.value,
        reason=answer.reason.value,
        message=answer.message,
        stored_reason=offer.reason if offer.reason != answer.reason.value else None,
        accepted=_accepted(now),
        policy=now.policy.name if now.policy is not None else None,
        size_class=evaluation.size_class or None if evaluation is not None else None,
        lane=evaluation.lane if evaluation is not None else None,
        gpus=admission.assignments[0].count if admission is not None else _gpus(evaluation),
        **_scored(evaluation),
        refusals=_refusals(evaluation),
        binding=_binding(answer) if answer.verdict is not Verdict.ADMIT else None,
        counterfactuals=told,
        queued=_place(again, now, evaluation) if answer.verdict is Verdict.WAIT else None,
    )


def explain_admitted(
    offer: OfferView, evaluation: Evaluation | None, admission: Admission, ends: datetime
) -> Explained:
    """Explain an admitted offer: its booking, its score under the policy as it is now, and when it is to end."""
    condition = condition_of(offer.conditions, "Admitted")
    written = condition is not None and condition.reason == Reason.ADMITTED
    return Explained(
        namespace=offer.key.namespace,
        name=offer.key.name,
        state="Admitted",
        verdict="Admit",
        reason=Reason.ADMITTED.value,
        message=condition.message if condition is not None and written else "the admission is being written",
        accepted=True,
        policy=admission.policy_ref.name,
        size_class=evaluation.size_class or None if evaluation is not None else None,
        lane=admission.assignments[0].lane,
        gpus=sum(part.count for part in admission.assignments),
        **_scored(evaluation),
        admission=admission,
        ends=ends.replace(microsecond=0),
    )


def explain_finished(offer: OfferView, again: Explained | None) -> Explained:
    """Explain a finished offer: how it ended, and for a refused one what it would be answered if offered again."""
    named = "Finished" if again is None else "Admitted"
    condition = condition_of(offer.conditions, named)
    reason = condition.reason if condition is not None else Reason.INVALID_OFFER.value
    message = condition.message if condition is not None else f"the stored conditions have none of the type {named}"
    if again is not None:
        return again.model_copy(update={"state": "Finished", "stored_reason": reason, "stored_message": message})
    return Explained(
        namespace=offer.key.namespace,
        name=offer.key.name,
        state="Finished",
        verdict="Admit",
        reason=reason,
        message=message,
        accepted=True,
    )


def _accepted(found: Verified) -> bool | None:
    """Tell whether the offer passes all filters, or None where none has looked at it."""
    if found.evaluation is None:
        return None
    return found.answer.verdict is not Verdict.REJECT or found.answer.reason is Reason.CAPACITY_FULL


def _gpus(evaluation: Evaluation | None) -> int | None:
    return evaluation.gpus or None if evaluation is not None else None


def _scored(evaluation: Evaluation | None) -> dict[str, str | tuple[Term, ...] | tuple[ExplanationItem, ...] | None]:
    """Return score, terms and estimates."""
    if evaluation is None:
        return {}
    score = evaluation.score
    terms = tuple(Term(name=t.name, points=t.value, how=t.message) for t in score.terms) if score is not None else ()
    total = str(score.total) if score is not None else None
    return {"score": total, "terms": terms, "estimates": evaluation.estimates}


def _refusals(evaluation: Evaluation | None) -> tuple[Cause, ...]:
    refusals = evaluation.refusals if evaluation is not None else ()
    return tuple(Cause(reason=r.reason.value, message=r.message, remedy=r.counterfactual) for r in refusals)


def _binding(answer: Answer) -> Cause:
    """Return what decides an answer, with the remedy that it carries."""
    items = (item.message for item in answer.explanation if item.type == "Counterfactual")
    return Cause(reason=answer.reason.value, message=answer.message, remedy=next(items, ""))


def _place(again: Rerun, now: Verified, evaluation: Evaluation | None) -> Queued | None:
    """Return the offer's place in the queue: the snapshot with the offer in it, undecided."""
    evaluations = dict(again.snapshot.evaluations)
    if now.policy is not None and evaluation is not None:
        evaluations[again.offer.uid, now.policy.name] = evaluation
    offers = [*again.snapshot.offers, again.offer]
    return place_of(replace(again.snapshot, offers=offers, evaluations=evaluations), again.offer.uid)


@dataclass(slots=True)
class _Search:
    """Looks for changes that turn an answer around, and tells those that a run confirms."""

    again: Rerun
    spec: TaskOfferSpec
    now: Verified

    def run(self) -> tuple[Counterfactual, ...]:
        """Return what was confirmed: changes of the offer, then another policy, then ends of jobs."""
        found = [told for change in self._changes() if (told := self._confirmed(change)) is not None]
        if not found and self.now.answer.verdict is Verdict.REJECT:
            combined = self._combined()
            found += [told] if combined is not None and (told := self._confirmed(combined)) is not None else []
        found += [told for change in self._policies() if (told := self._confirmed(change)) is not None]
        ends = self._ends()
        if ends is not None:
            found.insert(0, ends)
        found.sort(key=lambda told: told.verdict != "Admit")
        return tuple(found[:MOST_TOLD])

    # The offer

    def _case(self, spec: TaskOfferSpec) -> Case | None:
        policy, evaluation = self.again.evaluate(spec)
        if policy is None or policy.spec is None or evaluation is None:
            return None
        offer, snapshot = self.again.offer, self.again.snapshot
        learned = snapshot.learned.get(policy.name, NOTHING)
        return Case(spec, policy.spec, offer.key.namespace, offer.uid, snapshot.now, evaluation, learned)

    def _reasons(self, evaluation: Evaluation | None) -> list[Reason]:
        """Return what stands against the offer, each reason once, in order."""
        refused = [refusal.reason for refusal in evaluation.refusals] if evaluation is not None else []
        return list(dict.fromkeys([self.now.answer.reason, *refused]))

    def _changes(self) -> Iterator[Change]:
        """Yield single changes, each once."""
        case = self._case(self.spec)
        if case is None:
            return
        seen: list[object] = []
        for reason in self._reasons(case.evaluation):
            for change in changes_for(case, reason):
                if (change.patch, change.anew) not in seen:
                    seen.append((change.patch, change.anew))
                    yield change

    def _combined(self) -> Change | None:
        """Return changes that together leave no filter that fails: for each refusal the first that removes it."""
        spec, together = self.spec, None
        for _ in range(_STEPS_OF_A_COMBINATION):
            case = self._case(spec)
            if case is None:
                return None
            if not case.evaluation.refusals:
                return together
            change = _most_useful(case)
            if change is None:
                return None
            together = change if together is None else together.and_then(change)
            spec = patched(spec, change.patch)
        return None

    def _confirmed(self, change: Change) -> Counterfactual | None:
        """Decide again with a change. Return it if the answer is a better one, else None."""
        spec = patched(self.spec, change.patch) if change.patch else self.spec
        policy, evaluation = self.again.evaluate(spec)
        if _hopeless(policy, evaluation):
            return None
        replaces = change.replaces or self._final
        found = self.again.decide(spec, created=self._created(replaces))
        if found is None or not self._is_better(found):
            return None
        return _told(f"with {change.says}", found.answer, spec=dict(change.patch), replaces=replaces)

    def _is_better(self, found: Verified) -> bool:
        """Tell whether an answer is an admission, or at least a wait for capacity where not even that was reached."""
        if found.answer.verdict is not Verdict.WAIT:
            return found.answer.verdict is Verdict.ADMIT
        return _waits_for_capacity(found.answer) and not _waits_for_capacity(self.now.answer)

    @property
    def _final(self) -> bool:
        """Whether the answer is a refusal, after which nothing but a new offer helps."""
        return self.now.answer.verdict is Verdict.REJECT

    def _created(self, replaces: bool) -> datetime | None:
        """Return when the changed offer is created: a new one is the youngest of all."""
        return self.again.snapshot.now if replaces else None

    def _policies(self) -> Iterator[Change]:
        """Yield the other policies; the default one where the offer names one that is not there."""
        own = self.now.policy.name if self.now.policy is not None else None
        for name in sorted(self.again.snapshot.policies):
            if name != own:
                yield Change(f"policyName {name}", {"policyName": name})

    # The world

    def _ends(self) -> Counterfactual | None:
        """Return the soonest ends of jobs that make room, or None where ends of jobs do not help."""
        if self.now.evaluation is None or self.now.evaluation.refusals or not self.spec.is_active:
            return None
        ends = self._soonest()
        count = next((n for n in range(1, len(ends) + 1) if self._admitted_after(ends[:n])), None)
        if count is None:
            return None
        needed = list(ends[:count])
        for release in ends[: count - 1]:
            fewer = [other for other in needed if other.holder != release.holder]
            if fewer and self._admitted_after(fewer):
                needed = fewer
        found = self._after(needed)
        if found is None or found.answer.verdict is not Verdict.ADMIT:
            return None
        at = max(end_expected(release, self.again.snapshot.now) for release in needed).replace(microsecond=0)
        names = list(dict.fromkeys(release.name or release.holder for release in needed))
        change = f"after {_listed(names)} {'ends' if len(names) == 1 else 'end'}, predicted for {rfc3339(at)}"
        return _told(change, found.answer, replaces=self._final, after=tuple(names), at=at)

    def _soonest(self) -> list[Release]:
        """Return the jobs that end first, and before the offer itself, on the policy's nodes or under it."""
        snapshot, policy = self.again.snapshot, self.now.policy
        assert policy is not None  # noqa: S101
        nodes = {node.name for node in snapshot.nodes if policy.selects(node)}
        last = end_of(self.again.offer, self.now.evaluation)
        ends = [
            (end_expected(release, snapshot.now), release.holder, release)
            for release in snapshot.releases
            if release.node in nodes or release.policy == policy.name
        ]
        ends.sort(key=lambda end: end[:2])
        return [release for at, _, release in ends if last is None or at < last][:MOST_ENDS]

    def _after(self, ends: Collection[Release]) -> Verified | None:
        created = self._created(self._final)
        return self.again.decide(self.spec, created=created, ended={release.holder for release in ends})

    def _admitted_after(self, ends: Collection[Release]) -> bool:
        found = self._after(ends)
        return found is not None and found.answer.verdict is Verdict.ADMIT


def _waits_for_capacity(answer: Answer) -> bool:
    later = (Reason.WAITING_FOR_EARLIER_END, Reason.WAITING_FOR_PREEMPTION)
    return answer.reason.value in CAPACITY_REASONS or answer.reason in later


def _hopeless(policy: PolicyView | None, evaluation: Evaluation | None) -> bool:
    """Tell without a run that filters refuse a change; below a daily floor only a run can tell."""
    return policy is None or evaluation is None or (bool(evaluation.refusals) and evaluation.floor is None)


def _most_useful(case: Case) -> Change | None:
    """Return a change that removes a refusal and brings no other; else one that at least removes it."""
    present = {refusal.reason for refusal in case.evaluation.refusals}
    second = None
    for refusal in case.evaluation.refusals:
        for change in changes_for(case, refusal.reason):
            left = case.refused(change.patch)
            if left < present:
                return change
            if second is None and refusal.reason not in left:
                second = change
    return second


def _told(
    change: str,
    answer: Answer,
    *,
    spec: dict[str, object] | None = None,
    replaces: bool = False,
    after: tuple[str, ...] = (),
    at: datetime | None = None,
) -> Counterfactual:
    return Counterfactual(
        change=change,
        spec=spec or {},
        replaces=replaces,
        after=after,
        at=at,
        verdict="Admit" if answer.verdict is Verdict.ADMIT else "Wait",
        reason=answer.reason.value,
        message=answer.message,
    )


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
