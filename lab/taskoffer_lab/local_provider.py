"""The local provider: a real cluster built on this machine, without Docker or downloaded binaries."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from taskoffer_lab.base_images import ensure_base_images
from taskoffer_lab.cluster import Cluster, ProcessHandle
from taskoffer_lab.control_channel import ask
from taskoffer_lab.debian import ensure_programs
from taskoffer_lab.errors import LabError
from taskoffer_lab.network import ClusterNetwork
from taskoffer_lab.node_handle import Node
from taskoffer_lab.node_requirements import ensure_node_requirements
from taskoffer_lab.paths import cache_root, package_root
from taskoffer_lab.progress import say
from taskoffer_lab.prune import prune
from taskoffer_lab.registry_hosts import write_hosts
from taskoffer_lab.spec import ClusterSpec
from taskoffer_lab.state import ClusterRecord, claim, find_record
from taskoffer_lab.teardown import remove_cluster, sweep, wait_for_end
from taskoffer_lab.toolchain import ToolSet, ensure_tools

PRUNE_EVERY_SECONDS = 3600.0

DOWN_SECONDS = 30.0
"""How long a supervisor may take to take its cluster down; 1 to 2 s is usual."""


class LocalProcess(ProcessHandle):
    """A process that the supervisor (or a node's first process) holds."""

    def __init__(self, control: Path, name: str) -> None:
        self._control = control
        self.name = name

    def start(self) -> None:
        """Start it again with the same arguments."""
        self._act("start")

    def stop(self) -> None:
        """End it: SIGTERM, and SIGKILL if it does not end in time."""
        self._act("stop")

    def kill(self) -> None:
        """End it with SIGKILL."""
        self._act("kill")

    def pause(self) -> None:
        """Stop it with SIGSTOP: it keeps its connections and answers nothing."""
        self._act("pause")

    def resume(self) -> None:
        """Let a paused one go on."""
        self._act("resume")

    @property
    def pid(self) -> int | None:
        """Its process id (inside the node's namespace for one of a node), None when it does not run."""
        pid: int | None = self._act("status")["pid"]
        return pid

    def _act(self, action: str) -> dict[str, Any]:
        return ask(self._control, {"op": "process", "name": self.name, "action": action})


class LocalCluster(Cluster):
    """A cluster of the local provider."""

    def __init__(self, record: ClusterRecord, kubectl: Path, supervisor: "subprocess.Popen[bytes] | None") -> None:
        layout = record.layout
        super().__init__(record.name, layout.admin_kubeconfig, kubectl, record.spec.node_names)
        self.record = record
        self._supervisor = supervisor
        self._is_down = False

    @property
    def logs(self) -> Path:
        """The folder with one log per process."""
        return self.record.layout.logs

    @property
    def network(self) -> ClusterNetwork:
        """The cluster's networks.

        Raises:
            LabError: It has no nodes, hence no network of its own.
        """
        if self.record.octet is None:
            raise LabError(f"cluster {self.name} has no nodes, so no network of its own")
        return ClusterNetwork(self.record.octet)

    @property
    def host_address(self) -> str:
        """The host's address on the cluster's bridge."""
        return self.network.host_address

    @property
    def registry_endpoint(self) -> str | None:
        """Where the nodes pull the lab's images from, None where nothing was said when the cluster was made."""
        if self.record.spec.serve_registry:
            return f"http://{self.host_address}:{self.record.ports['registry']}"
        return self.record.spec.registry_endpoint

    def process(self, name: str) -> ProcessHandle:
        """Return a process by name: a member of the control plane, or `node-a/kubelet` and the like."""
        return LocalProcess(self.record.layout.control, name)

    def node(self, name: str) -> Node:
        """Return one of the cluster's nodes."""
        if name not in self.nodes:
            raise LabError(f"cluster {self.name} has no node {name!r}", f"it has: {', '.join(self.nodes)}")
        return Node(name, self.record, self.client_config)

    def use_registry(self, endpoint: str) -> None:
        """Let every node pull the lab's image names from `endpoint`; takes effect at the next pull."""
        for node in self.nodes:
            write_hosts(self.record.layout.node(node), endpoint, self.host_address)

    def down(self, *, keep_logs: bool = False) -> Path | None:
        """End the cluster; returns where its logs are, if they were kept."""
        if self._is_down:
            return None
        self._is_down = True
        if not self.record.layout.record.exists():
            return None  # Another process took it down.
        current = find_record(self.name)
        if not current.alive:
            if self._supervisor is not None:
                self._supervisor.wait()
            sweep()
            return _newest_logs(self.name)
        request = {"op": "down", "keep_logs": keep_logs}
        pid = int(ask(self.record.layout.control, request)["pid"])
        if self._supervisor is not None:
            try:
                self._supervisor.wait(DOWN_SECONDS)
            except subprocess.TimeoutExpired as error:
                raise LabError(
                    f"cluster {self.name}: not down after {DOWN_SECONDS:.0f} s", f"see {self.logs}"
                ) from error
        else:
            wait_for_end(pid, DOWN_SECONDS)
        if current.layout.root.exists():
            raise LabError(f"cluster {self.name}: the teardown failed", f"see {self.logs / 'supervisor.log'}")
        return _newest_logs(self.name) if keep_logs else None


class LocalProvider:
    """Builds what is missing, then starts a supervisor that starts the cluster."""

    name = "local"

    def up(self, spec: ClusterSpec) -> LocalCluster:
        """Bring a cluster up; it ends with this process unless `spec.detached`.

        Raises:
            LabError: It did not come up; the message names the logs.
        """
        sweep()
        if spec.nodes:
            ensure_node_requirements()
            ensure_base_images()
        if spec.serve_registry:
            ensure_programs(["docker-registry"])
        tools = ensure_tools(["controlplane", "node"] if spec.nodes else ["controlplane"])
        started = time.monotonic()
        record = claim(spec)
        try:
            cluster = self._start(record, tools)
        except BaseException:
            _remove_if_orphaned(record)
            raise
        _prune_hourly()
        say(f"cluster {spec.name}: up in {time.monotonic() - started:.1f} s")
        return cluster

    def _start(self, record: ClusterRecord, tools: ToolSet) -> LocalCluster:
        layout = record.layout
        layout.logs.mkdir()
        reader, writer = os.pipe2(os.O_CLOEXEC)
        environment = {**os.environ, "PYTHONPATH": _python_path(), "PYTHONUNBUFFERED": "1"}
        arguments = [str(layout.root), str(writer), json.dumps({k: str(v) for k, v in tools.paths.items()})]
        with os.fdopen(reader, "rb") as events, (layout.logs / "supervisor.log").open("ab") as log:
            supervisor = subprocess.Popen(
                [sys.executable, "-m", "taskoffer_lab.supervisor", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=(writer,),
                start_new_session=True,
                cwd="/",
            )
            os.close(writer)
            try:
                self._follow(record, events)
            except BaseException:
                supervisor.terminate()
                supervisor.wait(DOWN_SECONDS)
                raise
        return LocalCluster(record, tools["kubectl"], supervisor)

    def _follow(self, record: ClusterRecord, events: Iterator[bytes]) -> None:
        failure: LabError | None = None
        for line in events:
            event = json.loads(line)
            if event["event"] == "progress":
                say(f"cluster {record.name}: {event['text']}")
            elif event["event"] == "ready":
                return
            elif event["event"] == "failed":
                failure = LabError(event["message"], event["remedy"])
            elif event["event"] == "down" and failure is not None:
                failure.remedy = " · ".join(filter(None, [failure.remedy, f"logs: {event['logs']}"]))
        raise failure or LabError(f"the supervisor of {record.name} ended without a word", f"see {record.layout.logs}")


def attach(name: str) -> LocalCluster:
    """Return a running cluster that another process started.

    Raises:
        LabError: There is none of that name.
    """
    return LocalCluster(find_record(name), ensure_tools(["kubectl"])["kubectl"], None)


def _remove_if_orphaned(record: ClusterRecord) -> None:
    """Remove a cluster whose supervisor never began or ended too early to take it down."""
    with contextlib.suppress(FileNotFoundError):
        current = ClusterRecord.load(record.layout.record)
        if current.supervisor is None or not current.supervisor.alive:
            remove_cluster(current, keep_logs=False)


def _prune_hourly() -> None:
    """Keep the caches below their bound without asking their size at every start."""
    mark = cache_root() / ".pruned"
    if mark.exists() and time.time() - mark.stat().st_mtime < PRUNE_EVERY_SECONDS:
        return
    mark.touch()
    for path in prune():
        say(f"removed {path}, for the caches were above their bound or it was unused for days")


def _python_path() -> str:
    return os.pathsep.join(filter(None, [str(package_root()), os.environ.get("PYTHONPATH", "")]))


def _newest_logs(name: str) -> Path | None:
    found = sorted((cache_root() / "logs").glob(f"{name}-*"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None
