"""A TrainingJob's next step, branch by branch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest

from builders import Object, make_admission, make_training_job, stored
from core_builders import NOW, at
from taskoffer.api.base import rfc3339
from taskoffer.api.contract import ExitCode, ProgressReport
from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.meta import Assignment
from taskoffer.api.v1alpha1.taskoffer import Admission
from taskoffer.api.v1alpha1.trainingjob import AttemptOutcome, Preemptor, TrainingJob, TrainingJobStatus
from taskoffer.decision.conditions import condition_of
from taskoffer.decision.job_facts import (
    DeleteJob,
    EnsureAttempt,
    JobFacts,
    JobPlan,
    JobView,
    NodeHealth,
    OfferEnd,
    OfferFacts,
    PodView,
    Refusal,
    SuspendJob,
)
from taskoffer.decision.lifecycle import step
from taskoffer.decision.trainer_words import PERMANENT_EXIT_CODES, parse_termination

NAME = "offer-0123abcd"
FIRST, SECOND = f"{NAME}-1", f"{NAME}-2"
READY = {"node-a": NodeHealth(True, NOW), "node-b": NodeHealth(True, NOW)}


def attempt(
    number: int = 1,
    *,
    outcome: str | None = None,
    created: float = 0,
    started: float | None = None,
    finished: float | None = None,
    deadline: float | None = 3600,
    node: str = "node-a",
    message: str | None = None,
    preempted_for: Object | None = None,
) -> Object:
    times = {"startedAt": started, "finishedAt": finished, "deadline": deadline}
    made: Object = {
        "jobName": f"{NAME}-{number}",
        "assignments": [{"nodeName": node, "resourceName": "nvidia.com/gpu", "count": 1}],
        "createdAt": rfc3339(at(created)),
        "outcome": outcome,
        "message": message,
        "preemptedFor": preempted_for,
        **{k: rfc3339(at(v)) for k, v in times.items() if v is not None},
    }
    return {k: v for k, v in made.items() if v is not None}


def job(
    attempts: Sequence[Object] = (),
    *,
    clock: str = "Absolute",
    conditions: Sequence[Object] = (),
    limits: Object | None = None,
    run: Object | None = None,
    **status: Any,
) -> TrainingJob:
    wire = make_training_job(
        name=NAME,
        spec={"run": {"clockMode": clock, "limits": {"nodeLostSeconds": 120, **(limits or {})}, **(run or {})}},
        status={"attempts": list(attempts), "conditions": list(conditions), **status},
    )
    return TrainingJob.model_validate(stored(wire, uid="tj-uid"))


def admitted(**fields: Any) -> OfferFacts:
    admission = make_admission(**{"deadline": rfc3339(at(3600)), **fields})
    return OfferFacts(active=True, admission=Admission.model_validate(admission), finished=False)


def batch(name: str = FIRST, *, created: float = 0, **fields: Any) -> JobView:
    return JobView(name, f"{name}-uid", **{"suspended": False, "finished": False, "created": at(created), **fields})


def pod(job_name: str = FIRST, *, name: str | None = None, started: float | None = None, **fields: Any) -> PodView:
    base = {"node": "node-a", "created": NOW, "terminal": False, "succeeded": False}
    made: dict[str, Any] = {**base, "started_at": None if started is None else at(started), **fields}
    return PodView(name or f"{job_name}-pod", f"{job_name}-pod-uid", job_name, **made)


def ended(code: int | None = 1, *, message: str = "", succeeded: bool = False, **fields: Any) -> PodView:
    return pod(
        started=5, terminal=True, succeeded=succeeded, exit_code=code, message=message, finished_at=at(60), **fields
    )


def look(
    made: TrainingJob,
    *,
    after: float = 10,
    offer: OfferFacts | None = None,
    jobs: Sequence[JobView] = (),
    pods: Sequence[PodView] = (),
    nodes: Mapping[str, NodeHealth] = READY,
    report: ProgressReport | None = None,
    moved: str | None = None,
    log: str | None = "",
    refusal: Refusal | None = None,
    preemptor: Preemptor | None = None,
) -> JobPlan:
    place = (Assignment(node_name=moved, resource_name="nvidia.com/gpu", count=1),) if moved else None
    return step(
        JobFacts(
            now=at(after),
            job=made,
            offer=offer or admitted(),
            jobs={j.name: j for j in jobs},
            pods=pods,
            nodes=nodes,
            report=report,
            moved_to=place,
            log_tail=log,
            refusal=refusal,
            preemptor=preemptor,
        )
    )


def status_of(made: JobPlan) -> TrainingJobStatus:
    assert made.status is not None
    return made.status


def said(made: JobPlan, kind: str) -> tuple[str, str] | None:
    return next(((c.status.value, c.reason) for c in status_of(made).conditions if c.type == kind), None)


def last_outcome(made: JobPlan) -> AttemptOutcome | None:
    return status_of(made).attempts[-1].outcome


# What has no job to do


def without_offer(
    made: TrainingJob, *, jobs: Sequence[JobView] = (), pods: Sequence[PodView] = (), after: float = 10
) -> JobPlan:
    by_name = {view.name: view for view in jobs}
    return step(JobFacts(now=at(after), job=made, offer=None, jobs=by_name, pods=pods, nodes=READY))


def test_a_job_whose_offer_is_gone_is_left_alone_when_nothing_came_of_it() -> None:
    assert without_offer(job()) == JobPlan()


@pytest.mark.parametrize("attempts", [[], [attempt()]], ids=["before its first status", "with its first status"])
def test_the_pods_of_a_job_whose_offer_is_gone_are_asked_to_stop(attempts: Sequence[Object]) -> None:
    made = without_offer(job(attempts), jobs=[batch()], pods=[pod(started=5)])
    assert made.actions == (SuspendJob(FIRST),)
    assert [notice.reason for notice in made.notices] == [Reason.STOPPING]
    running = status_of(made).conditions[0]
    assert (running.type, running.status, running.reason) == ("Running", "True", Reason.STOPPING)
    assert running.message == "its offer is gone; 1 pod(s) are asked to stop"


def test_a_job_whose_offer_is_gone_has_ended_once_its_pods_have() -> None:
    stopping = [batch(suspended=True)]
    waiting = without_offer(job([attempt(started=5)]), jobs=stopping, pods=[pod(started=5)])
    assert waiting.actions == ()
    assert last_outcome(waiting) is None
    made = without_offer(job([attempt(started=5)]), jobs=stopping, pods=[ended(143)], after=70)
    assert last_outcome(made) is AttemptOutcome.STOPPED
    assert {c.type: (c.status, c.reason) for c in status_of(made).conditions} == {
        "Running": ("False", Reason.CANCELLED),
        "Failed": ("True", Reason.CANCELLED),
    }
    over = job([attempt(outcome="Stopped", finished=70)], conditions=[c.to_wire() for c in status_of(made).conditions])
    assert without_offer(over, jobs=stopping, pods=[ended(143)]) == JobPlan()


def test_a_job_that_is_being_deleted_is_left_alone() -> None:
    wire = stored(make_training_job(name=NAME), uid="tj-uid", deleted="2026-01-31T12:00:00Z")
    assert look(TrainingJob.model_validate(wire)) == JobPlan()


@pytest.mark.parametrize(
    "offer",
    [OfferFacts(active=True, admission=None, finished=False), admitted(job="another-job")],
    ids=["an admission taken back", "an admission of another job"],
)
def test_without_its_admission_a_job_makes_no_first_attempt(offer: OfferFacts) -> None:
    assert look(job(), offer=offer) == JobPlan()


# Create, pend, run


def test_the_first_attempt_follows_from_the_admission() -> None:
    made = look(job())
    assert [a for a in made.actions if isinstance(a, EnsureAttempt) and a.number == 1]
    first = status_of(made).attempts[0]
    assert first.job_name == FIRST
    assert (first.created_at, first.deadline) == (NOW, at(3600))
    assert first.assignments[0].node_name == "node-a"
    assert said(made, "Running") == ("False", "Pending")
    assert status_of(made).steps[0].state == "Pending"
    assert made.wake_at == at(3600)


def test_a_job_without_pod_waits_for_its_start_timeout() -> None:
    made = look(job([attempt()]), jobs=[batch()])
    assert made.actions == ()
    assert made.wake_at == at(60)
    assert said(made, "Running") == ("False", "Pending")


def test_a_pod_that_waits_gives_its_reason() -> None:
    made = look(job([attempt()]), jobs=[batch()], pods=[pod(waiting="ErrImagePull no such image")])
    running = status_of(made).conditions[0]
    assert running.message == "attempt 1: ErrImagePull no such image"


def test_a_start_timeout_ends_the_attempt_and_removes_its_job() -> None:
    made = look(job([attempt()]), after=60, jobs=[batch()], pods=[pod(waiting="ErrImagePull")])
    assert made.actions == (DeleteJob(FIRST, f"{FIRST}-uid"),)
    assert last_outcome(made) is AttemptOutcome.START_TIMEOUT
    assert said(made, "Running") == ("False", "StartTimeout")
    assert made.notices[0].warning
    assert "within 60 s: ErrImagePull" in made.notices[0].message


def test_the_start_timeout_counts_from_the_jobs_creation_when_that_came_late() -> None:
    late = job([attempt()])
    assert look(late, after=1010, jobs=[batch(created=1000)]).actions == ()
    assert look(late, after=1060, jobs=[batch(created=1000)]).actions != ()


def no_quota(at_seconds: float, *, since: float = 0, job_name: str = FIRST) -> Refusal:
    return Refusal(job_name, "the API server refuses Job x: exceeded quota", at(since), at(at_seconds))


def test_a_refused_job_is_asked_for_again_after_a_pause_and_said_in_the_servers_words() -> None:
    waits = look(job(), after=12, refusal=no_quota(10))
    assert waits.actions == ()
    assert waits.wake_at == at(15)
    assert said(waits, "Running") == ("False", Reason.JOB_REFUSED)
    running = condition_of(status_of(waits).conditions, "Running")
    assert running is not None
    assert running.message == "attempt 1: the API server refuses Job x: exceeded quota"
    again = look(job(), after=15, refusal=no_quota(10))
    assert [type(action) for action in again.actions] == [EnsureAttempt]


def test_a_job_that_is_refused_for_as_long_as_a_start_may_last_ends_the_attempt() -> None:
    limits = {"startTimeoutSeconds": 60, "maxAttempts": 2}
    asked = look(job(limits=limits), after=59, refusal=no_quota(57))
    assert last_outcome(asked) is None
    assert asked.wake_at == at(60)
    made = look(job(limits=limits), after=60, refusal=no_quota(50))
    assert last_outcome(made) is AttemptOutcome.START_TIMEOUT
    assert "no Job within 60 s: the API server refuses Job x" in (status_of(made).attempts[-1].message or "")


@pytest.mark.parametrize(("times", "pause"), [(1, 5), (2, 10), (3, 20), (4, 40), (9, 40)])
def test_the_pause_before_a_refused_job_is_asked_for_again_grows(times: int, pause: int) -> None:
    refusal = replace(no_quota(100, since=100), times=times)
    assert look(job(), after=100, refusal=refusal).wake_at == at(100 + pause)


REFUSED_BEFORE = {
    "type": "Running",
    "status": "False",
    "reason": "JobRefused",
    "message": "attempt 1: no",
    "lastTransitionTime": rfc3339(at(1)),
}


def test_what_a_leader_before_was_refused_counts_and_is_not_told_again_in_other_words() -> None:
    first = look(job(conditions=[REFUSED_BEFORE]), after=50)
    assert [type(action) for action in first.actions] == [EnsureAttempt]
    assert first.status is None or condition_of(first.status.conditions, "Running").message == "attempt 1: no"  # type: ignore[union-attr]
    limits = {"startTimeoutSeconds": 60}
    again = look(job(conditions=[REFUSED_BEFORE], limits=limits), after=61, refusal=no_quota(61, since=61))
    assert last_outcome(again) is AttemptOutcome.START_TIMEOUT


def test_the_time_for_a_refused_job_counts_from_the_first_refusal_when_that_came_late() -> None:
    made = look(job(limits={"startTimeoutSeconds": 60}), after=1000, refusal=no_quota(990, since=990))
    assert last_outcome(made) is None


def test_a_refusal_of_an_earlier_attempt_does_not_hold_the_next_one_back() -> None:
    made = look(job([attempt(1, outcome="Failed", finished=5), attempt(2)]), refusal=no_quota(9))
    assert [type(action) for action in made.actions] == [EnsureAttempt]


def test_a_started_container_is_stamped_once() -> None:
    made = look(job([attempt()]), jobs=[batch()], pods=[pod(started=7)])
    assert status_of(made).attempts[0].started_at == at(7)
    assert said(made, "Running") == ("True", "Running")
    assert [n.reason for n in made.notices] == [Reason.RUNNING]
    again = look(job(status_of(made).to_wire()["attempts"]), after=20, jobs=[batch()], pods=[pod(started=8)])
    assert status_of(again).attempts[0].started_at == at(7)
    assert again.notices == ()


def test_a_plan_that_is_applied_leads_to_nothing_more() -> None:
    made = look(job([attempt()]), jobs=[batch()], pods=[pod(started=7)])
    applied = replace_status(job(), status_of(made))
    again = look(applied, jobs=[batch()], pods=[pod(started=7)])
    assert again.status is None
    assert (again.actions, again.notices) == ((), ())


def replace_status(made: TrainingJob, status: TrainingJobStatus) -> TrainingJob:
    return made.model_copy(update={"status": TrainingJobStatus.model_validate(status.to_wire())})


@pytest.mark.parametrize(
    ("spec_deadline", "stamped"),
    [(None, 7 + 3600), (10_000, 7 + 3600), (100, 100)],
    ids=["no bound", "a later bound", "an earlier bound"],
)
def test_a_training_clock_stamps_the_deadline_when_the_container_starts(
    spec_deadline: float | None, stamped: float
) -> None:
    made = look(job([attempt(deadline=spec_deadline)], clock="Training"), jobs=[batch()], pods=[pod(started=7)])
    assert status_of(made).attempts[0].deadline == at(stamped)


def test_an_absolute_clock_keeps_the_admissions_deadline() -> None:
    made = look(job([attempt()]), jobs=[batch()], pods=[pod(started=7)])
    assert status_of(made).attempts[0].deadline == at(3600)


# Cancel and deadline


@pytest.mark.parametrize("offer", [replace(admitted(), active=False), replace(admitted(), finished=True)])
def test_a_cancelled_job_asks_its_pods_to_stop_and_waits_for_them(offer: OfferFacts) -> None:
    running = job([attempt(started=5)])
    made = look(running, offer=offer, jobs=[batch()], pods=[pod(started=5)])
    assert made.actions == (SuspendJob(FIRST),)
    assert said(made, "Running") == ("True", "Stopping")
    assert said(made, "Failed") is None
    asked = look(running, offer=offer, jobs=[batch(suspended=True)], pods=[pod(started=5)])
    assert asked.actions == ()


def test_a_cancelled_job_ends_when_its_last_pod_has_ended() -> None:
    offer = replace(admitted(), active=False)
    made = look(job([attempt(started=5)]), offer=offer, jobs=[batch(suspended=True)], pods=[ended(143)])
    assert said(made, "Failed") == ("True", "Cancelled")
    assert last_outcome(made) is AttemptOutcome.STOPPED
    assert made.notices[-1].reason is Reason.CANCELLED
    assert not made.notices[-1].warning


def test_a_pod_of_an_earlier_attempt_keeps_a_cancelled_job_from_ending() -> None:
    made = look(
        job([attempt(outcome="NodeLost", finished=5), attempt(2, created=6)]),
        offer=replace(admitted(), active=False),
        jobs=[batch(SECOND, suspended=True)],
        pods=[pod(FIRST)],
    )
    assert said(made, "Failed") is None


LOST = {"node-a": NodeHealth(False, at(1000)), "node-b": NodeHealth(True, NOW)}
STOPPED_WITH_A_POD: dict[str, tuple[float, Object, Mapping[str, NodeHealth], str | None]] = {
    # After so many seconds, with this attempt and these nodes: how does the cancelled job stand?
    "its node has just gone away": (1100, attempt(started=5), LOST, None),
    "its node is away for too long": (1120, attempt(started=5), LOST, "NodeLost"),
    "it was given up with its node": (1001, attempt(outcome="NodeLost"), LOST, "NodeLost"),
    "its node is gone, and Kubernetes removes the pod": (1120, attempt(started=5), {}, None),
    "it was given up with a node that is gone": (1001, attempt(outcome="NodeLost"), {}, "NodeLost"),
    "its node has come back": (1001, attempt(outcome="NodeLost"), READY, None),
}


@pytest.mark.parametrize("case", STOPPED_WITH_A_POD)
def test_a_job_that_stops_does_not_wait_for_a_pod_that_is_lost_with_its_node(case: str) -> None:
    after, made, nodes, outcome = STOPPED_WITH_A_POD[case]
    offer = replace(admitted(), active=False)
    plan = look(job([made]), after=after, offer=offer, pods=[pod(started=5)], nodes=nodes)
    if outcome is None:
        assert said(plan, "Running") == ("True", "Stopping")
        assert plan.wake_at == (at(1120) if nodes is LOST else None)
    else:
        assert said(plan, "Failed") == ("True", "Cancelled")
        assert last_outcome(plan) == outcome


def test_a_node_that_goes_away_shortly_before_the_end_does_not_keep_a_job_from_ending() -> None:
    made, away = job([attempt(started=5)]), {"node-a": NodeHealth(False, at(3550))}
    seen: dict[str, Any] = {"pods": [pod(started=5)], "nodes": away}
    waits = look(made, after=3601, jobs=[batch()], **seen)
    assert (waits.actions, waits.wake_at) == ((SuspendJob(FIRST),), at(3670))
    ends = look(made, after=3670, jobs=[batch(suspended=True)], **seen)
    assert said(ends, "Failed") == ("True", "DeadlineExceeded")


def test_a_job_cancelled_before_anything_was_created_ends_at_once() -> None:
    made = look(job(), offer=replace(admitted(), active=False))
    assert made.actions == ()
    assert said(made, "Failed") == ("True", "Cancelled")


def test_past_its_deadline_a_job_is_stopped_and_then_fails() -> None:
    running = job([attempt(started=5)])
    made = look(running, after=3600, jobs=[batch()], pods=[pod(started=5)])
    assert made.actions == (SuspendJob(FIRST),)
    assert said(made, "Running") == ("True", "Stopping")
    gone = look(running, after=3601, jobs=[batch(suspended=True)])
    assert said(gone, "Failed") == ("True", "DeadlineExceeded")
    stopped = look(running, after=3601, jobs=[batch(suspended=True)], pods=[ended(143)])
    assert said(stopped, "Failed") == ("True", "DeadlineExceeded")


# Ends


TERMINATION = {
    "exitCode": 0,
    "reason": "Done",
    "message": "fine",
    "evalLossBefore": 2.5,
    "evalLossAfter": 1.25,
    "figuresBefore": [{"name": "eval_loss", "value": "2.5"}, {"name": "accuracy", "value": "0.5"}],
    "figuresAfter": [{"name": "eval_loss", "value": "9"}, {"name": "eval_loss", "value": "1.25"}],
    "adapterDir": "/data/output/offer-0123abcd",
    "adapterSha256": "ab" * 32,
}


def test_a_pod_that_succeeded_completes_the_job_with_its_result() -> None:
    made = look(
        job([attempt(started=5)]),
        after=70,
        jobs=[batch()],
        pods=[ended(0, succeeded=True, message=json.dumps(TERMINATION))],
    )
    status = status_of(made)
    assert said(made, "Complete") == ("True", "Succeeded")
    assert said(made, "Running") == ("False", "Succeeded")
    assert status.steps[0].state == "Succeeded"
    assert status.result is not None
    assert status.result.to_wire() == {
        "adapterPath": "/data/output/offer-0123abcd",
        "sha256": "ab" * 32,
        "evalLossBefore": "2.5",
        "evalLossAfter": "1.25",
        "metricsBefore": [{"name": "eval_loss", "value": "2.5"}, {"name": "accuracy", "value": "0.5"}],
        "metricsAfter": [{"name": "eval_loss", "value": "1.25"}],
    }
    assert made.notices[0].message == "trained and verified; held-out loss 2.5000 -> 1.2500"
    assert (status.attempts[0].exit_code, status.attempts[0].finished_at) == (0, at(60))


@pytest.mark.parametrize(
    ("started", "counted"),
    [(-600, 0), (5, 5), (610, 10)],
    ids=["a node whose clock is behind", "a clock that is right", "a node whose clock is ahead"],
)
def test_a_wrong_clock_of_a_node_costs_a_training_no_time(started: float, counted: float) -> None:
    made = look(job([attempt(deadline=None)], clock="Training"), jobs=[batch()], pods=[pod(started=started)])
    ran = status_of(made).attempts[0]
    assert ran.started_at == at(counted)
    assert ran.deadline == at(counted + job().spec.run.time_limit_seconds)


def test_a_wrong_clock_of_a_node_does_not_put_off_the_next_attempt() -> None:
    failed = pod(started=5, terminal=True, succeeded=False, exit_code=1, finished_at=at(660))
    made = look(job([attempt(started=5)]), after=70, jobs=[batch()], pods=[failed], log="")
    assert status_of(made).attempts[0].finished_at == at(70)


def test_a_job_from_the_future_has_its_time_to_start() -> None:
    young = batch(created=600)
    starting = job([attempt()], limits={"startTimeoutSeconds": 60})
    assert last_outcome(look(starting, after=50, jobs=[young])) is None
    assert last_outcome(look(starting, after=61, jobs=[young])) is AttemptOutcome.START_TIMEOUT


def test_a_termination_with_overlong_words_does_not_stop_the_operator() -> None:
    words = {**TERMINATION, "adapterDir": "x" * 3900, "adapterSha256": "y" * 100}
    made = look(job([attempt(started=5)]), jobs=[batch()], pods=[ended(0, succeeded=True, message=json.dumps(words))])
    assert said(made, "Complete") == ("True", "Succeeded")


def test_progress_is_full_once_the_job_is_complete() -> None:
    before = {"progressPercentage": 90, "estimatedRemainingSeconds": 9, "lastUpdatedTime": rfc3339(NOW)}
    made = look(job([attempt(started=5)], trainerStatus=before), jobs=[batch()], pods=[ended(0, succeeded=True)])
    trainer = status_of(made).trainer_status
    assert trainer is not None
    assert (trainer.progress_percentage, trainer.estimated_remaining_seconds) == (100, 0)


def test_a_failed_pods_log_is_asked_for_before_anything_is_decided() -> None:
    made = look(job([attempt(started=5)]), jobs=[batch()], pods=[ended(1)], log=None)
    assert made == JobPlan(failed_pod=f"{FIRST}-pod")


@pytest.mark.parametrize("code", sorted(PERMANENT_EXIT_CODES))
def test_a_permanent_exit_code_fails_the_job_at_once(code: ExitCode) -> None:
    made = look(job([attempt(started=5)]), jobs=[batch()], pods=[ended(code)], log="no such column")
    assert said(made, "Failed") == ("True", "Failed")
    assert last_outcome(made) is AttemptOutcome.FAILED
    failed = next(c for c in status_of(made).conditions if c.type == "Failed")
    assert f"exit code {int(code)}" in failed.message
    assert "log ends: no such column" in failed.message


WITH_A_LIMIT = "(its limit is 64Gi for each of 2 GPU(s)); podTemplate.memoryPerGpu gives it more"
WITHOUT = "(it has no limit of its own, so the node lacked it); podTemplate.memoryPerGpu gives it more"
SAID_SO: Object = {"exitCode": 137, "reason": "Killed", "message": "rank 1 was killed by SIGKILL"}


@pytest.mark.parametrize(
    ("memory", "left", "reason", "told"),
    [
        ("64Gi", "", "OOMKilled", ("OOMKilled: the container was killed for lack of memory", WITH_A_LIMIT)),
        (None, "", "OOMKilled", ("OOMKilled: ", WITHOUT)),
        ("64Gi", "step 3", "OOMKilled", (f"{WITH_A_LIMIT}; log ends: step 3",)),
        ("64Gi", json.dumps(SAID_SO), "Killed", ("Killed: rank 1 was killed by SIGKILL",)),
    ],
    ids=["a limit", "no limit", "the end of its log", "the trainer had time to say more"],
)
def test_a_container_that_lacked_memory_says_how_much_it_had_and_what_gives_it_more(
    memory: str | None, left: str, reason: str, told: tuple[str, ...]
) -> None:
    pod_settings = {"image": "trainer:1", **({"memoryPerGpu": memory} if memory else {})}
    # The tail of the log, which is asked for, is what the kubelet has kept of it.
    made = look(
        job([attempt(started=5)], run={"gpus": 2, "pod": pod_settings}),
        after=70,
        jobs=[batch()],
        pods=[ended(137, message=left, reason="OOMKilled")],
        log=left if left == "step 3" else "",
    )
    last = status_of(made).attempts[0]
    assert (last.outcome, last.exit_code, last.reason) == (AttemptOutcome.FAILED, 137, reason)
    for words in told:
        assert words in str(last.message)
        assert words in made.notices[0].message


@pytest.mark.parametrize("code", [1, ExitCode.KILLED, ExitCode.RESTART, ExitCode.STOPPED, None])
def test_any_other_end_is_followed_by_another_attempt(code: int | None) -> None:
    made = look(job([attempt(started=5)]), jobs=[batch()], pods=[ended(code, message="Evicted")])
    assert said(made, "Failed") is None
    assert said(made, "Running") == ("False", "AttemptFailed")
    wanted = AttemptOutcome.STOPPED if code == ExitCode.STOPPED else AttemptOutcome.FAILED
    assert last_outcome(made) is wanted
    assert made.notices[0].warning


def test_the_last_allowed_attempt_fails_the_job() -> None:
    over = [attempt(outcome="Failed", finished=1), attempt(2, outcome="Failed", finished=2), attempt(3, started=5)]
    made = look(job(over), jobs=[batch(f"{NAME}-3")], pods=[replace(ended(1), job_name=f"{NAME}-3")])
    assert said(made, "Failed") == ("True", "AttemptsExhausted")


def test_an_attempt_that_fails_after_the_deadline_is_not_repeated() -> None:
    made = look(job([attempt(started=5)]), after=4000, jobs=[batch()], pods=[ended(1)])
    assert said(made, "Failed") == ("True", "DeadlineExceeded")


@pytest.mark.parametrize(("message", "log"), [("x" * 3000, "y" * 3000), ("", "y" * 3000), ("x" * 600, "short")])
def test_an_attempts_message_keeps_its_bound_and_ends_with_the_logs_end(message: str, log: str) -> None:
    made = look(job([attempt(started=5)]), jobs=[batch()], pods=[ended(1, message=message)], log=log)
    text = status_of(made).attempts[0].message
    assert text is not None
    assert len(text) <= 1024
    assert text.endswith(log[-400:])
    TrainingJobStatus.model_validate(status_of(made).to_wire())


def test_a_log_that_the_message_holds_already_is_not_repeated() -> None:
    made = look(
        job([attempt(started=5)]), jobs=[batch()], pods=[ended(1, message="boom at line 3")], log="boom at line 3"
    )
    assert status_of(made).attempts[0].message == "boom at line 3"


def test_a_job_that_ended_without_its_pod_is_taken_by_its_own_word() -> None:
    running = job([attempt(started=5)])
    failed = look(running, jobs=[batch(finished=True)])
    assert said(failed, "Running") == ("False", "AttemptFailed")
    done = look(running, jobs=[batch(finished=True, succeeded=True)])
    assert said(done, "Complete") == ("True", "Succeeded")


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (json.dumps(TERMINATION), "Done"),
        ("Traceback: boom", None),
        ("{not json", None),
        ('{"exitCode": "many"}', None),
        ("", None),
    ],
)
def test_only_the_trainers_own_last_words_are_read(message: str, reason: str | None) -> None:
    found = parse_termination(message)
    assert (found.reason if found else None) == reason


# The next attempt


FAILED_FIRST = attempt(outcome="Failed", started=5, finished=60)


def test_the_next_attempt_waits_for_its_backoff() -> None:
    made = look(job([FAILED_FIRST], limits={"backoffSeconds": 30}), after=61, jobs=[batch(finished=True)])
    assert made.wake_at == at(90)
    assert made.actions == ()
    assert status_of(made).attempts[0].outcome is AttemptOutcome.FAILED


def test_after_the_backoff_the_next_attempt_starts_on_the_same_node() -> None:
    made = look(job([FAILED_FIRST]), after=61, jobs=[batch(finished=True)], pods=[ended(1)])
    second = status_of(made).attempts[1]
    assert (second.job_name, second.assignments[0].node_name) == (SECOND, "node-a")
    assert (second.created_at, second.deadline) == (at(61), at(3600))
    assert made.move is None
    assert not [a for a in made.actions if isinstance(a, EnsureAttempt)], "the attempt is persisted before its Job"


def test_a_failed_attempts_job_is_kept_for_its_log() -> None:
    assert look(job([FAILED_FIRST]), after=61, jobs=[batch()], pods=[ended(1)]).actions == ()


def test_the_persisted_attempt_gets_its_job_in_the_next_pass() -> None:
    made = look(job([FAILED_FIRST, attempt(2, created=61)]), after=62, jobs=[batch(finished=True)], pods=[ended(1)])
    assert [(a.attempt.job_name, a.number) for a in made.actions if isinstance(a, EnsureAttempt)] == [(SECOND, 2)]


def test_a_pod_that_is_still_there_holds_the_next_attempt_back() -> None:
    made = look(job([FAILED_FIRST]), after=61, jobs=[batch()], pods=[pod(started=5)])
    assert made.status is None or len(made.status.attempts) == 1
    assert made.move is None


@pytest.mark.parametrize("outcome", ["NodeLost", "StartTimeout"])
def test_an_attempt_that_was_given_up_asks_the_cycle_for_a_place(outcome: str) -> None:
    over = job([attempt(outcome=outcome, finished=60)])
    nodes = {"node-a": NodeHealth(outcome != "NodeLost", NOW)}
    made = look(over, after=70, jobs=[batch()], nodes=nodes)
    assert made.actions == (DeleteJob(FIRST, f"{FIRST}-uid"),)
    assert made.move is not None
    assert (made.move.count, made.move.policy, made.move.offer_uid) == (1, "lab", over.spec.offer_ref.uid)
    assert made.move.avoid_nodes == (frozenset({"node-a"}) if outcome == "NodeLost" else frozenset())
    assert said(made, "Running") == ("False", "WaitingForCapacity")


def test_a_failed_attempt_on_a_node_that_went_away_moves_too() -> None:
    made = look(job([FAILED_FIRST]), after=61, jobs=[batch(finished=True)], nodes={})
    assert made.move is not None
    assert made.move.avoid_nodes == frozenset()


def test_a_place_that_the_cycle_found_becomes_the_next_attempt() -> None:
    made = look(job([attempt(outcome="NodeLost", finished=60)]), after=70, moved="node-b")
    assert status_of(made).attempts[1].assignments[0].node_name == "node-b"
    assert made.move is None


def test_a_lost_node_on_the_last_allowed_attempt_fails_the_job() -> None:
    over = [attempt(i, outcome="NodeLost", finished=i) for i in (1, 2, 3)]
    assert said(look(job(over)), "Failed") == ("True", "AttemptsExhausted")


@pytest.mark.parametrize(
    "earlier",
    [
        [attempt(deadline=500, outcome="StartTimeout", finished=60)],
        [
            attempt(deadline=None, outcome="StartTimeout", finished=60),
            attempt(2, created=61, started=70, deadline=500, outcome="Failed", finished=90),
        ],
    ],
    ids=["a bound from the offer", "a clock that an earlier attempt started"],
)
def test_a_training_clock_is_not_set_back_by_another_attempt(earlier: list[Object]) -> None:
    made = look(job(earlier, clock="Training"), after=100, moved="node-b")
    assert status_of(made).attempts[-1].deadline == at(500)


# Lost nodes


def test_a_node_that_is_not_ready_is_given_time_to_return() -> None:
    running = job([attempt(started=5)])
    away = {"node-a": NodeHealth(False, at(100))}
    made = look(running, after=150, jobs=[batch()], pods=[pod(started=5)], nodes=away)
    assert made.actions == ()
    assert said(made, "Running") == ("Unknown", "NodeLost")
    assert made.wake_at == at(220)
    back = look(replace_status(running, status_of(made)), after=160, jobs=[batch()], pods=[pod(started=5)])
    assert said(back, "Running") == ("True", "Running")


def test_a_node_that_stays_away_ends_the_attempt() -> None:
    away = {"node-a": NodeHealth(False, at(100))}
    made = look(job([attempt(started=5)]), after=220, jobs=[batch()], pods=[pod(started=5)], nodes=away)
    assert made.actions == (DeleteJob(FIRST, f"{FIRST}-uid"),)
    assert last_outcome(made) is AttemptOutcome.NODE_LOST
    assert said(made, "Running") == ("Unknown", "NodeLost")
    assert "node-a is not Ready for over 120 s" in made.notices[0].message


def test_a_node_that_is_gone_counts_from_when_that_was_first_seen() -> None:
    running = job([attempt(started=5)])
    first = look(running, after=100, jobs=[batch()], pods=[pod(started=5)], nodes={})
    assert first.wake_at == at(220)
    seen = replace_status(running, status_of(first))
    assert last_outcome(look(seen, after=221, jobs=[batch()], nodes={})) is AttemptOutcome.NODE_LOST
    waiting = look(seen, after=219, jobs=[batch()], nodes={})
    assert waiting.actions == ()


def test_a_lost_node_on_the_last_attempt_fails_the_job_and_removes_its_job() -> None:
    away = {"node-a": NodeHealth(False, NOW)}
    made = look(job([attempt()], limits={"maxAttempts": 1}), after=130, jobs=[batch()], nodes=away)
    assert made.actions == (DeleteJob(FIRST, f"{FIRST}-uid"),)
    assert said(made, "Failed") == ("True", "AttemptsExhausted")


# Progress


def report(after: float, *, name: str = NAME, **fields: Any) -> ProgressReport:
    return ProgressReport.model_validate(
        {"jobName": name, "state": "Training", "lastUpdatedTime": rfc3339(at(after)), **fields}
    )


def progress(before: float | None, new: ProgressReport) -> datetime | None:
    known = {} if before is None else {"trainerStatus": {"lastUpdatedTime": rfc3339(at(before))}}
    made = look(job([attempt(started=5)], **known), jobs=[batch()], pods=[pod(started=5)], report=new)
    trainer = status_of(made).trainer_status
    return trainer.last_updated_time if trainer else None


@pytest.mark.parametrize(
    ("before", "new", "shown"),
    [
        (None, report(5), 5),
        (0, report(9), 0),
        (0, report(10), 10),
        (20, report(5), 20),
        (None, report(5, name="another"), None),
    ],
    ids=["the first", "too soon", "due", "older than what is known", "of another job"],
)
def test_progress_is_taken_once_per_interval(before: float | None, new: ProgressReport, shown: float | None) -> None:
    assert progress(before, new) == (None if shown is None else at(shown))


def test_what_was_changed_about_the_settings_is_told_in_one_event_and_once() -> None:
    def told(made: JobPlan) -> list[str]:
        return [notice.message for notice in made.notices if notice.reason is Reason.SETTINGS_CLAMPED]

    decided, own = (
        {"field": field, "requested": "8", "effective": "4", "reason": "X"} for field in ("train.a", "train.b")
    )
    wire = make_training_job(name=NAME, spec={"run": {"clamps": [decided]}}, status={"attempts": [], "conditions": []})
    first = look(TrainingJob.model_validate(stored(wire, uid="tj-uid")))
    assert told(first) == ["train.a 8 → 4 (X)"]
    wire["status"] = status_of(first).to_wire()
    after = TrainingJob.model_validate(stored(wire, uid="tj-uid"))
    assert told(look(after, jobs=[batch()])) == []
    running = {"jobs": [batch()], "pods": [pod(started=5)]}
    assert told(look(after, report=report(60, clamps=[own]), **running)) == ["train.b 8 → 4 (X)"]


def clamp(field: str, effective: str = "4", reason: str = "FallbackProfile") -> Object:
    return {"field": field, "requested": "8", "effective": effective, "reason": reason, "message": ""}


DECIDED = clamp("train.a", reason="BatchClamped")
LAST_CLAMPS: dict[str, tuple[list[Object], list[Object], list[Object], list[str], str]] = {
    # What was reported while it ran, what its end says, what the status then says, and what the event tells.
    "nothing was reported": ([], [clamp("train.b")], [DECIDED, clamp("train.b")], ["train.b 8 → 4"], ""),
    "it was reported": ([clamp("train.b")], [clamp("train.b")], [DECIDED, clamp("train.b")], [], ""),
    "it went lower after": (
        [clamp("train.b", "4"), clamp("train.c")],
        [clamp("train.b", "2"), clamp("train.c")],
        [DECIDED, clamp("train.b", "2"), clamp("train.c")],
        ["train.b 8 → 2"],
        "",
    ),
    "some had no room": (
        [clamp("train.b"), clamp("train.c")],
        [clamp("train.b")],
        [DECIDED, clamp("train.c"), clamp("train.b")],
        [],
        " (1 of 2 clamps left out)",
    ),
    "a decided one goes further": (
        [],
        [clamp("train.a", "1")],
        [DECIDED, clamp("train.a", "1")],
        ["train.a 8 → 1"],
        "",
    ),
}


@pytest.mark.parametrize("code", [0, int(ExitCode.RESTART), int(ExitCode.BAD_DATA)])
@pytest.mark.parametrize("case", LAST_CLAMPS)
def test_what_only_the_end_of_an_attempt_says_of_clamped_settings_is_in_the_status_and_told_once(
    case: str, code: int
) -> None:
    reported, ends_with, kept, events, cut = LAST_CLAMPS[case]
    wire = make_training_job(name=NAME, spec={"run": {"clamps": [DECIDED]}}, status={"attempts": [attempt(started=5)]})
    wire["status"]["clamps"] = [DECIDED, *reported]
    message = json.dumps({"exitCode": code, "reason": "X", "message": f"x{cut}", "clamps": ends_with})
    pods = [ended(code, succeeded=code == 0, message=message)]
    stale = report(50, clamps=reported)

    def look_again(pods: Sequence[PodView]) -> JobPlan:
        return look(TrainingJob.model_validate(stored(wire, uid="tj-uid")), after=70, pods=pods, report=stale)

    made = look_again(pods)
    assert [one.to_wire() for one in status_of(made).clamps] == kept
    told = [notice.message for notice in made.notices if notice.reason is Reason.SETTINGS_CLAMPED]
    assert told == [f"{event} (FallbackProfile)" for event in events]
    wire["status"] = status_of(made).to_wire()
    # What it said last while it ran stays known for a while; its pod may be gone by then, or not.
    for left in (pods, []):
        again = look_again(left)
        assert (again.status or status_of(made)).clamps == status_of(made).clamps
        assert not [notice for notice in again.notices if notice.reason is Reason.SETTINGS_CLAMPED]


def test_what_a_brought_trainer_says_of_clamps_at_its_end_is_not_taken() -> None:
    wire = make_training_job(
        name=NAME,
        spec={"run": {"trainer": {"image": "registry.test/mine:1"}}},
        status={"attempts": [attempt(started=5)]},
    )
    message = json.dumps({"exitCode": 0, "reason": "X", "clamps": [clamp("train.b")]})
    theirs = TrainingJob.model_validate(stored(wire, uid="tj-uid"))
    assert status_of(look(theirs, after=70, pods=[ended(0, succeeded=True, message=message)])).clamps == ()


def test_progress_carries_kubeflows_field_names_and_the_trainers_clamps() -> None:
    fitted = {"field": "lora.r", "requested": "358", "effective": "16", "reason": "RankClamped"}
    said_by_trainer = report(
        5,
        progressPercentage=40,
        estimatedRemainingSeconds=9,
        metrics=[{"name": "loss", "value": "1.5"}],
        clamps=[fitted],
    )
    made = look(job([attempt(started=5)]), jobs=[batch()], pods=[pod(started=5)], report=said_by_trainer)
    wire = status_of(made).to_wire()
    assert wire["trainerStatus"] == {
        "progressPercentage": 40,
        "estimatedRemainingSeconds": 9,
        "metrics": [{"name": "loss", "value": "1.5"}],
        "lastUpdatedTime": rfc3339(at(5)),
    }
    assert wire["clamps"] == [{**fitted, "message": ""}]


def test_metrics_without_end_or_named_twice_leave_the_status_writable() -> None:
    many = [{"name": f"m{i}", "value": "1"} for i in range(400)] + [{"name": "m0", "value": "2"}]
    made = look(job([attempt(started=5)]), jobs=[batch()], pods=[pod(started=5)], report=report(5, metrics=many))
    trainer = status_of(made).trainer_status
    assert trainer is not None
    names = [m.name for m in trainer.metrics]
    assert len(names) == len(set(names)) == 256


# The end reaches the offer


COMPLETE = {
    "type": "Complete",
    "status": "True",
    "reason": "Succeeded",
    "message": "done",
    "lastTransitionTime": rfc3339(NOW),
}


def failed_condition(reason: str) -> Object:
    return {**COMPLETE, "type": "Failed", "reason": reason, "message": "why"}


@pytest.mark.parametrize(
    ("ending", "wanted"),
    [
        (COMPLETE, OfferEnd(Reason.SUCCEEDED, "done")),
        (failed_condition("Cancelled"), OfferEnd(Reason.CANCELLED, "why")),
        (failed_condition("AttemptsExhausted"), OfferEnd(Reason.FAILED, "why")),
        (failed_condition("DeadlineExceeded"), OfferEnd(Reason.FAILED, "why")),
    ],
)
def test_a_finished_job_ends_its_offer_once(ending: Object, wanted: OfferEnd) -> None:
    assert look(job([attempt()], conditions=[ending])) == JobPlan(offer_end=wanted)
    told = replace(admitted(), finished=True)
    assert look(job([attempt()], conditions=[ending]), offer=told) == JobPlan()


# Jobs that come late

ENDED = {"status": "True", "message": "m", "lastTransitionTime": rfc3339(NOW)}
OVER = [
    ({"type": "Failed", "reason": "Cancelled", **ENDED}, "Stopped"),
    ({"type": "Failed", "reason": "AttemptsExhausted", **ENDED}, "StartTimeout"),
    ({"type": "Complete", "reason": "Succeeded", **ENDED}, "Succeeded"),
]


@pytest.mark.parametrize(("condition", "outcome"), OVER)
@pytest.mark.parametrize("pods", [[], [pod(started=5)]])
def test_a_job_that_appears_after_the_end_is_stopped(condition: Object, outcome: str, pods: Sequence[PodView]) -> None:
    over = job([attempt(outcome=outcome, finished=5)], conditions=[condition])
    assert look(over, jobs=[batch()], pods=pods).actions == (SuspendJob(FIRST),)
    assert look(over, jobs=[batch(suspended=True)], pods=pods).actions == ()
    assert without_offer(over, jobs=[batch()], pods=pods).actions == (SuspendJob(FIRST),)


@pytest.mark.parametrize(("condition", "outcome"), OVER)
def test_a_job_whose_pod_has_ended_is_left_to_end_by_itself(condition: Object, outcome: str) -> None:
    over = job([attempt(outcome=outcome, finished=5)], conditions=[condition])
    assert look(over, jobs=[batch()], pods=[ended(0, succeeded=True)]).actions == ()
    assert look(over, jobs=[batch(finished=True)]).actions == ()


def test_a_job_of_an_earlier_attempt_that_appears_late_is_stopped_and_the_present_one_is_not() -> None:
    second = job([attempt(outcome="NodeLost", finished=5), attempt(2, created=6, started=7)])
    made = look(second, jobs=[batch(), batch(SECOND)], pods=[pod(SECOND, started=7)])
    assert made.actions == (SuspendJob(FIRST),)


def test_an_attempt_waits_for_the_pods_of_a_training_job_that_was_deleted() -> None:
    made = look(job([]), pods=[pod(SECOND, started=5)])
    assert made.actions == ()
    assert said(made, "Running") == ("False", "Pending")
    assert look(job([]), pods=[ended(143, job_name=SECOND)]).actions == (
        EnsureAttempt(status_of(made).attempts[0], 1, 3590),
    )


# Preemption

URGENT = {"namespace": "default", "name": "urgent", "uid": "urgent-uid", "askedAt": rfc3339(at(60))}
LEAVING = attempt(started=5, preempted_for=URGENT)
AWAY = attempt(started=5, finished=70, outcome="Preempted", preempted_for=URGENT, message="stopped for default/urgent")


def test_whom_a_job_stops_for_is_written_before_its_pod_is_asked() -> None:
    made = look(
        job([attempt(started=5)]),
        after=60,
        jobs=[batch()],
        pods=[pod(started=5)],
        preemptor=Preemptor.model_validate(URGENT),
    )
    asked = status_of(made).attempts[0].preempted_for
    assert asked is not None
    assert asked.uid == "urgent-uid"
    assert made.actions == ()
    assert made.wake_at == at(60)


def test_a_job_that_is_to_make_room_is_suspended_once() -> None:
    made = look(job([LEAVING]), after=60, jobs=[batch()], pods=[pod(started=5)])
    assert made.actions == (SuspendJob(FIRST),)
    assert [notice.reason for notice in made.notices] == [Reason.PREEMPTED]
    assert said(made, "Running") == ("True", "Stopping")
    again = look(job([LEAVING]), after=61, jobs=[batch(suspended=True)], pods=[pod(started=5)])
    assert (again.actions, again.notices) == ((), ())


@pytest.mark.parametrize("code", [143, 137, 1, None])
def test_however_a_stopped_pod_ends_it_was_preempted_and_that_is_no_failed_attempt(code: int | None) -> None:
    made = look(job([LEAVING], limits={"maxAttempts": 1}), after=70, jobs=[batch(suspended=True)], pods=[ended(code)])
    assert last_outcome(made) is AttemptOutcome.PREEMPTED
    assert said(made, "Running") == ("False", "Preempted")
    assert said(made, "Failed") is None


def test_a_stopped_pod_that_is_gone_before_its_end_was_seen_was_preempted() -> None:
    made = look(job([LEAVING]), after=70, jobs=[batch(suspended=True)])
    assert last_outcome(made) is AttemptOutcome.PREEMPTED


def test_a_pod_that_succeeds_while_it_is_to_stop_completes_the_job() -> None:
    made = look(job([LEAVING]), after=70, jobs=[batch(suspended=True)], pods=[ended(0, succeeded=True)])
    assert said(made, "Complete") == ("True", "Succeeded")


def test_a_permanent_fault_of_a_pod_that_is_to_stop_fails_the_job() -> None:
    code = next(iter(PERMANENT_EXIT_CODES))
    made = look(job([LEAVING]), after=70, jobs=[batch(suspended=True)], pods=[ended(code)])
    assert said(made, "Failed") == ("True", "Failed")


def test_a_preempted_job_asks_the_cycle_for_gpus_anywhere_and_removes_the_suspended_job() -> None:
    made = look(job([AWAY]), after=80, jobs=[batch(suspended=True)])
    assert made.move is not None
    assert (made.move.goes_on, made.move.avoid_nodes) == (True, frozenset())
    assert made.actions == (DeleteJob(FIRST, f"{FIRST}-uid"),)
    assert said(made, "Running") == ("False", "Preempted")
    assert made.wake_at == at(3600), "its time runs on"


def test_the_gpus_that_a_preempted_job_gets_become_its_next_attempt_at_once() -> None:
    made = look(job([AWAY], limits={"maxAttempts": 1, "backoffSeconds": 300}), after=80, moved="node-b")
    assert [a.assignments[0].node_name for a in status_of(made).attempts] == ["node-a", "node-b"]
    assert status_of(made).attempts[1].deadline == at(3600)


def test_a_preempted_job_that_gets_no_gpus_until_its_deadline_fails() -> None:
    made = look(job([AWAY]), after=3600)
    assert said(made, "Failed") == ("True", "DeadlineExceeded")


def test_a_preempted_job_that_is_cancelled_ends() -> None:
    off = OfferFacts(active=False, admission=admitted().admission, finished=False)
    assert said(look(job([AWAY]), after=80, offer=off), "Failed") == ("True", "Cancelled")


def test_only_attempts_that_ended_by_themselves_count() -> None:
    tries = [AWAY, attempt(2, outcome="Failed", started=90, finished=100)]
    made = look(job(tries, limits={"maxAttempts": 2}), after=101, jobs=[batch(SECOND, finished=True)])
    assert len(status_of(made).attempts) == 3
    made = look(job(tries, limits={"maxAttempts": 1}), after=101, jobs=[batch(SECOND, finished=True)])
    assert said(made, "Failed") == ("True", "AttemptsExhausted")
