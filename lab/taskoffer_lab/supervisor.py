"""The process that holds a cluster: starts its children, answers requests, and takes everything down.

One per cluster, in a session of its own, so that Ctrl-C in a terminal reaches its owner and not it. It ends
the cluster when it is told to, on SIGTERM, and, unless the cluster is detached, when its owner ends, however
that happens. If it is killed itself, the kernel kills its children, and the next command of the lab sweeps up
the rest (`teardown.sweep`).
"""

import contextlib
import json
import os
import select
import signal
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from taskoffer_lab.control_channel import ControlSocket
from taskoffer_lab.controlplane import ControlPlane
from taskoffer_lab.errors import LabError
from taskoffer_lab.locking import locked
from taskoffer_lab.nodes import NodeSet
from taskoffer_lab.process_table import ProcessTable
from taskoffer_lab.spec import Layout
from taskoffer_lab.state import ClusterRecord, claims_lock
from taskoffer_lab.teardown import remove_cluster
from taskoffer_lab.toolchain import ToolSet

_POLL_SECONDS = 1.0


class StopRequested(Exception):  # noqa: N818 - it is no error
    """The cluster shall end: told so, signalled, or the owner is gone."""


class Supervisor:
    """Brings one cluster up, serves requests until it shall end, and takes it down."""

    def __init__(self, record: ClusterRecord, tools: ToolSet, events: int) -> None:
        self._record = record
        self._events = events
        self._table = ProcessTable()
        self._plane = ControlPlane(record, tools)
        self._nodes = NodeSet(self._plane, self._table)
        self._stop_reason = ""
        self._keep_logs = False
        self._owner = os.pidfd_open(record.owner.pid)
        if not record.owner.alive:
            raise LabError("the owner ended before its cluster began")
        # A signal must wake the select call, so that it is acted on at once.
        self._wake, self._waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(self._waker)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def run(self) -> int:
        """Live the cluster's life; returns the exit status."""
        control = ControlSocket(self._record.layout.control)
        status = 0
        try:
            self._bring_up()
            self._serve(control)
        except StopRequested as reason:
            self._note(f"ending: {reason}")
        except Exception as error:  # noqa: BLE001
            # Whatever went wrong must reach the owner, and nothing may be left behind.
            self._note(traceback.format_exc())
            self._keep_logs, status = True, 1
            remedy = error.remedy if isinstance(error, LabError) else ""
            self._emit("failed", message=str(getattr(error, "message", repr(error))), remedy=remedy)
        finally:
            control.close()
            self._take_down()
        return status

    def _bring_up(self) -> None:
        started = time.monotonic()
        self._plane.write_identities()
        self._nodes.start_early()
        self._plane.start(self._table, self._check)
        self._emit("progress", text=f"control plane ready after {time.monotonic() - started:.1f} s")
        if self._record.spec.nodes:
            self._nodes.start_kubelets()
            self._nodes.wait_ready(self._check)
            self._emit("progress", text=f"nodes ready after {time.monotonic() - started:.1f} s")
        self._record = replace(self._record, ready=True)
        self._record.save()
        self._emit("ready", seconds=round(time.monotonic() - started, 2))
        with contextlib.suppress(OSError):
            os.close(self._events)

    def _serve(self, control: ControlSocket) -> None:
        while True:
            self._raise_if_stopped(watch_owner=not self._record.spec.detached)
            watched = [control.fileno(), self._wake]
            if not self._record.spec.detached:
                watched.append(self._owner)
            readable, _, _ = select.select(watched, [], [], _POLL_SECONDS)
            if self._wake in readable:
                os.read(self._wake, 4096)
            if control.fileno() in readable:
                control.serve_one(self._handle)

    def _handle(self, request: dict[str, Any]) -> dict[str, Any]:
        operation = request.get("op")
        if operation == "down":
            self._keep_logs = bool(request.get("keep_logs"))
            self._stop_reason = "asked to"
            return {"pid": os.getpid()}
        if operation == "process":
            name, action = str(request["name"]), str(request["action"])
            if "/" in name:
                return self._nodes.act_inside(name, action)
            return self._table.act(name, action)
        if operation == "node":
            return self._nodes.act(str(request["name"]), str(request["action"]))
        if operation == "status":
            running = {name: self._table.alive(name) for name in self._table.names}
            return {"processes": running, "nodes": self._nodes.running()}
        raise LabError(f"unknown operation {operation!r}")

    def _check(self) -> None:
        """Called while something is waited for: ends the wait when it is pointless."""
        self._raise_if_stopped(watch_owner=True)
        for name, status, log in self._table.dead():
            tail = log.read_text(errors="replace").strip()[-1500:]
            raise LabError(f"{name} ended with status {status} while the cluster started:\n{tail}")

    def _raise_if_stopped(self, *, watch_owner: bool) -> None:
        if self._stop_reason:
            raise StopRequested(self._stop_reason)
        if watch_owner and select.select([self._owner], [], [], 0)[0]:
            raise StopRequested(f"the owner (pid {self._record.owner.pid}) has ended")

    def _take_down(self) -> None:
        started = time.monotonic()
        self._table.kill_all()
        try:
            kept = remove_cluster(self._record, keep_logs=self._keep_logs)
        except Exception:
            # The next command's sweep tries again: the record stays.
            self._note(traceback.format_exc())
            self._emit("failed", message="teardown was not complete; the next command repeats it", remedy="")
            raise
        self._emit("down", seconds=round(time.monotonic() - started, 2), logs=str(kept) if kept else None)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._stop_reason = self._stop_reason or signal.Signals(number).name

    def _emit(self, event: str, **content: Any) -> None:
        """Tell the owner; one that is gone or has stopped listening is none of our business."""
        self._note(f"{event} {content}")
        with contextlib.suppress(OSError):
            os.write(self._events, json.dumps({"event": event, **content}).encode() + b"\n")

    def _note(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def main(arguments: list[str]) -> int:
    """Run the supervisor: `python -m taskoffer_lab.supervisor CLUSTER_FOLDER EVENTS_FD TOOLS_JSON`."""
    folder, events, tools = Path(arguments[0]), int(arguments[1]), json.loads(arguments[2])
    with locked(claims_lock()):
        record = ClusterRecord.load(Layout(folder).record).with_supervisor()
    return Supervisor(record, ToolSet({name: Path(path) for name, path in tools.items()}), events).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
