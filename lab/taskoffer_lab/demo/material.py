"""What the demo trains with: tiny models, rows of real text, drawn pictures, and rows that are kept for the exam."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from taskoffer_lab.demo.script import EXAM_ROWS, MODELS
from taskoffer_lab.fixtures import (
    DATASET_NAME,
    KINDS,
    PREFERENCES_NAME,
    SHAPES_NAME,
    TALKS_NAME,
    build_chat_dataset,
    build_instruct_dataset,
    build_preference_dataset,
    build_shapes,
    build_tiny_model,
    build_tiny_pipeline,
    pipeline_folder,
)
from taskoffer_lab.fixtures.datasets import instruct_rows
from taskoffer_lab.paths import cache_root

KEPT_RUNS = 3
"""How many runs' outputs are kept on the host."""


@dataclass(frozen=True)
class Material:
    """Folders on the host.

    Attributes:
        root: Their parent in the cache.
    """

    root: Path

    @property
    def models(self) -> Path:
        """One folder per model."""
        return self.root / "models"

    @property
    def data(self) -> Path:
        """The data that trainers see."""
        return self.root / "data"

    @property
    def exam(self) -> Path:
        """JSON lines of the rows that no trainer sees."""
        return self.root / "exam.jsonl"

    @property
    def outputs(self) -> Path:
        """One folder per run of the demo."""
        return self.root / "outputs"


def material() -> Material:
    """Return where the demo's material is; it need not be there yet."""
    return Material(cache_root() / "demo")


def build_material(target: Material) -> None:
    """Build what is missing: some seconds at the first time, a fraction of one later.

    The data are all rows but the last `EXAM_ROWS`; those go into the exam.
    """
    rows = instruct_rows()
    seen = len(rows) - EXAM_ROWS
    build_instruct_dataset(target.data / DATASET_NAME, rows=seen)
    build_chat_dataset(target.data / TALKS_NAME, rows=seen // 2)  # A conversation is made of two rows.
    build_preference_dataset(target.data / PREFERENCES_NAME, rows=seen)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[-EXAM_ROWS:])
    partial = target.exam.with_suffix(".tmp")
    partial.write_text(lines, encoding="utf-8")
    partial.replace(target.exam)
    for seed, model in enumerate(MODELS):
        print(f"model {model.folder}")
        build_tiny_model(target.models / model.folder, model.family, seed, hidden_size=model.hidden_size)
    build_shapes(target.data / SHAPES_NAME)
    for kind in KINDS:
        print(f"model {pipeline_folder(kind)}")
        build_tiny_pipeline(target.models / pipeline_folder(kind), kind)


def new_outputs(target: Material, run: str) -> Path:
    """Return a path for this run's outputs, and remove those of the oldest runs."""
    if target.outputs.is_dir():
        oldest_first = sorted(target.outputs.iterdir(), key=lambda folder: folder.stat().st_mtime)
        for old in oldest_first[: max(0, len(oldest_first) - KEPT_RUNS + 1)]:
            shutil.rmtree(old)
    return target.outputs / run
