"""Gentler settings for another attempt, after one that failed for what its settings ask of the machine.

A run that ran out of memory with the smallest piece, could not be compiled, lost its gradients or broke for a reason
that nobody knows goes on from its last checkpoint with a gentler profile. The profiles add up, and never change the
shape of the adapter:

1. no compilation, no dropout (which costs more than half of the activations again), few loading processes;
2. the smallest piece at once, and attention in its plainest form, unless memory was all that lacked: that form holds a
   number for every pair of tokens and takes more of it (1 x 2,048 tokens through two small layers on a CPU: 830 MB
   instead of 390);
3. half of the learning rate, which then follows nothing, and no average of the weights.

Which one comes next follows from the failure, because a job has three attempts as a rule and the profile that helps
must be among them: a lack of memory goes to the second at once, gradients that are not finite to the third, and what
could not be compiled or broke without a reason of its own to the next one. After that each failure goes one further.

The number is kept in the checkpoint folder by the trainer itself. A stop by a signal does not raise it, and neither
does the loss of a node, after which nothing of the trainer is left to raise it. Nor is there anything left where the
kernel kills a whole container for lack of memory, as it may with cgroups v2; but that the kubelet has seen,
and the operator tells the next attempt of it.
"""

from __future__ import annotations

from collections.abc import Callable

from taskoffer.api.contract import Clamp, ExitCode, RunConfig, Termination
from taskoffer_trainer.checkpoints import kept_so_far, read_run, write_run
from taskoffer_trainer.failures import INTERNAL_ERROR, KILLED

__all__ = [
    "COMPILE_FAILED",
    "GRADIENTS_NOT_FINITE",
    "LAST_PROFILE",
    "LOWER_RATE",
    "OUT_OF_MEMORY",
    "SMALLEST_PIECE",
    "TOO_MANY_ROWS",
    "keeps_attention",
    "lowered",
    "note_end",
    "note_kills",
    "profile_of",
]

COMPILE_FAILED = "CompileFailed"
"""The model could not be compiled."""
GRADIENTS_NOT_FINITE = "GradientsNotFinite"
"""The gradients of too many steps in a row were not finite."""
OUT_OF_MEMORY = "OutOfMemory"
"""Not even the smallest piece of a step fits into memory."""
TOO_MANY_ROWS = "TooManyRowsAtOnce"
"""A piece of a step does not fit into memory, and the next attempt takes smaller ones by itself."""
LAST_PROFILE = 3
SMALLEST_PIECE = 2
"""The profile from which on as few rows as possible go through the model at once."""
LOWER_RATE = 3
"""The profile from which on the learning rate is half of what was asked for."""
_ASKED_FOR = frozenset({130, int(ExitCode.STOPPED)})
"""Ends of a rank that somebody has asked for with a signal."""
_ATTENTION = "train.attnImplementation"
_LOADERS = 2
"""Loading processes for each GPU that a profile leaves."""


def profile_of(config: RunConfig) -> int:
    """Return the profile that the checkpoint folder asks for, 0 without a failure."""
    return min(LAST_PROFILE, int(read_run(config).get("profile", 0)))


def keeps_attention(config: RunConfig) -> bool:
    """Tell whether nothing but lack of memory has made the settings gentler so far."""
    return _short_of_memory(read_run(config).get("fallbacks", []))


def _short_of_memory(fallbacks: list[dict[str, object]]) -> bool:
    def lacked(one: dict[str, object]) -> bool:
        return one.get("reason") == OUT_OF_MEMORY or one.get("exitCode") == ExitCode.KILLED

    return bool(fallbacks) and all(map(lacked, fallbacks))


def lowered(config: RunConfig, profile: int, keep_attention: bool = False) -> tuple[RunConfig, tuple[Clamp, ...]]:
    """Return the settings with all profiles up to this one, and what they changed.

    Args:
        config: what was asked for.
        profile: the last profile.
        keep_attention: attention stays as it was asked for.
    """
    clamps: list[Clamp] = []
    attention = config.train.attn_implementation
    for number in range(1, profile + 1):
        config, changed = _PROFILES[number](config)
        for field, requested, effective in changed:
            if requested != effective and not (keep_attention and field == _ATTENTION):
                clamps.append(_clamp(number, field, requested, effective))
    if keep_attention:
        train = config.train.model_copy(update={"attn_implementation": attention})
        config = config.model_copy(update={"train": train})
    return config, tuple(clamps)


def _clamp(number: int, field: str, requested: object, effective: object) -> Clamp:
    return Clamp(
        field=field,
        requested=_said(requested),
        effective=_said(effective),
        reason="FallbackProfile",
        message=f"Profile {number}: an earlier attempt failed with what was asked for, and this one goes on from its "
        "last checkpoint with less.",
    )


def _said(value: object) -> str:
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(value) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else str(value)


_Changes = list[tuple[str, object, object]]


def _first(config: RunConfig) -> tuple[RunConfig, _Changes]:
    train, lora = config.train, config.lora
    workers = min(_LOADERS, train.dataloader_num_workers)
    changes: _Changes = [
        ("train.torchCompile", train.torch_compile, False),
        ("lora.loraDropout", lora.lora_dropout, 0.0),
        ("train.dataloaderNumWorkers", train.dataloader_num_workers, workers),
    ]
    train = train.model_copy(update={"torch_compile": False, "dataloader_num_workers": workers})
    lora = lora.model_copy(update={"lora_dropout": 0.0})
    return config.model_copy(update={"train": train, "lora": lora}), changes


def _second(config: RunConfig) -> tuple[RunConfig, _Changes]:
    """The rows of a step stay; how few of them go through at once, the run itself says (:data:`SMALLEST_PIECE`)."""
    train = config.train
    rows = train.per_device_train_batch_size
    changes: _Changes = [
        ("train.perDeviceTrainBatchSize", rows, "smallest" if rows > 1 else rows),
        ("train.perDeviceEvalBatchSize", train.per_device_eval_batch_size or 1, 1),
        (_ATTENTION, train.attn_implementation, ("eager",)),
    ]
    update = {"attn_implementation": ("eager",), "per_device_eval_batch_size": 1}
    return config.model_copy(update={"train": train.model_copy(update=update)}), changes


def _third(config: RunConfig) -> tuple[RunConfig, _Changes]:
    train = config.train
    half = train.learning_rate / 2
    changes: _Changes = [
        ("train.learningRate", train.learning_rate, half),
        ("train.adaptiveLr", None if train.adaptive_lr is None else "on", None),
        ("train.emaDecay", train.ema_decay, None),
    ]
    update = {"learning_rate": half, "adaptive_lr": None, "ema_decay": None}
    return config.model_copy(update={"train": train.model_copy(update=update)}), changes


_PROFILES: dict[int, Callable[[RunConfig], tuple[RunConfig, _Changes]]] = {1: _first, 2: _second, 3: _third}


def _next_profile(config: RunConfig, profile: int, first: int, keep_attention: bool) -> int | None:
    """Return the next profile from ``first`` on that changes anything, or ``None`` after the last."""
    before = len(lowered(config, profile, keeps_attention(config))[1])
    later = range(max(profile + 1, first), LAST_PROFILE + 1)
    return next((number for number in later if len(lowered(config, number, keep_attention)[1]) > before), None)


def _first_that_helps(termination: Termination) -> int | None:
    """Return the first profile that may mend a failure, or ``None`` for one that gentler settings do not mend.

    A kill of one rank is as a rule one for lack of memory; exit code 138 also stands for a GPU that is not there. A
    fault without a reason of its own may be the machine's, but as well that of a compiled kernel or of a process that
    loads rows.
    """
    code, reason = termination.exit_code, termination.reason
    if code == ExitCode.KILLED:
        return SMALLEST_PIECE
    if code == ExitCode.RESTART:
        return {COMPILE_FAILED: 1, OUT_OF_MEMORY: SMALLEST_PIECE, GRADIENTS_NOT_FINITE: LOWER_RATE}.get(reason)
    return 1 if reason in (INTERNAL_ERROR, KILLED) and code not in _ASKED_FOR else None


def note_kills(config: RunConfig) -> int | None:
    """Raise the profile after earlier attempts that were killed as a whole for lack of memory, each of them once.

    Returns:
        The profile of this attempt where that has changed it, else ``None``.
    """
    raised = None
    for number in config.lacked_memory or ():
        if all(one.get("attempt") != number for one in read_run(config).get("fallbacks", [])):
            newest, _ = kept_so_far(config)
            step = int(newest.rpartition("-")[2]) if newest is not None else 0
            killed = Termination(exit_code=ExitCode.KILLED, reason=OUT_OF_MEMORY, step=step)
            raised = note_end(config.model_copy(update={"attempt": number}), killed) or raised
    return raised


def note_end(config: RunConfig, termination: Termination) -> int | None:
    """Raise the profile after a failure that gentler settings may mend.

    Returns:
        The profile of the next attempt where it has changed, else ``None``.
    """
    first = _first_that_helps(termination)
    if first is None:
        return None
    said: dict[str, object] = {
        "attempt": config.attempt,
        "exitCode": termination.exit_code,
        "reason": termination.reason,
        "step": termination.step,
    }
    fallbacks = [*read_run(config).get("fallbacks", []), said]
    following = _next_profile(config, profile_of(config), first, _short_of_memory(fallbacks))
    if following is None:
        return None
    said["profile"] = following
    write_run(config, {"profile": following, "fallbacks": fallbacks})
    return following
