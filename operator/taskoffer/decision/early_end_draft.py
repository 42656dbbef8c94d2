"""The part of a pass about a training of ours that ends without a result, while the best adapter so far is there.

The trainer keeps it in the output folder from the first checkpoint on. As with a trainer that the offer has brought,
the submit step decides by what it finds: it verifies the adapter from nothing but its files. The job is complete when
that was handed over before the deadline; else it has failed for what ended the training.
"""

from __future__ import annotations

from datetime import datetime

from taskoffer.api.contract import RunState
from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.trainingjob import EarlyEnd, StepName
from taskoffer.decision.job_facts import JobPlan, Notice
from taskoffer.decision.moments import later
from taskoffer.decision.own_trainer import submit_seconds
from taskoffer.decision.own_trainer_draft import OwnTrainerDraft
from taskoffer.decision.step_needs import is_submitted


class EarlyEndDraft(OwnTrainerDraft):
    """What becomes of a training of ours whose time or whose attempts have run out."""

    @property
    def _due(self) -> datetime | None:
        """When an attempt has to have ended: early enough to hand over the best adapter so far, where there is one."""
        return self._hand_over_from() or super()._due

    def _hand_over_from(self) -> datetime | None:
        """Return from when on the time is kept for handing over; None where there is nothing to hand over so far."""
        deadline = self.current.deadline
        if self.run_spec.trainer is not None or not is_submitted(self.run_spec) or deadline is None:
            return None
        return later(deadline, -submit_seconds(self.run_spec)) if self._best() is not None else None

    def _lateness(self, due: datetime) -> str:
        deadline = self.current.deadline
        if deadline is None or self.facts.now >= deadline:
            return f"the deadline {deadline or due:%Y-%m-%dT%H:%M:%SZ} has passed"
        return f"the time for the training was over at {due:%Y-%m-%dT%H:%M:%SZ}"

    def _stop_to_hand_over(self) -> JobPlan | None:
        """Stop a trainer that does not end in time, while there is time left to hand over the best so far.

        One that verifies its result is about to end, so that it may use half of the time that is kept.
        """
        begins, deadline, report = self._hand_over_from(), self.current.deadline, self._present_report
        if begins is None or deadline is None or self.facts.now >= deadline:
            return None
        ends = begins
        if report is not None and report.state is RunState.VERIFYING:
            ends = later(deadline, -submit_seconds(self.run_spec) / 2)
        if self.facts.now < ends:
            self._wake(ends)
            return None
        return self._stop(Reason.DEADLINE_EXCEEDED, self._lateness(begins))

    def _end_early(self, reason: Reason, message: str) -> JobPlan:
        """End a training whose time or whose attempts have run out: with the best so far, where that can be done."""
        best, deadline = self._best(), self.current.deadline
        if best is None or self.run_spec.trainer is not None:
            return self._fail(reason, message)
        if not is_submitted(self.run_spec):
            return self._fail(reason, f"{message}; {self._kept()}")
        if deadline is not None and self.facts.now >= deadline:
            return self._fail(reason, f"{message}; {self._kept()}, and no time is left to hand it over")
        self.early_end = EarlyEnd.model_validate({"reason": reason.value, "message": message[:1024]})
        what = f"{message}; the best adapter so far, of step {best.step}, is verified and handed over"
        self.notices.append(Notice(reason, what[:1024], warning=True))
        self._condition("Running", False, Reason.SUBMITTING, what)
        self._wake(self.facts.now)
        return self._plan("Failed")

    def _kept(self) -> str:
        """Say where the best adapter so far lies."""
        best = self._best()
        if best is None:
            return ""
        return f"the best adapter so far, of step {best.step}, which was not verified, lies in {best.path}"

    def _hand_over_best(self, end: EarlyEnd) -> JobPlan:
        """Return what to do about a training that has ended early, until its best adapter so far is handed over."""
        waits = self._submit()
        if waits is not None:
            return waits
        best, deadline, view = self._best(), self.current.deadline, self.facts.steps.get(StepName.SUBMIT)
        arrived = view.pod.finished_at if view is not None and view.pod is not None else None
        arrived = min(arrived or self.facts.now, self.facts.now)
        which = f"the best adapter so far{f', of step {best.step}' if best is not None else ''}"
        to = f" to {self.result.submitted_to}" if self.result is not None and self.result.submitted_to else ""
        if deadline is not None and arrived > deadline:
            late = f"{which}, was handed over{to} at {arrived:%Y-%m-%dT%H:%M:%SZ}, after the deadline"
            return self._fail(_reason_of(end), f"{end.message}; {late}")
        text = f"{which}, was verified and handed over{to}; the training ended early: {end.reason}: {end.message}"
        self._condition("Running", False, Reason.SUCCEEDED, text)
        self._condition("Complete", True, Reason.SUCCEEDED, text)
        self.notices.append(Notice(Reason.SUCCEEDED, text[:1024]))
        return self._plan("Failed")

    def _step_fail(self, name: StepName, reason: Reason, message: str) -> JobPlan:
        """Fail for what ended the training, where this was the try to make the best of it."""
        if self.early_end is None:
            return super()._step_fail(name, reason, message)
        self._say_step(name, "Failed", message)
        first = f"{self.early_end.message}; {self._kept()}, and was not handed over"
        return self._fail(_reason_of(self.early_end), f"{first}: {message}")


def _reason_of(end: EarlyEnd) -> Reason:
    late = end.reason == "DeadlineExceeded"
    return Reason.DEADLINE_EXCEEDED if late else Reason.ATTEMPTS_EXHAUSTED
