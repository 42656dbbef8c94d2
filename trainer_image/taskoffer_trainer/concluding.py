"""The end of a run that has trained: what was chosen is verified on a fresh base model and published.

What does not pass is not published, and the next best checkpoint is verified in its place; so that nothing is lost for
a fault of one of them, and nothing is handed over that was not looked at.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import torch

from taskoffer.api.contract import ExitCode, RunState, Termination
from taskoffer_trainer.baseline import Baseline
from taskoffer_trainer.checkpoints import Checkpoint, best_checkpoint, complete_checkpoints, mark_finished, refuse
from taskoffer_trainer.export import Result, prepared, publish
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.figures import as_held_out, metrics_of, peaks
from taskoffer_trainer.learned import NOTHING_LEARNED, has_learned
from taskoffer_trainer.mirror import mirror, remove_provisional, withdraw
from taskoffer_trainer.verify import Verified, check_answers

if TYPE_CHECKING:
    from taskoffer_trainer.course import Course

__all__ = ["concluded"]


def concluded(course: Course, baseline: Baseline, summary: Termination, best: Checkpoint) -> Termination:
    """Publish what was chosen, or the best of the other checkpoints that passes verification.

    The best adapter so far stays in the output folder until then, or until it has failed: then it leaves before that is
    noted, and the next best takes its place. What has failed in an attempt before is verified again only when all have,
    and is not kept meanwhile.

    Args:
        course: the run, whose training has ended.
        baseline: what the base model does.
        summary: how the training has ended.
        best: what was chosen.

    Raises:
        TrainerError: ``VERIFY_FAILED`` with what is wrong with the chosen one, when none has passed.
        StopRequestedError: on a signal; the next attempt comes straight here.
    """
    failures: list[TrainerError] = []
    others = [one for one in complete_checkpoints(course.config) if one.learned and not _same(one, best)]
    left = [one for one in others if one.refused == best.refused]
    before = len(others) - len(left)
    candidate: Checkpoint | None = best
    while candidate is not None:
        try:
            return _published(course, baseline, summary, candidate, before + len(failures))
        except TrainerError as error:
            if error.code is not ExitCode.VERIFY_FAILED:
                raise
            # Made anew, for the traceback of what was caught holds on to the model that was loaded.
            failures.append(TrainerError(error.code, error.reason, error.message))
            withdraw(course.config, candidate)
            refuse(candidate, error.message)
            print(f"train: the adapter of step {candidate.step} is not published: {error.message}", flush=True)
        candidate = best_checkpoint(left) if left else None
        if candidate is not None:
            left.remove(candidate)
            _make_room(course)
            if not candidate.refused:
                mirror(course.config, candidate, course.accompany)
    remove_provisional(course.config)
    raise failures[0]


def _same(one: Checkpoint, other: Checkpoint) -> bool:
    return (one.folder, one.weights) == (other.folder, other.weights)


def _make_room(course: Course) -> None:
    """Let go of the model that was loaded, for only one at a time has to fit."""
    gc.collect()
    if course.device.cuda:
        torch.cuda.empty_cache()


def _check_learned(course: Course, summary: Termination, best: Checkpoint) -> None:
    """Refuse an adapter that changes nothing.

    Raises:
        TrainerError: ``VERIFY_FAILED``.
    """
    if has_learned(best.folder / best.weights):
        return
    skipped = int(course.progress.metrics.get("skipped_steps", 0))
    left_out = f", {skipped} of them left out because their gradients were not finite" if skipped else ""
    raise TrainerError(
        ExitCode.VERIFY_FAILED,
        NOTHING_LEARNED,
        f"after {summary.step} of {summary.total_steps} steps{left_out}, at a peak learning rate of "
        f"{course.config.train.learning_rate:g}, the second matrix of each of the {course.tensors // 2} pairs of the "
        f"adapter is still zero, so that it changes nothing; {course.remedy()}",
    )


def _published(course: Course, baseline: Baseline, summary: Termination, best: Checkpoint, failed: int) -> Termination:
    """Verify one adapter and publish it.

    Args:
        course: the run.
        baseline: what the base model does.
        summary: how the training has ended.
        best: where the adapter is.
        failed: how many better ones did not pass.

    Raises:
        TrainerError: ``VERIFY_FAILED``.
        StopRequestedError: on a signal.
    """
    config, progress = course.config, course.progress
    progress.enter(RunState.VERIFYING)
    with prepared(config, best) as folder:
        _check_learned(course, summary, best)
        verified = course.verify(folder, best)
        check_answers(verified.answers, baseline.answers)
        course.accompany(folder)
        progress.enter(RunState.SAVING)
        final, digest = publish(config, folder, _result(course, baseline, summary, verified))
    change = course.outcome(baseline.figures, verified.figures)
    before = f"; {failed} better by its evaluation did not pass" if failed else ""
    done = summary.model_copy(
        update={
            "message": f"adapter of step {best.step} verified: {change}{before}",
            "eval_loss_after": verified.eval_loss,
            "figures_after": metrics_of(as_held_out(verified.figures)),
            "adapter_dir": str(final),
            "adapter_sha256": digest,
            "training_seconds": progress.took()["training_seconds"],
            **peaks(),
        }
    )
    mark_finished(course.asked, done)
    remove_provisional(config)
    progress.note(**as_held_out(verified.figures))
    progress.enter(RunState.DONE)
    return done


def _result(course: Course, baseline: Baseline, summary: Termination, verified: Verified) -> Result:
    """Return what card and manifest say."""
    pairs = [
        {"prompt": prompt, "before": before, "after": after}
        for prompt, before, after in zip(course.prompts(), baseline.answers, verified.answers, strict=True)
    ]
    return Result(
        summary.step,
        summary.total_steps or summary.step,
        summary.train_loss,
        baseline.figures,
        verified.figures,
        summary.reason,
        answers=pairs,
        clamps=summary.clamps,
        rows=course.counts(),
        details=course.details(),
        in_force=course.progress.in_force,
        candidates=course.candidates,
    )
