"""Draws completions of which each depends on nothing but its own seed, its prompt and the model.

A common sampler takes the random numbers of a whole batch from one generator, so that a completion changes with the
batch that it is drawn in. Here every completion has numbers of its own, one for each token, and a token is where
the cumulated probabilities pass the number (inversion: L. Devroye, Non-Uniform Random Variate Generation, 1986,
chapter III). The distribution is the same; the size of a batch and the number of processes do not matter but for
rounding.
"""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from taskoffer.api.contract import DRAWN_PER_TRAINED, ExitCode, RunConfig
from taskoffer_trainer.checkpoints import read_run, write_json, write_run
from taskoffer_trainer.config import rows_at_once
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.fallback import OUT_OF_MEMORY, TOO_MANY_ROWS
from taskoffer_trainer.out_of_memory import is_out_of_memory
from taskoffer_trainer.sharding import is_shared_out
from taskoffer_trainer.world import World

__all__ = [
    "Completion",
    "Drawer",
    "KeptTokens",
    "divergence_of",
    "left_padded",
    "random_numbers",
    "right_padded",
    "settled_at_once",
    "token_log_probs",
]

_AT_ONCE = "drawn_at_once"
"""What ``run.json`` calls the completions that are drawn together."""
_DID_NOT_FIT = "drawing-did-not-fit-{}.json"
"""File beside the checkpoints, one for each rank, with how many completions at once it has memory for."""
_REMEDY = "a smaller train.maxLength or train.grpo.maxCompletionLength, or more GPUs, need less"


@dataclass(frozen=True)
class Completion:
    """Tokens of a prompt and of a completion, which ends with an end token unless it was cut.

    Attributes:
        prompt_ids: tokens of the prompt.
        seed: where its random numbers come from.
        ids: tokens of the completion.
        advantage: how much better it is than the others of its prompt.
    """

    prompt_ids: Sequence[int]
    seed: int
    ids: Sequence[int] = ()
    advantage: float = 0.0


def settled_at_once(asked: RunConfig, world: World, most: int | None) -> int:
    """Return how many completions of a step are drawn together: what the first attempt of a run settled.

    In half precision a completion may change with those beside it, which would change what is learned. So live tuning
    has no say in this, and nothing but lack of memory makes it fewer.

    Args:
        asked: the run, as its checkpoints know it.
        world: all ranks; all of them call it.
        most: more are not to be drawn in this attempt.
    """
    known = world.share(read_run(asked) if world.rank == 0 else None).get(_AT_ONCE)
    size = known if isinstance(known, int) else DRAWN_PER_TRAINED * rows_at_once(asked)
    if known is None and world.rank == 0:
        write_run(asked, {_AT_ONCE: size})
    return size if most is None else min(size, most)


def random_numbers(seeds: Sequence[int], length: int) -> torch.Tensor:
    """Return numbers of [0, 1), shape (seeds, length); a row is a function of its seed alone."""
    generator = torch.Generator()
    rows = [torch.rand(length, generator=generator.manual_seed(seed)) for seed in seeds]
    return torch.stack(rows) if rows else torch.zeros(0, length)


class _Inversion(LogitsProcessor):  # type: ignore[misc]
    """Leaves of all tokens the one that the row's number of this place points to."""

    def __init__(self, numbers: torch.Tensor, prompt_length: int, temperature: float) -> None:
        self.numbers, self.prompt_length, self.temperature = numbers, prompt_length, temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        cumulated = torch.softmax(scores.float() / self.temperature, dim=-1).cumsum(dim=-1)
        place = input_ids.shape[1] - self.prompt_length
        # The last sum is 1 but for rounding; measured by it, a number below 1 always points to a token.
        wanted = self.numbers[:, place : place + 1] * cumulated[:, -1:]
        tokens = torch.searchsorted(cumulated, wanted, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens, 0.0)


@dataclass
class KeptTokens:
    """Special tokens of a model, and how long a completion may be."""

    pad: int
    ends: list[int]
    longest: int
    temperature: float

    @classmethod
    def of(cls, model: Any, tokenizer: Any, longest: int, temperature: float) -> KeptTokens:
        """Take all end tokens that the model or its tokenizer declares; any of them ends a completion."""
        declared = model.generation_config.eos_token_id
        ends = [declared] if isinstance(declared, int) else list(declared or [])
        if tokenizer.eos_token_id not in ends:
            ends.append(tokenizer.eos_token_id)
        return cls(tokenizer.pad_token_id, ends, longest, temperature)

    def cut(self, ids: list[int]) -> list[int]:
        """Return the tokens up to and with the first end token."""
        for place, token in enumerate(ids):
            if token in self.ends:
                return ids[: place + 1]
        return ids

    def generation_config(self) -> GenerationConfig:
        """Return settings under which nothing but :class:`_Inversion` changes what the model says."""
        return GenerationConfig(
            max_new_tokens=self.longest,
            do_sample=False,
            pad_token_id=self.pad,
            eos_token_id=self.ends,
            use_cache=True,
        )


class Drawer:
    """Lets a model complete prompts, as many at once as memory allows.

    Args:
        tokens: special tokens, and how long a completion may be.
        world: all ranks, which make this object together; of a model that is shared out all of them draw, each its own
            completions.
        folder: where what did not fit is kept for later attempts.

    Attributes:
        fits: most rows at once that memory allowed, once there were too many.
    """

    def __init__(self, tokens: KeptTokens, world: World | None = None, folder: Path | None = None) -> None:
        self.tokens, self.world, self.folder = tokens, world or World(), folder
        words = []
        if folder is not None and self.world.rank == 0:
            words = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob(_DID_NOT_FIT.format("*"))]
        self.fits: int | None = min((word["fits"] for word in self.world.share(words)), default=None)

    def __call__(
        self, model: Any, asked: Sequence[Completion], at_once: int, between: Callable[[], None] = lambda: None
    ) -> list[Completion]:
        """Return the completions in the order of what was asked.

        Args:
            model: a causal language model; its mode is as before afterwards.
            asked: prompts and seeds.
            at_once: rows that go through the model together.
            between: called before each batch; may raise to leave early.

        Raises:
            TrainerError: ``RESTART`` when not even one row fits, or when the model is shared out.
        """
        shared_out, batches = is_shared_out(model), 0
        # Prompts of like length together need little padding.
        order = sorted(range(len(asked)), key=lambda place: len(asked[place].prompt_ids))
        found: dict[int, Completion] = {}
        with _evaluating(model):
            while len(found) < len(order):
                between()
                size = at_once if self.fits is None else min(at_once, self.fits)
                places = order[len(found) : len(found) + size]
                drawn = self._drawn_or_none(model, [asked[place] for place in places])
                if drawn is None:
                    self._shrink(len(places), shared_out)
                    continue
                found |= zip(places, drawn, strict=True)
                batches += 1
            if shared_out:
                # Every pass needs all ranks; who is done goes along with those who are not.
                for _ in range(batches, int(self.world.largest(batches)[0])):
                    self._draw(model, asked[:1])
        return [found[place] for place in range(len(asked))]

    def _drawn_or_none(self, model: Any, asked: Sequence[Completion]) -> list[Completion] | None:
        """Draw; ``None`` for lack of memory, so that nothing holds the tensors of what failed any longer."""
        try:
            return self._draw(model, asked)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            print(f"train: {len(asked)} completions at once do not fit: {str(error)[:200]}", flush=True)
            return None

    def _shrink(self, size: int, shared_out: bool) -> None:
        """Draw fewer at once from now on; of a model that is shared out from the next attempt on.

        There the other ranks wait for this one in the middle of a pass, so that nothing can be repeated.

        Raises:
            TrainerError: ``RESTART``, see :meth:`__call__`.
        """
        self.fits = max(1, size // 2)
        if self.folder is not None:
            write_json(self.folder / _DID_NOT_FIT.format(self.world.rank), {"fits": self.fits})
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if size == 1 or shared_out:
            reason = OUT_OF_MEMORY if size == 1 else TOO_MANY_ROWS
            told = f"and fewer cannot be; {_REMEDY}" if size == 1 else f"the next attempt draws {self.fits}"
            message = f"{size} completion(s) at once cannot be drawn for lack of memory, {told}"
            raise TrainerError(ExitCode.RESTART, reason, message)
        print(f"train: {self.fits} completions at once are drawn from now on", flush=True)

    def _draw(self, model: Any, asked: Sequence[Completion]) -> list[Completion]:
        device = next(model.parameters()).device
        prompts, mask = left_padded([one.prompt_ids for one in asked], self.tokens.pad, device)
        numbers = random_numbers([one.seed for one in asked], self.tokens.longest).to(device)
        width = prompts.shape[1]
        inversion = _Inversion(numbers, width, self.tokens.temperature)
        # The adapter's layers are part of the model that it was put on; PEFT's own generate would bring back settings.
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        with torch.no_grad(), _plainly(inner, self.tokens.generation_config()):
            output = inner.generate(
                input_ids=prompts, attention_mask=mask, logits_processor=LogitsProcessorList([inversion])
            )
        rows = output[:, width:].tolist()
        return [replace(one, ids=self.tokens.cut(ids)) for one, ids in zip(asked, rows, strict=True)]


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def _plainly(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """Put settings in the place of the model's own, which transformers takes for all that is not said.

    What a model's file recommends (a repetition penalty, say) would make other probabilities than those that are
    trained.
    """
    own = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = own


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask of rows that end together, shape (rows, longest row)."""
    return _padded(rows, pad, device, left=True)


def right_padded(rows: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask of rows that begin together, shape (rows, longest row)."""
    return _padded(rows, pad, device, left=False)


def _padded(rows: Sequence[Sequence[int]], pad: int, device: Any, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for place, row in enumerate(rows):
        span = slice(width - len(row), width) if left else slice(0, len(row))
        ids[place, span] = torch.tensor(row, dtype=torch.long)
        mask[place, span] = 1
    return ids.to(device), mask.to(device)


def token_log_probs(model: Any, completions: Sequence[Completion], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probability of each token of the completions in nats, and the mask of real tokens.

    Args:
        model: a causal language model with TRL's fused head, which never builds all logits at once.
        completions: at least one.
        pad: token id to pad with.

    Returns:
        Two tensors of shape (completions, longest completion).
    """
    device = next(model.parameters()).device
    prompts, prompt_mask = left_padded([one.prompt_ids for one in completions], pad, device)
    ids, mask = right_padded([one.ids for one in completions], pad, device)
    attention_mask = torch.cat([prompt_mask, mask], dim=1)
    labels = torch.cat([torch.full_like(prompts, -100), ids.masked_fill(mask == 0, -100)], dim=1)
    outputs = model(
        input_ids=torch.cat([prompts, ids], dim=1), attention_mask=attention_mask, labels=labels, fused_lm_head=True
    )
    return outputs.log_probs[:, -ids.shape[1] :], mask


def divergence_of(model: Any, completions: Sequence[Completion], pad: int) -> tuple[float, float, int]:
    """Return how far a model is from its base on completions, how likely these are, and the number of their tokens.

    The first is the sum over the tokens of the estimated KL divergence in nats. The completions are the trained
    model's, so this estimates KL(trained || base); J. Schulman's third estimator, r - 1 - log r, with r the ratio of
    base to trained, as in TRL's loss. The second is the sum of the tokens' log-probabilities, in nats as well.

    Args:
        model: with an adapter, which can be switched off.
        completions: at least one.
        pad: token id to pad with.
    """
    ours, mask = token_log_probs(model, completions, pad)
    with model.disable_adapter():
        base, _ = token_log_probs(model, completions, pad)
    difference = (base - ours).double()
    divergence = float(((torch.exp(difference) - 1 - difference) * mask).sum())
    return divergence, float((ours.double() * mask).sum()), int(mask.sum())
