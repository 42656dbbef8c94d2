"""What all commands have in common: a description, explained options, and their exit codes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from taskoffer.cli.exit_codes import description, epilog


def add_command(
    commands: Any, name: str, brief: str, text: str, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    """Add a command to a parser's, with a line for the list of commands and a text for its own help."""
    made: argparse.ArgumentParser = commands.add_parser(
        name,
        help=brief,
        description=description(text),
        epilog=epilog(name),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.set_defaults(command=run)
    return made


NODES, GPUS = 1, 8
"""Nodes, and GPUs of each, where a command that pictures a cluster is told nothing else."""


def whole(text: str) -> int:
    """Read the number of an option that counts something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too small: give 1 or more")
    return number
