"""Networks and control groups of clusters with nodes, as far as they are decided without touching the machine."""

import ipaddress
from pathlib import Path

import pytest

from taskoffer_lab.cgroups import Hierarchy, create_groups, hierarchies, is_unified, remove_groups
from taskoffer_lab.errors import LabError
from taskoffer_lab.network import ClusterNetwork, choose_octet
from taskoffer_lab.registry_hosts import render_hosts, write_hosts
from taskoffer_lab.registry_name import REGISTRY
from taskoffer_lab.spec import MOST_NODES

V1 = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
34 31 0:31 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime shared:9 - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""
V2 = "25 22 0:21 / /sys/fs/cgroup rw,nosuid,nodev - cgroup2 cgroup2 rw,nsdelegate\n"


@pytest.mark.parametrize(
    ("taken", "in_use", "chosen"),
    [
        ([], ["192.0.2.0/24"], 210),
        ([210], ["192.0.2.0/24"], 211),
        ([], ["10.210.7.0/24"], 211),
        ([211], ["10.210.0.1"], 212),
        ([], ["10.208.0.0/14"], 212),
        ([212], ["10.208.0.0/14", "10.213.255.255"], 214),
    ],
)
def test_a_cluster_gets_a_network_that_nobody_uses(taken: list[int], in_use: list[str], chosen: int) -> None:
    assert choose_octet(taken, in_use) == chosen


def test_a_machine_whose_ten_net_is_one_big_route_is_told_so() -> None:
    with pytest.raises(LabError, match="in use"):
        choose_octet([], ["10.0.0.0/8"])


def test_nodes_services_and_pods_of_a_cluster_do_not_overlap() -> None:
    network = ClusterNetwork(210)
    parts = [f"{network.host_address.rpartition('.')[0]}.0/24", network.services, network.pods]
    ranges = [ipaddress.ip_network(part) for part in parts]
    assert all(not a.overlaps(b) for a in ranges for b in ranges if a is not b)
    for index in range(MOST_NODES):
        assert ipaddress.ip_address(network.node_address(index)) in ranges[0]
        assert ipaddress.ip_network(network.node_pods(index)).subnet_of(ipaddress.ip_network(network.pods))


def test_interface_names_fit_into_fifteen_characters() -> None:
    assert max(len(ClusterNetwork(249).veth(index)) for index in range(MOST_NODES)) <= 15


@pytest.mark.parametrize(("text", "unified", "mounts"), [(V1, False, 3), (V2, True, 1)], ids=["v1", "v2"])
def test_the_version_of_control_groups_is_recognised(text: str, unified: bool, mounts: int) -> None:
    found = hierarchies(text)
    assert len(found) == mounts
    assert is_unified(found) is unified


def test_a_new_cpuset_gets_the_roots_cpus_on_every_level_and_groups_go_away_again(tmp_path: Path) -> None:
    cpuset, memory, cpu = tmp_path / "cpuset", tmp_path / "memory", tmp_path / "cpu"
    for folder in (cpuset, memory, cpu):
        folder.mkdir()
    (cpuset / "cpuset.cpus").write_text("0-1")
    (cpuset / "cpuset.mems").write_text("0")
    mounted = [
        Hierarchy(cpuset, False, frozenset({"cpuset"})),
        Hierarchy(memory, False, frozenset({"memory"})),
        Hierarchy(cpu, False, frozenset({"cpu", "cpuacct"})),
    ]
    create_groups("tolab210/node-a", mounted)
    for level in ("tolab210", "tolab210/node-a"):
        assert (cpuset / level / "cpuset.cpus").read_text() == "0-1"
        assert (memory / level).is_dir()
    # All pods of a cluster together would otherwise weigh as much as one process of the machine.
    assert (cpu / "tolab210" / "cpu.shares").read_text() == str(8 * 1024)
    assert not (cpu / "tolab210" / "node-a" / "cpu.shares").exists()
    remove_groups("tolab210", mounted[1:2])
    assert not (memory / "tolab210").exists()


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://0.0.0.0:5000", "http://10.210.0.1:5000"),
        ("http://10.9.8.7:5000", "http://10.9.8.7:5000"),
        ("https://images.example", "https://images.example"),
    ],
)
def test_a_registry_is_named_as_the_node_reaches_it(endpoint: str, url: str, tmp_path: Path) -> None:
    write_hosts(tmp_path, endpoint, "10.210.0.1")
    text = (tmp_path / "certs.d" / REGISTRY / "hosts.toml").read_text()
    assert f'[host."{url}"]' in text
    assert f'server = "{url}"' in text


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:5000", "http://localhost:5000", "0.0.0.0:5000", "ftp://x"])
def test_a_registry_that_no_node_reaches_is_refused(endpoint: str) -> None:
    with pytest.raises(LabError, match="registry endpoint"):
        render_hosts(endpoint, "10.210.0.1")
