"""What a trainer that is not ours is started with: the arguments and paths of the historic task market.

Names follow the market's own trainer node (``trainer/image_manager.py`` and ``trainer/utils/training_paths.py`` of
rayonlabs/G.O.D), so that what runs there runs here. ``--model`` and ``--dataset`` carry paths, because the pod has no
network to resolve anything else with.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from taskoffer.api.tasks import DatasetType, GRPOColumns, RewardFunction, TaskType
from taskoffer.api.v1alpha1.model_and_data import Dataset
from taskoffer.api.v1alpha1.taskoffer import Output
from taskoffer.api.v1alpha1.trainingjob import Run
from taskoffer.decision.items import told_format

TASK_NAMES = {
    TaskType.INSTRUCT_TEXT: "InstructTextTask",
    TaskType.CHAT: "ChatTask",
    TaskType.DPO: "DpoTask",
    TaskType.GRPO: "GrpoTask",
    TaskType.IMAGE: "ImageTask",
}
"""What the market calls the task types."""

CHECKPOINTS_DIR = "/app/checkpoints"
MODELS_DIR = "/cache/models"
DATASETS_DIR = "/cache/datasets"

LONGEST_ARGUMENT = 131_071
"""Bytes that Linux lets a single argument have: MAX_ARG_STRLEN, 32 pages of 4096 bytes, less the byte at its end."""


def task_folder(task_id: str) -> str:
    """Return the task's id as the pod is told it; a colon, which no mount path may have, becomes a dash."""
    return task_id.replace(":", "-")


def model_folder(model_name: str) -> str:
    """Return where the base model lies in the pod."""
    return f"{MODELS_DIR}/{model_name.replace('/', '--')}"


def dataset_file(task_type: TaskType, task_id: str) -> str:
    """Return where the data lies in the pod."""
    ending = "tourn.zip" if task_type is TaskType.IMAGE else "train_data.json"
    return f"{DATASETS_DIR}/{task_folder(task_id)}_{ending}"


def repository_name(output: Output | None, job_name: str) -> str:
    """Return the last part of the repository that the result goes to; the job's name where there is none."""
    named = output.repository if output is not None else None
    return named.rpartition("/")[2] if named else job_name


def result_folder(run: Run, job_name: str) -> str:
    """Return where the pod is to leave the result."""
    return f"{CHECKPOINTS_DIR}/{task_folder(run.task_id)}/{repository_name(run.output, job_name)}"


def arguments(run: Run, job_name: str, seconds: int) -> list[str]:
    """Return the arguments of the container.

    Args:
        run: The run.
        job_name: Name of the TrainingJob.
        seconds: What the training has left.
    """
    data = dataset_file(run.task_type, run.task_id)
    given = {"--task-id": task_folder(run.task_id), "--model": model_folder(run.model.name)}
    image = run.dataset.image
    if image is not None:
        kind = run.model.architecture.value if run.model.architecture is not None else ""
        given |= {"--dataset-zip": data, "--model-type": kind}
    else:
        given |= {
            "--dataset": data,
            "--dataset-type": described(run.dataset),
            "--task-type": TASK_NAMES[run.task_type],
            "--file-format": told_format(run.dataset).value,
        }
    given |= {
        "--expected-repo-name": repository_name(run.output, job_name),
        "--hours-to-complete": f"{seconds / 3600:.4f}",
    }
    if image is not None and image.trigger_word is not None:
        given["--trigger-word"] = image.trigger_word
    return [part for pair in given.items() for part in pair]


def described(dataset: Dataset) -> str:
    """Return the description of text data as JSON in the market's names, which are ours in snake_case."""
    columns = {
        DatasetType.INSTRUCT: dataset.instruct,
        DatasetType.CHAT: dataset.chat,
        DatasetType.DPO: dataset.dpo,
        DatasetType.GRPO: dataset.grpo,
        DatasetType.IMAGE: None,
    }[dataset.type]
    if columns is None:
        return "{}"
    made: dict[str, Any] = columns.model_dump(mode="json")
    if isinstance(columns, GRPOColumns):
        made["reward_functions"] = [_reward(number, one) for number, one in enumerate(columns.reward_functions)]
    return json.dumps(made)


def _reward(number: int, reward: RewardFunction) -> dict[str, Any]:
    source = reward.source or ""
    return {
        "reward_id": f"{number}-{reward.name}",
        "reward_func": source,
        "reward_weight": float(reward.weight),
        "func_hash": reward.sha256 or hashlib.sha256(source.encode()).hexdigest(),
        "is_generic": False,
        "is_manual": False,
    }
