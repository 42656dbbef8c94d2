"""What a trainer says while it runs and when it ends, as a job's status keeps it."""

from __future__ import annotations

from taskoffer.api.contract import ExitCode, ProgressReport, Termination
from taskoffer.api.v1alpha1.trainingjob import Result, TrainerStatus

PERMANENT_EXIT_CODES = frozenset(code for code in ExitCode if not code.retryable) - {ExitCode.DONE}
"""Exit codes after which the same settings fail again: no further attempt is made."""


def parse_termination(message: str) -> Termination | None:
    """Read the trainer's last words, or None when the container left something else (a log tail, nothing)."""
    try:
        return Termination.model_validate_json(message) if message.lstrip().startswith("{") else None
    except ValueError:
        return None


def result_of(report: Termination | None) -> Result | None:
    """Return what a job's status keeps of a finished trainer's report."""
    if report is None:
        return None

    def text(value: float | None) -> str | None:
        return None if value is None else f"{value:.6g}"

    return Result(
        adapter_path=report.adapter_dir[:2048] if report.adapter_dir else None,
        sha256=report.adapter_sha256[:64] if report.adapter_sha256 else None,
        eval_loss_before=text(report.eval_loss_before),
        eval_loss_after=text(report.eval_loss_after),
    )


def trainer_status_of(report: ProgressReport) -> TrainerStatus:
    """Return what a job's status keeps of a progress report."""
    # The pod runs foreign data: names that occur twice or too often must not make the status unwritable.
    metrics = {metric.name: metric for metric in report.metrics}
    return TrainerStatus(
        progress_percentage=report.progress_percentage,
        estimated_remaining_seconds=report.estimated_remaining_seconds,
        metrics=tuple(metrics.values())[:256],
        last_updated_time=report.last_updated_time,
    )
