"""Fetches the files of a git repository at one commit.

The commit comes without its history, and only when a branch or a tag of that very repository leads to it. Some hosts
keep a repository and its forks together and hand out a fork's commit under the address of the original, so that a
list of allowed addresses would allow whatever anybody has forked. Where the commit is no tip, the commits alone
(``filter tree:0``) are asked for first; a server that can neither do that nor give a single commit sends all.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import httpx2
from dulwich.errors import GitProtocolError, HangupException
from dulwich.objects import S_ISGITLINK, Blob, Commit, ObjectID, ShaFile, Tree
from dulwich.pack import Pack

from taskoffer.api.contract import ExitCode, GitFiles
from taskoffer_trainer.addresses import TOO_MANY_REDIRECTS, check_address, make_client, shown
from taskoffer_trainer.cache import CachedFile
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.fetch import Fetched, Speaker, disk_error, missing
from taskoffer_trainer.git_http import GitHttp
from taskoffer_trainer.git_pack import BROKEN, PackError, is_whole, open_pack
from taskoffer_trainer.listing import Context, Listing, Wanted, check_path, git_key

__all__ = ["list_git"]

_T = TypeVar("_T")
_PACK = "commit.pack"
_MAX_ENTRIES = 50_000
"""Files and folders of a commit. A tree may name the same folder many times, so a few bytes can stand for billions."""
_MAX_LINKS = 8
"""Links that lead to links, as many as it takes to notice a circle."""


def list_git(context: Context) -> Listing:
    """Return the one thing that is known of a commit before it comes: its key. Its files come with all of it.

    Raises:
        TrainerError: ``BAD_CONFIG`` when the address must not be followed.
    """
    item, git = context.item, context.item.source.git
    if git is None:
        raise ValueError(f"item {item.name} is not in a git repository")
    if urlsplit(git.url).query or urlsplit(git.url).fragment:
        raise TrainerError(
            ExitCode.BAD_CONFIG, "AddressRefused", f"{shown(git.url)}: the address of a repository has no query"
        )
    check_address(git.url, context.network)

    def bring(folder: Path, limit: int | None, speaker: Speaker) -> tuple[tuple[Wanted, ...], int]:
        return _Bringing(context, git, folder, limit, speaker).run()

    return Listing(git_key(git), (), True, git.commit, bring=bring)


@dataclass
class _Bringing:
    """One commit on its way."""

    context: Context
    git: GitFiles
    folder: Path
    limit: int | None
    speaker: Speaker
    came: int = 0

    def run(self) -> tuple[tuple[Wanted, ...], int]:
        """Fetch the commit unless an earlier process has done so, and list its files."""
        place = self.folder / _PACK
        if not place.exists():
            self._download().rename(place)
        pack = self._open(place)
        self.context.stack.callback(pack.close)
        tree = pack[self._commit(pack).tree]
        files = tuple(self._wanted(pack, path, *about) for path, about in _Tree(self, pack).files(tree))
        return files, self.came

    @property
    def label(self) -> str:
        """The repository, as it may be logged."""
        return f"{self.context.item.name} ({shown(self.git.url)})"

    def fault(self, reason: str, message: str) -> TrainerError:
        """Build the error for a commit that cannot be had."""
        return missing(self.context.item.kind, reason, f"{self.label}: {message}")

    def _download(self) -> Path:
        context, commit = self.context, ObjectID(self.git.commit.encode())
        client = context.stack.enter_context(make_client(context.network, guarded=True))
        try:
            tips = self._tried(self._server(client).tips)
        except GitProtocolError as error:
            raise self.fault("NotFound", f"its branches and tags cannot be read: {_said(error)}") from error
        if commit not in tips:
            history = self._pack(client, sorted(set(tips.values())), filter_spec=b"tree:0")
            if history is not None and self._holds(history, commit, with_tree=True):
                return history
            if history is None or not self._holds(history, commit):
                raise self.fault("NotFound", f"no branch and no tag leads to commit {self.git.commit}")
        path = self._pack(client, [tips.get(commit, commit)], depth=1)
        if path is None or not self._holds(path, commit, with_tree=True):
            print(f"prepare: {self.label} gives no single commit; all branches and tags are fetched", flush=True)
            path = self._pack(client, sorted(set(tips.values())))
        if path is None or not self._holds(path, commit, with_tree=True):
            raise self.fault("NotFound", f"the server does not give commit {self.git.commit} with its files")
        return path

    def _server(self, client: httpx2.Client) -> GitHttp:
        return GitHttp(self.git.url, client, self.context.interrupt)

    def _pack(
        self, client: httpx2.Client, wants: list[ObjectID], depth: int | None = None, filter_spec: bytes | None = None
    ) -> Path | None:
        """Have a pack with what is wanted; None when the server does not give it."""
        path = self.folder / f"{_PACK}.part"
        if not wants:
            return None
        try:
            size = self._tried(lambda: self._receive(client, path, wants, depth, filter_spec))
        except GitProtocolError as error:
            print(f"prepare: {self.label}: the server refused: {_said(error)}", flush=True)
            return None
        return path if size else None

    def _receive(
        self, client: httpx2.Client, path: Path, wants: list[ObjectID], depth: int | None, filter_spec: bytes | None
    ) -> int:
        """Write a pack to a path and return its bytes, all of which are as the server meant them."""
        size = 0

        def write(block: bytes) -> int:
            nonlocal size
            size += len(block)
            if self.limit is not None and size > self.limit:
                what = "the commit is" if depth else "no tip of a branch or a tag, and the history to it is"
                raise self.fault("TooLarge", f"{what} larger than sizeLimit allows, {self.limit} bytes")
            self.came += len(block)
            self.speaker.add(len(block))
            return file.write(block)

        try:
            with path.open("wb") as file:
                self._server(client).take(wants, write, depth=depth, filter_spec=filter_spec)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise disk_error(path, error) from error
        if size and not is_whole(path):
            # Not the offer's fault, and perhaps gone the next time.
            raise HangupException([b"bytes were lost on the way"])
        return size

    def _tried(self, ask: Callable[[], _T]) -> _T:
        """Ask, again where that may help; what the server refuses in git's own words is raised as it came."""
        network, interrupt, why = self.context.network, self.context.interrupt, "it was never asked"
        for number in range(1, network.tries + 1):
            interrupt.check()
            try:
                return ask()
            except httpx2.HTTPStatusError as error:
                why = self._passing(error)
            except httpx2.TooManyRedirects as error:
                raise self.fault("RedirectLoop", TOO_MANY_REDIRECTS) from error
            except (httpx2.TransportError, httpx2.StreamError, HangupException) as error:
                why = str(error) or type(error).__name__
            if number < network.tries:
                print(f"{self.label}: {why}; trying again", flush=True)
                interrupt.wait(min(network.retry_wait_seconds * 2**number, 30.0))
        raise TrainerError(ExitCode.RESTART, "NetworkFailed", f"{self.label}: {why} ({network.tries} tries)")

    def _passing(self, error: httpx2.HTTPStatusError) -> str:
        status = error.response.status_code
        if status in (401, 403):
            raise TrainerError(
                ExitCode.NO_ACCESS,
                "AccessDenied",
                f"{self.label}: the server answered {status}: there is no such repository, or it is not public; no "
                "credentials are sent for a trainer",
            ) from error
        if status < 500 and status not in (408, 425, 429):
            raise self.fault("NotFound", f"the server answered {status}") from error
        return f"the server answered {status}"

    def _open(self, path: Path) -> Pack:
        try:
            return open_pack(path, self.context.interrupt)
        except PackError as error:
            path.unlink()
            raise self.fault(error.reason, str(error)) from error

    def _holds(self, path: Path, commit: ObjectID, with_tree: bool = False) -> bool:
        pack = self._open(path)
        try:
            return commit in pack and (not with_tree or self._commit(pack).tree in pack)
        finally:
            pack.close()

    def _commit(self, pack: Pack) -> Commit:
        found = pack[ObjectID(self.git.commit.encode())]
        if not isinstance(found, Commit):
            raise self.fault("NotFound", f"{self.git.commit} is a {found.type_name.decode()} and no commit")
        return found

    def _wanted(self, pack: Pack, path: str, oid: ObjectID, size: int) -> Wanted:
        def get(partial: Path, _known: CachedFile | None, _limit: int | None, _speaker: Speaker) -> Fetched:
            content = pack[oid].as_raw_string()
            try:
                partial.write_bytes(content)
            except OSError as error:
                raise disk_error(partial, error) from error
            return Fetched(hashlib.sha256(content).hexdigest(), len(content), None, 0)

        return Wanted(path, get, size)


def _said(error: GitProtocolError) -> str:
    """Return what a server said, without what could change a terminal."""
    return repr(str(error)[:300])


_Content = tuple[ObjectID, int]
"""Name and size of a file's content."""


class _Tree:
    """The folders of a commit."""

    def __init__(self, by: _Bringing, pack: Pack) -> None:
        self.by, self.pack = by, pack
        self.plain: dict[str, _Content] = {}
        self.links: dict[str, str] = {}
        self.size = self.entries = 0

    def files(self, root: ShaFile) -> list[tuple[str, _Content]]:
        """Return path and content of every file; a link to a file of the commit is that file once more.

        Raises:
            TrainerError: for what has no place in a folder of files, and for too much of it.
        """
        waiting: list[tuple[str, ShaFile]] = [("", root)]
        try:
            while waiting:
                self.by.context.interrupt.check()
                waiting += self._enter(*waiting.pop())
        except BROKEN as error:
            raise self.by.fault("PackBroken", f"an object of the commit cannot be read: {error}") from error
        for path in self.links:
            self._add(path, self._target(path))
        return sorted(self.plain.items())

    def _enter(self, folder: str, tree: ShaFile) -> Iterator[tuple[str, ShaFile]]:
        if not isinstance(tree, Tree):
            raise self.by.fault("PackBroken", f"{folder or 'its root'} is a {tree.type_name.decode()} and no tree")
        for name, mode, oid in tree.iteritems():
            self.entries += 1
            if self.entries > _MAX_ENTRIES:
                raise self.by.fault("TooLarge", f"the commit has more than {_MAX_ENTRIES} files and folders")
            path = folder + self._name(folder, name)
            if S_ISGITLINK(mode):
                raise self.by.fault(
                    "SubmoduleRefused", f"{path} is a submodule, and those are not fetched: commit its files instead"
                )
            if stat.S_ISDIR(mode):
                yield f"{path}/", self.pack[oid]
                continue
            blob = self.pack[oid]
            if not isinstance(blob, Blob):
                raise self.by.fault("PackBroken", f"{path} is a {blob.type_name.decode()} and no file")
            if stat.S_ISLNK(mode):
                self.links[path] = blob.as_raw_string().decode("utf-8", "replace")
            else:
                self._add(path, (oid, blob.raw_length()))

    def _name(self, folder: str, name: bytes) -> str:
        with suppress(UnicodeDecodeError):
            text = name.decode("utf-8")
            if text and "/" not in text and text.lower() not in (".", "..", ".git"):
                return check_path(text, self.by.context.item.kind)
        raise self.by.fault("NameRefused", f"{folder or 'its root'} holds a file named {name!r}")

    def _add(self, path: str, content: _Content) -> None:
        self.size += content[1]
        if self.by.limit is not None and self.size > self.by.limit:
            raise self.by.fault("TooLarge", f"its files are larger than sizeLimit allows, {self.by.limit} bytes")
        self.plain[path] = content

    def _target(self, link: str) -> _Content:
        path = link
        for _step in range(_MAX_LINKS):
            if path not in self.links:
                break
            target = self.links[path]
            path = os.path.normpath(os.path.join(os.path.dirname(path), target))
            if target.startswith("/") or path == ".." or path.startswith("../"):
                raise self.by.fault("LinkRefused", f"{link} is a link that leads out of the commit, to {target!r}")
        if path not in self.plain or path in self.links:
            raise self.by.fault(
                "LinkRefused", f"{link} is a link to {self.links[link]!r}, which is no file of the commit"
            )
        return self.plain[path]
