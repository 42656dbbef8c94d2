"""Settings that change while a run goes on: read from a file, applied between two steps, acknowledged.

The operator writes a request into an annotation of the pod, and the kubelet puts it into a file (the downward
API). The file is read before each step by rank 0; nothing of it can change what is learned.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from taskoffer.api.contract import TUNING_PATH, Tuning

__all__ = ["MicroBatch", "TuningFile", "rest"]


@dataclass
class MicroBatch:
    """How many rows go through the model at once on each GPU.

    Attributes:
        asked: the size that was asked for last.
        unit: the size is a multiple of it (the completions of a prompt under GRPO).
        most: rows that a rank has in a step; more cannot go through at once.
        fits: largest size that memory allowed so far, or ``None`` while nothing was too large.
        most_tokens: tokens that may go through at once, padding counted; ``None`` counts rows alone.
    """

    asked: int
    unit: int = 1
    most: int | None = None
    fits: int | None = None
    most_tokens: int | None = None

    @property
    def size(self) -> int:
        """The size in force: what was asked for, within what there is and what fits, at least one unit."""
        size = min(limit for limit in (self.asked, self.most, self.fits) if limit is not None)
        return max(self.unit, size - size % self.unit)

    def too_large(self, size: int) -> bool:
        """Note that so many rows at once did not fit, and halve; tell whether a smaller size is left."""
        half = size // 2
        self.fits = max(self.unit, half - half % self.unit)
        return size > self.unit

    def cuts(self, rows: int, least: int = 0, lengths: Sequence[int] | None = None) -> list[range]:
        """Cut a rank's rows of a step into pieces of like size, none larger than :attr:`size`.

        Args:
            rows: how many there are.
            least: so many pieces if there are rows for them, even if fewer would do.
            lengths: tokens of each, where a limit of tokens is to be kept; a piece has one unit at least.
        """
        if rows == 0:
            return []
        if self.most_tokens is not None and lengths is not None:
            return self._within_tokens(lengths, self.most_tokens, least)
        units = -(-rows // self.unit)
        pieces = min(units, max(least, -(-units // (self.size // self.unit))))
        borders = [min(rows, units * piece // pieces * self.unit) for piece in range(pieces + 1)]
        return [range(start, end) for start, end in itertools.pairwise(borders)]

    def _within_tokens(self, lengths: Sequence[int], most: int, least: int) -> list[range]:
        """Fill each piece up to the limits; every row counts as long as the longest of its piece."""
        borders, start, widest = [0], 0, 0
        for place in range(0, len(lengths), self.unit):
            end = min(len(lengths), place + self.unit)
            longest = max(lengths[place:end])
            widest = max(widest, longest)
            if place > start and (end - start > self.size or (end - start) * widest > most):
                borders.append(place)
                start, widest = place, longest
        borders.append(len(lengths))
        while len(borders) <= least:
            start, end = max(itertools.pairwise(borders), key=lambda piece: piece[1] - piece[0])
            half = start + (end - start) // 2 // self.unit * self.unit
            if half == start:
                break
            borders = sorted([*borders, half])
        return [range(first, last) for first, last in itertools.pairwise(borders)]


class TuningFile:
    """Reads requests; each generation is handed out once, and what cannot be read is said once."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or Path(os.environ.get("TASKOFFER_TUNING_PATH") or TUNING_PATH)
        self._text = ""
        self._generation = 0

    def read(self) -> Tuning | None:
        """Return a request that is newer than the last one, or ``None``."""
        try:
            text = self.path.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            text = f"cannot be read: {error}"
        if text in ("", self._text):
            return None
        self._text = text
        try:
            asked = Tuning.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"]) or "the request"
            print(f"tuning: {self.path} is left aside: {place}: {first['msg']}", flush=True)
            return None
        if asked.generation <= self._generation:
            return None
        self._generation = asked.generation
        return asked


def rest(worked_seconds: float, duty_cycle: float, stopped: Callable[[], bool]) -> float:
    """Wait after a step so that work takes ``duty_cycle`` (0 to 1] of the time; returns the seconds waited.

    Args:
        worked_seconds: how long the step took.
        duty_cycle: share of the time that is work.
        stopped: asked ten times a second; ends the wait early.
    """
    began = time.monotonic()
    until = began + worked_seconds * (1 / duty_cycle - 1)
    while (left := until - time.monotonic()) > 0 and not stopped():
        time.sleep(min(left, 0.1))
    return time.monotonic() - began
