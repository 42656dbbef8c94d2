"""The settings that a training runs with: those that fit its GPUs, and what its pod and its clock can bear.

What follows from memory is found in ``decision.fit``, once for all offers that train the same. What is added here
depends on the single offer, so it is worked out when its job is made.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from taskoffer.api.contract import EVAL_FRACTION, EVAL_ROWS_MAX, AdaptiveLR, Clamp, TrainSettings, evaluated_rows_cap
from taskoffer.api.quantity import cores
from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.trainingjob import PodSettings, Settings
from taskoffer.decision.clamping import clamp_of
from taskoffer.decision.fit import Fit

_MOST_LOADERS = 16
"""Processes per GPU beyond which loading does not get faster; the first strategy document asks for 16."""
_MOST_PREFETCH = 4
"""Batches ahead of each process. 16 processes with 8 batches each would hold 128 batches in shared memory."""

_GOOD_EVALUATIONS = 40
"""Evaluations after which it is said what an unbounded factor would come to: 1,000 steps with one every 25."""


class Effective(NamedTuple):
    """Settings that are used, and what was changed of those that were asked for."""

    settings: Settings
    clamps: tuple[Clamp, ...]


def effective_settings(asked: Settings, found: Fit | None, pod: PodSettings, gpus: int, rows: int | None) -> Effective:
    """Return the settings that a job runs with.

    Args:
        asked: What the policy asks for.
        found: How that fits memory; None where the policy does not estimate.
        pod: What the pod gets.
        gpus: Its GPUs.
        rows: Rows of the data, where they are known.
    """
    settings = found.effective if found is not None else asked
    told = found.clamps if found is not None else ()
    train, loaders = _loaders(settings.train, pod)
    train, evaluation = _evaluation(train, gpus, rows)
    clamps = (*told, *loaders, *evaluation, *_average(train), *_adaptive(train))
    return Effective(settings.model_copy(update={"train": train}), clamps)


def _loaders(train: TrainSettings, pod: PodSettings) -> tuple[TrainSettings, list[Clamp]]:
    """Give each loading process a core of the pod, and few batches to prepare ahead."""
    asked, ahead, clamps = train.dataloader_num_workers, train.dataloader_prefetch_factor, []
    room = _MOST_LOADERS if pod.cpu_per_gpu is None else min(_MOST_LOADERS, int(cores(pod.cpu_per_gpu)))
    workers = min(asked, room)
    if workers < asked:
        have = f"the pod has {pod.cpu_per_gpu} CPU(s) per GPU" if room < _MOST_LOADERS else f"{room} are enough"
        message = f"{have}, and each process that loads data wants one"
        clamps.append(
            clamp_of("train.dataloaderNumWorkers", asked, workers, Reason.LOADERS_CLAMPED, message),
        )
    prefetch = None if ahead is None or workers == 0 else min(ahead, _MOST_PREFETCH)
    if ahead is not None and prefetch != ahead:
        message = "without loading processes nothing is prepared ahead"
        if workers:
            message = f"{workers} process(es) with {ahead} batches each would hold {workers * ahead} in shared memory"
        clamps.append(
            clamp_of("train.dataloaderPrefetchFactor", ahead, prefetch or "none", Reason.LOADERS_CLAMPED, message)
        )
    changes = {"dataloader_num_workers": workers, "dataloader_prefetch_factor": prefetch}
    return (train.model_copy(update=changes) if clamps else train), clamps


def _average(train: TrainSettings) -> list[Clamp]:
    """Say that the decay of an average of the weights is a ceiling, where its warm-up is longer than an update."""
    decay = train.ema_decay
    if decay is None:
        return []
    # (1 + n) / (10 + n), the trainer's warm-up, reaches the decay after so many updates.
    updates = math.ceil(round((10 * decay - 1) / (1 - decay), 6))
    if updates <= 1:
        return []
    message = (
        "a constant decay would keep most of the adapter as it was at the beginning; with n updates it is that, and "
        f"{decay:g} after {updates:,}. The average is exported where it is better on held-out data"
    )
    effective = f"(1 + n) / (10 + n), at most {decay:g}"
    return [clamp_of("train.emaDecay", f"{decay:g}", effective, Reason.AVERAGE_WARMED_UP, message)]


_USUAL_BOUNDS = (AdaptiveLR().min, AdaptiveLR().max)


def _adaptive(train: TrainSettings) -> list[Clamp]:
    """Say within what a learning rate follows the held-out loss, where the policy leaves that to the defaults."""
    rule = train.adaptive_lr
    if rule is None or (rule.min, rule.max) != _USUAL_BOUNDS:
        return []
    asked = f"x{rule.increase:g}, x{rule.decrease:g}"
    message = (
        f"after {_GOOD_EVALUATIONS} evaluations that improved, x{rule.increase:g} without a bound would be "
        f"x{rule.increase**_GOOD_EVALUATIONS:.3g}; it follows the held-out loss, x{rule.decrease:g} after "
        f"{rule.patience} evaluations without an improvement"
    )
    effective = f"{asked}, within x{rule.min:g} to x{rule.max:g}"
    return [clamp_of("train.adaptiveLr", asked, effective, Reason.LEARNING_RATE_BOUNDED, message)]


def most_evaluated_rows(train: TrainSettings, gpus: int) -> int:
    """Return how many rows an evaluation may have so that evaluations take a tenth of the time at most."""
    per_step = train.per_device_train_batch_size * train.gradient_accumulation_steps * gpus
    return evaluated_rows_cap(train.eval_steps, per_step)


def _evaluation(train: TrainSettings, gpus: int, rows: int | None) -> tuple[TrainSettings, list[Clamp]]:
    """Hold out no more rows than evaluations have the time for."""
    asked, most = train.eval_rows_max or EVAL_ROWS_MAX, most_evaluated_rows(train, gpus)
    held_out = asked if rows is None else min(asked, math.ceil(rows * EVAL_FRACTION))
    if held_out <= most:
        return train, []
    per_step = train.per_device_train_batch_size * train.gradient_accumulation_steps * gpus
    message = (
        f"an evaluation every {train.eval_steps} steps of {per_step} rows takes a tenth of the time with {most} rows; "
        f"{held_out} would take more"
    )
    clamp = clamp_of("train.evalRowsMax", asked, most, Reason.EVALUATION_CLAMPED, message)
    return train.model_copy(update={"eval_rows_max": most}), [clamp]
