"""What an optimizer step is, the same for every method: rows in, one exact gradient out, whatever goes wrong between.

The data loader hands over the rows of a whole step, uncollated. They are cut into pieces that go through the
model one after the other; the gradients of the pieces add up to that of the step, are added up over the ranks
once, and divided once by what the loss is a mean over. So the size of a piece (the micro-batch) can change from
step to step, or within a step that ran out of memory, without any effect on what is learned but rounding.
"""

from __future__ import annotations

import contextlib
import gc
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import set_seed

from taskoffer.api.contract import AppliedTuning, ExitCode, RunConfig
from taskoffer_trainer.checkpoints import write_json
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.fallback import OUT_OF_MEMORY, TOO_MANY_ROWS
from taskoffer_trainer.out_of_memory import is_out_of_memory
from taskoffer_trainer.sharding import is_shared_out, local
from taskoffer_trainer.stream import SampleStream, StepBatches, StepPlan
from taskoffer_trainer.tuning import MicroBatch, TuningFile
from taskoffer_trainer.world import World

__all__ = ["Counters", "PieceLoss", "StepTrainer", "Steps", "step_seed"]

_BUCKET_MIB = 25
"""Size of a bucket of gradients when nothing is asked for: that of torch's DistributedDataParallel."""

_FILE = "steps.json"
"""File of a checkpoint with what the steps before it did."""
_DID_NOT_FIT = "did-not-fit-{}.json"
"""File beside the checkpoints, one for each rank, with what an attempt that ended for lack of memory has learnt."""


_REMEDY = "a smaller train.maxLength or lora.r, or more GPUs, need less"


@dataclass(frozen=True)
class PieceLoss:
    """The loss of some rows as a sum, and what it has to be divided by.

    Attributes:
        total: sum of the losses, with its graph.
        count: how many losses were added up (tokens or rows, as the method defines its mean).
        tokens: tokens that went through the model, or 0 where there are none.
    """

    total: torch.Tensor
    count: torch.Tensor | float
    tokens: torch.Tensor | float = 0.0


@dataclass
class Counters:
    """What a run has done so far, over all attempts."""

    samples: int = 0
    tokens: int = 0
    out_of_memory: int = 0


@dataclass
class Steps:
    """What the steps of a run share: their plan, the ranks, the tuning, and what was done.

    ``worked`` is how long the last step took in seconds, ``messages`` how many of gradients it sent to other ranks,
    ``stretch`` how many times ``eval_steps`` lie between two evaluations, once that was decided, and ``owed`` whether
    the evaluation of the last step was left out for a signal, and is made when the run goes on.
    """

    config: RunConfig
    plan: StepPlan
    world: World
    micro_batch: MicroBatch
    lengths: Sequence[int] | None = None
    tuning: TuningFile = field(default_factory=TuningFile)
    applied: AppliedTuning | None = None
    counters: Counters = field(default_factory=Counters)
    worked: float = 0.0
    messages: int = 0
    stretch: int | None = None
    owed: bool = False

    def batches(self, first: int) -> StepBatches:
        """Return the rows of this rank from a step on."""
        grouped = self.lengths if self.config.train.group_by_length else None
        stream = SampleStream(self.plan.rows, self.config.train.seed, grouped)
        world, shared_out = self.world, self.config.train.fsdp
        return StepBatches(stream, self.plan, world.rank, world.size, self.lengths, first, never_idle=shared_out)

    def tune(self, step: int) -> None:
        """Take over a request before a step, all ranks the same one."""
        asked = self.world.share(self.tuning.read() if self.world.rank == 0 else None)
        if asked is not None:
            if asked.micro_batch is not None:
                self.micro_batch.asked = asked.micro_batch
            self.applied = self.state(step, asked.generation, asked.duty_cycle)
            print(
                f"tuning: generation {asked.generation} from step {step + 1} on: {self.micro_batch.size} row(s) at "
                f"once, duty cycle {asked.duty_cycle:g}",
                flush=True,
            )
        elif self.applied is None:
            self.applied = self.state(step, 0, 1.0)

    def keep(self, folder: Path) -> None:
        """Write what a later attempt has to know into a checkpoint."""
        known = {"fits": self.micro_batch.fits, "stretch": self.stretch, "owed": self.owed}
        value = {**asdict(self.counters), **known}
        write_json(folder / _FILE, value)

    def restore(self, folder: Path) -> None:
        """Read what :meth:`keep` wrote; what did not fit into memory then is not tried again."""
        value = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        limits = [limit for limit in (self.micro_batch.fits, value["fits"]) if limit is not None]
        self.micro_batch.fits = min(limits, default=None)
        self.stretch, self.owed = value["stretch"], value.get("owed", False)
        self.counters = Counters(value["samples"], value["tokens"], value["out_of_memory"])

    def leave_word(self) -> None:
        """Write for the next attempt what this rank had no memory for."""
        path = Path(self.config.checkpoint_dir) / _DID_NOT_FIT.format(self.world.rank)
        write_json(path, {"fits": self.micro_batch.fits, "out_of_memory": self.counters.out_of_memory})

    def take_word(self) -> None:
        """Heed what former attempts have written, all ranks the same."""
        words = []
        if self.world.rank == 0:
            paths = sorted(Path(self.config.checkpoint_dir).glob(_DID_NOT_FIT.format("*")))
            words = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        for word in self.world.share(words):
            known = self.micro_batch.fits
            self.micro_batch.fits = word["fits"] if known is None else min(known, word["fits"])
            self.counters.out_of_memory = max(self.counters.out_of_memory, word["out_of_memory"])

    def state(self, step: int, generation: int, duty_cycle: float) -> AppliedTuning:
        """Return the tuning in force."""
        size, limit = self.micro_batch.size, self.micro_batch.fits
        return AppliedTuning(
            generation=generation, micro_batch=size, micro_batch_limit=limit, duty_cycle=duty_cycle, step=step
        )


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of a step's random numbers on a rank, so that they depend on nothing that came before."""
    # The multipliers are those of a common linear congruential generator (Knuth, MMIX) and of its kind.
    mixed = (seed * 6364136223846793005 + step * 1442695040888963407 + rank * 2862933555777941757) % 2**64
    return (mixed ^ (mixed >> 31)) % 2**32


@contextlib.contextmanager
def _each_for_itself(accelerator: Any) -> Iterator[None]:
    """Let what gathers over the ranks see this rank alone.

    TRL gathers its metrics within the loss. Ranks may have unlike numbers of pieces, and one that ran out of memory
    comes no further, so within a step nothing but the agreement at its end may wait for other ranks.
    """

    def alone(tensor: Any, *_: Any, **__: Any) -> Any:
        return tensor

    names = ("gather", "gather_for_metrics", "reduce")
    for name in names:
        setattr(accelerator, name, alone)
    try:
        yield
    finally:
        for name in names:
            delattr(accelerator, name)


class StepTrainer:
    """Mixed into a trainer of transformers or TRL, before it in the order of classes."""

    steps: Steps

    def begin(self, steps: Steps, first: int) -> None:
        """Hand over what the steps share, before the training; ``first`` is the step to go on from."""
        self.steps, self._first = steps, first

    # What a method may say differently.

    def step_inputs(self, rows: list[Any]) -> Any:
        """Return what the pieces of a step are cut from: the rows, or what was drawn for them all at once."""
        return rows

    def size_of(self, inputs: Any) -> int:
        """Return how many rows can be cut."""
        return len(inputs)

    def lengths_of(self, _inputs: Any) -> Sequence[int] | None:
        """Return the tokens of each row that can be cut, or ``None`` where a limit of tokens means nothing."""
        return None

    def cut(self, inputs: Any, piece: range) -> Any:
        """Return a piece of a step's inputs, ready for :meth:`piece_loss`."""
        return inputs[piece.start : piece.stop]

    def piece_loss(self, model: Any, piece: Any) -> PieceLoss:
        """Return the loss of a piece."""
        raise NotImplementedError

    # What transformers' loop calls.

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Load the rows of the steps to come; with processes where the settings ask for them."""
        train = self.steps.config.train
        workers = train.dataloader_num_workers
        more: dict[str, Any] = {}
        if workers:
            more = {"persistent_workers": True, "prefetch_factor": train.dataloader_prefetch_factor}
        return DataLoader(
            self.train_dataset,  # type: ignore[attr-defined]
            batch_sampler=self.steps.batches(self._first),
            collate_fn=list,
            num_workers=workers,
            # Without a generator of its own the loader would draw from the global one.
            generator=torch.Generator(),
            **more,
        )

    def _get_num_items_in_batch(self, *_: Any, **__: Any) -> None:
        """Count in :meth:`piece_loss`; transformers would look into the collated batch."""

    def floating_point_ops(self, _inputs: Any) -> int:
        """Leave out transformers' count, which knows neither adapters nor attention."""
        return 0

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Keep the model as it is instead of wrapping it for DDP, which would reduce gradients after each piece.

        The flag says that the model takes care of its gradients itself; during the training it is off again,
        because it would also keep the model from being saved.
        """
        self.is_distributed_loading_by_transformers = self.steps.world.size > 1
        try:
            return super()._prepare_for_training(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.is_distributed_loading_by_transformers = False

    def _sync_replicated_trainable_parameters(self, model: Any) -> None:
        if is_shared_out(model):
            return  # What the ranks hold came from rank 0.
        self.steps.world.spread(p for p in model.parameters() if p.requires_grad)

    def training_step(self, model: Any, rows: list[Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Compute the gradient of one step over all ranks; again in smaller pieces when memory does not suffice.

        Raises:
            TrainerError: ``RESTART`` when even the smallest piece does not fit.
        """
        steps, number = self.steps, self.state.global_step  # type: ignore[attr-defined]
        began = time.monotonic()
        steps.tune(number)
        model.train()
        set_seed(step_seed(steps.config.train.seed, number, steps.world.rank))
        try:
            inputs = self.step_inputs(rows)
        except (RuntimeError, MemoryError) as error:
            if is_shared_out(model) and is_out_of_memory(error):
                self._give_up(steps.micro_batch.size)
            raise
        while True:
            # Every try draws the same random numbers.
            set_seed(step_seed(steps.config.train.seed, number, steps.world.rank))
            loss, count, tokens, size = self._accumulate(model, inputs)
            if size > 0 and is_shared_out(model):
                self._give_up(size)
            failed, *sums = steps.world.total(float(size > 0), loss, count, tokens)
            if not failed:
                break
            self._shrink(model, size)
        self._reduce(model, sums[1])
        steps.counters.samples += len(steps.plan.span(number))
        steps.counters.tokens += int(sums[2])
        steps.worked = time.monotonic() - began
        return torch.tensor(sums[0] / max(sums[1], 1e-9), device=self.args.device)  # type: ignore[attr-defined]

    def _accumulate(self, model: Any, inputs: Any) -> tuple[float, float, float, int]:
        """Add up the gradients of all pieces; the last number is the size that did not fit, else 0."""
        sums = torch.zeros(3, dtype=torch.float64)
        size = 0
        try:
            for piece, weight in self._pieces(model, inputs):
                size = len(piece)
                sums += self._piece(model, self.cut(inputs, piece), weight)
        except (RuntimeError, MemoryError) as error:
            if size == 0 or not is_out_of_memory(error):
                raise
            print(f"train: {size} row(s) at once do not fit: {str(error)[:200]}", flush=True)
            return 0.0, 0.0, 0.0, size
        loss, count, tokens = sums.tolist()
        return loss, count, tokens, 0

    def _pieces(self, model: Any, inputs: Any) -> list[tuple[range, float]]:
        """Cut a step's inputs, and say how much each piece counts.

        Every pass through a model that is shared out needs all ranks. So there all have as many pieces as the one
        that needs the most: the others cut finer, and who has no rows left for that goes along with some that do not
        count.
        """
        steps, size, lengths = self.steps, self.size_of(inputs), self.lengths_of(inputs)
        pieces = steps.micro_batch.cuts(size, lengths=lengths)
        if not is_shared_out(model):
            return [(piece, 1.0) for piece in pieces]
        wanted = int(steps.world.largest(len(pieces))[0])
        pieces = steps.micro_batch.cuts(size, wanted, lengths)
        idle = steps.plan.idle(self.state.global_step, steps.world.rank)  # type: ignore[attr-defined]
        counted = [(piece, 0.0 if idle else 1.0) for piece in pieces]
        return counted + [(pieces[0], 0.0)] * (wanted - len(pieces))

    def _piece(self, model: Any, piece: Any, weight: float) -> torch.Tensor:
        with _each_for_itself(self.accelerator):  # type: ignore[attr-defined]
            with self.compute_loss_context_manager():  # type: ignore[attr-defined]
                loss = self.piece_loss(model, piece)
            self.accelerator.backward(loss.total * weight)  # type: ignore[attr-defined]
        figures = [loss.total.detach(), loss.count, loss.tokens]
        return weight * torch.stack([torch.as_tensor(one, device=loss.total.device).double() for one in figures]).cpu()

    def _shrink(self, model: Any, size: int) -> None:
        """Make the pieces smaller on all ranks after one of them ran out of memory."""
        steps = self.steps
        model.zero_grad(set_to_none=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        steps.counters.out_of_memory += 1
        too_large = int(steps.world.largest(size)[0])
        before = steps.micro_batch.size
        if not steps.micro_batch.too_large(max(1, too_large)):
            raise TrainerError(
                ExitCode.RESTART,
                OUT_OF_MEMORY,
                f"{too_large} row(s) at once do not fit into memory, and fewer cannot be; {_REMEDY}",
            )
        applied = steps.applied
        if applied is not None:
            number = self.state.global_step  # type: ignore[attr-defined]
            steps.applied = steps.state(number, applied.generation, applied.duty_cycle)
        print(f"train: the step is repeated with {steps.micro_batch.size} row(s) at once instead of {before}")

    def _give_up(self, size: int) -> None:
        """End this attempt for lack of memory, so that the next one tries less.

        The step cannot be repeated: the other ranks wait for this one in the middle of a pass through the model.

        Raises:
            TrainerError: always ``RESTART``.
        """
        steps = self.steps
        steps.counters.out_of_memory += 1
        smaller = steps.micro_batch.too_large(size)
        steps.leave_word()
        told = f"the next attempt takes {steps.micro_batch.size}" if smaller else f"and fewer cannot be; {_REMEDY}"
        reason = TOO_MANY_ROWS if smaller else OUT_OF_MEMORY
        raise TrainerError(ExitCode.RESTART, reason, f"{size} row(s) at once do not fit into memory, {told}")

    def _reduce(self, model: Any, count: float) -> None:
        """Add up the gradients over the ranks and divide them by what the loss is a mean over."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:
                # A rank without rows, or a layer that no row went through: it takes part with nothing.
                parameter.grad = torch.zeros_like(parameter)
        gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        share = 1.0 / max(count, 1e-9)
        if is_shared_out(model):
            # They were reduced in the backward pass of each piece, to their mean over the ranks.
            share *= self.steps.world.size
        else:
            bucket = (self.steps.config.train.ddp_bucket_cap_mb or _BUCKET_MIB) << 20
            self.steps.messages = self.steps.world.add_up(gradients, bucket)
        torch._foreach_mul_(gradients, share)
