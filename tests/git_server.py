"""A git server over HTTP in one thread: dulwich's, or git's own where the machine has git.

dulwich's speaks version 0 of the protocol and gives only what a branch or a tag stands for; git's speaks version 2 as
the large hosts do. The request log has every method and path with the command that was asked for.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from dulwich.objects import Blob, Commit, ObjectID, Tree
from dulwich.repo import Repo
from dulwich.server import DictBackend
from dulwich.web import make_wsgi_chain

Entry = bytes | tuple[int, Any]
"""A file's content, or a mode and a content: a link's target, the commit of a submodule, or the hash of a folder."""


@dataclass
class GitRepository:
    """A repository on disk, and commits as a test wants them, also such as git would not make."""

    path: Path
    repo: Repo = field(init=False)

    def __post_init__(self) -> None:
        self.path.mkdir(parents=True)
        self.repo = Repo.init_bare(str(self.path))
        config = self.repo.get_config()
        config.set((b"uploadpack",), b"allowFilter", b"true")
        config.write_to_path()

    def commit(self, files: dict[str, Entry], ref: str | None = "heads/main", parent: str | None = None) -> str:
        """Add a commit that holds exactly these files, let a branch or tag stand for it, and return its hash."""
        made = Commit()
        made.tree = self.tree({name.encode(): content for name, content in files.items()})
        made.parents = [ObjectID(parent.encode())] if parent else []
        made.author = made.committer = b"Ann <ann@example.com>"
        made.author_time = made.commit_time = 1_700_000_000
        made.author_timezone = made.commit_timezone = 0
        made.message = b"More."
        self.repo.object_store.add_object(made)
        if ref is not None:
            self.repo.refs[f"refs/{ref}".encode()] = made.id  # type: ignore[index]
        return made.id.decode()

    def tree(self, files: dict[bytes, Entry]) -> ObjectID:
        """Add a folder; names with a slash are files of folders below it."""
        tree, below = Tree(), dict[bytes, dict[bytes, Entry]]()
        for name, entry in files.items():
            head, _, rest = name.partition(b"/")
            if rest:
                below.setdefault(head, {})[rest] = entry
                continue
            mode, content = entry if isinstance(entry, tuple) else (0o100644, entry)
            oid = content if mode in (0o160000, 0o040000) else self._blob(content)
            tree.add(name, mode, oid)
        for name, inner in below.items():
            tree.add(name, 0o040000, self.tree(inner))
        self.repo.object_store.add_object(tree)
        return tree.id

    def _blob(self, content: bytes) -> ObjectID:
        blob = Blob.from_string(content)
        self.repo.object_store.add_object(blob)
        return blob.id


class GitServer:
    """The server and what was asked of it."""

    def __init__(self, root: Path, native: bool = False) -> None:
        self.root, self.native, self.asked = root, native, list[str]()
        self.repositories: dict[str, Repo] = {}
        self.statuses: list[str] = []
        self.moved: dict[str, str] = {}
        self.cut_after: int | None = None
        self.corrupt = 0
        self.hang: threading.Event | None = None
        self.sent = 0
        app = self._by_git if native else make_wsgi_chain(DictBackend(self.repositories))  # type: ignore[arg-type]
        self._app: Callable[..., Iterable[bytes]] = app
        self._http = make_server("127.0.0.1", 0, self._answer, _Server, _Quiet)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def add(self, name: str = "trainer") -> GitRepository:
        """Add an empty repository."""
        repository = GitRepository(self.root / name)
        self.repositories[f"/{name}"] = repository.repo
        return repository

    def close(self) -> None:
        if self.hang is not None:
            self.hang.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(timeout=10)
        for repository in self.repositories.values():
            repository.close()

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterator[bytes]:
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        self.asked.append(f"{method} {path}")
        moved = next((old for old in self.moved if path.startswith(old)), None)
        if moved is not None:
            rest = path.removeprefix(moved)
            start("302 Found", [("Location", f"{self.moved[moved]}{rest}?{environ['QUERY_STRING']}")])
            return
        if path.startswith("/page/"):
            start("200 OK", [("Content-Type", "text/html")])
            yield b"<html>"
            return
        if self.statuses:
            start(self.statuses.pop(0), [("Content-Type", "text/plain")])
            return
        yield from self._app(environ, partial(self._start, start, method))

    def _start(self, start: Callable[..., Any], method: str, *status: Any) -> Callable[[bytes], None]:
        """Begin an answer; what is written to it goes through the faults of the moment."""
        write = start(*status)

        def faulty(block: bytes) -> None:
            if method != "POST":
                write(block)
                return
            if self.cut_after is not None and self.sent + len(block) > self.cut_after:
                self.cut_after = None
                raise ConnectionResetError
            if self.corrupt and len(block) > 1000:
                self.corrupt -= 1
                block = block[:900] + bytes([block[900] ^ 1]) + block[901:]
            write(block)
            self.sent += len(block)
            if self.hang is not None and self.sent > 1000:
                self.hang.wait(60)

        return faulty

    def _by_git(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterator[bytes]:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        names = ("REQUEST_METHOD", "PATH_INFO", "QUERY_STRING", "CONTENT_TYPE", "CONTENT_LENGTH", "REMOTE_ADDR")
        asked = {name: str(environ.get(name, "")) for name in names}
        asked |= {"GIT_PROTOCOL": environ.get("HTTP_GIT_PROTOCOL", ""), "GIT_PROJECT_ROOT": str(self.root)}
        asked |= {"GIT_HTTP_EXPORT_ALL": "1", "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory"}
        asked |= {"GIT_CONFIG_VALUE_0": "*", "PATH": os.environ["PATH"]}
        ended = subprocess.run(["git", "http-backend"], input=body, env=asked, capture_output=True, check=False)
        head, _, content = ended.stdout.partition(b"\r\n\r\n")
        headers = [tuple(line.decode().split(": ", 1)) for line in head.split(b"\r\n")]
        status = next((value for name, value in headers if name == "Status"), "200 OK")
        start(status, [pair for pair in headers if pair[0] != "Status"])
        yield content


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is the base class's.
        pass


@contextmanager
def git_server(root: Path, native: bool = False) -> Iterator[GitServer]:
    """Serve repositories below a folder until the block ends."""
    server = GitServer(root, native)
    try:
        yield server
    finally:
        server.close()
