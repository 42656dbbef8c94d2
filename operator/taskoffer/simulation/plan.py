"""A schedule under construction: places on nodes, and the first moment at which something more fits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

from taskoffer.simulation.ticks import PER_SECOND, Choice, Mode, Place

_SLICE = 3600 * PER_SECOND
"""Places are kept by the hours that they touch, so that neighbours are found without looking at the whole trace."""


class Plan:
    """Places that do not get in each other's way."""

    def __init__(self, gpus: int, nodes: int) -> None:
        self.gpus = gpus
        self.nodes = nodes
        self.places: dict[str, Place] = {}
        self._slices: defaultdict[tuple[int, int], dict[str, Place]] = defaultdict(dict)

    @property
    def worth(self) -> float:
        """What the placed tasks earn."""
        return sum(place.choice.task.worth for place in self.places.values())

    def add(self, place: Place) -> None:
        """Add a place, of which the caller knows that it fits."""
        self.places[place.choice.task.name] = place
        for key in _slices(place.node, place.start, place.end):
            self._slices[key][place.choice.task.name] = place

    def remove(self, name: str) -> None:
        """Take a task's place away."""
        place = self.places.pop(name)
        for key in _slices(place.node, place.start, place.end):
            del self._slices[key][name]

    def touching(self, node: int, start: int, end: int) -> list[Place]:
        """Return the places that overlap [start, end) on a node."""
        found: dict[str, Place] = {}
        for key in _slices(node, start, end):
            found.update(self._slices[key])
        return [place for place in found.values() if place.start < end and place.end > start]

    def earliest(self, choice: Choice, mode: Mode, node: int, first: int | None = None) -> Place | None:
        """Return the earliest place for a task on a node in a mode, from ``first`` on, or None if there is none.

        The earliest start is the window's first tick, or the end of something that is in the way.
        """
        begin = choice.first if first is None else max(choice.first, first)
        if begin > mode.last:
            return None
        near = self.touching(node, begin, mode.last + mode.ticks)
        starts = sorted({begin, *(place.end for place in near if begin < place.end <= mode.last)})
        for start in starts:
            if self._peak(near, start, start + mode.ticks) + mode.gpus <= self.gpus:
                return Place(choice, mode, start, node)
        return None

    def fill(self, choices: Iterable[Choice], cost: Callable[[Place], tuple[float, ...]]) -> None:
        """Give each task, in the order given, the place with the least cost among the earliest ones, if it has any."""
        for choice in choices:
            if choice.task.name in self.places:
                continue
            found = [
                place
                for mode in choice.modes
                for node in range(self.nodes)
                if (place := self.earliest(choice, mode, node)) is not None
            ]
            if found:
                self.add(min(found, key=cost))

    @staticmethod
    def _peak(near: list[Place], start: int, end: int) -> int:
        """Return the most GPUs in use in [start, end)."""
        inside = [place for place in near if place.start < end and place.end > start]
        moments = {start, *(place.start for place in inside if place.start > start)}
        return max(sum(place.mode.gpus for place in inside if place.start <= moment < place.end) for moment in moments)


def _slices(node: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    for hour in range(start // _SLICE, max(start, end - 1) // _SLICE + 1):
        yield node, hour


def gpu_time(place: Place) -> tuple[float, ...]:
    """Return what a place costs where nothing prices the GPUs: GPU-ticks first, then its start."""
    return place.mode.gpus * place.mode.ticks, place.start


def by_density(choices: Iterable[Choice]) -> list[Choice]:
    """Return the tasks by what they earn per GPU-second at their thriftiest, best first."""
    return sorted(
        choices,
        key=lambda choice: -choice.task.worth / max(1, min(mode.gpus * mode.ticks for mode in choice.modes)),
    )
