"""The steps around a training: which a task needs, when their Jobs are made, what their ends mean, what they carry."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from builders import Object, merged
from core_builders import at, decide, offer, policy
from goldens import assert_golden
from step_jobs import FETCHED, HUB_DATA, NAME, STEPS, SUBMITTED, admitted, job, look, made_by, states, told, trained
from taskoffer.api.base import rfc3339
from taskoffer.api.contract import ExitCode, PrepareConfig, RunConfig, SubmitConfig, item_path
from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.taskoffer import MAX_OFFER_NAME
from taskoffer.api.v1alpha1.trainingjob import StepName, TrainingJob
from taskoffer.decision.conditions import condition_of
from taskoffer.decision.job_facts import (
    EnsureAttempt,
    EnsureStep,
    Refusal,
    SuspendJob,
)
from taskoffer.decision.naming import job_name, step_name
from taskoffer.render.job import attempt_job, config_map
from taskoffer.render.steps import step_config_map, step_job

# The offer


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"model": {"source": None}}, "model.source"),
        ({"dataset": HUB_DATA}, "dataset.source"),
        ({"output": {"persistentVolumeClaim": None}}, "output"),
        ({"output": {"repository": "acme/x"}}, "output.repository"),
        ({"output": {"url": "s3://bucket/out/"}}, "output.url"),
    ],
)
def test_what_lies_elsewhere_is_served_by_a_policy_with_steps_alone(spec: Object, field: str) -> None:
    view = offer(spec=spec)
    answer = decide(view).answer
    assert answer.reason is Reason.FEATURE_NOT_SERVED
    assert f"spec.{field} is not served" in answer.message
    with_steps = policy(steps=STEPS)
    assert decide(view, policies=[with_steps]).answer.reason is Reason.ADMITTED


@pytest.mark.parametrize(
    ("output", "secret", "field"),
    [
        ({"repository": "acme/x"}, "hubToken", "output.repository"),
        ({"url": "s3://bucket/out/"}, "s3Credentials", "output.url"),
    ],
)
def test_a_result_that_nobody_could_write_is_refused_before_its_training(
    output: Object, secret: str, field: str
) -> None:
    without = {name: value for name, value in STEPS.items() if name != secret}
    answer = decide(offer(spec={"output": output}), policies=[policy(steps=without)]).answer
    assert answer.reason is Reason.FEATURE_NOT_SERVED
    assert f"spec.{field} is not served: give the policy steps.{secret}, or remove it" in answer.message


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"model": {"source": None, "name": "a model with blanks"}}, "model.name"),
        ({"model": {"source": {"persistentVolumeClaim": None, "url": "s3://B/x/"}}}, "model.source.url"),
        ({"dataset": {"source": {"persistentVolumeClaim": None, "hub": {"name": "x y"}}}}, "dataset.source"),
        ({"dataset": {"source": {"persistentVolumeClaim": None, "url": {"url": "https:// x"}}}}, "dataset.source"),
        (
            {"dataset": {"source": {"persistentVolumeClaim": None, "url": {"url": "https://x:99999"}}}},
            "dataset.source",
        ),
        ({"dataset": {"source": {"persistentVolumeClaim": None, "url": {"url": "https://[::1/r"}}}}, "dataset.source"),
        ({"dataset": {"source": {"persistentVolumeClaim": None, "url": {"url": "https://?x"}}}}, "dataset.source"),
        ({"output": {"repository": "../x"}}, "output"),
        # Nobody but the hub knows whose it would be, and it cannot be looked at afterwards.
        ({"output": {"repository": "x"}}, "output"),
        # What the hub's own library refuses.
        ({"output": {"repository": "acme/x--y"}}, "output"),
        ({"output": {"repository": "acme/x.git"}}, "output"),
        ({"output": {"repository": "acme/" + "x" * 97}}, "output"),
        ({"model": {"source": None, "name": "acme/llama-1b-"}}, "model.name"),
        ({"output": {"url": "s3://B/x/"}}, "output"),
    ],
)
def test_what_nobody_can_ask_for_is_refused_before_it_holds_a_gpu(spec: Object, field: str) -> None:
    allowed = policy(steps=STEPS, filters={"unknownFamily": "0.5", "unknownParameters": 1_000_000_000})
    answer = decide(offer(spec=spec), policies=[allowed]).answer
    assert answer.reason is Reason.FEATURE_NOT_SERVED
    assert f"spec.{field} is not served: it " in answer.message


# The course


def test_model_and_data_are_fetched_before_the_first_attempt() -> None:
    plan = look(job(FETCHED))
    (action,) = plan.actions
    assert action == EnsureStep(StepName.PREPARE, 3590, at(3600), at(3600 + 21_600))
    assert told(plan) == ("Preparing", "model and data are being fetched")
    assert states(plan) == {"Prepare": "Pending", "Train": "Pending"}
    running = look(job(FETCHED), {StepName.PREPARE: made_by("prepare")})
    assert running.actions == ()
    assert states(running) == {"Prepare": "Running", "Train": "Pending"}


def test_the_training_begins_once_they_are_there_and_they_are_not_fetched_again() -> None:
    said = json.dumps({"exitCode": 0, "reason": "Completed", "message": "2 items"})
    plan = look(job(FETCHED), {StepName.PREPARE: made_by("prepare", ended=True, message=said)})
    assert [type(action) for action in plan.actions] == [EnsureAttempt]
    assert states(plan) == {"Prepare": "Succeeded", "Train": "Pending"}
    assert [(n.reason, n.message) for n in plan.notices] == [(Reason.PREPARING, "step Prepare succeeded: 2 items")]
    # Its Job may be removed meanwhile: the status remembers.
    again = look(job(FETCHED, steps=[{"name": "Prepare", "state": "Succeeded"}]))
    assert [type(action) for action in again.actions] == [EnsureAttempt]


def test_what_fetching_took_is_off_the_time_that_kubernetes_gives_the_training() -> None:
    """Admitted at 0 with three hours; its Job is made after two of them."""
    said = json.dumps({"exitCode": 0, "reason": "Completed", "message": "2 items"})
    made, fetched = job(FETCHED), {StepName.PREPARE: made_by("prepare", ended=True, message=said)}
    (action,) = look(made, fetched, after=7200, offer=admitted(10_800)).actions
    assert isinstance(action, EnsureAttempt)
    spec = attempt_job(made, action.attempt, action.number, action.seconds)["spec"]
    assert spec["activeDeadlineSeconds"] == 3600 + 60


def test_a_task_whose_model_and_data_lie_on_claims_has_no_such_step() -> None:
    plan = look(job({}))
    assert [type(action) for action in plan.actions] == [EnsureAttempt]
    assert states(plan) == {"Train": "Pending"}


@pytest.mark.parametrize(
    ("message", "code", "words"),
    [
        (
            json.dumps({"exitCode": 77, "reason": "NoAccess", "message": "the address has expired"}),
            77,
            "step Prepare ended with exit code 77: NoAccess: the address has expired",
        ),
        ("", None, "step Prepare ended with it did not end in time, or its pod was removed"),
    ],
)
def test_what_cannot_be_fetched_fails_the_job_with_the_reason(message: str, code: int | None, words: str) -> None:
    plan = look(job(FETCHED), {StepName.PREPARE: made_by("prepare", ended=False, message=message, code=code)})
    assert told(plan, "Failed") == ("PrepareFailed", words)
    assert states(plan) == {"Prepare": "Failed", "Train": "Failed"}


def test_without_a_deadline_the_files_are_kept_for_as_long_as_the_policy_says() -> None:
    (action,) = look(job(FETCHED), offer=admitted(None)).actions
    assert action == EnsureStep(StepName.PREPARE, 21_600, None, at(10 + 604_800))


def test_a_job_that_waited_for_longer_than_it_keeps_its_files_fetches_them_again_before_it_goes_on() -> None:
    """An attempt may take its time limit of an hour, and handing over its result six."""
    kept = {"name": "Prepare", "state": "Succeeded", "message": "2 items"}
    long = job(FETCHED, steps=[{**kept, "leaseUntil": rfc3339(at(7 * 3600 + 100))}])
    assert [type(action) for action in look(long, after=90, offer=admitted(None)).actions] == [EnsureAttempt]
    waited = look(long, {StepName.PREPARE: made_by("prepare", ended=True)}, after=110, offer=admitted(None))
    assert waited.actions == (EnsureStep(StepName.PREPARE, 21_600, None, at(110 + 604_800), repeats=1),)
    assert told(waited) == ("Preparing", "model and data are being fetched")
    assert waited.status is not None
    (step_of_it, _) = waited.status.steps
    assert (step_of_it.state, step_of_it.repeats, step_of_it.lease_until) == ("Pending", 1, at(110 + 604_800))
    again = TrainingJob.model_validate(merged(long.to_wire(), {"status": waited.status.to_wire()}))
    assert step_job(again, waited.actions[0])["metadata"]["name"] == f"{NAME}-pre-1"
    # The Job of the first time is still there, and says nothing of the second.
    asked = look(again, {StepName.PREPARE: made_by("prepare", ended=True)}, after=120, offer=admitted(None))
    assert asked.actions == waited.actions
    assert look(again, {StepName.PREPARE: made_by("pre-1")}, after=130, offer=admitted(None)).actions == ()
    ended = look(again, {StepName.PREPARE: made_by("pre-1", ended=True)}, after=140, offer=admitted(None))
    assert [type(action) for action in ended.actions] == [EnsureAttempt]


def test_the_job_of_a_step_that_was_begun_again_has_a_name_that_can_be_a_label() -> None:
    longest = job_name("o" * MAX_OFFER_NAME, "01234567-89ab")
    names = {step_name(longest, name.value, repeats) for name in StepName for repeats in (0, 1, 9999)}
    assert len(names) == 3 * len(StepName)
    assert max(map(len, names)) == 63


def test_a_job_with_a_deadline_keeps_its_files_until_its_result_is_handed_over() -> None:
    plan = look(job(FETCHED))
    assert plan.status is not None
    made = TrainingJob.model_validate(merged(job(FETCHED).to_wire(), {"status": plan.status.to_wire()}))
    late = look(made, {StepName.PREPARE: made_by("prepare", ended=True)}, after=3500)
    assert [type(action) for action in late.actions] == [EnsureAttempt]


def test_a_long_training_without_a_deadline_keeps_its_files_for_as_long_as_it_may_take() -> None:
    month = 30 * 86_400
    (action,) = look(job({**FETCHED, "timeLimitSeconds": month}), offer=admitted(None)).actions
    assert isinstance(action, EnsureStep)
    assert action.lease_until == at(10 + month + 2 * 21_600)


@pytest.mark.parametrize("order", [1, -1])
def test_of_a_step_that_was_begun_again_the_newest_job_counts(order: int) -> None:
    from types import SimpleNamespace

    from taskoffer.reconcile.observed import _steps

    views = [replace(made_by(name).job, created=at(after)) for name, after in (("prepare", 0), ("pre-1", 7200))]
    jobs = {v.name: SimpleNamespace(step=StepName.PREPARE, uid=v.uid, view=v) for v in views[::order]}
    world: Any = SimpleNamespace(batch_of={"key": jobs}, pods_of={})
    key: Any = "key"
    assert _steps(world, key)[StepName.PREPARE].job.name == f"{NAME}-pre-1"


def test_a_step_whose_job_the_server_refuses_is_asked_for_again_and_given_up_in_the_end() -> None:
    refusal = Refusal(f"{NAME}-prepare", "the quota on Jobs is used up", at(10), at(10))
    waits = look(job(FETCHED), after=12, refusal=refusal)
    assert (waits.actions, told(waits)) == ((), ("JobRefused", "the quota on Jobs is used up"))
    assert waits.wake_at == at(15)
    asks = look(job(FETCHED), after=16, refusal=refusal)
    assert [type(action) for action in asks.actions] == [EnsureStep]
    gives_up = look(job(FETCHED), after=21_700, offer=admitted(None), refusal=refusal)
    assert told(gives_up, "Failed")[0] == "PrepareFailed"


def test_a_cancelled_offer_stops_the_step_that_runs() -> None:
    plan = look(job(FETCHED), {StepName.PREPARE: made_by("prepare")}, offer=admitted(active=False))
    assert plan.actions == (SuspendJob(f"{NAME}-prepare"),)
    assert told(plan, "Failed")[0] == "Cancelled"


def test_the_result_is_handed_over_after_the_training_and_only_then_the_job_is_complete() -> None:
    plan = look(trained({**FETCHED, **SUBMITTED}), after=70)
    (action,) = plan.actions
    assert isinstance(action, EnsureStep)
    assert (action.name, action.seconds) == (StepName.SUBMIT, 3530)
    assert told(plan)[0] == "Submitting"
    assert condition_of(plan.status.conditions, "Complete") is None if plan.status else False
    assert states(plan) == {"Prepare": "Succeeded", "Train": "Succeeded", "Submit": "Pending"}

    published = {"to": "acme/expected-name", "revision": "a" * 40, "files": 4, "bytes": 5}
    said = json.dumps({"exitCode": 0, "reason": "Completed", "message": "4 files", "published": published})
    done = look(trained({**FETCHED, **SUBMITTED}), {StepName.SUBMIT: made_by("submit", ended=True, message=said)})
    text = "trained and verified; held-out loss 3.5000 -> 2.2500; submitted to acme/expected-name"
    assert told(done, "Complete") == ("Succeeded", text)
    assert states(done) == {"Prepare": "Succeeded", "Train": "Succeeded", "Submit": "Succeeded"}
    assert done.status is not None
    assert done.status.result is not None
    assert done.status.result.submitted_revision == "a" * 40


def test_a_step_that_lacked_memory_says_how_much_it_had_and_what_gives_it_more() -> None:
    ended = made_by("submit", ended=False, message="loading the base model", code=137, reason="OOMKilled")
    assert told(look(trained(SUBMITTED), {StepName.SUBMIT: ended}), "Failed") == (
        "SubmitFailed",
        "step Submit ended with exit code 137: OOMKilled: the container was killed for lack of memory "
        "(its limit is 4Gi); steps.memory gives it more; log ends: loading the base model",
    )


def test_a_result_that_cannot_be_handed_over_fails_the_job_and_not_the_training() -> None:
    said = json.dumps({"exitCode": 74, "reason": "VerifyFailed", "message": "no tensors"})
    plan = look(trained(SUBMITTED), {StepName.SUBMIT: made_by("submit", ended=False, message=said, code=74)})
    assert told(plan, "Failed") == ("SubmitFailed", "step Submit ended with exit code 74: VerifyFailed: no tensors")
    assert states(plan)["Train"] == "Succeeded"
    late = look(trained(SUBMITTED), after=3601)
    assert told(late, "Failed") == ("DeadlineExceeded", "the result is being handed over: the deadline has passed")


# The objects

FULL = {**FETCHED, **SUBMITTED}


def ensured(name: StepName) -> EnsureStep:
    return EnsureStep(name, 600, at(3600), at(7200))


def test_where_a_result_is_to_go_is_asked_beforehand_also_when_nothing_is_to_be_fetched() -> None:
    made = job(SUBMITTED)
    plan = look(made)
    (action,) = plan.actions
    assert isinstance(action, EnsureStep)
    assert told(plan) == ("Preparing", "it is being asked whether the result may be handed over")
    text = step_config_map(made, action)["data"]["prepare.json"]
    found = PrepareConfig.model_validate_json(text)
    assert found.items == ()
    submit = SubmitConfig.model_validate_json(step_config_map(made, ensured(StepName.SUBMIT))["data"]["submit.json"])
    assert found.target == submit.target is not None
    assert found.credentials == submit.credentials
    # There is nothing of the cache that the training would read.
    asked = job(SUBMITTED, steps=[{"name": "Prepare", "state": "Succeeded"}])
    mounts = attempt_job(asked, first_attempt_of(asked), 1)["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert "cache" not in {mount["name"] for mount in mounts}
    # What stays on its claim is asked of nobody.
    assert [type(one) for one in look(job({})).actions] == [EnsureAttempt]


@pytest.mark.parametrize("name", [StepName.PREPARE, StepName.SUBMIT])
def test_the_job_of_a_step(name: StepName) -> None:
    assert_golden(f"step-{name.value.lower()}", step_job(job(FULL), ensured(name)))


def test_the_steps_read_what_they_were_given_and_no_secret_is_in_it() -> None:
    data = step_config_map(job(FULL), ensured(StepName.PREPARE))["data"]["prepare.json"]
    found = PrepareConfig.model_validate_json(data)
    model, rows = found.items
    assert model.source.hub is not None
    assert (model.source.hub.repository, model.size_limit) == ("meta-llama/Llama-3.1-8B", 200 << 30)
    assert rows.source.hub is not None
    assert (rows.source.hub.repository, rows.source.hub.split, rows.file_format) == ("acme/rows", "train", None)
    assert found.cache.size_limit == 500 << 30
    assert (found.lease_expires_at, found.deadline) == (at(7200), at(3600))
    assert found.credentials.hub_token_file == "/etc/taskoffer-secrets/hub/token"
    submit = SubmitConfig.model_validate_json(
        step_config_map(job(FULL), ensured(StepName.SUBMIT))["data"]["submit.json"]
    )
    assert submit.adapter_dir == f"/data/output/runs/{NAME}/adapter"
    assert submit.target.hub is not None
    assert submit.target.hub.repository == "acme/expected-name"


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ({"url": {"url": "https://data.test/rows.json?sig=1"}}, "url"),
        ({"url": {"url": "s3://bucket/rows.jsonl"}}, "s3"),
        ({"hub": {"name": "acme/rows"}}, "hub"),
    ],
)
def test_data_is_fetched_from_where_the_offer_says(source: Object, kind: str) -> None:
    made = job({"dataset": {"source": {"persistentVolumeClaim": None, **source}, "fileFormat": "jsonl"}})
    text = step_config_map(made, ensured(StepName.PREPARE))["data"]["prepare.json"]
    (item,) = PrepareConfig.model_validate_json(text).items
    assert getattr(item.source, kind) is not None


@pytest.mark.parametrize(("said", "private"), [({}, True), ({"privateRepositories": False}, False)])
def test_a_repository_that_is_created_is_private_unless_the_policy_says_otherwise(said: Object, private: bool) -> None:
    made = job({**FULL, "steps": merged(STEPS, said)})
    text = step_config_map(made, ensured(StepName.SUBMIT))["data"]["submit.json"]
    hub = SubmitConfig.model_validate_json(text).target.hub
    assert hub is not None
    assert (hub.repository, hub.private) == ("acme/expected-name", private)


def first_attempt_of(made: TrainingJob) -> Any:
    (action,) = [a for a in look(made).actions if isinstance(a, EnsureAttempt)]
    return action.attempt


def test_the_training_finds_what_was_fetched_and_sees_nothing_else_of_the_cache() -> None:
    made = job(FULL, steps=[{"name": "Prepare", "state": "Succeeded"}])
    attempt = first_attempt_of(made)
    config = RunConfig.model_validate_json(config_map(made, attempt, 1)["data"]["run.json"])
    prepare = PrepareConfig.model_validate_json(
        step_config_map(made, ensured(StepName.PREPARE))["data"]["prepare.json"]
    )
    assert config.model.path == f"/cache/{item_path(NAME, prepare.items[0])}"
    assert config.data.path == f"/cache/{item_path(NAME, prepare.items[1])}"
    # Prepare sees how the rows are stored, and the training what has come.
    assert config.data.file_format is None
    # The training leaves time to hand the result over.
    assert config.deadline == at(3600 - 300)
    container = attempt_job(made, attempt, 1)["spec"]["template"]["spec"]["containers"][0]
    (mount,) = [m for m in container["volumeMounts"] if m["name"] == "cache"]
    assert mount == {
        "name": "cache",
        "mountPath": f"/cache/jobs/{NAME}",
        "subPath": f"jobs/{NAME}",
        "readOnly": True,
    }


def test_only_the_training_has_gpus_and_only_the_steps_have_tokens() -> None:
    made = job(FULL, steps=[{"name": "Prepare", "state": "Succeeded"}])
    train = attempt_job(made, first_attempt_of(made), 1)["spec"]["template"]
    assert train["metadata"]["labels"]["taskoffer.dev/step"] == "train"
    assert not [v for v in train["spec"]["volumes"] if "secret" in v]
    for name in (StepName.PREPARE, StepName.SUBMIT):
        template = step_job(made, ensured(name))["spec"]["template"]
        assert template["metadata"]["labels"]["taskoffer.dev/step"] == name.value.lower()
        assert "taskoffer.dev/offer-uid" not in template["metadata"]["labels"]
        assert "nvidia.com/gpu" not in json.dumps(template)
        assert [v["secret"]["secretName"] for v in template["spec"]["volumes"] if "secret" in v] == ["hub", "s3"]


def test_ends_that_would_come_again_are_not_tried_again() -> None:
    rules = step_job(job(FULL), ensured(StepName.PREPARE))["spec"]["podFailurePolicy"]["rules"]
    assert rules[0]["action"] == "FailJob"
    values = set(rules[0]["onExitCodes"]["values"])
    assert {ExitCode.BAD_CONFIG, ExitCode.BAD_DATA, ExitCode.NO_MODEL, ExitCode.NO_ACCESS} <= values
    assert not {ExitCode.RESTART, ExitCode.STOPPED, ExitCode.INTERNAL, ExitCode.DONE} & values
