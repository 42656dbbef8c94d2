"""The part of a pass about a trainer that the offer has brought: it knows no deadline, and nothing it says counts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from datetime import datetime

from taskoffer.api.contract import Termination
from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.trainingjob import AttemptOutcome
from taskoffer.decision.job_facts import EnsureAttempt, JobPlan, JobView, Notice, PodView, SuspendJob
from taskoffer.decision.own_trainer import training_ends, training_seconds
from taskoffer.decision.step_draft import StepDraft
from taskoffer.decision.trainer_words import PERMANENT_EXIT_CODES, parse_termination

_STOPPED = "stopped when its time was over; what it has left is verified"


class OwnTrainerDraft(StepDraft, ABC):
    """As in the market, the end by the clock counts as trained: the submit step decides by what it finds."""

    job: JobView | None
    pod: PodView | None

    def _ensure_attempt(self) -> EnsureAttempt:
        seconds = training_seconds(self.run_spec, self.current, self.facts.now)
        return EnsureAttempt(self.current, len(self.attempts), seconds)

    @property
    def _due(self) -> datetime | None:
        """When an attempt has to have ended."""
        return training_ends(self.run_spec, self.current) or self.current.deadline

    def _said(self, pod: PodView) -> Termination | None:
        """Return what the policy's trainer has reported; another one could report whatever it likes."""
        return None if self.run_spec.trainer is not None else parse_termination(pod.message)

    @property
    def _permanent(self) -> frozenset[int]:
        """Exit codes after which nothing is tried again. They are agreed upon with the policy's trainer alone."""
        return PERMANENT_EXIT_CODES if self.run_spec.trainer is None else frozenset()

    def _is_time_up(self) -> bool:
        ends = training_ends(self.run_spec, self.current)
        return ends is not None and self.facts.now >= ends

    def _time_is_up(self) -> JobPlan | None:
        """Return what to do with a container whose time is over, or None while it is not, or where it stops itself."""
        ends, deadline = training_ends(self.run_spec, self.current), self.current.deadline
        if ends is None or deadline is None or self.facts.now >= deadline:
            return None
        if self.facts.now < ends:
            self._wake(ends)
            return None
        if self.current.started_at is None and (self.pod is None or self.pod.started_at is None):
            return self._stop(Reason.DEADLINE_EXCEEDED, "the time for the training was over before it began")
        if self.job is not None and not self.job.finished and not self.job.suspended:
            self.actions.append(SuspendJob(self.job.name))
            why = f"attempt {len(self.attempts)}: the time for the training is over, so that it is stopped"
            self.notices.append(Notice(Reason.STOPPING, why))
        elif self.pod is None:
            return self._trained_by_clock(self.facts.now, None)
        self._condition("Running", True, Reason.STOPPING, f"attempt {len(self.attempts)}: its time is over")
        return self._plan("Running")

    def _was_stopped_by_clock(self, finished: datetime) -> bool:
        """Tell whether a container that did not end well was stopped because its time was over."""
        ends = training_ends(self.run_spec, self.current)
        if ends is None or self.facts.now < ends:
            return False
        # The node's clock may be behind, but nobody else suspends the Job of an attempt that is still wanted.
        return finished >= ends or (self.job is not None and self.job.suspended)

    def _trained_by_clock(self, finished: datetime, code: int | None) -> JobPlan:
        self._amend(outcome=AttemptOutcome.SUCCEEDED, finished_at=finished, exit_code=code, message=_STOPPED)
        return self._complete(None)

    @abstractmethod
    def _stop(self, reason: Reason, why: str) -> JobPlan: ...

    @abstractmethod
    def _complete(self, report: Termination | None) -> JobPlan: ...
