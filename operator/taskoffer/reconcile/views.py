"""From raw objects to the few facts that are kept of them. Nothing here raises on a malformed object."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, NamedTuple

from pydantic import BaseModel, TypeAdapter, ValidationError

from taskoffer.adapters.clock import utcnow
from taskoffer.adapters.metrics import UNREADABLE
from taskoffer.api.faults import faults_of
from taskoffer.api.quantity import whole
from taskoffer.api.tasks import TaskType
from taskoffer.api.v1alpha1.capacitypolicy import DEFAULT_POLICY_ANNOTATION, CapacityPolicySpec
from taskoffer.api.v1alpha1.meta import Assignment, Condition
from taskoffer.api.v1alpha1.taskoffer import MAX_OFFER_NAME, Admission, TaskOfferSpec
from taskoffer.api.v1alpha1.trainingjob import TrainingJob
from taskoffer.decision.evaluate import Evaluation
from taskoffer.decision.job_facts import NodeHealth
from taskoffer.decision.keys import OfferKey
from taskoffer.decision.ledger import NodeView
from taskoffer.decision.naming import job_name
from taskoffer.decision.outcomes import Learned
from taskoffer.decision.snapshot import OfferTerms, OfferView, PolicyView
from taskoffer.reconcile.cache import Raw
from taskoffer.reconcile.shapes import count, mapping, mappings

_CONDITIONS = TypeAdapter(tuple[Condition, ...])
_TOLD = 3


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Put the first faults of a failed validation into one line that names the fields and what helps."""
    return "; ".join(faults_of(error, model, most=_TOLD))


def read(model: type[BaseModel], raw: object, kind: str) -> tuple[Any, str | None]:
    """Validate a part of an object. Return the value, or None and what is wrong with it."""
    try:
        return model.model_validate(raw), None
    except ValidationError as error:
        UNREADABLE.labels(kind).inc()
        return None, explain(error, model)


class OfferState(StrEnum):
    """Where an offer stands in the ledger."""

    PENDING = "Pending"
    HOLDING = "Holding"
    DONE = "Done"


class KeptEvaluation(NamedTuple):
    """What a policy makes of an offer, and under which version of both it and what it has learned that holds."""

    policy_uid: str
    policy_generation: int
    learned_version: int
    made: Evaluation

    def holds(self, policy: PolicyView, learned: Learned) -> bool:
        """Tell whether the policy would say the same again."""
        if self.policy_uid != policy.uid or self.policy_generation != policy.generation:
            return False
        return self.learned_version == learned.version(self.made.group)


@dataclass(slots=True)
class OfferEntry:
    """An offer as it is kept: its spec as text, since a queue can be long, and of a finished one not even that."""

    key: OfferKey
    uid: str
    version: str
    generation: int
    created: datetime
    deleting: bool
    state: OfferState
    task_id: str
    reason: str
    active: bool
    finished: bool
    spec: bytes | None
    stored_conditions: list[Any] | tuple[Condition, ...]
    """As stored, and as read once somebody has asked for them."""
    observed_generation: int | None
    view: OfferView | None = None
    admission: Admission | None = None
    admission_problem: str | None = None
    """What is wrong with an admission that is stored and cannot be read."""
    booked: tuple[Assignment, ...] = ()
    """Where the admission books GPUs, as far as that can be read. It counts until it is known that nothing is there."""
    evaluation: KeptEvaluation | None = None
    terms: tuple[OfferTerms | None, str | None] | None = None
    admitted_as: tuple[str, TaskType, datetime] | None = None
    """Policy, task type and moment of its admission, if it was admitted."""
    occupies: float | None = None
    """Seconds for which an admitted offer is predicted to hold its GPUs, where that had to be worked out anew."""
    fresh_spec: TaskOfferSpec | None = None
    """The spec as read for the terms, until it has been evaluated."""

    @property
    def job_key(self) -> OfferKey:
        """Where its TrainingJob is, once it is admitted."""
        return OfferKey(self.key.namespace, job_name(self.key.name, self.uid))

    def inherit(self, before: OfferEntry) -> None:
        """Take over what was computed from the same generation: a status write changes neither spec nor score."""
        if before.terms is None or before.generation != self.generation or self.state is OfferState.DONE:
            return
        self.evaluation = before.evaluation
        if self.state is OfferState.PENDING:
            self.terms = before.terms

    def read_spec(self) -> tuple[TaskOfferSpec | None, str | None]:
        """Read the spec. Return it, or None and what is wrong with it."""
        if len(self.key.name) > MAX_OFFER_NAME:
            UNREADABLE.labels("TaskOffer").inc()
            return (
                None,
                f"metadata.name has {len(self.key.name)} characters, at most {MAX_OFFER_NAME} leave room for Jobs",
            )
        return read(TaskOfferSpec, json.loads(self.spec or b"{}"), "TaskOffer")

    def read_view(self) -> OfferView:
        """Return the offer as the cycle sees it; parsed once."""
        if self.view is None:
            if self.terms is None:
                self.fresh_spec, problem = self.read_spec()
                self.terms = (OfferTerms.of(self.fresh_spec) if self.fresh_spec else None), problem
            terms, invalid = self.terms
            self.view = OfferView(
                key=self.key,
                uid=self.uid,
                resource_version=self.version,
                generation=self.generation,
                created=self.created,
                spec=terms,
                invalid=invalid,
                conditions=self.conditions(),
                observed_generation=self.observed_generation,
            )
        return self.view

    def conditions(self) -> tuple[Condition, ...]:
        """Return the stored conditions; unreadable ones count as absent."""
        if not isinstance(self.stored_conditions, tuple):
            try:
                self.stored_conditions = _CONDITIONS.validate_python(self.stored_conditions)
            except ValidationError:
                found = [read(Condition, raw, "TaskOffer")[0] for raw in self.stored_conditions]
                self.stored_conditions = tuple(condition for condition in found if condition is not None)
        return self.stored_conditions


def offer_entry(raw: Raw) -> OfferEntry:
    """Reduce a TaskOffer."""
    metadata, spec, status = raw["metadata"], mapping(raw.get("spec")), mapping(raw.get("status"))
    key, uid = OfferKey(metadata.get("namespace", ""), metadata["name"]), metadata["uid"]
    conditions = {c["type"]: c for c in mappings(status.get("conditions")) if isinstance(c.get("type"), str)}
    finished = conditions.get("Finished", {}).get("status") == "True"
    if finished:
        state = OfferState.DONE
    else:
        state = OfferState.HOLDING if status.get("admission") is not None else OfferState.PENDING
    keep = state is not OfferState.DONE
    admission, problem, booked = _booking(key, uid, status["admission"]) if state is OfferState.HOLDING else _NONE
    stored = status.get("conditions")
    return OfferEntry(
        key=key,
        uid=uid,
        version=metadata["resourceVersion"],
        generation=metadata.get("generation", 0),
        created=datetime.fromisoformat(metadata["creationTimestamp"]),
        deleting="deletionTimestamp" in metadata,
        state=state,
        task_id=str(spec.get("taskID", "")),
        reason=str(conditions.get("Admitted", {}).get("reason", "undecided")),
        active=spec.get("active") is not False,
        finished=finished,
        spec=json.dumps(spec, separators=(",", ":")).encode() if keep else None,
        stored_conditions=stored if keep and isinstance(stored, list) else (),
        observed_generation=count(status.get("observedGeneration")),
        admitted_as=_admitted_as(mapping(status.get("admission")), spec.get("taskType")),
        admission=admission,
        admission_problem=problem,
        booked=booked,
    )


_NONE: tuple[None, None, tuple[Assignment, ...]] = (None, None, ())


_TASK_TYPES = {kind.value: kind for kind in TaskType}


def _admitted_as(admission: Raw, task_type: object) -> tuple[str, TaskType, datetime] | None:
    """Return policy, task type and moment of an admission, or None where there is none that says so."""
    policy, kind = mapping(admission.get("policyRef")).get("name"), _TASK_TYPES.get(str(task_type))
    decided_at = admission.get("decidedAt")
    if not isinstance(policy, str) or kind is None or not isinstance(decided_at, str):
        return None
    try:
        moment = datetime.fromisoformat(decided_at)
    except ValueError:
        return None
    return policy, kind, moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def _booking(key: OfferKey, uid: str, raw: object) -> tuple[Admission | None, str | None, tuple[Assignment, ...]]:
    """Read an admission. Return it, or None and what is wrong with it; and the GPUs that it books in either case."""
    admission, problem = read(Admission, raw, "TaskOffer")
    own = job_name(key.name, uid)
    if admission is not None and admission.job_name == own:
        return admission, None, admission.assignments
    if admission is not None:
        # Under another offer's job name it would get into that one's way.
        problem = f"jobName: {admission.job_name} is not the name of this offer's job, {own}"
    booked: dict[str, Assignment] = {}
    for part in mappings(mapping(raw).get("assignments")):
        found, _ = read(Assignment, part, "TaskOffer")
        if found is not None and (found.node_name not in booked or booked[found.node_name].count < found.count):
            booked[found.node_name] = found
    return None, problem, tuple(booked.values())


def policy_view(raw: Raw) -> PolicyView:
    """Reduce a CapacityPolicy: the spec if it is valid, else the last good one from its status."""
    metadata = raw["metadata"]
    annotations = metadata.get("annotations") or {}
    generation = metadata.get("generation", 0)
    spec, problem = read(CapacityPolicySpec, mapping(raw.get("spec")), "CapacityPolicy")
    last = _last_in_force(mapping(raw.get("status")), generation, spec)
    if spec is None and last is not None:
        generation, spec = last
    return PolicyView(
        name=metadata["name"],
        uid=metadata["uid"],
        generation=generation,
        spec=spec,
        is_default=annotations.get(DEFAULT_POLICY_ANNOTATION) == "true",
        created=datetime.fromisoformat(metadata["creationTimestamp"]),
        problem=problem or "",
        last=last,
    )


def _last_in_force(
    status: Raw, generation: int, spec: CapacityPolicySpec | None
) -> tuple[int, CapacityPolicySpec] | None:
    """Return generation and spec that a policy's status keeps as those in force."""
    if status.get("activeSpec") is None:
        return None
    active = count(status.get("activeGeneration"))
    if spec is not None and active == generation:
        return generation, spec
    kept, _ = read(CapacityPolicySpec, status["activeSpec"], "CapacityPolicy")
    return None if kept is None else (generation if active is None else active, kept)


@dataclass(frozen=True, slots=True)
class PolicyEntry:
    """A policy as decisions see it, and its stored status."""

    view: PolicyView
    raw_spec: Raw
    status: Raw
    version: str
    generation: int


def policy_entry(raw: Raw) -> PolicyEntry:
    """Reduce a CapacityPolicy together with what writing its status needs."""
    metadata = raw["metadata"]
    return PolicyEntry(
        policy_view(raw),
        mapping(raw.get("spec")),
        mapping(raw.get("status")),
        metadata["resourceVersion"],
        metadata.get("generation", 0),
    )


@dataclass(slots=True)
class NodeEntry:
    """A node: what it offers of each extended resource, and its health."""

    name: str
    labels: dict[str, str]
    allocatable: dict[str, int]
    schedulable: bool
    health: NodeHealth

    def view(self, resource: str) -> NodeView:
        """Return the node as far as one resource goes."""
        ready = self.health.ready and self.schedulable
        return NodeView(self.name, self.allocatable.get(resource, 0), ready, self.labels)


def node_entry(raw: Raw) -> NodeEntry:
    """Reduce a Node; only extended resources (those with a domain) are kept."""
    metadata, status = raw["metadata"], mapping(raw.get("status"))
    ready: Raw = next((c for c in mappings(status.get("conditions")) if c.get("type") == "Ready"), {})
    return NodeEntry(
        name=metadata["name"],
        labels=metadata.get("labels") or {},
        allocatable={k: whole(v) for k, v in mapping(status.get("allocatable")).items() if "/" in k},
        schedulable=not mapping(raw.get("spec")).get("unschedulable") and "deletionTimestamp" not in metadata,
        health=NodeHealth(ready.get("status") == "True", utcnow()),
    )


@dataclass(frozen=True, slots=True)
class TrainingJobEntry:
    """A TrainingJob; ``job`` is None where the stored object cannot be read."""

    key: OfferKey
    uid: str
    version: str
    offer_uid: str
    """UID of the offer that owns it; empty where it belongs to somebody else, whatever its spec says."""
    job: TrainingJob | None
    problem: str | None


def training_job_entry(raw: Raw) -> TrainingJobEntry:
    """Reduce a TrainingJob."""
    metadata = raw["metadata"]
    job: TrainingJob | None
    job, problem = read(TrainingJob, {k: v for k, v in raw.items() if k in _JOB_FIELDS}, "TrainingJob")
    owner: Raw = next((o for o in metadata.get("ownerReferences") or () if o.get("controller")), {})
    offer_uid = str(owner.get("uid", "")) if owner.get("kind") == "TaskOffer" else ""
    if job is not None and offer_uid and offer_uid != job.spec.offer_ref.uid:
        # Its pods would be charged to another offer than the one that answers for it.
        problem = f"spec.offerRef.uid: {job.spec.offer_ref.uid} is not the owner's, {offer_uid}"
        job = None
    return TrainingJobEntry(
        OfferKey(metadata.get("namespace", ""), metadata["name"]),
        metadata["uid"],
        metadata["resourceVersion"],
        offer_uid,
        job,
        problem,
    )


_JOB_FIELDS = ("apiVersion", "kind", "metadata", "spec", "status")
