"""Reads the RunConfig and checks all that can be checked before the heavy libraries are loaded."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

from pydantic import ValidationError

from taskoffer.api.contract import ExitCode, FileFormat, RunConfig, TaskType
from taskoffer_trainer.failures import TrainerError

__all__ = ["check_paths", "fingerprint", "identity", "load_config"]


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
        raise TrainerError(ExitCode.BAD_CONFIG, "ConfigInvalid", f"{path}: {_problems(error)}") from error
    _check_task(config)
    return config


def _problems(error: ValidationError) -> str:
    """Say what is wrong with each field in one line: ``train.saveSteps: must be a multiple …``."""
    found = []
    for item in error.errors(include_url=False):
        place = ".".join(str(part) for part in item["loc"]) or "the document"
        given = "" if item["type"] in ("missing", "json_invalid") else f" (given: {_short(item['input'])})"
        found.append(f"{place}: {item['msg'].removeprefix('Value error, ')}{given}")
    return "; ".join(found)


def _short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_task(config: RunConfig) -> None:
    if config.task_type is not TaskType.INSTRUCT_TEXT:
        raise TrainerError(
            ExitCode.BAD_CONFIG,
            "TaskTypeNotServed",
            f"taskType: {config.task_type.value} is not served by this trainer; it serves InstructText",
        )
    if config.data.instruct is None:
        raise TrainerError(
            ExitCode.BAD_CONFIG,
            "ConfigInvalid",
            "data.instruct: a task of type InstructText needs the columns of its data, for example "
            '{"fieldInstruction": "question", "fieldOutput": "answer"}',
        )
    if config.data.file_format is FileFormat.ZIP:
        raise TrainerError(
            ExitCode.BAD_CONFIG,
            "ConfigInvalid",
            "data.fileFormat: zip holds pictures; InstructText reads json, jsonl, csv or parquet",
        )


def check_paths(config: RunConfig) -> None:
    """Check that model and data are there and that both output folders can be written.

    Raises:
        TrainerError: ``NO_MODEL``, ``BAD_DATA`` or ``BAD_CONFIG``, with the path.
    """
    model = Path(config.model.path)
    if not (model / "config.json").is_file():
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


def identity(config: RunConfig) -> dict[str, object]:
    """Return what a checkpoint depends on: two runs with the same identity can continue each other.

    The number of processes counts, because it decides which rows share a step.
    """
    return config.model_dump(
        mode="json", by_alias=True, include={"task_type", "gpus", "model", "data", "lora", "train"}
    )


def fingerprint(config: RunConfig) -> str:
    """Return the SHA-256 of :func:`identity` as hexadecimal digits."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()
