"""Runs a reward's source text in a confined child process and lets none of its failures through.

The child (:mod:`taskoffer_trainer.sandbox_child`) has no environment, no network, no way to write a file, to start
a process or to signal one, and limits on memory and CPU time. This side adds the limit on time: it never waits
longer, whatever the child does, and believes nothing of what the child says before checking it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from taskoffer_trainer.confinement import LANDLOCK, LAYERS, NETWORK_NAMESPACE, SECCOMP
from taskoffer_trainer.sandbox_child import LARGEST_REWARD, MESSAGE_LENGTH

__all__ = ["Confinement", "Sandbox", "SandboxError", "SandboxLimits"]

_CODE = "import sys; sys.path.insert(0, sys.argv[1]); from taskoffer_trainer.sandbox_child import main; main()"
_PACKAGES = str(Path(__file__).resolve().parent.parent)
_BYTES_PER_REWARD = 32
_BYTES_OF_TEXT = 4096


class SandboxError(Exception):
    """A call that gave no rewards; the text says why in one line."""


@dataclass(frozen=True)
class SandboxLimits:
    """What a reward may use. The memory is address space, of which Python itself takes some 40 MiB."""

    call_seconds: float = 30.0
    start_seconds: float = 60.0
    memory_bytes: int = 512 << 20
    cpu_seconds: int = 3600


@dataclass(frozen=True)
class Confinement:
    """Which layers of the sandbox are in force, and why the others are not."""

    in_force: tuple[str, ...]
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def network(self) -> str:
        """What keeps a reward from the network: a namespace of its own, or only the refused system calls."""
        return NETWORK_NAMESPACE if NETWORK_NAMESPACE in self.in_force else SECCOMP

    @property
    def files(self) -> str:
        """What keeps a reward from files: Landlock, or only their permissions (none can be written either way)."""
        return LANDLOCK if LANDLOCK in self.in_force else "permissions"

    def describe(self) -> str:
        """Say it in one line."""
        refused = "".join(f"; no {name}: {why}" for name, why in self.refused.items())
        return f"network kept away by {self.network}, in force: {', '.join(self.in_force)}{refused}"

    def to_wire(self) -> dict[str, Any]:
        """Return what goes into the report of a run."""
        return {
            "network": self.network,
            "files": self.files,
            "inForce": list(self.in_force),
            "refused": dict(self.refused),
        }


class Sandbox:
    """One reward's source text and the process that runs it.

    The process is started when it is first needed and kept for all calls. After a call that it did not answer as
    it should it is ended, and the next call starts a fresh one.

    Args:
        source: the text; it was checked before.
        limits: what it may use.
        layers: layers to try; only tests leave some out. Without seccomp nothing is run.
    """

    def __init__(self, source: str, limits: SandboxLimits, layers: Sequence[str] = LAYERS) -> None:
        self._source, self._limits, self._layers = source, limits, tuple(layers)
        self._process: subprocess.Popen[bytes] | None = None
        self._cpu_seconds = 0.0
        self.confinement: Confinement | None = None
        """What holds the process; known from its first start."""

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Process id of the child while there is one."""
        return None if self._process is None else self._process.pid

    def start(self) -> Confinement:
        """Start the process if there is none, and load the source text in it.

        Raises:
            SandboxError: when it cannot be confined, or loading fails.
        """
        if self._process is not None and self.confinement is not None:
            return self.confinement
        self._spawn()
        deadline = time.monotonic() + self._limits.start_seconds
        layers = self._receive(b"", "hello", _BYTES_OF_TEXT, deadline, "to start").get("layers")
        if not isinstance(layers, dict):
            raise self._end("the sandbox did not say what confines it")
        refused = {name: why for name, why in layers.items() if why}
        self.confinement = Confinement(tuple(name for name in layers if name not in refused), refused)
        if SECCOMP not in self.confinement.in_force:
            raise self._end(
                f"source text is only run under a seccomp filter, and there is none here: "
                f"{refused.get(SECCOMP, 'not asked for')}; use builtin rewards"
            )
        self._ask({"source": self._source}, 0, deadline)
        return self.confinement

    def call(self, completions: Sequence[str], arguments: Mapping[str, Sequence[Any] | None]) -> list[float | None]:
        """Have some completions rewarded.

        Args:
            completions: the texts.
            arguments: what else the function gets of what it takes, by name; JSON values.

        Returns:
            One finite number for each completion, or ``None`` where the reward does not apply.

        Raises:
            SandboxError: whatever went wrong; the next call is not affected.
        """
        if self._cpu_seconds + self._limits.call_seconds > self._limits.cpu_seconds:
            self.close()
        self.start()
        request = {"completions": list(completions), "arguments": dict(arguments)}
        return self._ask(request, len(completions), time.monotonic() + self._limits.call_seconds)

    def close(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                # What is still in its buffer nobody will read.
                with contextlib.suppress(OSError):
                    pipe.close()
        process.wait()

    def _spawn(self) -> None:
        limits = self._limits
        settings = {
            "parent": os.getpid(),
            "memoryBytes": limits.memory_bytes,
            "cpuSeconds": limits.cpu_seconds,
            "layers": self._layers,
        }
        # Isolated (-I), without site-packages (-S) and bytecode (-B): the standard library and nothing else.
        command = [sys.executable, "-ISB", "-X", "utf8", "-c", _CODE, _PACKAGES, json.dumps(settings)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                env={},
                cwd="/",
                close_fds=True,
                start_new_session=True,
            )
        except OSError as error:
            raise SandboxError(f"no process can be started for it: {error}") from error
        self._cpu_seconds = 0.0
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                os.set_blocking(pipe.fileno(), False)

    def _ask(self, request: dict[str, Any], count: int, deadline: float) -> list[float | None]:
        # The name of a request cannot be guessed, so an answer cannot have been written before the question.
        identity = secrets.token_hex(16)
        line = json.dumps({**request, "id": identity}).encode() + b"\n"
        limit = _BYTES_OF_TEXT + _BYTES_PER_REWARD * count
        answer = self._receive(line, identity, limit, deadline, "for a call")
        cpu = answer.get("cpuSeconds")
        self._cpu_seconds = float(cpu) if isinstance(cpu, float) and cpu >= 0 else math.inf
        if "error" in answer:
            raise SandboxError(_one_line(str(answer["error"])))
        rewards = answer.get("rewards")
        if not isinstance(rewards, list) or len(rewards) != count or not all(map(_is_reward, rewards)):
            raise self._end(f"the sandbox did not answer with {count} rewards")
        return rewards

    def _receive(self, line: bytes, identity: str, limit: int, deadline: float, what: str) -> dict[str, Any]:
        """Write a line, read one, and return what it holds."""
        data = self._exchange(line, limit, deadline, what)
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict) or answer.get("id") != identity:
            raise self._end("something that is no answer was written where answers go")
        return answer

    def _exchange(self, line: bytes, limit: int, deadline: float, what: str) -> bytes:
        """Write to and read from the child at the same time, since it may do one without the other."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise SandboxError("the sandbox is closed")
        data, rest = b"", memoryview(line)
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if rest:
                selector.register(process.stdin, selectors.EVENT_WRITE)
            while b"\n" not in data:
                left = deadline - time.monotonic()
                if left <= 0:
                    seconds = self._limits.start_seconds if what == "to start" else self._limits.call_seconds
                    raise self._end(f"it took longer than the {seconds:g} s that there are {what}")
                for key, _ in selector.select(left):
                    if key.fileobj is process.stdin:
                        rest = rest[self._write(process.stdin, rest) :]
                        if not rest:
                            selector.unregister(process.stdin)
                        continue
                    # One byte more than is allowed shows that there is too much.
                    chunk = process.stdout.read(limit + 1 - len(data))
                    if chunk == b"":
                        raise self._end(self._how_it_ended(process))
                    data += chunk or b""
                    if len(data) > limit:
                        raise self._end(f"it wrote more than {limit} bytes where its answer goes")
        return data

    def _write(self, pipe: Any, rest: memoryview) -> int:
        try:
            return pipe.write(rest) or 0
        except BrokenPipeError:
            # Whether and how it ended shows on the other pipe.
            return len(rest)

    def _how_it_ended(self, process: subprocess.Popen[bytes]) -> str:
        try:
            code = process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "it closed the way for its answers"
        if code == -signal.SIGKILL or code == -signal.SIGXCPU:
            return "its process was killed, as a rule for lack of memory or CPU time"
        if code < 0:
            return f"its process crashed with {signal.Signals(-code).name}"
        return f"its process ended with exit code {code}"

    def _end(self, message: str) -> SandboxError:
        """End the process, which cannot be trusted to be in step any more, and build the error."""
        self.close()
        return SandboxError(message)


def _one_line(text: str) -> str:
    """Return foreign text without what would break a line of a log, or the stream that it is written to.

    Half of a surrogate pair has no form in UTF-8, so that printing it raises an error.
    """
    return " ".join("".join(one if one.isprintable() else " " for one in text).split())[:MESSAGE_LENGTH]


def _is_reward(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST_REWARD
