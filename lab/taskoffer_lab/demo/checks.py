"""What makes the demo fail: an answer that is not the meant one, or an adapter that is not what it claims."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskoffer_lab.demo.follow import Seen
from taskoffer_lab.demo.rows import Row
from taskoffer_lab.demo.script import LOSS_MARGIN, OUTPUTS_CLAIM, WAITING, Example

OUTPUT_MOUNT = "/data/output"
"""Where a trainer's pod has the output claim."""

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """An adapter as its TrainingJob describes it.

    Attributes:
        offer: Name of the offer.
        model: Name of the base model in the offer.
        folder: Where it is on the host.
        sha256: Of the weights.
        loss_before: Held-out loss of the base model by the trainer, in nats per token.
        loss_after: The same with the adapter.
        task: Type of the task.
    """

    offer: str
    model: str
    folder: Path
    sha256: str
    loss_before: float
    loss_after: float
    task: str = "InstructText"

    @property
    def fall(self) -> float:
        """By which share the loss fell."""
        return 1 - self.loss_after / self.loss_before


def adapters_of(jobs: Sequence[Mapping[str, Any]], outputs: Path) -> tuple[list[Adapter], list[str]]:
    """Return the adapters that TrainingJobs claim to have made, and what their claims lack."""
    found, problems = [], []
    for job in jobs:
        offer = str(job["spec"]["offerRef"]["name"])
        run, result = job["spec"]["run"], (job.get("status") or {}).get("result") or {}
        lacking = [name for name in ("adapterPath", "sha256", "evalLossBefore", "evalLossAfter") if name not in result]
        if lacking:
            problems.append(f"{offer}: status.result of its TrainingJob lacks {', '.join(lacking)}")
            continue
        inside = Path(result["adapterPath"])
        if not inside.is_relative_to(OUTPUT_MOUNT):
            problems.append(f"{offer}: its adapter is at {inside}, not on the claim {OUTPUTS_CLAIM}")
            continue
        found.append(
            Adapter(
                offer=offer,
                model=str(run["model"]["name"]),
                folder=outputs / inside.relative_to(OUTPUT_MOUNT),
                sha256=str(result["sha256"]),
                loss_before=float(result["evalLossBefore"]),
                loss_after=float(result["evalLossAfter"]),
                task=str(run["taskType"]),
            )
        )
    return sorted(found, key=lambda adapter: adapter.offer), problems


def check_files(adapter: Adapter) -> list[str]:
    """Return what is wrong with an adapter's files, by what is on disk and not by what was said."""
    weights, settings = adapter.folder / WEIGHTS, adapter.folder / "adapter_config.json"
    for path in (weights, settings):
        if not path.is_file():
            return [f"{adapter.offer}: {path} is missing"]
    problems = []
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != adapter.sha256:
        problems.append(f"{adapter.offer}: {weights} has SHA-256 {digest}, its TrainingJob says {adapter.sha256}")
    content = json.loads(settings.read_text(encoding="utf-8"))
    if content.get("peft_type") != "LORA":
        problems.append(f"{adapter.offer}: {settings} has peft_type {content.get('peft_type')!r}, not LORA")
    if content.get("base_model_name_or_path") != adapter.model:
        base = content.get("base_model_name_or_path")
        problems.append(f"{adapter.offer}: {settings} names the base model {base!r}, not {adapter.model!r}")
    return problems


def check_losses(offer: str, before: float, after: float, what: str, margin: float = LOSS_MARGIN) -> list[str]:
    """Return a problem unless a loss fell by the margin."""
    if before > 0 and after <= (1 - margin) * before:
        return []
    return [f"{offer}: {what} went from {before:.4f} to {after:.4f}; it must fall by {margin:.0%} at least"]


def check_answers(examples: Sequence[Example], seen: Seen, capacity: int) -> list[str]:
    """Return each example that did not get the answer that it is meant to get.

    Args:
        examples: What was applied.
        seen: What was observed.
        capacity: GPUs of all nodes; only where the examples want more does one have to wait.
    """
    rows = {row.name: row for row in seen.ended}
    problems = []
    for example in examples:
        row = rows.get(example.name)
        problems += [f"{example.name}: it is not there"] if row is None else _check_row(example, row)
    trained = [example for example in examples if example.expected.gpus is not None]
    for example in trained:
        held = seen.gpus.get(example.name)
        if held is not None and held != example.expected.gpus:
            problems.append(f"{example.name}: its pod held {held} GPUs, meant are {example.expected.gpus}")
    wanted = {example.expected.gpus for example in trained}
    missing = wanted - set(seen.gpus.values())
    if missing:
        problems.append(f"no running pod was seen with {', '.join(map(str, sorted(filter(None, missing))))} GPUs")
    total = sum(example.expected.gpus or 0 for example in trained)
    if total > capacity and not seen.waited(WAITING):
        problems.append(f"no offer was seen waiting with {WAITING} and admitted later, with {total} GPUs wanted")
    return problems


def _check_row(example: Example, row: Row) -> list[str]:
    expected = example.expected
    if expected.refusal is not None:
        if (row.verdict, row.reason) == ("Reject", expected.refusal):
            return []
        return [f"{row.name}: the answer is {row.verdict} {row.reason}, meant is Reject {expected.refusal}"]
    if row.verdict == "Admit" and row.state == "Succeeded" and row.gpus == expected.gpus:
        return []
    answer = f"{row.verdict} {row.reason}, {row.gpus} GPUs, training {row.state or 'not begun'}"
    return [f"{row.name}: {answer}; meant is a trained adapter on {expected.gpus} GPUs. {row.message}".strip()]
