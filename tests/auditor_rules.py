"""The auditor's rules: pure functions of the history that it watched. Each finds one way to break the ledger.

(a) A Job is created whose GPUs do not fit its node.
(b) A verdict flips: admitted, then rejected; rejected, then anything else; one admission replaced by another.
(c) A TrainingJob without an admission of its offer, or a Job without its TrainingJob.
(d) An admission from which nothing follows.
(e) A GPU that stays charged for nothing.
(f) A status write of an undecided offer that changes neither its verdict nor its reason.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field

from auditor_history import (
    JOB,
    JOB_LABEL,
    NODE,
    OFFER,
    POD,
    STEP_LABEL,
    TRAINING_JOB,
    UID_LABEL,
    Event,
    Object,
    World,
    admission,
    allocatable,
    condition,
    gpus_of_job,
    gpus_of_pod_spec,
    has_spent_its_pod,
    in_order,
    is_true,
    job_is_over,
    labels,
    name_of,
    offer_uid_of,
    pinned_nodes,
    pod_is_over,
    wants_to_run,
)
from auditor_judgement import Limits, Rule, Violation


def _is_new(event: Event, world: World) -> bool:
    return event.type == "ADDED" and event.uid not in world.objects[event.kind]


def _changed_from(event: Event, world: World) -> Object | None:
    """Return the TaskOffer as it was before a change that was watched; None for all other events."""
    if event.kind != OFFER or event.type not in ("ADDED", "MODIFIED"):
        return None
    return world.objects[OFFER].get(event.uid)


@dataclass
class JobFits(Rule):
    """Rule a: when a Job appears, its node has room for it beside everything that is charged there."""

    _offered: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    _bound_at: dict[str, float] = field(default_factory=dict)

    def observe(self, event: Event, world: World) -> None:
        at = float("-inf") if event.revision == 0 else event.at
        if event.kind == NODE:
            amount = 0 if event.type == "DELETED" else allocatable(event.object, self.limits.resource)
            history = self._offered.setdefault(event.object["metadata"]["name"], [])
            if not history or history[-1][1] != amount:
                history.append((at, amount))
        elif event.kind == POD and event.object["spec"].get("nodeName"):
            self._bound_at.setdefault(event.uid, at)
        elif event.kind == JOB and _is_new(event, world) and UID_LABEL in labels(event.object):
            self._judge(event, world)

    def _judge(self, event: Event, world: World) -> None:
        job, resource = event.object, self.limits.resource
        wanted = gpus_of_job(job, resource)
        nodes = pinned_nodes(job)
        if not wanted:
            return
        if len(nodes) != 1:
            names = ", ".join(sorted(nodes)) or "no node"
            self.report("a", f"Job {name_of(job)}", f"must be pinned to one node, names {names}")
            return
        node = nodes.pop()
        room = self._room(node, event.at)
        charges = self._charges(node, event, world)
        own = offer_uid_of(JOB, job)
        others = {key: amount for key, amount in charges.items() if key != own}
        booked = sum(others.values())
        # An offer is charged once: what its own earlier Job or pods still hold there counts by its maximum.
        mine = max(wanted, charges.get(str(own), 0))
        if booked + mine > room:
            listed = ", ".join(f"{key} holds {amount}" for key, amount in sorted(others.items())) or "nothing else"
            self.report(
                "a",
                f"Job {name_of(job)}",
                f"asks {wanted} {resource} on {node}, which offers {room} with {booked} charged ({listed})",
            )

    def _room(self, node: str, at: float) -> int:
        """Return the most that the node offered within the lag: a loss takes time to become known."""
        history = self._offered.get(node, [])
        recent = [amount for when, amount in history if at - when < self.limits.lag]
        older = [amount for when, amount in history if at - when >= self.limits.lag]
        return max([*older[-1:], *recent], default=0)

    def _charges(self, node: str, event: Event, world: World) -> dict[str, int]:
        resource = self.limits.resource
        by_jobs: dict[str, int] = {}
        by_pods: dict[str, int] = {}
        for job in world.objects[JOB].values():
            owner = offer_uid_of(JOB, job)
            over = job_is_over(job) or has_spent_its_pod(job, world.objects[POD].values())
            if owner and not over and node in pinned_nodes(job):
                by_jobs[owner] = max(by_jobs.get(owner, 0), gpus_of_job(job, resource))
        for uid, pod in world.objects[POD].items():
            if pod["spec"].get("nodeName") != node or pod_is_over(pod):
                continue
            owner = offer_uid_of(POD, pod)
            if owner is None and event.at - self._bound_at[uid] < self.limits.lag:
                continue
            key = owner or f"pod {name_of(pod)}"
            by_pods[key] = by_pods.get(key, 0) + gpus_of_pod_spec(pod["spec"], resource)
        charges = {key: max(by_jobs.get(key, 0), by_pods.get(key, 0)) for key in by_jobs.keys() | by_pods.keys()}
        return {key: amount for key, amount in charges.items() if amount}


def verdict(offer: Object) -> str:
    """Return ``admitted``, ``rejected`` or ``open``."""
    ended = condition(offer, "Finished")
    if ended.get("status") == "True" and ended.get("reason") in ("Rejected", "Expired"):
        return "rejected"
    return "open" if admission(offer) is None else "admitted"


def _commitment(offer: Object) -> str:
    """Return what must not change while an admission stands; a deadline may be added later, never moved."""
    made = admission(offer) or {}
    return json.dumps({key: value for key, value in made.items() if key != "deadline"}, sort_keys=True)


@dataclass
class VerdictsStand(Rule):
    """Rule b: a rejection is final, and an admission ends only by an openly written revocation."""

    def observe(self, event: Event, world: World) -> None:
        old, new = _changed_from(event, world), event.object
        if old is None:
            return
        before, after = verdict(old), verdict(new)
        subject = f"TaskOffer {name_of(new)} ({event.uid})"
        if before == "rejected" and after != "rejected":
            self.report("b", subject, f"was rejected and is {after} at revision {event.revision}")
        elif before == "admitted" and after == "rejected" and not is_true(new, "Evicted"):
            self.report("b", subject, f"was admitted and is rejected at revision {event.revision}")
        elif before == after == "admitted":
            if _commitment(old) != _commitment(new):
                self.report(
                    "b",
                    subject,
                    f"admission {_commitment(old)} became {_commitment(new)} without a revocation",
                )
            deadlines = [(admission(one) or {}).get("deadline") for one in (old, new)]
            if deadlines[0] is not None and deadlines[0] != deadlines[1]:
                self.report("b", subject, f"deadline moved from {deadlines[0]} to {deadlines[1]}")


@dataclass
class EverythingHasItsCause(Rule):
    """Rule c: a TrainingJob follows from an admission in force, and a Job from its TrainingJob."""

    _admitted_until: dict[tuple[str, str], float] = field(default_factory=dict)
    _training_job_until: dict[tuple[str, str, str], float] = field(default_factory=dict)

    def observe(self, event: Event, world: World) -> None:
        if event.kind == OFFER:
            self._note_end_of_admission(event, world)
        elif event.kind == TRAINING_JOB and event.type == "DELETED":
            meta = event.object["metadata"]
            self._training_job_until[meta["namespace"], meta["name"], self._owner(event)] = event.at
        elif event.kind == TRAINING_JOB and _is_new(event, world):
            self._judge_training_job(event, world)
        elif event.kind == JOB and _is_new(event, world) and UID_LABEL in labels(event.object):
            self._judge_job(event, world)

    @staticmethod
    def _owner(event: Event) -> str:
        return str(offer_uid_of(event.kind, event.object))

    def _note_end_of_admission(self, event: Event, world: World) -> None:
        old = world.objects[OFFER].get(event.uid)
        before = None if old is None else admission(old)
        after = None if event.type == "DELETED" else admission(event.object)
        if before is not None and (after is None or after["jobName"] != before["jobName"]):
            self._admitted_until[event.uid, before["jobName"]] = event.at

    def _judge_training_job(self, event: Event, world: World) -> None:
        owner, name = self._owner(event), event.object["metadata"]["name"]
        offer = world.objects[OFFER].get(owner)
        in_force = admission(offer) if offer is not None else None
        if in_force is not None and in_force["jobName"] == name:
            return
        if event.at - self._admitted_until.get((owner, name), float("-inf")) < self.limits.lag:
            return
        said = "does not exist" if offer is None else f"has the admission {json.dumps(in_force)}"
        self.report("c", f"TrainingJob {name_of(event.object)}", f"has no admission: its TaskOffer {owner} {said}")

    def _judge_job(self, event: Event, world: World) -> None:
        owner, namespace = self._owner(event), event.object["metadata"]["namespace"]
        name = labels(event.object).get(JOB_LABEL, "")
        if any(
            (job["metadata"]["namespace"], job["metadata"]["name"]) == (namespace, name)
            for job in world.of_offer(TRAINING_JOB, owner)
        ):
            return
        gone = self._training_job_until.get((namespace, name, owner), float("-inf"))
        if event.at - gone >= self.limits.lag:
            self.report(
                "c",
                f"Job {name_of(event.object)}",
                f"has no TrainingJob: none is named {name or '(no label)'} for TaskOffer {owner}",
            )


@dataclass
class Lasting(Rule):
    """A rule about a state that must not last longer than the bound, for each offer."""

    letter: str = ""
    _since: dict[str, tuple[float, str, str]] = field(default_factory=dict)

    def observe(self, event: Event, world: World) -> None:
        """Do nothing: these rules judge the world after an event."""

    @abstractmethod
    def wrong(self, offer_uid: str, world: World) -> tuple[str, str] | None:
        """Return subject and description of the wrong state that the offer is in, or None."""

    def settle(self, event: Event, world: World) -> None:
        owner = offer_uid_of(event.kind, event.object)
        if owner is None:
            return
        state = self.wrong(owner, world)
        known = self._since.get(owner)
        if known is not None and (state is None or state != known[1:]):
            self._close(owner, event.at)
        if state is not None:
            self._since.setdefault(owner, (event.at, *state))

    def finish(self, now: float) -> None:
        for owner in list(self._since):
            self._close(owner, now)

    def _close(self, owner: str, now: float) -> None:
        start, subject, text = self._since.pop(owner)
        lasted = self.limits.elapsed(start, now)
        if lasted > self.limits.bound:
            self.report(self.letter, subject, f"{text} for {lasted:.1f} s (bound {self.limits.bound:g} s)")


@dataclass
class AdmissionsAreCarriedOut(Lasting):
    """Rule d: an admission of a living, active offer gets its TrainingJob and its first Job.

    The first Job is that of the first attempt, or the one that fetches model and data before it. The latter has no GPU
    and no offer's UID on it.
    """

    letter: str = "d"
    _had_job: set[tuple[str, str]] = field(default_factory=set)
    _fetched: set[str] = field(default_factory=set)

    def observe(self, event: Event, world: World) -> None:
        if event.kind == JOB and (name := labels(event.object).get(JOB_LABEL)):
            if labels(event.object).get(STEP_LABEL) == "prepare":
                self._fetched.add(name)
            else:
                self._had_job.add((str(offer_uid_of(JOB, event.object)), name))

    def wrong(self, offer_uid: str, world: World) -> tuple[str, str] | None:
        offer = world.objects[OFFER].get(offer_uid)
        made = admission(offer) if offer is not None else None
        if offer is None or made is None or not wants_to_run(offer):
            return None
        subject, name = f"TaskOffer {name_of(offer)} ({offer_uid})", made["jobName"]
        jobs = [j for j in world.of_offer(TRAINING_JOB, offer_uid) if j["metadata"]["name"] == name]
        if not jobs:
            return subject, f"is admitted without its TrainingJob {name}"
        over = any(is_true(jobs[0], kind) for kind in ("Complete", "Failed"))
        if not over and (offer_uid, name) not in self._had_job and name not in self._fetched:
            return subject, f"is admitted without a Job of its TrainingJob {name}"
        return None


@dataclass
class NothingIsChargedForNothing(Lasting):
    """Rule e: once an offer is finished or gone and no pod is left, no unfinished Job holds GPUs for it."""

    letter: str = "e"

    def wrong(self, offer_uid: str, world: World) -> tuple[str, str] | None:
        offer = world.objects[OFFER].get(offer_uid)
        if offer is not None and not is_true(offer, "Finished") and "deletionTimestamp" not in offer["metadata"]:
            return None
        if any(not pod_is_over(pod) for pod in world.of_offer(POD, offer_uid)):
            return None
        held = sorted(
            (name_of(job), gpus_of_job(job, self.limits.resource))
            for job in world.of_offer(JOB, offer_uid)
            if not job_is_over(job) and gpus_of_job(job, self.limits.resource)
        )
        if not held:
            return None
        name, gpus = held[0]
        why = "gone" if offer is None else "finished"
        return (
            f"Job {name}",
            f"holds {gpus} {self.limits.resource} without a pod, its offer {offer_uid} is {why}",
        )


@dataclass
class OneWritePerDecision(Rule):
    """Rule f: until an offer is admitted or rejected, each status write changes its verdict or its reason."""

    def observe(self, event: Event, world: World) -> None:
        old = _changed_from(event, world)
        if old is None or verdict(old) != "open" or old.get("status") == event.object.get("status"):
            return
        if self._answer(old) == self._answer(event.object):
            answer = ", ".join(map(str, self._answer(event.object)))
            self.report(
                "f",
                f"TaskOffer {name_of(event.object)} ({event.uid})",
                f"status was written again at revision {event.revision} with the same answer ({answer})",
            )

    @staticmethod
    def _answer(offer: Object) -> tuple[str, object, object]:
        said = condition(offer, "Admitted")
        return verdict(offer), said.get("status"), said.get("reason")


RULES: tuple[type[Rule], ...] = (
    JobFits,
    VerdictsStand,
    EverythingHasItsCause,
    AdmissionsAreCarriedOut,
    NothingIsChargedForNothing,
    OneWritePerDecision,
)


def audit(events: Iterable[Event], now: float, limits: Limits | None = None) -> list[Violation]:
    """Judge a history.

    Args:
        events: What the watches delivered, in any order.
        now: When the audit ends, on the clock of the events.
        limits: How strictly time is judged.
    """
    rules = [kind(limits or Limits()) for kind in RULES]
    world = World()
    for event in in_order(events):
        for rule in rules:
            rule.observe(event, world)
        world.apply(event)
        for rule in rules:
            rule.settle(event, world)
    for rule in rules:
        rule.finish(now)
    return [violation for rule in rules for violation in rule.found]
