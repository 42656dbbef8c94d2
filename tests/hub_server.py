"""A model hub, a web server and an object store in one thread: what their clients really ask, and their faults.

The hub speaks what huggingface_hub 2.4 asks: repository info, the tree in pages, ``resolve`` with a redirect to
another host for LFS files, whose a token is and where it may write, repository creation, preupload, LFS batch with PUT
and verify, and commit. The request log has every method, path and whether a token came with it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from file_server import PAGE, Faults, StoreHandler, WebFile, git_oid, sha256


@dataclass
class Repository:
    """A repository: commits from oldest to newest, each a whole tree."""

    kind: str = "model"
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        """Add a commit that holds exactly these files, and return its hash."""
        oid = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode(), usedforsecurity=False).hexdigest()
        self.commits[oid] = dict(files)
        self.refs[ref] = oid
        return oid

    def find(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)

    @property
    def head(self) -> dict[str, bytes]:
        return self.commits[self.refs["main"]]

    def is_lfs(self, path: str) -> bool:
        return path in self.lfs or path.endswith((".safetensors", ".parquet", ".bin", ".png"))


@dataclass
class Asked:
    """A request as it came."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    sent: int = 0


class HubServer:
    """The server and all it holds. Tests change it while it runs."""

    def __init__(self, token: str | None = None, address: str = "127.0.0.1") -> None:
        self.token, self.address = token, address
        self.repositories: dict[str, Repository] = {}
        self.renamed: dict[str, str] = {}
        self.on_upload: Callable[[], None] | None = None
        self.files: dict[str, WebFile] = {}
        self.lfs: dict[str, bytes] = {}
        self.lfs_piece = 0
        self.buckets: dict[str, dict[str, bytes]] = {}
        self.pieces: dict[str, dict[int, bytes]] = {}
        self.bucket_etags: dict[str, str] = {}
        self.region = ""
        self.region_answer = (301, "PermanentRedirect")
        self.refused_in_cards: tuple[str, ...] = ()
        self.who: dict[str, Any] | None = None
        self.read_only: set[str] = set()
        self.faults = Faults()
        self.asked: list[Asked] = []
        self.lock = threading.Lock()
        server = self

        class Bound(_Handler):
            hub = server

        self._http = ThreadingHTTPServer((address, 0), Bound)
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://{self.address}:{self.port}"

    @property
    def other_host(self) -> str:
        """The same server by another name, where it has one: for HTTP a stranger."""
        return f"http://localhost:{self.port}" if self.address == "127.0.0.1" else self.url

    def close(self) -> None:
        if self.faults.hang is not None:
            self.faults.hang.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(timeout=10)

    def add(self, name: str, files: dict[str, bytes], **about: Any) -> Repository:
        repository = self.repositories.setdefault(name, Repository(**about))
        repository.commit(files)
        return repository

    def sent(self, words: str = "") -> int:
        """Bytes of bodies that were sent for paths with these words in them."""
        return sum(one.sent for one in self.asked if words in one.path)

    def requests(self, method: str, words: str) -> list[Asked]:
        return [one for one in self.asked if one.method == method and words in one.path]


@contextmanager
def hub_server(token: str | None = None, address: str = "127.0.0.1") -> Iterator[HubServer]:
    """Run a server for a block."""
    server = HubServer(token, address)
    try:
        yield server
    finally:
        server.close()


class _Handler(StoreHandler):
    hub: HubServer

    def log_message(self, *_arguments: Any) -> None:
        """The tests look at the request log instead."""

    def _route(self) -> None:
        parts = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.entry = Asked(self.command, parts.path, parse_qs(parts.query), headers)
        with self.hub.lock:
            self.hub.asked.append(self.entry)
        length = self.headers.get("Content-Length")
        if length is not None:
            self.body = self.rfile.read(int(length))
        elif self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._chunks()
        else:
            self.body = b""
        if self.hub.faults.statuses:
            status = self.hub.faults.statuses.pop(0)
            if status:
                return self.answer(status, b"<html>no</html>", {"Content-Type": "text/html"})
        path = unquote(parts.path)
        for pattern, method in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found is not None and method.startswith(self.command.lower()):
                try:
                    return getattr(self, "on_" + method)(*found.groups())
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True
                    return None
        return self.answer(404, b"{}", {"X-Error-Message": "no such page"})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _route  # noqa: N815

    def _chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    # --- The hub.

    def _may(self, repository: Repository | None, writing: bool = False) -> bool:
        """Answer for the hub when the caller may not see or write a repository."""
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        trusted = self.hub.token is not None and given == self.hub.token
        if given and not trusted:
            self.json({"error": "bad token"}, 401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif repository is None or ((repository.private or writing) and not trusted):
            code = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            self.json({"error": "Repository not found"}, 404 if trusted else 401, code)
        elif repository.gated and not trusted:
            self.json({"error": "gated"}, 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        else:
            return True
        return False

    def _at(self, kind: str, name: str, revision: str) -> tuple[Repository, str] | None:
        repository = self.hub.repositories.get(name)
        if repository is not None and repository.kind != kind.rstrip("s"):
            repository = None
        if not self._may(repository) or repository is None:
            return None
        oid = repository.find(revision)
        if oid is None:
            code = {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"}
            self.json({"error": "no such revision"}, 404, code)
            return None
        return repository, oid

    def on_get_whoami(self) -> None:
        if self.hub.who is None:
            return self.answer(404, b"{}", {"X-Error-Message": "no such page"})
        return self.json(self.hub.who) if self._may(Repository(), writing=True) else None

    def on_get_auth(self, kind: str, name: str) -> None:
        """Answer whether the caller may write, as a hub that knows this question (``who`` is set) does."""
        if self.hub.who is None:
            return self.answer(404, b"{}", {"X-Error-Message": "no such page"})
        if not self._may(self.hub.repositories.get(name), writing=True):
            return None
        if name in self.hub.read_only:
            return self.json({"error": "forbidden"}, 403, {"X-Error-Message": "You have read access only"})
        return self.json({})

    def on_get_info(self, kind: str, name: str, revision: str | None) -> None:
        found = self._at(kind, name, revision or "main")
        if found is not None:
            repository, oid = found
            siblings = [{"rfilename": path} for path in repository.commits[oid]]
            self.json(
                {
                    "_id": "0",
                    "id": self.hub.renamed.get(name, name),
                    "sha": oid,
                    "private": repository.private,
                    "tags": [],
                    "siblings": siblings,
                }
            )

    def on_get_tree(self, kind: str, name: str, revision: str, folder: str | None) -> None:
        found = self._at(kind, name, revision)
        if found is None:
            return
        repository, oid = found
        entries: list[dict[str, Any]] = []
        for path, content in sorted(repository.commits[oid].items()):
            if folder and not path.startswith(folder.strip("/") + "/"):
                continue
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
            if repository.is_lfs(path):
                entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        if folder and not entries:
            return self.json({}, 404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "no such folder"})
        begin = int(self.entry.query.get("cursor", ["0"])[0])
        headers = {}
        if begin + PAGE < len(entries):
            place = f"{self.hub.url}{urlsplit(self.path).path}?recursive=true&cursor={begin + PAGE}"
            headers["Link"] = f'<{place}>; rel="next"'
        return self.json(entries[begin : begin + PAGE], headers=headers)

    def on_get_resolve(self, kind: str | None, name: str, revision: str, path: str) -> None:
        found = self._at((kind or "models/").rstrip("/"), name, revision)
        if found is None:
            return
        repository, oid = found
        if path not in repository.commits[oid]:
            return self.json({}, 404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "no such file"})
        content = repository.commits[oid][path]
        if not repository.is_lfs(path):
            return self.content(WebFile(content, f'"{git_oid(content)}"'))
        self.hub.lfs[sha256(content)] = content
        place = f"{self.hub.other_host}/cdn/{sha256(content)}?X-Amz-Signature=abc"
        headers = {"Location": place, "X-Repo-Commit": oid, "X-Linked-Etag": f'"{sha256(content)}"'}
        return self.answer(302, headers=headers)

    def on_get_cdn(self, oid: str) -> None:
        # A client takes its token along to where it was sent, unless that is a stranger.
        if "Authorization" in self.headers and self.hub.other_host != self.hub.url:
            return self.answer(400, b"<Error><Code>InvalidArgument</Code><Message>two ways to sign</Message></Error>")
        return self.content(WebFile(self.hub.lfs[oid], f'"{oid}"'))

    def on_post_create(self) -> None:
        wanted = json.loads(self.body)
        name = "/".join(part for part in (wanted.get("organization"), wanted["name"]) if part)
        if not self._may(Repository(), writing=True):
            return
        if name in self.hub.repositories:
            return self.json({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        repository = self.hub.repositories[name] = Repository(private=private)
        repository.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return self.json({"url": f"{self.hub.url}/{name}", "name": name})

    def on_post_preupload(self, kind: str, name: str, revision: str) -> None:
        repository = self.hub.repositories.get(name)
        if not self._may(repository, writing=True) or repository is None:
            return
        files = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            content = repository.head.get(path)
            mode = "lfs" if repository.is_lfs(path) else "regular"
            oid = None if content is None else (sha256(content) if mode == "lfs" else git_oid(content))
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.json({"files": files, "commitOid": repository.refs["main"]})

    def on_post_batch(self, name: str) -> None:
        if self.hub.on_upload is not None:
            self.hub.on_upload()
        if not self._may(self.hub.repositories.get(name), writing=True):
            return
        objects = []
        for one in json.loads(self.body)["objects"]:
            answer = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.hub.lfs:
                upload = {"href": f"{self.hub.other_host}/lfs/{one['oid']}?X-Amz-Signature=abc"}
                if self.hub.lfs_piece and one["size"] > self.hub.lfs_piece:
                    upload = self._pieces_of(one["oid"], one["size"])
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/verify"}}
            objects.append(answer)
        self.json({"transfer": "basic", "objects": objects})

    def _pieces_of(self, oid: str, size: int) -> dict[str, Any]:
        """Ask for a large file in pieces, each with an address of its own, as the public hub does."""
        count = -(-size // self.hub.lfs_piece)
        places = {f"{n:05d}": f"{self.hub.other_host}/part/{oid}/{n}?X-Amz-Signature=a" for n in range(1, count + 1)}
        self.hub.pieces[oid] = {}
        return {"href": f"{self.hub.url}/join/{oid}", "header": {"chunk_size": str(self.hub.lfs_piece), **places}}

    def on_put_piece(self, oid: str, number: str) -> None:
        self.hub.pieces[oid][int(number)] = self.body
        self.answer(200, headers={"ETag": f'"{sha256(self.body)[:32]}"'})

    def on_post_join(self, oid: str) -> None:
        there = self.hub.pieces.pop(oid)
        tags = [(one["partNumber"], one["etag"].strip('"')) for one in json.loads(self.body)["parts"]]
        if tags != [(number, sha256(there[number])[:32]) for number in sorted(there)]:
            return self.json({"error": "other parts"}, 400)
        self.hub.lfs[oid] = b"".join(there[number] for number in sorted(there))
        return self.json({})

    def on_put_lfs(self, oid: str) -> None:
        if self.hub.faults.break_uploads > 0:
            self.hub.faults.break_uploads -= 1
            self.close_connection = True
            return
        if self.hub.faults.lose_upload > 0:
            self.hub.faults.lose_upload -= 1
            self.body = self.body[:-1]
        if sha256(self.body) == oid:
            self.hub.lfs[oid] = self.body
        self.answer(200)

    def on_post_verify(self) -> None:
        wanted = json.loads(self.body)
        there = len(self.hub.lfs.get(wanted["oid"], b"")) == wanted["size"]
        self.json({}, 200 if there else 422)

    def on_post_yaml(self) -> None:
        """Look at a card's front matter as the hub does, which takes no base model by a name that it does not have."""
        front = json.loads(self.body)["content"].partition("---\n")[2].partition("---\n")[0]
        wrong = [{"message": f"{word!r} is not valid."} for word in self.hub.refused_in_cards if word in front]
        self.json({"errors": wrong, "warnings": []}, 400 if wrong else 200)

    def on_post_commit(self, kind: str, name: str, revision: str) -> None:
        repository = self.hub.repositories.get(name)
        if not self._may(repository, writing=True) or repository is None:
            return
        if self.hub.faults.refuse_commits > 0:
            self.hub.faults.refuse_commits -= 1
            return self.json({"error": "busy"}, 503)
        files = dict(repository.head)
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        oid = repository.commit(files)
        return self.json({"commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"})


_NAME = r"([^/]+/[^/]+|[^/]+)"
_ROUTES = [
    (r"/api/whoami-v2", "get_whoami"),
    (rf"/api/(models|datasets)/{_NAME}/auth-check/write", "get_auth"),
    (rf"/api/(models|datasets)/{_NAME}/tree/([^/]+)(/.+)?", "get_tree"),
    (rf"/api/(models|datasets)/{_NAME}/revision/([^/]+)", "get_info"),
    (rf"/api/(models|datasets)/{_NAME}/preupload/([^/]+)", "post_preupload"),
    (rf"/api/(models|datasets)/{_NAME}/commit/([^/]+)", "post_commit"),
    (r"/api/repos/create", "post_create"),
    (r"/api/validate-yaml", "post_yaml"),
    (rf"/api/(models|datasets)/{_NAME}()", "get_info"),
    (rf"/(datasets/)?{_NAME}/resolve/([^/]+)/(.+)", "get_resolve"),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", "post_batch"),
    (r"/cdn/([0-9a-f]+)", "get_cdn"),
    (r"/lfs/([0-9a-f]+)", "put_lfs"),
    (r"/part/([0-9a-f]+)/(\d+)", "put_piece"),
    (r"/join/([0-9a-f]+)", "post_join"),
    (r"/verify", "post_verify"),
    (r"/files/(.+)", "get_file"),
    (r"/signed/(.+)", "get_signed"),
    (r"/redirect/(.*)", "get_redirect"),
    (r"/s3/([^/]+)/(.*)", "get_objects"),
    (r"/s3/([^/]+)/(.*)", "head_objects"),
    (r"/s3/([^/]+)/(.*)", "put_objects"),
    (r"/s3/([^/]+)/(.*)", "post_objects"),
    (r"/s3/([^/]+)/(.*)", "delete_objects"),
]
