"""Reads the RunConfig and checks all that can be checked before the heavy libraries are loaded."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from taskoffer.api.contract import ExitCode, FileFormat, GRPOSettings, RunConfig, TaskType
from taskoffer_trainer.chat_template import named_template
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.pipelines import check_layout, layout_of
from taskoffer_trainer.rewards import check_rewards

__all__ = ["check_paths", "fingerprint", "global_batch", "identity", "load_config", "problems", "rows_at_once"]


def load_config(path: Path) -> RunConfig:
    """Read and validate a RunConfig.

    Raises:
        TrainerError: ``BAD_CONFIG`` with every offending field by its name on the wire.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise TrainerError(
            ExitCode.BAD_CONFIG,
            "ConfigUnreadable",
            f"the run configuration {path} cannot be read: {error.strerror or error}; name it with --config",
        ) from error
    try:
        config = RunConfig.model_validate_json(text)
    except ValidationError as error:
        raise TrainerError(ExitCode.BAD_CONFIG, "ConfigInvalid", f"{path}: {problems(error)}") from error
    _check_task(config)
    _check_sharing(config)
    return config


_REMEDY = {
    "extra_forbidden": "; this trainer does not know it: is its image (podTemplate.image of the policy) older than the "
    "operator, or the name misspelt?"
}
"""What helps against a kind of mistake, by pydantic's name of it."""


def problems(error: ValidationError, quote: bool = True) -> str:
    """Say what is wrong with each field in one line: ``train.saveSteps: must be a multiple …``.

    Args:
        error: what pydantic found.
        quote: also say what was given; off where that may be a secret, such as a signed address.
    """
    found = []
    for item in error.errors(include_url=False):
        place = ".".join(str(part) for part in item["loc"]) or "the document"
        untold = not quote or item["type"] in ("missing", "json_invalid")
        given = "" if untold else f" (given: {_short(item['input'])})"
        found.append(f"{place}: {item['msg'].removeprefix('Value error, ')}{given}{_REMEDY.get(item['type'], '')}")
    return "; ".join(found)


def _short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


_DATA_OF = {
    TaskType.INSTRUCT_TEXT: ("instruct", '{"fieldInstruction": "question", "fieldOutput": "answer"}'),
    TaskType.CHAT: ("chat", '{"chatColumn": "messages", "chatRoleField": "role", "chatContentField": "content"}'),
    TaskType.DPO: ("dpo", '{"fieldPrompt": "prompt", "fieldChosen": "chosen", "fieldRejected": "rejected"}'),
    TaskType.IMAGE: ("image", '{"resolution": 1024}'),
    TaskType.GRPO: (
        "grpo",
        '{"fieldPrompt": "question", "rewardFunctions": [{"name": "json", "builtin": {"name": "JSONValid"}}]}',
    ),
}
"""The task types that have a method here, with the member of ``data`` that each needs and an example of it."""


def _check_image(config: RunConfig) -> None:
    layout_of(config)
    if config.data.file_format is not FileFormat.ZIP:
        raise TrainerError(
            ExitCode.BAD_CONFIG,
            "ConfigInvalid",
            f"data.fileFormat: pictures come as zip (an archive, or a folder of the same files), not as "
            f"{config.data.file_format.value if config.data.file_format is not None else 'what is found there'}",
        )


def _check_task(config: RunConfig) -> None:
    task = config.task_type.value
    member, example = _DATA_OF[config.task_type]
    if getattr(config.data, member) is None:
        raise TrainerError(
            ExitCode.BAD_CONFIG,
            "ConfigInvalid",
            f"data.{member}: a task of type {task} needs the columns of its data, for example {example}",
        )
    if config.task_type is TaskType.IMAGE:
        _check_image(config)
    elif config.data.file_format is FileFormat.ZIP:
        raise TrainerError(
            ExitCode.BAD_CONFIG,
            "ConfigInvalid",
            f"data.fileFormat: zip holds pictures; {task} reads json, jsonl, csv, parquet or hf",
        )
    if config.task_type is TaskType.CHAT and config.data.chat is not None:
        named_template(config.data.chat.chat_template)
    if config.task_type is TaskType.GRPO:
        _check_grpo(config)


def _check_grpo(config: RunConfig) -> None:
    """Check what of a GRPO task depends on several settings, and its rewards, without running any of them."""
    settings = config.train.grpo or GRPOSettings()
    if settings.max_completion_length >= config.train.max_length:
        raise TrainerError(
            ExitCode.BAD_CONFIG,
            "ConfigInvalid",
            f"train.grpo.maxCompletionLength: {settings.max_completion_length} tokens leave no room for a prompt in "
            f"train.maxLength, which is {config.train.max_length}; set it lower",
        )
    if config.data.grpo is not None:
        check_rewards(config.data.grpo)


def _check_sharing(config: RunConfig) -> None:
    if not config.train.fsdp:
        return
    fault = ""
    if config.gpus == 1:
        fault = "there is nobody to share the parameters with; set gpus to 2 or more, or leave train.fsdp out"
    elif config.task_type is TaskType.IMAGE:
        fault = "a model of pictures is not shared out, it fits one GPU; leave train.fsdp out"
    if fault:
        raise TrainerError(ExitCode.BAD_CONFIG, "ConfigInvalid", f"train.fsdp: {fault}")


def check_paths(config: RunConfig) -> None:
    """Check that model and data are there and that both output folders can be written.

    Raises:
        TrainerError: ``NO_MODEL``, ``BAD_DATA`` or ``BAD_CONFIG``, with the path.
    """
    model = Path(config.model.path)
    if config.task_type is TaskType.IMAGE:
        check_layout(config)
    elif not (model / "config.json").is_file():
        what = "has no config.json" if model.is_dir() else "does not exist"
        raise TrainerError(
            ExitCode.NO_MODEL,
            "ModelMissing",
            f"model.path: {model} {what}; it must hold config.json, the weights and the tokenizer of "
            f"{config.model.name}",
        )
    if not Path(config.data.path).exists():
        raise TrainerError(
            ExitCode.BAD_DATA,
            "DataMissing",
            f"data.path: {config.data.path} does not exist; is the volume mounted?",
        )
    for field, folder in (("outputDir", config.output_dir), ("checkpointDir", config.checkpoint_dir)):
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise TrainerError(
                ExitCode.BAD_CONFIG,
                "FolderNotWritable",
                f"{field}: {folder} cannot be written by user {os.getuid()}: {error.strerror or error}",
            ) from error


def global_batch(config: RunConfig) -> int:
    """Return the rows that an optimizer step learns from, all processes together.

    Under GRPO they are completions, and rounded up to whole groups: a group that is parted has no advantages.
    """
    train = config.train
    rows = train.per_device_train_batch_size * train.gradient_accumulation_steps * config.gpus
    if config.task_type is not TaskType.GRPO:
        return rows
    group = (config.train.grpo or GRPOSettings()).num_generations
    return -(-rows // group) * group


def rows_at_once(config: RunConfig) -> int:
    """Return how many rows of full length may go through a model at once: what memory is planned for.

    Without a limit of tokens that is the micro-batch. A preference pair is two sequences.
    """
    train = config.train
    rows, tokens = train.per_device_train_batch_size, train.per_device_train_max_tokens
    if tokens is None or config.task_type is TaskType.IMAGE:
        return rows
    return min(rows, max(1, tokens // (train.max_length * (2 if config.task_type is TaskType.DPO else 1))))


_FREE = (
    "per_device_train_batch_size",
    "per_device_train_max_tokens",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "attn_implementation",
    "fsdp",
    "dataloader_num_workers",
    "dataloader_prefetch_factor",
    "ddp_bucket_cap_mb",
    "save_total_limit",
    "keep_checkpoints",
    "reserve_minutes",
)
"""Settings that can change from one attempt to the next: nothing of what is learned depends on them."""
_FREE_OF_GRPO = ("reward_call_seconds", "reward_memory_bytes", "reward_failures")
"""The same of GRPO's settings."""


def identity(config: RunConfig) -> dict[str, object]:
    """Return what a checkpoint depends on: two runs with the same identity can continue each other.

    The number of processes and of rows that go through a model at once do not count, only their product does. Nor does
    how the data is said to be stored: that is found out where it is not said, of the same files under the same path.
    """
    said = config.model_dump(mode="json", by_alias=True, include={"task_type", "model", "data", "lora"})
    said["data"].pop("fileFormat", None)
    if config.model.yarn_factor is None:
        # Absent as it was before there was such a setting, so that runs of that time go on.
        said["model"].pop("yarnFactor")
    free: dict[str, Any] = {**dict.fromkeys(_FREE, True), "grpo": set(_FREE_OF_GRPO)}
    train = config.train.model_dump(mode="json", by_alias=True, exclude=free)
    return {**said, "train": train, "globalBatch": global_batch(config)}


def fingerprint(config: RunConfig) -> str:
    """Return the SHA-256 of :func:`identity` as hexadecimal digits."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()
