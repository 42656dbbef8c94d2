"""How an attempt of a trainer that the offer has brought begins and ends, branch by branch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import pytest

from builders import Object, claim, make_admission, make_training_job, stored
from core_builders import NOW, at
from taskoffer.api.base import rfc3339
from taskoffer.api.contract import Clamp, ExitCode, ProgressReport
from taskoffer.api.reports import RunState
from taskoffer.api.v1alpha1.taskoffer import Admission
from taskoffer.api.v1alpha1.trainingjob import AttemptOutcome, StepName, TrainingJob, TrainingJobStatus
from taskoffer.decision.conditions import condition_of
from taskoffer.decision.job_facts import (
    EnsureAttempt,
    EnsureStep,
    JobFacts,
    JobPlan,
    JobView,
    NodeHealth,
    OfferFacts,
    PodView,
    StepView,
    SuspendJob,
)
from taskoffer.decision.lifecycle import step
from taskoffer.decision.trainer_words import PERMANENT_EXIT_CODES

NAME = "offer-0123abcd"
FIRST = f"{NAME}-1"
ENDS = 3600 - 600
"""When the training ends: the deadline less what the policy keeps for handing over."""


def job(attempts: Sequence[Object] = (), *, clock: str = "Absolute", run: Object | None = None) -> TrainingJob:
    own: Object = {
        "trainer": {"image": "registry.test/mine:1"},
        "steps": {"cache": {"claimName": "cache"}, "submitSeconds": 600},
        "model": {"source": claim("models", "x")},
        "dataset": {"source": claim("data", "x")},
        "output": claim("outputs"),
        "clockMode": clock,
        **(run or {}),
    }
    wire = make_training_job(name=NAME, spec={"run": own}, status={"attempts": list(attempts)})
    return TrainingJob.model_validate(stored(wire, uid="tj-uid"))


def attempt(*, started: float | None = 5, deadline: float | None = 3600, number: int = 1, **fields: Any) -> Object:
    times = {"startedAt": started, "deadline": deadline}
    return {
        "jobName": f"{NAME}-{number}",
        "assignments": [{"nodeName": "node-a", "resourceName": "nvidia.com/gpu", "count": 1}],
        "createdAt": rfc3339(NOW),
        **{key: rfc3339(at(value)) for key, value in times.items() if value is not None},
        **fields,
    }


def batch(**fields: Any) -> JobView:
    return JobView(FIRST, "job-uid", **{"suspended": False, "finished": False, "created": NOW, **fields})


def pod(
    *, started: float | None = 5, ended: float | None = None, code: int | None = None, message: str = ""
) -> PodView:
    return PodView(
        f"{FIRST}-pod",
        "pod-uid",
        FIRST,
        "node-a",
        NOW,
        terminal=ended is not None,
        succeeded=code == 0,
        started_at=None if started is None else at(started),
        finished_at=None if ended is None else at(ended),
        exit_code=code,
        message=message,
    )


def look(
    made: TrainingJob,
    after: float,
    *,
    jobs: Sequence[JobView] = (),
    pods: Sequence[PodView] = (),
    steps: Mapping[StepName, StepView] | None = None,
    report: ProgressReport | None = None,
    deadline: float | None = 3600,
    log: str | None = "",
) -> JobPlan:
    admission = make_admission(deadline=None if deadline is None else rfc3339(at(deadline)))
    return step(
        JobFacts(
            now=at(after),
            job=made,
            offer=OfferFacts(active=True, admission=Admission.model_validate(admission), finished=False),
            jobs={one.name: one for one in jobs},
            pods=pods,
            nodes={"node-a": NodeHealth(True, NOW)},
            steps=steps or {},
            report=report,
            log_tail=log,
        )
    )


def status_of(plan: JobPlan) -> TrainingJobStatus:
    assert plan.status is not None
    return plan.status


def told(plan: JobPlan, kind: str = "Running") -> tuple[str, str]:
    found = condition_of(status_of(plan).conditions, kind)
    assert found is not None
    return found.reason, found.message


def is_trained(plan: JobPlan, code: int | None) -> None:
    """The attempt counts as trained, and what it has left is looked at."""
    (last,) = status_of(plan).attempts
    assert (last.outcome, last.exit_code) == (AttemptOutcome.SUCCEEDED, code)
    (action,) = plan.actions
    assert isinstance(action, EnsureStep)
    assert action.name is StepName.SUBMIT
    assert told(plan)[0] == "Submitting"


# How long it has


@pytest.mark.parametrize(
    ("clock", "deadline", "after", "seconds"),
    [
        ("Absolute", 3600, 10, ENDS - 10),
        ("Absolute", 3600, 2000, ENDS - 2000),
        ("Training", None, 2000, 3000),
        ("Training", 3600, 2000, ENDS - 2000),
    ],
)
def test_it_is_told_what_is_left_by_either_clock(
    clock: str, deadline: float | None, after: float, seconds: int
) -> None:
    """A Training clock starts with the container, however long the fetching took; a deadline binds all the same."""
    (action,) = look(job(clock=clock), after, deadline=deadline).actions
    assert isinstance(action, EnsureAttempt)
    assert action.seconds == seconds


def test_our_own_trainer_has_until_its_deadline_and_no_time_of_its_own_before_its_clock_starts() -> None:
    (action,) = look(job(run={"trainer": None}), 10).actions
    assert isinstance(action, EnsureAttempt)
    assert action.seconds == 3590
    unstarted = job([attempt(started=None, deadline=None)], run={"trainer": None}, clock="Training")
    (action,) = look(unstarted, 10, deadline=None).actions
    assert isinstance(action, EnsureAttempt)
    assert action.seconds is None


def test_a_training_clock_sets_the_deadline_when_the_container_starts() -> None:
    plan = look(
        job([attempt(started=None, deadline=None)], clock="Training"), 110, jobs=[batch()], pods=[pod(started=100)]
    )
    (last,) = status_of(plan).attempts
    assert last.deadline == at(100 + 3600)
    again = look(
        job([attempt(started=100, deadline=3700)], clock="Training"), 120, jobs=[batch()], pods=[pod(started=100)]
    )
    assert again.wake_at == at(3700 - 600)


# Its end by the clock


def test_it_is_asked_to_stop_when_its_time_is_over() -> None:
    running = job([attempt()])
    before = look(running, ENDS - 1, jobs=[batch()], pods=[pod()])
    assert (before.actions, before.wake_at) == ((), at(ENDS))
    stops = look(running, ENDS, jobs=[batch()], pods=[pod()])
    assert stops.actions == (SuspendJob(FIRST),)
    assert told(stops) == ("Stopping", "attempt 1: its time is over")
    waits = look(running, ENDS + 10, jobs=[batch(suspended=True)], pods=[pod()])
    assert waits.actions == ()


@pytest.mark.parametrize(
    ("jobs", "pods", "code"),
    [
        ([batch(suspended=True)], [pod(ended=ENDS + 30, code=137)], 137),
        ([batch(suspended=True)], [pod(ended=ENDS + 1, code=143)], 143),
        ([batch(suspended=True)], [pod(ended=ENDS - 40, code=143)], 143),
        ([batch()], [pod(ended=ENDS + 1, code=1)], 1),
        ([batch(suspended=True)], [], None),
        ([batch(finished=True)], [], None),
        ([batch(suspended=True)], [pod(ended=ENDS + 2, code=0)], 0),
    ],
    ids=[
        "it was killed",
        "it has stopped",
        "the clock of its node is behind",
        "it has failed after its time",
        "its pod is gone already",
        "Kubernetes has ended it, for the operator was away",
        "it has ended well when it was asked to",
    ],
)
def test_its_end_by_the_clock_counts_as_trained(jobs: list[JobView], pods: list[PodView], code: int | None) -> None:
    is_trained(look(job([attempt()]), ENDS + 60, jobs=jobs, pods=pods), code)


def test_the_log_of_what_was_stopped_is_not_asked_for() -> None:
    plan = look(
        job([attempt()]), ENDS + 60, jobs=[batch(suspended=True)], pods=[pod(ended=ENDS + 30, code=137)], log=None
    )
    assert plan.failed_pod is None


def test_what_has_not_begun_when_its_time_is_over_has_left_nothing() -> None:
    never = job([attempt(started=None)], run={"limits": {"startTimeoutSeconds": 86_400}})
    stops = look(never, ENDS, jobs=[batch()], pods=[pod(started=None)])
    assert stops.actions == (SuspendJob(FIRST),)
    ended = look(never, ENDS + 5, jobs=[batch(suspended=True)])
    assert told(ended, "Failed") == ("DeadlineExceeded", "the time for the training was over before it began")


def test_one_that_does_not_stop_until_the_deadline_has_missed_it() -> None:
    plan = look(job([attempt()]), 3601, jobs=[batch(suspended=True)], pods=[pod()])
    assert told(plan)[0] == "Stopping"
    over = look(job([attempt()]), 3660, jobs=[batch(suspended=True)])
    assert told(over, "Failed")[0] == "DeadlineExceeded"


# Its other ends


def test_one_that_ends_by_itself_is_trained() -> None:
    is_trained(look(job([attempt()]), 1000, jobs=[batch()], pods=[pod(ended=990, code=0)]), 0)


@pytest.mark.parametrize("code", [1, 2, *sorted(int(code) for code in PERMANENT_EXIT_CODES)])
def test_one_that_fails_is_tried_again_whatever_its_exit_code(code: int) -> None:
    """What our trainer means by a code is not agreed upon with anybody else."""
    plan = look(job([attempt()]), 1000, jobs=[batch()], pods=[pod(ended=990, code=code, message="Traceback")])
    assert told(plan) == ("AttemptFailed", f"attempt 1 ended with exit code {code}: Traceback")
    failed = job([attempt(outcome="Failed", finishedAt=rfc3339(at(990)))])
    (last, then) = status_of(look(failed, 1002)).attempts
    assert (last.outcome, then.job_name) == (AttemptOutcome.FAILED, f"{NAME}-2")


def test_one_that_somebody_stops_before_its_time_is_over_is_not_trained() -> None:
    stopped = pod(ended=990, code=143)
    (last,) = status_of(look(job([attempt()]), 1000, jobs=[batch(suspended=True)], pods=[stopped])).attempts
    assert last.outcome is AttemptOutcome.STOPPED


def test_one_that_fails_too_late_for_another_try_has_failed() -> None:
    failed = job([attempt(outcome="Failed", finishedAt=rfc3339(at(ENDS - 1)))])
    plan = look(failed, ENDS + 1)
    assert told(plan, "Failed")[0] == "DeadlineExceeded"


CLAMPS = (Clamp(field="train.x", requested="1", effective="2", reason="BatchClamped", message="x"),)


def test_nothing_that_it_says_is_believed() -> None:
    said = {"exitCode": 0, "reason": "Completed", "message": "best ever", "adapterDir": "/etc", "evalLossAfter": 0.0}
    said |= {"peakGpuBytes": 1, "tokensPerSecond": 1e9, "trainingSeconds": 1.0, "step": 5, "totalSteps": 5}
    report = ProgressReport(job_name=NAME, attempt=1, state=RunState.TRAINING, last_updated_time=at(900), clamps=CLAMPS)
    running = look(job([attempt()]), 910, jobs=[batch()], pods=[pod()], report=report)
    assert (status_of(running).trainer_status, status_of(running).clamps) == (None, ())
    ended = pod(ended=990, code=0, message=json.dumps(said))
    plan = look(job([attempt()]), 1000, jobs=[batch()], pods=[ended], report=report)
    assert (status_of(plan).result, status_of(plan).trainer_status) == (None, None)
    over = look(
        job([attempt(outcome="Succeeded", exitCode=0, finishedAt=rfc3339(at(990)))]),
        1100,
        pods=[ended],
        steps={StepName.SUBMIT: submitted(1050)},
    )
    measured = status_of(over).measured
    assert measured is not None
    assert (measured.peak_memory_bytes, measured.tokens_per_second, measured.container_seconds) == (None, None, 985)


def submitted(finished: float, **published: Any) -> StepView:
    """The step that has verified the result, and has handed it over where there was somebody to hand it to."""
    told = {"to": "/data/output/x/adapter", "files": 3, "bytes": 4, **published}
    said = {
        "exitCode": 0,
        "reason": "Completed",
        "message": "3 files",
        "adapterDir": f"/data/output/{NAME}/adapter",
        "adapterSha256": "cd" * 32,
        "published": told,
    }
    view = JobView(f"{NAME}-submit", "submit-uid", False, True, True, NOW)
    ended: datetime = at(finished)
    last = PodView("p", "u", view.name, "node-a", NOW, True, True, ended, ended, 0, json.dumps(said))
    return StepView(view, last)


@pytest.mark.parametrize(
    ("output", "published", "text", "to"),
    [
        (claim("outputs"), {}, "trained and verified", None),
        (
            {**claim("outputs"), "repository": "acme/x"},
            {"to": "acme/x", "revision": "a" * 40},
            "trained and verified; submitted to acme/x",
            "acme/x",
        ),
    ],
    ids=["kept on its claim", "handed over"],
)
def test_what_the_verifying_step_says_is_the_result(
    output: Object, published: Object, text: str, to: str | None
) -> None:
    trained = job([attempt(outcome="Succeeded", exitCode=137, finishedAt=rfc3339(at(ENDS)))], run={"output": output})
    plan = look(trained, 3100, steps={StepName.SUBMIT: submitted(3090, **published)})
    assert told(plan, "Complete") == ("Succeeded", text)
    result = status_of(plan).result
    assert result is not None
    assert (result.adapter_path, result.sha256) == (f"/data/output/{NAME}/adapter", "cd" * 32)
    assert result.submitted_to == to


def test_a_result_that_does_not_bear_looking_at_fails_the_job() -> None:
    said = {"exitCode": int(ExitCode.VERIFY_FAILED), "reason": "EmptyResult", "message": "there is nothing"}
    view = JobView(f"{NAME}-submit", "submit-uid", False, True, False, NOW)
    last = PodView("p", "u", view.name, "node-a", NOW, True, False, NOW, NOW, 74, json.dumps(said))
    trained = job([attempt(outcome="Succeeded", exitCode=137, finishedAt=rfc3339(at(ENDS)))])
    plan = look(trained, 3100, steps={StepName.SUBMIT: StepView(view, last)})
    assert told(plan, "Failed") == (
        "SubmitFailed",
        "step Submit ended with exit code 74: EmptyResult: there is nothing",
    )
