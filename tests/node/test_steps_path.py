"""From a name on a hub to a repository on it: real pods fetch model and data, train, and hand the adapter over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from taskoffer_lab.fixtures import build_instruct_dataset, build_tiny_model
from taskoffer_lab.process_table import wait_until
from training_place import (
    HUB_TOKEN,
    NAMESPACE,
    SECONDS,
    TRAINED_SECONDS,
    Object,
    Place,
    condition,
    place,
    prepared,
    trainer_image,
)

__all__ = ["place", "prepared", "trainer_image"]

BASE = "lab/llama-0.6m"
ROWS = "lab/rows"


@pytest.fixture
def stocked(place: Place, tmp_path: Path) -> Place:
    """The place, with a base model and a data set on its hub."""
    if BASE not in place.hub.repositories:
        build_tiny_model(tmp_path / "model", family="llama", hidden_size=128)
        build_instruct_dataset(tmp_path / "rows", rows=300)
        for name, kind, folder in ((BASE, "model", "model"), (ROWS, "dataset", "rows")):
            files = {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir() if path.is_file()}
            place.hub.add(name, files, kind=kind)
    return place


def from_the_hub(repository: str, dataset: Object | None = None) -> Object:
    source = {"persistentVolumeClaim": None, "hub": {"name": ROWS}}
    output = {"persistentVolumeClaim": {"claimName": "outputs"}, "repository": repository}
    return {
        "model": {"source": None},
        "dataset": {"fileFormat": "jsonl", "source": source, **(dataset or {})},
        "output": output,
    }


def steps_of(job: Object) -> dict[str, str]:
    return {step["name"]: step["state"] for step in job["status"]["steps"]}


def test_a_task_is_fetched_from_a_hub_trained_and_handed_over_to_it(stocked: Place) -> None:
    stocked.offer("hubbed", "one", spec=from_the_hub("acme/exactly-this-name"))
    stocked.until("hubbed", "Finished", "Succeeded", TRAINED_SECONDS)
    job = stocked.job("hubbed")
    assert steps_of(job) == {"Prepare": "Succeeded", "Train": "Succeeded", "Submit": "Succeeded"}
    result = job["status"]["result"]
    assert result["submittedTo"].endswith("acme/exactly-this-name")
    there = stocked.hub.repositories["acme/exactly-this-name"]
    assert result["submittedRevision"] == there.refs["main"]
    assert there.private
    settings = json.loads(there.head["adapter_config.json"])
    assert settings["base_model_name_or_path"] == BASE
    assert len(there.head["adapter_model.safetensors"]) > 10_000
    # The training itself sees its own files and neither the rest of the cache nor a token.
    (trained,) = stocked.pods(stocked.get("hubbed")["metadata"]["uid"])
    assert trained["metadata"]["labels"]["taskoffer.dev/step"] == "train"
    assert not [volume for volume in trained["spec"]["volumes"] if "secret" in volume]
    assert "HF_TOKEN" not in json.dumps(trained)


def test_what_one_task_has_fetched_the_next_one_finds_in_the_cache(stocked: Place) -> None:
    stocked.offer("first", "one", spec=from_the_hub("acme/first"))
    stocked.until("first", "Finished", "Succeeded", TRAINED_SECONDS)
    before = stocked.hub.sent("model.safetensors")
    stocked.offer("second", "one", spec=from_the_hub("acme/second"))
    stocked.until("second", "Finished", "Succeeded", TRAINED_SECONDS)
    assert stocked.hub.sent("model.safetensors") == before


def test_a_data_set_that_is_not_there_fails_the_task_with_the_reason_and_without_a_gpu(stocked: Place) -> None:
    spec = from_the_hub("acme/never", {"source": {"persistentVolumeClaim": None, "hub": {"name": "lab/absent"}}})
    stocked.offer("absent", "one", spec=spec)
    stocked.until("absent", "Finished", "Failed", SECONDS)
    job = stocked.job("absent")
    failed = condition(job, "Failed")
    assert failed["reason"] == "PrepareFailed"
    assert "lab/absent" in failed["message"]
    assert [attempt.get("startedAt") for attempt in job["status"]["attempts"]] == [None]
    assert "acme/never" not in stocked.hub.repositories


def test_a_token_that_may_not_write_fails_the_task_before_it_has_taken_a_gpu(stocked: Place) -> None:
    owner = {"type": "access_token", "accessToken": {"displayName": "lab", "role": "read"}}
    stocked.hub.who = {"type": "user", "name": "acme", "orgs": [], "auth": owner}
    try:
        stocked.offer("reader", "one", spec={"output": from_the_hub("acme/unwritten")["output"]})
        stocked.until("reader", "Finished", "Failed", SECONDS)
    finally:
        stocked.hub.who = None
    job = stocked.job("reader")
    failed = condition(job, "Failed")
    assert failed["reason"] == "PrepareFailed"
    assert "acme/unwritten: the token of acme is one for reading" in failed["message"]
    assert steps_of(job)["Prepare"] == "Failed"
    assert [attempt.get("startedAt") for attempt in job["status"]["attempts"]] == [None]
    assert "acme/unwritten" not in stocked.hub.repositories


def test_a_hub_that_refuses_the_result_fails_the_task_and_leaves_the_adapter_on_its_claim(stocked: Place) -> None:
    stocked.offer("refused", "one", spec={"output": from_the_hub("acme/refused")["output"]})
    stocked.training("refused")
    # The token was good when it was asked about, and is withdrawn during the training.
    stocked.hub.token = "another-token"
    try:
        stocked.until("refused", "Finished", "Failed", TRAINED_SECONDS)
    finally:
        stocked.hub.token = HUB_TOKEN
    job = stocked.job("refused")
    assert condition(job, "Failed")["reason"] == "SubmitFailed"
    assert steps_of(job) == {"Prepare": "Succeeded", "Train": "Succeeded", "Submit": "Failed"}
    path = Path(job["status"]["result"]["adapterPath"]).relative_to("/data/output")
    assert (stocked.outputs / path / "adapter_model.safetensors").is_file()


def test_cancelling_an_offer_stops_its_fetching(stocked: Place) -> None:
    tree = {**stocked.hub.repositories[BASE].head, "model.safetensors": bytes(8 << 20)}
    stocked.hub.add("lab/llama-slow", tree)
    stocked.hub.faults.block_seconds = 0.2
    try:
        spec = from_the_hub("acme/cancelled")
        stocked.offer("cancelled", "one", spec={**spec, "model": {"source": None, "name": "lab/llama-slow"}})
        wait_until(lambda: stocked.hub.sent("llama-slow") > 0, "the fetching begun", SECONDS)
        patch = json.dumps({"spec": {"active": False}})
        stocked.cluster.kubectl("patch", "taskoffer", "-n", NAMESPACE, "cancelled", "--type=merge", "-p", patch)
        stocked.until("cancelled", "Finished", "Cancelled", SECONDS)
    finally:
        stocked.hub.faults.block_seconds = 0.0
    jobs = stocked.api.request("GET", f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs")["items"]
    (prepare,) = [one for one in jobs if one["metadata"]["name"].startswith("cancelled-")]
    assert prepare["metadata"]["labels"]["taskoffer.dev/step"] == "prepare"
    assert prepare["spec"]["suspend"] is True
