"""Long-running children by name: started, stopped, paused, and killed with whoever started them."""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from taskoffer_lab.errors import LabError

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)
STOP_SECONDS = 10.0
"""How long a member may take to end after SIGTERM before it is killed."""

ACTIONS = ("start", "stop", "kill", "pause", "resume", "status")
"""What `ProcessTable.act` understands; pause and resume are SIGSTOP and SIGCONT."""


@dataclass(frozen=True)
class Command:
    """How to start one member.

    Attributes:
        name: Its name in the table and of its log.
        argv: Program and arguments.
        log: Both output streams are appended here.
        environment: Added to the starter's environment.
        cwd: Working directory.
        pass_descriptors: Open files that the member shall hold too (locks).
    """

    name: str
    argv: Sequence[str | Path]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    pass_descriptors: tuple[int, ...] = ()


class ProcessTable:
    """The children of one single-threaded process.

    Every child is in its own process group and gets SIGKILL from the kernel when the starter dies, whatever
    kills it.
    """

    def __init__(self) -> None:
        self._commands: dict[str, Command] = {}
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def names(self) -> list[str]:
        """The members' names in the order they were added."""
        return list(self._commands)

    def start(self, command: Command) -> int:
        """Start a new member (or one of the same name that has ended); returns its process id."""
        if self.alive(command.name):
            raise LabError(f"{command.name} is running already (pid {self._running[command.name].pid})")
        self._commands[command.name] = command
        command.log.parent.mkdir(parents=True, exist_ok=True)
        with command.log.open("ab") as log:
            process = subprocess.Popen(
                [str(part) for part in command.argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=command.cwd,
                env={**os.environ, **command.environment},
                preexec_fn=_die_with_parent,
                process_group=0,
                pass_fds=command.pass_descriptors,
            )
        self._running[command.name] = process
        return process.pid

    def act(self, name: str, action: str) -> dict[str, object]:
        """Do one of `ACTIONS` to the member `name`; returns its pid (None when it is not running)."""
        if name not in self._commands:
            raise LabError(f"no process {name!r}", f"there are: {', '.join(self._commands)}")
        if action == "start":
            self.start(self._commands[name])
        elif action == "stop":
            self.stop(name)
        elif action == "kill":
            self.stop(name, force=True)
        elif action in ("pause", "resume"):
            self._signal(name, signal.SIGSTOP if action == "pause" else signal.SIGCONT)
        elif action != "status":
            raise LabError(f"unknown action {action!r}", f"known: {', '.join(ACTIONS)}")
        return {"pid": self._running[name].pid if self.alive(name) else None}

    def alive(self, name: str) -> bool:
        """Whether the member is running (a paused one is)."""
        process = self._running.get(name)
        return process is not None and process.poll() is None

    def stop(self, name: str, *, force: bool = False) -> None:
        """End a member: SIGTERM and, after `STOP_SECONDS`, SIGKILL; `force` kills at once."""
        process = self._running.get(name)
        if process is None or process.poll() is not None:
            return
        if not force:
            process.send_signal(signal.SIGCONT)
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                force = True
        if force:
            process.kill()
            process.wait()

    def kill_all(self) -> None:
        """Kill every member at once and wait for the last one."""
        for process in self._running.values():
            if process.poll() is None:
                process.kill()
        for process in self._running.values():
            process.wait()

    def reap_orphans(self) -> None:
        """Take the exit status of ended children that are not members, as process 1 of a namespace must."""
        members = {process.pid: process for process in self._running.values()}
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            if ended.si_pid in members:
                members[ended.si_pid].poll()
            else:
                os.waitpid(ended.si_pid, os.WNOHANG)

    def dead(self) -> list[tuple[str, int, Path]]:
        """Return name, exit status and log of members that have ended."""
        return [
            (name, process.returncode, self._commands[name].log)
            for name, process in self._running.items()
            if process.poll() is not None
        ]

    def _signal(self, name: str, number: signal.Signals) -> None:
        if not self.alive(name):
            raise LabError(f"{name} is not running")
        self._running[name].send_signal(number)


def wait_until(
    condition: Callable[[], bool],
    what: str,
    seconds: float,
    *,
    check: Callable[[], None] = lambda: None,
    interval: float = 0.05,
) -> float:
    """Poll `condition`; returns the seconds it took.

    Args:
        condition: What is waited for.
        what: Names it in the error.
        seconds: The deadline.
        check: Called at each poll; raises when waiting on is pointless.
        interval: Seconds between polls.

    Raises:
        LabError: The deadline passed.
    """
    started = time.monotonic()
    while not condition():
        check()
        if time.monotonic() - started > seconds:
            raise LabError(f"{what}: not within {seconds:.0f} s")
        time.sleep(interval)
    return time.monotonic() - started


def start_time(pid: int) -> int | None:
    """Return a process's start in clock ticks since boot, None if it is gone or a zombie.

    With the pid it names a process for ever, for pids are used again (proc(5), stat field 22).
    """
    try:
        content = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = content.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def _die_with_parent() -> None:
    """Run in the child: the kernel sends it SIGKILL when its parent ends (prctl(2), PR_SET_PDEATHSIG)."""
    if _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        os._exit(126)
