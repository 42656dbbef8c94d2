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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

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
    "token_log_probs",
]


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
        world: all ranks; with a model that is shared out all of them draw, each its own completions.
    """

    def __init__(self, tokens: KeptTokens, world: World | None = None) -> None:
        self.tokens, self.world = tokens, world or World()
        self.fits: int | None = None
        """Most rows at once that memory allowed, once there were too many."""

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
            torch.OutOfMemoryError: when not even one row fits, or the model is shared out.
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
                try:
                    drawn = self._draw(model, [asked[place] for place in places])
                except torch.OutOfMemoryError:
                    if len(places) == 1 or shared_out:
                        raise
                    self.fits = len(places) // 2
                    print(f"train: {len(places)} completions at once do not fit, drawing {self.fits} now", flush=True)
                    _free()
                    continue
                found |= zip(places, drawn, strict=True)
                batches += 1
            if shared_out:
                # Every pass needs all ranks; who is done goes along with those who are not.
                for _ in range(batches, int(self.world.largest(batches)[0])):
                    self._draw(model, asked[:1])
        return [found[place] for place in range(len(asked))]

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


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
