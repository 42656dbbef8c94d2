"""Which rows an optimizer step learns from: a pure function of seed and position.

It depends neither on how many rows go through the model at once nor on how many processes share a step, so
that a run goes on with the same rows in the same order after any of these has changed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["SampleStream", "StepBatches", "StepPlan"]


class SampleStream:
    """Row numbers by position: one shuffled pass over the rows after the other.

    With lengths, rows are sorted by length within groups of 64 shuffled rows, which keeps padding small.
    """

    GROUP = 64

    def __init__(self, count: int, seed: int, lengths: Sequence[int] | None = None) -> None:
        self.count, self.seed, self.lengths = count, seed, lengths
        self._epoch, self._order = -1, list(range(count))

    def order(self, epoch: int) -> list[int]:
        """Return the rows of an epoch in their order."""
        if epoch == self._epoch:
            return self._order
        order = list(range(self.count))
        random.Random(f"{self.seed}:{epoch}").shuffle(order)  # noqa: S311 - an order and not a secret.
        if self.lengths is not None:
            lengths = self.lengths
            groups = (order[start : start + self.GROUP] for start in range(0, self.count, self.GROUP))
            order = [row for group in groups for row in sorted(group, key=lambda row: -lengths[row])]
        self._epoch, self._order = epoch, order
        return order

    def __getitem__(self, position: int) -> int:
        """Return the row at a position, which may lie in any epoch."""
        epoch, place = divmod(position, self.count)
        return self.order(epoch)[place]


@dataclass(frozen=True)
class StepPlan:
    """How many steps there are and which rows each has.

    Attributes:
        rows: rows of the data.
        global_batch: rows of a step, all processes together; the last step may have fewer.
        total_steps: optimizer steps of the whole run.
        total_rows: rows that are seen in the whole run; a row counts in every epoch.
    """

    rows: int
    global_batch: int
    total_steps: int
    total_rows: int

    @classmethod
    def of(cls, rows: int, global_batch: int, epochs: float, max_steps: int) -> StepPlan:
        """Plan by steps when ``max_steps`` is positive, else by epochs, which need not be whole."""
        if max_steps > 0:
            return cls(rows, global_batch, max_steps, max_steps * global_batch)
        total = max(1, math.ceil(rows * epochs))
        return cls(rows, global_batch, math.ceil(total / global_batch), total)

    def span(self, step: int) -> range:
        """Return the positions of a step (the first step has the number 0)."""
        start = step * self.global_batch
        return range(start, min(start + self.global_batch, self.total_rows))

    def idle(self, step: int, rank: int) -> bool:
        """Tell whether no row of a step is left for a rank."""
        return rank >= len(self.span(step))


class StepBatches:
    """A batch sampler that yields, for each step, the rows that this rank has to take.

    With lengths, the rows of a step are sorted by length and the ranks take turns: rows that go through the model
    together are of like length, and each rank has about the same number of tokens.

    A step may have fewer rows than there are ranks. With ``never_idle`` a rank for which none is left gets another's,
    to take part in what needs all ranks; :meth:`StepPlan.idle` says that they are not to count.
    """

    def __init__(
        self,
        stream: SampleStream,
        plan: StepPlan,
        rank: int = 0,
        ranks: int = 1,
        lengths: Sequence[int] | None = None,
        first: int = 0,
        never_idle: bool = False,
    ) -> None:
        self.stream, self.plan, self.rank, self.ranks = stream, plan, rank, ranks
        self.lengths, self.first, self.never_idle = lengths, first, never_idle

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.plan.total_steps):
            yield self.of(step)

    def __len__(self) -> int:
        return self.plan.total_steps

    def of(self, step: int) -> list[int]:
        """Return this rank's rows of a step."""
        rows = [self.stream[position] for position in self.plan.span(step)]
        if self.lengths is not None:
            lengths = self.lengths
            rows.sort(key=lambda row: -lengths[row])
        mine = rows[self.rank :: self.ranks]
        return mine if mine or not self.never_idle else rows[:1]
