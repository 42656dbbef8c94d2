"""Random traces of tasks, for the search for the best schedule.

Sizes, hours and patience are those of a small market of fine-tuning tasks: 0.3 to 6 hours on the fewest GPUs that a
model of that size needs, five minutes to start, a patience around one hour, and more earned by longer and larger ones.
"""

from __future__ import annotations

import math
import random

from taskoffer.simulation.task import Task

SIZES = ((1.5, 1, 30), (3.0, 1, 20), (7.0, 2, 25), (13.0, 2, 12), (34.0, 4, 9), (70.0, 8, 4))
"""Billions of parameters, the fewest GPUs, and how many of a hundred tasks are of this size."""
START_SECONDS = 300.0


def trace(count: int, load: float, seed: int = 0, gpus: int = 8) -> list[Task]:
    """Return tasks by arrival that ask, at their thriftiest, for ``load`` times what ``gpus`` GPUs can do meanwhile."""
    dice = random.Random(seed)
    drafts = []
    for _ in range(count):
        billions, least, _ = dice.choices(SIZES, [share for *_, share in SIZES])[0]
        hours = math.exp(dice.uniform(math.log(0.3), math.log(6)))
        counts = [n for n in (1, 2, 4, 8) if least <= n <= gpus]
        seconds = {n: START_SECONDS + 3600 * hours * (least / n) ** 0.93 for n in counts}
        drafts.append((billions, hours, seconds))
    thriftiest = sum(min((n * took for n, took in seconds.items()), default=0.0) for *_, seconds in drafts)
    arrivals = sorted(dice.uniform(0, thriftiest / (load * gpus)) for _ in drafts)
    return [
        Task(
            name=f"t{n:04}",
            arrival=arrival,
            last_start=arrival + 3600 * math.exp(dice.gauss(0, 0.7)),
            worth=2 * math.sqrt(hours * billions) * dice.uniform(0.15, 0.35),
            seconds_by_gpus=seconds,
        )
        for n, (arrival, (billions, hours, seconds)) in enumerate(zip(arrivals, drafts, strict=True))
    ]
