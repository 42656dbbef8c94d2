"""Files that a command is going to write, looked at before it computes for minutes what it could not write then."""

from __future__ import annotations

import os
from pathlib import Path

from taskoffer.cli.errors import CommandError


def check_writable(path: Path) -> None:
    """Say now that a file cannot be written. What is there stays as it is, and nothing new is left behind.

    Raises:
        CommandError: with code 1, saying why.
    """
    there = os.path.lexists(path)
    if path.is_dir():
        raise CommandError(f"{path} cannot be written: it is a folder, give a file in it", 1)
    if not path.parent.is_dir():
        raise CommandError(f"{path} cannot be written: there is no folder {path.parent}, make it first", 1)
    if there and not path.is_file():
        # To open a pipe would be to write into it.
        return
    try:
        with path.open("ab"):
            pass
        if not there:
            path.unlink()
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error.strerror or error}", 1) from None
