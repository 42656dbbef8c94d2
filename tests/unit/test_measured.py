"""What a finished job's status says that it took, from its attempts and from what its trainer left."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import Object
from core_builders import NOW, at
from finished_jobs import finished, job
from taskoffer.api.contract import Termination
from taskoffer.api.v1alpha1.learning import Predicted
from taskoffer.api.v1alpha1.trainingjob import TrainingJobStatus
from taskoffer.decision.job_facts import JobFacts, JobPlan, PodView
from taskoffer.decision.measured import measured_of, with_measured

HOUR = 3600


def attempt(number: int = 1, created: float = 0, started: float | None = 60, ended: float | None = HOUR) -> Object:
    """Return an attempt with its times in seconds after NOW."""
    wire: Object = finished("done")["status"]["attempts"][0]
    times = {"createdAt": created, "startedAt": started, "finishedAt": ended}
    made = {
        **wire,
        "jobName": f"done-{number}",
        **{k: None if v is None else at(v).isoformat() for k, v in times.items()},
    }
    return {key: value for key, value in made.items() if value is not None}


def status(*attempts: Object, success: bool = True, **fields: Any) -> TrainingJobStatus:
    wire = finished(success=success)["status"]
    return TrainingJobStatus.model_validate(
        {**wire, "measured": None, "attempts": list(attempts or [attempt()]), **fields}
    )


def said(**fields: Any) -> Termination:
    return Termination(exit_code=0, reason="Completed", **fields)


def shown(found: TrainingJobStatus, report: Termination | None, predicted: Predicted | None = None) -> Object:
    made = measured_of(found, report, predicted)
    return {} if made is None else made.to_wire()


def test_a_trainer_that_reports_everything() -> None:
    report = said(
        step=100,
        total_steps=100,
        training_seconds=3000.4,
        tokens_per_second=7312.6,
        peak_gpu_bytes=70 * 2**30,
        peak_host_bytes=9 * 2**30,
    )
    predicted = Predicted(
        training_seconds=2500, peak_memory_bytes=60 * 2**30, duration_factor="1.10", memory_factor="1.05"
    )
    assert shown(status(), report, predicted) == {
        "containerSeconds": 3540,
        "startSeconds": 60,
        "trainingSeconds": 3000,
        "trainedShare": "1.000",
        "tokensPerSecond": 7313,
        "peakMemoryBytes": 70 * 2**30,
        "peakHostBytes": 9 * 2**30,
        "predictedSeconds": 2750,
        "predictedPeakBytes": 63 * 2**30,
    }


SECONDS: list[tuple[str, TrainingJobStatus, Termination | None, tuple[int | None, str | None]]] = [
    ("no word of the trainer", status(), None, (3540, "1")),
    ("a trainer that says no time", status(), said(step=9, total_steps=9), (3540, "1.000")),
    ("stopped by its deadline", status(), said(step=3, total_steps=4, training_seconds=3000), (3000, "0.750")),
    ("continued", status(), said(step=4, total_steps=4, resumed_from_step=1, training_seconds=900), (900, "0.750")),
    ("another job's time", status(), said(step=4, total_steps=4, training_seconds=3600.0), (None, None)),
    ("within the seconds of a clock", status(), said(step=4, total_steps=4, training_seconds=3541.0), (3541, "1.000")),
    ("not a number", status(), said(step=4, total_steps=4, training_seconds=float("nan")), (None, None)),
    ("below nothing", status(), said(step=4, total_steps=4, training_seconds=-5.0), (None, None)),
    ("failed without a word", status(success=False), None, (None, None)),
    ("failed half-way", status(success=False), said(step=2, total_steps=4, training_seconds=50), (50, "0.500")),
    ("more steps than planned", status(), said(step=10**40, total_steps=1, training_seconds=50), (None, None)),
    ("two attempts, and no time", status(attempt(1, 0, 60, 600), attempt(2, 700, 800, HOUR)), None, (None, None)),
    (
        "two attempts, the second's time",
        status(attempt(1, 0, 60, 600), attempt(2, 700, 800, HOUR)),
        said(step=4, total_steps=4, resumed_from_step=2, training_seconds=2000),
        (2000, "0.500"),
    ),
]


@pytest.mark.parametrize(("found", "report", "wanted"), [row[1:] for row in SECONDS], ids=[row[0] for row in SECONDS])
def test_the_time_of_training_and_what_it_was_spent_on(
    found: TrainingJobStatus, report: Termination | None, wanted: tuple[int | None, str | None]
) -> None:
    made = shown(found, report)
    assert (made.get("trainingSeconds"), made.get("trainedShare")) == wanted


def test_containers_of_all_attempts_count_and_the_first_start() -> None:
    lost = attempt(1, 0, None, 300)
    made = shown(status(lost, attempt(2, 310, 400, 1000), attempt(3, 1010, 1100, 2000), success=False), None)
    assert made == {"containerSeconds": 600 + 900, "startSeconds": 400}


def test_a_job_of_which_nothing_ran_has_no_figures() -> None:
    assert measured_of(status(attempt(started=None), success=False), None, None) is None


def test_the_rate_of_the_last_progress_report_counts_where_the_end_has_none() -> None:
    def progress(value: str) -> TrainingJobStatus:
        metrics = [{"name": "loss", "value": "1"}, {"name": "tokens_per_second", "value": value}]
        return status(trainerStatus={"metrics": metrics, "lastUpdatedTime": NOW.isoformat()})

    assert shown(progress("1234.5"), None)["tokensPerSecond"] == 1234
    assert shown(progress("1234.5"), said(tokens_per_second=2000.0))["tokensPerSecond"] == 2000
    for nonsense in ("nan", "inf", "-3", "fast", "1e300"):
        assert "tokensPerSecond" not in shown(progress(nonsense), None)


NUMBERS = st.none() | st.floats() | st.integers(-(10**30), 10**30).map(float)
COUNTS = st.none() | st.integers(-(10**30), 10**30)


@given(NUMBERS, NUMBERS, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS)
def test_whatever_a_trainer_says_the_status_can_be_written(
    seconds: float | None,
    rate: float | None,
    gpu: int | None,
    host: int | None,
    step: int | None,
    total: int | None,
    resumed: int | None,
) -> None:
    report = said(
        training_seconds=seconds,
        tokens_per_second=rate,
        peak_gpu_bytes=gpu,
        peak_host_bytes=host,
        step=step or 0,
        total_steps=total,
        resumed_from_step=resumed,
    )
    predicted = Predicted(training_seconds=10**9, peak_memory_bytes=10**15, duration_factor="10", memory_factor="10")
    made = measured_of(status(), report, predicted)
    assert made is not None
    assert type(made).model_validate(made.to_wire()) == made
    assert made.predicted_seconds is made.predicted_peak_bytes is None, "it is beyond what the status can hold"


def test_the_figures_come_with_the_end_and_not_before() -> None:
    words = json.dumps({"exitCode": 0, "reason": "Completed", "step": 4, "totalSteps": 4, "trainingSeconds": 60})
    pod = PodView("pod", "pod-uid", "done-1", "node-a", NOW, terminal=True, succeeded=True, message=words)
    older = PodView("old", "old-uid", "done-0", "node-a", NOW, terminal=True, succeeded=False, message="{}")
    running = job(status={"conditions": [], "measured": None})
    facts = JobFacts(now=NOW, job=running, offer=None, jobs={}, pods=[older, pod], nodes={})
    ended = JobPlan(status=status(attempt(1, 0, 0, 90)))
    made = with_measured(ended, facts).status
    assert made is not None
    assert made.measured is not None
    assert made.measured.training_seconds == 60
    for other in (JobPlan(), JobPlan(status=running.status)):
        assert with_measured(other, facts) is other
