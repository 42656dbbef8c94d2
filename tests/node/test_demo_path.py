"""From an offer to an adapter on disk, with real pods of the real trainer image, and what may go wrong on the way.

The operator runs as a process under the ServiceAccount's token, and the auditor watches all of it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from auditor_history import POD
from taskoffer_lab.api_client import MERGE_PATCH
from taskoffer_lab.demo.checks import adapters_of, check_files, check_losses
from taskoffer_lab.paths import package_root
from taskoffer_lab.process_table import wait_until
from taskoffer_lab.state import find_record, records
from training_place import (
    ATTEMPTS,
    GRACE_SECONDS,
    GROUP,
    NAMESPACE,
    PODS,
    POLICY,
    SECONDS,
    TRAINED_SECONDS,
    UID_LABEL,
    Object,
    Place,
    condition,
    ended,
    moment,
    place,
    prepared,
    trainer_image,
)

__all__ = ["place", "prepared", "trainer_image"]


def test_an_offer_becomes_a_verified_adapter_on_disk_with_its_progress_reported(place: Place) -> None:
    place.offer("one-gpu", "one")
    running = place.training("one-gpu")
    assert running["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    place.until("one-gpu", "Finished", "Succeeded", TRAINED_SECONDS)

    job = place.job("one-gpu")
    adapters, problems = adapters_of([job], place.outputs)
    assert problems == []
    assert check_files(adapters[0]) == []
    assert check_losses("one-gpu", adapters[0].loss_before, adapters[0].loss_after, "held-out loss", 0.1) == []
    status = job["status"]
    assert condition(job, "Complete")["status"] == "True"
    assert [attempt["outcome"] for attempt in status["attempts"]] == ["Succeeded"]
    assert status["trainerStatus"]["progressPercentage"] == 100
    assert status["trainerStatus"]["estimatedRemainingSeconds"] == 0
    manifest = json.loads((adapters[0].folder / "manifest.json").read_text())
    assert (manifest["taskID"], manifest["step"]) == ("one-gpu", 20)
    assert {path.stat().st_uid for path in adapters[0].folder.iterdir()} == {65532}


COUNT_RANKS = """
from pathlib import Path
lines = [p.joinpath('cmdline').read_bytes() for p in Path('/proc').iterdir() if p.name.isdigit()]
print(sum(b'taskoffer_trainer.rank' in line.split(bytes(1)) for line in lines))
"""


def test_two_gpus_mean_two_processes_that_train_one_adapter(place: Place) -> None:
    place.offer("two-gpus", "two")
    pod = place.training("two-gpus")
    assert pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "2"
    name = pod["metadata"]["name"]
    ranks = place.cluster.kubectl("exec", "-n", NAMESPACE, name, "--", "python", "-c", COUNT_RANKS)
    assert ranks.strip() == "2"
    place.until("two-gpus", "Finished", "Succeeded", TRAINED_SECONDS)
    adapters, problems = adapters_of([place.job("two-gpus")], place.outputs)
    assert problems == []
    assert check_files(adapters[0]) == []
    # A batch of 8 on each GPU.
    card = (adapters[0].folder / "README.md").read_text()
    assert "16 rows each" in card


def test_deleting_an_offer_stops_its_pod_at_once_and_frees_its_gpu_only_when_that_has_ended(place: Place) -> None:
    node = place.cluster.node("node-a")
    node.set_gpus(count=1)
    try:
        uid = place.offer("deleted", "endless")["metadata"]["uid"]
        place.training("deleted")
        place.offer("next", "one")
        place.until("next", "Admitted", "WaitingForCapacity", SECONDS)

        asked = datetime.now().astimezone()
        place.api.request("DELETE", f"{GROUP}/taskoffers/deleted")
        wait_until(lambda: stopping(place, uid), "the pod asked to stop", SECONDS)
        place.until("next", "Admitted", "Admitted", GRACE_SECONDS + SECONDS)
    finally:
        node.set_gpus(count=8)

    history = [event.object for event in place.audit.events if event.kind == POD and uid_of(event.object) == uid]
    stop = next(pod["metadata"]["deletionTimestamp"] for pod in history if "deletionTimestamp" in pod["metadata"])
    told = moment(stop) - timedelta(seconds=GRACE_SECONDS)
    assert abs((told - asked).total_seconds()) < 30
    last = next(ended(pod) for pod in reversed(history) if ended(pod))
    assert last["exitCode"] == 143
    said = json.loads(last["message"])
    assert said["reason"] == "Stopped"
    assert said["step"] > 0
    decided = moment(place.get("next")["status"]["admission"]["decidedAt"])
    assert decided >= moment(last["finishedAt"])


def stopping(place: Place, uid: str) -> bool:
    return all("deletionTimestamp" in pod["metadata"] for pod in place.pods(uid))


def uid_of(pod: Object) -> str | None:
    found: str | None = (pod["metadata"].get("labels") or {}).get(UID_LABEL)
    return found


def test_a_pod_that_is_killed_is_replaced_and_goes_on_from_the_checkpoint(place: Place) -> None:
    place.offer("killed", "resumable")
    pod = place.training("killed")
    folder = place.outputs / ".checkpoints" / place.job("killed")["metadata"]["name"]
    wait_until(lambda: any(folder.rglob("COMPLETE")), "a checkpoint", SECONDS)
    # Killed at once, it cannot write another one.
    place.api.request("DELETE", f"{PODS}/{pod['metadata']['name']}", {"gracePeriodSeconds": 0})
    place.until("killed", "Finished", "Succeeded", TRAINED_SECONDS)

    attempts = place.job("killed")["status"]["attempts"]
    assert len(attempts) == 2
    assert attempts[0]["outcome"] in ("Failed", "Stopped")
    assert attempts[1]["outcome"] == "Succeeded"
    said = json.loads(ended(place.pods(place.get("killed")["metadata"]["uid"])[-1])["message"])
    assert said["resumedFromStep"] >= 5
    assert said["step"] == 60


PROGRESS = """
import urllib.request
print(urllib.request.urlopen('http://127.0.0.1:9500/progress', timeout=10).read().decode())
"""


def test_a_request_in_the_pods_annotation_reaches_the_running_trainer_which_acknowledges_it(place: Place) -> None:
    place.offer("tuned", "endless")
    pod = place.training("tuned")
    name = pod["metadata"]["name"]
    asked = json.dumps({"generation": 7, "microBatch": 3, "dutyCycle": 0.5})
    patch = {"metadata": {"annotations": {"taskoffer.dev/tuning": asked}}}
    place.cluster.kubectl("patch", "pod", "-n", NAMESPACE, name, "--type=merge", "-p", json.dumps(patch))

    reports: list[Object] = []

    def acknowledged() -> bool:
        said = place.cluster.kubectl("exec", "-n", NAMESPACE, name, "--", "python", "-c", PROGRESS)
        reports.append(json.loads(said))
        return bool(reports[-1]["tuning"]["generation"] == 7)

    # The kubelet looks at the annotations of its pods once a minute at the latest.
    wait_until(acknowledged, "the request acknowledged", SECONDS, interval=0.5)
    report = reports[-1]
    assert (report["tuning"]["microBatch"], report["tuning"]["dutyCycle"]) == (3, 0.5)
    assert report["podUid"] == pod["metadata"]["uid"]
    assert place.pods(place.get("tuned")["metadata"]["uid"])[-1]["metadata"]["uid"] == pod["metadata"]["uid"]


def test_broken_data_fail_the_job_at_the_first_attempt_with_the_logs_last_lines(place: Place) -> None:
    place.offer("broken-data", "one", data="broken")
    offer = place.until("broken-data", "Finished", "Failed", TRAINED_SECONDS)
    job = place.job("broken-data")
    (attempt,) = job["status"]["attempts"]
    assert attempt["exitCode"] == 65
    for message in (condition(job, "Failed")["message"], condition(offer, "Finished")["message"]):
        assert "exit code 65" in message
        assert "train.jsonl line 2 is not JSON" in message


TOO_LITTLE = "32Mi"
"""Memory with which a container starts, and in which Python cannot import what the trainer needs at once."""


def test_a_container_killed_for_lack_of_memory_says_how_much_it_had_and_the_next_attempt_is_told(place: Place) -> None:
    allow_memory(place, TOO_LITTLE)
    try:
        place.offer("little-memory", "one")
        place.until("little-memory", "Admitted", "Admitted", SECONDS)
    finally:
        allow_memory(place, None)
    offer = place.until("little-memory", "Finished", "Failed", TRAINED_SECONDS)

    job = place.job("little-memory")
    attempts = job["status"]["attempts"]
    assert [(one["exitCode"], one["reason"]) for one in attempts] == [(137, "OOMKilled")] * ATTEMPTS
    assert condition(job, "Failed")["reason"] == "AttemptsExhausted"
    for message in (condition(job, "Failed")["message"], condition(offer, "Finished")["message"]):
        assert f"(its limit is {TOO_LITTLE} for each of 1 GPU(s)); podTemplate.memoryPerGpu gives it more" in message
    told = [settings_of(place, attempt["jobName"]).get("lackedMemory") for attempt in attempts]
    assert told == [None, [1], [1, 2]]


def allow_memory(place: Place, size: str | None) -> None:
    """Change what the policy gives to containers, and wait until it is in force."""
    path = f"/apis/taskoffer.dev/v1alpha1/capacitypolicies/{POLICY}"
    place.api.request("PATCH", path, {"spec": {"podTemplate": {"memoryPerGpu": size}}}, MERGE_PATCH)

    def ready() -> bool:
        policy = place.api.request("GET", path)
        found = condition(policy, "Ready")
        return bool(found["status"] == "True" and found["observedGeneration"] == policy["metadata"]["generation"])

    wait_until(ready, "the changed policy in force", SECONDS)


def settings_of(place: Place, attempt: str) -> Object:
    """Return what the trainer of an attempt reads."""
    found = place.api.request("GET", f"/api/v1/namespaces/{NAMESPACE}/configmaps/{attempt}")
    settings: Object = json.loads(found["data"]["run.json"])
    return settings


# The demo's own life


def clusters_of(pid: int) -> list[str]:
    return [record.name for record in records() if record.name == f"demo-{pid}"]


def processes_with(text: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if text in line:
                found.append(line)
    return found


@pytest.mark.parametrize("moment_of_interrupt", ["container images …", "operator, two replicas …"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_an_interrupted_demo_leaves_nothing_behind(
    moment_of_interrupt: str, number: signal.Signals, trainer_image: str
) -> None:
    del trainer_image  # It is built already, so that the demo comes to the point soon.
    demo = subprocess.Popen(
        [sys.executable, "-m", "taskoffer_lab.cli", "demo"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(package_root())},
    )
    assert demo.stdout is not None
    seen = []
    for line in iter(demo.stdout.readline, ""):
        seen.append(line)
        if moment_of_interrupt in line:
            break
    bridge = re.escape(network_of(demo.pid)) if clusters_of(demo.pid) else None
    demo.send_signal(number)
    rest, _ = demo.communicate(timeout=180)
    assert demo.returncode == 130, "".join(seen) + rest
    assert clusters_of(demo.pid) == []
    assert processes_with(f"demo-{demo.pid}") == []
    assert processes_with(f"--parent={demo.pid}") == []
    mounts = Path("/proc/self/mountinfo").read_text()
    assert f"demo-{demo.pid}" not in mounts
    if bridge is not None:
        links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
        assert re.search(rf"\b{bridge}\b", links) is None


def network_of(pid: int) -> str:
    octet = find_record(f"demo-{pid}").octet
    return f"tolab{octet}"
