"""Networks of a cluster with nodes: one /16 each, a bridge on the host, and the host's firewall rules."""

import ipaddress
import json
import subprocess
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from taskoffer_lab.debian import find_program
from taskoffer_lab.errors import LabError

_OCTETS = range(210, 250)  # 10.N.0.0/16; low and middle ones are what companies and clouds use.
_FIRST_NODE = 10


@dataclass(frozen=True)
class ClusterNetwork:
    """The addresses and interface names of one cluster.

    10.N.0.0/24 are the nodes and the host's bridge, 10.N.64.0/20 the Services, 10.N.128.0/17 the pods with
    a /24 per node. Interface names have at most 15 characters, so they are made of N, not of the name.
    """

    octet: int

    @property
    def range(self) -> str:
        """Everything of this cluster."""
        return f"10.{self.octet}.0.0/16"

    @property
    def bridge(self) -> str:
        """The bridge on the host."""
        return f"tolab{self.octet}"

    @property
    def bridge_mac(self) -> str:
        """The bridge's link address, locally administered."""
        return f"02:10:{self.octet:02x}:00:00:01"

    @property
    def host_address(self) -> str:
        """The host's address on the bridge: the API server's, and the nodes' gateway."""
        return f"10.{self.octet}.0.1"

    @property
    def services(self) -> str:
        """The range of Service addresses."""
        return f"10.{self.octet}.64.0/20"

    @property
    def pods(self) -> str:
        """The range of pod addresses."""
        return f"10.{self.octet}.128.0/17"

    @property
    def cgroup(self) -> str:
        """The cluster's control group below each hierarchy's root."""
        return f"tolab{self.octet}"

    def node_address(self, index: int) -> str:
        """The address of node `index`."""
        return f"10.{self.octet}.0.{_FIRST_NODE + index}"

    def node_pods(self, index: int) -> str:
        """The pod range of node `index`."""
        return f"10.{self.octet}.{128 + index}.0/24"

    def veth(self, index: int) -> str:
        """The host's end of the cable to node `index`."""
        return f"{self.bridge}n{index}"

    @property
    def firewall_rules(self) -> list[list[str]]:
        """The host's rules: traffic over the bridge passes, and pods reach the world as the host."""
        comment = ["-m", "comment", "--comment", self.bridge]
        outside = ["-s", self.range, "!", "-d", self.range]
        return [
            ["filter", "FORWARD", "-i", self.bridge, *comment, "-j", "ACCEPT"],
            ["filter", "FORWARD", "-o", self.bridge, *comment, "-j", "ACCEPT"],
            ["nat", "POSTROUTING", *outside, *comment, "-j", "MASQUERADE"],
        ]


def choose_octet(taken: Collection[int], in_use: Iterable[str] | None = None) -> int:
    """Return an N whose 10.N.0.0/16 overlaps nothing on this machine.

    Args:
        taken: Those of other clusters.
        in_use: Networks of this machine in CIDR form; read from its routes and addresses when None.

    Raises:
        LabError: All are taken.
    """
    networks = [ipaddress.ip_network(item, strict=False) for item in (in_use or host_networks())]
    for octet in _OCTETS:
        candidate = ipaddress.ip_network(ClusterNetwork(octet).range)
        if octet not in taken and not any(candidate.overlaps(network) for network in networks):
            return octet
    raise LabError(
        f"every network from 10.{_OCTETS.start}.0.0/16 to 10.{_OCTETS.stop - 1}.0.0/16 is in use",
        "end other clusters: taskoffer-lab down --all",
    )


def host_networks() -> list[str]:
    """Return the IPv4 networks that this machine has routes to or addresses in, without the default route."""
    found = []
    for route in json.loads(run_ip("-j", "-4", "route", "show", "table", "all")):
        destination = route["dst"]
        if destination not in ("default", "0.0.0.0/0"):
            found.append(destination)
    return found


def run_ip(*arguments: str) -> str:
    """Run `ip` and return its output.

    Raises:
        LabError: It failed, with what it said.
    """
    return _run("ip", arguments)


def create_bridge(network: ClusterNetwork) -> None:
    """Make the cluster's bridge, the firewall's rules, and let the host forward between bridge and world."""
    # A bridge without a fixed address takes its ports' lowest one; it would change when a node vanishes, and
    # the other nodes would not find the API server until their neighbour caches expire.
    run_ip("link", "add", network.bridge, "address", network.bridge_mac, "type", "bridge")
    run_ip("addr", "add", f"{network.host_address}/24", "dev", network.bridge)
    run_ip("link", "set", network.bridge, "up")
    for table, chain, *rule in network.firewall_rules:
        _run("iptables", ["-w", "5", "-t", table, "-I", chain, *rule])


def connect_node(network: ClusterNetwork, index: int, pid: int, nodes: int) -> None:
    """Connect a node's network namespace to the bridge and route its pods' addresses.

    Args:
        network: The cluster's.
        index: The node's place in the cluster.
        pid: A process in the node's network namespace.
        nodes: How many nodes there are: each knows the way to the other ones' pods.
    """
    veth, address = network.veth(index), network.node_address(index)
    run_ip("link", "add", veth, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
    run_ip("link", "set", veth, "master", network.bridge, "up")
    inside = ["addr add {}/24 dev eth0", "link set eth0 up", "link set lo up", "route add default via {}"]
    commands = [inside[0].format(address), *inside[1:3], inside[3].format(network.host_address)]
    others = [other for other in range(nodes) if other != index]
    commands += [f"route add {network.node_pods(item)} via {network.node_address(item)}" for item in others]
    _run("nsenter", ["--target", str(pid), "--net", "ip", "-batch", "-"], stdin="\n".join(commands))
    run_ip("route", "replace", network.node_pods(index), "via", address)


def remove_cable(network: ClusterNetwork, index: int) -> None:
    """Remove the cable to a node if it is there (it also goes with the node's network namespace)."""
    if network.veth(index) in links():
        _run("ip", ["link", "del", network.veth(index)], accept="Cannot find device")


def remove_network(network: ClusterNetwork) -> None:
    """Remove cables, bridge and firewall rules of a cluster, whatever is there of them."""
    for link in links():
        # A cable goes with its namespace too, but not at once.
        if link == network.bridge or link.startswith(f"{network.bridge}n"):
            _run("ip", ["link", "del", link], accept="Cannot find device")
    if find_program("iptables") is not None:
        for table, chain, *rule in network.firewall_rules:
            if _succeeds("iptables", ["-w", "5", "-t", table, "-C", chain, *rule]):
                _run("iptables", ["-w", "5", "-t", table, "-D", chain, *rule])


def links() -> list[str]:
    """Return the names of the host's network interfaces."""
    return [link["ifname"] for link in json.loads(run_ip("-j", "link", "show"))]


def _run(program: str, arguments: Sequence[str], accept: str = "", stdin: str | None = None) -> str:
    path = find_program(program)
    if path is None:
        raise LabError(f"{program} is not on this machine", "taskoffer-lab doctor")
    result = subprocess.run([path, *arguments], input=stdin, capture_output=True, text=True, check=False)
    if result.returncode != 0 and not (accept and accept in result.stderr):
        raise LabError(f"{program} {' '.join(arguments)} failed: {result.stderr.strip()}")
    return result.stdout


def _succeeds(program: str, arguments: Sequence[str]) -> bool:
    path = find_program(program)
    return path is not None and subprocess.run([path, *arguments], capture_output=True, check=False).returncode == 0
