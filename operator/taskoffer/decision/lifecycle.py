"""A TrainingJob's next step: one pure function from what is observed to what is to be done.

Every pass looks at everything again; nothing depends on having seen an event. An attempt is written into the
TrainingJob's status before its Job is created. The first one needs no such write, because it follows from the
offer's admission alone.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from taskoffer.api.contract import ExitCode, Termination
from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.taskoffer import ClockMode
from taskoffer.api.v1alpha1.trainingjob import (
    Attempt,
    AttemptOutcome,
    Preemptor,
)
from taskoffer.decision.abandoned import (
    abandoned,
    pods_of_no_attempt,
    steps_to_stop,
    stop_and_fail,
    stray_jobs,
)
from taskoffer.decision.attempts import asked_again_at, end_of_offer, first_attempt, move_request, need_of, says_refused
from taskoffer.decision.conditions import condition_of, is_true
from taskoffer.decision.early_end_draft import EarlyEndDraft
from taskoffer.decision.job_facts import (
    DeleteJob,
    JobFacts,
    JobPlan,
    JobView,
    Notice,
    PodView,
    Refusal,
    SuspendJob,
)
from taskoffer.decision.lost_pods import awaited_pods
from taskoffer.decision.measured import with_measured
from taskoffer.decision.moments import later
from taskoffer.decision.placed_jobs import MoveRequest
from taskoffer.decision.trainer_words import last_words, left_by_run, result_of

_NOT_STARTED = "the pod has not started"


def step(facts: JobFacts) -> JobPlan:
    """Return what to do about a TrainingJob now."""
    if facts.job.metadata.deletion_timestamp is not None:
        return JobPlan()
    made = with_measured(_step(facts), facts)
    if made.failed_pod is not None:
        return made
    strays = tuple(job for job in stray_jobs(facts, made) if job not in made.actions)
    return replace(made, actions=(*made.actions, *strays)) if strays else made


def _step(facts: JobFacts) -> JobPlan:
    status = facts.job.status
    if is_true(status.conditions, "Complete") or is_true(status.conditions, "Failed"):
        return JobPlan(offer_end=end_of_offer(facts))
    if facts.offer is None:
        return abandoned(facts)
    attempts = status.attempts or first_attempt(facts)
    if not attempts:
        # An attempt follows from a place, and where this one was is not known any more.
        why = f"the offer's admission cannot be read: {facts.offer.problem}"
        return stop_and_fail(facts, why, Reason.INVALID_OFFER) if facts.offer.problem else JobPlan()
    return _Pass(facts, attempts).run()


class _Pass(EarlyEndDraft):
    """One look at an unfinished job. Methods return the plan."""

    def __init__(self, facts: JobFacts, attempts: tuple[Attempt, ...]) -> None:
        super().__init__(facts, attempts)
        self.limits = facts.job.spec.run.limits
        self.job = facts.jobs.get(self.current.job_name)
        own = [p for p in facts.pods if p.job_name == self.current.job_name]
        self.pod = max(own, key=lambda p: (not p.terminal, p.created, p.name), default=None)
        self.termination = self._said(self.pod) if self.pod is not None and self.pod.terminal else None

    def run(self) -> JobPlan:
        if self._cancelled():
            return self._stop(Reason.CANCELLED, "the offer was cancelled")
        if self.early_end is not None:
            return self._hand_over_best(self.early_end)
        if self.current.outcome is AttemptOutcome.SUCCEEDED:
            return self._submitted()
        if self.current.outcome is not None:
            return self._next_attempt()
        if self.pod is not None and self.pod.terminal:
            return self._ended(self.pod)
        if self.pod is None and self.job is not None and self.job.finished:
            return self._ended_without_pod(self.job)
        over = self._time_is_up() or self._stop_to_hand_over()
        if over is not None:
            return over
        deadline = self.current.deadline
        if deadline is not None and self.facts.now >= deadline:
            return self._stop(Reason.DEADLINE_EXCEEDED, self._lateness(deadline))
        if deadline is not None:
            self._wake(deadline)
        lost = self._lost_node()
        if lost is not None:
            return lost
        if self.current.preempted_for is not None:
            return self._make_room(self.current.preempted_for)
        if self.job is None and self.pod is None:
            return self._create()
        if self.pod is None or self.pod.started_at is None:
            return self._pending()
        return self._running(self.pod)

    # What the job looks like

    @property
    def _tried(self) -> int:
        """Attempts that have ended by themselves, or run."""
        return sum(attempt.outcome is not AttemptOutcome.PREEMPTED for attempt in self.attempts)

    def _cancelled(self) -> bool:
        offer = self.facts.offer
        return offer is not None and (not offer.active or offer.finished)

    def _by_own_clock(self, moment: datetime) -> datetime:
        """Clocks of other machines may be off; whatever they saw of this attempt lies between its beginning and now."""
        return max(self.current.created_at, min(moment, self.facts.now))

    # The cases

    def _create(self) -> JobPlan:
        fetching = self._prepare()
        if fetching is not None:
            return fetching
        number = len(self.attempts)
        if (unknown := pods_of_no_attempt(self.facts, self.attempts)) > 0:
            waits = f"attempt {number}: {unknown} pod(s) of a TrainingJob that was deleted have not ended"
            self._condition("Running", False, Reason.PENDING, waits)
            return self._plan("Pending")
        refusal, refused_before = self.facts.refusal, says_refused(self.conditions, number)
        if refusal is not None and refusal.job_name == self.current.job_name:
            return self._refused(refusal, refused_before)
        self.actions.append(self._ensure_attempt())
        if not refused_before:
            # In the words of a pass that finds the Job without a pod, so that such a pass has nothing to write.
            self._condition("Running", False, Reason.PENDING, f"attempt {number}: {_NOT_STARTED}")
        return self._plan("Pending")

    def _refused(self, refusal: Refusal, before: bool) -> JobPlan:
        """Ask again now and then for a Job that the API server does not take. What it said first stays as it is."""
        since = self.current.created_at if before else max(self.current.created_at, refusal.since)
        gives_up = later(since, self.limits.start_timeout_seconds)
        if self.facts.now >= gives_up:
            message = f"no Job within {self.limits.start_timeout_seconds} s: {refusal.message}"
            return self._give_up(AttemptOutcome.START_TIMEOUT, Reason.START_TIMEOUT, message)
        again = asked_again_at(refusal)
        if self.facts.now >= again:
            self.actions.append(self._ensure_attempt())
        self._wake(min(again, gives_up))
        if not before:
            self._condition("Running", False, Reason.JOB_REFUSED, f"attempt {len(self.attempts)}: {refusal.message}")
        return self._plan("Pending")

    def _pending(self) -> JobPlan:
        # The Job can be much younger than the decision, for example when the operator was away in between.
        since = self.current.created_at
        if self.job is not None and self.job.created is not None and self.job.created <= self.facts.now:
            since = max(since, self.job.created)
        gives_up = later(since, self.limits.start_timeout_seconds)
        waiting = self.pod.waiting if self.pod and self.pod.waiting else _NOT_STARTED
        if self.facts.now >= gives_up:
            message = f"the container did not start within {self.limits.start_timeout_seconds} s: {waiting}"
            return self._give_up(AttemptOutcome.START_TIMEOUT, Reason.START_TIMEOUT, message)
        self._wake(gives_up)
        self._condition("Running", False, Reason.PENDING, f"attempt {len(self.attempts)}: {waiting}")
        return self._plan("Pending")

    def _running(self, pod: PodView) -> JobPlan:
        if self.current.started_at is None:
            deadline, started = self.current.deadline, self._by_own_clock(pod.started_at or self.facts.now)
            if self.run_spec.clock_mode is ClockMode.TRAINING:
                due = later(started, self.run_spec.time_limit_seconds)
                deadline = min(due, deadline) if deadline else due
            self._amend(started_at=started, deadline=deadline)
            self.notices.append(Notice(Reason.RUNNING, f"attempt {len(self.attempts)} runs on {pod.node}"))
        self._condition("Running", True, Reason.RUNNING, f"attempt {len(self.attempts)} runs on {pod.node}")
        self._take_report()
        if self.facts.preemptor is not None:
            self._amend(preempted_for=self.facts.preemptor)
            self._wake(self.facts.now)
        return self._plan("Running")

    def _lost_node(self) -> JobPlan | None:
        """Give up an attempt whose node is away for too long; its pod stays charged to that node until it has ended."""
        if self.pod is None and self.job is None:
            return None
        for assignment in self.current.assignments:
            health = self.facts.nodes.get(assignment.node_name)
            if health is not None and health.ready:
                continue
            away = "is gone" if health is None else "is not Ready"
            since = health.since if health and health.since else self._lost_since()
            gives_up = later(since, self.limits.node_lost_seconds)
            if self.facts.now >= gives_up:
                message = f"node {assignment.node_name} {away} for over {self.limits.node_lost_seconds} s"
                return self._give_up(AttemptOutcome.NODE_LOST, Reason.NODE_LOST, message)
            self._wake(gives_up)
            until = f"the attempt is given up at {gives_up:%H:%M:%SZ} unless it returns"
            message = f"node {assignment.node_name} {away}; {until}"
            self._condition("Running", None, Reason.NODE_LOST, message)
            return self._plan("Running" if self.current.started_at else "Pending")
        return None

    def _lost_since(self) -> datetime:
        """A node that is gone has no timestamp: count from when the condition first said so."""
        running = condition_of(self.conditions, "Running")
        if running is not None and running.reason == Reason.NODE_LOST:
            return running.last_transition_time
        return self.facts.now

    def _ended(self, pod: PodView) -> JobPlan:
        report = self.termination
        finished = self._by_own_clock(pod.finished_at or self.facts.now)
        if not pod.succeeded and self._was_stopped_by_clock(finished):
            return self._trained_by_clock(finished, pod.exit_code)
        message = last_words(report, left_by_run(pod, self.run_spec), None if pod.succeeded else self.facts.log_tail)
        if pod.succeeded:
            self._amend(outcome=AttemptOutcome.SUCCEEDED, finished_at=finished, exit_code=0, message=message or None)
            return self._complete(report)
        if self.facts.log_tail is None:
            return JobPlan(failed_pod=pod.name)
        code = pod.exit_code
        if self.current.preempted_for is not None and code not in self._permanent:
            return self._preempted(self.current.preempted_for, finished, code)
        stopped = code == ExitCode.STOPPED
        self._amend(
            outcome=AttemptOutcome.STOPPED if stopped else AttemptOutcome.FAILED,
            finished_at=finished,
            exit_code=code,
            reason=(report.reason if report else pod.reason)[:64] or None,
            message=message or None,
        )
        summary = f"attempt {len(self.attempts)} ended with exit code {code}: {message or 'no message'}"
        if code in self._permanent:
            kept = self._kept()
            return self._fail(Reason.FAILED, f"{summary}; {kept}" if kept else summary)
        return self._retry_or_fail(summary)

    def _ended_without_pod(self, job: JobView) -> JobPlan:
        """The Job is over and its pod was removed by somebody else before its end was seen."""
        if not job.succeeded and self._is_time_up():
            return self._trained_by_clock(self.facts.now, None)
        outcome = AttemptOutcome.SUCCEEDED if job.succeeded else AttemptOutcome.FAILED
        self._amend(outcome=outcome, finished_at=self.facts.now, message="the pod was removed before its end was seen")
        if job.succeeded:
            return self._complete(None)
        return self._retry_or_fail(f"attempt {len(self.attempts)} ended: its pod was removed")

    def _make_room(self, preemptor: Preemptor) -> JobPlan:
        """Ask the pod to stop for another offer; once it is gone the attempt is over."""
        whom = f"{preemptor.namespace}/{preemptor.name}"
        if self.job is not None and not self.job.finished and not self.job.suspended:
            self.actions.append(SuspendJob(self.job.name))
            why = f"attempt {len(self.attempts)} saves and stops for {whom}, and goes on later"
            self.notices.append(Notice(Reason.PREEMPTED, why))
        elif self.pod is None:
            return self._preempted(preemptor, self.facts.now, None)
        self._take_report()
        self._condition("Running", True, Reason.STOPPING, f"attempt {len(self.attempts)} saves and stops for {whom}")
        return self._plan("Running")

    def _preempted(self, preemptor: Preemptor, finished: datetime, code: int | None) -> JobPlan:
        """The attempt has given its GPUs back for another offer. It does not count as one that failed."""
        message = f"stopped for {preemptor.namespace}/{preemptor.name}"
        self._amend(outcome=AttemptOutcome.PREEMPTED, finished_at=finished, exit_code=code, message=message)
        self._condition("Running", False, Reason.PREEMPTED, f"attempt {len(self.attempts)} {message}")
        self._wake(self.facts.now)
        return self._plan("Pending")

    def _retry_or_fail(self, summary: str) -> JobPlan:
        if self._due is not None and self.facts.now >= self._due:
            return self._end_early(Reason.DEADLINE_EXCEEDED, f"{self._lateness(self._due)}; {summary}")
        if self._tried >= self.limits.max_attempts:
            counted = f"{summary} (attempt {self._tried} of {self.limits.max_attempts})"
            return self._end_early(Reason.ATTEMPTS_EXHAUSTED, counted)
        self.notices.append(Notice(Reason.ATTEMPT_FAILED, summary, warning=True))
        self._condition("Running", False, Reason.ATTEMPT_FAILED, summary)
        self._wake(self.facts.now)
        return self._plan("Pending")

    def _give_up(self, outcome: AttemptOutcome, reason: Reason, message: str) -> JobPlan:
        """End an attempt from outside; the Job is removed so that it makes no further pod."""
        self._amend(outcome=outcome, finished_at=self.facts.now, message=message[:1024])
        if self.job is not None:
            self.actions.append(DeleteJob(self.job.name, self.job.uid))
        if self._tried >= self.limits.max_attempts:
            return self._end_early(Reason.ATTEMPTS_EXHAUSTED, f"attempt {len(self.attempts)}: {message}")
        self.notices.append(Notice(reason, f"attempt {len(self.attempts)}: {message}", warning=True))
        self._condition("Running", None if reason is Reason.NODE_LOST else False, reason, message)
        self._wake(self.facts.now)
        return self._plan("Pending")

    def _next_attempt(self) -> JobPlan:
        """The last attempt is over: place the next one, on the same GPUs where that is possible."""
        last, due = self.current, self._due
        if due is not None and self.facts.now >= due:
            return self._stop(Reason.DEADLINE_EXCEEDED, self._lateness(due))
        if due is not None:
            self._wake(due)
        if last.outcome is AttemptOutcome.PREEMPTED:
            return self._go_on(last)
        move_away = last.outcome in (AttemptOutcome.NODE_LOST, AttemptOutcome.START_TIMEOUT)
        # A Job whose pod has failed ends by itself and keeps the log; one that was given up would go on.
        if move_away and self.job is not None and not self.job.finished:
            self.actions.append(DeleteJob(self.job.name, self.job.uid))
        if self._tried >= self.limits.max_attempts:
            why = f"attempt {len(self.attempts)}: {last.message or last.outcome}"
            return self._end_early(Reason.ATTEMPTS_EXHAUSTED, why)
        ready_at = later(last.finished_at or self.facts.now, self.limits.backoff_seconds)
        if self.facts.now < ready_at:
            self._wake(ready_at)
            return self._plan("Pending")
        elsewhere = move_away or self.facts.devices_withdrawn
        if not elsewhere and all(self._is_ready(a.node_name) for a in last.assignments):
            if self.pod is not None and not self.pod.terminal:
                return self._plan("Pending")
            self._append(last.assignments)
        elif self.facts.moved_to is not None:
            self._append(self.facts.moved_to)
        else:
            self._condition("Running", False, Reason.WAITING_FOR_CAPACITY, need_of(self.current))
            return self._plan("Pending", move=self._move(move_away))
        self._wake(self.facts.now)
        return self._plan("Pending")

    def _go_on(self, last: Attempt) -> JobPlan:
        """The last attempt gave its GPUs to another offer, so that the next one begins wherever GPUs are free."""
        if self.pod is not None and not self.pod.terminal:
            return self._plan("Pending")
        if self.job is not None and not self.job.finished:
            # A suspended Job never ends by itself, and there is no log of its pod to keep.
            self.actions.append(DeleteJob(self.job.name, self.job.uid))
        if self.facts.moved_to is not None:
            self._append(self.facts.moved_to)
            self._wake(self.facts.now)
            return self._plan("Pending")
        self._condition("Running", False, Reason.PREEMPTED, f"{last.message}; {need_of(last)}")
        return self._plan("Pending", move=replace(self._move(avoid=False), goes_on=True))

    def _is_ready(self, node: str) -> bool:
        health = self.facts.nodes.get(node)
        return health is not None and health.ready

    def _move(self, avoid: bool) -> MoveRequest:
        avoided = (a.node_name for a in self.current.assignments if avoid and not self._is_ready(a.node_name))
        return move_request(self.facts, self.current, frozenset(avoided))

    def _stop(self, reason: Reason, why: str) -> JobPlan:
        """Ask the pods to stop, and end the job once all of them have ended that are not lost with their node."""
        alive = awaited_pods(self.facts, self.attempts)
        if self.job is not None and not self.job.finished and not self.job.suspended:
            self.actions.append(SuspendJob(self.job.name))
            self.notices.append(Notice(Reason.STOPPING, f"{why}: the pods are asked to stop"))
        self.actions.extend(steps_to_stop(self.facts))
        if alive:
            for lost in filter(None, alive):
                self._wake(lost)
            self._condition("Running", True, Reason.STOPPING, f"{why}; {len(alive)} pod(s) are asked to stop")
            return self._plan("Running")
        if self.current.outcome is None:
            own = self.pod is not None and not self.pod.terminal
            outcome = AttemptOutcome.NODE_LOST if own else AttemptOutcome.STOPPED
            self._amend(outcome=outcome, finished_at=self.facts.now, message=why)
        return self._end_early(reason, why) if reason is Reason.DEADLINE_EXCEEDED else self._fail(reason, why)

    def _complete(self, report: Termination | None) -> JobPlan:
        self._take_report(final=True)
        self.result = result_of(report) or self.result
        return self._submitted()

    def _submitted(self) -> JobPlan:
        """The training is over and its GPUs are free: the job is complete once its result has been handed over."""
        waits = self._submit()
        if waits is not None:
            return waits
        text, result = "trained and verified", self.result
        if result is not None and result.eval_loss_before is not None and result.eval_loss_after is not None:
            text += f"; held-out loss {float(result.eval_loss_before):.4f} -> {float(result.eval_loss_after):.4f}"
        if result is not None and result.submitted_to is not None:
            text += f"; submitted to {result.submitted_to}"
        self._condition("Running", False, Reason.SUCCEEDED, text)
        self._condition("Complete", True, Reason.SUCCEEDED, text)
        self.notices.append(Notice(Reason.SUCCEEDED, text))
        return self._plan("Succeeded")
