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
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from auditor import Auditor
from auditor_history import POD
from builders import make_offer, make_policy
from operator_process import OperatorProcess
from taskoffer_lab.api_client import ApiError
from taskoffer_lab.demo.checks import adapters_of, check_files, check_losses
from taskoffer_lab.fixtures import build_instruct_dataset, build_tiny_model
from taskoffer_lab.images import Registry, ensure_images
from taskoffer_lab.install import install
from taskoffer_lab.local_provider import LocalCluster
from taskoffer_lab.paths import package_root, state_root
from taskoffer_lab.process_table import wait_until
from taskoffer_lab.state import find_record, records
from taskoffer_lab.volumes import ensure_volume

NAMESPACE = POLICY = "path"
GROUP = f"/apis/taskoffer.dev/v1alpha1/namespaces/{NAMESPACE}"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
UID_LABEL = "taskoffer.dev/offer-uid"
MODEL = "lab/llama-0.6m"
TRAINED_SECONDS = 240.0
"""How long one training may take on a busy machine; 20 to 40 s is usual."""
SECONDS = 120.0
GRACE_SECONDS = 60

Object = dict[str, Any]


def size_class(name: str, floor: int, ceiling: int | None, gpus: int, **train: int) -> Object:
    settings = {"perDeviceTrainBatchSize": 8, "learningRate": 0.002, "maxLength": 128, "bf16": False}
    made: Object = {"name": name, "minParameters": floor, "gpus": gpus, "sizeEfficiency": "1"}
    made["lora"] = {"r": 8, "loraAlpha": 16}
    made["train"] = {**settings, "gradientCheckpointing": False, "warmupSteps": 2, **train}
    return made if ceiling is None else {**made, "maxParameters": ceiling}


# An offer states its number of parameters, and with that chooses what is tried here. The model is always the same.
SIZES = {"one": 500_000, "two": 1_500_000, "endless": 2_500_000, "resumable": 3_500_000}
SIZE_CLASSES = [
    size_class("one", 0, 1_000_000, 1, maxSteps=20, evalSteps=10, saveSteps=10),
    size_class("two", 1_000_000, 2_000_000, 2, maxSteps=10, evalSteps=10, saveSteps=10),
    size_class("endless", 2_000_000, 3_000_000, 1, maxSteps=1_000_000, evalSteps=100, saveSteps=100),
    size_class("resumable", 3_000_000, None, 1, maxSteps=60, evalSteps=5, saveSteps=5),
]


class Place:
    """A namespace with claims and a policy on the shared cluster, in which real trainings run."""

    def __init__(self, cluster: LocalCluster, audit: Auditor, outputs: Path) -> None:
        self.cluster, self.api, self.audit, self.outputs = cluster, cluster.api, audit, outputs

    def offer(self, name: str, size: str, data: str = "rows") -> Object:
        dataset = {
            "type": "Instruct",
            "instruct": {"fieldInstruction": "instruction", "fieldInput": "input", "fieldOutput": "output"},
            "source": {"persistentVolumeClaim": {"claimName": "data", "path": data}},
        }
        source = {"persistentVolumeClaim": {"claimName": "models", "path": "tiny"}}
        manifest = make_offer(
            name=name,
            namespace=NAMESPACE,
            model=MODEL,
            parameters=SIZES[size],
            policy=POLICY,
            dataset=dataset,
            spec={"model": {"source": source}},
        )
        made: Object = self.api.request("POST", f"{GROUP}/taskoffers", manifest)
        return made

    def get(self, name: str) -> Object:
        found: Object = self.api.request("GET", f"{GROUP}/taskoffers/{name}")
        return found

    def reason(self, name: str, kind: str) -> str | None:
        return condition(self.get(name), kind).get("reason")

    def until(self, name: str, kind: str, reason: str, seconds: float) -> Object:
        """Wait until an offer's condition gives a reason; return the offer."""
        try:
            wait_until(lambda: self.reason(name, kind) == reason, f"{name} {kind} {reason}", seconds, interval=0.2)
        except Exception as error:
            pods = [(pod["metadata"]["name"], pod["status"]) for pod in self.pods(self.get(name)["metadata"]["uid"])]
            error.add_note(json.dumps([self.get(name).get("status"), self.job(name).get("status"), pods])[:6000])
            raise
        return self.get(name)

    def job(self, name: str) -> Object:
        """Return the TrainingJob of an offer, empty while there is none."""
        jobs = self.api.request("GET", f"{GROUP}/trainingjobs")["items"]
        return next((job for job in jobs if job["spec"]["offerRef"]["name"] == name), {})

    def pods(self, uid: str) -> list[Object]:
        """Return the pods of an offer, oldest attempt first."""
        found = self.api.request("GET", f"{PODS}?labelSelector={UID_LABEL}={uid}")["items"]
        return sorted(found, key=lambda pod: str(pod["metadata"]["name"]))

    def training(self, name: str) -> Object:
        """Wait until an offer's pod has trained its first steps; return the pod."""

        def moves() -> bool:
            report = (self.job(name).get("status") or {}).get("trainerStatus") or {}
            return any(metric["name"] == "loss" for metric in report.get("metrics") or ())

        wait_until(moves, f"{name} trains", TRAINED_SECONDS, interval=0.2)
        return self.pods(self.get(name)["metadata"]["uid"])[-1]

    def delete(self, name: str) -> None:
        """Delete an offer and wait until its pods have gone."""
        try:
            uid = self.get(name)["metadata"]["uid"]
        except ApiError as error:
            if error.status == 404:
                return
            raise
        self.api.request("DELETE", f"{GROUP}/taskoffers/{name}")
        wait_until(lambda: not self.pods(uid), f"the pods of {name} gone", GRACE_SECONDS + SECONDS)


def condition(obj: Object, kind: str) -> Object:
    found = (obj.get("status") or {}).get("conditions") or ()
    return next((item for item in found if item["type"] == kind), {})


def ended(pod: Object) -> Object:
    """Return how a pod's container ended, empty while it runs."""
    statuses = pod["status"].get("containerStatuses") or ({},)
    found: Object = (statuses[0].get("state") or {}).get("terminated") or {}
    return found


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


@pytest.fixture(scope="module")
def trainer_image(node_cluster: LocalCluster) -> Iterator[str]:
    """The trainer image of this checkout, to be had for the cluster's nodes."""
    with Registry.start("127.0.0.1") as storage:
        images = ensure_images(storage.endpoint)
    with Registry.start(node_cluster.host_address) as registry:
        node_cluster.use_registry(registry.endpoint)
        yield images.trainer


@pytest.fixture(scope="module")
def prepared(
    node_cluster: LocalCluster, trainer_image: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    """The place, while auditor and operator run."""
    cluster, root = node_cluster, state_root() / node_cluster.name / "path"
    build_tiny_model(root / "models" / "tiny", family="llama", hidden_size=128)
    build_instruct_dataset(root / "data" / "rows", rows=300)
    (root / "data" / "broken").mkdir()
    (root / "data" / "broken" / "train.jsonl").write_text('{"instruction": "a", "output": "b"}\nno JSON at all\n')
    install(cluster)
    cluster.api.request("POST", "/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
    for claim in ("models", "data", "outputs"):
        ensure_volume(cluster, NAMESPACE, claim, root / claim, read_only=claim != "outputs")
    attempts = {"maxAttempts": 3, "backoffSeconds": 0, "startTimeoutSeconds": 600}
    policy = make_policy(
        name=POLICY,
        default=False,
        size_classes=SIZE_CLASSES,
        attempts=attempts,
        pod_template={"image": trainer_image, "terminationGraceSeconds": GRACE_SECONDS},
    )
    with Auditor(cluster.kubeconfig) as audit:
        replica = OperatorProcess(cluster, tmp_path_factory.mktemp("operator"), "--progress-interval", "0.5")
        place = Place(cluster, audit, root / "outputs")
        with replica:
            cluster.api.request("POST", "/apis/taskoffer.dev/v1alpha1/capacitypolicies", policy)
            yield place
            for offer in cluster.api.request("GET", f"{GROUP}/taskoffers")["items"]:
                place.delete(offer["metadata"]["name"])
            assert replica.terminate() == 0
            assert "Traceback" not in replica.log()
    cluster.api.request("DELETE", f"/apis/taskoffer.dev/v1alpha1/capacitypolicies/{POLICY}")
    cluster.api.request("DELETE", f"/api/v1/namespaces/{NAMESPACE}")
    for claim in ("models", "data", "outputs"):
        cluster.api.request("DELETE", f"/api/v1/persistentvolumes/{NAMESPACE}-{claim}")


@pytest.fixture
def place(prepared: Place, request: pytest.FixtureRequest) -> Iterator[Place]:
    """The place; the test must leave the ledger true, and its offers are deleted."""
    yield prepared
    for offer in prepared.api.request("GET", f"{GROUP}/taskoffers")["items"]:
        prepared.delete(offer["metadata"]["name"])
    found = prepared.audit.check()
    assert not found, prepared.audit.report(found)


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


def test_broken_data_fail_the_job_at_the_first_attempt_with_the_logs_last_lines(place: Place) -> None:
    place.offer("broken-data", "one", data="broken")
    offer = place.until("broken-data", "Finished", "Failed", TRAINED_SECONDS)
    job = place.job("broken-data")
    (attempt,) = job["status"]["attempts"]
    assert attempt["exitCode"] == 65
    for message in (condition(job, "Failed")["message"], condition(offer, "Finished")["message"]):
        assert "exit code 65" in message
        assert "train.jsonl line 2 is not JSON" in message


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
