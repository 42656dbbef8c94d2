"""A bench for tests of the operator: its own namespace, policy, nodes and claims on the shared control plane."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from auditor import Auditor
from auditor_history import OFFER
from builders import make_offer, make_policy, make_training_job
from fake_node import FakeKubelet, Object
from kept_client import KeptClient
from taskoffer import presets
from taskoffer_lab.api_client import MERGE_PATCH, ApiError
from taskoffer_lab.local_provider import LocalCluster
from taskoffer_lab.process_table import wait_until

PARAMETERS = {1: 500_000, 2: 2_000_000, 4: 4_000_000}
"""A model size for which the lab preset books so many GPUs."""

LABEL = "tests.taskoffer.dev/bench"
UID_LABEL = "taskoffer.dev/offer-uid"
GROUP = "/apis/taskoffer.dev/v1alpha1"
SECONDS = 40.0
"""How long anything may take on a busy machine; most takes well below one second."""

_numbers = itertools.count(1)


class Bench:
    """What a test of the operator works with.

    Nodes carry the bench's label and the policy selects it, so benches do not share GPUs.
    """

    def __init__(self, cluster: LocalCluster, kubelet: FakeKubelet, audit: Auditor) -> None:
        self.cluster = cluster
        self.api = KeptClient(cluster.client_config)
        self.kubelet = kubelet
        self.audit = audit
        self.namespace = f"bench-{next(_numbers)}"
        self.policy_name = self.namespace
        self.nodes: list[str] = []
        self._objects = [f"{GROUP}/capacitypolicies/{self.policy_name}"]
        self.api.request("POST", "/api/v1/namespaces", {"metadata": {"name": self.namespace}})
        for name in ("models", "data", "outputs"):
            self._claim(name)

    def _claim(self, name: str) -> None:
        """Make a claim that is bound to a volume of its own, so that the scheduler need not wait for one."""
        volume = f"{self.namespace}-{name}"
        size: Object = {"storage": "1Gi"}
        both: Object = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
        holder = {"namespace": self.namespace, "name": name}
        spec = {**both, "capacity": size, "hostPath": {"path": "/nonexistent"}, "claimRef": holder}
        self.api.request("POST", "/api/v1/persistentvolumes", {"metadata": {"name": volume}, "spec": spec})
        self._objects.append(f"/api/v1/persistentvolumes/{volume}")
        claim = {**both, "resources": {"requests": size}, "volumeName": volume}
        self.api.request(
            "POST", self.path("persistentvolumeclaims", api="/api/v1"), {"metadata": holder, "spec": claim}
        )

    def path(self, plural: str, name: str = "", *, api: str = GROUP) -> str:
        """Return the path of a kind or an object in the bench's namespace."""
        return f"{api}/namespaces/{self.namespace}/{plural}" + (f"/{name}" if name else "")

    # Nodes and policy

    def node(self, name: str = "a", gpus: int = 8, labels: dict[str, str] | None = None) -> str:
        """Add a node that the bench's policy selects, and return its full name."""
        full = self.kubelet.add_node(f"{self.namespace}-{name}", gpus, {LABEL: self.namespace, **(labels or {})})
        self.nodes.append(full)
        return full

    def make_policy(self, **fields: Any) -> Object:
        """Return the bench's policy: the lab preset for the bench's nodes, with quick retries."""
        quick = {"backoffSeconds": 0, "nodeLostSeconds": 1, "maxAttempts": 3, **fields.pop("attempts", {})}
        selector = {"matchLabels": {LABEL: self.namespace}}
        filters = {"maxConcurrentJobs": None, **fields.pop("filters", {})}
        default = fields.pop("default", False)
        return make_policy(
            name=self.policy_name,
            default=default,
            node_selector=selector,
            attempts=quick,
            filters=filters,
            **fields,
        )

    def policy(self, **fields: Any) -> Object:
        """Create the bench's policy and wait until the operator has taken it up."""
        self.api.request("POST", f"{GROUP}/capacitypolicies", self.make_policy(**fields))
        return self.policy_condition("Ready", "Ready")

    def preset(self, name: str, *, default: bool = True, **fields: Any) -> Object:
        """Create a preset as it is, but for the fields that are merged into its spec; from now on it is the policy."""
        made = make_policy(preset=name, name=presets.load(name)["metadata"]["name"], default=default, **fields)
        self.policy_name = made["metadata"]["name"]
        self.clean_up(f"{GROUP}/capacitypolicies/{self.policy_name}")
        self.api.request("POST", f"{GROUP}/capacitypolicies", made)
        return self.policy_condition("Ready", "Ready")

    def get_policy(self) -> Object:
        """Read the bench's policy."""
        return self._get(f"{GROUP}/capacitypolicies/{self.policy_name}")

    def patch_policy(self, spec: Object) -> Object:
        """Merge changes into the policy's spec."""
        made: Object = self.api.request(
            "PATCH", f"{GROUP}/capacitypolicies/{self.policy_name}", {"spec": spec}, MERGE_PATCH
        )
        return made

    def policy_condition(self, kind: str, reason: str, seconds: float = SECONDS) -> Object:
        """Wait until the policy has a condition with this reason for its generation; return the policy."""

        def there(policy: Object) -> bool:
            found = condition(policy, kind)
            generation = policy["metadata"]["generation"]
            return found.get("reason") == reason and found.get("observedGeneration") == generation

        return self._until(self.get_policy, there, f"policy {kind} {reason}", seconds)

    def policy_until(self, there: Callable[[Object], bool], what: str) -> Object:
        """Wait until the policy is so; return it."""
        return self._until(self.get_policy, there, f"policy: {what}", SECONDS)

    # Offers

    def make_offer(self, name: str, gpus: int = 1, **fields: Any) -> Object:
        """Return an offer for the bench's policy that gets so many GPUs."""
        fields.setdefault("parameters", PARAMETERS[gpus])
        fields.setdefault("policy", self.policy_name)
        return make_offer(name=name, namespace=self.namespace, **fields)

    def offer(self, name: str, gpus: int = 1, **fields: Any) -> Object:
        """Create an offer."""
        return self.create(self.make_offer(name, gpus, **fields))

    def create(self, offer: Object) -> Object:
        """Create an offer from its manifest."""
        made: Object = self.api.request("POST", self.path("taskoffers"), offer)
        return made

    def get(self, name: str) -> Object:
        """Read an offer."""
        return self._get(self.path("taskoffers", name))

    def offers(self) -> list[Object]:
        """Read all offers."""
        found: list[Object] = self.api.request("GET", self.path("taskoffers"))["items"]
        return found

    def patch(self, name: str, spec: Object) -> None:
        """Merge changes into an offer's spec."""
        self.api.request("PATCH", self.path("taskoffers", name), {"spec": spec}, MERGE_PATCH)

    def patch_status(self, plural: str, name: str, status: Object) -> None:
        """Merge changes into an object's status, as somebody with more rights than the operator's users."""
        self.api.request("PATCH", self.path(plural, name) + "/status", {"status": status}, MERGE_PATCH)

    def delete(self, name: str) -> None:
        """Delete an offer."""
        self.api.request("DELETE", self.path("taskoffers", name))

    def until(self, name: str, there: Callable[[Object], bool], what: str, seconds: float = SECONDS) -> Object:
        """Wait until an offer is so; return it."""
        return self._until(lambda: self.get(name), there, f"offer {name}: {what}", seconds)

    def decided(self, name: str, reason: str, seconds: float = SECONDS) -> Object:
        """Wait until an offer's Admitted condition gives this reason; return the offer."""
        return self.until(name, lambda o: condition(o, "Admitted").get("reason") == reason, reason, seconds)

    def admitted(self, name: str, gpus: int = 1, **fields: Any) -> Object:
        """Create an offer and wait until it is admitted."""
        self.offer(name, gpus, **fields)
        return self.decided(name, "Admitted")

    def finished(self, name: str, reason: str, seconds: float = SECONDS) -> Object:
        """Wait until an offer has finished for this reason; return it."""
        return self.until(
            name, lambda o: condition(o, "Finished").get("reason") == reason, f"finished {reason}", seconds
        )

    def status_writes(self, name: str) -> list[Object]:
        """Return the statuses that were written to the newest offer of a name, as the auditor's watch saw them."""
        assert not self.audit.check(), "the auditor has not seen everything, or has found something"
        mine = [e for e in self.audit.events if e.kind == OFFER and e.object["metadata"]["name"] == name]
        mine = [e for e in mine if e.object["metadata"]["namespace"] == self.namespace]
        statuses = [e.object.get("status") or {} for e in mine if e.type != "DELETED" and e.uid == mine[-1].uid]
        return [after for before, after in itertools.pairwise(statuses) if before != after]

    def events(self, name: str) -> list[Object]:
        """Return the Events on the object of this name."""
        path = self.path("events", api="/api/v1") + f"?fieldSelector=involvedObject.name={name}"
        found: list[Object] = self.api.request("GET", path)["items"]
        return found

    def event(self, name: str, reason: str) -> Object:
        """Wait until there is an Event for this reason on the object of this name; return it."""
        found: list[Object] = []

        def there() -> bool:
            found[:] = [e for e in self.events(name) if e["reason"] == reason]
            return bool(found)

        wait_until(there, f"event {reason} on {name}", SECONDS)
        return found[0]

    # What follows from an offer

    def training_job(
        self, name: str, there: Callable[[Object], bool] = lambda _job: True, what: str = "there"
    ) -> Object:
        """Wait until the TrainingJob of an admitted offer is so; return it."""
        job = self.get(name)["status"]["admission"]["jobName"]
        return self._until(
            lambda: self._get(self.path("trainingjobs", job)), there, f"TrainingJob {job} {what}", SECONDS
        )

    def job_condition(self, name: str, kind: str, reason: str) -> Object:
        """Wait until a condition of an offer's TrainingJob gives this reason; return the TrainingJob."""
        return self.training_job(name, lambda j: condition(j, kind).get("reason") == reason, f"{kind} {reason}")

    def batch_jobs(self, offer: Object) -> list[Object]:
        """Return the Jobs that were made for an offer, by name."""
        return self._of(offer, self.path("jobs", api="/apis/batch/v1"))

    def pods(self, offer: Object) -> list[Object]:
        """Return the pods that were made for an offer, by name."""
        return self._of(offer, self.path("pods", api="/api/v1"))

    def _of(self, offer: Object, path: str) -> list[Object]:
        found = self.api.request("GET", f"{path}?labelSelector={UID_LABEL}={offer['metadata']['uid']}")["items"]
        return sorted(found, key=lambda o: str(o["metadata"]["name"]))

    def bound_pod(self, name: str, attempt: int = 1) -> str:
        """Wait until the pod of an offer's attempt is bound to a node; return its name."""
        offer = self.get(name)
        found: list[Object] = []

        def bound() -> bool:
            wanted = {"taskoffer.dev/attempt": str(attempt)}
            found[:] = [
                p
                for p in self.pods(offer)
                if wanted.items() <= p["metadata"]["labels"].items() and p["spec"].get("nodeName")
            ]
            return bool(found)

        wait_until(bound, f"pod of {name}, attempt {attempt}, bound", SECONDS)
        return str(found[0]["metadata"]["name"])

    def run(self, name: str, attempt: int = 1) -> str:
        """Let the container of an offer's attempt run, and wait until the TrainingJob says so; return its pod."""
        pod = self.bound_pod(name, attempt)
        self.kubelet.start(self.namespace, pod)
        self.job_condition(name, "Running", "Running")
        return pod

    def run_through(self, name: str, gpus: int = 1) -> Object:
        """Create an offer and take it to its good end; return it."""
        self.admitted(name, gpus)
        self.end(self.run(name))
        return self.finished(name, "Succeeded")

    def end(self, pod: str, exit_code: int = 0, message: str = "") -> None:
        """Let a pod's container end."""
        self.kubelet.end(self.namespace, pod, exit_code, message)

    def asked_to_stop(self, pod: str) -> None:
        """Wait until a pod was asked to go."""
        path = self.path("pods", pod, api="/api/v1")
        wait_until(lambda: "deletionTimestamp" in self._get(path)["metadata"], f"pod {pod} asked to stop", SECONDS)

    def foreign_pod(self, name: str, node: str, gpus: int) -> None:
        """Create a pod of somebody else that asks for GPUs on a node."""
        wanted = {"nvidia.com/gpu": str(gpus)}
        container = {"name": "trainer", "image": "foreign.invalid/x", "resources": {"limits": wanted}}
        spec = {"nodeName": node, "containers": [container]}
        self.api.request("POST", self.path("pods", api="/api/v1"), {"metadata": {"name": name}, "spec": spec})

    def foreign_training_job(self, name: str) -> Object:
        """Create a TrainingJob that belongs to no offer, as an administrator could."""
        made: Object = self.api.request(
            "POST", self.path("trainingjobs"), make_training_job(name=name, namespace=self.namespace)
        )
        return made

    def garbage_is_collected(self) -> None:
        """Wait until the garbage collector knows our kinds: until then it orphans none, and removes them late."""
        body = make_training_job(name="left-over", namespace=self.namespace)
        owner = {
            "apiVersion": "taskoffer.dev/v1alpha1",
            "kind": "TaskOffer",
            "name": "nobody",
            "uid": str(uuid.uuid4()),
        }
        body["metadata"]["ownerReferences"] = [{**owner, "controller": True}]
        made = self.api.request("POST", self.path("trainingjobs"), body)
        self.gone(self.path("trainingjobs", "left-over"), seconds=60)
        self.keep_out_of_the_audit(made)

    def booked(self, node: str, count: int) -> None:
        """Wait until the policy's status says that so many GPUs are booked on a node."""

        def there(policy: Object) -> bool:
            nodes = policy.get("status", {}).get("capacity", {}).get("nodes") or ()
            return any(n["name"] == node and n["booked"] == count for n in nodes)

        self._until(self.get_policy, there, f"{count} booked on {node}", SECONDS)

    def gone(self, *paths: str, seconds: float = SECONDS) -> None:
        """Wait until nothing is left of some objects."""
        wait_until(lambda: not any(self.api.exists(path) for path in paths), f"{paths} gone", seconds)

    # Plumbing

    def _get(self, path: str) -> Object:
        found: Object = self.api.request("GET", path)
        return found

    @staticmethod
    def _until(get: Callable[[], Object], there: Callable[[Object], bool], what: str, seconds: float) -> Object:
        last: Object = {}

        def check() -> bool:
            nonlocal last
            try:
                last = get()
            except ApiError as error:
                if error.status == 404:
                    return False
                raise
            return there(last)

        try:
            wait_until(check, what, seconds)
        except Exception as error:
            status = last.get("status", {})
            brief = {key: status.get(key) for key in ("conditions", "admission", "attempts", "capacity")}
            error.add_note(f"last seen: {brief}")
            raise
        return last

    def keep_out_of_the_audit(self, *objects: Object) -> None:
        """Take objects that the test itself made, and has removed, out of what the operator is judged by."""
        uids = {obj["metadata"]["uid"] for obj in objects}

        def gone() -> bool:
            return uids <= {event.uid for event in self.audit.events if event.type == "DELETED"}

        wait_until(gone, "the auditor has seen their end", SECONDS)
        self.audit.events[:] = [event for event in self.audit.events if event.uid not in uids]

    def report(self) -> str:
        """Return what there is, for the report of a failed test."""
        kinds = "taskoffers,trainingjobs,jobs,pods"
        listed = self.cluster.kubectl("get", kinds, "-n", self.namespace, "-o", "wide", "--no-headers", check=False)
        told = self.cluster.kubectl("get", "events", "-n", self.namespace, "--no-headers", check=False)
        return f"{listed}\n{told}"

    def clean_up(self, path: str) -> None:
        """Have an object outside of the namespace deleted at the end."""
        self._objects.append(path)

    def clear(self) -> None:
        """Remove everything. A campaign leaves more behind than a busy server removes in a usual request's time."""
        self.api.close()
        self.api = KeptClient(self.cluster.client_config, 120.0)
        options = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background"}
        for path in (
            self.path("taskoffers"),
            self.path("trainingjobs"),
            self.path("jobs", api="/apis/batch/v1"),
        ):
            self.api.request("DELETE", path, options)
        # No kubelet would ever end these pods.
        self.api.request("DELETE", self.path("pods", api="/api/v1"), {**options, "gracePeriodSeconds": 0})
        self.api.request("DELETE", f"/api/v1/namespaces/{self.namespace}")
        for path in self._objects:
            self.kubelet.ignoring_absence("DELETE", path)
        for node in self.nodes:
            if node in self.kubelet.nodes:
                self.kubelet.remove_node(node)


def condition(obj: Object, kind: str) -> Object:
    """Return a condition, empty when it is absent."""
    found = obj.get("status", {}).get("conditions") or ()
    return next((c for c in found if c["type"] == kind), {})


def moment(text: str) -> datetime:
    """Read a time of Kubernetes."""
    return datetime.fromisoformat(text).astimezone(UTC)
