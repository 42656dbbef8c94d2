"""What becomes of a TrainingJob whose offer has been deleted, and of Jobs that no attempt wants.

Kubernetes' garbage collector removes what an offer owns, and with it the pods. But it works through a queue of its
own, learns of new kinds every half minute only, and leaves everything alone after ``--cascade=orphan``. A job that
nobody has asked for any more must not train meanwhile, so its pods are asked to stop right away.
"""

from __future__ import annotations

from collections.abc import Sequence

from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.meta import Condition
from taskoffer.api.v1alpha1.trainingjob import Attempt, AttemptOutcome
from taskoffer.decision.conditions import is_true, set_condition
from taskoffer.decision.job_facts import DeleteJob, JobFacts, JobPlan, Notice, SuspendJob

_WHY = "its offer is gone"


def abandoned(facts: JobFacts) -> JobPlan:
    """Return what to do about an unfinished TrainingJob whose offer is gone: stop its pods, then say that it ended."""
    if not (facts.job.status.attempts or facts.jobs or facts.pods or facts.steps):
        # Nothing has come of it, so there is nothing to stop; it may even be somebody else's.
        return JobPlan()
    return stop_and_fail(facts, _WHY, Reason.CANCELLED)


def stop_and_fail(facts: JobFacts, why: str, reason: Reason) -> JobPlan:
    """Return what to do about a TrainingJob that cannot go on: stop its pods, and once they have ended say why."""
    stopped = (SuspendJob(job.name) for job in facts.jobs.values() if not job.finished and not job.suspended)
    to_stop = (*stopped, *steps_to_stop(facts))
    alive = [pod for pod in facts.pods if not pod.terminal]
    before = facts.job.status
    conditions, attempts = before.conditions, list(before.attempts)

    def say(kind: str, status: bool, reason: Reason, message: str) -> tuple[Condition, ...]:
        generation = facts.job.metadata.generation
        return set_condition(conditions, kind, status, reason, message, now=facts.now, generation=generation)

    if alive:
        conditions = say("Running", True, Reason.STOPPING, f"{why}; {len(alive)} pod(s) are asked to stop")
    elif not to_stop:
        if attempts and attempts[-1].outcome is None:
            ended = {"outcome": AttemptOutcome.STOPPED, "finished_at": facts.now, "message": why[:1024]}
            attempts[-1] = attempts[-1].model_copy(update=ended)
        conditions = say("Running", False, reason, why)
        conditions = say("Failed", True, reason, why)
    status = before.model_copy(update={"conditions": conditions, "attempts": tuple(attempts)})
    return JobPlan(
        actions=to_stop,
        status=status if status != before else None,
        notices=(Notice(Reason.STOPPING, f"{why}: the pods are asked to stop"),) if to_stop else (),
    )


def steps_to_stop(facts: JobFacts) -> tuple[SuspendJob, ...]:
    """Return what stops the Jobs of steps around the training that have not ended."""
    jobs = [view.job for view in facts.steps.values()]
    return tuple(SuspendJob(job.name) for job in jobs if not job.finished and not job.suspended)


def stray_jobs(facts: JobFacts, made: JobPlan) -> tuple[SuspendJob, ...]:
    """Return what stops the Jobs that would run although no attempt wants them.

    A create of a leader that was lost can reach the server after its attempt, or the whole TrainingJob, has ended;
    nothing can refuse it then.
    """
    status = made.status or facts.job.status
    over = is_true(status.conditions, "Complete") or is_true(status.conditions, "Failed")
    wanted = status.attempts[-1].job_name if status.attempts and not over else None
    if wanted is None and not over:
        return ()
    removed = {action.name for action in made.actions if isinstance(action, DeleteJob)}
    # A Job whose pod has ended is about to end as well.
    ended = {pod.job_name for pod in facts.pods if pod.terminal}
    strays = tuple(
        SuspendJob(job.name)
        for job in facts.jobs.values()
        if job.name != wanted and job.name not in removed | ended and not job.finished and not job.suspended
    )
    return (*strays, *steps_to_stop(facts)) if over else strays


def pods_of_no_attempt(facts: JobFacts, attempts: Sequence[Attempt]) -> int:
    """Return how many pods still run that belong to no attempt: a TrainingJob of the same offer was deleted before.

    They write where the next attempt would write, so that it has to wait for their end.
    """
    known = {attempt.job_name for attempt in attempts}
    return sum(not pod.terminal and pod.job_name not in known for pod in facts.pods)
