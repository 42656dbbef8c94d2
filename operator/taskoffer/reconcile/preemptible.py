"""Which running jobs may be stopped for others, and which were and wait to go on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec
from taskoffer.api.v1alpha1.trainingjob import AttemptOutcome, TrainingJob
from taskoffer.decision.evaluate import Evaluation
from taskoffer.decision.placed_jobs import MoveRequest, Resumption, Running
from taskoffer.decision.preemption import seconds_left
from taskoffer.decision.snapshot import PolicyView
from taskoffer.reconcile.evaluations import evaluation_of
from taskoffer.reconcile.releases import end_of_booking
from taskoffer.reconcile.views import OfferEntry, OfferState

if TYPE_CHECKING:
    from taskoffer.reconcile.world import World


def running_jobs(world: World, policies: Mapping[str, PolicyView]) -> Iterator[Running]:
    """Yield the running jobs of the policies that let jobs be stopped, and those that have been asked to stop."""
    if not any(view.spec is not None and view.spec.preemption is not None for view in policies.values()):
        return
    for entry in world.by_state[OfferState.HOLDING].values():
        job = world.jobs_by_key.get(entry.job_key)
        if job is None or job.job is None or job.offer_uid != entry.uid or not entry.active or entry.deleting:
            continue
        found = _running(world, entry, job.job, policies)
        if found is not None:
            yield found


def _running(world: World, entry: OfferEntry, job: TrainingJob, policies: Mapping[str, PolicyView]) -> Running | None:
    attempt = job.status.attempts[-1] if job.status.attempts else None
    if job.spec.run.trainer is not None:
        return None  # Nobody knows whether it can save and go on.
    if entry.admission is None or attempt is None or attempt.outcome is not None or attempt.started_at is None:
        return None
    name = entry.admission.policy_ref.name
    policy = policies.get(name)
    if policy is None or policy.spec is None or policy.spec.preemption is None:
        return None
    made = _evaluated(world, entry, name, policies)
    if made is None:
        return None
    evaluation, (place,) = made[1], attempt.assignments
    asked = attempt.preempted_for or world.preempting.get(entry.job_key)
    return Running(
        key=entry.job_key,
        holder=entry.uid,
        name=str(entry.key),
        policy=name,
        node=place.node_name,
        gpus=place.count,
        lane=place.lane,
        quota=evaluation.quota,
        level=evaluation.priority.level if evaluation.priority is not None else 0,
        started=attempt.started_at,
        ends=end_of_booking(world, entry, entry.admission, policies),
        deadline=attempt.deadline,
        preempted=sum(one.outcome is AttemptOutcome.PREEMPTED for one in job.status.attempts),
        score=float(evaluation.score.total) if evaluation.score is not None else 0.0,
        at_stake=evaluation.at_stake,
        leaving_for=asked.uid if asked is not None else None,
        heir_is_gone=asked is not None and asked.uid not in world.by_state[OfferState.PENDING],
    )


def resumptions(world: World, policies: Mapping[str, PolicyView]) -> Iterator[Resumption]:
    """Yield the jobs that were stopped for others and wait for GPUs."""
    for request in world.moves.values():
        entry, job = world.offers.get(request.offer_uid), world.jobs_by_key.get(request.key)
        if request.goes_on and entry is not None and job is not None and job.job is not None:
            found = _resumption(world, request, entry, job.job, policies)
            if found is not None:
                yield found


def _resumption(
    world: World, request: MoveRequest, entry: OfferEntry, job: TrainingJob, policies: Mapping[str, PolicyView]
) -> Resumption | None:
    made, last = _evaluated(world, entry, request.policy, policies), job.status.attempts[-1]
    if last.preempted_for is None:
        return None
    # Whatever has become of its policy, it was admitted and is to go on.
    spec, evaluation = made if made is not None else (None, None)
    again = spec.preemption.resume_seconds if spec is not None and spec.preemption is not None else 0
    needed = evaluation.seconds_on(request.count) if evaluation is not None else job.spec.run.time_limit_seconds
    priority = evaluation.priority if evaluation is not None else None
    return Resumption(
        key=request.key,
        offer_uid=request.offer_uid,
        name=str(entry.key),
        policy=request.policy,
        gpus=request.count,
        lane=request.lane,
        quota=evaluation.quota if evaluation is not None else None,
        level=priority.level if priority is not None else 0,
        since=entry.created,
        occupies=seconds_left(job.status, needed) + again,
        left_for=last.preempted_for.uid,
        deadline=last.deadline,
        last=request.last,
    )


def _evaluated(
    world: World, entry: OfferEntry, policy_name: str, policies: Mapping[str, PolicyView]
) -> tuple[CapacityPolicySpec, Evaluation] | None:
    """Return what a policy in force makes of an admitted offer, or None where there is no such policy."""
    policy = policies.get(policy_name)
    if policy is None or policy.spec is None or entry.read_view().spec is None:
        return None
    return policy.spec, evaluation_of(entry, policy, policy.spec, world.outcomes.learned(policy.name))
