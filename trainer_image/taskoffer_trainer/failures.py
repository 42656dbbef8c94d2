"""How a run fails: an exit code, a reason in CamelCase and a sentence that names the thing and the remedy."""

from __future__ import annotations

from taskoffer.api.contract import ExitCode

__all__ = [
    "COMPLETED",
    "DEADLINE_REACHED",
    "INTERNAL_ERROR",
    "KILLED",
    "STOPPED",
    "StopRequestedError",
    "TrainerError",
    "bad_data",
]

COMPLETED = "Completed"
"""All planned steps were trained and the adapter passed verification (exit code 0)."""
DEADLINE_REACHED = "DeadlineReached"
"""The deadline came first: the best checkpoint so far was exported and passed verification (exit code 0)."""
STOPPED = "Stopped"
"""Asked to stop by a signal; what was trained is in a checkpoint (exit code 143)."""
KILLED = "Killed"
"""A training process was killed by a signal, as a rule for lack of memory (exit code 128 + signal)."""
INTERNAL_ERROR = "InternalError"
"""A fault in the trainer itself (exit code 70)."""


class TrainerError(Exception):
    """A failure with a place in the contract: what the operator and the user get to read."""

    def __init__(self, code: ExitCode, reason: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message


class StopRequestedError(Exception):
    """A signal asked the run to stop between two pieces of work; nothing is lost by leaving now."""


def bad_data(reason: str, message: str) -> TrainerError:
    """Build the error for data that cannot be used."""
    return TrainerError(ExitCode.BAD_DATA, reason, message)
