"""What SDXL and Flux have to say for themselves in training: noise, times, targets and losses, behind one interface.

A row of a step is a pair in encoded form with its noise and its place in the schedule. Both are drawn from nothing
but the run's seed and the row's position in the stream, so they depend neither on how a step is cut into chunks, nor
on the number of processes, nor on a restart.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from taskoffer.api.contract import Clamp

__all__ = ["Denoiser", "Encoded", "NoisyRow", "collate", "noisy"]


@dataclass(frozen=True)
class Encoded:
    """A pair as the network sees it, on the CPU.

    Attributes:
        digest: Of picture and caption.
        latents: The encoded picture, channels x height x width.
        conditions: What the network is told, by name, without the dimension of the batch.
    """

    digest: str
    latents: torch.Tensor
    conditions: dict[str, torch.Tensor]


@dataclass(frozen=True)
class NoisyRow:
    """An encoded pair with noise of the latents' shape and its place in the schedule, between 0 and 1."""

    encoded: Encoded
    noise: torch.Tensor
    place: float


def noisy(encoded: Encoded, seed: int, name: object, place: float | None = None) -> NoisyRow:
    """Draw noise and place of a row.

    Args:
        encoded: the pair.
        seed: the run's seed.
        name: what tells this row from all others, such as its position in the stream.
        place: the place where it is given, else it is drawn evenly between 0 and 1.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    drawn = float(torch.rand((), generator=generator, dtype=torch.float64))
    noise = torch.randn(encoded.latents.shape, generator=generator)
    return NoisyRow(encoded, noise, drawn if place is None else place)


def collate(rows: Sequence[NoisyRow]) -> dict[str, torch.Tensor]:
    """Stack rows into one batch."""
    conditions = rows[0].encoded.conditions
    return {
        "latents": torch.stack([row.encoded.latents for row in rows]),
        "noise": torch.stack([row.noise for row in rows]),
        "place": torch.tensor([row.place for row in rows], dtype=torch.float64),
        **{name: torch.stack([row.encoded.conditions[name] for row in rows]) for name in conditions},
    }


class Denoiser(ABC):
    """How an architecture is trained.

    Attributes:
        target_modules: PEFT's pattern of the modules that ``all-linear`` means: the linear layers of attention and
            feed-forward in the transformer blocks. Embeddings of time and text and the modulation layers stay.
        clamps: Settings that could not be taken literally.
    """

    target_modules: str
    clamps: tuple[Clamp, ...] = ()

    @abstractmethod
    def edge_multiple(self, vae_factor: int) -> int:
        """Return what the edge of a picture in pixels must be a multiple of."""

    @abstractmethod
    def scale(self, latents: torch.Tensor, vae: Any) -> torch.Tensor:
        """Bring the VAE's latents to the scale that the network was trained with."""

    @abstractmethod
    def unscale(self, latents: torch.Tensor, vae: Any, edge: int) -> torch.Tensor:
        """Turn what a pipeline generates as latents into what the VAE decodes; the inverse of :meth:`scale`."""

    @abstractmethod
    def prompt(self, pipeline: Any, text: str, length: int, device: Any) -> dict[str, torch.Tensor]:
        """Encode a prompt as the arguments that the pipeline generates with when it has no text encoders."""

    @abstractmethod
    def conditions(self, pipeline: Any, caption: str, length: int, device: Any) -> dict[str, torch.Tensor]:
        """Encode a caption of at most ``length`` tokens, as tensors with a batch of one."""

    @abstractmethod
    def words_of(self, pipeline: Any, length: int) -> tuple[Any, int]:
        """Return the tokenizer of the encoder that reads most of a caption, and the tokens of it that are read."""

    def sizes(self, original: tuple[int, int], cut: tuple[int, int], edge: int) -> dict[str, torch.Tensor]:
        """Return what the network is told of a picture's sizes, as tensors with a batch of one; Flux is told nothing.

        Args:
            original: height and width before scaling, in pixels.
            cut: pixels cut off at the top and at the left.
            edge: edge length that is trained.
        """
        return {}

    @abstractmethod
    def losses(self, network: Any, batch: dict[str, torch.Tensor], dtype: Any, weighted: bool) -> torch.Tensor:
        """Return the loss of each row: the mean squared error of what the network predicts, over all its values.

        Args:
            network: the network with or without an adapter.
            batch: rows as :func:`collate` stacks them, on the network's device.
            dtype: data type of the network.
            weighted: with the weights of training; held-out losses are measured without.
        """
