"""Writes the adapter into the output folder: prepared beside it, verified there, then renamed into place."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from taskoffer.api.contract import Clamp, RunConfig, TaskType
from taskoffer_trainer.checkpoints import ADAPTER_FILE, ADAPTER_FOLDER, Checkpoint, sha256_of, write_json
from taskoffer_trainer.config import global_batch
from taskoffer_trainer.context import context_of, yarn
from taskoffer_trainer.figures import in_a_cell

__all__ = ["Result", "described", "fill", "prepared", "publish"]


@dataclass(frozen=True)
class Result:
    """What is known of a finished training: figures in nats per token, and the sample answers.

    ``in_force`` says how each technique was done, ``candidates`` the held-out loss of each that could be exported,
    where there was a choice.
    """

    step: int
    total_steps: int
    train_loss: float | None
    figures_before: dict[str, float]
    figures_after: dict[str, float]
    reason: str
    answers: list[dict[str, str]] = field(default_factory=list)
    clamps: tuple[Clamp, ...] = ()
    rows: dict[str, int] = field(default_factory=dict)
    in_force: dict[str, str] = field(default_factory=dict)
    candidates: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    """What only one method has to say."""


@contextlib.contextmanager
def prepared(config: RunConfig, checkpoint: Checkpoint) -> Iterator[Path]:
    """Copy the adapter of a checkpoint into a hidden folder beside its final place, removed at the end."""
    folder = Path(config.output_dir) / f".{ADAPTER_FOLDER}.tmp"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        fill(config, checkpoint, folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fill(config: RunConfig, checkpoint: Checkpoint, folder: Path, link: bool = False) -> None:
    """Put the adapter of a checkpoint into a folder as others load it.

    The base model is named by its public name, not by the path that it has in the pod.

    Args:
        config: the run.
        checkpoint: where the adapter is.
        folder: where it is to be.
        link: give the weights a second name instead of copying them, where the file system can.
    """
    weights, target = checkpoint.folder / checkpoint.weights, folder / ADAPTER_FILE
    if not (link and _linked(weights, target)):
        shutil.copyfile(weights, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())
    settings = json.loads((checkpoint.folder / "adapter_config.json").read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = config.model.name
    settings["revision"] = config.model.revision
    settings["inference_mode"] = True
    write_json(folder / "adapter_config.json", settings)


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:
        # Another file system, or one without links: a copy does.
        return False
    return True


def described(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return size and SHA-256 of each file in a folder.

    Args:
        folder: where the files are.
        known: the SHA-256 of the weights by their file's name, where they were computed already.
    """
    digests = {ADAPTER_FILE: known[ADAPTER_FILE]} if known and ADAPTER_FILE in known else {}
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": digests.get(path.name) or sha256_of(path)}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }


def _versions(config: RunConfig) -> dict[str, str]:
    method = "diffusers" if config.task_type is TaskType.IMAGE else "trl"
    return {name: version(name) for name in ("torch", "transformers", "peft", method, "accelerate")}


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in (text or "(nothing)").splitlines())


_METHODS = {
    TaskType.INSTRUCT_TEXT: ("sft", "Supervised fine-tuning"),
    TaskType.CHAT: ("sft", "Supervised fine-tuning on conversations"),
    TaskType.DPO: ("dpo", "Direct preference optimisation"),
    TaskType.IMAGE: ("text-to-image", "Fine-tuning on pictures"),
    TaskType.GRPO: ("grpo", "Reinforcement with group-relative advantages"),
}
"""Tag and name of each method for the card."""


def _front(config: RunConfig) -> list[str]:
    """Return the front matter that model hubs read."""
    pictures = config.task_type is TaskType.IMAGE
    lines = [
        "---",
        f"base_model: {json.dumps(config.model.name)}",
        f"library_name: {'diffusers' if pictures else 'peft'}",
        f"pipeline_tag: {'text-to-image' if pictures else 'text-generation'}",
        "tags:",
        "- lora",
        f"- {_METHODS[config.task_type][0]}",
    ]
    if config.model.architecture is not None:
        lines.append(f"- {config.model.architecture.value}")
    if config.data.image is not None and config.data.image.trigger_word:
        lines.append(f"instance_prompt: {json.dumps(config.data.image.trigger_word)}")
    return [*lines, "---"]


def _samples(config: RunConfig, result: Result) -> list[str]:
    """Return the answers to the sample prompts, or the pictures, which lie beside the card."""
    show = (lambda name: f"![{name}]({name})") if config.task_type is TaskType.IMAGE else _quoted
    lines = []
    for one in result.answers:
        lines += ["", f"**{one['prompt']}**", "", "before:", "", show(one["before"])]
        lines += ["", "after:", "", show(one["after"])]
    return lines


def _stretching(config: RunConfig) -> list[str]:
    """Say how the base model has to be loaded where YaRN has stretched it here, and not before it was published."""
    context = context_of(config)
    if context.original is None:
        return []
    settings = json.dumps(yarn(config, context.original))
    return [
        "",
        f"The base model's context was stretched from {context.original:,} to {context.positions:,} tokens. Load it "
        f"with `max_position_embeddings` {context.positions} and these keys in its `rope_parameters`, without which "
        f"the adapter does not do what it was verified to do: `{settings}`",
    ]


def _card(config: RunConfig, result: Result) -> str:
    """Render the adapter's card."""
    method = _METHODS[config.task_type][1]
    train, lora = config.train, config.lora
    held_out = result.rows.get("held_out", 0)
    batch = global_batch(config)
    body = [
        f"# LoRA adapter for {config.model.name}",
        "",
        f"{method}, {result.rows.get('train', 0):,} rows: {result.step} of "
        f"{result.total_steps} planned steps with {batch} rows each, rank {lora.r}, alpha "
        f"{lora.lora_alpha}, learning rate {train.learning_rate:g}.",
        "",
        "| held out | before | after |",
        "|---|---|---|",
        *(
            f"| {in_a_cell(name)}, {held_out:,} rows | {result.figures_before[name]:.4f} | {value:.4f} |"
            for name, value in sorted(result.figures_after.items())
        ),
    ]
    body += _stretching(config)
    if result.clamps:
        body += ["", "Settings that were changed to fit the model or the machine:", ""]
        body += [
            f"* `{one.field}`: {one.requested} → {one.effective} ({one.reason}) {one.message}" for one in result.clamps
        ]
    return "\n".join([*_front(config), "", *body, *_samples(config, result)]) + "\n"


def publish(config: RunConfig, folder: Path, result: Result) -> tuple[Path, str]:
    """Add card and manifest to a verified folder and rename it into place.

    Returns:
        The final folder and the SHA-256 of the weights.
    """
    (folder / "README.md").write_text(_card(config, result), encoding="utf-8")
    files = described(folder)
    for name in files:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    manifest = {
        "provisional": False,
        "jobName": config.job_name,
        "taskID": config.task_id,
        "attempt": config.attempt,
        "baseModel": {"name": config.model.name, "revision": config.model.revision},
        "reason": result.reason,
        "step": result.step,
        "totalSteps": result.total_steps,
        "trainLoss": result.train_loss,
        "evalLossBefore": result.figures_before["eval_loss"],
        "evalLossAfter": result.figures_after["eval_loss"],
        "figuresBefore": result.figures_before,
        "figuresAfter": result.figures_after,
        "rows": result.rows,
        **result.details,
        "sampleAnswers": result.answers,
        "clamps": [clamp.to_wire() for clamp in result.clamps],
        "inForce": result.in_force,
        "candidates": result.candidates,
        "versions": _versions(config),
        "files": files,
    }
    write_json(folder / "manifest.json", manifest)
    final = Path(config.output_dir) / ADAPTER_FOLDER
    old = final.with_name(f".{ADAPTER_FOLDER}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    folder.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    return final, str(files[ADAPTER_FILE]["sha256"])
