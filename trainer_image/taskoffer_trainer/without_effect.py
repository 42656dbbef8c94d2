"""Which settings have no effect on a method: they are told as clamps, instead of being taken in silence.

A policy's size class sets them for tasks of all types alike.
"""

from __future__ import annotations

from collections.abc import Iterator

from taskoffer.api.contract import Clamp, RunConfig, TaskType

__all__ = ["without_effect"]

_NOT_PACKED = {
    TaskType.DPO: ("NoPackingInDPO", "The two answers of a pair are compared, and stay rows of their own."),
    TaskType.GRPO: (
        "NoPacking",
        "Completions are drawn while the training runs; there is nothing to pack beforehand.",
    ),
    TaskType.IMAGE: ("NoPacking", "A picture is a row of its own."),
}
_SFT_SMOOTHS = "TRL gives label smoothing up for supervised fine-tuning; it would need all logits of a row at once."
_NOT_SMOOTHED = {
    TaskType.INSTRUCT_TEXT: _SFT_SMOOTHS,
    TaskType.CHAT: _SFT_SMOOTHS,
    TaskType.GRPO: "Rewards are no labels that could be wrong.",
    TaskType.IMAGE: "What is predicted of a picture is no label.",
}


def without_effect(config: RunConfig) -> tuple[Clamp, ...]:
    """List the settings of a run that its method does nothing with."""
    names = ("field", "requested", "effective", "reason", "message")
    return tuple(Clamp(**dict(zip(names, one, strict=True))) for one in _found(config))


def _found(config: RunConfig) -> Iterator[tuple[str, str, str, str, str]]:
    task, train, dropout = config.task_type, config.train, config.lora.lora_dropout
    if dropout > 0 and task is TaskType.DPO:
        message = "The model is compared with itself without adapter, so nothing may be dropped at random."
        yield ("lora.loraDropout", f"{dropout:g}", "0", "NoDropoutInDPO", message)
    if train.packing and task in _NOT_PACKED:
        yield ("train.packing", "true", "false", *_NOT_PACKED[task])
    smoothed = task is TaskType.DPO and train.loss_type.smooths
    if train.label_smoothing > 0 and not smoothed:
        other = f"The loss {train.loss_type.value} has no label smoothing; robust and exo_pair have."
        message = _NOT_SMOOTHED.get(task, other)
        yield ("train.labelSmoothing", f"{train.label_smoothing:g}", "0", "NoLabelSmoothing", message)
    tokens = train.per_device_train_max_tokens
    if tokens is not None and task is TaskType.IMAGE:
        yield ("train.perDeviceTrainMaxTokens", str(tokens), "none", "NoTokens", "Pictures are counted by rows alone.")
