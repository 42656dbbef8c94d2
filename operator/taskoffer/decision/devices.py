"""Which of a node's free devices a task gets: those that lie closest together, and leave the rest so."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass

from taskoffer.api.v1alpha1.capacitypolicy import ResourcePool
from taskoffer.api.v1alpha1.devices import Device
from taskoffer.api.v1alpha1.meta import Assignment

_QUAD, _PAIR = 4, 2
"""Neighbours that boards and NVLink bridges join, and sizes of tasks: blocks of these are kept whole."""


@dataclass(frozen=True, slots=True)
class NodeDevice:
    """A device that a node offers, and where in the node it sits."""

    device: Device
    pcie_root: str = ""
    """The root of the PCI bus that it hangs on; empty where its driver does not say."""


@dataclass(frozen=True, slots=True)
class _Place:
    """A device with its blocks, from the largest to the smallest."""

    offered: NodeDevice
    blocks: tuple[Hashable, ...]


Cost = tuple[int, ...]


def assignment(
    pool: ResourcePool, node: str, count: int, lane: str | None, devices: tuple[Device, ...] | None
) -> Assignment:
    """Return the record of a booking; without devices whoever hands out the resource chooses them."""
    return Assignment(
        node_name=node,
        resource_name=pool.name,
        count=count,
        lane=lane,
        device_class_name=pool.device_class_name if devices else None,
        devices=devices,
    )


def choose(devices: Sequence[NodeDevice], taken: Collection[str], count: int) -> tuple[Device, ...] | None:
    """Return ``count`` devices that are not taken, or None where there are too few.

    They come from as few PCI roots as possible, then from as few blocks of four neighbours, then of two. Of several
    choices it is the one in blocks of which the least is free, so that whole blocks stay for larger tasks; ties go
    by name. Neighbours are devices that follow one another by name on one root.

    Args:
        devices: All devices that the node offers; the choice does not depend on their order.
        taken: Keys of devices that somebody has.
        count: How many are wanted.
    """
    free = [place for place in _in_order(devices) if place.offered.device.key not in taken]
    if len(free) < count:
        return None
    chosen = {place.offered.device.key for place in _closest(free, count, 0)}
    return tuple(place.offered.device for place in free if place.offered.device.key in chosen)


def _in_order(devices: Sequence[NodeDevice]) -> list[_Place]:
    """Sort devices by root and name, and number the blocks: they do not move when a device is taken."""
    places: list[_Place] = []
    root, number = None, 0
    for one in sorted(devices, key=lambda d: (d.pcie_root, _natural(d.device.name), d.device.key)):
        number = number + 1 if one.pcie_root == root else 0
        root = one.pcie_root
        places.append(_Place(one, (root, (root, number // _QUAD), (root, number // _PAIR))))
    return places


def _natural(name: str) -> tuple[tuple[int, str], ...]:
    """Order gpu-10 behind gpu-2."""
    # The split puts numbers at the odd places.
    parts = enumerate(re.split(r"([0-9]+)", name))
    return tuple((int(part), "") if place % 2 else (-1, part) for place, part in parts)


def _closest(free: Sequence[_Place], count: int, level: int) -> list[_Place]:
    """Return the cheapest choice among places that share all blocks above this level."""
    if count == len(free) or level == len(free[0].blocks):
        return list(free[:count])
    blocks = _grouped(free, lambda place: place.blocks[level])
    fitting = [block for block in blocks if len(block) >= count]
    if fitting:
        choices = [(block, _closest(block, count, level + 1)) for block in fitting]
        return min(choices, key=lambda choice: (_cost(choice[1]), len(choice[0])))[1]
    # No block has so many, so the fullest ones go as a whole, and the rest comes from wherever it is cheapest.
    fullest = max(blocks, key=len)
    rest = [place for place in free if place.blocks[level] != fullest[0].blocks[level]]
    return [*fullest, *_closest(rest, count - len(fullest), level)]


def _cost(chosen: Sequence[_Place]) -> Cost:
    """Return over how many blocks a choice is spread, the largest blocks first."""
    return tuple(len({place.blocks[level] for place in chosen}) for level in range(len(chosen[0].blocks)))


def _grouped(free: Sequence[_Place], of: Callable[[_Place], Hashable]) -> list[list[_Place]]:
    groups: dict[Hashable, list[_Place]] = {}
    for place in free:
        groups.setdefault(of(place), []).append(place)
    return list(groups.values())
