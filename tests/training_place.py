"""A namespace on the shared cluster in which real trainings run: claims, a policy, the operator, the auditor over all.

The operator runs as a process under the ServiceAccount's token, and the auditor watches all of it.
"""

from __future__ import annotations

import json
import os
import signal
import urllib.request
import uuid
from collections.abc import Iterator
from datetime import datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest

from auditor import Auditor
from builders import make_offer, make_policy, merged
from hub_server import HubServer, hub_server
from operator_process import OperatorProcess
from taskoffer.api.contract import POD_UID_VARIABLE, PROGRESS_PORT
from taskoffer_lab.api_client import ApiError
from taskoffer_lab.fixtures import build_instruct_dataset, build_tiny_model
from taskoffer_lab.images import Registry, ensure_images
from taskoffer_lab.install import install
from taskoffer_lab.local_provider import LocalCluster
from taskoffer_lab.paths import state_root
from taskoffer_lab.process_table import wait_until
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
ATTEMPTS = 3
"""Attempts that the policy allows a job."""
CLAIMS = ("models", "data", "outputs", "cache")
HUB_TOKEN = "a-token-of-the-hub"

Object = dict[str, Any]


def size_class(name: str, floor: int, ceiling: int | None, gpus: int, **train: Any) -> Object:
    settings = {"perDeviceTrainBatchSize": 8, "learningRate": 0.002, "maxLength": 128, "bf16": False}
    made: Object = {"name": name, "minParameters": floor, "gpus": gpus, "sizeEfficiency": "1"}
    made["lora"] = {"r": 8, "loraAlpha": 16}
    made["train"] = {**settings, "gradientCheckpointing": False, "warmupSteps": 2, **train}
    return made if ceiling is None else {**made, "maxParameters": ceiling}


# An offer states its number of parameters, and with that chooses what is tried here. The model is always the same.
SIZES = {"one": 500_000, "two": 1_500_000, "endless": 2_500_000, "resumable": 3_500_000, "typed": 4_500_000}
OF_ANY_TYPE: Object = {
    "learningRate": 0.005,
    "evalRowsMax": 32,
    "grpo": {"numGenerations": 8, "maxCompletionLength": 16, "beta": 0.005},
}
SIZE_CLASSES = [
    size_class("one", 0, 1_000_000, 1, maxSteps=20, evalSteps=10, saveSteps=10),
    size_class("two", 1_000_000, 2_000_000, 2, maxSteps=10, evalSteps=10, saveSteps=10),
    size_class("endless", 2_000_000, 3_000_000, 1, maxSteps=1_000_000, evalSteps=100, saveSteps=100),
    size_class("resumable", 3_000_000, 4_000_000, 1, maxSteps=60, evalSteps=5, saveSteps=5),
    size_class("typed", 4_000_000, None, 1, maxSteps=20, evalSteps=5, saveSteps=5, **OF_ANY_TYPE),
]


def steps_of(hub: HubServer) -> Object:
    """What the policy says of the steps around a training: the hub is one that this machine serves."""
    return {
        "cache": {"claimName": "cache"},
        "hubEndpoint": hub.url,
        "hubToken": {"name": "hub", "key": "token"},
        "network": {"allowHttp": True, "allowPrivateAddresses": True, "retryWaitSeconds": 0.2, "tries": 3},
        "backoffLimit": 1,
        "timeoutSeconds": 600,
        "submitSeconds": 60,
    }


class Place:
    """A namespace with claims and a policy on the shared cluster, in which real trainings run."""

    def __init__(self, cluster: LocalCluster, audit: Auditor, root: Path, hub: HubServer) -> None:
        self.cluster, self.api, self.audit, self.hub = cluster, cluster.api, audit, hub
        self.root, self.outputs = root, root / "outputs"

    def offer(self, name: str, size: str, data: str = "rows", spec: Object | None = None) -> Object:
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
        manifest["spec"] = merged(manifest["spec"], spec or {})
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
            wait_until(
                lambda: self.reason(name, kind) == reason,
                f"{name} {kind} {reason}",
                seconds,
                check=lambda: self._not_over(name, kind, reason),
                interval=0.2,
            )
        except Exception as error:
            pods = [(pod["metadata"]["name"], pod["status"]) for pod in self.pods(self.get(name)["metadata"]["uid"])]
            error.add_note(json.dumps([self.get(name).get("status"), self.job(name).get("status"), pods])[:6000])
            raise
        return self.get(name)

    def _not_over(self, name: str, kind: str, reason: str) -> None:
        """An offer that has finished otherwise will never finish as is waited for."""
        found = self.reason(name, "Finished")
        if kind == "Finished" and found not in (None, reason):
            raise AssertionError(f"{name} is Finished as {found}, and not as {reason}")

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

    def report(self, pod: Object) -> Object:
        """Return what a pod's trainer answers when it is asked how far it is, empty when it does not answer."""
        address = pod["status"].get("podIP")
        if address is None:
            return {}
        try:
            with urllib.request.urlopen(f"http://{address}:{PROGRESS_PORT}/progress", timeout=2) as answer:
                found: Object = json.load(answer)
        except (OSError, HTTPException):
            # It has not begun to serve yet, or is gone.
            return {}
        return found

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


def kill_trainer(pod: Object) -> bool:
    """Kill a pod's first process, and so all of its container, at once; tell whether there was one."""
    uid = f"{POD_UID_VARIABLE}={pod['metadata']['uid']}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # The ranks' module has a longer name. Of other programs the environment may not be read.
            launcher = b"taskoffer_trainer" in (entry / "cmdline").read_bytes().split(b"\0")
            if launcher and uid in (entry / "environ").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)
                return True
        except (FileNotFoundError, ProcessLookupError):
            # It has ended since it was listed.
            continue
    return False


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
    cluster, root = node_cluster, state_root() / node_cluster.name / f"path-{uuid.uuid4().hex[:8]}"
    build_tiny_model(root / "models" / "tiny", family="llama", hidden_size=128)
    build_instruct_dataset(root / "data" / "rows", rows=300)
    (root / "data" / "broken").mkdir()
    (root / "data" / "broken" / "train.jsonl").write_text('{"instruction": "a", "output": "b"}\nno JSON at all\n')
    install(cluster)
    # The strictest of the pod security standards, and the server sees to it.
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    cluster.api.request("POST", "/api/v1/namespaces", {"metadata": {"name": NAMESPACE, "labels": labels}})
    for claim in CLAIMS:
        ensure_volume(cluster, NAMESPACE, claim, root / claim, read_only=claim in ("models", "data"))
    secret = {"metadata": {"name": "hub"}, "stringData": {"token": HUB_TOKEN}}
    cluster.api.request("POST", f"/api/v1/namespaces/{NAMESPACE}/secrets", secret)
    attempts = {"maxAttempts": ATTEMPTS, "backoffSeconds": 0, "startTimeoutSeconds": 600}
    policy = make_policy(
        name=POLICY,
        default=False,
        size_classes=SIZE_CLASSES,
        attempts=attempts,
        pod_template={"image": trainer_image, "terminationGraceSeconds": GRACE_SECONDS},
    )
    with Auditor(cluster.kubeconfig) as audit, hub_server(HUB_TOKEN, cluster.host_address) as hub:
        policy["spec"]["steps"] = steps_of(hub)
        replica = OperatorProcess(cluster, tmp_path_factory.mktemp("operator"), "--progress-interval", "0.5")
        place = Place(cluster, audit, root, hub)
        with replica:
            cluster.api.request("POST", "/apis/taskoffer.dev/v1alpha1/capacitypolicies", policy)
            yield place
            for offer in cluster.api.request("GET", f"{GROUP}/taskoffers")["items"]:
                place.delete(offer["metadata"]["name"])
            assert replica.terminate() == 0
            assert "Traceback" not in replica.log()
    cluster.api.request("DELETE", f"/apis/taskoffer.dev/v1alpha1/capacitypolicies/{POLICY}")
    cluster.api.request("DELETE", f"/api/v1/namespaces/{NAMESPACE}")
    # The next module makes one of the same name.
    namespaces = "/api/v1/namespaces"
    wait_until(
        lambda: all(one["metadata"]["name"] != NAMESPACE for one in cluster.api.request("GET", namespaces)["items"]),
        "the namespace gone",
        SECONDS,
    )
    for claim in CLAIMS:
        cluster.api.request("DELETE", f"/api/v1/persistentvolumes/{NAMESPACE}-{claim}")


@pytest.fixture
def place(prepared: Place, request: pytest.FixtureRequest) -> Iterator[Place]:
    """The place; the test must leave the ledger true, and its offers are deleted."""
    yield prepared
    for offer in prepared.api.request("GET", f"{GROUP}/taskoffers")["items"]:
        prepared.delete(offer["metadata"]["name"])
    found = prepared.audit.check()
    assert not found, prepared.audit.report(found)
