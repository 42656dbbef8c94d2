"""The ranks of a run as one: they agree on small numbers, hand values on, and add up their gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["World"]

_left: list[Any] = []
"""Process groups that this process has left, kept until it ends; see :meth:`World.part`."""


class World:
    """All ranks of a run, or this process alone.

    Numbers travel over a gloo group of their own, because a tensor on the CPU cannot travel over NCCL; gradients
    travel over the group of the training. Every method must be called by all ranks at the same point.
    """

    def __init__(self) -> None:
        there = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if there else 0
        self.size = dist.get_world_size() if there else 1
        self._numbers = dist.new_group(backend="gloo") if there else None

    def total(self, *numbers: float) -> list[float]:
        """Return the sum of each number over all ranks, in double precision."""
        return self._reduced(numbers, dist.ReduceOp.SUM)

    def largest(self, *numbers: float) -> list[float]:
        """Return the largest of each number over all ranks."""
        return self._reduced(numbers, dist.ReduceOp.MAX)

    def _reduced(self, numbers: Sequence[float], operation: Any) -> list[float]:
        if self._numbers is None:
            return [float(number) for number in numbers]
        tensor = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(tensor, operation, group=self._numbers)
        return [float(number) for number in tensor.tolist()]

    def share(self, value: Any) -> Any:
        """Return rank 0's value in every rank; what the others give is not looked at."""
        if self._numbers is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._numbers)
        return values[0]

    def wait(self) -> None:
        """Wait until all ranks are here."""
        if self._numbers is not None:
            dist.barrier(group=self._numbers)

    def spread(self, parameters: Iterable[torch.Tensor]) -> None:
        """Give every rank rank 0's values of these parameters."""
        if self._numbers is not None:
            for parameter in parameters:
                dist.broadcast(parameter.data, src=0)

    def add_up(self, gradients: Sequence[torch.Tensor], bucket_bytes: int) -> int:
        """Add up gradients over all ranks in place, in buckets of about so many bytes.

        Many small tensors cost a message each; a bucket costs one, and a copy of itself in memory.

        Returns:
            The number of messages.
        """
        if self._numbers is None:
            return 0
        sent = 0
        for bucket in _buckets(gradients, bucket_bytes):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(flat)
            parts = flat.split([gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))
            sent += 1
        return sent

    def part(self) -> None:
        """Wait for all ranks and leave their process groups; alone, there are none to leave.

        What is left of the groups is kept until the process ends. With its last reference torch 2.13 joins a gloo
        group's threads while it holds the GIL, and one of these may just want the GIL to let go of the tensors of the
        last collectives: on a busy machine both then wait for ever.
        """
        if self._numbers is None:
            return
        _left.extend((dist.group.WORLD, self._numbers))
        dist.barrier()
        dist.destroy_process_group()
        self._numbers, self.rank, self.size = None, 0, 1


def _buckets(tensors: Sequence[torch.Tensor], limit: int) -> Iterable[list[torch.Tensor]]:
    """Group tensors of one type in their order; a bucket holds at least one tensor."""
    bucket: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size + tensor.nbytes > limit or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
