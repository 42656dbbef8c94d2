"""How each command ends: the exit codes that ``--help`` and the reference page show."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from enum import IntEnum

_WIDTH = 80


class Exit(IntEnum):
    """How a command ends. Ctrl-C, and a reader of the output that goes away, end all of them but ``run`` with 1."""

    DONE = 0
    """It did what it was asked for."""
    FAILED = 1
    """It could not, or what it looked at is not as it should be."""
    USAGE = 2
    """It was called wrongly: an option makes no sense, or a file that it was given cannot be read."""


_WRONG = "an option is wrong"

MEANINGS: Mapping[str, Mapping[Exit, str]] = {
    "run": {
        Exit.DONE: "SIGTERM or SIGINT stopped it, and what was on its way has been written",
        Exit.FAILED: "it lost the lease or a watch, a part of it failed, or the cluster cannot be reached",
        Exit.USAGE: _WRONG,
    },
    "preset": {
        Exit.DONE: "the preset, or the list of names, is printed",
        Exit.FAILED: "it could not be printed to its end",
        Exit.USAGE: "there is no such preset, the image is none, or an option is wrong",
    },
    "lint": {
        Exit.DONE: "the policy is valid and no finding is an Error; there may be Warnings",
        Exit.FAILED: "the policy is not valid, or a finding is an Error",
        Exit.USAGE: "the file cannot be read or holds no CapacityPolicy, or an option is wrong",
    },
    "simulate": {
        Exit.DONE: "the figures are printed and written",
        Exit.FAILED: "a policy is not valid, the extra simulate is missing, or a file cannot be written",
        Exit.USAGE: "a file cannot be read, or an option is wrong",
    },
    "trace": {
        Exit.DONE: "the trace is written",
        Exit.FAILED: "it cannot be written",
        Exit.USAGE: _WRONG,
    },
    "explain": {
        Exit.DONE: "there is an answer, whatever it says of the offer",
        Exit.FAILED: "there is none: nobody could be asked, or there is no such offer",
        Exit.USAGE: _WRONG,
    },
    "queue": {
        Exit.DONE: "there is an answer, also when nobody waits",
        Exit.FAILED: "there is none: nobody could be asked, or there is no such policy",
        Exit.USAGE: _WRONG,
    },
}
"""What each exit code of each command means."""


def epilog(command: str) -> str:
    """Return the exit codes of a command as they stand below its options."""
    lines = [
        textwrap.fill(f"{code:d}  {meaning}", _WIDTH, initial_indent="  ", subsequent_indent="     ")
        for code, meaning in MEANINGS[command].items()
    ]
    return "\n".join(["exit codes:", *lines])


def description(text: str) -> str:
    """Return a description in lines that fit a terminal, paragraph by paragraph."""
    return "\n\n".join(textwrap.fill(" ".join(part.split()), _WIDTH) for part in text.split("\n\n"))
