"""Campaigns: tests that attack the operator at many moments, drawn from a seed that is printed.

``make test`` runs a short sample of each, always the same one; ``make chaos`` runs the whole, with another seed each
time. ``TASKOFFER_CHAOS_SEED`` repeats a run as exactly as the machine allows it: the faults and their places are drawn
from the seed, the scheduling is not.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

WHOLE = os.environ.get("TASKOFFER_CHAOS") == "whole"
"""Whether the campaigns run in full length."""


_SAMPLE_SEED = 811_075
"""What ``make test`` draws from: a change is to be judged by what it changes."""


def _base_seed() -> int:
    given = os.environ.get("TASKOFFER_CHAOS_SEED")
    if given:
        return int(given)
    return random.SystemRandom().randrange(1_000_000) if WHOLE else _SAMPLE_SEED


BASE_SEED = _base_seed()


@dataclass
class Campaign:
    """One campaign: its randomness, and what is counted while it runs.

    Args:
        name: Names it in the report; its randomness depends on this and on the run's seed.
    """

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    _started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.random = random.Random(f"{BASE_SEED}/{self.name}")
        # What a library needs is a number.
        self.seed = int.from_bytes(hashlib.sha256(f"{BASE_SEED}/{self.name}".encode()).digest()[:4])

    @staticmethod
    def size(sample: int, whole: int) -> int:
        """Return how many rounds to run: the sample's or the whole campaign's."""
        return whole if WHOLE else sample

    def report(self) -> str:
        """Return one line: the seed, what was counted and how long it took."""
        seconds = time.monotonic() - self._started
        counted = ", ".join(f"{count} {what}" for what, count in sorted(self.counts.items()))
        return f"{self.name}: seed {BASE_SEED}, {counted}, {seconds:.0f} s"

    def record(self, outcome: str) -> None:
        """Append what was counted to the file that ``TASKOFFER_CHAOS_REPORT`` names, one JSON object per line."""
        target = os.environ.get("TASKOFFER_CHAOS_REPORT")
        if not target:
            return
        row = {
            "campaign": self.name,
            "seed": BASE_SEED,
            "whole": WHOLE,
            "outcome": outcome,
            "seconds": round(time.monotonic() - self._started, 1),
            **self.counts,
        }
        with Path(target).open("a") as file:
            file.write(json.dumps(row) + "\n")
