"""Writes the adapter into the output folder: prepared beside it, verified there, then renamed into place."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from taskoffer.api.contract import Clamp, RunConfig
from taskoffer_trainer.checkpoints import ADAPTER_FILE, ADAPTER_FOLDER, Checkpoint, sha256_of, write_json

__all__ = ["Result", "prepared", "publish"]


@dataclass(frozen=True)
class Result:
    """What is known of a finished training: figures in nats per token, and the sample answers."""

    step: int
    total_steps: int
    train_loss: float | None
    eval_loss_before: float
    eval_loss_after: float
    reason: str
    answers: list[dict[str, str]] = field(default_factory=list)
    clamps: tuple[Clamp, ...] = ()
    rows: dict[str, int] = field(default_factory=dict)


@contextlib.contextmanager
def prepared(config: RunConfig, checkpoint: Checkpoint) -> Iterator[Path]:
    """Copy the adapter of a checkpoint into a hidden folder beside its final place, removed at the end.

    The base model is named by its public name, not by the path that it has in the pod.
    """
    folder = Path(config.output_dir) / f".{ADAPTER_FOLDER}.tmp"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        shutil.copyfile(checkpoint.folder / ADAPTER_FILE, folder / ADAPTER_FILE)
        settings = json.loads((checkpoint.folder / "adapter_config.json").read_text(encoding="utf-8"))
        settings["base_model_name_or_path"] = config.model.name
        settings["revision"] = config.model.revision
        settings["inference_mode"] = True
        write_json(folder / "adapter_config.json", settings)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "peft", "trl", "accelerate")}


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in (text or "(nothing)").splitlines())


def _card(config: RunConfig, result: Result) -> str:
    """Render the adapter's card with the front matter that model hubs read."""
    front = [
        "---",
        f"base_model: {json.dumps(config.model.name)}",
        "library_name: peft",
        "pipeline_tag: text-generation",
        "tags:",
        "- lora",
        "- sft",
        "---",
    ]
    train, lora = config.train, config.lora
    held_out = result.rows.get("held_out", 0)
    batch = train.per_device_train_batch_size * train.gradient_accumulation_steps * config.gpus
    body = [
        f"# LoRA adapter for {config.model.name}",
        "",
        f"Supervised fine-tuning on {result.rows.get('train', 0):,} rows: {result.step} of "
        f"{result.total_steps} planned steps with {batch} rows each, rank {lora.r}, alpha "
        f"{lora.lora_alpha}, learning rate {train.learning_rate:g}.",
        "",
        "| held-out loss (nats per token) | before | after |",
        "|---|---|---|",
        f"| {held_out:,} rows | {result.eval_loss_before:.4f} | {result.eval_loss_after:.4f} |",
    ]
    if result.clamps:
        body += ["", "Settings that were changed to fit the model or the machine:", ""]
        body += [
            f"* `{one.field}`: {one.requested} → {one.effective} ({one.reason}) {one.message}" for one in result.clamps
        ]
    for one in result.answers:
        body += ["", f"**{one['prompt']}**", "", "before:", "", _quoted(one["before"])]
        body += ["", "after:", "", _quoted(one["after"])]
    return "\n".join([*front, "", *body]) + "\n"


def publish(config: RunConfig, folder: Path, result: Result) -> tuple[Path, str]:
    """Add card and manifest to a verified folder and rename it into place.

    Returns:
        The final folder and the SHA-256 of the weights.
    """
    (folder / "README.md").write_text(_card(config, result), encoding="utf-8")
    files: dict[str, Any] = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    manifest = {
        "jobName": config.job_name,
        "taskID": config.task_id,
        "attempt": config.attempt,
        "baseModel": {"name": config.model.name, "revision": config.model.revision},
        "reason": result.reason,
        "step": result.step,
        "totalSteps": result.total_steps,
        "trainLoss": result.train_loss,
        "evalLossBefore": result.eval_loss_before,
        "evalLossAfter": result.eval_loss_after,
        "rows": result.rows,
        "sampleAnswers": result.answers,
        "clamps": [clamp.to_wire() for clamp in result.clamps],
        "versions": _versions(),
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
