"""What a finished job took: its own times, and what the trainer reported at its end."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import timedelta
from decimal import ROUND_HALF_UP, Decimal

from taskoffer.api.contract import Termination
from taskoffer.api.v1alpha1.learning import MOST_BYTES, MOST_SECONDS, MOST_TOKENS, Measured, Predicted
from taskoffer.api.v1alpha1.trainingjob import Attempt, TrainingJobStatus
from taskoffer.decision.conditions import is_true
from taskoffer.decision.job_facts import JobFacts, JobPlan
from taskoffer.decision.trainer_words import parse_termination

_CLOCK_STEP = 1
"""Seconds to which Kubernetes writes a container's times."""


def with_measured(made: JobPlan, facts: JobFacts) -> JobPlan:
    """Return the plan with the job's figures in its status, where this is the plan that ends the job."""
    status = made.status
    if status is None or not (is_true(status.conditions, "Complete") or is_true(status.conditions, "Failed")):
        return made
    # What another trainer has left is its own word.
    report = _last_report(facts, status) if facts.job.spec.run.trainer is None else None
    figures = measured_of(status, report, facts.job.spec.run.predicted)
    return replace(made, status=status.model_copy(update={"measured": figures}))


def measured_of(status: TrainingJobStatus, report: Termination | None, predicted: Predicted | None) -> Measured | None:
    """Return the figures of a job that has ended, or None where nothing of it ever ran.

    Args:
        status: The job's last status.
        report: What its last container left, where that was the trainer's.
        predicted: What was predicted of it.
    """
    ran = [a for a in status.attempts if a.started_at is not None and a.finished_at is not None]
    if not ran:
        return None
    container = sum((_ran_for(attempt) for attempt in ran), timedelta()).total_seconds()
    seconds, share = _training(status, report, container)
    told = predicted or Predicted()
    started = min(a.started_at for a in ran if a.started_at is not None)
    return Measured(
        container_seconds=_whole(container, MOST_SECONDS),
        start_seconds=_whole((started - status.attempts[0].created_at).total_seconds(), MOST_SECONDS),
        training_seconds=seconds,
        trained_share=share,
        tokens_per_second=_rate(status, report),
        peak_memory_bytes=_positive(report.peak_gpu_bytes if report else None, MOST_BYTES),
        peak_host_bytes=_positive(report.peak_host_bytes if report else None, MOST_BYTES),
        predicted_seconds=expected_seconds(told),
        predicted_peak_bytes=_told(told.peak_memory_bytes, told.memory_factor, MOST_BYTES),
    )


def _last_report(facts: JobFacts, status: TrainingJobStatus) -> Termination | None:
    """Return what the trainer of the last attempt left in its container's status."""
    last = status.attempts[-1].job_name if status.attempts else None
    messages = [pod.message for pod in facts.pods if pod.terminal and pod.job_name == last]
    return next((report for message in messages if (report := parse_termination(message)) is not None), None)


def _ran_for(attempt: Attempt) -> timedelta:
    assert attempt.started_at is not None  # noqa: S101
    assert attempt.finished_at is not None  # noqa: S101
    return max(timedelta(), attempt.finished_at - attempt.started_at)


def _training(status: TrainingJobStatus, report: Termination | None, container: float) -> tuple[int | None, str | None]:
    """Return the seconds of training and the share of the planned steps that they were spent on; None where unknown."""
    share = _share(status, report)
    if share is None:
        return None, None
    said = report.training_seconds if report is not None else None
    if said is not None:
        # What took longer than the containers ran was another job's, or was made up.
        seconds = _whole(said, MOST_SECONDS) if said <= container + _CLOCK_STEP else None
    else:
        seconds = _whole(container, MOST_SECONDS) if len(status.attempts) == 1 else None
    return (None, None) if seconds is None else (seconds, share)


def _share(status: TrainingJobStatus, report: Termination | None) -> str | None:
    if report is None or not report.total_steps:
        return "1" if is_true(status.conditions, "Complete") and status.early_end is None else None
    trained = report.step - (report.resumed_from_step or 0)
    if not 0 < trained <= report.total_steps:
        return None
    return str((Decimal(trained) / report.total_steps).quantize(Decimal("0.001"), ROUND_HALF_UP))


def _rate(status: TrainingJobStatus, report: Termination | None) -> int | None:
    """Return the trainer's mean rate, else the one of its last progress report."""
    if report is not None and report.tokens_per_second is not None:
        return _whole(report.tokens_per_second, MOST_TOKENS)
    metrics = status.trainer_status.metrics if status.trainer_status is not None else ()
    said = next((metric.value for metric in metrics if metric.name == "tokens_per_second"), None)
    try:
        return _whole(float(said), MOST_TOKENS) if said is not None else None
    except ValueError:
        return None


def _whole(value: float, most: int) -> int | None:
    return round(value) if math.isfinite(value) and 0 <= value <= most else None


def _positive(value: int | None, most: int) -> int | None:
    return value if value is not None and 0 < value <= most else None


def expected_seconds(predicted: Predicted | None) -> int | None:
    """Return what a job's training was predicted to take, corrected by earlier outcomes, or None where nothing was."""
    return _told(predicted.training_seconds, predicted.duration_factor, MOST_SECONDS) if predicted else None


def _told(formula: int | None, factor: str | None, most: int) -> int | None:
    return None if formula is None else _positive(round(formula * float(factor or 1)), most)
