"""The first process inside a node's namespaces: mounts, starts the node's programs, reaps, answers requests.

`python -m taskoffer_lab.node_init NODE_JSON`. It is process 1 of the node, so when it ends the kernel ends
everything in the node. Only the standard library and light parts of the lab are imported: it starts in 0.1 s.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from taskoffer_lab.control_channel import ControlSocket
from taskoffer_lab.errors import LabError
from taskoffer_lab.process_table import Command, ProcessTable, wait_until

CONTAINERD_SECONDS = 30.0
_POLL_SECONDS = 1.0


class NodeInit:
    """Runs one node from the description that the supervisor wrote."""

    def __init__(self, description: dict[str, Any]) -> None:
        self._node = description
        self._folder = Path(description["folder"])
        self._table = ProcessTable()
        os.environ["PATH"] = description["path"]

    def run(self) -> None:
        """Set the node up, then serve for ever."""
        self._mount()
        socket.sethostname(self._node["name"])
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        wake, waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self._start_containerd()
        control = ControlSocket(Path(self._node["control"]))
        while True:
            readable, _, _ = select.select([control.fileno(), wake], [], [], _POLL_SECONDS)
            if wake in readable:
                os.read(wake, 4096)
            self._table.reap_orphans()
            if control.fileno() in readable:
                control.serve_one(self._handle)

    def _mount(self) -> None:
        for target, source in self._node["bind"].items():
            Path(source).parent.mkdir(parents=True, exist_ok=True)
            if not Path(source).is_file():
                Path(source).mkdir(exist_ok=True)
            _run("mount", "--bind", source, target)
        for target in self._node["private"]:
            _run("mount", "-t", "tmpfs", "-o", "mode=0755", "taskoffer-lab", target)
        # The kubelet and containerd need what they mount to reach each other, but not the host.
        _run("mount", "--make-rshared", "/")

    def _start_containerd(self) -> None:
        for program in self._node["before"]:
            self._log("store.log", _run(*program))
        self._table.start(self._command("containerd"))
        client = self._node["containerd_client"]
        wait_until(
            lambda: subprocess.run([*client, "version"], capture_output=True, check=False).returncode == 0,
            f"containerd of {self._node['name']}",
            CONTAINERD_SECONDS,
            check=self._check,
        )
        present = set(_run(*client, "-n", "k8s.io", "images", "ls", "-q").split())
        for name, archive in self._node["images"].items():
            if name not in present:
                _run(*client, "-n", "k8s.io", "images", "import", archive)

    def _log(self, name: str, text: str) -> None:
        with (Path(self._node["logs"]) / name).open("a") as log:
            log.write(text)

    def _check(self) -> None:
        for name, status, log in self._table.dead():
            tail = log.read_text(errors="replace").strip()[-1500:]
            raise LabError(f"{name} ended with status {status}:\n{tail}")

    def _handle(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["op"] == "start-kubelet":
            for name in self._node["commands"]:
                if name != "containerd":
                    self._table.start(self._command(name))
            return {"processes": self._table.names}
        if request["op"] == "process":
            return self._table.act(str(request["name"]), str(request["action"]))
        if request["op"] == "check":
            self._check()
            return {}
        raise LabError(f"unknown operation {request['op']!r}")

    def _command(self, name: str) -> Command:
        return Command(name, self._node["commands"][name], Path(self._node["logs"]) / f"{name}.log")


def _run(*command: str) -> str:
    """Run a program to its end; returns what it said on both streams."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise LabError(f"{' '.join(command)} failed ({result.returncode}): {result.stderr.strip()}")
    return result.stdout + result.stderr


def main(arguments: list[str]) -> int:
    """Run the node; ends only with an error or with its namespace."""
    NodeInit(json.loads(Path(arguments[0]).read_text())).run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
