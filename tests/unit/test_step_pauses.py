"""A step that asks to be started again is begun anew with growing pauses until the deadline, and no other one is."""

from __future__ import annotations

import json
from typing import Any

import pytest

from builders import Object, merged
from core_builders import at
from step_jobs import FETCHED, NAME, STEPS, SUBMITTED, admitted, job, look, made_by, states, told, trained
from taskoffer.api.contract import ExitCode
from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.trainingjob import StepName, StepStatus, TrainingJob
from taskoffer.decision.job_facts import DeleteJob, EnsureAttempt, EnsureStep, JobPlan, StepView, SuspendJob
from taskoffer.render.steps import step_config_map, step_job

FULL = json.dumps({"exitCode": 138, "reason": "CacheFull", "message": "Try again when jobs have ended"})
DOWN = json.dumps({"exitCode": 138, "reason": "HubUnavailable", "message": "the hub answered 503"})
PREDICTED: Object = {"trainingSeconds": 250, "durationFactor": "2.0", "peakMemoryBytes": 1, "checkpointBytes": 1}
PAUSES: Object = {"backoffSeconds": 60, "backoffMaxSeconds": 200}


def asks_again(name: str, message: str = DOWN) -> StepView:
    return made_by(name, ended=False, message=message, code=138)


def kept(made: TrainingJob, plan: JobPlan) -> TrainingJob:
    """What the API server holds after a pass: all that a restart of the operator leaves."""
    assert plan.status is not None
    wire = made.to_wire()
    wire["status"] = plan.status.to_wire()
    return TrainingJob.model_validate(wire)


def step_of(made: TrainingJob, name: StepName) -> StepStatus:
    return next(one for one in made.status.steps if one.name is name)


def test_a_hub_that_is_down_for_hours_does_not_end_a_finished_training() -> None:
    made = trained(merged(SUBMITTED, {"steps": merged(STEPS, PAUSES)}))
    now, view, pauses, names = 70.0, "submit", [], []
    for number in range(1, 12):
        failed = look(made, {StepName.SUBMIT: asks_again(view)}, after=now)
        assert failed.actions == ()
        made = kept(made, failed)
        again = step_of(made, StepName.SUBMIT)
        assert (again.state, again.failures, again.repeats) == ("Pending", number, number)
        assert again.message == "step Submit ended with exit code 138: HubUnavailable: the hub answered 503"
        assert again.next_try_at is not None
        assert failed.wake_at == again.next_try_at
        assert [(n.reason, n.warning) for n in failed.notices] == [(Reason.STEP_PAUSED, True)]
        assert told(failed)[0] == "StepPaused"
        for word in (f"try {number}: ", "HubUnavailable", "it is begun again at 2"):
            assert word in told(failed)[1]
        pauses.append((again.next_try_at - at(now)).total_seconds())
        # Whoever looks before that changes nothing, and does not begin either.
        early = look(made, {StepName.SUBMIT: asks_again(view)}, after=now + pauses[-1] - 1)
        assert (early.actions, early.status, early.wake_at) == ((), None, again.next_try_at)
        now += pauses[-1]
        begun = look(made, {StepName.SUBMIT: asks_again(view)}, after=now)
        dropped, action = begun.actions
        assert dropped == DeleteJob(f"{NAME}-{view}", f"{view}-uid")
        assert isinstance(action, EnsureStep)
        assert (action.name, action.repeats) == (StepName.SUBMIT, number)
        view = f"sub-{number}"
        names.append(view)
        runs = look(made, {StepName.SUBMIT: made_by(view)}, after=now + 1)
        made = kept(made, runs)
        running = step_of(made, StepName.SUBMIT)
        assert (running.state, running.failures, running.next_try_at) == ("Running", number, None)
        assert running.message is not None
        now += 5
    assert pauses[:4] == [60, 120, 200, 200]
    published = {"to": "acme/expected-name", "revision": "a" * 40, "files": 4, "bytes": 5}
    said = json.dumps({"exitCode": 0, "reason": "Completed", "message": "4 files", "published": published})
    done = look(made, {StepName.SUBMIT: made_by(view, ended=True, message=said)}, after=now)
    assert told(done, "Complete")[0] == "Succeeded"
    last = step_of(kept(made, done), StepName.SUBMIT)
    assert (last.state, last.message, last.failures) == ("Succeeded", "4 files", 11)


def test_a_full_cache_is_waited_for_before_the_training() -> None:
    made = job({**FETCHED, "steps": merged(STEPS, PAUSES)})
    made = kept(made, look(made))
    lease = step_of(made, StepName.PREPARE).lease_until
    made = kept(made, look(made, {StepName.PREPARE: asks_again("prepare", FULL)}, after=100))
    again = step_of(made, StepName.PREPARE)
    assert (again.next_try_at, again.lease_until) == (at(160), lease)
    assert "Try again when jobs have ended" in (again.message or "")
    begun = look(made, after=160)
    assert begun.actions == (EnsureStep(StepName.PREPARE, 3440, at(3600), lease or at(0), repeats=1, failures=1),)
    ended = look(made, {StepName.PREPARE: made_by("pre-1", ended=True)}, after=170)
    assert [type(action) for action in ended.actions] == [EnsureAttempt]


CODES = [
    (code, code is ExitCode.RESTART)
    for code in (*(one for one in ExitCode if one is not ExitCode.DONE), None, 1)
    if code not in (ExitCode.STOPPED,)
]


@pytest.mark.parametrize(("code", "again"), [*CODES, (ExitCode.STOPPED, False)], ids=str)
def test_no_other_end_is_waited_for(code: int | None, again: bool) -> None:
    plan = look(job(FETCHED), {StepName.PREPARE: made_by("prepare", ended=False, message="x", code=code)})
    assert states(plan)["Prepare"] == ("Pending" if again else "Failed")
    assert told(plan)[0] == ("StepPaused" if again else "PrepareFailed")


@pytest.mark.parametrize(
    ("after", "again"),
    [(3400, 3430), (3555, 3570), (3570, None), (3599, None)],
    ids=["the whole pause", "what is left of it", "the last half minute", "the last second"],
)
def test_the_last_try_begins_half_a_minute_before_the_deadline(after: float, again: float | None) -> None:
    made = trained(SUBMITTED)
    plan = look(made, {StepName.SUBMIT: asks_again("submit")}, after=after)
    if again is None:
        reason, message = told(plan, "Failed")
        assert reason == "SubmitFailed"
        assert "HubUnavailable: the hub answered 503; try 1 was the last before" in message
        assert states(plan) == {"Prepare": "Succeeded", "Train": "Succeeded", "Submit": "Failed"}
    else:
        assert step_of(kept(made, plan), StepName.SUBMIT).next_try_at == at(again)


SUBMITS_600: Object = merged(SUBMITTED, {"steps": merged(STEPS, {"submitSeconds": 600})})
LAST_BEGINS: dict[str, tuple[Object, float]] = {
    # What the job is: when Prepare, first begun after 10 s, is begun again for the last time.
    "half of the time is left": ({}, 1805),
    "half of what handing over leaves": (SUBMITS_600, 1505),
    "the predicted time is left": ({"predicted": PREDICTED}, 3100),
    "the predicted time is left before the handing over": (merged(SUBMITS_600, {"predicted": PREDICTED}), 2500),
    "half of the time for a training that needs nearly all": (
        {"predicted": merged(PREDICTED, {"trainingSeconds": 3000})},
        1805,
    ),
    "a step may not take longer": ({"steps": merged(STEPS, {"timeoutSeconds": 900})}, 880),
}


@pytest.mark.parametrize("case", LAST_BEGINS)
def test_prepare_is_begun_again_only_while_the_training_can_use_what_it_fetches(case: str) -> None:
    run, last = LAST_BEGINS[case]
    made = job(merged(merged({"steps": STEPS}, FETCHED), run))
    made = kept(made, look(made))
    early = look(made, {StepName.PREPARE: asks_again("prepare")}, after=last - 20)
    again = step_of(kept(made, early), StepName.PREPARE)
    assert again.next_try_at == at(last), "the pause ends early, so that there is one more try"
    late = look(made, {StepName.PREPARE: asks_again("prepare")}, after=last)
    reason, message = told(late, "Failed")
    assert reason == "PrepareFailed"
    assert "the hub answered 503; try 1 was the last before 2026-01-31T12:" in message


def test_prepare_does_not_run_into_the_time_for_handing_over() -> None:
    (action,) = look(job(merged(FETCHED, SUBMITS_600))).actions
    assert isinstance(action, EnsureStep)
    assert (action.seconds, action.deadline) == (2990, at(3600))


def test_the_tries_of_a_step_share_one_config_map_and_those_of_a_new_round_another() -> None:
    made = job({**FETCHED, "steps": STEPS})
    first, third, renewed = (
        EnsureStep(StepName.PREPARE, 600, at(3600), at(7200), repeats=repeats, failures=failures)
        for repeats, failures in ((0, 0), (2, 2), (3, 0))
    )
    names = [step_config_map(made, action)["metadata"]["name"] for action in (first, third, renewed)]
    assert names == [f"{NAME}-prepare", f"{NAME}-prepare", f"{NAME}-pre-3"]
    assert step_config_map(made, first) == step_config_map(made, third)
    for action, name in zip((first, third, renewed), names, strict=True):
        (volume,) = (v for v in step_job(made, action)["spec"]["template"]["spec"]["volumes"] if v["name"] == "run")
        assert volume["configMap"] == {"name": name}


def test_a_deadline_that_passes_in_a_pause_ends_the_job_with_what_the_step_said() -> None:
    made = trained(SUBMITTED)
    made = kept(made, look(made, {StepName.SUBMIT: asks_again("submit")}, after=3400))
    reason, message = told(look(made, {StepName.SUBMIT: asks_again("submit")}, after=3601), "Failed")
    assert reason == "DeadlineExceeded"
    assert message.endswith("the hub answered 503")


def test_without_a_deadline_a_step_is_begun_again_for_as_long_as_it_may_take() -> None:
    made = job({**FETCHED, "steps": merged(STEPS, {"timeoutSeconds": 600})})
    without: Any = {"offer": admitted(None)}
    made = kept(made, look(made, **without))
    early = look(made, {StepName.PREPARE: asks_again("prepare")}, after=500, **without)
    assert step_of(kept(made, early), StepName.PREPARE).next_try_at == at(530)
    late = look(made, {StepName.PREPARE: asks_again("prepare")}, after=600, **without)
    assert told(late, "Failed")[0] == "PrepareFailed"


def test_cancelling_an_offer_ends_a_pause() -> None:
    made = job(FETCHED)
    made = kept(made, look(made, {StepName.PREPARE: asks_again("prepare")}, after=100))
    plan = look(made, {StepName.PREPARE: asks_again("prepare")}, after=101, offer=admitted(active=False))
    assert told(plan, "Failed")[0] == "Cancelled"
    assert not [action for action in plan.actions if not isinstance(action, SuspendJob)]
