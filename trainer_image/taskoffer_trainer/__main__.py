"""Command line of the trainer: ``python -m taskoffer_trainer``."""

# ruff: noqa: E402 - what heeds a signal stands before the imports that take long.

from __future__ import annotations

import os
import signal

_ended: list[int] = []
"""The exit code, once it is known."""

if __name__ == "__main__":
    # Importing the rest takes a second in a new pod. Process 1 of a container never gets a signal for which it has no
    # handler: one that came now would be lost, and the training begin and go on until it is killed.
    signal.signal(signal.SIGTERM, lambda *_: None if _ended else os._exit(143))

import argparse
import sys
import traceback
from pathlib import Path

from taskoffer.api.contract import CONFIG_PATH, ExitCode, Termination
from taskoffer_trainer.config import check_paths, load_config
from taskoffer_trainer.failures import INTERNAL_ERROR, TrainerError
from taskoffer_trainer.launcher import launch
from taskoffer_trainer.termination import shorten, write_termination

_ABOUT = """\
Trains one LoRA adapter as a RunConfig file says, verifies it and writes it to the output folder.
Needs no network. Writes only to the output folder, the checkpoint folder and /tmp."""

_MORE = """\
Exit codes: 0 done and verified; 143 stopped by a signal, a checkpoint is written and the same command goes on
from it; 137 killed, as a rule for lack of memory, and 138 please start again (both worth another attempt); 64
bad configuration; 65 bad data; 66 model missing; 70 fault in the trainer; 74 the result did not pass
verification.

Environment: TASKOFFER_PROGRESS_PORT (progress endpoint, 9500; 0 takes a free port), TASKOFFER_TERMINATION_LOG
(termination message, /dev/termination-log), TASKOFFER_LOSS_PLOT (0 draws no picture of the losses),
OMP_NUM_THREADS (CPU threads per process, 1)."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m taskoffer_trainer",
        description=_ABOUT,
        epilog=_MORE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=Path(CONFIG_PATH),
        metavar="PATH",
        help=f"the RunConfig (default {CONFIG_PATH})",
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument(
        "--print-config",
        action="store_true",
        help="print the configuration with every default filled in, and end",
    )
    only.add_argument("--check", action="store_true", help="check the configuration, model, data and folders, and end")
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config)
        if options.print_config:
            print(config.model_dump_json(by_alias=True, exclude_none=True, indent=2))
            return ExitCode.DONE
        if options.check:
            check_paths(config)
            print(f"{options.config}: ready to train {config.model.name} in {config.gpus} process(es)")
            return ExitCode.DONE
        termination = launch(config)
    except TrainerError as error:
        termination = Termination(exit_code=error.code, reason=error.reason, message=shorten(error.message))
    except Exception as error:  # noqa: BLE001 - whatever it is, the operator must read it.
        traceback.print_exc()
        message = shorten(f"launcher: {type(error).__name__}: {error}")
        termination = Termination(exit_code=ExitCode.INTERNAL, reason=INTERNAL_ERROR, message=message)
    _leave(termination)
    return termination.exit_code


def _leave(termination: Termination) -> None:
    _ended.append(termination.exit_code)
    stream = sys.stdout if termination.exit_code == ExitCode.DONE else sys.stderr
    print(
        f"trainer: {termination.reason} (exit code {termination.exit_code}) {termination.message}",
        file=stream,
    )
    write_termination(termination)


if __name__ == "__main__":
    sys.exit(main())
