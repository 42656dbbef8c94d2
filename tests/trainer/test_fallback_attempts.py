"""With which settings the attempts of a job run, by what the ones before ended with: operator and trainer together.

The operator decides how many attempts there are, the trainer which profile comes next. A profile that no attempt
reaches is none.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from builders import make_admission, merged, stored
from core_builders import NOW, at, policy, spec_of
from taskoffer import presets
from taskoffer.api.base import rfc3339
from taskoffer.api.contract import ExitCode, RunConfig, Termination
from taskoffer.api.v1alpha1.taskoffer import Admission
from taskoffer.api.v1alpha1.trainingjob import Attempt, TrainingJob
from taskoffer.decision.conditions import condition_of
from taskoffer.decision.job_facts import EnsureAttempt, JobFacts, JobPlan, JobView, NodeHealth, OfferFacts, PodView
from taskoffer.decision.keys import OfferKey
from taskoffer.decision.lifecycle import step
from taskoffer.render.trainingjob import run_config, training_job
from taskoffer_trainer.effective import effective
from taskoffer_trainer.fallback import note_end, note_kills, profile_of

pytestmark = pytest.mark.trainer

NAN = (ExitCode.RESTART, "GradientsNotFinite")
MEMORY = (ExitCode.RESTART, "OutOfMemory")
COMPILING = (ExitCode.RESTART, "CompileFailed")
UNKNOWN = (ExitCode.INTERNAL, "InternalError")
KILLED = (ExitCode.KILLED, "OOMKilled")
"""The kernel has killed the whole container: only the kubelet knows why."""

COURSES: dict[str, tuple[list[tuple[int, str]], list[int], list[int]]] = {
    # How each attempt ends, the profile that each runs with, and the same where the first one would change nothing.
    "no finite gradients": ([NAN, NAN, NAN], [0, 3, 3], [0, 3, 3]),
    "not enough memory": ([MEMORY, MEMORY, MEMORY], [0, 2, 3], [0, 2, 3]),
    "memory, then gradients": ([MEMORY, NAN, NAN], [0, 2, 3], [0, 2, 3]),
    "the container is killed": ([KILLED, KILLED, KILLED], [0, 2, 3], [0, 2, 3]),
    "killed, then gradients": ([KILLED, NAN, NAN], [0, 2, 3], [0, 2, 3]),
    "gradients, then killed": ([NAN, KILLED, KILLED], [0, 3, 3], [0, 3, 3]),
    "no compiling": ([COMPILING, COMPILING, COMPILING], [0, 1, 2], [0, 2, 3]),
    "compiling, then gradients": ([COMPILING, NAN, NAN], [0, 1, 3], [0, 2, 3]),
    "nobody knows why": ([UNKNOWN, UNKNOWN, UNKNOWN], [0, 1, 2], [0, 2, 3]),
    "nobody knows why, then gradients": ([UNKNOWN, NAN, NAN], [0, 1, 3], [0, 2, 3]),
}


def job_of(preset: str) -> TrainingJob:
    """The job of an offer that a preset has admitted."""
    chosen = policy(preset=preset).spec
    assert chosen is not None
    admission = Admission.model_validate(make_admission(deadline=rfc3339(at(36_000))))
    made = training_job(OfferKey("default", "offer"), "uid", spec_of(hours=10), admission, chosen)
    return TrainingJob.model_validate(stored(made, uid="tj-uid"))


def looked_at(
    job: TrainingJob, after: float, *, jobs: tuple[JobView, ...] = (), pods: tuple[PodView, ...] = ()
) -> JobPlan:
    admission = Admission.model_validate(make_admission(job=job.metadata.name, deadline=rfc3339(at(36_000))))
    return step(
        JobFacts(
            now=at(after),
            job=job,
            offer=OfferFacts(active=True, admission=admission, finished=False),
            jobs={one.name: one for one in jobs},
            pods=pods,
            nodes={"node-a": NodeHealth(True, NOW)},
            log_tail="",
        )
    )


def written(job: TrainingJob, made: JobPlan) -> TrainingJob:
    assert made.status is not None
    return TrainingJob.model_validate(merged(job.to_wire(), {"status": made.status.to_wire()}))


def is_killed(end: Termination) -> bool:
    return (end.exit_code, end.reason) == KILLED


def ended_badly(job: TrainingJob, attempt: Attempt, after: float, end: Termination) -> JobPlan:
    """Look at a job whose attempt has begun, and whose pod has ended with these words."""
    pod = PodView(
        f"{attempt.job_name}-pod",
        f"{attempt.job_name}-uid",
        attempt.job_name,
        "node-a",
        at(after),
        True,
        False,
        started_at=at(after + 5),
        finished_at=at(after + 50),
        exit_code=end.exit_code,
        reason=KILLED[1] if is_killed(end) else "Error",
        message="" if is_killed(end) else json.dumps(end.to_wire()),
    )
    return looked_at(job, after + 60, jobs=(JobView(attempt.job_name, "uid", False, True),), pods=(pod,))


def course(preset: str, ends: list[tuple[int, str]], place: Path) -> tuple[list[tuple[int, RunConfig]], str]:
    """Run a job whose attempts end so; return the profile and settings of each attempt, and why the job failed."""
    job, after, ran = job_of(preset), 0.0, []
    for number, (code, reason) in enumerate(ends, 1):
        made = looked_at(job, after)
        if not made.actions:
            # The pass after a pause places the attempt, and the one after that makes its Job.
            job = written(job, made)
            made = looked_at(job, after)
        (action,) = made.actions
        assert isinstance(action, EnsureAttempt)
        assert action.number == number
        job = written(job, made) if made.status is not None else job
        config = run_config(job, action.attempt, number).model_copy(update={"checkpoint_dir": str(place)})
        # As the trainer does at the beginning of an attempt, and at its end where it has time to.
        note_kills(config)
        ran.append((profile_of(config), effective(config, 64).config))
        end = Termination(exit_code=code, reason=reason)
        if not is_killed(end):
            note_end(config, end)
        job = written(job, ended_badly(job, action.attempt, after, end))
        after += 600
    failed = condition_of(job.status.conditions, "Failed")
    return ran, failed.reason if failed is not None else ""


@pytest.mark.parametrize("case", COURSES)
@pytest.mark.parametrize("preset", sorted(presets.names()))
def test_the_profile_that_helps_is_among_the_attempts_that_a_preset_allows(
    preset: str, case: str, tmp_path: Path
) -> None:
    ends, by_profile, without_first = COURSES[case]
    ran, failed = course(preset, ends, tmp_path)
    first, last = ran[0][1], ran[-1][1].train
    changes = first.train.torch_compile or first.lora.lora_dropout > 0 or first.train.dataloader_num_workers > 2
    expected = by_profile if changes else without_first
    assert [profile for profile, _ in ran] == expected
    assert failed == "AttemptsExhausted"
    assert last.learning_rate == first.train.learning_rate / (2 if expected[-1] == 3 else 1)
