"""Asks a git server over HTTP: dulwich speaks the protocol, our client makes the connections.

So an address of a repository is held against the same rules as any other foreign address, also after a redirect, and
nothing of the machine counts: no git configuration, no credentials, no hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx2
from dulwich.client import AbstractHttpGitClient
from dulwich.errors import GitProtocolError, HangupException
from dulwich.object_store import ObjectStoreGraphWalker
from dulwich.objects import ObjectID

from taskoffer_trainer.addresses import shown
from taskoffer_trainer.interrupt import Interrupt

__all__ = ["GitHttp"]

_ADVERTISEMENT = "application/x-git-upload-pack-advertisement"
_BRANCHES_AND_TAGS = (b"refs/heads/", b"refs/tags/")
_PEELED = b"^{}"
"""End of the name under which a server lists what a tag with a message stands for (gitprotocol-pack)."""
_MAX_ASKED = 64 << 20
"""Bytes of an answer that is no pack: the list of branches and tags. A hundred thousand of them are a tenth of it."""


class _Stream:
    """The body of an answer, in pieces of the length that is asked for."""

    def __init__(self, response: httpx2.Response, interrupt: Interrupt, limit: int | None) -> None:
        self._blocks: Iterator[bytes] = response.iter_raw()
        self._interrupt, self._limit = interrupt, limit
        self._held, self._came = bytearray(), 0

    def _hold(self, size: int) -> None:
        while len(self._held) < size and (block := next(self._blocks, None)) is not None:
            self._interrupt.check()
            self._came += len(block)
            if self._limit is not None and self._came > self._limit:
                raise GitProtocolError(f"the list of branches and tags has more than {self._limit} bytes")
            self._held += block

    def peek(self, size: int) -> bytes:
        """Return what read would, and keep it."""
        self._hold(size)
        return bytes(self._held[:size])

    def read(self, size: int) -> bytes:
        """Return so many bytes, or none at the end.

        Raises:
            HangupException: when the end comes in between.
        """
        self._hold(size)
        if 0 < len(self._held) < size:
            raise HangupException
        found = bytes(self._held[:size])
        del self._held[:size]
        return found


@dataclass(frozen=True)
class _Answer:
    """What dulwich looks at of an answer."""

    response: httpx2.Response

    @property
    def content_type(self) -> str:
        return str(self.response.headers.get("Content-Type", ""))

    @property
    def redirect_location(self) -> str:
        return str(self.response.url) if self.response.history else ""

    def close(self) -> None:
        self.response.close()


class GitHttp(AbstractHttpGitClient):
    """One repository on a server that speaks git's smart HTTP (gitprotocol-http), version 2 where it can."""

    def __init__(self, url: str, client: httpx2.Client, interrupt: Interrupt) -> None:
        super().__init__(url, quiet=True)
        self._client, self._interrupt = client, interrupt

    def tips(self) -> dict[ObjectID, ObjectID]:
        """Return the commits that branches and tags stand for, each with what has to be asked for to have it.

        That is the commit itself, but for a tag with a message: of such a one a server may give nothing but the tag.
        """
        refs = {bytes(name): oid for name, oid in self.get_refs(b"", ref_prefix=_BRANCHES_AND_TAGS).refs.items() if oid}
        plain = {oid: oid for name, oid in refs.items() if not name.endswith(_PEELED)}
        below = {oid: refs[name.removesuffix(_PEELED)] for name, oid in refs.items() if name.endswith(_PEELED)}
        return below | plain

    def take(
        self,
        wants: list[ObjectID],
        write: Callable[[bytes], int],
        *,
        depth: int | None = None,
        filter_spec: bytes | None = None,
    ) -> None:
        """Have a pack with these objects, and with all that they stand on unless depth or filter leaves it out.

        The server is told of no object that is here already, so the pack is complete in itself.

        Raises:
            GitProtocolError: when the server refuses, ``HangupException`` when it does not come to the end.
            httpx2.HTTPError: when it answers with a fault or not at all.
        """
        self.fetch_pack(
            b"",
            lambda _refs, depth=None: wants,
            ObjectStoreGraphWalker([], get_parents=lambda _oid: []),
            write,
            depth=depth,
            ref_prefix=_BRANCHES_AND_TAGS,
            filter_spec=filter_spec,
        )

    def _get_url(self, path: str | bytes) -> str:
        return self._base_url

    def _http_request(
        self,
        url: str,
        headers: dict[str, str] | None = None,
        data: bytes | Iterator[bytes] | None = None,
        raise_for_status: bool = True,
    ) -> tuple[Any, Callable[[int], bytes]]:
        method = "GET" if data is None else "POST"
        request = self._client.build_request(method, url, headers=headers or {}, content=data)
        response = self._client.send(request, stream=True)
        try:
            response.raise_for_status()
            answer = _Answer(response)
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise GitProtocolError("the server sends it compressed, unasked")
            if data is None and answer.content_type != _ADVERTISEMENT:
                # Else dulwich would take it for a folder of files, where nothing bounds what comes.
                kind = answer.content_type or "something without a type"
                raise GitProtocolError(f"{shown(url)} is no git server, it answers {kind}")
            is_pack = isinstance(data, bytes) and b"command=ls-refs" not in data
            stream = _Stream(response, self._interrupt, None if is_pack else _MAX_ASKED)
            if data is not None and stream.peek(8)[4:] == b"ERR ":
                # Version 2 says so instead of a pack, where dulwich looks for nothing but the pack.
                raise GitProtocolError(stream.peek(500)[8:].split(b"\n")[0].decode("utf-8", "replace"))
        except BaseException:
            response.close()
            raise
        return answer, stream.read
