"""The stores of all kinds with the indices that gathering needs, and the snapshot that a cycle decides on."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, TypeVar

from taskoffer.api.reasons import Reason
from taskoffer.api.tasks import TaskType
from taskoffer.api.v1alpha1.capacitypolicy import ResourcePool
from taskoffer.api.v1alpha1.meta import Assignment
from taskoffer.api.v1alpha1.taskoffer import Admission
from taskoffer.api.v1alpha1.trainingjob import AttemptOutcome, Preemptor
from taskoffer.decision.evaluate import Evaluation
from taskoffer.decision.in_time import counts_in_time
from taskoffer.decision.keys import OfferKey
from taskoffer.decision.ledger import Claim, open_ledger
from taskoffer.decision.moves import Move
from taskoffer.decision.placed_jobs import MoveRequest
from taskoffer.decision.room import CAPACITY_REASONS
from taskoffer.decision.snapshot import OfferView, PolicyView, Sibling, Snapshot, end_of, on_count_in_time, shape_of
from taskoffer.reconcile.admitted import Admitted
from taskoffer.reconcile.cache import Store
from taskoffer.reconcile.charges import Charges, claim_of
from taskoffer.reconcile.devices import Devices
from taskoffer.reconcile.evaluations import evaluation_of
from taskoffer.reconcile.in_force import USUAL_RESOURCE, counts_days, pool_of, usable
from taskoffer.reconcile.outcomes import Outcomes
from taskoffer.reconcile.pod_views import BatchJobEntry, PodEntry, batch_job_entry, pod_entry
from taskoffer.reconcile.preemptible import resumptions, running_jobs
from taskoffer.reconcile.releases import releases
from taskoffer.reconcile.standing import Standing
from taskoffer.reconcile.views import (
    NodeEntry,
    OfferEntry,
    OfferState,
    PolicyEntry,
    TrainingJobEntry,
    node_entry,
    offer_entry,
    policy_entry,
    training_job_entry,
)

E = TypeVar("E", PodEntry, BatchJobEntry)


@dataclass(slots=True)
class Assumed:
    """A booking whose write is on its way or has an unknown outcome."""

    uid: str
    admission: Admission


@dataclass(slots=True)
class World:
    """All that is known of the cluster. Only the event loop's thread touches it."""

    offers: Store[OfferEntry] = field(default_factory=lambda: Store("TaskOffer", offer_entry))
    jobs: Store[TrainingJobEntry] = field(default_factory=lambda: Store("TrainingJob", training_job_entry))
    policies: Store[PolicyEntry] = field(default_factory=lambda: Store("CapacityPolicy", policy_entry))
    batch_jobs: Store[BatchJobEntry] = field(default_factory=lambda: Store("Job", batch_job_entry))
    pods: Store[PodEntry] = field(default_factory=lambda: Store("Pod", pod_entry))
    nodes: Store[NodeEntry] = field(default_factory=lambda: Store("Node", node_entry))
    devices: Devices = field(default_factory=Devices)
    assumed: dict[str, Assumed] = field(default_factory=dict)
    decided_here: set[str] = field(default_factory=set)
    """Admitted offers whose admission this replica decided, on a ledger that it knew to be complete."""
    in_flight: set[str] = field(default_factory=set)
    """Offers whose answer is being written; they are not decided again meanwhile."""
    held_back: set[str] = field(default_factory=set)
    """Offers whose status the server refuses to write; they are tried again at the next resync."""
    moves: dict[OfferKey, MoveRequest] = field(default_factory=dict)
    """Jobs whose next attempt needs a place."""
    preempting: dict[OfferKey, Preemptor] = field(default_factory=dict)
    """Jobs that a cycle wants to stop for an offer, until their status says so."""
    moved: dict[OfferKey, Move] = field(default_factory=dict)
    """Places that a cycle has found and that are not yet written as an attempt: booked like an assumed admission."""
    by_state: dict[OfferState, dict[str, OfferEntry]] = field(default_factory=lambda: {s: {} for s in OfferState})
    undecided: dict[str, OfferEntry] = field(default_factory=dict)
    """Pending offers that each cycle looks at one by one: all but the standing ones."""
    standing: Standing = field(default_factory=Standing)
    settled_under: object = None
    """The policies under which the standing offers were evaluated."""
    siblings: dict[tuple[str, str], dict[str, Sibling]] = field(default_factory=lambda: defaultdict(dict))
    shared: set[tuple[str, str]] = field(default_factory=set)
    """Namespaces and task ids that several offers have."""
    holding_by_job: dict[OfferKey, OfferEntry] = field(default_factory=dict)
    """Admitted, unfinished offers by the TrainingJob that is theirs."""
    jobs_by_key: dict[OfferKey, TrainingJobEntry] = field(default_factory=dict)
    pods_of: dict[OfferKey, dict[str, PodEntry]] = field(default_factory=lambda: defaultdict(dict))
    batch_of: dict[OfferKey, dict[str, BatchJobEntry]] = field(default_factory=lambda: defaultdict(dict))
    charges: Charges = field(default_factory=Charges)
    admitted: Admitted = field(default_factory=Admitted)
    outcomes: Outcomes = field(default_factory=Outcomes)

    def __post_init__(self) -> None:
        self.nodes.on_change = _keep_health
        self.offers.on_change = self._index_offer
        self.jobs.on_change = self._index_job
        self.pods.on_change = self._index_pod
        self.batch_jobs.on_change = self._index_batch

    @property
    def stores(self) -> tuple[Store[Any], ...]:
        """All stores, in the order in which they are listed: what charges GPUs comes before what asks for them."""
        return (self.nodes, *self.devices.stores, self.pods, self.batch_jobs, self.jobs, self.policies, self.offers)

    @property
    def idle(self) -> bool:
        """Tell whether nothing waits for a decision."""
        return not self.by_state[OfferState.PENDING] and not self.moves

    @property
    def complete(self) -> bool:
        """Tell whether every kind has been listed; before that no decision is safe."""
        return all(store.listed for store in self.stores)

    # Indices

    def _index_offer(self, before: OfferEntry | None, after: OfferEntry | None) -> None:
        if before is not None:
            self.by_state[before.state].pop(before.uid, None)
            self.undecided.pop(before.uid, None)
            self.standing.drop(before.uid)
            self._leave_siblings(before)
            self.admitted.drop(before.uid)
            if before.state is OfferState.HOLDING:
                self.holding_by_job.pop(before.job_key, None)
            self.charges.drop("admission", before.uid)
        if after is not None:
            if before is not None:
                after.inherit(before)
            if after.state is OfferState.HOLDING:
                self.holding_by_job[after.job_key] = after
            self.by_state[after.state][after.uid] = after
            if after.admitted_as is not None:
                self.admitted.add(after.uid, *after.admitted_as)
            self._charge(after)
            self._join_siblings(after)
            if after.state is OfferState.PENDING:
                self.undecided[after.uid] = after
            else:
                self.assumed.pop(after.uid, None)
        else:
            assert before is not None  # noqa: S101
            self.assumed.pop(before.uid, None)
            self.decided_here.discard(before.uid)

    def _join_siblings(self, entry: OfferEntry) -> None:
        place = entry.key.namespace, entry.task_id
        same = self.siblings[place]
        same[entry.uid] = Sibling(entry.created, entry.uid, entry.key.name, entry.reason)
        if len(same) > 1:
            self.shared.add(place)
            self._unsettle(same)

    def _leave_siblings(self, entry: OfferEntry) -> None:
        place = entry.key.namespace, entry.task_id
        same = self.siblings[place]
        same.pop(entry.uid, None)
        if len(same) < 2:
            self.shared.discard(place)
        if not same:
            del self.siblings[place]

    def _unsettle(self, uids: Iterable[str]) -> None:
        """Have the next cycle look at these offers one by one."""
        for uid in list(uids):
            entry = self.offers.get(uid)
            if entry is not None and entry.state is OfferState.PENDING:
                self.standing.drop(uid)
                self.undecided[uid] = entry

    def send(self, uid: str, admission: Admission | None) -> None:
        """Take in that an offer's answer is being written: it is not decided again, and an admission is booked."""
        self.in_flight.add(uid)
        self._unsettle((uid,))
        if admission is not None:
            self.assumed[uid] = Assumed(uid, admission)

    def _index_job(self, before: TrainingJobEntry | None, after: TrainingJobEntry | None) -> None:
        self.outcomes.take(before, after)
        if before is not None and after is None:
            self.jobs_by_key.pop(before.key, None)
            self.moves.pop(before.key, None)
            self.moved.pop(before.key, None)
            self.preempting.pop(before.key, None)
        if after is not None:
            self.jobs_by_key[after.key] = after
        key = after.key if after is not None else before.key if before is not None else None
        holding = self.holding_by_job.get(key) if key is not None else None
        if holding is not None:
            self._charge(holding)

    def _index_pod(self, before: PodEntry | None, after: PodEntry | None) -> None:
        _reindex(self.pods_of, _job_key(before), _job_key(after), before, after)
        if after is not None:
            self.charges.pod(after)
        elif before is not None:
            self.charges.drop("pod", before.uid)
        for uid in self.charges.spend(before, after):
            if (job := self.batch_jobs.get(uid)) is not None:
                self.charges.job(job)

    def _index_batch(self, before: BatchJobEntry | None, after: BatchJobEntry | None) -> None:
        _reindex(self.batch_of, _job_key(before), _job_key(after), before, after)
        if after is not None:
            self.charges.job(after)
        elif before is not None:
            self.charges.drop("job", before.uid)

    def _charge(self, entry: OfferEntry) -> None:
        if entry.state is OfferState.HOLDING:
            policy = entry.admission.policy_ref.name if entry.admission is not None else None
            self.charges.offer(entry.uid, self.current_assignments(entry), policy, entry.key.namespace)

    # The snapshot

    def snapshot(self, now: datetime) -> Snapshot:
        """Return what a cycle decides on: pending offers that are not being written, and every claim on a GPU."""
        policies = self.policy_views()
        pool = pool_of(policies)
        resource = pool.name if pool is not None else USUAL_RESOURCE
        self.outcomes.refresh(policies, now)
        self.unsettle_what_changed(now, policies)
        snapshot = Snapshot(
            now=now,
            offers=(),
            policies=policies,
            nodes=[self.devices.seen(node.view(resource), pool) for node in self.nodes],
            claims=list(self.claims(resource, pool)),
            siblings={place: tuple(self.siblings_now(place)) for place in self.shared},
            moves=tuple(move for move in self.moves.values() if not move.goes_on),
            running=tuple(running_jobs(self, policies)),
            resumptions=tuple(resumptions(self, policies)),
            releases=releases(self, policies),
            learned={name: self.outcomes.learned(name) for name in policies},
            admitted_today=self._admitted_today(now) if counts_days(policies) else {},
        )
        evaluations = self.settle(snapshot, list(self.undecided.values()))
        return replace(
            snapshot,
            offers=[entry.read_view() for entry in self.undecided.values() if self._may_decide(entry)],
            evaluations=evaluations,
            standing=self.standing.groups,
            standing_end=self.standing.soonest_end,
        )

    def _admitted_today(self, now: datetime) -> Counter[tuple[str, TaskType]]:
        """Return how many offers were admitted within a day, with those whose admission is on its way."""
        found = Counter(self.admitted.since(now - timedelta(days=1)))
        for uid, assumed in self.assumed.items():
            entry = self.offers.get(uid)
            spec = entry.read_view().spec if entry is not None else None
            if spec is not None:
                found[assumed.admission.policy_ref.name, spec.task_type] += 1
        return found

    def _may_decide(self, entry: OfferEntry) -> bool:
        return not entry.deleting and entry.uid not in self.in_flight and entry.uid not in self.held_back

    def siblings_now(self, place: tuple[str, str]) -> Iterator[Sibling]:
        """Yield the offers with a namespace's task id as they are once what is on its way has been written."""
        for sibling in self.siblings.get(place, {}).values():
            assumed = sibling.uid in self.assumed
            yield replace(sibling, reason=Reason.ADMITTED.value) if assumed else sibling

    def unsettle_what_changed(self, now: datetime, policies: dict[str, PolicyView]) -> None:
        """Standing offers were evaluated under the policies and outcomes of then, and may have expired since."""
        versions = [(p.ref, p.is_default, p.created, p.spec is None) for p in policies.values()]
        under = versions, self.outcomes.versions()
        if under != self.settled_under:
            self.settled_under = under
            self._unsettle(self.standing.clear())
        self._unsettle(self.standing.drop_ended(now))

    def settle(self, snapshot: Snapshot, entries: Iterable[OfferEntry]) -> dict[tuple[str, str], Evaluation]:
        """Evaluate offers that are to be decided, and put those aside whose answer may well stand."""
        evaluations: dict[tuple[str, str], Evaluation] = {}
        resolved: dict[str | None, PolicyView | None] = {}
        for entry in entries:
            if not self._may_decide(entry):
                continue
            view = entry.read_view()
            if view.spec is None:
                continue
            name = view.spec.policy_name
            if name not in resolved:
                resolved[name] = snapshot.policy_for(view.spec)[0]
            policy = resolved[name]
            if policy is None or policy.spec is None:
                continue
            evaluation = evaluation_of(entry, policy, policy.spec, self.outcomes.learned(policy.name))
            evaluation = on_count_in_time(view, evaluation, snapshot.now)
            if self._stands(entry, view, evaluation, snapshot.now):
                in_time = counts_in_time(view, evaluation, snapshot.now)
                shape = shape_of(policy.name, evaluation, view.reason or "", in_time)
                self.standing.add(shape, view, evaluation, snapshot.now)
                del self.undecided[entry.uid]
            else:
                evaluations[entry.uid, policy.name] = evaluation
        return evaluations

    def _stands(self, entry: OfferEntry, view: OfferView, evaluation: Evaluation, now: datetime) -> bool:
        """Tell whether an offer's answer holds for as long as the same thing stands in its way."""
        if view.reason not in CAPACITY_REASONS or view.observed_generation != view.generation:
            return False
        if evaluation.refusals or not entry.active or (entry.key.namespace, entry.task_id) in self.shared:
            return False
        ends = end_of(view, evaluation)
        return ends is None or now < ends

    def policy_views(self) -> dict[str, PolicyView]:
        """Return the policies by name; only the usable ones have a spec."""
        return usable([entry.view for entry in self.policies], self.devices)

    def policy_versions(self) -> Iterator[PolicyView]:
        """Yield the policies as they are stored, then as they are in force: one may go on with its last version."""
        yield from (entry.view for entry in self.policies)
        yield from self.policy_views().values()

    def claims(self, resource: str, pool: ResourcePool | None = None) -> Iterator[Claim]:
        """Yield every claim on a GPU, from every source; with a policy's pool those of others on its devices too."""
        if resource != self.charges.resource:
            self.charges.count(resource, self.batch_jobs, self.pods)
        yield from self.charges
        yield from self.devices.charges(pool)
        for assumed in self.assumed.values():
            for assignment in assumed.admission.assignments:
                entry = self.offers.get(assumed.uid)
                namespace = entry.key.namespace if entry is not None else None
                yield claim_of(assumed.uid, assignment, "assumed", assumed.admission.policy_ref.name, namespace)
        for move in self.moved.values():
            holder = self.offers.get(move.offer_uid)
            admission = holder.admission if holder is not None else None
            policy, namespace = admission.policy_ref.name if admission is not None else None, move.key.namespace
            for assignment in move.assignments:
                yield claim_of(move.offer_uid, assignment, "assumed", policy, namespace)

    def overbooked(self, admission: Admission) -> str | None:
        """Say which node of an admission is booked beyond what it has, or None."""
        resource, pool = admission.assignments[0].resource_name, pool_of(self.policy_views())
        ledger = open_ledger(self.claims(resource, pool))
        nodes = {node.name: node for node in self.nodes}
        for assignment in admission.assignments:
            node = nodes.get(assignment.node_name)
            offered = self.devices.seen(node.view(resource), pool).allocatable if node and node.health.ready else None
            booked = ledger.booked.get(assignment.node_name, 0)
            if offered is not None and booked > offered:
                return f"{booked} of {offered} were booked on {assignment.node_name}"
            if (twice := ledger.shared_devices(assignment.node_name, assignment.device_keys)) is not None:
                return f"{twice} on {assignment.node_name} was booked twice"
        return None

    def current_assignments(self, entry: OfferEntry) -> tuple[Assignment, ...]:
        """Return where an admitted offer's booking is now: the last attempt's place, else the admission's.

        A job that was stopped for another has given its GPUs back, and has none until it goes on. One that has been
        trained needs none to hand its result over, nor one that has ended early to hand over the best so far.
        """
        job = self.jobs_by_key.get(entry.job_key)
        if job is None or job.job is None or job.offer_uid != entry.uid or not job.job.status.attempts:
            return entry.booked
        last = job.job.status.attempts[-1]
        given_back = (AttemptOutcome.PREEMPTED, AttemptOutcome.SUCCEEDED)
        over = last.outcome in given_back or job.job.status.early_end is not None
        return () if over else last.assignments


def _keep_health(before: NodeEntry | None, after: NodeEntry | None) -> None:
    """A node that was seen to be Ready, or not to be so, is so since then, whatever its own clock says."""
    if before is not None and after is not None and before.health.ready == after.health.ready:
        after.health = before.health


def _job_key(entry: PodEntry | BatchJobEntry | None) -> OfferKey | None:
    if entry is None or not entry.training_job:
        return None
    return OfferKey(entry.namespace, entry.training_job)


def _reindex(
    index: dict[OfferKey, dict[str, E]],
    old: OfferKey | None,
    new: OfferKey | None,
    before: E | None,
    after: E | None,
) -> None:
    if before is not None and old is not None and old in index:
        index[old].pop(before.uid, None)
        if not index[old] and old != new:
            del index[old]
    if after is not None and new is not None:
        index[new][after.uid] = after
