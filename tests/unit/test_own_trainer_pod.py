"""The pod of a trainer that the offer has brought: where it runs, what it is told, and the steps around it."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import Object, claim, make_training_job, merged, stored
from core_builders import NOW, at
from goldens import assert_golden
from taskoffer.api.base import rfc3339
from taskoffer.api.contract import PrepareConfig, SubmitConfig
from taskoffer.api.v1alpha1.trainingjob import Attempt, StepName, TrainingJob
from taskoffer.decision.job_facts import EnsureStep
from taskoffer.decision.step_needs import is_prepared, is_submitted
from taskoffer.decision.trainer_arguments import arguments
from taskoffer.render.job import attempt_job
from taskoffer.render.steps import step_config_map, step_job

NAME = "offer-0123abcd"
COMMIT = "c0ffee" * 6 + "abcd"
URL = "https://git.example.com/team/trainer"
STEPS: Object = {
    "cache": {"claimName": "cache"},
    "workspace": {"claimName": "work", "path": "runs"},
    "itemSizeLimit": "10Gi",
    "submitSeconds": 600,
}
IMAGE: Object = {"image": "registry.example.com/trainers/mine:1"}
REPOSITORY: Object = {"repository": {"url": URL, "commit": COMMIT}}
POD: Object = {
    "image": "registry.test/trainer:1",
    "imagePullPolicy": "IfNotPresent",
    "cpuPerGpu": "8",
    "memoryPerGpu": "100Gi",
    "sharedMemoryPerGpu": "8Gi",
    "terminationGraceSeconds": 120,
}
ON_CLAIMS: Object = {
    "model": {"source": claim("models", "llama/8b")},
    "dataset": {"source": claim("data", "rows.jsonl")},
    "output": claim("outputs", "runs"),
}
FETCHED: Object = {
    "model": {"source": None},
    "dataset": {"source": {"url": {"url": "https://data.test/rows.json?sig=1"}}, "fileFormat": "json"},
    "output": {"repository": "acme/Exactly.This", "persistentVolumeClaim": None},
}


def job(run: Object) -> TrainingJob:
    wire = make_training_job(name=NAME, gpus=2, spec={"run": merged({"steps": STEPS, "pod": POD}, run)})
    dataset = wire["spec"]["run"]["dataset"]
    if dataset["type"] != "Instruct":
        del dataset["instruct"]
    return TrainingJob.model_validate(stored(_without_none(wire), uid="tj-uid"))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value


def attempt(deadline: float | None = 3600) -> Attempt:
    place = {"nodeName": "node-a", "resourceName": "nvidia.com/gpu", "count": 2}
    wire: Object = {"jobName": f"{NAME}-1", "assignments": [place], "createdAt": rfc3339(NOW)}
    return Attempt.model_validate(wire | ({"deadline": rfc3339(at(deadline))} if deadline else {}))


def pinned(trainer: Object) -> Object:
    return {"image": trainer.get("image", "registry.test/trainer:1"), "repository": trainer.get("repository")}


BY_IMAGE = merged(ON_CLAIMS, {"trainer": {**pinned(IMAGE), "ephemeralStorage": "50Gi"}, "taskID": "market:7"})
BY_REPOSITORY = merged(FETCHED, {"trainer": pinned(REPOSITORY)})


@pytest.mark.parametrize(("name", "run"), [("image", BY_IMAGE), ("repository", BY_REPOSITORY)])
def test_the_pod_of_another_trainer(name: str, run: Object) -> None:
    assert_golden(f"own-trainer-{name}", attempt_job(job(run), attempt(), 1, 3000))


def pod_of(run: Object, **more: Any) -> Object:
    found: Object = attempt_job(job(run), attempt(**more), 1, 3000)["spec"]["template"]["spec"]
    return found


@pytest.mark.parametrize("run", [BY_IMAGE, BY_REPOSITORY], ids=["image", "repository"])
def test_its_sandbox_is_that_of_ours_but_for_the_file_system_of_the_image(run: Object) -> None:
    pod = pod_of(run)
    ours = pod_of({key: value for key, value in run.items() if key != "trainer"})
    for same in ("securityContext", "affinity", "automountServiceAccountToken", "enableServiceLinks", "restartPolicy"):
        assert pod[same] == ours[same]
    (container,), (made,) = pod["containers"], pod["initContainers"]
    assert container["securityContext"] == {
        **ours["containers"][0]["securityContext"],
        "readOnlyRootFilesystem": False,
    }
    assert made["securityContext"]["readOnlyRootFilesystem"] is True
    for name, found in ours["containers"][0]["resources"]["limits"].items():
        assert container["resources"]["limits"][name] == found
    assert all(volume.keys() <= {"name", "emptyDir", "persistentVolumeClaim"} for volume in pod["volumes"])
    assert "token" not in json.dumps(pod).lower().replace("automountserviceaccounttoken", "")


@pytest.mark.parametrize("run", [BY_IMAGE, BY_REPOSITORY], ids=["image", "repository"])
def test_it_sees_its_own_part_of_each_claim_and_writes_to_its_result_alone(run: Object) -> None:
    (container,) = pod_of(run)["containers"]
    on_claims = [m for m in container["volumeMounts"] if m["name"] in ("model", "dataset", "trainer", "output")]
    assert all(mount["subPath"] for mount in on_claims)
    (written,) = [m for m in on_claims if not m.get("readOnly")]
    assert written["subPath"] == f"runs/{NAME}/adapter"
    # So that the step after it finds the result where that of our trainer would lie.
    text = step_config_map(job(run), EnsureStep(StepName.SUBMIT, 600, at(3600), at(7200)))["data"]["submit.json"]
    assert SubmitConfig.model_validate_json(text).adapter_dir == f"/data/output/runs/{NAME}/adapter"


def test_a_task_id_with_a_colon_is_no_path_so_that_the_pod_is_told_another_one() -> None:
    pod = pod_of(BY_IMAGE)
    assert ":" not in "".join(mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"])
    given = pod["containers"][0]["args"]
    assert given[given.index("--task-id") + 1] == "market-7"


@pytest.mark.parametrize(("seconds", "deadline", "wanted"), [(3000, 3600, 3060), (3000, None, 3000 + 60 + 60)])
def test_kubernetes_ends_it_soon_after_its_time_when_the_operator_is_away(
    seconds: int, deadline: float | None, wanted: int
) -> None:
    """Without a deadline its clock starts with its container, which has a minute for that here."""
    clock = {"clockMode": "Absolute" if deadline else "Training"}
    made = attempt_job(job({**BY_IMAGE, **clock}), attempt(deadline), 1, seconds)
    assert made["spec"]["activeDeadlineSeconds"] == wanted


# The arguments

TYPES: dict[str, Object] = {
    "InstructText": {"instruct": {"fieldInstruction": "q", "fieldOutput": "a", "noInputFormat": "{instruction}"}},
    "Chat": {"chat": {"chatTemplate": "llama-3"}},
    "DPO": {"dpo": {"fieldSystem": "s", "promptFormat": "{prompt} costs $$5 or $(HOME)"}},
    "GRPO": {
        "grpo": {
            "extraColumn": "answer",
            "rewardFunctions": [
                {"name": "length", "weight": "0.25", "source": "def f(completions):\n    return [1.0]\n"},
                {"name": "other", "source": "x", "sha256": "ab" * 32},
            ],
        }
    },
}
DESCRIBED: dict[str, Object] = {
    "InstructText": {
        "field_instruction": "q",
        "field_input": None,
        "field_output": "a",
        "field": None,
        "field_system": None,
        "system_prompt": "",
        "system_format": "{system}",
        "format": None,
        "no_input_format": "{instruction}",
    },
    "Chat": {
        "chat_template": "llama-3",
        "chat_column": "conversations",
        "chat_role_field": "from",
        "chat_content_field": "value",
        "chat_user_reference": "user",
        "chat_assistant_reference": "assistant",
    },
    "DPO": {
        "field_prompt": "prompt",
        "field_system": "s",
        "field_chosen": "chosen",
        "field_rejected": "rejected",
        "prompt_format": "{prompt} costs $$5 or $(HOME)",
        "chosen_format": "{chosen}",
        "rejected_format": "{rejected}",
    },
    "GRPO": {
        "field_prompt": "prompt",
        "extra_column": "answer",
        "reward_functions": [
            {
                "reward_id": "0-length",
                "reward_func": "def f(completions):\n    return [1.0]\n",
                "reward_weight": 0.25,
                "func_hash": hashlib.sha256(b"def f(completions):\n    return [1.0]\n").hexdigest(),
                "is_generic": False,
                "is_manual": False,
            },
            {
                "reward_id": "1-other",
                "reward_func": "x",
                "reward_weight": 1.0,
                "func_hash": "ab" * 32,
                "is_generic": False,
                "is_manual": False,
            },
        ],
    },
}
MARKET_NAMES = {
    "InstructText": "InstructTextTask",
    "Chat": "ChatTask",
    "DPO": "DpoTask",
    "GRPO": "GrpoTask",
}


def told(task_type: str, columns: Object, **more: Any) -> dict[str, str]:
    dataset: Object = {"type": DATASET_TYPES[task_type], **columns, "source": claim("data", "x")}
    run = merged(ON_CLAIMS, {"trainer": pinned(IMAGE), "taskType": task_type, "taskID": "t1", "dataset": dataset})
    given = arguments(job(merged(run, more)).spec.run, NAME, 5400)
    assert len(given) % 2 == 0
    return dict(zip(given[::2], given[1::2], strict=True))


DATASET_TYPES = {"InstructText": "Instruct", "Chat": "Chat", "DPO": "DPO", "GRPO": "GRPO", "Image": "Image"}


@pytest.mark.parametrize("task_type", TYPES)
def test_text_trainers_are_told_the_task_in_the_markets_words(task_type: str) -> None:
    given = told(task_type, TYPES[task_type])
    assert json.loads(given.pop("--dataset-type")) == DESCRIBED[task_type]
    assert given == {
        "--task-id": "t1",
        "--model": "/cache/models/meta-llama--Llama-3.1-8B",
        "--dataset": "/cache/datasets/t1_train_data.json",
        "--task-type": MARKET_NAMES[task_type],
        "--file-format": "jsonl",
        "--expected-repo-name": NAME,
        "--hours-to-complete": "1.5000",
    }


@pytest.mark.parametrize("word", [None, "zorg"])
def test_picture_trainers_are_told_the_task_in_the_markets_words(word: str | None) -> None:
    model = {"name": "acme/sdxl", "architecture": "sdxl"}
    output = {"repository": "acme/Result.1"}
    given = told("Image", {"image": {"triggerWord": word}}, model=model, output=output)
    assert given == {
        "--task-id": "t1",
        "--model": "/cache/models/acme--sdxl",
        "--dataset-zip": "/cache/datasets/t1_tourn.zip",
        "--model-type": "sdxl",
        "--expected-repo-name": "Result.1",
        "--hours-to-complete": "1.5000",
        **({"--trigger-word": word} if word else {}),
    }


def as_the_kubelet_reads(text: str) -> str:
    """Expand references to variables as k8s.io/kubernetes/third_party/forked/golang/expansion does; all are set."""
    return re.sub(r"\$(\$|\([^)]*\))", lambda found: "$" if found[1] == "$" else "EXPANDED", text)


@given(st.text(alphabet="$() aé{}\n\"'\\", max_size=40))
def test_no_argument_is_changed_on_its_way_into_the_container(text: str) -> None:
    columns = {"dpo": {"promptFormat": text}}
    dataset: Object = {"type": "DPO", **columns, "source": claim("data", "x")}
    run = merged(ON_CLAIMS, {"trainer": pinned(IMAGE), "taskType": "DPO", "dataset": dataset})
    given = pod_of(run)["containers"][0]["args"]
    described = json.loads(as_the_kubelet_reads(given[given.index("--dataset-type") + 1]))
    assert described["prompt_format"] == text


def test_a_repository_runs_the_file_that_the_offer_names() -> None:
    (container,) = pod_of(BY_REPOSITORY)["containers"]
    assert (container["command"], container["workingDir"]) == (["python", "/app/trainer/train.py"], "/app/trainer")
    named = merged(BY_REPOSITORY, {"trainer": {"repository": {"entrypoint": "scripts/run.py"}}})
    (container,) = pod_of(named)["containers"]
    assert container["command"] == ["python", "/app/trainer/scripts/run.py"]


# The steps around it


def test_a_repository_is_fetched_even_where_all_else_lies_on_claims() -> None:
    made = job(merged(ON_CLAIMS, {"trainer": pinned(REPOSITORY)}))
    assert is_prepared(made.spec.run)
    text = step_config_map(made, EnsureStep(StepName.PREPARE, 600, at(3600), at(7200)))["data"]["prepare.json"]
    (item,) = PrepareConfig.model_validate_json(text).items
    assert (item.name, item.kind.value, item.size_limit) == ("trainer", "trainer", 10 << 30)
    assert item.source.git is not None
    assert (item.source.git.url, item.source.git.commit, item.source.git.entrypoint) == (URL, COMMIT, "train.py")
    assert not is_prepared(job(BY_IMAGE).spec.run)


@pytest.mark.parametrize(("run", "to"), [(BY_IMAGE, None), (BY_REPOSITORY, "acme/Exactly.This")])
def test_its_result_is_always_looked_at_wherever_it_goes(run: Object, to: str | None) -> None:
    made = job(run)
    assert is_submitted(made.spec.run)
    text = step_config_map(made, EnsureStep(StepName.SUBMIT, 600, at(3600), at(7200)))["data"]["submit.json"]
    config = SubmitConfig.model_validate_json(text)
    assert config.unverified
    found = config.target.hub.repository if config.target is not None and config.target.hub is not None else None
    assert found == to
    assert config.base_model_path is not None


@pytest.mark.parametrize(("run", "written"), [(BY_IMAGE, ["adapter"]), (BY_REPOSITORY, [])])
def test_the_step_that_verifies_writes_to_nothing_but_a_result_that_stays(run: Object, written: list[str]) -> None:
    pod = step_job(job(run), EnsureStep(StepName.SUBMIT, 600, at(3600), at(7200)))["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    mounts = [m for m in container["volumeMounts"] if m["name"] in ("output", "model") and not m.get("readOnly")]
    assert mounts == [
        {"name": "output", "mountPath": f"/data/output/runs/{NAME}/{leaf}", "subPath": f"runs/{NAME}/{leaf}"}
        for leaf in written
    ]


def test_the_result_of_our_trainer_was_verified_by_it() -> None:
    ours = {key: value for key, value in BY_REPOSITORY.items() if key != "trainer"}
    text = step_config_map(job(ours), EnsureStep(StepName.SUBMIT, 600, at(3600), at(7200)))["data"]["submit.json"]
    assert not SubmitConfig.model_validate_json(text).unverified
