"""What a real API server makes of our schemas: what it takes, what it refuses, and how it says so."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from builders import (
    DATASETS,
    make_admission,
    make_condition,
    make_offer,
    make_policy,
    make_training_job,
    merged,
)
from cluster_fixtures import CRDS
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicy
from taskoffer.api.v1alpha1.taskoffer import TaskOffer
from taskoffer.api.v1alpha1.trainingjob import TrainingJob
from taskoffer_lab.api_client import MERGE_PATCH, ApiError
from taskoffer_lab.local_provider import LocalCluster
from taskoffer_lab.process_table import wait_until

Object = dict[str, Any]

API = "/apis/taskoffer.dev/v1alpha1"
MODELS = {"TaskOffer": TaskOffer, "TrainingJob": TrainingJob, "CapacityPolicy": CapacityPolicy}
PLURALS = {"TaskOffer": "taskoffers", "TrainingJob": "trainingjobs", "CapacityPolicy": "capacitypolicies"}
ONLY = "only active, expiresAt and priorityClassName may change"


SOURCE: Object = {"url": "https://git.example/t", "commit": "ab" * 20}
CACHED: Object = {"cache": {"claimName": "cache"}}


def collection(kind: str, namespace: str | None = "default") -> str:
    """Return the path of a kind's collection."""
    inside = "" if kind == "CapacityPolicy" else f"/namespaces/{namespace}"
    return f"{API}{inside}/{PLURALS[kind]}"


def try_out(cluster: LocalCluster, obj: Object) -> tuple[int, str, Object]:
    """Have an object checked as kubectl does, strictly, without storing it: status, message, answer."""
    path = collection(obj["kind"], obj["metadata"].get("namespace"))
    status, content = cluster.api.raw("POST", f"{path}?dryRun=All&fieldValidation=Strict", obj)
    answer = json.loads(content)
    return status, answer.get("message", ""), answer


def _rewards(*functions: Object) -> Object:
    """An offer with these reward functions and no extra column."""
    return make_offer(task_type="GRPO", spec={"dataset": {"grpo": {"rewardFunctions": list(functions)}}})


def only(member: str, value: Object | None) -> Object:
    """Return a source with this member instead of the builders' claim."""
    return {"persistentVolumeClaim": None, member: value}


def image_offer(**spec: Any) -> Object:
    return make_offer(task_type="Image", spec=spec)


def policy(**fields: Any) -> Object:
    return make_policy(name="tried", default=False, **fields)


GOOD: dict[str, Object] = {
    **{f"a {kind} offer": make_offer(task_type=kind) for kind in DATASETS},
    "an offer with everything": make_offer(
        parameters=8_030_261_248,
        hours=12.5,
        gpus=4,
        policy="strategy-8xh100",
        active=False,
        expires_at="2027-01-31T12:00:00Z",
        priority_class="urgent",
        output={"repository": "someone/adapter", "persistentVolumeClaim": {"claimName": "out", "path": "a/b"}},
        spec={
            "deadline": "2027-01-31T12:00:00Z",
            "clockMode": "Training",
            "value": "12.5",
            "klCoefficient": "0.1",
            "trainer": {"image": "registry.local/trainer:1"},
            "extraDatasets": [{"name": "org/data", "split": "train"}],
            "tracking": {"mode": "Offline"},
            "origin": {"market": "example", "hotkey": "5F..."},
            "model": {"revision": "main", "yarnFactor": 4, "source": {"persistentVolumeClaim": {"claimName": "m"}}},
            "dataset": {
                "rows": 100_000,
                "tokens": 40_000_000,
                "sizeBytes": 10**12,
                "fileFormat": "parquet",
                "source": only("url", {"url": "https://data.example/x?sig=1", "expiresAt": "2027-01-01T00:00:00Z"}),
            },
        },
    ),
    "a name of 45 characters": make_offer(name="a" * 45),
    "a flux model": image_offer(model={"architecture": "flux"}),
    "a trainer at a commit": make_offer(
        spec={"trainer": {"repository": {"url": "https://git.example/t", "commit": "0" * 40}}}
    ),
    "data on a claim": make_offer(
        spec={"dataset": {"source": {"persistentVolumeClaim": {"claimName": "data", "path": ""}}}}
    ),
    "a path with dots in its names": make_offer(
        output={"persistentVolumeClaim": {"claimName": "o", "path": "v1..2/x"}}
    ),
    "a training job": make_training_job(),
    "the lab policy": policy(),
    "an offer with an image of its own": make_offer(spec={"trainer": {"image": "registry.example.com/x:1"}}),
    "an offer with a repository of its own": make_offer(
        spec={"trainer": {"repository": {**SOURCE, "entrypoint": "scripts/_train-2.py"}}}
    ),
    "a policy that lets offers bring trainers": policy(
        steps=CACHED,
        trainers={
            "images": ["registry.example.com/*"],
            "repositories": ["https://git.example.com/team/", "http://10.0.0.1:8080"],
            "image": "python:3.13",
            "ephemeralStorage": "50Gi",
        },
    ),
    "the 8xH100 policy": policy(preset="strategy-8xh100"),
}

BAD: dict[str, tuple[Object, list[str]]] = {
    # Task and time.
    "an unknown task type": (
        make_offer(spec={"taskType": "EnvTask"}),
        ["spec.taskType", '"EnvTask"', 'supported values: "InstructText", "Chat", "DPO", "GRPO", "Image"'],
    ),
    "no task type": (make_offer(spec={"taskType": None}), ["spec.taskType", "Required value"]),
    "a negative time limit": (
        make_offer(seconds=-5),
        ["spec.timeLimitSeconds: Invalid value: -5", "greater than 0", "give the time limit in seconds"],
    ),
    "no time at all": (make_offer(seconds=0), ["spec.timeLimitSeconds", "greater than 0"]),
    "more than a year": (make_offer(seconds=31_536_001), ["spec.timeLimitSeconds", "less than or equal to 31536000"]),
    "a part of a second": (make_offer(spec={"timeLimitSeconds": 1.5}), ["spec.timeLimitSeconds", "type int64"]),
    "hours instead of a moment": (make_offer(expires_at="tomorrow"), ["spec.expiresAt", "date-time"]),
    "an unknown clock": (make_offer(spec={"clockMode": "Wall"}), ["spec.clockMode", '"Absolute", "Training"']),
    "a task id with blanks": (make_offer(task_id="a b"), ["spec.taskID", "remove the rest"]),
    "an empty task id": (make_offer(task_id=""), ["spec.taskID", "at least 1 chars long"]),
    # Model.
    "no model": (make_offer(spec={"model": None}), ["spec.model", "Required value"]),
    "an empty model": (make_offer(model=""), ["spec.model.name", "give the base model's name"]),
    "a blank model": (make_offer(model=" \t "), ["spec.model.name", "give the base model's name"]),
    "no parameters": (make_offer(parameters=0), ["spec.model.parameters", "greater than or equal to 1"]),
    "parameters beyond an int64": (make_offer(parameters=10**20), ["spec.model.parameters", "type int64"]),
    "an architecture for a text model": (
        make_offer(architecture="sdxl"),
        ["spec: ", "model.architecture (sdxl or flux) must be set exactly when taskType is Image", "remove it"],
    ),
    "an image model without architecture": (
        image_offer(model={"architecture": None}),
        ["spec: ", "model.architecture (sdxl or flux)", "set it"],
    ),
    "an unknown architecture": (
        image_offer(model={"architecture": "dalle"}),
        ["spec.model.architecture", '"sdxl", "flux"'],
    ),
    "an odd YaRN factor": (make_offer(spec={"model": {"yarnFactor": 3}}), ["spec.model.yarnFactor", '"2", "4", "8"']),
    # Data.
    "data of another type": (
        make_offer(dataset=DATASETS["DPO"]),
        ["spec: ", "dataset.type must be Instruct for taskType InstructText", "set it together with dataset.instruct"],
    ),
    "a type without its member": (
        make_offer(dataset={"type": "Instruct"}),
        ["spec.dataset", "dataset.instruct must be set exactly when dataset.type is Instruct", "remove"],
    ),
    "two members": (
        make_offer(dataset=DATASETS["DPO"] | DATASETS["InstructText"]),
        ["spec.dataset", "remove dataset.dpo"],
    ),
    "no reward": (
        make_offer(task_type="GRPO", spec={"dataset": {"grpo": {"rewardFunctions": []}}}),
        ["spec.dataset.grpo.rewardFunctions", "at least 1 items"],
    ),
    "a reward that is neither source nor builtin": (
        _rewards({"name": "r"}),
        ["spec.dataset.grpo.rewardFunctions[0]", "exactly one of builtin and source"],
    ),
    "a reward that is both source and builtin": (
        _rewards({"name": "r", "source": "x", "builtin": {"name": "JSONValid"}}),
        ["spec.dataset.grpo.rewardFunctions[0]", "exactly one of builtin and source"],
    ),
    "the hash of no source": (
        _rewards({"name": "r", "sha256": "0" * 64, "builtin": {"name": "JSONValid"}}),
        ["spec.dataset.grpo.rewardFunctions[0]", "sha256 is the hash of source"],
    ),
    "a builtin reward without its parameter": (
        _rewards({"name": "r", "builtin": {"name": "LengthTarget"}}),
        ["spec.dataset.grpo.rewardFunctions[0].builtin", "builtin.words goes with LengthTarget"],
    ),
    "a builtin reward with another's parameter": (
        _rewards({"name": "r", "builtin": {"name": "JSONValid", "ease": 60}}),
        ["spec.dataset.grpo.rewardFunctions[0].builtin", "builtin.ease is a parameter of Readability alone"],
    ),
    "an unknown builtin reward": (
        _rewards({"name": "r", "builtin": {"name": "Helpfulness"}}),
        ["spec.dataset.grpo.rewardFunctions[0].builtin.name", "Unsupported value"],
    ),
    "rewards without weight": (
        _rewards({"name": "r", "source": "x", "weight": "0"}, {"name": "s", "source": "x", "weight": "0.0"}),
        ["spec.dataset.grpo", "weights of rewardFunctions are all 0"],
    ),
    "two rewards of one name": (
        _rewards({"name": "r", "source": "x"}, {"name": "r", "source": "y"}),
        ["spec.dataset.grpo", "give each of them a name of its own"],
    ),
    "a comparison with nothing": (
        _rewards({"name": "r", "builtin": {"name": "NumberMatch"}}),
        ["spec.dataset.grpo", "set grpo.extraColumn"],
    ),
    "a reward with a negative weight": (
        make_offer(
            task_type="GRPO",
            spec={"dataset": {"grpo": {"rewardFunctions": [{"name": "r", "source": "x", "weight": "-1"}]}}},
        ),
        ["spec.dataset.grpo.rewardFunctions[0].weight", "write for example '0.5'"],
    ),
    "data from nowhere": (
        make_offer(spec={"dataset": {"source": only("none", None)}}),
        ["spec.dataset.source", "exactly one of persistentVolumeClaim, url and hub", "set one"],
    ),
    "data from two places": (
        make_offer(spec={"dataset": {"source": {"hub": {"name": "org/data"}}}}),
        ["spec.dataset.source", "exactly one of persistentVolumeClaim, url and hub", "remove the others"],
    ),
    "data behind a file address": (
        make_offer(spec={"dataset": {"source": only("url", {"url": "file:///etc/passwd"})}}),
        ["spec.dataset.source.url.url", "begin it with https://"],
    ),
    "no rows": (make_offer(spec={"dataset": {"rows": 0}}), ["spec.dataset.rows", "greater than or equal to 1"]),
    "no tokens": (make_offer(spec={"dataset": {"tokens": 0}}), ["spec.dataset.tokens", "greater than or equal to 1"]),
    "tokens of pictures": (
        image_offer(dataset={"tokens": 1000}),
        ["spec.dataset: ", "dataset.tokens counts text, and pictures have none", "remove dataset.tokens"],
    ),
    "an unknown file format": (
        make_offer(spec={"dataset": {"fileFormat": "xls"}}),
        ["spec.dataset.fileFormat", '"jsonl"'],
    ),
    # GPUs, policy, money.
    **{
        f"{count} GPUs": (make_offer(gpus=count), ["spec.gpuCount", 'supported values: "1", "2", "4", "8"'])
        for count in (-1, 0, 3, 16)
    },
    "a policy name in capitals": (make_offer(policy="Lab"), ["spec.policyName", "use lower-case letters"]),
    "a number as value": (make_offer(spec={"value": 1.5}), ["spec.value", "type string"]),
    "a word as value": (make_offer(spec={"value": "much"}), ["spec.value", "write for example '0.35'"]),
    # Output and trainer.
    "an absolute path": (
        make_offer(output={"persistentVolumeClaim": {"claimName": "o", "path": "/etc"}}),
        ["spec.output.persistentVolumeClaim.path", "remove the leading '/'"],
    ),
    "a path that leaves the volume": (
        make_offer(output={"persistentVolumeClaim": {"claimName": "o", "path": "a/../../b"}}),
        ["spec.output.persistentVolumeClaim.path", "remove '..'"],
    ),
    "a trainer that is nothing": (
        make_offer(spec={"trainer": {}}),
        ["spec.trainer", "exactly one of image and repository", "set one"],
    ),
    "a trainer at a branch": (
        make_offer(spec={"trainer": {"repository": {"url": "https://git.example/t", "commit": "main"}}}),
        ["spec.trainer.repository.commit", "40 hexadecimal digits", "not a branch"],
    ),
    "a trainer behind another protocol": (
        make_offer(spec={"trainer": {"repository": {"url": "ssh://git.example/t", "commit": "ab" * 20}}}),
        ["spec.trainer.repository.url", "begin it with https://"],
    ),
    "an entrypoint outside of the repository": (
        make_offer(spec={"trainer": {"repository": {**SOURCE, "entrypoint": "a/../../train.py"}}}),
        ["spec.trainer.repository.entrypoint", "write for example scripts/train.py"],
    ),
    "an entrypoint that is no Python file": (
        make_offer(spec={"trainer": {"repository": {**SOURCE, "entrypoint": "train.sh"}}}),
        ["spec.trainer.repository.entrypoint", "ends in .py"],
    ),
    # The object.
    "a name that is too long": (
        make_offer(name="a" * 46),
        ["metadata.name must be at most 45 characters", "choose a shorter name"],
    ),
    "an unknown field": (make_offer(spec={"gpus": 4}), ['unknown field "spec.gpus"']),
    "an unknown field deep inside": (
        make_offer(spec={"model": {"nam": "x"}}),
        ['unknown field "spec.model.nam"'],
    ),
    "no spec": (
        {key: value for key, value in make_offer().items() if key != "spec"},
        ["spec", "Required value"],
    ),
    "two megabytes in a field": (
        make_offer(model="x" * 2_000_000),
        ["spec.model.name", "may not be more than 253 bytes"],
    ),
    "four megabytes": (make_offer(model="x" * 4_000_000), ["Request entity too large", "limit is 3145728"]),
    "two megabytes of columns": (
        make_offer(spec={"dataset": {"instruct": {"systemPrompt": "x" * 2_000_000}}}),
        ["spec.dataset.instruct.systemPrompt", "may not be more than 4096 bytes"],
    ),
    "fifty thousand data sets": (
        make_offer(spec={"extraDatasets": [{"name": "x"}] * 50_000}),
        ["spec.extraDatasets", "must have at most 4 items"],
    ),
    # The other kinds.
    "a training job on three GPUs": (
        make_training_job(gpus=3),
        ["spec.run.gpus", 'supported values: "1", "2", "4", "8"'],
    ),
    "a policy without nodes": (policy(spec={"nodeSelector": None}), ["spec.nodeSelector", "Required value"]),
    "a policy with a wild count": (
        policy(resources=[{"name": "nvidia.com/gpu", "counts": [1, 3]}]),
        ["spec.resources[0].counts[1]", 'supported values: "1", "2", "4", "8"'],
    ),
    "a policy that gives two kinds of resource": (
        policy(resources=[{"name": "a.example/gpu", "counts": [1]}, {"name": "b.example/gpu", "counts": [1]}]),
        ["spec.resources", "must have at most 1 item"],
    ),
    "a fixed value for a term that is computed": (
        policy(scoring={"terms": [{"name": "TaskWeight", "weight": "1", "value": "0.5"}]}),
        ["spec.scoring.terms", "only for the terms Bonus", "remove it from the others"],
    ),
    "a weight as a number": (
        policy(scoring={"terms": [{"name": "TaskWeight", "weight": 0.35}]}),
        ["spec.scoring.terms[0].weight", "type string"],
    ),
    "a size class that ends before it begins": (
        policy(
            size_classes=[merged(make_policy()["spec"]["sizeClasses"][0], {"minParameters": 10, "maxParameters": 10})]
        ),
        ["spec.sizeClasses", "must be greater than minParameters", "raise it or remove it"],
    ),
    "memory as a word": (
        policy(pod_template={"memoryPerGpu": "lots"}),
        ["spec.podTemplate.memoryPerGpu", "write for example '110Gi'"],
    ),
    "trainers of others without the steps that verify their results": (
        policy(trainers={"images": ["registry.example.com/*"]}),
        ["spec.trainers", "set steps or remove trainers"],
    ),
    "a repository that is no beginning of an address": (
        policy(steps=CACHED, trainers={"repositories": ["git@git.example.com:team"]}),
        ["spec.trainers.repositories[0]", "write for example https://git.example.com/team/"],
    ),
    "settings of an architecture for a task of text": (
        policy(
            task_types=[
                {
                    "name": "DPO",
                    "accepted": True,
                    "weight": "1",
                    "successRate": "1",
                    "architectures": [{"name": "flux"}],
                }
            ]
        ),
        ["spec.taskTypes", "architectures is only for the task type Image", "use lora and train"],
    ),
    "a rank of nothing for a task type": (
        policy(task_types=[{"name": "DPO", "accepted": True, "weight": "1", "successRate": "1", "lora": {"r": 0}}]),
        ["spec.taskTypes[0].lora.r", "greater than or equal to 1"],
    ),
    "an unknown field of a policy": (policy(spec={"cap": "1"}), ['unknown field "spec.cap"']),
}


@pytest.mark.parametrize("name", GOOD)
def test_the_server_takes(crds: LocalCluster, name: str) -> None:
    obj = GOOD[name]
    status, message, answer = try_out(crds, obj)
    assert (status, message) == (201, "")
    assert answer["spec"] == obj["spec"], "the server must not rewrite what people write"
    answer["metadata"].setdefault("resourceVersion", "1")
    MODELS[obj["kind"]].model_validate(answer)


@pytest.mark.parametrize("name", BAD)
def test_the_server_refuses(crds: LocalCluster, name: str) -> None:
    obj, words = BAD[name]
    status, message, _ = try_out(crds, obj)
    assert status in (400, 413, 422)
    missing = [word for word in words if word not in message]
    assert not missing, message[:2000]
    assert len(message) < 4000, "a refusal must stay readable"


# The life of an object


class Stored:
    """One stored object, to be changed."""

    def __init__(self, cluster: LocalCluster, namespace: str, obj: Object) -> None:
        obj = copy.deepcopy(obj)
        obj["metadata"]["namespace"] = namespace
        self._api = cluster.api
        self._path = f"{collection(obj['kind'], namespace)}/{obj['metadata']['name']}"
        self._api.request("POST", collection(obj["kind"], namespace), obj)

    def change(self, **spec: Any) -> str:
        """Change the spec; return the server's objection, empty when it took the change."""
        return self._patch("", {"spec": spec})

    def answer(self, **status: Any) -> str:
        """Change the status; return the server's objection."""
        return self._patch("/status", {"status": status})

    def _patch(self, part: str, patch: Object) -> str:
        status, content = self._api.raw("PATCH", self._path + part, patch, MERGE_PATCH)
        assert status in (200, 422), content
        return "" if status == 200 else str(json.loads(content)["message"])


FIXED: dict[str, Any] = {
    "taskID": "other",
    "taskType": "Chat",
    "model": {"name": "other"},
    "dataset": {"rows": 5},
    "timeLimitSeconds": 60,
    "deadline": "2027-01-31T12:00:00Z",
    "clockMode": "Training",
    "policyName": "other",
    "value": "2",
    "gpuCount": 8,
    "trainer": {"image": "other"},
    "output": {"repository": "other"},
    "klCoefficient": "0.5",
    "extraDatasets": [{"name": "other"}],
    "tracking": {"mode": "Online"},
    "origin": {"market": "other"},
}


@pytest.mark.parametrize("field", FIXED)
def test_a_field_of_an_offer_cannot_be_added_or_changed(crds: LocalCluster, namespace: str, field: str) -> None:
    offer = Stored(crds, namespace, make_offer())
    refused = offer.change(**{field: FIXED[field]})
    # The server shows a change at the field, and one that was not there at the spec.
    place = f"spec.{field}" if field in make_offer()["spec"] else "spec"
    assert f"is invalid: {place}: Invalid value: " in refused
    assert f"{field} is immutable: create a new TaskOffer; {ONLY}" in refused


@pytest.mark.parametrize("field", ["output", "gpuCount", "policyName", "value"])
def test_a_field_of_an_offer_cannot_be_removed(crds: LocalCluster, namespace: str, field: str) -> None:
    full = make_offer(gpus=2, policy="p", output={"repository": "r"}, spec={"value": "1"})
    assert f"{field} is immutable" in Stored(crds, namespace, full).change(**{field: None})


def test_before_admission_three_fields_may_change(crds: LocalCluster, namespace: str) -> None:
    offer = Stored(crds, namespace, make_offer())
    assert offer.change(active=False) == ""
    assert offer.change(expiresAt="2027-01-31T12:00:00Z") == ""
    assert offer.change(priorityClassName="urgent") == ""
    assert offer.change(expiresAt=None, priorityClassName=None, active=None) == ""


def test_after_admission_only_active_may_change(crds: LocalCluster, namespace: str) -> None:
    offer = Stored(crds, namespace, make_offer(priority_class="urgent"))
    admitted = {
        "admission": make_admission(),
        "score": "0.875",
        "conditions": [make_condition("Admitted", True, "Admitted")],
    }
    assert offer.answer(**admitted) == ""
    frozen = "the offer is admitted: only spec.active may change; set spec.active to false to cancel it"
    assert frozen in offer.change(expiresAt="2027-01-31T12:00:00Z")
    assert frozen in offer.change(priorityClassName=None)
    assert "model is immutable" in offer.change(model={"name": "other"})
    assert offer.change(active=False) == ""
    assert offer.answer(score="0.5") == ""
    assert offer.answer(admission=None) == "", "a booking can be revoked"
    assert offer.change(priorityClassName="low") == "", "what is not admitted any more can be changed again"


LATER = "2099-01-01T00:00:00Z"
WITH_TIMES: dict[str, Object] = {
    "when it expires": {"expiresAt": LATER},
    "a fraction and an offset": {"expiresAt": "2099-01-01T00:00:00.25+02:00"},
    "when its address stops to work": {
        "dataset": {"source": {"persistentVolumeClaim": None, "url": {"url": "https://a.invalid", "expiresAt": LATER}}}
    },
    "when it has to be done": {"deadline": LATER},
}


@pytest.mark.parametrize("case", WITH_TIMES)
def test_an_offer_that_holds_a_time_is_answered_ended_and_cancelled(
    crds: LocalCluster, namespace: str, case: str
) -> None:
    offer = Stored(crds, namespace, make_offer(spec=WITH_TIMES[case]))
    assert offer.answer(admission=make_admission(), conditions=[make_condition("Admitted", True, "Admitted")]) == ""
    assert offer.change(active=False) == ""
    assert offer.answer(conditions=[make_condition("Finished", True, "Cancelled")]) == ""
    assert "may change" in offer.change(expiresAt="2098-01-01T00:00:00Z")


def test_a_status_is_checked_like_a_spec(crds: LocalCluster, namespace: str) -> None:
    offer = Stored(crds, namespace, make_offer())
    assert "status.admission.assignments[0].count" in offer.answer(admission=make_admission(gpus=3))
    assert "status.score" in offer.answer(score="high")


def test_a_training_job_is_never_edited(crds: LocalCluster, namespace: str) -> None:
    job = Stored(crds, namespace, make_training_job())
    refused = job.change(run={"gpus": 2})
    assert "spec is immutable: a TrainingJob is never edited" in refused
    assert "change the TaskOffer or delete it" in refused
    assert job.answer(trainerStatus={"progressPercentage": 5, "lastUpdatedTime": "2026-01-31T12:00:00Z"}) == ""


def test_an_unknown_field_of_a_manifest_is_refused_by_kubectl_as_it_comes(crds: LocalCluster, namespace: str) -> None:
    offer = make_offer(namespace=namespace, spec={"timeLimitHours": 3})
    said = crds.kubectl("apply", "-f", "-", stdin=json.dumps(offer), check=False)
    assert 'unknown field "spec.timeLimitHours"' in said
    assert crds.kubectl("get", "to", "-n", namespace, "-o", "name") == ""


# Objects that were stored before a rule existed

OLD_GROUP = "stored-before.test"


def _loosened(schema: Object) -> Object:
    """Return a schema as an older version might have been: no rules, no bounds."""
    made = {
        key: value
        for key, value in schema.items()
        if key in ("type", "format", "x-kubernetes-list-type", "x-kubernetes-list-map-keys")
        or (key == "required" and "x-kubernetes-list-map-keys" not in schema)
    }
    if "properties" in schema:
        made["properties"] = {name: _loosened(sub) for name, sub in schema["properties"].items()}
    if "items" in schema:
        made["items"] = _loosened(schema["items"])
    return made


@pytest.fixture
def older_kind(crds: LocalCluster) -> Iterator[Callable[[bool], None]]:
    """A copy of TaskOffer in a group of its own whose schema can be switched between loose and today's."""
    crd = yaml.safe_load((CRDS / "taskoffer.dev_taskoffers.yaml").read_text())
    crd["metadata"]["name"] = f"taskoffers.{OLD_GROUP}"
    crd["spec"]["group"] = OLD_GROUP
    crd["spec"]["names"].pop("shortNames")
    crd["spec"]["names"].pop("categories")
    strict = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]

    def switch(today: bool) -> None:
        made = copy.deepcopy(crd)
        made["spec"]["versions"][0]["schema"]["openAPIV3Schema"] = strict if today else _loosened(strict)
        crds.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(made))
        crds.kubectl("wait", "--for=condition=Established", "--timeout=30s", f"crd/taskoffers.{OLD_GROUP}")

    switch(False)
    yield switch
    crds.kubectl("delete", "crd", f"taskoffers.{OLD_GROUP}", "--wait=false")


def test_an_object_that_todays_rules_would_refuse_still_gets_its_status_and_can_be_cancelled(
    crds: LocalCluster, namespace: str, older_kind: Callable[[bool], None]
) -> None:
    broken = make_offer(
        name="a" * 60,
        namespace=namespace,
        task_id="a b",
        seconds=-1,
        model=" ",
        gpus=3,
        architecture="dalle",
        dataset=DATASETS["DPO"] | {"chat": {}},
    )
    broken["apiVersion"] = f"{OLD_GROUP}/v1alpha1"
    path = f"/apis/{OLD_GROUP}/v1alpha1/namespaces/{namespace}/taskoffers"
    wait_until(lambda: crds.api.raw("POST", path, broken)[0] in (201, 409), "the loose kind is served", 30)
    older_kind(True)
    fresh = merged(broken, {"metadata": {"name": "fresh"}})
    wait_until(lambda: crds.api.raw("POST", path + "?dryRun=All", fresh)[0] == 422, "today's rules in force", 30)
    here = f"{path}/{broken['metadata']['name']}"
    rejected = {"status": {"conditions": [make_condition("Admitted", False, "InvalidOffer")]}}
    crds.api.request("PATCH", f"{here}/status", rejected, MERGE_PATCH)
    crds.api.request("PATCH", here, {"spec": {"active": False}}, MERGE_PATCH)
    with pytest.raises(ApiError, match="taskType is immutable"):
        crds.api.request("PATCH", here, {"spec": {"taskType": "Chat"}}, MERGE_PATCH)
    crds.api.request("DELETE", here)


# What kubectl shows


def rows(text: str) -> list[dict[str, str]]:
    """Read a table of kubectl; a column without a value is cut by the header's positions."""
    head, *lines = text.rstrip("\n").split("\n")
    starts = [0, *(i for i in range(1, len(head)) if head[i - 1] == " " and head[i] != " ")]
    names = [head[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
    return [
        {name: line[a:b].strip() for name, a, b in zip(names, starts, [*starts[1:], None], strict=True)}
        for line in lines
    ]


def test_kubectl_get_shows_an_offer_at_a_glance(crds: LocalCluster, namespace: str) -> None:
    Stored(crds, namespace, make_offer(name="waiting"))
    offer = Stored(crds, namespace, make_offer(name="admitted", task_type="DPO", model="Qwen/Qwen3-8B"))
    conditions = [make_condition("Admitted", True, "Admitted"), make_condition("Finished", True, "Succeeded")]
    offer.answer(admission=make_admission(gpus=4), score="0.875", conditions=conditions)
    shown = {row["NAME"]: row for row in rows(crds.kubectl("get", "to", "-n", namespace))}
    assert list(shown["admitted"]) == ["NAME", "TYPE", "MODEL", "SCORE", "ADMITTED", "REASON", "GPUS", "AGE"]
    assert list(shown["admitted"].values())[:-1] == [
        "admitted",
        "DPO",
        "Qwen/Qwen3-8B",
        "0.875",
        "True",
        "Admitted",
        "4",
    ]
    assert [shown["waiting"][name] for name in ("TYPE", "SCORE", "ADMITTED")] == ["InstructText", "", ""]
    wide = rows(crds.kubectl("get", "to", "admitted", "-n", namespace, "-o", "wide"))[0]
    assert [wide[name] for name in ("FINISHED", "NODE", "JOB")] == ["Succeeded", "node-a", "offer-0123abcd"]


def test_kubectl_get_shows_a_job_at_a_glance(crds: LocalCluster, namespace: str) -> None:
    job = Stored(crds, namespace, make_training_job(gpus=2))
    assigned = make_admission(gpus=2)["assignments"]
    attempts = [
        {"jobName": f"offer-0123abcd-{n}", "assignments": assigned, "createdAt": "2026-01-31T12:00:00Z"} for n in (1, 2)
    ]
    steps = [{"name": "Prepare", "state": "Succeeded"}, {"name": "Train", "state": "Running"}]
    progress = {
        "progressPercentage": 40,
        "estimatedRemainingSeconds": 90,
        "lastUpdatedTime": "2026-01-31T12:00:00Z",
    }
    assert job.answer(attempts=attempts, steps=steps, trainerStatus=progress) == ""
    row = rows(crds.kubectl("get", "tj", "-n", namespace))[0]
    assert list(row) == ["NAME", "OFFER", "GPUS", "STEP", "PROGRESS", "ETA", "AGE"]
    assert list(row.values())[:-1] == ["offer-0123abcd", "offer", "2", "Train", "40", "90"]
    wide = rows(crds.kubectl("get", "tj", "-n", namespace, "-o", "wide"))[0]
    assert [wide[name] for name in ("ATTEMPT", "NODE")] == ["offer-0123abcd-2", "node-a"]


def test_kubectl_get_shows_a_policy_at_a_glance(crds: LocalCluster) -> None:
    path = collection("CapacityPolicy")
    crds.api.request("POST", path, make_policy(name="glance", default=False))
    try:
        capacity = {"total": 8, "used": 3, "pending": 2, "running": 1}
        status = {"capacity": capacity, "conditions": [make_condition("Ready", True, "Ready")]}
        crds.api.request("PATCH", f"{path}/glance/status", {"status": status}, MERGE_PATCH)
        row = rows(crds.kubectl("get", "cpol", "glance"))[0]
    finally:
        crds.api.request("DELETE", f"{path}/glance")
    assert list(row) == ["NAME", "CAPACITY", "USED", "PENDING", "READY", "AGE"]
    assert list(row.values())[:-1] == ["glance", "8", "3", "2", "True"]


def test_the_last_valid_spec_of_a_policy_fits_into_its_status(crds: LocalCluster) -> None:
    path = collection("CapacityPolicy")
    made = make_policy(name="remembered", preset="strategy-8xh100", default=False)
    crds.api.request("POST", path, made)
    try:
        status = {"activeSpec": made["spec"], "activeGeneration": 1}
        got = crds.api.request("PATCH", f"{path}/remembered/status", {"status": status}, MERGE_PATCH)
    finally:
        crds.api.request("DELETE", f"{path}/remembered")
    assert got["status"]["activeSpec"] == made["spec"]


def test_settings_within_an_overlay_come_back_from_the_server_without_defaults(crds: LocalCluster) -> None:
    path, rule = collection("CapacityPolicy"), {"accepted": True, "weight": "1", "successRate": "1"}
    overlays = {"train": {"grpo": {"beta": 0.01}, "adaptiveLr": {}}}
    image = {"name": "Image", **rule, "architectures": [{"name": "flux", **overlays}]}
    made = make_policy(name="overlaid", default=False, task_types=[{"name": "GRPO", **rule, **overlays}, image])
    crds.api.request("POST", path, made)
    try:
        spec = CapacityPolicy.model_validate(crds.api.request("GET", f"{path}/overlaid")).spec
        status = {"activeSpec": spec.to_wire(), "activeGeneration": 1}
        crds.api.request("PATCH", f"{path}/overlaid/status", {"status": status}, MERGE_PATCH)
        got = crds.api.request("GET", f"{path}/overlaid")
    finally:
        crds.api.request("DELETE", f"{path}/overlaid")
    for part in (got["spec"], got["status"]["activeSpec"]):
        grpo, pictures = part["taskTypes"]
        assert grpo["train"] == pictures["architectures"][0]["train"] == overlays["train"]
    assert CapacityPolicy.model_validate(got).status.active_spec == spec


def test_the_category_lists_all_kinds_and_a_kinds_name_means_that_kind(
    crds: LocalCluster, namespace: str, tmp_path: Path
) -> None:
    fresh = f"--cache-dir={tmp_path}"  # kubectl remembers for hours which categories a server has
    Stored(crds, namespace, make_offer(name="one"))
    Stored(crds, namespace, make_training_job(name="one-job"))
    everything = crds.kubectl("get", "taskoffer-all", "-n", namespace, "-o", "name", fresh).split()
    assert {"taskoffer.taskoffer.dev/one", "trainingjob.taskoffer.dev/one-job"} <= set(everything)
    alone = crds.kubectl("get", "taskoffer", "one", "-n", namespace, "-o", "name", fresh)
    assert alone.split() == ["taskoffer.taskoffer.dev/one"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("taskoffer.spec", ["timeLimitSeconds", "<integer> -required-", "Seconds that the task may take", "enum:"]),
        ("taskoffer.spec.dataset", ["instruct", "rows", "Which of the members below is set."]),
        ("taskoffer.status.admission", ["assignments", "The GPUs that are booked.", "<[]Object> -required-"]),
        ("trainingjob.status.trainerStatus", ["progressPercentage", "Share done, in percent."]),
        ("capacitypolicy.spec.sizeClasses", ["minParameters", "Smallest model, inclusive."]),
    ],
)
def test_kubectl_explain_reads_well(crds: LocalCluster, path: str, words: list[str]) -> None:
    def explained() -> bool:
        return "DESCRIPTION" in crds.kubectl("explain", path, check=False)

    # The server publishes a new kind's OpenAPI a moment after it serves the kind.
    wait_until(explained, f"kubectl explain {path}", 30)
    text = crds.kubectl("explain", path)
    assert [word for word in words if word not in text] == []
    assert "<no description>" not in text
