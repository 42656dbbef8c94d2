"""One JSON line each way over a unix socket: how the owner and the command line talk to a supervisor."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from taskoffer_lab.errors import LabError

_LIMIT = 1 << 20  # Bytes of one message; far above any that is sent.


def ask(path: Path, request: dict[str, Any], timeout: float = 60.0) -> dict[str, Any]:
    """Send one request and return the answer.

    Raises:
        LabError: Nobody listens, no answer in time, or the other side refused.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        try:
            connection.connect(str(path))
            connection.sendall(json.dumps(request).encode() + b"\n")
            line = _read_line(connection)
        except OSError as error:
            raise LabError(f"no answer on {path} to {request}: {error}") from error
    if not line:
        raise LabError(f"{path} closed the connection without an answer to {request}")
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise LabError(answer["error"], answer.get("remedy", ""))
    return answer


class ControlSocket:
    """The listening end; `serve_one` answers one waiting caller, so a select loop drives it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(path))
        os.chmod(path, 0o600)
        self._socket.listen(16)
        self._socket.setblocking(False)

    def fileno(self) -> int:
        """The descriptor to select on."""
        return self._socket.fileno()

    def serve_one(self, handle: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Accept one caller, answer its request with what `handle` returns or with the error it raises."""
        try:
            connection, _ = self._socket.accept()
        except BlockingIOError:
            return
        with connection:
            connection.settimeout(5.0)
            try:
                line = _read_line(connection)
                if not line:
                    return
                connection.sendall(json.dumps(_answer(handle, json.loads(line))).encode() + b"\n")
            except (OSError, ValueError) as error:
                # The caller is gone or talks nonsense; the supervisor must outlive both.
                print(f"control socket: {error!r}", flush=True)

    def close(self) -> None:
        """Stop listening and remove the socket file."""
        self._socket.close()
        self.path.unlink(missing_ok=True)


def _answer(handle: Callable[[dict[str, Any]], dict[str, Any]], request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"ok": True, **handle(request)}
    except LabError as error:
        return {"error": error.message, "remedy": error.remedy}


def _read_line(connection: socket.socket) -> bytes:
    received = b""
    while not received.endswith(b"\n"):
        chunk = connection.recv(65536)
        if not chunk or len(received) > _LIMIT:
            break
        received += chunk
    return received
