"""What is sent to the API server, compared whole with golden files and by rule where a rule matters."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from builders import make_admission, make_training_job, merged, stored
from core_builders import FOUR_GPUS, NOW, at, claim, condition, decide, offer, policy, spec_of
from goldens import assert_golden
from taskoffer.api.base import rfc3339
from taskoffer.api.contract import RunConfig
from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.taskoffer import Admission, TaskOfferStatus
from taskoffer.api.v1alpha1.trainingjob import Attempt, TrainingJob
from taskoffer.decision.job_facts import OfferEnd
from taskoffer.decision.keys import OfferKey
from taskoffer.decision.own_trainer import training_seconds
from taskoffer.render.job import attempt_job, config_map
from taskoffer.render.names import label_value
from taskoffer.render.offers import decision_patch, end_patch, revocation_patch
from taskoffer.render.patch import merge_patch
from taskoffer.render.quantity import times
from taskoffer.render.trainingjob import run_config, training_job

UID = "0123abcd-0000-4000-8000-000000000000"
FULL_POD = {
    "image": "registry.test/trainer:1",
    "imagePullPolicy": "IfNotPresent",
    "imagePullSecrets": ["pull"],
    "cpuPerGpu": "1500m",
    "memoryPerGpu": "1.5Gi",
    "sharedMemoryPerGpu": "64Mi",
    "serviceAccountName": "trainer",
    "runtimeClassName": "nvidia",
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "terminationGraceSeconds": 90,
}
CLAIMS = {
    "model": {"source": {"persistentVolumeClaim": {"claimName": "models", "path": "llama/8b"}}},
    "dataset": {"source": {"persistentVolumeClaim": {"claimName": "data", "path": "rows.jsonl"}}},
    "output": {"persistentVolumeClaim": {"claimName": "outputs", "path": "runs"}},
}


def made_job(**run: Any) -> TrainingJob:
    wire = make_training_job(gpus=run.pop("gpus", 2), offer_uid=UID, spec={"run": run})
    return TrainingJob.model_validate(stored(wire, uid="tj-uid"))


def full_job() -> TrainingJob:
    return made_job(pod=FULL_POD, priorityClassName="high", **CLAIMS)


def attempt(*, lane: str | None = "small text", deadline: float | None = 3600, gpus: int = 2) -> Attempt:
    place = {"nodeName": "node-a", "resourceName": "nvidia.com/gpu", "count": gpus}
    wire: dict[str, Any] = {
        "jobName": "offer-0123abcd-1",
        "assignments": [place | ({"lane": lane} if lane else {})],
        "createdAt": rfc3339(NOW),
    }
    return Attempt.model_validate(wire | ({"deadline": rfc3339(at(deadline))} if deadline else {}))


# Golden objects


def test_the_training_job_of_an_admission() -> None:
    admission = Admission.model_validate(make_admission(gpus=2, policy="h100x8", deadline=rfc3339(at(3600))))
    chosen = policy("h100x8", preset="strategy-8xh100").spec
    assert chosen is not None
    made = training_job(OfferKey("default", "offer"), UID, spec_of(priority_class="high"), admission, chosen)
    assert_golden("trainingjob", made)
    assert TrainingJob.model_validate(stored(made, uid="tj-uid")).spec.to_wire() == made["spec"]


@pytest.mark.parametrize(("preset", "name"), [("strategy-8xh100", None), ("lab", "organic")])
def test_a_priority_of_the_policys_own_is_no_priority_class_of_the_pod(preset: str, name: str | None) -> None:
    chosen = policy(preset=preset).spec
    assert chosen is not None
    admission = Admission.model_validate(make_admission(gpus=2))
    made = training_job(OfferKey("default", "offer"), UID, spec_of(priority_class="organic"), admission, chosen)
    assert made["spec"]["run"].get("priorityClassName") == name


def test_the_config_map_of_an_attempt() -> None:
    made = config_map(full_job(), attempt(), 1)
    assert_golden("configmap", {**made, "data": {name: json.loads(text) for name, text in made["data"].items()}})
    config = RunConfig.model_validate_json(made["data"]["run.json"])
    assert config.model.path == "/data/model/llama/8b"
    assert config.data.path == "/data/dataset/rows.jsonl"
    assert config.output_dir == "/data/output/runs/offer-0123abcd"
    assert config.checkpoint_dir == "/data/output/runs/.checkpoints/offer-0123abcd"


def test_the_job_of_an_attempt_with_everything_set() -> None:
    assert_golden("job-full", attempt_job(full_job(), attempt(), 1, 3600))


def test_the_job_of_an_attempt_with_nothing_set() -> None:
    assert_golden("job-plain", attempt_job(made_job(gpus=1), attempt(lane=None, deadline=None, gpus=1), 3))


DECISIONS = {
    "decision-admit": (offer("a", uid=UID, version="42", generation=3, hours=2), {}),
    "decision-wait": (offer("a", uid=UID, version="42", parameters=FOUR_GPUS), {"claims": [claim("x", count=6)]}),
    "decision-reject": (offer("a", uid=UID, version="42", hours=30, gpus=8), {}),
    "decision-duplicate": (
        offer("a", uid=UID, version="42", task_id="t", created=at(5)),
        {"siblings": [offer("first", task_id="t", waits="Admitted")]},
    ),
}


@pytest.mark.parametrize("name", DECISIONS)
def test_the_status_patch_of_a_decision(name: str) -> None:
    view, world = DECISIONS[name]
    patch = decision_patch(decide(view, **world), NOW)
    assert_golden(name, patch)
    assert patch["metadata"] == {"resourceVersion": "42", "uid": UID}
    TaskOfferStatus.model_validate({k: v for k, v in patch["status"].items() if v is not None})
    assert len(json.dumps(patch["status"]["explanation"])) <= 8192


def test_an_invalid_offer_is_answered_without_a_score() -> None:
    patch = decision_patch(decide(offer(invalid="taskType: nonsense")), NOW)
    assert patch["status"]["score"] is None
    assert [c["type"] for c in patch["status"]["conditions"]] == ["Admitted", "Finished"]


# Rules


def pod_of(job: TrainingJob, made: Attempt) -> dict[str, Any]:
    found: dict[str, Any] = attempt_job(job, made, 1)["spec"]["template"]["spec"]
    return found


@pytest.mark.parametrize("job", [full_job(), made_job()], ids=["full", "plain"])
def test_the_pod_keeps_the_restricted_pod_security_standard(job: TrainingJob) -> None:
    pod = pod_of(job, attempt())
    container = pod["containers"][0]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    allowed = {"configMap", "downwardAPI", "emptyDir", "persistentVolumeClaim", "name"}
    assert all(volume.keys() <= allowed for volume in pod["volumes"])
    assert pod["automountServiceAccountToken"] is False


def test_the_pod_is_tied_to_the_decided_node() -> None:
    affinity = pod_of(full_job(), attempt())["affinity"]["nodeAffinity"]
    assert affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"] == [
        {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["node-a"]}]}
    ]


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_requests_grow_with_the_gpus(gpus: int) -> None:
    resources = pod_of(made_job(gpus=gpus, pod=FULL_POD), attempt(gpus=gpus))["containers"][0]["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == str(gpus)
    assert resources["requests"]["cpu"] == f"{1500 * gpus}m"
    assert "cpu" not in resources["limits"]
    assert resources["limits"]["memory"] == resources["requests"]["memory"]


def test_kubernetes_itself_never_repeats_an_attempt() -> None:
    spec = attempt_job(full_job(), attempt(), 1)["spec"]
    assert (spec["backoffLimit"], spec["parallelism"], spec["completions"]) == (0, 1, 1)
    assert spec["template"]["spec"]["restartPolicy"] == "Never"


TIMES: list[tuple[float | None, float, int | None]] = [
    (3600, 0, 3660),
    (10_800, 7200, 3660),
    (0.5, 0, 61),
    (3600, 3700, 61),
    (None, 7200, None),
]


@pytest.mark.parametrize(("deadline", "made_at", "active"), TIMES)
def test_the_kubelets_deadline_comes_a_minute_after_the_attempts_however_late_its_job_is_made(
    deadline: float | None, made_at: float, active: int | None
) -> None:
    """A job is admitted at 0; what it fetches first, or who makes room for it, may take hours."""
    job, one = full_job(), attempt(deadline=deadline)
    seconds = training_seconds(job.spec.run, one, at(made_at))
    assert attempt_job(job, one, 1, seconds)["spec"].get("activeDeadlineSeconds") == active


def test_jobs_and_pods_carry_the_offers_uid() -> None:
    made = attempt_job(full_job(), attempt(), 2)
    for labels in (made["metadata"]["labels"], made["spec"]["template"]["metadata"]["labels"]):
        assert labels["taskoffer.dev/offer-uid"] == UID
        assert labels["taskoffer.dev/attempt"] == "2"


def test_one_claim_may_hold_model_data_and_output() -> None:
    same = merged(CLAIMS, {})
    for part in ("model", "dataset"):
        same[part]["source"]["persistentVolumeClaim"] = {"claimName": "all", "path": part}
    same["output"]["persistentVolumeClaim"] = {"claimName": "all"}
    pod = pod_of(made_job(**same), attempt())
    mounts = {m["name"]: m for m in pod["containers"][0]["volumeMounts"]}
    assert (mounts["model"]["readOnly"], mounts["dataset"]["readOnly"], mounts["output"]["readOnly"]) == (
        True,
        True,
        False,
    )
    assert all("readOnly" not in v.get("persistentVolumeClaim", {}) for v in pod["volumes"])


def test_without_claims_the_paths_are_the_mount_points() -> None:
    config = run_config(made_job(), attempt(deadline=None), 1)
    assert (config.model.path, config.data.path) == ("/data/model", "/data/dataset")
    assert config.output_dir == "/data/output/offer-0123abcd"
    assert (config.deadline, config.attempt, config.gpus) == (None, 1, 2)


CLOCKS = [("Absolute", at(3600), None), ("Training", None, 7200), ("Training", at(3600), 7200)]


@pytest.mark.parametrize(("mode", "deadline", "limit"), CLOCKS)
def test_the_trainer_is_told_when_its_time_ends_by_either_clock(mode: str, deadline: Any, limit: int | None) -> None:
    """What earlier attempts took is in the deadline that their first container's start has set."""
    made = attempt(deadline=None).model_copy(update={"deadline": deadline})
    config = run_config(made_job(clockMode=mode, timeLimitSeconds=7200), made, 2)
    assert (config.deadline, config.time_limit_seconds) == (deadline, limit)


@pytest.mark.parametrize(
    ("said", "rows", "prompts"),
    [({}, 8, ()), ({"minRows": 3, "samplePrompts": ["Who are you?", "And I?"]}, 3, ("Who are you?", "And I?"))],
)
def test_the_offer_says_how_few_rows_are_enough_and_what_the_model_is_asked(
    said: Any, rows: int, prompts: tuple[str, ...]
) -> None:
    config = run_config(made_job(dataset={**CLAIMS["dataset"], **said}), attempt(), 1)
    assert (config.data.min_rows, config.sample_prompts) == (rows, prompts)


@pytest.mark.parametrize(("said", "factor"), [({}, None), ({"yarnFactor": 4}, 4)])
def test_the_offer_says_by_how_much_the_models_context_is_stretched(said: Any, factor: int | None) -> None:
    config = run_config(made_job(model={**CLAIMS["model"], **said}), attempt(), 1)
    assert config.model.yarn_factor == factor
    assert ("yarnFactor" in config.to_wire()["model"]) == (factor is not None)


@pytest.mark.parametrize(
    ("reasons", "number", "told"),
    [
        ([], 1, None),
        (["Error"], 2, None),
        (["OOMKilled"], 2, (1,)),
        (["OOMKilled", "GradientsNotFinite", "OOMKilled"], 4, (1, 3)),
        # The attempt that this is about, and one that was made since, are none that were before it.
        (["OOMKilled", "OOMKilled", "OOMKilled"], 2, (1,)),
    ],
)
def test_the_trainer_is_told_which_attempts_lacked_memory_without_a_last_word(
    reasons: list[str], number: int, told: tuple[int, ...] | None
) -> None:
    made = made_job()
    attempts = tuple(attempt().model_copy(update={"reason": reason}) for reason in reasons)
    made = made.model_copy(update={"status": made.status.model_copy(update={"attempts": attempts})})
    config = run_config(made, attempt(), number)
    assert config.lacked_memory == told
    # Images from before there was such a setting read no field that they do not know.
    assert ("lackedMemory" in config.to_wire()) == (told is not None)


@pytest.mark.parametrize(("seconds", "limit"), [(120, 7080), (7200, 1), (9000, 1)])
def test_time_for_handing_over_is_taken_off_either_clock(seconds: int, limit: int) -> None:
    output = {**CLAIMS["output"], "repository": "acme/adapter"}
    steps = {"cache": {"claimName": "cache"}, "submitSeconds": seconds}
    job = made_job(clockMode="Training", timeLimitSeconds=7200, **{**CLAIMS, "output": output}, steps=steps)
    config = run_config(job, attempt(deadline=7200), 1)
    assert config.time_limit_seconds == limit
    assert config.deadline == at(max(0, 7200 - seconds))


def test_the_trainer_is_told_what_was_predicted_with_what_was_learned_since() -> None:
    predicted = {"trainingSeconds": 600, "durationFactor": "1.5"}
    assert run_config(made_job(predicted=predicted), attempt(), 1).expected_seconds == 900
    assert run_config(made_job(), attempt(), 1).expected_seconds is None


@pytest.mark.parametrize(
    ("quantity", "count", "wanted"),
    [
        ("110Gi", 2, "220Gi"),
        ("1.5Gi", 2, "3Gi"),
        ("0.25", 2, "0.5"),
        ("500m", 8, "4000m"),
        ("100", 10, "1000"),
        ("12", 1, "12"),
        ("64Mi", 4, "256Mi"),
    ],
)
def test_quantities_are_multiplied_in_their_unit(quantity: str, count: int, wanted: str) -> None:
    assert times(quantity, count) == wanted


@pytest.mark.parametrize("quantity", ["", "Gi", "-1", "1.5GiB", "1e3", "lots"])
def test_what_is_no_quantity_is_refused(quantity: str) -> None:
    with pytest.raises(ValueError, match="is not a quantity"):
        times(quantity, 2)


@pytest.mark.parametrize(
    ("text", "value"),
    [("lab", "lab"), ("small text", "small-text"), ("a" * 80, "a" * 63), ("-x-", "x"), ("a" * 62 + "..b", "a" * 62)],
)
def test_label_values_are_valid_whatever_the_name(text: str, value: str) -> None:
    assert label_value(text) == value


# Offers' patches


def test_an_offer_that_is_admitted_again_is_no_longer_evicted() -> None:
    view = offer("a", waits="PolicyChanged")
    evicted = (*view.conditions, condition("Evicted", True, "PolicyChanged"))
    again = decide(replace(view, conditions=evicted))
    found = {c["type"]: (c["status"], c["reason"]) for c in decision_patch(again, at(5))["status"]["conditions"]}
    assert found == {"Admitted": ("True", "Admitted"), "Evicted": ("False", "Admitted")}


def test_the_end_of_a_job_is_written_on_its_offer_and_keeps_the_admission() -> None:
    before = (condition("Admitted", True, "Admitted"),)
    patch = end_patch(
        OfferEnd(Reason.SUCCEEDED, "done"), before, uid=UID, resource_version="7", generation=2, now=at(9)
    )
    assert patch["metadata"] == {"resourceVersion": "7", "uid": UID}
    assert set(patch["status"]) == {"conditions"}
    assert [(c["type"], c["status"], c["reason"]) for c in patch["status"]["conditions"]] == [
        ("Admitted", "True", "Admitted"),
        ("Finished", "True", "Succeeded"),
    ]


def test_an_admission_is_taken_back_under_the_version_that_was_seen() -> None:
    before = (condition("Admitted", True, "Admitted"),)
    patch = revocation_patch(
        Reason.OVERBOOKED, "9 of 8", before, uid=UID, resource_version="7", generation=2, now=at(9)
    )
    assert patch["metadata"] == {"resourceVersion": "7", "uid": UID}
    assert patch["status"]["admission"] is None
    assert [(c["type"], c["status"], c["reason"]) for c in patch["status"]["conditions"]] == [
        ("Admitted", "False", "Overbooked"),
        ("Evicted", "True", "Overbooked"),
    ]


# Merge patches


def apply(patch: dict[str, Any], target: dict[str, Any]) -> dict[str, Any]:
    """RFC 7386, as the API server applies it."""
    made = dict(target)
    for name, value in patch.items():
        if value is None:
            made.pop(name, None)
        elif isinstance(value, dict):
            made[name] = apply(value, made.get(name) if isinstance(made.get(name), dict) else {})
        else:
            made[name] = value
    return made


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"a": 1}),
        ({"a": 1}, {}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}}),
        ({"a": {"b": {"c": 1, "d": 2}}}, {"a": {"b": {"d": 2}}}),
        ({"a": [1, 2, {"x": 1}]}, {"a": [{"y": 1}]}),
        ({"a": {"b": 1}}, {"a": [1]}),
        ({"a": 1}, {"a": {"b": {"c": 1}}}),
    ],
)
def test_a_merge_patch_leaves_nothing_of_the_old_value(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert apply(merge_patch(before, after), before) == after


def test_a_bound_that_is_removed_from_a_policy_does_not_live_on_in_its_active_spec() -> None:
    patch = merge_patch(
        {"activeSpec": {"filters": {"minScore": "0.45", "onFull": "Wait"}}},
        {"activeSpec": {"filters": {"onFull": "Wait"}}},
    )
    assert patch == {"activeSpec": {"filters": {"minScore": None, "onFull": "Wait"}}}
