"""Real nodes of the lab: GPUs that can change, pods that run, nodes that vanish, and nothing left behind."""

import json
import os
import re
import signal
import socket
import subprocess
import tarfile
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lab_fixtures import owner_of_a_cluster
from taskoffer_lab.base_images import cached_archives
from taskoffer_lab.cgroups import hierarchies
from taskoffer_lab.gpus import RESOURCE
from taskoffer_lab.host_changes import BOUND
from taskoffer_lab.local_provider import LocalCluster, LocalProvider
from taskoffer_lab.network import ClusterNetwork, links
from taskoffer_lab.paths import state_root
from taskoffer_lab.process_table import wait_until
from taskoffer_lab.registry_name import BUSYBOX_IMAGE, REGISTRY
from taskoffer_lab.spec import ClusterSpec
from taskoffer_lab.state import ClusterRecord, find_record, records
from taskoffer_lab.teardown import sweep
from taskoffer_lab.volumes import ensure_volume

POD_SECONDS = 120.0
OWNER = """
import sys, time
from taskoffer_lab.local_provider import LocalProvider
from taskoffer_lab.spec import ClusterSpec
with LocalProvider().up(ClusterSpec(name=sys.argv[1], nodes=1)) as cluster:
    cluster.kubectl("run", "sleeper", "--image=registry.taskoffer.local/busybox:1", "--", "sleep", "600")
    cluster.kubectl("wait", "pod/sleeper", "--for=condition=Ready", "--timeout=110s", timeout=120)
    print("up", flush=True)
    time.sleep(600)
"""
RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "runAsNonRoot": True,
    "runAsUser": 65532,
    "seccompProfile": {"type": "RuntimeDefault"},
}


def pod(name: str, script: str, gpus: int = 0, **spec: Any) -> dict[str, Any]:
    container = {
        "name": "main",
        "image": BUSYBOX_IMAGE,
        "command": ["sh", "-c", script],
        "resources": {"limits": {RESOURCE: gpus}} if gpus else {},
        "securityContext": RESTRICTED,
        **spec.pop("container", {}),
    }
    rest = {"restartPolicy": "Never", "terminationGracePeriodSeconds": 1, **spec}
    meta = {"name": name, "namespace": "default"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": {"containers": [container], **rest}}


def phase(cluster: LocalCluster, name: str) -> str:
    return str(cluster.api.request("GET", f"/api/v1/namespaces/default/pods/{name}")["status"]["phase"])


@pytest.fixture
def run_pod(node_cluster: LocalCluster) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Create pods that are deleted after the test."""
    path, created = "/api/v1/namespaces/default/pods", []

    def create(manifest: dict[str, Any]) -> None:
        node_cluster.api.request("POST", path, manifest)
        created.append(manifest["metadata"]["name"])

    yield create
    for name in created:
        node_cluster.api.request("DELETE", f"{path}/{name}")
    for name in created:
        target = f"{path}/{name}"
        wait_until(lambda target=target: not node_cluster.api.exists(target), f"{name} gone", POD_SECONDS)  # type: ignore[misc]


def output_of(cluster: LocalCluster, create: Callable[[dict[str, Any]], None], manifest: dict[str, Any]) -> str:
    name = manifest["metadata"]["name"]
    create(manifest)
    wait_until(lambda: phase(cluster, name) in ("Succeeded", "Failed"), f"pod {name} done", POD_SECONDS)
    logs = cluster.kubectl("logs", name)
    assert phase(cluster, name) == "Succeeded", logs
    return logs


def traces_of(record: ClusterRecord) -> list[str]:
    """All that a cluster with nodes has left on this machine; other clusters may run at the same time."""
    assert record.octet is not None
    network = ClusterNetwork(record.octet)
    folder = record.layout.root
    found = processes_in(folder) + ([str(folder)] if folder.exists() else [])
    found += [link for link in links() if link == network.bridge or link.startswith(f"{network.bridge}n")]
    found += [str(path) for item in hierarchies() for path in item.mount.glob(network.cgroup)]
    rules = subprocess.run(["iptables-save"], capture_output=True, text=True, check=True).stdout
    found += [rule for rule in rules.splitlines() if network.bridge in rule]
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    found += [line for line in mounts if f"{folder}/" in line or "nsfs" in line]
    if all(other.octet is None for other in records()):
        found += [path for path in ("host-changes.json",) if (state_root() / path).exists()]
        found += [point for point in BOUND if point in made_by_lab() and Path(point).exists()]
    return found


def made_by_lab() -> list[str]:
    file = state_root() / "host-changes.json"
    return list(json.loads(file.read_text())["folders"]) if file.exists() else []


def processes_in(folder: Path) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if f"{folder}/" in line or f"{folder} " in line:
                found.append(line)
    return found


def test_the_node_is_ready_with_eight_gpus_and_the_labels_of_gpu_feature_discovery(
    node_cluster: LocalCluster,
) -> None:
    node = node_cluster.node("node-a").get()
    assert node["status"]["allocatable"][RESOURCE] == "8"
    labels = node["metadata"]["labels"]
    expected = {"gpu.product": "NVIDIA-H100-80GB-HBM3", "gpu.count": "8", "gpu.memory": "81559"}
    expected |= {"gpu.family": "hopper", "gpu.replicas": "1", "gpu.present": "true"}
    assert {key: labels.get(f"nvidia.com/{key}") for key in expected} == expected


def test_a_pod_with_two_gpus_runs_restricted_and_sees_two_uuids(
    node_cluster: LocalCluster, run_pod: Callable[[dict[str, Any]], None]
) -> None:
    logs = output_of(node_cluster, run_pod, pod("two-gpus", "id -u; echo $NVIDIA_VISIBLE_DEVICES", gpus=2))
    user, devices = logs.split()
    assert user == "65532"
    seen = devices.split(",")
    assert len(set(seen)) == 2
    assert set(seen) <= set(node_cluster.node("node-a").gpus.uuids)


def test_a_pod_reaches_the_api_server_by_its_service_address_and_token(
    node_cluster: LocalCluster, run_pod: Callable[[dict[str, Any]], None]
) -> None:
    script = (
        "nc -w 5 $KUBERNETES_SERVICE_HOST $KUBERNETES_SERVICE_PORT </dev/null && echo connected;"
        " wc -c </var/run/secrets/kubernetes.io/serviceaccount/token"
    )
    connected, token_length = output_of(node_cluster, run_pod, pod("api", script)).split()
    assert connected == "connected"
    assert int(token_length) > 100


def test_exec_reaches_a_running_pod(node_cluster: LocalCluster, run_pod: Callable[[dict[str, Any]], None]) -> None:
    run_pod(pod("sleeper", "exec sleep 600"))
    wait_until(lambda: phase(node_cluster, "sleeper") == "Running", "sleeper running", POD_SECONDS)
    assert node_cluster.kubectl("exec", "sleeper", "--", "echo", "here") == "here\n"


def test_a_changed_annotation_reaches_the_downward_volume_of_a_running_pod(
    node_cluster: LocalCluster, run_pod: Callable[[dict[str, Any]], None]
) -> None:
    item = {"path": "tuning", "fieldRef": {"fieldPath": "metadata.annotations['tuning']"}}
    volume = {"name": "info", "downwardAPI": {"items": [item]}}
    mount = {"volumeMounts": [{"name": "info", "mountPath": "/info"}]}
    run_pod(pod("told", "exec sleep 600", volumes=[volume], container=mount))
    wait_until(lambda: phase(node_cluster, "told") == "Running", "told running", POD_SECONDS)
    node_cluster.kubectl("annotate", "pod", "told", "tuning=7")
    read = ("exec", "told", "--", "cat", "/info/tuning")
    wait_until(lambda: node_cluster.kubectl(*read) == "7", "the annotation in the file", POD_SECONDS)


def test_a_host_folder_is_written_by_the_pods_user_through_a_claim(
    node_cluster: LocalCluster, run_pod: Callable[[dict[str, Any]], None]
) -> None:
    folder = state_root() / node_cluster.name / "claimed"
    assert ensure_volume(node_cluster, "default", "outputs", folder) == "default-outputs"
    ensure_volume(node_cluster, "default", "outputs", folder)  # Once more changes nothing.
    volume = {"name": "out", "persistentVolumeClaim": {"claimName": "outputs"}}
    mount = {"volumeMounts": [{"name": "out", "mountPath": "/out"}]}
    output_of(node_cluster, run_pod, pod("writer", "echo kept > /out/file", volumes=[volume], container=mount))
    assert (folder / "file").read_text() == "kept\n"
    assert (folder / "file").stat().st_uid == 65532


@pytest.mark.parametrize(
    ("change", "capacity", "allocatable", "product"),
    [
        ({"unhealthy": [3]}, 8, 7, "NVIDIA-H100-80GB-HBM3"),
        ({"count": 4}, 4, 4, "NVIDIA-H100-80GB-HBM3"),
        ({"count": 0}, 0, 0, None),
        ({"replicas": 4}, 32, 32, "NVIDIA-H100-80GB-HBM3-SHARED"),
        ({"replicas": 2, "unhealthy": [0, 7]}, 16, 12, "NVIDIA-H100-80GB-HBM3-SHARED"),
    ],
    ids=["one unhealthy", "four", "none", "time-slicing", "shared and unhealthy"],
)
def test_the_nodes_gpus_follow_what_is_set_while_it_runs(
    node_cluster: LocalCluster, change: dict[str, Any], capacity: int, allocatable: int, product: str | None
) -> None:
    node = node_cluster.node("node-a")
    try:
        node.set_gpus(**change)
        found = node.get()
        assert found["status"]["capacity"][RESOURCE] == str(capacity)
        assert found["status"]["allocatable"][RESOURCE] == str(allocatable)
        assert found["metadata"]["labels"].get("nvidia.com/gpu.product") == product
    finally:
        node.set_gpus(count=8, unhealthy=[], replicas=1)


def test_a_time_sliced_gpu_is_handed_out_to_several_pods_under_one_uuid(
    node_cluster: LocalCluster, run_pod: Callable[[dict[str, Any]], None]
) -> None:
    node = node_cluster.node("node-a")
    try:
        node.set_gpus(count=1, replicas=2)
        script = "echo $NVIDIA_VISIBLE_DEVICES"
        seen = {output_of(node_cluster, run_pod, pod(f"slice-{i}", script, gpus=1)).strip() for i in range(2)}
        assert seen == {node.gpus.uuids[0]}
    finally:
        node.set_gpus(count=8, unhealthy=[], replicas=1)


@pytest.mark.parametrize("process", ["kubelet", "gpu-device-plugin", "containerd"])
def test_the_gpus_come_back_after_a_restart_of(node_cluster: LocalCluster, process: str) -> None:
    node, member = node_cluster.node("node-a"), node_cluster.process(f"node-a/{process}")
    before = member.pid
    member.kill()
    assert member.pid is None
    node.set_gpus(count=5, wait=False)
    member.start()
    try:
        node.wait_ready()
        assert member.pid not in (None, before)
        assert node.get()["status"]["allocatable"][RESOURCE] == "5"
    finally:
        node.set_gpus(count=8, unhealthy=[], replicas=1)


def ready_status(cluster: LocalCluster, node: str) -> str:
    conditions = cluster.node(node).get()["status"]["conditions"]
    return next(str(item["status"]) for item in conditions if item["type"] == "Ready")


def test_two_nodes_of_which_one_vanishes_and_comes_back_leave_nothing_behind() -> None:
    spec = ClusterSpec(
        name=f"two-n-{os.getpid()}", nodes=2, gpus_per_node=2, node_monitor_grace_seconds=8, serve_registry=True
    )
    serve = "hostname > /tmp/name; exec httpd -f -p 8080 -h /tmp"
    with LocalProvider().up(spec) as cluster:
        assert cluster.nodes == ["node-a", "node-b"]
        assert answers(f"{cluster.registry_endpoint}/v2/")
        for node in cluster.nodes:
            cluster.api.request(
                "POST",
                "/api/v1/namespaces/default/pods",
                pod(f"on-{node}", serve, gpus=2, nodeName=node),
            )
        for node in cluster.nodes:
            wait_until(lambda: phase(cluster, f"on-{node}") == "Running", f"a pod on {node}", POD_SECONDS)  # noqa: B023
        path = "/api/v1/namespaces/default/pods/on-node-b"
        address = cluster.api.request("GET", path)["status"]["podIP"]
        script = f"printf 'GET /name HTTP/1.0\\r\\n\\r\\n' | nc -w 5 {address} 8080"
        fetched = cluster.kubectl("exec", "on-node-a", "--", "sh", "-c", script)
        assert fetched.endswith("\n\non-node-b\n")  # Pods of different nodes reach each other.

        cluster.node("node-b").kill()
        wait_until(lambda: ready_status(cluster, "node-b") == "Unknown", "node-b lost", 120)
        assert ready_status(cluster, "node-a") == "True"
        cluster.node("node-b").start()
        assert ready_status(cluster, "node-b") == "True"
    assert traces_of(cluster.record) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda n: n.name)
def test_nothing_of_a_node_with_a_running_pod_is_left_when_the_owner_ends_by(number: signal.Signals) -> None:
    name = f"gone-{os.getpid()}"
    with owner_of_a_cluster(OWNER, name) as owner:
        record = find_record(name)
        assert len(traces_of(record)) > 10
        owner.send_signal(number)
        owner.communicate(timeout=60)
    wait_until(lambda: traces_of(record) == [], f"nothing left after {number.name}", 60)


def test_the_next_command_sweeps_what_a_killed_supervisor_left_of_a_node() -> None:
    name = f"swept-{os.getpid()}"
    with owner_of_a_cluster(OWNER, name):
        record = find_record(name)
        assert record.supervisor is not None
        os.kill(record.supervisor.pid, signal.SIGKILL)
        wait_until(lambda: processes_in(record.layout.root) == [], "the end of the node", 60)
        assert traces_of(record) != []
        assert name in sweep()
        assert traces_of(record) == []


def test_images_of_an_earlier_cluster_are_still_there_but_its_containers_are_not() -> None:
    name = f"store-{os.getpid()}"
    with LocalProvider().up(ClusterSpec(name=name, nodes=1)) as first:
        first.kubectl("run", "left", f"--image={BUSYBOX_IMAGE}", "--", "sleep", "600")
        first.kubectl("wait", "pod/left", "--for=condition=Ready", "--timeout=110s", timeout=120)
        store = json.loads((first.record.layout.node("node-a") / "node.json").read_text())["before"][0][1]
    with LocalProvider().up(ClusterSpec(name=name, nodes=1)) as second:
        description = json.loads((second.record.layout.node("node-a") / "node.json").read_text())
        assert description["before"][0][1] == store
        client = [*description["containerd_client"], "-n", "k8s.io"]
        ask = [*client, "containers", "ls", "-q"]
        assert subprocess.run(ask, capture_output=True, text=True, check=True).stdout == ""
        log = (second.logs / "node-a" / "store.log").read_text()
        assert re.search(r"removed [1-9]\d* records", log)


def test_a_node_pulls_an_image_from_a_registry_that_is_named_after_it_is_up(
    node_cluster: LocalCluster, run_pod: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    with served_registry(tmp_path) as endpoint:
        push(endpoint, "probe", "1", BUSYBOX_IMAGE)
        node_cluster.use_registry(endpoint.replace("127.0.0.1", "0.0.0.0"))
        image = {"image": f"{REGISTRY}/probe:1", "imagePullPolicy": "Always"}
        assert output_of(node_cluster, run_pod, pod("pulled", "echo pulled", container=image)) == "pulled\n"


@contextmanager
def served_registry(folder: Path) -> Iterator[str]:
    """Debian's docker-registry on every address of this machine."""
    port = free_port()
    config = {"version": 0.1, "http": {"addr": f"0.0.0.0:{port}"}}
    config["storage"] = {"filesystem": {"rootdirectory": str(folder / "data")}}
    (folder / "config.yml").write_text(json.dumps(config))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(["docker-registry", "serve", str(folder / "config.yml")], stdout=log, stderr=log)
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/v2/"), "the registry", 60)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):  # noqa: S310
            return True
    except OSError:
        return False


def push(endpoint: str, repository: str, tag: str, image: str) -> None:
    """Upload an archive of the lab's base images (OCI distribution specification, monolithic uploads)."""
    blobs = {}
    with tarfile.open(cached_archives()[image]) as archive:
        for member in archive.getmembers():
            content = archive.extractfile(member)
            assert content is not None
            blobs[member.name] = content.read()
    manifest = next(item for item in blobs.values() if b"manifest.v1+json" in item and b"layers" in item)
    for name, content in blobs.items():
        if name.startswith("blobs/"):
            digest = f"sha256:{name.rpartition('/')[2]}"
            location = send("POST", f"{endpoint}/v2/{repository}/blobs/uploads/", b"")
            separator = "&" if "?" in location else "?"
            send("PUT", f"{location}{separator}digest={digest}", content)
    url = f"{endpoint}/v2/{repository}/manifests/{tag}"
    send("PUT", url, manifest, "application/vnd.oci.image.manifest.v1+json")


def send(method: str, url: str, body: bytes, kind: str = "application/octet-stream") -> str:
    request = urllib.request.Request(url, body, {"Content-Type": kind}, method=method)  # noqa: S310
    with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
        return str(response.headers["Location"])
