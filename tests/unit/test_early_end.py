"""What becomes of the best adapter so far when time or attempts of our own trainer run out, branch by branch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from builders import Object, claim, make_admission, make_training_job, merged, stored
from core_builders import NOW, at
from taskoffer.api.base import rfc3339
from taskoffer.api.contract import ExitCode, ProgressReport, SubmitConfig
from taskoffer.api.v1alpha1.taskoffer import Admission
from taskoffer.api.v1alpha1.trainingjob import AttemptOutcome, StepName, TrainingJob
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
from taskoffer.render.steps import step_config_map

NAME = "offer-0123abcd"
FIRST = f"{NAME}-1"
FOLDER = f"/data/output/{NAME}/provisional/step-40-0123456789ab"
BEST: Object = {"step": 40, "path": FOLDER}
DEADLINE, KEPT = 3600, 600
"""The deadline and what of the time before it is kept for handing over, in seconds."""
TARGET: Object = {"output": {**claim("outputs"), "repository": "acme/expected-name"}}


def job(attempts: Sequence[Object], run: Object | None = None, **status: Any) -> TrainingJob:
    base: Object = {
        "steps": {"cache": {"claimName": "cache"}, "submitSeconds": KEPT},
        "model": {"source": claim("models", "x")},
        "dataset": {"source": claim("data", "x")},
        "limits": {"maxAttempts": 1},
        **TARGET,
    }
    wire = make_training_job(
        name=NAME,
        spec={"run": merged(base, run or {})},
        status={"attempts": list(attempts), "steps": [{"name": "Prepare", "state": "Succeeded"}], **status},
    )
    return TrainingJob.model_validate(stored(wire, uid="tj-uid"))


def attempt(*, deadline: float | None = DEADLINE, **fields: Any) -> Object:
    return {
        "jobName": FIRST,
        "assignments": [{"nodeName": "node-a", "resourceName": "nvidia.com/gpu", "count": 1}],
        "createdAt": rfc3339(NOW),
        "startedAt": rfc3339(at(5)),
        **({} if deadline is None else {"deadline": rfc3339(at(deadline))}),
        **fields,
    }


def pod(*, ended: float | None = None, code: int | None = None, message: str = "") -> PodView:
    over = ended is not None
    times = {"started_at": at(5), "finished_at": at(ended) if ended is not None else None}
    return PodView(
        f"{FIRST}-pod", "pod-uid", FIRST, "node-a", NOW, over, code == 0, exit_code=code, message=message, **times
    )


def report(best: Object | None = BEST, state: str = "Training", attempt: int = 1) -> ProgressReport:
    wire: Object = {"jobName": NAME, "attempt": attempt, "state": state, "lastUpdatedTime": rfc3339(at(50))}
    return ProgressReport.model_validate(wire | ({"provisional": best} if best else {}))


def batch(**fields: Any) -> JobView:
    return JobView(FIRST, "job-uid", **{"suspended": False, "finished": False, "created": NOW, **fields})


def look(
    made: TrainingJob,
    after: float,
    *,
    pods: Sequence[PodView] = (),
    jobs: Sequence[JobView] = (),
    steps: Mapping[StepName, StepView] | None = None,
    said: ProgressReport | None = None,
    active: bool = True,
) -> JobPlan:
    admission = Admission.model_validate(make_admission(deadline=rfc3339(at(DEADLINE))))
    return step(
        JobFacts(
            now=at(after),
            job=made,
            offer=OfferFacts(active=active, admission=admission, finished=False),
            jobs={one.name: one for one in jobs},
            pods=pods,
            nodes={"node-a": NodeHealth(True, NOW)},
            steps=steps or {},
            report=said,
            log_tail="",
        )
    )


def then(before: TrainingJob, plan: JobPlan) -> TrainingJob:
    """The job with the status that a plan wants to have written."""
    assert plan.status is not None
    wire = before.to_wire()
    return TrainingJob.model_validate({**wire, "status": plan.status.to_wire()})


def told(plan: JobPlan, kind: str) -> tuple[str, str]:
    assert plan.status is not None
    found = condition_of(plan.status.conditions, kind)
    assert found is not None, plan.status.conditions
    return found.reason, found.message


def is_said(plan: JobPlan, kind: str) -> bool:
    return plan.status is not None and condition_of(plan.status.conditions, kind) is not None


def states(plan: JobPlan) -> dict[str, str]:
    assert plan.status is not None
    return {one.name.value: one.state for one in plan.status.steps}


def submitted(*, well: bool, finished: float = 400, message: Object | None = None) -> dict[StepName, StepView]:
    view = JobView(f"{NAME}-submit", "submit-uid", False, True, well, NOW)
    left = json.dumps(message) if message is not None else ""
    code = 0 if well else int(ExitCode.VERIFY_FAILED)
    made = PodView("p", "u", view.name, "node-a", NOW, True, well, at(300), at(finished), code, left)
    return {StepName.SUBMIT: StepView(view, made)}


HANDED: Object = {
    "exitCode": 0,
    "reason": "Completed",
    "message": "4 files",
    "adapterDir": FOLDER,
    "adapterSha256": "a" * 64,
    "published": {"to": "acme/expected-name", "revision": "b" * 40, "files": 4, "bytes": 5},
}
REFUSED: Object = {"exitCode": 74, "reason": "AdapterBroken", "message": "tensor x has values that are not finite"}


def ends(code: int | None, message: Object | None = None, at_second: float = 200) -> JobPlan:
    """The pass that sees the end of the only attempt."""
    left = json.dumps(message) if message is not None else ""
    pods = [pod(ended=at_second, code=code, message=left)]
    return look(job([attempt()]), at_second, pods=pods, jobs=[batch(finished=True)], said=report())


def killed() -> TrainingJob:
    return then(job([attempt()]), ends(137))


# The attempts run out

LAST_WORDS: dict[str, tuple[int | None, Object | None, Object | None]] = {
    "it was killed and said nothing": (137, None, BEST),
    "it said where the best one lies by then": (
        138,
        {"exitCode": 138, "reason": "X", "provisional": {"step": 50, "path": "/new"}},
        {"step": 50, "path": "/new"},
    ),
    "it ended in words that know of none": (138, {"exitCode": 138, "reason": "X"}, BEST),
}


@pytest.mark.parametrize("case", LAST_WORDS)
def test_the_best_adapter_so_far_is_handed_over_when_the_last_attempt_has_failed(case: str) -> None:
    code, words, best = LAST_WORDS[case]
    plan = ends(code, words)
    assert plan.status is not None
    assert plan.status.provisional is not None
    assert plan.status.provisional.to_wire() == best
    assert plan.status.early_end is not None
    assert plan.status.early_end.reason == "AttemptsExhausted"
    assert plan.status.attempts[-1].outcome is AttemptOutcome.FAILED, "it is not called a success"
    assert told(plan, "Running")[0] == "Submitting"
    assert (plan.actions, plan.wake_at) == ((), at(200)), "written before its Job is made"
    assert not is_said(plan, "Failed")


def test_its_submit_step_verifies_from_scratch_what_lies_in_the_folder_then() -> None:
    plan = look(killed(), 210)
    (action,) = plan.actions
    assert action == EnsureStep(StepName.SUBMIT, DEADLINE - 210, at(DEADLINE), at(DEADLINE + 21_600), provisional=True)
    assert states(plan) == {"Prepare": "Succeeded", "Train": "Failed", "Submit": "Pending"}
    text = step_config_map(killed(), action)["data"]["submit.json"]
    config = SubmitConfig.model_validate_json(text)
    assert (config.unverified, config.provisional) == (True, True)
    assert config.adapter_dir == f"/data/output/{NAME}/provisional"
    assert config.deadline == at(DEADLINE)
    ordinary = SubmitConfig.model_validate_json(
        step_config_map(killed(), replace(action, provisional=False))["data"]["submit.json"]
    )
    assert (ordinary.unverified, ordinary.provisional) == (False, False)


def test_the_job_is_complete_once_it_was_verified_and_says_what_it_is_and_why() -> None:
    plan = look(killed(), 410, steps=submitted(well=True, message=HANDED))
    assert told(plan, "Complete") == (
        "Succeeded",
        "the best adapter so far, of step 40, was verified and handed over to acme/expected-name; the training ended "
        "early: AttemptsExhausted: attempt 1 ended with exit code 137: no message (attempt 1 of 1)",
    )
    assert states(plan) == {"Prepare": "Succeeded", "Train": "Failed", "Submit": "Succeeded"}
    assert plan.status is not None
    assert plan.status.result is not None
    assert (plan.status.result.adapter_path, plan.status.result.submitted_to) == (FOLDER, "acme/expected-name")
    assert plan.status.measured is not None
    assert plan.status.measured.trained_share is None, "nobody learns from it how long a whole training takes"
    assert not is_said(plan, "Failed")


FAILURES: dict[str, tuple[dict[StepName, StepView], float, str]] = {
    "it is not what it should be": (
        submitted(well=False, message=REFUSED),
        410,
        "was not handed over: step Submit ended with exit code 74: AdapterBroken: tensor x has values that are not",
    ),
    "it arrived too late": (
        submitted(well=True, finished=DEADLINE + 5, message=HANDED),
        DEADLINE + 6,
        "handed over to acme/expected-name at 2026-01-31T13:00:05Z, after the deadline",
    ),
    "no time was left for its Job": ({}, DEADLINE + 1, "the deadline has passed"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_else_the_job_has_failed_for_what_ended_the_training(case: str) -> None:
    steps, after, words = FAILURES[case]
    plan = look(killed(), after, steps=steps)
    reason, message = told(plan, "Failed")
    assert reason == "AttemptsExhausted"
    assert message.startswith("attempt 1 ended with exit code 137")
    assert words in message
    assert not is_said(plan, "Complete")


def test_a_cancelled_offer_stops_it() -> None:
    running = {StepName.SUBMIT: StepView(JobView(f"{NAME}-submit", "u", False, False, False, NOW))}
    plan = look(killed(), 300, steps=running, active=False)
    assert plan.actions == (SuspendJob(f"{NAME}-submit"),)
    assert told(plan, "Failed")[0] == "Cancelled"


# Nothing to hand it over with, or nothing to hand over

NAMED = f"the best adapter so far, of step 40, which was not verified, lies in {FOLDER}"


@pytest.mark.parametrize("run", [{"output": {"repository": None}}, {"steps": None}], ids=["no target", "no steps"])
def test_without_a_submit_step_the_failure_names_folder_and_step(run: Object) -> None:
    made = job([attempt()], run)
    plan = look(made, 200, pods=[pod(ended=200, code=137)], jobs=[batch(finished=True)], said=report())
    reason, message = told(plan, "Failed")
    assert reason == "AttemptsExhausted"
    assert message.endswith(NAMED)
    assert plan.status is not None
    assert plan.status.provisional is not None
    assert plan.status.provisional.to_wire() == BEST


def test_a_failure_that_would_come_again_names_it_and_hands_nothing_over() -> None:
    plan = ends(int(ExitCode.BAD_DATA), {"exitCode": 65, "reason": "BadData", "message": "x"})
    reason, message = told(plan, "Failed")
    assert (reason, message.endswith(NAMED)) == ("Failed", True)


def test_an_adapter_that_failed_its_verification_is_none() -> None:
    before = job([attempt()], provisional=BEST)
    words = json.dumps({"exitCode": 74, "reason": "VerifyFailed", "message": "x"})
    plan = look(before, 200, pods=[pod(ended=200, code=74, message=words)], jobs=[batch(finished=True)])
    assert told(plan, "Failed") == ("Failed", "attempt 1 ended with exit code 74: VerifyFailed: x")
    assert plan.status is not None
    assert plan.status.provisional is None


def test_a_finished_training_has_a_result_and_no_best_so_far() -> None:
    words = json.dumps({"exitCode": 0, "reason": "Completed", "adapterDir": "/x"})
    plan = look(job([attempt()], provisional=BEST), 200, pods=[pod(ended=200, code=0, message=words)])
    assert plan.status is not None
    assert plan.status.provisional is None


def test_a_job_without_a_checkpoint_fails_as_before() -> None:
    made, pods = job([attempt()]), [pod(ended=200, code=137)]
    plan = look(made, 200, pods=pods, jobs=[batch(finished=True)], said=report(None))
    assert told(plan, "Failed")[1] == "attempt 1 ended with exit code 137: no message (attempt 1 of 1)"


def test_a_brought_trainer_has_no_best_so_far() -> None:
    theirs = job([attempt()], {"trainer": {"image": "registry.test/mine:1"}})
    plan = look(theirs, 200, pods=[pod(ended=200, code=137)], jobs=[batch(finished=True)], said=report())
    assert told(plan, "Failed")[0] == "AttemptsExhausted"
    assert plan.status is not None
    assert plan.status.provisional is None


def test_while_attempts_are_left_the_training_goes_on() -> None:
    made = job([attempt()], {"limits": {"maxAttempts": 3}})
    plan = look(made, 200, pods=[pod(ended=200, code=137)], jobs=[batch(finished=True)], said=report())
    assert told(plan, "Running")[0] == "AttemptFailed"
    assert plan.status is not None
    assert (plan.status.early_end, plan.status.provisional is not None) == (None, True)


# The time runs out

AT_WORK: dict[str, tuple[float, ProgressReport | None, Object | None, bool]] = {
    # After so many seconds, with this report and this in the status already: is it stopped?
    "the time is not up": (DEADLINE - KEPT - 1, report(), BEST, False),
    "the time is up": (DEADLINE - KEPT, report(), BEST, True),
    "it cannot be reached": (DEADLINE - KEPT, None, BEST, True),
    "there is nothing to hand over": (DEADLINE - KEPT, report(None), None, False),
    "it verifies its result": (DEADLINE - KEPT, report(state="Verifying"), BEST, False),
    "it still verifies its result": (DEADLINE - KEPT / 2, report(state="Verifying"), BEST, True),
    "another attempt verified": (DEADLINE - KEPT, report(state="Verifying", attempt=2), BEST, True),
}


@pytest.mark.parametrize("case", AT_WORK)
def test_a_trainer_that_does_not_end_in_time_is_stopped_while_there_is_time_to_hand_over(case: str) -> None:
    after, said, known, stopped = AT_WORK[case]
    made = job([attempt()], {"limits": {"maxAttempts": 3}}, **({"provisional": known} if known else {}))
    plan = look(made, after, pods=[pod()], jobs=[batch()], said=said)
    assert plan.actions == ((SuspendJob(FIRST),) if stopped else ())
    assert told(plan, "Running")[0] == ("Stopping" if stopped else "Running")


def test_its_end_is_no_reason_for_another_attempt_then() -> None:
    made = job([attempt()], {"limits": {"maxAttempts": 3}}, provisional=BEST)
    late = DEADLINE - KEPT + 20
    plan = look(made, late, pods=[pod(ended=late, code=143)], jobs=[batch(suspended=True)])
    assert plan.status is not None
    assert plan.status.early_end is not None
    assert plan.status.early_end.reason == "DeadlineExceeded"
    assert "the time for the training was over at 2026-01-31T12:50:00Z" in plan.status.early_end.message
    (action,) = look(then(made, plan), late + 1).actions
    assert isinstance(action, EnsureStep)
    assert (action.provisional, action.seconds) == (True, KEPT - 21)


def test_a_trainer_that_ends_well_after_all_has_its_own_result() -> None:
    made = job([attempt()], provisional=BEST)
    words = json.dumps({"exitCode": 0, "reason": "DeadlineReached", "adapterDir": "/x"})
    late = DEADLINE - KEPT + 20
    plan = look(made, late, pods=[pod(ended=late, code=0, message=words)], jobs=[batch(suspended=True)])
    (action,) = plan.actions
    assert isinstance(action, EnsureStep)
    assert action.provisional is False


def test_between_two_attempts_the_time_is_kept_as_well() -> None:
    over = attempt(outcome="Failed", finishedAt=rfc3339(at(DEADLINE - KEPT - 5)), message="x")
    made = job([over], {"limits": {"maxAttempts": 3}}, provisional=BEST)
    before = look(made, DEADLINE - KEPT - 4)
    assert before.wake_at is not None
    assert before.wake_at <= at(DEADLINE - KEPT)
    plan = look(made, DEADLINE - KEPT)
    assert plan.status is not None
    assert plan.status.early_end is not None


def test_after_the_deadline_nothing_is_handed_over_and_the_failure_names_it() -> None:
    made = job([attempt()], provisional=BEST)
    plan = look(made, DEADLINE + 1, jobs=[batch(suspended=True)])
    reason, message = told(plan, "Failed")
    assert reason == "DeadlineExceeded"
    assert message == f"the deadline 2026-01-31T13:00:00Z has passed; {NAMED}, and no time is left to hand it over"
    assert plan.status is not None
    assert plan.status.early_end is None


def test_without_a_deadline_there_is_all_the_time() -> None:
    made = job([attempt(deadline=None)], {"clockMode": "Training"}, provisional=BEST)
    plan = look(made, 200_000, pods=[pod(ended=200_000, code=137)], jobs=[batch(finished=True)])
    (action,) = look(then(made, plan), 200_001).actions
    assert isinstance(action, EnsureStep)
    assert action.provisional


# What is known of it


def test_it_is_taken_with_the_figures_and_makes_no_write_of_its_own() -> None:
    running: Any = {"pods": [pod()], "jobs": [batch()]}
    made = then(job([attempt()]), first := look(job([attempt()]), 60, said=report(), **running))
    assert first.status is not None
    assert first.status.provisional is not None
    newer = report({"step": 50, "path": "/new"})
    assert look(made, 61, said=newer, **running).status is None
    later = newer.model_copy(update={"last_updated_time": at(70)})
    again = look(made, 71, said=later, **running)
    assert again.status is not None
    assert again.status.provisional is not None
    assert again.status.provisional.step == 50


def test_the_next_attempt_begins_with_what_the_one_before_has_left() -> None:
    over = attempt(outcome="Failed", finishedAt=rfc3339(at(100)), message="x")
    made = job([over], {"limits": {"maxAttempts": 3}}, provisional=BEST)
    placed = look(made, 200, said=report(None))
    begun = look(then(made, placed), 201, said=report(None))
    assert [type(action) for action in begun.actions] == [EnsureAttempt]
    for plan in (placed, begun):
        assert plan.status is not None
        assert plan.status.provisional is not None
