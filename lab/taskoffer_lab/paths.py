"""Where the lab keeps things: a cache that outlives clusters, and a state folder for running ones."""

import os
import stat
from pathlib import Path

from taskoffer_lab.errors import LabError

_LONGEST_STATE_ROOT = 50  # A unix socket path may have 107 bytes; cluster, node and socket name follow.


def cache_root() -> Path:
    """Return the folder for tools, images and node storage, created if need be.

    `$TASKOFFER_CACHE`, else `$XDG_CACHE_HOME/taskoffer`, else `~/.cache/taskoffer`.
    """
    override = os.environ.get("TASKOFFER_CACHE")
    if override:
        root = Path(override)
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "taskoffer"
    root.mkdir(parents=True, exist_ok=True)
    return root.absolute()


def state_root() -> Path:
    """Return the folder of running clusters, private to this user, created if need be.

    `$TASKOFFER_STATE`, else `/var/tmp/taskoffer-lab-UID`: on disk because pods' volumes live there, and
    short because unix sockets do too.

    Raises:
        LabError: The folder belongs to somebody else or its path is too long for sockets.
    """
    uid = os.getuid()
    root = Path(os.environ.get("TASKOFFER_STATE") or f"/var/tmp/taskoffer-lab-{uid}").absolute()  # noqa: S108
    if len(os.fsencode(root)) > _LONGEST_STATE_ROOT:
        raise LabError(
            f"state folder {root} has {len(os.fsencode(root))} bytes; unix sockets below it allow"
            f" {_LONGEST_STATE_ROOT}",
            "set TASKOFFER_STATE to a shorter path",
        )
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = root.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != uid:
        raise LabError(f"{root} is not a folder of user {uid}", "remove it or set TASKOFFER_STATE")
    if stat.S_IMODE(status.st_mode) & 0o077:
        root.chmod(0o700)
    return root


def package_root() -> Path:
    """Return the folder that holds the `taskoffer_lab` package (for child processes' PYTHONPATH)."""
    return Path(__file__).resolve().parent.parent


def folder_size(folder: Path) -> int:
    """Return the bytes on disk below `folder`; files that vanish meanwhile count nothing."""
    total = 0
    pending = [folder]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(Path(entry.path))
                    else:
                        total += entry.stat(follow_symlinks=False).st_blocks * 512
        except FileNotFoundError:
            continue
    return total
