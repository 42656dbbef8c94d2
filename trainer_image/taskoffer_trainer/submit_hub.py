"""Hands a result over to a model hub in one commit, and reads back what the hub then lists."""

from __future__ import annotations

import hashlib
import io
import warnings
from contextlib import ExitStack
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from taskoffer.api.contract import HubTarget, Published, SubmitConfig
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.fetch import Speaker, git_oid
from taskoffer_trainer.fetch_hub import ask_hub, connect
from taskoffer_trainer.interrupt import Interrupt
from taskoffer_trainer.listing import secret
from taskoffer_trainer.submit_verify import Part, failed, with_plainer_cards

__all__ = ["check_meant", "to_hub"]

_CARD_REFUSED = "CardRefused"


class _Told(io.BufferedReader):
    """A file on disk that says how much of it has been read, and that ends with the step's deadline."""

    def __init__(self, path: Path, speaker: Speaker, interrupt: Interrupt) -> None:
        super().__init__(io.FileIO(path))
        self._speaker, self._interrupt = speaker, interrupt

    def read(self, size: int | None = -1, /) -> bytes:
        """Read, and count it."""
        block = super().read(size)
        self._speaker.add(len(block))
        self._interrupt.check()
        return block


def to_hub(config: SubmitConfig, target: HubTarget, parts: list[Part], interrupt: Interrupt) -> Published:
    """Upload what the repository lacks, commit it at once and check what is listed at that commit.

    Raises:
        TrainerError: ``NO_ACCESS``, ``RESTART`` when the hub does not answer, or ``VERIFY_FAILED`` when it does not
            hold the result under the expected name.
    """
    with ExitStack() as stack:
        api = connect(config.network, secret("hubTokenFile", config.credentials.hub_token_file), stack)
        return _upload(api, config, target, parts, interrupt)


def _upload(api: Any, config: SubmitConfig, target: HubTarget, parts: list[Part], interrupt: Interrupt) -> Published:
    run = _Upload(api, config, target, parts, interrupt)
    run.create()
    head = run.head()
    if run.lacking(head) and run.commit(head):
        head = run.head()
        lacking = run.lacking(head)
        if lacking:
            raise failed(
                "UploadMismatch",
                f"{target.repository}@{head} does not list {len(lacking)} of {len(parts)} files as they were handed "
                f"over, for example {sorted(lacking)[0]}",
            )
    else:
        print(f"submit: {target.repository}@{head} holds all of it already", flush=True)
    return Published(
        to=f"{api.endpoint}/{target.repository}",
        revision=head,
        files=len(run.parts),
        bytes=sum(part.size for part in run.parts.values()),
    )


def check_meant(target: HubTarget, info: Any) -> None:
    """See that a repository that exists is the one that was meant.

    Raises:
        TrainerError: ``VERIFY_FAILED`` where it has another name, or is public and the result is not.
    """
    if info.id != target.repository:
        raise failed(
            "NameMismatch",
            f"the hub knows {target.repository} as {info.id}, and the name must be the exact one",
        )
    if target.private and not info.private:
        raise failed(
            "RepositoryPublic",
            f"{target.repository} exists and is public, and the result is private: make it private, name another "
            "repository, or have the policy say steps.privateRepositories: false",
        )


def _place(target: HubTarget, part: Part) -> str:
    return str(PurePosixPath(target.subfolder or "") / part.name)


class _Upload:
    """One result on its way to one repository."""

    def __init__(
        self, api: Any, config: SubmitConfig, target: HubTarget, parts: list[Part], interrupt: Interrupt
    ) -> None:
        self.api, self.config, self.target, self.interrupt = api, config, target, interrupt
        self.parts: dict[str, Part] = {}
        self._take(parts)

    def _take(self, parts: list[Part]) -> None:
        self.parts = {_place(self.target, part): part for part in parts}

    def _ask(self, ask: Any) -> Any:
        return ask_hub(self.target.repository, None, self.config.network, self.interrupt, ask)

    def create(self) -> None:
        """Create the repository when it is missing, and see that it is the one that was meant."""
        target = self.target
        self._ask(lambda: self.api.create_repo(target.repository, private=target.private, exist_ok=True))
        check_meant(target, self._ask(lambda: self.api.repo_info(target.repository)))

    def head(self) -> str:
        """Return the newest commit."""
        return str(self._ask(lambda: self.api.repo_info(self.target.repository)).sha)

    def lacking(self, commit: str) -> set[str]:
        """Return the files that the hub does not list at a commit with the size and hash that they have here."""
        entries = self._ask(
            lambda: list(self.api.list_repo_tree(self.target.repository, recursive=True, revision=commit))
        )
        listed = {entry.path: entry for entry in entries if hasattr(entry, "blob_id")}
        return {path for path, part in self.parts.items() if not _same(listed.get(path), part)}

    def commit(self, head: str) -> bool:
        """Commit all; a card that the hub does not take goes with less in its front matter, for the weights count.

        Args:
            head: the newest commit.

        Returns:
            False where the newest commit holds all of it already, with such a card.

        Raises:
            TrainerError: as :func:`to_hub`.
        """
        cards = with_plainer_cards(self.config.base_model, list(self.parts.values()))
        while True:
            try:
                self._commit_all()
                return True
            except TrainerError as error:
                plainer = next(cards, None) if error.reason == _CARD_REFUSED else None
                if plainer is None:
                    raise
                print(f"submit: {error.message}; it goes with less in its front matter", flush=True)
                self._take(plainer)
                if not self.lacking(head):
                    return False

    def _commit_all(self) -> None:
        """Upload the large files one by one, then commit all."""
        from huggingface_hub import CommitOperationAdd

        speaker = Speaker(f"submit: uploading to {self.target.repository}", sum(p.size for p in self.parts.values()))
        with ExitStack() as stack:
            operations = []
            for path, part in self.parts.items():
                content: Any = part.content
                if part.path is not None:
                    content = stack.enter_context(_Told(part.path, speaker, self.interrupt))
                operations.append(CommitOperationAdd(path, content))
            # Reading a file to hash it is no upload.
            speaker.done = 0
            for operation in operations:
                self._ask(partial(self._preupload, operation))
            message = f"Adapter of task {self.config.task_id}"
            self._ask(partial(self._commit, operations, message))

    def _preupload(self, operation: Any) -> None:
        _rewind(operation)
        with warnings.catch_warnings():
            # The hub's library hands the file to its HTTP library in a way that this one wants to give up.
            warnings.filterwarnings("ignore", message="Use 'content=", category=DeprecationWarning)
            self.api.preupload_lfs_files(self.target.repository, [operation], num_threads=1, free_memory=False)

    def _commit(self, operations: list[Any], message: str) -> None:
        for operation in operations:
            _rewind(operation)
        try:
            self.api.create_commit(self.target.repository, operations, commit_message=message)
        except ValueError as error:
            if "metadata in README.md" not in str(error):
                raise
            raise failed(_CARD_REFUSED, f"{self.target.repository}: {' '.join(str(error).split())[:300]}") from error


def _rewind(operation: Any) -> None:
    """Begin at the first byte again: a try that has failed leaves the file where it was then."""
    if isinstance(operation.path_or_fileobj, _Told):
        operation.path_or_fileobj.seek(0)


def _same(entry: Any, part: Part) -> bool:
    if entry is None or entry.size != part.size:
        return False
    if entry.lfs is not None:
        return bool(entry.lfs.sha256 == part.sha256 and entry.lfs.size == part.size)
    if part.path is not None:
        return bool(entry.blob_id == git_oid(part.path))
    content = part.read()
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return bool(entry.blob_id == oid)
