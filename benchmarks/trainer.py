"""Our supervised fine-tuning against the plain TRL recipe: the same model, rows, global batch, length and seed.

Pairs of runs are made in turn, each run in a process of its own with one thread. Taken are the CPU time of a step (the
median over the pairs, and the ratio within each pair, which holds when the machine is busy), the loss at the end, and
what our callbacks take of a step.

    python benchmarks/trainer.py --pairs 5 --steps 120
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, median
from typing import Any

from taskoffer_trainer.launcher import ALLOCATOR

LAST = 20
"""Steps at the end over which the loss is averaged."""


def run(kind: str, given: dict[str, Any]) -> dict[str, Any]:
    """Run one training and return what it measured."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env["TOKENIZERS_PARALLELISM"] = "false"
    if kind == "ours":
        # As the launcher starts a rank.
        env.update(ALLOCATOR)
    script = Path(__file__).with_name("trainer_run.py")
    with tempfile.TemporaryDirectory() as folder:
        asked = json.dumps({**given, "kind": kind, "folder": folder})
        done = subprocess.run(
            [sys.executable, str(script), asked], env=env, capture_output=True, text=True, check=False
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith("result ")]
    if done.returncode != 0 or not lines:
        raise SystemExit(
            f"{kind} failed with exit code {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        )
    found: dict[str, Any] = json.loads(lines[0].removeprefix("result "))
    return found


def main() -> int:
    """Run the pairs and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="pairs of runs (default 5)")
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of a run (default 120)")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step (default 8)")
    options = parser.parse_args()
    from taskoffer_lab.fixtures import build_instruct_dataset, build_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        build_tiny_model(root / "model", "llama", hidden_size=128)
        build_instruct_dataset(root / "data", rows=400)
        given = {
            "model": str(root / "model"),
            "data": str(root / "data" / "train.jsonl"),
            "steps": options.steps,
            "batch": options.batch,
            "learning_rate": 0.002,
            "max_length": 160,
            "seed": 42,
        }
        pairs = []
        for number in range(options.pairs):
            order = ("plain", "ours") if number % 2 == 0 else ("ours", "plain")
            pairs.append({kind: run(kind, given) for kind in order})
            print(f"pair {number + 1} of {options.pairs} done", file=sys.stderr, flush=True)
    print(table(pairs))
    return 0


def table(pairs: list[dict[str, dict[str, Any]]]) -> str:
    """Return the figures of all pairs as a table."""

    def steps(kind: str, figure: str) -> list[float]:
        return [1000 * pair[kind][figure] for pair in pairs]

    def loss(kind: str) -> list[float]:
        return [mean(pair[kind]["losses"][-LAST:]) for pair in pairs]

    ratios = [pair["plain"]["cpu_per_step"] / pair["ours"]["cpu_per_step"] for pair in pairs]
    shares = [100 * pair["ours"]["callbacks_per_step"] / pair["ours"]["cpu_per_step"] for pair in pairs]
    rows = [
        ("figure", "plain TRL", "ours"),
        ("---", "---", "---"),
        (
            "CPU of a step, ms, median",
            f"{median(steps('plain', 'cpu_per_step')):.1f}",
            f"{median(steps('ours', 'cpu_per_step')):.1f}",
        ),
        (
            "throughput, ratio in a pair, median (range)",
            "1",
            f"{median(ratios):.2f} ({min(ratios):.2f} – {max(ratios):.2f})",
        ),
        (
            f"training loss, mean of the last {LAST} steps",
            f"{median(loss('plain')):.4f}",
            f"{median(loss('ours')):.4f}",
        ),
        ("our callbacks, share of a step's CPU", "", f"{median(shares):.1f} %"),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
