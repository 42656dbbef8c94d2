"""The steps around a training: when their Jobs are wanted, and what their ends mean for the whole."""

from __future__ import annotations

from datetime import datetime

from taskoffer.api.base import rfc3339
from taskoffer.api.contract import ExitCode, Termination
from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.trainingjob import MOST_REPEATS, Result, StepName, StepStatus
from taskoffer.decision.attempts import asked_again_at
from taskoffer.decision.job_draft import JobDraft
from taskoffer.decision.job_facts import DeleteJob, EnsureStep, JobPlan, Notice, StepView
from taskoffer.decision.measured import expected_seconds
from taskoffer.decision.moments import later
from taskoffer.decision.naming import step_name
from taskoffer.decision.own_trainer import submit_seconds
from taskoffer.decision.step_needs import has_target, is_fetched, is_prepared, is_submitted
from taskoffer.decision.trainer_words import last_words, left_by, parse_termination, result_of

_SAYS = {
    StepName.PREPARE: (Reason.PREPARING, Reason.PREPARE_FAILED),
    StepName.SUBMIT: (Reason.SUBMITTING, Reason.SUBMIT_FAILED),
}
_SHORTEST_SECONDS = 30
"""A step gets this long at least, however near the deadline is; nearer than that none is begun again."""


class StepDraft(JobDraft):
    """The part of a pass that is about the steps around the training."""

    def _prepare(self) -> JobPlan | None:
        """Return what to do until model and data are there, or None once they are."""
        return self._step(StepName.PREPARE) if is_prepared(self.run_spec) else None

    def _submit(self) -> JobPlan | None:
        """Return what to do until the result is handed over, or None once it is."""
        return self._step(StepName.SUBMIT) if is_submitted(self.run_spec) else None

    def _step(self, name: StepName) -> JobPlan | None:
        before = self.steps.get(name)
        if before is not None and before.state == "Succeeded":
            if not self._lapses(before):
                return None
            repeats = (before.repeats or 0) + 1
            self.steps[name] = StepStatus(name=name, state="Pending", started_at=self.facts.now, repeats=repeats)
        train = "Pending" if name is StepName.PREPARE else "Succeeded" if self.early_end is None else "Failed"
        view = self.facts.steps.get(name)
        if view is None or view.job.name != self._name(name):
            return self._begin_step(name, train)
        if not view.job.finished:
            return self._step_runs(name, view, train)
        report = parse_termination(view.pod.message) if view.pod is not None else None
        if view.job.succeeded:
            self._take_step(name, report)
            self._say_step(name, "Succeeded", report.message if report else "")
            return None
        return self._step_failed(name, view, report, train)

    def _name(self, name: StepName) -> str:
        step = self.steps.get(name)
        return step_name(self.facts.job.metadata.name, name, (step.repeats or 0) if step is not None else 0)

    def _what(self, name: StepName) -> str:
        if name is StepName.SUBMIT:
            return "the result is being handed over"
        if is_fetched(self.run_spec):
            return "model and data are being fetched"
        return "it is being asked whether the result may be handed over"

    def _lapses(self, step: StepStatus) -> bool:
        """Tell whether what was fetched may be gone before an attempt that begins now is done with it.

        A job without a deadline can wait for longer than it keeps its files, behind others or for a node.
        """
        return step.lease_until is not None and step.lease_until < self._needed_until(0)

    def _needed_until(self, margin: float) -> datetime:
        """Return until when an attempt that begins now may need its files: until its result is handed over."""
        settings, deadline = self.run_spec.steps, self.current.deadline
        assert settings is not None  # noqa: S101 - what is needed says so.
        if deadline is not None:
            return later(deadline, margin)
        return later(self.facts.now, self.run_spec.time_limit_seconds + settings.timeout_seconds + margin)

    def _begin_step(self, name: StepName, train: str) -> JobPlan:
        (running, failed), what = _SAYS[name], self._what(name)
        deadline, now = self.current.deadline, self.facts.now
        if deadline is not None and now >= deadline:
            before = self.steps.get(name)
            last = f"; {before.message}" if before is not None and before.failures and before.message else ""
            return self._step_fail(name, Reason.DEADLINE_EXCEEDED, f"{what}: the deadline has passed{last}")
        assert self.run_spec.steps is not None  # noqa: S101 - what is needed says so.
        settings = self.run_spec.steps
        refusal = self.facts.refusal
        self._say_step(name, "Pending", "")
        if (waits := self._paused(name, train)) is not None:
            return waits
        if refusal is not None and refusal.job_name == self._name(name):
            if now >= later(refusal.since, settings.timeout_seconds):
                return self._step_fail(name, failed, f"no Job within {settings.timeout_seconds} s: {refusal.message}")
            self._condition("Running", False, Reason.JOB_REFUSED, refusal.message)
            if now < asked_again_at(refusal):
                self._wake(asked_again_at(refusal))
                return self._plan(train)
        else:
            self._condition("Running", False, running, what)
        self._drop_last_try(name)
        self.actions.append(self._ensure(name, deadline))
        return self._plan(train)

    def _ensure(self, name: StepName, deadline: datetime | None) -> EnsureStep:
        settings, now = self.run_spec.steps, self.facts.now
        assert settings is not None  # noqa: S101
        seconds = settings.timeout_seconds
        ends = self._training_ends() if name is StepName.PREPARE else deadline
        if ends is not None:
            seconds = min(seconds, max(_SHORTEST_SECONDS, int((ends - now).total_seconds())))
        step = self.steps[name]
        until = step.lease_until
        if until is None:
            # The step itself may take as long as it is given before the training begins.
            until = self._needed_until(settings.timeout_seconds)
            until = until if deadline else max(until, later(now, settings.lease_seconds))
        if name is StepName.PREPARE:
            # The first one counts: the configuration that carries it is written once.
            self.steps[name] = step.model_copy(update={"lease_until": until})
        repeats, failures = step.repeats or 0, step.failures or 0
        return EnsureStep(name, seconds, deadline, until, repeats, failures, self.early_end is not None)

    def _step_runs(self, name: StepName, view: StepView, train: str) -> JobPlan:
        (running, _), what = _SAYS[name], self._what(name)
        pod = view.pod
        started = pod is not None and pod.started_at is not None
        if not started and pod is not None and pod.waiting:
            what = f"{what}: {pod.waiting}"
        self._say_step(name, "Running" if started else "Pending", "")
        self._condition("Running", False, running, what)
        return self._plan(train)

    def _step_failed(self, name: StepName, view: StepView, report: Termination | None, train: str) -> JobPlan:
        _, reason = _SAYS[name]
        settings = self.run_spec.steps
        memory = settings.memory if settings is not None else None
        left = left_by(view.pod, memory, "steps.memory") if view.pod is not None else ""
        code = view.pod.exit_code if view.pod is not None else None
        words = last_words(report, left, None) or "it did not end in time, or its pod was removed"
        ended = f"exit code {code}: {words}" if code is not None else words
        message = f"step {name.value} ended with {ended}"
        return self._pause(name, message, train) if code == ExitCode.RESTART else self._step_fail(name, reason, message)

    def _pause(self, name: StepName, message: str, train: str) -> JobPlan:
        """Begin a step again that asks for it: a hub may answer later, other jobs may end and leave room.

        What stands in the status decides when, so that a restart of the operator changes nothing.
        """
        _, reason = _SAYS[name]
        settings, now, step = self.run_spec.steps, self.facts.now, self.steps.get(name)
        assert settings is not None  # noqa: S101 - what is needed says so.
        step = step or StepStatus(name=name, state="Pending", started_at=now)
        failures, repeats = (step.failures or 0) + 1, (step.repeats or 0) + 1
        last, limit = self._last_try(name, step.started_at or now)
        if now >= last or repeats > MOST_REPEATS:
            return self._step_fail(name, reason, f"{message}; try {failures} was the last {limit}")
        pause = min(settings.backoff_max_seconds, settings.backoff_seconds * 2 ** min(failures - 1, 20))
        again = min(later(now, pause), last)
        changes = {"failures": failures, "repeats": repeats, "next_try_at": again, "message": message[:1024]}
        self.steps[name] = step.model_copy(update={"state": "Pending", **changes})
        told = f"try {failures}: {message}; it is begun again at {rfc3339(again)}"
        self.notices.append(Notice(Reason.STEP_PAUSED, told[:1024], warning=True))
        self._condition("Running", False, Reason.STEP_PAUSED, told)
        self._wake(again)
        return self._plan(train)

    def _last_try(self, name: StepName, began: datetime) -> tuple[datetime, str]:
        """Return when a step that asks for it is begun again at the latest, and in words what bounds it.

        GPUs are kept while model and data are fetched, so that Prepare does not go on to the deadline: what comes then
        is of no use. The training is to have the time that is predicted, or half of what there was where that is less:
        one that is cut short by its deadline has a result as well.
        """
        assert self.run_spec.steps is not None  # noqa: S101 - what is needed says so.
        deadline, ends = self.current.deadline, self._training_ends()
        until = later(began, self.run_spec.steps.timeout_seconds)
        if deadline is not None:
            until = deadline if name is StepName.SUBMIT else min(until, deadline)
        last, words = later(until, -_SHORTEST_SECONDS), f"before {rfc3339(until)}"
        if name is StepName.SUBMIT or ends is None:
            return last, words
        needed = max(0.0, (ends - began).total_seconds() / 2)
        predicted = expected_seconds(self.run_spec.predicted)
        begins = later(ends, -(needed if predicted is None else min(needed, predicted)))
        if begins >= last:
            return last, words
        return begins, f"before {rfc3339(begins)}, after which too little time is left for the training"

    def _training_ends(self) -> datetime | None:
        """Return when the training has to have ended: early enough to hand its result over."""
        deadline = self.current.deadline
        kept = submit_seconds(self.run_spec) if is_submitted(self.run_spec) else 0
        return later(deadline, -kept) if deadline is not None else None

    def _paused(self, name: StepName, train: str) -> JobPlan | None:
        """Return what to do while a step waits to be begun again, or None when it does not."""
        again = self.steps[name].next_try_at
        if again is None or self.facts.now >= again:
            return None
        self._wake(again)
        return self._plan(train)

    def _drop_last_try(self, name: StepName) -> None:
        """Remove the Job of the try before: its words are in the status, and one for each pause would be many."""
        view = self.facts.steps.get(name)
        if view is not None and view.job.finished and self.steps[name].next_try_at is not None:
            self.actions.append(DeleteJob(view.job.name, view.job.uid))

    def _step_fail(self, name: StepName, reason: Reason, message: str) -> JobPlan:
        self._say_step(name, "Failed", message)
        return self._fail(reason, message)

    def _say_step(self, name: StepName, state: str, message: str) -> None:
        before, now = self.steps.get(name), self.facts.now
        if before is not None and before.state == state:
            return
        over = state in ("Succeeded", "Failed")
        step = before or StepStatus(name=name, state="Pending")
        self.steps[name] = step.model_copy(
            update={
                "state": state,
                "started_at": step.started_at or now,
                "finished_at": now if over else None,
                # What the try before has said stays while another one runs.
                "message": message[:1024] or (step.message if step.failures and not over else None),
                "next_try_at": step.next_try_at if state == "Pending" else None,
            }
        )
        if state == "Succeeded":
            running, _ = _SAYS[name]
            self.notices.append(Notice(running, f"step {name.value} succeeded: {message}"[:1024]))

    def _take_step(self, name: StepName, report: Termination | None) -> None:
        if name is not StepName.SUBMIT or report is None or report.published is None:
            return
        handed: dict[str, str | None] = {}
        if has_target(self.run_spec):
            handed = {"submitted_to": report.published.to, "submitted_revision": report.published.revision}
        # Of a trainer that the offer has brought, or of the best adapter so far, this step is the first one that
        # anybody believes.
        ours = self.run_spec.trainer is None and self.early_end is None
        found = self.result if ours else result_of(report)
        self.result = (found or Result()).model_copy(update=handed)
