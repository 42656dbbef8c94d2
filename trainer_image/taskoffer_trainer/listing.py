"""What a source holds, whatever kind of source it is: files with their names, and how each of them is had."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from taskoffer.api.contract import Credentials, ExitCode, FetchItem, FileFormat, GitFiles, ItemKind, NetworkSettings
from taskoffer_trainer.addresses import make_client
from taskoffer_trainer.cache import CachedFile, key_of
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.fetch import Fetched, Fetching, Speaker, missing
from taskoffer_trainer.interrupt import Interrupt

__all__ = ["Bring", "Context", "Get", "Listing", "Wanted", "check_path", "git_key", "secret"]

Get = Callable[[Path, CachedFile | None, int | None, Speaker], Fetched]
"""Puts a file at a path. It is given what the cache knows of it, and how many bytes it may have."""


@dataclass(frozen=True)
class Context:
    """What every source needs to list and fetch an item."""

    item: FetchItem
    credentials: Credentials
    network: NetworkSettings
    interrupt: Interrupt
    stack: ExitStack
    """Closes connections when the step is over."""

    def fetching(self, guarded: bool) -> Fetching:
        """Return what fetches files, with a client that is closed with the step."""
        client = self.stack.enter_context(make_client(self.network, guarded))
        return Fetching(client, self.network, self.interrupt)


@dataclass(frozen=True)
class Wanted:
    """A file of an item: its path in the item, and what is known before it is fetched."""

    path: str
    get: Get
    size: int | None = None
    sha256: str | None = None


Bring = Callable[[Path, int | None, Speaker], tuple[tuple[Wanted, ...], int]]
"""Brings a whole source into a folder. It is given how many bytes it may have; it returns its files and what came."""


@dataclass(frozen=True)
class Listing:
    """What a source holds now.

    ``key`` names the source in the cache; ``fixed`` says that the key stands for one content for ever, so that what
    the cache knows of the files still holds without asking. ``bring`` is there for a source that comes in one piece:
    its files are known only then.
    """

    key: str
    files: tuple[Wanted, ...]
    fixed: bool
    revision: str | None = None
    file_format: FileFormat | None = None
    bring: Bring | None = None


def git_key(git: GitFiles) -> str:
    """Return the key of a commit, which stands for one content for ever."""
    return key_of("git", git.url, git.commit)


def check_path(path: str, kind: ItemKind) -> str:
    """Return a path that stays inside of its folder.

    Raises:
        TrainerError: when it does not.
    """
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\0" in path or "\\" in path:
        raise missing(kind, "NameRefused", f"the source holds a file named {path!r}, which would leave its folder")
    return path


def secret(field: str, path: str | None) -> str | None:
    """Read a secret from its file; None where there is no such file in the configuration.

    Raises:
        TrainerError: ``BAD_CONFIG`` with the field and the path, never with the content.
    """
    if path is None:
        return None
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise TrainerError(
            ExitCode.BAD_CONFIG, "SecretUnreadable", f"credentials.{field}: {path} cannot be read: {why}"
        ) from error
    if not text:
        raise TrainerError(ExitCode.BAD_CONFIG, "SecretUnreadable", f"credentials.{field}: {path} is empty")
    return text
