"""Starts Python programs that find the heavy libraries imported already: copies of one process that has imported them.

Importing torch, transformers, peft, trl and diffusers takes six seconds of a CPU for every process of every training.
A copy takes some milliseconds and is otherwise what a new process is: environment, output, arguments, random numbers
and session are its own. What it does not show is the start itself; see the fixture ``preloader`` for who goes without.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

IMPORTED = (
    *("taskoffer_lab.fixtures", "taskoffer_trainer.__main__", "taskoffer_trainer.rank"),
    *(f"taskoffer_trainer.{method}" for method in ("sft", "dpo", "grpo", "image")),
    # What transformers, peft and diffusers import only when a model is made.
    *(f"transformers.models.{kind}.modeling_{kind}" for kind in ("llama", "phi3", "clip", "t5")),
    *("peft.tuners.lora.model", "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl"),
    *("diffusers.pipelines.flux.pipeline_flux", "torch._dynamo", "torch.distributed.fsdp"),
)
_MESSAGE_BYTES = 1 << 18


@dataclass
class Started:
    """A program that was started; has of ``subprocess.Popen`` what the tests use."""

    pid: int
    _end: socket.socket
    returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, negative after a signal, or None while it runs."""
        return self._receive(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code."""
        code = self._receive(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("a preloaded program", timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def _receive(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            self._end.settimeout(timeout)
            try:
                said = self._end.recv(64)
            except (BlockingIOError, TimeoutError):
                return None
            self._end.close()
            assert said, f"nobody knows how process {self.pid} ended, for its parent was ended before it"
            self.returncode = int(said)
        return self.returncode


class Preloader:
    """The process that is copied. It ends with the one that made it."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as this is.
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            env=environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._said,
            stderr=subprocess.STDOUT,
        )
        theirs.close()

    def start(self, command: Sequence[str], env: dict[str, str], output: int) -> Started:
        """Start what ``python COMMAND`` would start, with both outputs going to a file descriptor."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = {"command": list(command), "env": env, "path": sys.path, "folder": str(Path.cwd())}
        socket.send_fds(self._control, [json.dumps(request).encode()], [theirs.fileno(), output])
        theirs.close()
        said = ours.recv(64)
        assert said, f"the preloaded process is gone: {self._text()}"
        return Started(int(said), ours)

    def _text(self) -> str:
        self._said.seek(0)
        return self._said.read()

    def run(
        self, command: Sequence[str], env: dict[str, str], timeout: float = 400.0
    ) -> subprocess.CompletedProcess[str]:
        """Run what ``python COMMAND`` would run to its end; what it says on both outputs is one text."""
        with tempfile.TemporaryFile("w+") as output:
            program = self.start(command, env, output.fileno())
            try:
                code = program.wait(timeout)
            finally:
                program.send_signal(signal.SIGKILL)
            output.seek(0)
            return subprocess.CompletedProcess(list(command), code, output.read())

    def close(self) -> None:
        self._control.close()
        self._process.wait()
        self._said.close()


def serve(control: socket.socket) -> None:
    """Import everything, and then become whatever is asked for, each in a copy of this process."""
    for name in IMPORTED:
        import_module(name)
    gc.collect()
    # What is there now stays as it is; a collection in a copy would only write on the pages that it shares.
    gc.freeze()
    while True:
        data, descriptors, *_ = socket.recv_fds(control, _MESSAGE_BYTES, 2)
        while _reaped():
            pass
        if not data:
            break
        if os.fork() == 0:
            control.close()
            _attend(json.loads(data), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
    while _reaped(0):
        pass


def _reaped(options: int = os.WNOHANG) -> bool:
    try:
        return os.waitpid(-1, options)[0] != 0
    except ChildProcessError:
        return False


def _attend(request: dict[str, Any], end: int, output: int) -> NoReturn:
    """Become the parent of the program, which tells its process number first and its exit code when it is over."""
    pid = os.fork()
    if pid == 0:
        os.close(end)
        _become(request["env"], output, output)
        sys.path[:] = request["path"]
        os.chdir(request["folder"])
        _leave(lambda: _program(request["command"]))
    with socket.socket(fileno=end) as told:
        told.send(str(pid).encode())
        os.close(output)
        _, status = os.waitpid(pid, 0)
        told.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def _become(env: dict[str, str], output: int, errors: int) -> None:
    """Take over what a process gets from whoever starts it, and forget what it would not have had."""
    import numpy
    import torch

    for own, given in ((1, output), (2, errors)):
        os.dup2(given, own)
    for given in {output, errors}:
        os.close(given)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None
    # Whoever forgets to seed must not find the same numbers in every process. Python's own are anew with each copy.
    numpy.random.seed()
    torch.seed()


def _customize(env: dict[str, str]) -> None:
    """Do what ``sitecustomize`` does in a new process: the tests' own ones change modules that are there already."""
    for entry in env.get("PYTHONPATH", "").split(os.pathsep):
        file = Path(entry) / "sitecustomize.py"
        if entry and file.is_file():
            exec(compile(file.read_bytes(), str(file), "exec", dont_inherit=True), {"__name__": "sitecustomize"})  # noqa: S102


def _leave(program: Callable[[], object]) -> NoReturn:
    """Run a program and end as the interpreter would, without what is registered for the end of the first process."""
    code: object = 1
    try:
        code = program()
    except SystemExit as error:
        code = error.code
    except BaseException:  # noqa: BLE001 - as the interpreter does.
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _program(command: list[str]) -> object:
    """Run a command line of the interpreter: ``-m taskoffer_trainer``, ``-c CODE`` or a file."""
    if command[0] == "-m":
        assert command[1] == "taskoffer_trainer", command
        return _trainer(command[2:])
    main = sys.modules["__main__"] = ModuleType("__main__")
    if command[0] == "-c":
        source, sys.argv = command[1], ["-c", *command[2:]]
    else:
        source, sys.argv = Path(command[0]).read_text(), command
        main.__file__ = command[0]
        sys.path.insert(0, str(Path(command[0]).parent))
    exec(compile(source, sys.argv[0], "exec", dont_inherit=True), main.__dict__)  # noqa: S102 - the test's own program.
    return 0


def _trainer(arguments: list[str]) -> int:
    """Be the launcher, whose ranks are copies as well.

    They are made before it has threads, sockets or signal handlers that a copy should not have, and wait.
    """
    from taskoffer_trainer import __main__, launcher

    wanted = json.loads(Path(arguments[arguments.index("--config") + 1]).read_text()).get("gpus")
    waiting: list[_Rank] = []
    for _ in range(wanted if isinstance(wanted, int) else 0):
        waiting.append(_Rank(waiting))

    def start(_command: list[str], *, env: dict[str, str], **_: object) -> _Rank:
        rank = waiting.pop(0)
        rank.go(env)
        return rank

    launcher.subprocess = SimpleNamespace(DEVNULL=subprocess.DEVNULL, Popen=start)  # type: ignore[assignment]
    try:
        return __main__.main(arguments)
    finally:
        for rank in waiting:
            rank.give_up()


class _Rank:
    """A rank that waits for its environment and for what its launcher's outputs are by then."""

    def __init__(self, others: Sequence[_Rank]) -> None:
        self.returncode: int | None = None
        self._go, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            for other in (self, *others):
                other._go.close()
            self._wait(theirs)
        theirs.close()

    def go(self, env: dict[str, str]) -> None:
        socket.send_fds(self._go, [json.dumps(env).encode()], [1, 2])
        self._go.close()

    def give_up(self) -> None:
        self._go.close()
        os.waitpid(self.pid, 0)

    def _wait(self, started: socket.socket) -> NoReturn:
        from taskoffer_trainer import rank

        data, descriptors, *_ = socket.recv_fds(started, _MESSAGE_BYTES, 2)
        if not data:
            os._exit(0)
        started.close()
        os.setsid()
        env = json.loads(data)
        _become(env, *descriptors)
        _customize(env)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _leave(rank.main)


if __name__ == "__main__":
    # A copy would otherwise find its imports beside this file.
    sys.path.pop(0)
    serve(socket.socket(fileno=int(sys.argv[1])))
