"""When running jobs are predicted to end: what their trainers say, else what was predicted at the admission."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING

from taskoffer.api.v1alpha1.meta import Assignment
from taskoffer.api.v1alpha1.taskoffer import Admission
from taskoffer.api.v1alpha1.trainingjob import AttemptOutcome, TrainingJobStatus
from taskoffer.decision.evaluate import evaluate
from taskoffer.decision.ledger import Release
from taskoffer.decision.moments import later
from taskoffer.decision.preemption import seconds_left
from taskoffer.decision.snapshot import PolicyView
from taskoffer.reconcile.views import OfferEntry, OfferState

if TYPE_CHECKING:
    from taskoffer.reconcile.world import World


def releases(world: World, policies: Mapping[str, PolicyView]) -> tuple[Release, ...]:
    """Return the predicted end of every booking of an offer; foreign pods end nobody knows when."""
    found: list[Release] = []
    for entry in world.by_state[OfferState.HOLDING].values():
        if entry.admission is not None:
            ends = end_of_booking(world, entry, entry.admission, policies)
            found.extend(_of(entry, entry.admission, world.current_assignments(entry), ends))
    for uid, assumed in world.assumed.items():
        pending = world.offers.get(uid)
        if pending is not None:
            ends = _predicted(world, pending, assumed.admission, policies)
            found.extend(_of(pending, assumed.admission, assumed.admission.assignments, ends))
    return tuple(found)


def _of(entry: OfferEntry, admission: Admission, assignments: Iterable[Assignment], ends: datetime) -> list[Release]:
    policy, namespace = admission.policy_ref.name, entry.key.namespace
    return [
        Release(entry.uid, part.node_name, part.count, ends, policy, part.lane, namespace, str(entry.key))
        for part in assignments
    ]


def end_of_booking(
    world: World, entry: OfferEntry, admission: Admission, policies: Mapping[str, PolicyView]
) -> datetime:
    """Return when a booking is predicted to end: what the trainer says is left since then, else as predicted."""
    job = world.jobs_by_key.get(entry.job_key)
    status = job.job.status if job is not None and job.job is not None else TrainingJobStatus()
    last = status.attempts[-1] if status.attempts else None
    if job is not None and job.job is not None and last is not None and last.preempted_for is not None:
        return later(last.preempted_for.asked_at, job.job.spec.run.pod.termination_grace_seconds)
    goes_on = len(status.attempts) > 1 and status.attempts[-2].outcome is AttemptOutcome.PREEMPTED
    told = status.trainer_status
    if last is not None and goes_on and (told is None or told.last_updated_time <= last.created_at):
        return _going_on(world, entry, admission, policies, status)
    if told is not None and told.estimated_remaining_seconds is not None:
        return later(told.last_updated_time, told.estimated_remaining_seconds)
    return _predicted(world, entry, admission, policies)


def _going_on(
    world: World,
    entry: OfferEntry,
    admission: Admission,
    policies: Mapping[str, PolicyView],
    status: TrainingJobStatus,
) -> datetime:
    """Return the predicted end of a job that goes on after it was stopped, before its trainer says anything."""
    policy, last = policies.get(admission.policy_ref.name), status.attempts[-1]
    rules = policy.spec.preemption if policy is not None and policy.spec is not None else None
    needed = (_predicted_seconds(world, entry, admission, policies)) + (
        rules.resume_seconds if rules is not None else 0
    )
    ends = later(last.created_at, seconds_left(status, needed))
    return min(ends, last.deadline) if last.deadline is not None else ends


def _predicted(world: World, entry: OfferEntry, admission: Admission, policies: Mapping[str, PolicyView]) -> datetime:
    """Return the end that was predicted at the admission, at the latest the deadline."""
    ends = later(admission.decided_at, _predicted_seconds(world, entry, admission, policies))
    return min(ends, admission.deadline) if admission.deadline is not None else ends


def _predicted_seconds(
    world: World, entry: OfferEntry, admission: Admission, policies: Mapping[str, PolicyView]
) -> float:
    gpus = sum(part.count for part in admission.assignments)
    if entry.evaluation is not None and entry.evaluation.policy_uid == admission.policy_ref.uid:
        return entry.evaluation.made.seconds_on(gpus)
    return _evaluated_anew(world, entry, admission, policies)


def _evaluated_anew(world: World, entry: OfferEntry, admission: Admission, policies: Mapping[str, PolicyView]) -> float:
    """Return for how long an offer holds its GPUs that another replica has admitted; evaluated once."""
    if entry.occupies is None:
        policy, spec = policies.get(admission.policy_ref.name), entry.read_spec()[0]
        entry.occupies = float(spec.time_limit_seconds) if spec is not None else 0.0
        if policy is not None and policy.spec is not None and spec is not None:
            counted = spec.model_copy(update={"gpu_count": admission.assignments[0].count})
            learned = world.outcomes.learned(policy.name)
            entry.occupies = evaluate(counted, policy.spec, entry.key.namespace, learned).occupies
    return entry.occupies
