"""What is to be placed, as far as a place depends on it."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Want(Protocol):
    """What is to be placed: an offer as it was evaluated, or a job that goes on."""

    @property
    def gpus(self) -> int: ...  # noqa: D102
    @property
    def lane(self) -> str | None: ...  # noqa: D102
    @property
    def quota(self) -> str | None: ...  # noqa: D102
    @property
    def occupies(self) -> float: ...  # noqa: D102


class Asked(NamedTuple):
    """An offer on another number of GPUs, as far as it is to be placed."""

    gpus: int
    lane: str | None
    quota: str | None
    occupies: float
