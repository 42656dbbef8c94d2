"""What a pass over a TrainingJob has found so far, and how it becomes a plan."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta

from taskoffer.api.contract import ExitCode, Provisional, Termination
from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.meta import Assignment
from taskoffer.api.v1alpha1.trainingjob import Attempt, AttemptOutcome, StepName, StepStatus, TrainingJobStatus
from taskoffer.decision.conditions import set_condition
from taskoffer.decision.job_facts import Action, JobFacts, JobPlan, Notice
from taskoffer.decision.naming import attempt_name
from taskoffer.decision.placed_jobs import MoveRequest
from taskoffer.decision.step_needs import is_prepared, is_submitted
from taskoffer.decision.told_clamps import clamps_of, notice_of
from taskoffer.decision.trainer_words import at_its_end, trainer_status_of


class JobDraft:
    """The status of an unfinished job while a pass changes it. Nothing outside of this object changes."""

    def __init__(self, facts: JobFacts, attempts: tuple[Attempt, ...]) -> None:
        """Begin with what is observed and the attempts so far, of which there is at least one."""
        self.facts = facts
        self.run_spec = facts.job.spec.run
        # Whatever answers in the pod of a trainer that the offer has brought is not ours.
        self.report = facts.report if self.run_spec.trainer is None else None
        # The last report stays known after its attempt, whose last words come after it.
        known, name = self.report, facts.job.metadata.name
        running = attempts[-1].outcome is None and known is not None and known.job_name == name
        present = running and known is not None and known.attempt == len(attempts)
        self._present_report = known if present else None
        self.termination: Termination | None = None
        """What the last attempt's container has left, where that has ended and is ours."""
        self.attempts = list(attempts)
        self.current = attempts[-1]
        self.notices: list[Notice] = []
        self.conditions = facts.job.status.conditions
        self.actions: list[Action] = []
        self.wake_at: datetime | None = None
        self.trainer_status = facts.job.status.trainer_status
        self.result = facts.job.status.result
        self.early_end = facts.job.status.early_end
        self.steps = {step.name: step for step in facts.job.status.steps}

    def _wake(self, moment: datetime) -> None:
        self.wake_at = min(self.wake_at, moment) if self.wake_at else moment

    def _append(self, assignments: tuple[Assignment, ...]) -> None:
        number = len(self.attempts) + 1
        self.attempts.append(
            Attempt(
                job_name=attempt_name(self.facts.job.metadata.name, number),
                assignments=assignments,
                created_at=self.facts.now,
                # Stamped once: by the admission, or when a container first started.
                deadline=self.current.deadline,
            )
        )
        node = ", ".join(a.node_name for a in assignments)
        self._condition("Running", False, Reason.PENDING, f"attempt {number} is placed on {node}")

    def _amend(self, **changes: object) -> None:
        self.current = self.current.model_copy(update=changes)
        self.attempts[-1] = self.current

    def _condition(self, kind: str, status: bool | None, reason: Reason, message: str) -> None:
        self.conditions = set_condition(
            self.conditions,
            kind,
            status,
            reason,
            message,
            now=self.facts.now,
            generation=self.facts.job.metadata.generation,
        )

    def _take_report(self, *, final: bool = False) -> None:
        report, before = self.report, self.trainer_status
        if report is None or report.job_name != self.facts.job.metadata.name:
            return
        passed = report.last_updated_time - before.last_updated_time if before is not None else None
        if passed is None or passed >= (timedelta.resolution if final else self.facts.progress_interval):
            self.trainer_status = trainer_status_of(report)

    def _fail(self, reason: Reason, message: str) -> JobPlan:
        self._condition("Running", False, reason, message)
        self._condition("Failed", True, reason, message)
        self.notices.append(Notice(reason, message, warning=reason is not Reason.CANCELLED))
        return self._plan("Failed")

    def _steps(self, train: str) -> Iterator[StepStatus]:
        """Yield how far each step is. Once the training has succeeded, what fails is not the training."""
        trained = self.attempts[-1].outcome is AttemptOutcome.SUCCEEDED
        needed = {StepName.PREPARE: is_prepared(self.run_spec), StepName.SUBMIT: is_submitted(self.run_spec)}
        for name in StepName:
            if name is StepName.TRAIN:
                yield StepStatus.model_validate({"name": name, "state": "Succeeded" if trained else train})
            elif needed[name]:
                yield self.steps.get(name) or StepStatus(name=name, state="Pending")

    def _best(self) -> Provisional | None:
        """Return the best adapter so far as the trainer has told of it last; a status write is not made for it alone.

        A pod that is killed says nothing at its end, so that what it said before counts.
        """
        before, end, report = self.facts.job.status, self.termination, self._present_report
        if self.attempts[-1].outcome is AttemptOutcome.SUCCEEDED:
            return None
        if end is not None and (end.provisional is not None or end.exit_code == ExitCode.VERIFY_FAILED):
            return end.provisional
        written = self.trainer_status != before.trainer_status or self.attempts[-1].outcome is not None
        return report.provisional if report is not None and written else before.provisional

    def _plan(self, train: str, *, move: MoveRequest | None = None) -> JobPlan:
        before = self.facts.job.status
        if self.trainer_status is not None and train == "Succeeded":
            self.trainer_status = at_its_end(self.trainer_status)
        clamps = clamps_of(before.clamps, self.run_spec.clamps, self._present_report, self.termination)
        self.notices.extend(notice_of(before.clamps, clamps))
        status = TrainingJobStatus(
            observed_generation=self.facts.job.metadata.generation,
            conditions=self.conditions,
            attempts=tuple(self.attempts),
            steps=tuple(self._steps(train)),
            trainer_status=self.trainer_status,
            clamps=clamps,
            provisional=self._best(),
            early_end=self.early_end,
            result=self.result,
        )
        return JobPlan(
            actions=tuple(self.actions),
            status=status if status != before else None,
            notices=tuple(self.notices),
            move=move,
            wake_at=self.wake_at,
        )
