"""How an evaluation goes through the held-out rows: as many at once as memory allows.

What is measured is added up over rows, so how many of them go through the model at once changes nothing but rounding.
A rank that runs out of memory repeats the rows in question, fewer at once, by itself: other than in a step nobody waits
for it before all sums are added up. There the ranks agree on the smallest number that any of them had memory for, and
none tries more again, in this attempt or a later one. Only where a model is shared out do the others wait in the middle
of a pass, so that nothing can be repeated: the attempt ends, and the next one begins with fewer rows.
"""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from taskoffer.api.contract import Clamp, ExitCode
from taskoffer_trainer.checkpoints import write_json
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.fallback import OUT_OF_MEMORY, TOO_MANY_ROWS
from taskoffer_trainer.held_out import turns
from taskoffer_trainer.out_of_memory import is_out_of_memory
from taskoffer_trainer.sharding import is_shared_out
from taskoffer_trainer.world import World

__all__ = ["Evaluation"]

Row = TypeVar("Row")

_DID_NOT_FIT = "evaluation-did-not-fit-{}.json"
"""File beside the checkpoints, one for each rank, with how many rows at once it has memory for."""
_UNLIMITED = 1 << 31
_REMEDY = "a smaller train.maxLength, or more GPUs, need less"


class Evaluation:
    """All evaluations of an attempt.

    Attributes:
        asked: rows at once on each GPU that were asked for.
        fits: most rows at once that memory has allowed on all ranks, once there were too many.

    Args:
        asked: see above.
        world: all ranks, which make this object together.
        folder: where what did not fit is kept for later attempts.
        told: called when memory did not suffice.
    """

    def __init__(
        self, asked: int, world: World, folder: Path, told: Callable[[Evaluation], None] = lambda _: None
    ) -> None:
        self.asked, self.world, self.folder, self.told = asked, world, folder, told
        self._all = self._mine = 0
        words = []
        if world.rank == 0:
            words = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob(_DID_NOT_FIT.format("*"))]
        self.fits: int | None = min((word["fits"] for word in world.share(words)), default=None)

    @property
    def size(self) -> int:
        """Rows at once."""
        return self.asked if self.fits is None else min(self.asked, self.fits)

    @property
    def repeated(self) -> int:
        """How often rows had to be repeated in this attempt: on this rank, and on the others when it last met them."""
        return self._all + self._mine

    def clamp(self) -> Clamp | None:
        """Say that fewer rows at once are measured than were asked for."""
        if self.size == self.asked:
            return None
        return Clamp(
            field="train.perDeviceEvalBatchSize",
            requested=str(self.asked),
            effective=str(self.size),
            reason="BatchClamped",
            message="There was no memory to evaluate more rows at once; what is measured is the same.",
        )

    def over(
        self,
        model: Any,
        rows: Sequence[Row],
        work: Callable[[Sequence[Row]], Sequence[float]],
        numbers: int,
        shared: bool,
        between: Callable[[], None],
        most: int = _UNLIMITED,
    ) -> list[float]:
        """Return the sums of what is measured of all rows.

        Args:
            model: in its mode as before afterwards.
            rows: the same in every rank; those that need the most memory first, so that too little shows at once.
            work: measures some rows: their sums.
            numbers: how many sums there are.
            shared: every rank takes its share of the rows; all of them call it.
            between: called between pieces; may raise to leave early.
            most: another limit of the rows at once.

        Raises:
            TrainerError: ``RESTART`` when not even one row fits, or when the model is shared out.
        """
        size = min(self.size, most)
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        rank, world = (self.world.rank, self.world.size) if shared else (0, 1)
        total = [0.0] * numbers
        for batch, weight in turns(batches, rank, world, is_shared_out(model)):
            found = self.add_up(model, batch, work, between)
            total = [before + weight * more for before, more in zip(total, found, strict=True)]
        return self.together(total) if shared else total

    def together(self, sums: Sequence[float]) -> list[float]:
        """Return sums over all ranks, which agree on how many rows at once they have memory for; all call it."""
        *total, new = self.world.total(*sums, self._mine)
        fits = -int(self.world.largest(-(_UNLIMITED if self.fits is None else self.fits))[0])
        self._all, self._mine = self._all + int(new), 0
        if new:
            self.fits = fits
            self.told(self)
        return total

    def add_up(
        self,
        model: Any,
        rows: Sequence[Row],
        work: Callable[[Sequence[Row]], Sequence[float]],
        between: Callable[[], None],
        least: int = 1,
    ) -> list[float]:
        """Return the sums of what is measured of some rows on this rank, one piece after the other.

        Args:
            model: in its mode as before afterwards.
            rows: at least one. Where the model is shared out they are one piece, as in every other rank.
            work: measures a piece: its sums.
            between: called before each piece; may raise to leave early.
            least: rows that are never fewer where the model is shared out.

        Raises:
            TrainerError: ``RESTART`` when not even one row fits, or when the model is shared out.
        """
        whole, done = is_shared_out(model), 0
        found: list[Sequence[float]] = []
        while done < len(rows):
            between()
            piece = rows[done:] if whole else rows[done : done + self.size]
            try:
                with _measuring(model):
                    found.append([float(one) for one in work(piece)])
                done += len(piece)
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                print(f"train: {len(piece)} row(s) at once do not fit in an evaluation: {str(error)[:200]}", flush=True)
            # Outside of the handler nothing holds the tensors of what failed any longer.
            if whole:
                self.give_up(len(piece), least)
            self._shrink(len(piece))
        return [sum(one) for one in zip(*found, strict=True)]

    def _shrink(self, size: int) -> None:
        self._note(size)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if size == 1:
            raise TrainerError(
                ExitCode.RESTART,
                OUT_OF_MEMORY,
                f"a held-out row alone does not fit into memory; {_REMEDY}",
            )
        print(f"train: the evaluation goes on with {self.size} row(s) at once", flush=True)
        self.told(self)

    def give_up(self, size: int, least: int = 1) -> None:
        """End this attempt for lack of memory, so that the next one measures fewer rows at once.

        Args:
            size: rows that did not fit.
            least: fewer cannot be.

        Raises:
            TrainerError: always ``RESTART``.
        """
        self._note(size)
        smaller = size > least
        told = f"the next attempt takes {max(least, self.size)}" if smaller else f"and fewer cannot be; {_REMEDY}"
        raise TrainerError(
            ExitCode.RESTART,
            TOO_MANY_ROWS if smaller else OUT_OF_MEMORY,
            f"{size} held-out row(s) at once do not fit into memory, {told}",
        )

    def _note(self, size: int) -> None:
        self.fits = max(1, min(size, self.size) // 2)
        self._mine += 1
        write_json(self.folder / _DID_NOT_FIT.format(self.world.rank), {"fits": self.fits})


@contextlib.contextmanager
def _measuring(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
