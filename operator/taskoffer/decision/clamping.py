"""What is said of settings that could not be taken literally: requested, effective, and why, with the numbers."""

from __future__ import annotations

from collections.abc import Mapping

from taskoffer.api.contract import Clamp, LoraSettings, TrainSettings, checkpoint_bytes
from taskoffer.api.reasons import Reason
from taskoffer.decision.architecture import ModelShape, by_layer
from taskoffer.decision.memory import GIB
from taskoffer.decision.sizing import billions

_SCALE_TOLERANCE = 0.05
"""How far the adapter's scale may move, through rounding alpha, without a word."""


def clamp_of(field: str, requested: object, effective: object, reason: Reason, message: str) -> Clamp:
    """Return a clamp, cut to what the schema takes."""
    return Clamp(
        field=field,
        requested=str(requested),
        effective=str(effective)[:256],
        reason=reason.value,
        message=message[:512],
    )


def rank_clamp(
    shape: ModelShape | None, parameters: int, lora: LoraSettings, rank: int, useful: int, room: str
) -> Clamp | None:
    """Say what becomes of the rank: what each layer can hold of it, where the layers are known, and what fits.

    Args:
        shape: The model's layers; None for a model of pictures.
        parameters: The model's size.
        lora: The adapter that was asked for.
        rank: The rank that it gets.
        useful: The largest rank that a layer can use.
        room: What the useful rank did not fit, for people.
    """
    caps = shape.rank_caps(lora.target_modules) if shape is not None and shape.known else {}
    asked = {layer.module: layer.r for layer in lora.rank_pattern}
    parts = []
    too_wide = _below(caps, asked, lora.r)
    if shape is not None and too_wide:
        pattern = tuple(asked.items())
        literal = billions(shape.adapter_parameters(lora.r, lora.target_modules, pattern=pattern, capped=False))
        size = billions(parameters)
        parts.append(
            f"{by_layer(too_wide)}: half of what each layer can hold; {size} at r {lora.r} would add {literal} "
            "parameters"
        )
    if rank < useful:
        parts.append(f"at r {useful} {room}, at {rank} it does")
    if not parts:
        return None
    lower = {cap: names for cap, names in too_wide.items() if cap < rank or any(name in asked for name in names)}
    effective = ", ".join(part for part in (str(rank) if rank < lora.r else "", by_layer(lower)) if part)
    return clamp_of("lora.r", lora.r, effective, Reason.RANK_CLAMPED, f"r {lora.r} → {'; '.join(parts)}")


def _below(caps: Mapping[int, tuple[str, ...]], asked: Mapping[str, int], rank: int) -> dict[int, tuple[str, ...]]:
    """Return the caps that are below what was asked for their layers, and those layers."""
    found = {cap: tuple(n for n in names if cap < asked.get(n, rank)) for cap, names in caps.items()}
    return {cap: names for cap, names in found.items() if names}


def scale_clamp(asked: LoraSettings, lora: LoraSettings, exact: float) -> Clamp | None:
    """Say that alpha could not follow the rank, where the adapter's scale moves by more than a twentieth."""
    if abs(lora.lora_alpha / exact - 1) <= _SCALE_TOLERANCE:
        return None
    message = f"alpha is a whole number of at least 1; {exact:.3g} would keep the adapter's scale at r {lora.r}"
    return clamp_of("lora.loraAlpha", asked.lora_alpha, lora.lora_alpha, Reason.RANK_CLAMPED, message)


def targets_clamp(asked: LoraSettings, lora: LoraSettings, experts: bool) -> Clamp | None:
    """Say that all linear layers are adapted, because the model has no layers of the names that were listed."""
    if asked.target_modules == lora.target_modules:
        return None
    why = "keeps the weights of its experts under other names" if experts else "calls its layers otherwise"
    message = f"the model {why}: the listed ones would leave most of it untrained, or be refused"
    before, now = asked.target_modules[:256], lora.target_modules
    return clamp_of("lora.targetModules", before, now, Reason.TARGETS_CLAMPED, message)


def dropout_clamp(asked: LoraSettings, lora: LoraSettings) -> Clamp | None:
    """Say that a mixture of experts gets no dropout."""
    if asked.lora_dropout == lora.lora_dropout:
        return None
    message = "PEFT wraps the weights of experts themselves, and refuses dropout there"
    return clamp_of(
        "lora.loraDropout", f"{asked.lora_dropout:g}", f"{lora.lora_dropout:g}", Reason.DROPOUT_UNSUPPORTED, message
    )


def batch_clamp(asked: TrainSettings, train: TrainSettings, what: str, need: float, limit: float) -> Clamp | None:
    """Say what becomes of the micro-batch, and that accumulation keeps the step.

    Args:
        asked: The settings that were asked for.
        train: Those that fit.
        what: What a row is, for people.
        need: Bytes that the micro-batch would take on each GPU.
        limit: Bytes that there are.
    """
    before, rows = asked.per_device_train_batch_size, train.per_device_train_batch_size
    if rows == before:
        return None
    steps, per_step = train.gradient_accumulation_steps, before * asked.gradient_accumulation_steps
    kept = f"keep {per_step}" if rows * steps == per_step else f"make {rows * steps} of {per_step}"
    message = (
        f"{before} {what} at a time need {need / GIB:.0f} GiB of {limit / GIB:.1f}; {rows} at a time and "
        f"gradientAccumulationSteps {steps} {kept} rows per step and GPU"
    )
    return clamp_of("train.perDeviceTrainBatchSize", before, rows, Reason.BATCH_CLAMPED, message)


def tokens_clamp(asked: TrainSettings, train: TrainSettings, need: float, limit: float) -> Clamp | None:
    """Say what becomes of the bound on the tokens of a micro-batch."""
    before, tokens = asked.per_device_train_max_tokens, train.per_device_train_max_tokens
    if before == tokens:
        return None
    message = (
        f"{before} tokens at a time need {need / GIB:.0f} GiB of {limit / GIB:.1f}; of rows of {train.max_length} "
        f"tokens fewer go together, of shorter ones up to {train.per_device_train_batch_size}"
    )
    return clamp_of("train.perDeviceTrainMaxTokens", before, tokens, Reason.BATCH_CLAMPED, message)


def evaluation_batch_clamp(asked: TrainSettings, train: TrainSettings) -> Clamp | None:
    """Say that evaluations take no more rows at once than training can."""
    before, rows = asked.per_device_eval_batch_size, train.per_device_eval_batch_size
    if before == rows:
        return None
    message = f"an evaluation is planned with the memory of a micro-batch, of which at most {rows} row(s) fit"
    return clamp_of("train.perDeviceEvalBatchSize", before, rows, Reason.BATCH_CLAMPED, message)


def checkpoints_clamp(asked: TrainSettings, train: TrainSettings, adapter: int, volume: int) -> Clamp | None:
    """Say that fewer checkpoints are kept, or that one would not be enough.

    Args:
        asked: The settings that were asked for.
        train: Those that fit.
        adapter: Parameters of the adapter.
        volume: Bytes for checkpoints.
    """
    before, kept = asked.save_total_limit, train.save_total_limit
    if before == kept:
        return None
    message = (
        "the best and the newest checkpoint are kept in any case"
        if before < kept
        else f"{before} checkpoints and one being written take {checkpoint_bytes(adapter, before) / 1e9:.0f} GB of "
        f"{volume / 1e9:.0f}; {kept} and one take {checkpoint_bytes(adapter, kept) / 1e9:.0f} GB"
    )
    return clamp_of("train.saveTotalLimit", before, kept, Reason.CHECKPOINTS_CLAMPED, message)


def sharding_clamp(asked: TrainSettings, train: TrainSettings, gpus: int, why: str) -> Clamp | None:
    """Say that each GPU holds a share of the model, or that it cannot."""
    if asked.fsdp == train.fsdp:
        return None
    if train.fsdp:
        return clamp_of("train.fsdp", "false", "true", Reason.PARAMETERS_SHARED_OUT, why)
    message = "one GPU has nobody to share with" if gpus == 1 else "the trainer of this version cannot do that"
    return clamp_of("train.fsdp", "true", "false", Reason.SHARDING_NOT_SERVED, message)
