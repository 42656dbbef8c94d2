"""What the lab writes for Kubernetes' programs."""

import json
import os
import tarfile
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

from taskoffer_lab.base_images import write_oci_archive
from taskoffer_lab.controlplane import ControlPlane
from taskoffer_lab.errors import LabError
from taskoffer_lab.gpus import GpuInventory, inventory
from taskoffer_lab.kind_provider import render_config, render_gpu_patch
from taskoffer_lab.network import ClusterNetwork
from taskoffer_lab.node_config import NodeConfig
from taskoffer_lab.spec import ClusterSpec, Layout
from taskoffer_lab.state import ClusterRecord, ProcessIdentity
from taskoffer_lab.tool_catalog import CATALOG, CONTROL_PLANE_TOOLS, NODE_TOOLS
from taskoffer_lab.toolchain import ToolSet
from taskoffer_lab.volumes import prepare_folder, render_volume


def node_config(**spec: Any) -> NodeConfig:
    wish = ClusterSpec(name="x", nodes=2, **spec)
    layout = Layout(Path("/state/x"))
    return NodeConfig(wish, layout, ClusterNetwork(210), "node-b", 1, Path("/cache/slot-2"), Path("/cni"))


def control_plane(**spec: Any) -> ControlPlane:
    wish = ClusterSpec(name="x", **spec)
    ports = {"apiserver": 1, "etcd": 2, "etcd-peer": 3}
    owner = ProcessIdentity.of(os.getpid())
    record = ClusterRecord(wish, time.time(), owner, None, ports, 210 if wish.nodes else None)
    return ControlPlane(record, ToolSet({name: Path("/bin") / name for name in CONTROL_PLANE_TOOLS}))


def flags(plane: ControlPlane) -> list[str]:
    return [str(part) for part in plane.apiserver().argv]


def test_without_nodes_the_api_server_is_on_loopback_and_reconciles_no_endpoint() -> None:
    found = flags(control_plane())
    assert "--bind-address=127.0.0.1" in found
    assert "--endpoint-reconciler-type=none" in found


def test_with_nodes_the_api_server_is_on_the_bridge() -> None:
    found = flags(control_plane(nodes=1))
    assert "--bind-address=10.210.0.1" in found
    assert "--service-cluster-ip-range=10.210.64.0/20" in found
    assert not any("endpoint-reconciler" in flag for flag in found)


def test_rbac_and_node_authorization_are_on() -> None:
    assert "--authorization-mode=Node,RBAC" in flags(control_plane())
    assert "--enable-admission-plugins=NodeRestriction" in flags(control_plane())


@pytest.mark.parametrize("wanted", [True, False])
def test_priority_and_fairness_is_as_wished(wanted: bool) -> None:
    expected = f"--enable-priority-and-fairness={'true' if wanted else 'false'}"
    assert expected in flags(control_plane(priority_and_fairness=wanted))


def test_lost_nodes_and_their_pods_are_found_out_as_soon_as_wished() -> None:
    plane = control_plane(nodes=1, node_monitor_grace_seconds=8, unreachable_toleration_seconds=3)
    manager = [str(part) for part in plane.controller_manager().argv]
    assert "--node-monitor-grace-period=8s" in manager
    assert "--node-monitor-period=1s" in manager
    assert "--default-unreachable-toleration-seconds=3" in flags(plane)


@pytest.mark.parametrize("grace", [4, 5, 8, 20, 50, 300])
def test_several_heartbeats_fit_into_the_grace_period(grace: int) -> None:
    lease = node_config(node_monitor_grace_seconds=grace).kubelet(unified_cgroups=False)["nodeLeaseDurationSeconds"]
    assert 1 <= lease <= 40
    assert grace / (lease / 4) >= 4  # The kubelet renews after a quarter of the lease.


def test_containerds_configuration_is_toml_with_the_nodes_own_folders() -> None:
    found = tomllib.loads(node_config().containerd())
    assert found["root"] == "/cache/slot-2"
    assert found["grpc"]["address"] == "/state/x/node-b/cd.sock"
    images = found["plugins"]["io.containerd.cri.v1.images"]
    assert images["registry"]["config_path"] == "/state/x/node-b/certs.d"
    assert images["discard_unpacked_layers"] is True
    assert found["plugins"]["io.containerd.nri.v1.nri"]["disable"] is True


@pytest.mark.parametrize(("unified", "present"), [(False, True), (True, False)], ids=["v1", "v2"])
def test_only_on_control_groups_v1_the_kubelet_is_told_to_bear_them(unified: bool, present: bool) -> None:
    assert ("failCgroupV1" in node_config().kubelet(unified_cgroups=unified)) is present


def test_each_node_has_its_own_pod_range_and_group() -> None:
    config = node_config()
    assert config.cni()["plugins"][0]["ipam"]["ranges"] == [[{"subnet": "10.210.129.0/24"}]]
    assert config.kubelet(unified_cgroups=False)["cgroupRoot"] == "/tolab210/node-b"


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"name": "Upper"}, "not allowed"),
        ({"name": "x" * 21}, "not allowed"),
        ({"name": "../x"}, "not allowed"),
        ({"nodes": 17}, "0 to 16"),
        ({"nodes": -1}, "0 to 16"),
        ({"gpus_per_node": -1}, "GPUs per node"),
        ({"serve_registry": True}, "needs nodes"),
        ({"nodes": 1, "serve_registry": True, "registry_endpoint": "http://h:1"}, "no registry_endpoint"),
        ({"node_monitor_grace_seconds": 3}, "below 4"),
    ],
)
def test_an_impossible_wish_is_refused(wish: dict[str, Any], message: str) -> None:
    with pytest.raises(LabError, match=message):
        ClusterSpec(**wish)


def test_a_spec_survives_being_written_and_read() -> None:
    spec = ClusterSpec(name="x", nodes=2, registry_endpoint="http://0.0.0.0:5000", detached=True)
    assert ClusterSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    ("count", "unhealthy", "replicas", "capacity", "allocatable"),
    [(8, [], 1, 8, 8), (8, [3], 1, 8, 7), (8, [0, 1], 4, 32, 24), (0, [], 1, 0, 0), (1, [0], 2, 2, 0)],
)
def test_gpus_count_as_the_kubelet_will_count_them(
    count: int, unhealthy: list[int], replicas: int, capacity: int, allocatable: int
) -> None:
    gpus = inventory("c", "n", count, unhealthy, replicas)
    assert (gpus.capacity, gpus.allocatable) == (capacity, allocatable)


def test_a_gpu_keeps_its_uuid_and_no_two_are_alike(tmp_path: Path) -> None:
    many, few = inventory("c", "n", 8), inventory("c", "n", 4)
    assert few.uuids == many.uuids[:4]
    everywhere = [uuid for node in ("a", "b") for uuid in inventory("c", node, 8).uuids]
    assert len(set(everywhere)) == 16
    many.write(tmp_path / "gpus.json")
    assert GpuInventory.read(tmp_path / "gpus.json") == many


@pytest.mark.parametrize(("unhealthy", "replicas"), [([8], 1), ([-1], 1), ([], 0)])
def test_gpus_that_cannot_be_are_refused(unhealthy: list[int], replicas: int) -> None:
    with pytest.raises(LabError):
        inventory("c", "n", 8, unhealthy, replicas)


def test_labels_of_shared_gpus_and_of_none_differ_as_gpu_feature_discovery_has_it() -> None:
    shared, none = inventory("c", "n", 8, (), 4).labels, inventory("c", "n", 0).labels
    assert shared["nvidia.com/gpu.product"] == "NVIDIA-H100-80GB-HBM3-SHARED"
    assert shared["nvidia.com/gpu.sharing-strategy"] == "time-slicing"
    assert set(none) == set(shared)
    assert set(none.values()) == {None}


def test_volume_and_claim_name_each_other_and_no_storage_class() -> None:
    volume, claim = render_volume("team", "models", Path("/data"), read_only=True, storage="5Gi")
    assert volume["spec"]["claimRef"] == {"namespace": "team", "name": "models"}
    assert claim["spec"]["volumeName"] == volume["metadata"]["name"] == "team-models"
    assert volume["spec"]["accessModes"] == claim["spec"]["accessModes"] == ["ReadOnlyMany"]
    assert volume["spec"]["storageClassName"] == claim["spec"]["storageClassName"] == ""


@pytest.mark.parametrize(
    ("mode", "owner", "writable", "allowed"),
    [
        (0o755, 0, False, True),
        (0o755, 0, True, False),
        (0o700, 0, False, False),
        (0o700, 65532, True, True),
        (0o777, 0, True, True),
    ],
)
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders away")
def test_a_folder_that_pods_cannot_use_is_refused(
    tmp_path: Path, mode: int, owner: int, writable: bool, allowed: bool
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    os.chown(folder, owner, owner)
    folder.chmod(mode)
    if allowed:
        prepare_folder(folder, writable=writable)
    else:
        with pytest.raises(LabError, match="65532"):
            prepare_folder(folder, writable=writable)


def test_a_folder_that_nodes_cover_is_refused() -> None:
    with pytest.raises(LabError, match="cover"):
        prepare_folder(Path("/var/lib/kubelet/mine"), writable=True)


def test_kinds_workers_carry_the_labels_and_their_gpus_are_an_extended_resource() -> None:
    config = render_config(ClusterSpec(name="x", nodes=2))
    assert [node["role"] for node in config["nodes"]] == ["control-plane", "worker", "worker"]
    assert config["nodes"][1]["labels"]["nvidia.com/gpu.count"] == "8"
    assert render_gpu_patch(8) == [{"op": "add", "path": "/status/capacity/nvidia.com~1gpu", "value": "8"}]


def test_every_tool_belongs_to_one_group_and_its_key_depends_on_the_toolchain() -> None:
    assert sorted(CATALOG) == sorted([*CONTROL_PLANE_TOOLS, *NODE_TOOLS])
    tool = CATALOG["kubelet"]
    assert tool.cache_name("1.26.8") != tool.cache_name("1.27.0")
    assert tool.cache_prefix() == CATALOG["etcd"].cache_prefix()
    assert tool.cache_prefix() != CATALOG["gpu-device-plugin"].cache_prefix() != CATALOG["ctr"].cache_prefix()


def test_an_image_archive_holds_what_its_index_names(tmp_path: Path) -> None:
    target = tmp_path / "image.tar"
    write_oci_archive(target, "example/x:1", b"layer", {"Cmd": ["/bin/sh"]})
    with tarfile.open(target) as archive:
        names = archive.getnames()

        def read(name: str) -> Any:
            member = archive.extractfile(name)
            assert member is not None
            return json.loads(member.read())

        entry = read("index.json")["manifests"][0]
        assert entry["annotations"]["io.containerd.image.name"] == "example/x:1"
        manifest = read("blobs/sha256/" + entry["digest"].removeprefix("sha256:"))
        digests = [manifest["config"]["digest"], manifest["layers"][0]["digest"]]
        assert all(f"blobs/sha256/{digest.removeprefix('sha256:')}" in names for digest in digests)
