"""What a trainer says while it runs and when it ends, as a job's status keeps it."""

from __future__ import annotations

from taskoffer.api.contract import ExitCode, Metric, ProgressReport, Termination
from taskoffer.api.v1alpha1.trainingjob import OOM_KILLED, Result, Run, TrainerStatus
from taskoffer.decision.job_facts import PodView

PERMANENT_EXIT_CODES = frozenset(code for code in ExitCode if not code.retryable) - {ExitCode.DONE}
"""Exit codes after which the same settings fail again: no further attempt is made."""

_LONGEST = 1024
"""Characters that an attempt's message may have in the schema."""


def parse_termination(message: str) -> Termination | None:
    """Read the trainer's last words, or None when the container left something else (a log tail, nothing).

    Fields that only a newer trainer knows are passed over.
    """
    try:
        return Termination.model_validate_json(message, extra="ignore") if message.lstrip().startswith("{") else None
    except ValueError:
        return None


def last_words(report: Termination | None, left: str, log_tail: str | None) -> str:
    """Return what is kept of how a container ended: its report, else what it left, and the end of its log."""
    message = (f"{report.reason}: {report.message}" if report else left).strip()[:_LONGEST]
    if log_tail and log_tail not in message:
        room = _LONGEST - len(message[:500]) - 14
        message = f"{message[:500]}; log ends: {log_tail[-room:]}"
    return message


def left_by(pod: PodView, limit: str | None, setting: str) -> str:
    """Return what a container left behind, and that it lacked memory where it had no time to say so itself.

    Args:
        pod: its pod.
        limit: the memory that it was allowed, in words; None where it had no limit.
        setting: the policy's setting that allows more.
    """
    if pod.reason != OOM_KILLED:
        return pod.message
    allowed = f"its limit is {limit}" if limit else "it has no limit of its own, so the node lacked it"
    log = f"; log ends: {pod.message.strip()}" if pod.message.strip() else ""
    return f"{OOM_KILLED}: the container was killed for lack of memory ({allowed}); {setting} gives it more{log}"


def left_by_run(pod: PodView, run: Run) -> str:
    """Return what a training's container left behind, see :func:`left_by`."""
    each = run.pod.memory_per_gpu
    return left_by(pod, f"{each} for each of {run.gpus} GPU(s)" if each else None, "podTemplate.memoryPerGpu")


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
        metrics_before=_by_name(report.figures_before, 64),
        metrics_after=_by_name(report.figures_after, 64),
    )


def _by_name(metrics: tuple[Metric, ...], most: int) -> tuple[Metric, ...]:
    """Return each name's last value. The pod runs foreign data: equal names would make the status unwritable."""
    return tuple({metric.name: metric for metric in metrics}.values())[:most]


def trainer_status_of(report: ProgressReport) -> TrainerStatus:
    """Return what a job's status keeps of a progress report."""
    return TrainerStatus(
        progress_percentage=report.progress_percentage,
        estimated_remaining_seconds=report.estimated_remaining_seconds,
        metrics=_by_name(report.metrics, 256),
        last_updated_time=report.last_updated_time,
    )


def at_its_end(status: TrainerStatus) -> TrainerStatus:
    """Return the status of a training that is done."""
    return status.model_copy(update={"progress_percentage": 100, "estimated_remaining_seconds": 0})
