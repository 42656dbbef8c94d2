"""What processes of the lab tell each other about running clusters: one JSON file per cluster."""

import json
import os
import random
import socket
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from taskoffer_lab.errors import LabError
from taskoffer_lab.locking import locked
from taskoffer_lab.network import choose_octet
from taskoffer_lab.paths import state_root
from taskoffer_lab.process_table import start_time
from taskoffer_lab.spec import ClusterSpec, Layout

PORTS = ("apiserver", "etcd", "etcd-peer", "registry")
"""What a cluster listens on."""

# Below the kernel's range for outgoing connections (from 32768), so that no client of somebody else's takes
# the port between choice and use, or while a member is stopped.
_PORT_RANGE = (20000, 32000)


@dataclass(frozen=True)
class ProcessIdentity:
    """A process id with its start time, which together are never used again."""

    pid: int
    started: int

    @staticmethod
    def of(pid: int) -> "ProcessIdentity":
        """Return the identity of a running process."""
        return ProcessIdentity(pid, start_time(pid) or 0)

    @property
    def alive(self) -> bool:
        """Whether that very process still runs."""
        return start_time(self.pid) == self.started


@dataclass(frozen=True)
class ClusterRecord:
    """A cluster that runs, starts or was left behind.

    Attributes:
        spec: What was asked for.
        created: Seconds since the epoch.
        owner: The process that asked for it.
        supervisor: The process that holds its children; None until it has started.
        ports: Loopback ports by use (see `PORTS`).
        octet: N of its networks 10.N.0.0/16 and of its bridge; None without nodes.
        cgroups: Whether control groups were made for it.
        ready: Whether it came up.
    """

    spec: ClusterSpec
    created: float
    owner: ProcessIdentity
    supervisor: ProcessIdentity | None
    ports: dict[str, int]
    octet: int | None = None
    ready: bool = False

    @property
    def name(self) -> str:
        """The cluster's name."""
        return self.spec.name

    @property
    def layout(self) -> Layout:
        """Its files."""
        return Layout(state_root() / self.name)

    @property
    def alive(self) -> bool:
        """Whether somebody still answers for it: the supervisor, or before it exists the owner."""
        return (self.supervisor or self.owner).alive

    def save(self) -> None:
        """Write the record, atomically."""
        path = self.layout.record
        content = asdict(self) | {"spec": self.spec.to_json()}
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=1))
        temporary.replace(path)

    @staticmethod
    def load(path: Path) -> "ClusterRecord":
        """Read a record that `save` wrote."""
        content: dict[str, Any] = json.loads(path.read_text())
        supervisor = content.pop("supervisor")
        return ClusterRecord(
            **content
            | {
                "spec": ClusterSpec.from_json(content["spec"]),
                "owner": ProcessIdentity(**content["owner"]),
                "supervisor": ProcessIdentity(**supervisor) if supervisor else None,
            }
        )

    def with_supervisor(self) -> "ClusterRecord":
        """Return and save the record with the calling process as supervisor."""
        record = replace(self, supervisor=ProcessIdentity.of(os.getpid()))
        record.save()
        return record


def claims_lock() -> Path:
    """Return the lock that guards names, ports and networks of all clusters of this user."""
    return state_root() / "lock"


def records() -> list[ClusterRecord]:
    """Return all clusters on record, oldest first, dead ones included."""
    found = []
    for path in state_root().glob("*/cluster.json"):
        try:
            found.append(ClusterRecord.load(path))
        except FileNotFoundError:
            continue  # It went away meanwhile.
    return sorted(found, key=lambda record: record.created)


def find_record(name: str) -> ClusterRecord:
    """Return the record of a cluster.

    Raises:
        LabError: There is none of that name.
    """
    path = Layout(state_root() / name).record
    if not path.exists():
        names = ", ".join(record.name for record in records()) or "none"
        raise LabError(f"no cluster {name!r} here (running: {names})", "taskoffer-lab up --name …")
    return ClusterRecord.load(path)


def claim(spec: ClusterSpec) -> ClusterRecord:
    """Reserve name, ports and networks for a new cluster and write its record.

    Raises:
        LabError: The name is taken or nothing is free.
    """
    with locked(claims_lock()):
        others = records()
        layout = Layout(state_root() / spec.name)
        if layout.root.exists():
            raise LabError(
                f"a cluster {spec.name!r} is there already ({layout.root})",
                f"choose another name, or: taskoffer-lab down {spec.name}",
            )
        octets = {record.octet for record in others if record.octet is not None}
        ports = _free_ports({port for record in others for port in record.ports.values()})
        layout.root.mkdir(mode=0o700)
        record = ClusterRecord(
            spec=spec,
            created=time.time(),
            owner=ProcessIdentity.of(os.getpid()),
            supervisor=None,
            ports=ports,
            octet=choose_octet(octets) if spec.nodes else None,
        )
        record.save()
    return record


def _free_ports(taken: Iterable[int]) -> dict[str, int]:
    used = set(taken)
    ports: dict[str, int] = {}
    for use in PORTS:
        for _ in range(200):
            port = random.randint(*_PORT_RANGE)  # noqa: S311
            if port not in used and _is_free(port):
                ports[use] = port
                used.add(port)
                break
        else:
            raise LabError(f"no free port between {_PORT_RANGE[0]} and {_PORT_RANGE[1]} after 200 tries")
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True
