"""What the commands of the steps around a training have in common: arguments, signals, and how they end."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from taskoffer.api.contract import ExitCode, PrepareConfig, SubmitConfig, Termination
from taskoffer_trainer.config import problems
from taskoffer_trainer.failures import INTERNAL_ERROR, STOPPED, TrainerError
from taskoffer_trainer.interrupt import Interrupt, InterruptedBySignal
from taskoffer_trainer.termination import shorten, write_termination

__all__ = ["load_step", "run_step"]

# The image switches the libraries offline for the training; these steps are the ones that are online. Xet is another
# protocol with a native client of its own, which can neither be stopped between blocks nor go on where it was.
_ONLINE = {
    "HF_HUB_OFFLINE": "0",
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
}


_Step = TypeVar("_Step", PrepareConfig, SubmitConfig)


def load_step(kind: type[_Step], path: Path) -> _Step:
    """Read and validate a step's configuration.

    Raises:
        TrainerError: ``BAD_CONFIG`` with every offending field by its name on the wire.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise TrainerError(
            ExitCode.BAD_CONFIG,
            "ConfigUnreadable",
            f"the configuration {path} cannot be read: {error.strerror or error}; name it with --config",
        ) from error
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise TrainerError(ExitCode.BAD_CONFIG, "ConfigInvalid", f"{path}: {problems(error, quote=False)}") from error


def run_step(
    step: str,
    about: str,
    more: str,
    kind: type[_Step],
    default: str,
    check: Callable[[_Step, Interrupt], str],
    work: Callable[[_Step, Interrupt], Termination],
    arguments: list[str] | None,
) -> int:
    """Run a step's command line and return the exit code.

    Args:
        step: name of the step's module.
        about: what it does.
        more: what else ``--help`` says.
        kind: type of its configuration.
        default: where that lies in the pod.
        check: looks at all that can be looked at beforehand and returns what to say then.
        work: does the step.
        arguments: command line, ``sys.argv`` when None.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m taskoffer_trainer.{step}",
        description=about,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", type=Path, default=Path(default), metavar="PATH", help=f"the configuration (default {default})"
    )
    parser.add_argument("--check", action="store_true", help="check what can be checked beforehand, and end")
    options = parser.parse_args(arguments)
    os.environ.update(_ONLINE)
    interrupt = Interrupt()
    try:
        try:
            interrupt.listen()
            config = load_step(kind, options.config)
            interrupt.deadline = config.deadline
            interrupt.check()
            if options.check:
                print(f"{options.config}: {check(config, interrupt)}")
                return ExitCode.DONE
            termination = work(config, interrupt)
        finally:
            interrupt.ignore()
    except TrainerError as error:
        termination = Termination(exit_code=error.code, reason=error.reason, message=shorten(error.message))
    except InterruptedBySignal as signal:
        termination = Termination(
            exit_code=ExitCode.STOPPED, reason=STOPPED, message=f"stopped by {signal}; the next attempt goes on"
        )
    except Exception as error:  # noqa: BLE001 - whatever it is, the operator must read it.
        traceback.print_exc()
        message = shorten(f"{step}: {type(error).__name__}: {error}")
        termination = Termination(exit_code=ExitCode.INTERNAL, reason=INTERNAL_ERROR, message=message)
    stream = sys.stdout if termination.exit_code == ExitCode.DONE else sys.stderr
    code = termination.exit_code
    print(f"{step}: {termination.reason} (exit code {code}) {termination.message}", file=stream, flush=True)
    write_termination(termination)
    return code
