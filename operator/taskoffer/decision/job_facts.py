"""What is observed about one TrainingJob, and what may be done about it: the values that a pass takes and returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from taskoffer.api.contract import ProgressReport
from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.meta import Assignment
from taskoffer.api.v1alpha1.taskoffer import Admission
from taskoffer.api.v1alpha1.trainingjob import Attempt, Preemptor, StepName, TrainingJob, TrainingJobStatus
from taskoffer.decision.placed_jobs import MoveRequest


@dataclass(frozen=True, slots=True)
class JobView:
    """A batch/v1 Job of an attempt."""

    name: str
    uid: str
    suspended: bool
    finished: bool
    succeeded: bool = False
    created: datetime | None = None


@dataclass(frozen=True, slots=True)
class PodView:
    """A pod of an attempt."""

    name: str
    uid: str
    job_name: str
    node: str | None
    created: datetime
    terminal: bool
    succeeded: bool
    started_at: datetime | None = None
    finished_at: datetime | None = None
    exit_code: int | None = None
    message: str = ""
    waiting: str = ""
    reason: str = ""
    """The kubelet's word for the end of the container, as OOMKilled, or of the pod, as Evicted."""


@dataclass(frozen=True, slots=True)
class StepView:
    """The Job of a step around the training, with what its newest pod says."""

    job: JobView
    pod: PodView | None = None


@dataclass(frozen=True, slots=True)
class NodeHealth:
    """Whether a node is Ready, and since when it is seen to be so, by the clock of whoever sees it."""

    ready: bool
    since: datetime | None


@dataclass(frozen=True, slots=True)
class OfferFacts:
    """The offer behind a job, as far as the job needs it."""

    active: bool
    admission: Admission | None
    finished: bool
    problem: str = ""
    """What is wrong with its stored admission, where that cannot be read."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """What the API server has said against an object of an attempt, for the first and for the last time."""

    job_name: str
    message: str
    since: datetime
    at: datetime
    times: int = 1


@dataclass(frozen=True, slots=True)
class JobFacts:
    """All that is observed about one TrainingJob."""

    now: datetime
    job: TrainingJob
    offer: OfferFacts | None
    """None when the API server has said that the offer is gone."""
    jobs: Mapping[str, JobView]
    pods: Sequence[PodView]
    nodes: Mapping[str, NodeHealth]
    steps: Mapping[StepName, StepView] = field(default_factory=dict)
    """The Jobs of the steps around the training; they are in neither of the two above."""
    report: ProgressReport | None = None
    moved_to: tuple[Assignment, ...] | None = None
    """The next attempt's place, once the cycle has found one for it."""
    preemptor: Preemptor | None = None
    """The offer for which the cycle wants the job to stop, where that is not in its status yet."""
    progress_interval: timedelta = timedelta(seconds=10)
    log_tail: str | None = None
    """Last lines of a failed pod's log; None until they were asked for."""
    refusal: Refusal | None = None
    """Why an attempt has no Job yet, where the API server does not take it."""
    devices_withdrawn: bool = False
    """Whether a device that was chosen for the last attempt is not offered any more."""


@dataclass(frozen=True, slots=True)
class EnsureAttempt:
    """Create ConfigMap and Job of an attempt unless they are there."""

    attempt: Attempt
    number: int
    seconds: int | None = None
    """What the attempt has left when its Job is made; None for our trainer before its clock has started."""


@dataclass(frozen=True, slots=True)
class EnsureStep:
    """Create ConfigMap and Job of a step around the training unless they are there."""

    name: StepName
    seconds: int
    """How long the step may take."""
    deadline: datetime | None
    """When the whole task has to be done."""
    lease_until: datetime
    """Until when the job keeps its files in the cache."""
    repeats: int = 0
    """How often it was begun before."""
    failures: int = 0
    """How often of these it has asked to be started again: it was told the same each time."""
    provisional: bool = False
    """Whether it hands over the best adapter so far, of a training that has ended early."""


@dataclass(frozen=True, slots=True)
class SuspendJob:
    """Ask a Job's pods to stop; the Job stays."""

    name: str


@dataclass(frozen=True, slots=True)
class DeleteJob:
    """Remove a Job whose pod may never answer again."""

    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class Notice:
    """An event on the TrainingJob."""

    reason: Reason
    message: str
    warning: bool = False


@dataclass(frozen=True, slots=True)
class OfferEnd:
    """The Finished condition that the offer is to get."""

    reason: Reason
    message: str


Action = EnsureAttempt | EnsureStep | SuspendJob | DeleteJob


@dataclass(frozen=True, slots=True)
class JobPlan:
    """What to do about a TrainingJob now."""

    actions: tuple[Action, ...] = ()
    status: TrainingJobStatus | None = None
    """The status to write, or None when it is right already."""
    notices: tuple[Notice, ...] = ()
    offer_end: OfferEnd | None = None
    move: MoveRequest | None = None
    wake_at: datetime | None = None
    failed_pod: str | None = None
    """Set, and nothing else, when the last lines of this pod's log are wanted before the plan is made."""
