"""The auditor's rules on histories made by hand: each violation is found, and what is allowed is not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import aiohttp
import pytest

from auditor import Gap, Watch, unexcused
from auditor_history import JOB, NODE, OFFER, POD, TRAINING_JOB, Event, gpus_of_pod_spec, pinned_nodes
from auditor_judgement import Limits, Violation
from auditor_rules import audit
from builders import make_admission, make_condition, make_job, make_offer, make_training_job, merged, stored

GPU = "nvidia.com/gpu"
Object = dict[str, Any]


class Story:
    """Tells a history: each call is one event, one revision and, unless said otherwise, 0.1 s later."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.clock = 100.0
        self._objects: dict[tuple[str, str], Object] = {}

    def wait(self, seconds: float) -> None:
        self.clock += seconds

    def put(self, kind: str, obj: Object, *, listed: bool = False) -> Object:
        uid = obj["metadata"]["uid"]
        type_ = "MODIFIED" if (kind, uid) in self._objects else "ADDED"
        self._objects[kind, uid] = obj
        self._note("LISTED" if listed else type_, kind, obj, listed=listed)
        return obj

    def change(self, kind: str, uid: str, **status: Any) -> Object:
        obj = copy.deepcopy(self._objects[kind, uid])
        obj["status"] = {**obj.get("status", {}), **status}
        for key in [key for key, value in status.items() if value is None]:
            del obj["status"][key]
        return self.put(kind, obj)

    def delete(self, kind: str, uid: str) -> None:
        self._note("DELETED", kind, self._objects.pop((kind, uid)), listed=False)

    def _note(self, type_: str, kind: str, obj: Object, *, listed: bool) -> None:
        self.clock += 0.1
        version = len(self.events) + 1
        seen = merged(obj, {"metadata": {"resourceVersion": str(version)}})
        self.events.append(Event(kind, type_, seen, self.clock, 0 if listed else version))

    # The words of the story.

    def node(self, name: str = "node-a", gpus: int = 8, *, listed: bool = True) -> None:
        status = {"allocatable": {GPU: str(gpus)}}
        meta = {"name": name, "uid": f"uid-{name}"}
        self.put(NODE, {"metadata": meta, "status": status}, listed=listed)

    def offer(self, name: str) -> None:
        self.put(OFFER, stored(make_offer(name=name), uid=name))

    def admit(self, name: str, gpus: int = 8, node: str = "node-a", **kwargs: Any) -> None:
        made = make_admission(job=f"{name}-job", gpus=gpus, node=node, **kwargs)
        self.change(OFFER, name, admission=made, conditions=[make_condition("Admitted", True, "Admitted")])

    def revoke(self, name: str) -> None:
        conditions = [
            make_condition("Admitted", False, "StartTimeout"),
            make_condition("Evicted", True, "StartTimeout"),
        ]
        self.change(OFFER, name, admission=None, conditions=conditions)

    def reject(self, name: str, reason: str = "ScoreTooLow") -> None:
        conditions = [make_condition("Admitted", False, reason), make_condition("Finished", True, "Rejected")]
        self.change(OFFER, name, conditions=conditions)

    def wait_for(self, name: str, reason: str = "WaitingForCapacity", message: str = "") -> None:
        self.change(OFFER, name, conditions=[make_condition("Admitted", False, reason, message)])

    def end(self, name: str) -> None:
        conditions = [
            make_condition("Admitted", True, "Admitted"),
            make_condition("Finished", True, "Succeeded"),
        ]
        self.change(OFFER, name, conditions=conditions)

    def training_job(self, name: str) -> None:
        made = make_training_job(name=f"{name}-job", offer=name, offer_uid=name)
        self.put(TRAINING_JOB, stored(made, uid=f"tj-{name}"))

    def job(self, name: str, gpus: int = 8, node: str | None = "node-a", attempt: int = 1) -> None:
        labels = {"taskoffer.dev/offer-uid": name, "taskoffer.dev/job": f"{name}-job"}
        meta = {"name": f"{name}-job-{attempt}", "namespace": "default", "uid": f"job-{name}-{attempt}"}
        template = {"spec": {"containers": [container(gpus)], "affinity": {} if node is None else pinned(node)}}
        made = {"metadata": {**meta, "labels": labels}, "spec": {"template": template}}
        self.put(JOB, made)

    def job_ends(self, name: str, attempt: int = 1) -> None:
        self.change(JOB, f"job-{name}-{attempt}", conditions=[make_condition("Complete", True, "Done")])

    def pod(self, name: str, gpus: int = 8, node: str = "node-a", owner: str | None = None, **kw: Any) -> None:
        labels = {} if owner is None else {"taskoffer.dev/offer-uid": owner}
        meta = {"name": name, "namespace": "default", "uid": f"pod-{name}", "labels": labels}
        self.put(POD, {"metadata": meta, "spec": {"nodeName": node, "containers": [container(gpus)]}}, **kw)

    def pod_ends(self, name: str) -> None:
        self.change(POD, f"pod-{name}", phase="Succeeded")

    def run(self, name: str, gpus: int = 8, node: str = "node-a") -> None:
        """Tell a whole admission up to a running pod."""
        self.offer(name)
        self.admit(name, gpus, node)
        self.training_job(name)
        self.job(name, gpus, node)
        self.pod(name, gpus, node, owner=name)

    def run_once(self, name: str, **spec: Any) -> None:
        """Tell a whole admission whose Job owns its pod and has these fields."""
        self.run(name)
        uid = f"job-{name}-1"
        job, pod = self._objects[JOB, uid], self._objects[POD, f"pod-{name}"]
        self.put(JOB, {**job, "spec": {**job["spec"], **spec}})
        owners = [{"kind": "Job", "name": job["metadata"]["name"], "uid": uid}]
        self.put(POD, {**pod, "metadata": {**pod["metadata"], "ownerReferences": owners}})

    def judged(self, **limits: Any) -> list[Violation]:
        return audit(self.events, self.clock, Limits(**limits))


def container(gpus: int) -> Object:
    return {"name": "main", "resources": {"limits": {GPU: str(gpus)}}}


def pinned(node: str) -> Object:
    term = {"matchFields": [{"key": "metadata.name", "operator": "In", "values": [node]}]}
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}}


# Histories that are in order.


def whole_life(story: Story) -> None:
    story.run("one")
    story.pod_ends("one")
    story.job_ends("one")
    story.end("one")
    story.run("two")


def waits_then_is_admitted(story: Story) -> None:
    story.offer("one")
    story.wait_for("one", "InventoryNotReady")
    story.wait_for("one", "WaitingForCapacity")
    story.admit("one")
    story.training_job("one")
    story.job("one")


def revoked_and_admitted_elsewhere(story: Story) -> None:
    story.node("node-b")
    story.offer("one")
    story.admit("one")
    story.revoke("one")
    story.admit("one", node="node-b")
    story.training_job("one")
    story.job("one", node="node-b")


def next_attempt_of_the_same_offer_counts_once(story: Story) -> None:
    story.run("one")
    story.job("one", attempt=2)


def gpus_of_an_ended_pod_are_free(story: Story) -> None:
    story.run("one")
    story.pod_ends("one")
    story.job_ends("one")
    story.run("two")
    story.end("one")


def a_job_that_has_had_its_only_pod(story: Story) -> None:
    """Its own status says so later; it makes no other one."""
    story.run_once("one", completions=1, backoffLimit=0)
    story.pod_ends("one")
    story.end("one")
    story.run("two")


def a_foreign_pod_that_nobody_could_know(story: Story) -> None:
    story.offer("one")
    story.admit("one")
    story.training_job("one")
    story.pod("foreign", 4)
    story.job("one")


def a_node_that_has_just_shrunk(story: Story) -> None:
    story.offer("one")
    story.admit("one")
    story.training_job("one")
    story.node("node-a", 4, listed=False)
    story.job("one")


def an_offer_deleted_under_the_operator(story: Story) -> None:
    story.offer("one")
    story.admit("one")
    story.delete(OFFER, "one")
    story.training_job("one")
    story.delete(TRAINING_JOB, "tj-one")
    story.job("one")
    story.delete(JOB, "job-one-1")


def a_deleted_offer_whose_pod_runs_on(story: Story) -> None:
    story.run("one")
    story.delete(OFFER, "one")
    story.delete(TRAINING_JOB, "tj-one")
    story.wait(60)
    story.pod_ends("one")
    story.delete(JOB, "job-one-1")


def a_paused_offer_needs_no_job(story: Story) -> None:
    story.offer("one")
    story.admit("one")
    offer = copy.deepcopy(story.events[-1].object)
    offer["spec"]["active"] = False
    story.put(OFFER, offer)
    story.wait(60)


def a_deadline_that_is_stamped_later(story: Story) -> None:
    story.run("one")
    late = make_admission(job="one-job", gpus=8, deadline="2026-01-31T13:00:00Z")
    story.change(OFFER, "one", admission=late)


def what_was_there_before_is_not_judged(story: Story) -> None:
    story.put(TRAINING_JOB, stored(make_training_job(name="old-job", offer_uid="old"), uid="tj-old"), listed=True)


def a_job_without_gpus_needs_no_node(story: Story) -> None:
    story.offer("one")
    story.admit("one")
    story.training_job("one")
    story.job("one", gpus=0, node=None)


CLEAN = [
    whole_life,
    waits_then_is_admitted,
    revoked_and_admitted_elsewhere,
    next_attempt_of_the_same_offer_counts_once,
    gpus_of_an_ended_pod_are_free,
    a_job_that_has_had_its_only_pod,
    a_foreign_pod_that_nobody_could_know,
    a_node_that_has_just_shrunk,
    an_offer_deleted_under_the_operator,
    a_deleted_offer_whose_pod_runs_on,
    a_paused_offer_needs_no_job,
    a_deadline_that_is_stamped_later,
    what_was_there_before_is_not_judged,
    a_job_without_gpus_needs_no_node,
]


# Histories that are not.


def two_jobs_on_the_same_gpus(story: Story) -> None:
    story.run("one")
    story.run("two", 1)


def a_job_beside_a_foreign_pod(story: Story) -> None:
    story.pod("foreign", 1)
    story.wait(3)
    story.run("one")


def a_job_right_after_start_beside_an_older_foreign_pod(story: Story) -> None:
    story.pod("foreign", 1, listed=True)
    story.run("one")


def a_job_while_the_last_pod_still_ends(story: Story) -> None:
    story.run("one")
    story.delete(OFFER, "one")
    story.delete(JOB, "job-one-1")
    story.delete(TRAINING_JOB, "tj-one")
    story.run("two")


def a_job_on_a_node_that_does_not_exist(story: Story) -> None:
    story.run("one", node="node-z")


def a_job_on_a_node_that_shrank_long_ago(story: Story) -> None:
    story.node("node-a", 4, listed=False)
    story.wait(3)
    story.run("one")


def a_job_that_is_not_pinned(story: Story) -> None:
    story.offer("one")
    story.admit("one")
    story.training_job("one")
    story.job("one", node=None)


def admitted_then_rejected(story: Story) -> None:
    story.run("one")
    story.reject("one")


def rejected_then_admitted(story: Story) -> None:
    story.offer("one")
    story.reject("one")
    story.admit("one")
    story.training_job("one")
    story.job("one")


def rejected_then_waiting(story: Story) -> None:
    story.offer("one")
    story.reject("one")
    story.wait_for("one")


def admitted_twice(story: Story) -> None:
    story.node("node-b")
    story.run("one")
    story.admit("one", node="node-b")


def a_deadline_that_moves(story: Story) -> None:
    story.offer("one")
    story.admit("one", deadline="2026-01-31T13:00:00Z")
    story.training_job("one")
    story.job("one")
    story.admit("one", deadline="2026-01-31T14:00:00Z")


def a_training_job_of_a_waiting_offer(story: Story) -> None:
    story.offer("one")
    story.wait_for("one")
    story.training_job("one")


def a_training_job_after_a_revocation_long_ago(story: Story) -> None:
    story.offer("one")
    story.admit("one")
    story.revoke("one")
    story.wait(3)
    story.training_job("one")


def a_training_job_of_an_older_offer_of_that_name(story: Story) -> None:
    story.offer("one")
    story.admit("one")
    story.put(TRAINING_JOB, stored(make_training_job(name="one-job", offer="one", offer_uid="another"), uid="tj-x"))


def a_job_without_training_job(story: Story) -> None:
    story.offer("one")
    story.admit("one")
    story.job("one")
    story.training_job("one")


def an_admission_that_nobody_carries_out(story: Story) -> None:
    story.offer("one")
    story.admit("one")
    story.wait(11)


def an_admission_that_was_late(story: Story) -> None:
    story.offer("one")
    story.admit("one")
    story.wait(11)
    story.training_job("one")
    story.job("one")


def a_training_job_without_job(story: Story) -> None:
    story.offer("one")
    story.admit("one")
    story.training_job("one")
    story.wait(11)


def a_finished_offer_keeps_its_gpus(story: Story) -> None:
    story.run("one")
    story.pod_ends("one")
    story.end("one")
    story.wait(11)


def a_deleted_offer_keeps_its_gpus(story: Story) -> None:
    story.offer("one")
    story.admit("one")
    story.training_job("one")
    story.job("one")
    story.delete(OFFER, "one")
    story.wait(11)


def the_same_answer_twice(story: Story) -> None:
    story.offer("one")
    story.wait_for("one", message="3 of 8 are free")
    story.wait_for("one", message="4 of 8 are free")


def a_score_before_the_verdict(story: Story) -> None:
    story.offer("one")
    story.change(OFFER, "one", score="0.75")
    story.admit("one")
    story.training_job("one")
    story.job("one")


def a_job_that_may_make_another_pod(story: Story) -> None:
    story.run_once("one", completions=1, backoffLimit=3)
    story.pod_ends("one")
    story.end("one")
    story.run("two")


BROKEN: list[tuple[Callable[[Story], None], str, str]] = [
    (
        two_jobs_on_the_same_gpus,
        "a",
        "asks 1 nvidia.com/gpu on node-a, which offers 8 with 8 charged (one holds 8)",
    ),
    (a_job_beside_a_foreign_pod, "a", "pod default/foreign holds 1"),
    (a_job_right_after_start_beside_an_older_foreign_pod, "a", "pod default/foreign holds 1"),
    (a_job_while_the_last_pod_still_ends, "a", "one holds 8"),
    (a_job_that_may_make_another_pod, "a", "one holds 8"),
    (a_job_on_a_node_that_does_not_exist, "a", "node-z, which offers 0"),
    (a_job_on_a_node_that_shrank_long_ago, "a", "which offers 4"),
    (a_job_that_is_not_pinned, "a", "names no node"),
    (admitted_then_rejected, "b", "was admitted and is rejected"),
    (rejected_then_admitted, "b", "was rejected and is admitted"),
    (rejected_then_waiting, "b", "was rejected and is open"),
    (admitted_twice, "b", "without a revocation"),
    (a_deadline_that_moves, "b", "deadline moved"),
    (a_training_job_of_a_waiting_offer, "c", "has no admission"),
    (a_training_job_after_a_revocation_long_ago, "c", "has no admission"),
    (a_training_job_of_an_older_offer_of_that_name, "c", "another does not exist"),
    (a_job_without_training_job, "c", "none is named one-job"),
    (an_admission_that_nobody_carries_out, "d", "without its TrainingJob one-job for 11.0 s"),
    (an_admission_that_was_late, "d", "without its TrainingJob one-job for 11.1 s"),
    (a_training_job_without_job, "d", "without a Job of its TrainingJob one-job"),
    (a_finished_offer_keeps_its_gpus, "e", "its offer one is finished"),
    (a_deleted_offer_keeps_its_gpus, "e", "its offer one is gone"),
    (the_same_answer_twice, "f", "same answer (open, False, WaitingForCapacity)"),
    (a_score_before_the_verdict, "f", "same answer (open, None, None)"),
]


@pytest.mark.parametrize("tell", CLEAN, ids=lambda tell: tell.__name__)
def test_a_history_in_order_is_clean(tell: Callable[[Story], None]) -> None:
    story = Story()
    story.node()
    tell(story)
    assert story.judged() == []


@pytest.mark.parametrize(("tell", "rule", "said"), BROKEN, ids=[tell.__name__ for tell, _, _ in BROKEN])
def test_a_broken_history_is_found_by_its_rule_alone(tell: Callable[[Story], None], rule: str, said: str) -> None:
    story = Story()
    story.node()
    tell(story)
    found = story.judged()
    assert [violation.rule for violation in found] == [rule]
    assert said in str(found[0])


def test_the_order_in_which_watches_deliver_does_not_matter() -> None:
    story = Story()
    story.node()
    whole_life(story)
    story.events.reverse()
    assert story.judged() == []


def test_events_that_come_twice_count_once() -> None:
    story = Story()
    story.node()
    waits_then_is_admitted(story)
    story.events += story.events
    assert story.judged() == []


def test_time_that_is_excused_does_not_count_towards_a_bound() -> None:
    story = Story()
    story.node()
    an_admission_that_nobody_carries_out(story)
    end = story.clock
    assert story.judged(excused=[(end - 5, end)]) == []
    assert [violation.rule for violation in story.judged(excused=[(end - 0.5, end)])] == ["d"]


def test_a_bound_can_be_set() -> None:
    story = Story()
    story.node()
    an_admission_that_nobody_carries_out(story)
    assert story.judged(bound=20) == []


# History that could not be watched


@pytest.fixture
def relisted() -> Callable[[str, list[Object], list[Object]], tuple[list[Event], list[Gap]]]:
    """List a kind at revision 10, lose the watch, and list it again at revision 20."""

    def run(kind: str, before: list[Object], after: list[Object]) -> tuple[list[Event], list[Gap]]:
        events: list[Event] = []
        gaps: list[Gap] = []
        watch = Watch(kind, cast(aiohttp.ClientSession, None), events, gaps)
        watch.take_list(before, 0, 10)
        watch.take_list(after, 10, 20)
        return events[len(before) :], gaps

    return run


def at_version(version: int, uid: str = "one", **kwargs: Any) -> Object:
    return stored(make_offer(**kwargs), uid=uid, resource_version=str(version))


Relisted = Callable[[str, list[Object], list[Object]], tuple[list[Event], list[Gap]]]


def test_a_lost_watch_in_which_nothing_happened_is_no_gap(relisted: Relisted) -> None:
    assert relisted(OFFER, [at_version(5)], [at_version(5)]) == ([], [])


@pytest.mark.parametrize(
    ("after", "type_"),
    [([at_version(15)], "LISTED"), ([], "DELETED"), ([at_version(5), at_version(15, uid="two")], "LISTED")],
    ids=["changed", "deleted", "created"],
)
def test_what_changed_unwatched_is_taken_in_and_noted_as_a_gap(
    relisted: Relisted, after: list[Object], type_: str
) -> None:
    events, gaps = relisted(OFFER, [at_version(5)], after)
    assert [(event.type, event.revision) for event in events] == [(type_, 10)]
    assert [gap.text for gap in gaps] == ["1 changes of TaskOffer between revisions 10 and 20 were not watched"]


def test_a_job_that_was_created_unwatched_is_judged_as_the_last_thing_that_happened(relisted: Relisted) -> None:
    events, _ = relisted(JOB, [], [stored(make_job(), resource_version="15")])
    assert [(event.type, event.revision) for event in events] == [("ADDED", 20)]


def test_gaps_are_accepted_in_excused_time_and_shortly_after_only() -> None:
    gaps = [Gap(at, str(at)) for at in (9.0, 10.0, 12.0, 16.9, 17.1)]
    assert [gap.at for gap in unexcused(gaps, [(10.0, 12.0)])] == [9.0, 17.1]


# Reading objects


@pytest.mark.parametrize(
    ("spec", "gpus"),
    [
        ({"containers": [container(2), container(1)]}, 3),
        ({"containers": [container(2)], "initContainers": [container(4)]}, 4),
        ({"containers": [container(2)], "initContainers": [{**container(1), "restartPolicy": "Always"}]}, 3),
        ({"containers": [{"name": "main"}]}, 0),
        ({"containers": [{"name": "main", "resources": {"requests": {GPU: 2}}}]}, 2),
    ],
)
def test_gpus_of_a_pod_are_counted_as_the_scheduler_does(spec: Object, gpus: int) -> None:
    assert gpus_of_pod_spec(spec, GPU) == gpus


def test_a_pin_by_host_name_label_is_understood() -> None:
    term = {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": ["node-b"]}]}
    affinity = pinned("node-a")
    affinity["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"] = [term]
    assert pinned_nodes({"spec": {"template": {"spec": {"affinity": affinity}}}}) == {"node-b"}
