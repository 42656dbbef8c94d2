"""The ladder: which rung a test is of, and what is said of all rungs at the end, also when several runs climbed it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

RUNGS = ("unit", "kmock", "lab", "apiserver", "chaos", "trainer", "node")
TESTS = Path(__file__).parent
EARLIER = "TASKOFFER_EARLIER_RUNGS"
"""Environment variable: a file with what earlier runs of the same climb have counted, to which each run adds."""

LONG = (
    *("training", "launcher", "images", "sharing", "stop_and_resume", "kill_moments", "live_tuning", "prepare_faults"),
    *("killed", "grpo", "preferences", "submit_results", "attempts", "dpo_losses", "grpo_losses", "techniques"),
    *("sandbox", "denoising", "effective", "evaluating", "prepare_git", "prepare_sources", "refusals", "grpo_faults"),
)
"""Test files of the trainer that take longest, the longest first."""


def rung_of(path: Path) -> str | None:
    """Return the rung of a test file, None for one outside of all rungs."""
    parts = path.relative_to(TESTS).parts if path.is_relative_to(TESTS) else ()
    return parts[0] if parts and parts[0] in RUNGS else None


def height(path: Path) -> int:
    """Return where on the ladder a test file stands; what is on no rung comes first."""
    rung = rung_of(path)
    return RUNGS.index(rung) if rung else -1


def turn(path: Path) -> int:
    """Return the place of a file among those that several processes share: none shall be left with a long one."""
    name = path.stem.removeprefix("test_")
    return LONG.index(name) if name in LONG else len(LONG)


class Climb:
    """Outcomes of tests, counted by rung, and why a rung was skipped."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Counter[str]] = {rung: Counter() for rung in RUNGS}
        self.reasons: dict[str, str] = {}

    def add_earlier(self, file: Path) -> None:
        """Add what earlier runs have left in the file, and leave there what they and this one have counted."""
        if file.exists():
            said = json.loads(file.read_text())
            for rung, counts in said["outcomes"].items():
                self.outcomes[rung].update(counts)
            self.reasons = said["reasons"] | self.reasons
        file.write_text(json.dumps({"outcomes": self.outcomes, "reasons": self.reasons}))

    def line(self) -> str:
        """Return which rungs ran, and with what outcome."""
        return "rungs: " + " · ".join(self._said(rung) for rung in RUNGS)

    def _said(self, rung: str) -> str:
        counts = self.outcomes[rung]
        ran = counts["passed"] + counts["failed"]
        if rung in self.reasons:
            return f"{rung} SKIPPED: {self.reasons[rung]}"
        if not ran:
            return f"{rung} not run" if not counts["skipped"] else f"{rung} skipped ({counts['skipped']} tests)"
        details: Sequence[str] = [f"{counts[key]} {key}" for key in ("failed", "skipped") if counts[key]]
        return f"{rung} ran ({', '.join((f'{ran} tests', *details))})"
