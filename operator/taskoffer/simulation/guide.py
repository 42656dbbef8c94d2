"""Where prices on GPU time lead the search: to a first schedule, and to the options that are worth a look."""

from __future__ import annotations

import math
from collections.abc import Sequence

from taskoffer.simulation.plan import Plan
from taskoffer.simulation.prices import Prices
from taskoffer.simulation.ticks import PER_SECOND, Choice, Mode, Place
from taskoffer.simulation.window import Option, whole

_WORTH_IT = 1.02
"""A task is placed early if its cheapest run costs at most so many times what it earns: prices are not exact."""


class Guide:
    """What runs cost at given prices, for one set of tasks."""

    def __init__(self, choices: Sequence[Choice], prices: Prices) -> None:
        self._choices = choices
        self._step = prices.step
        self._paid = [float(sum_) for sum_ in prices.paid([n * prices.step for n in range(len(prices.by_cell) + 1)])]
        self._by_mode = {
            (choice.task.name, mode): mode.gpus
            * prices.cheapest(
                choice.task.seconds_by_gpus[mode.gpus], choice.task.arrival, choice.task.last_start_on(mode.gpus)
            )
            for choice in choices
            for mode in choice.modes
        }
        self._least = {
            choice.task.name: min(self._by_mode[choice.task.name, mode] for mode in choice.modes) for choice in choices
        }

    def plan(self, gpus: int, nodes: int) -> Plan:
        """Place the tasks that are worth their price as they arrive, each where it is cheapest, and then the others."""
        plan = Plan(gpus, nodes)
        ordered = sorted(
            self._choices,
            key=lambda choice: (self._least[choice.task.name] > _WORTH_IT * choice.task.worth, choice.first),
        )
        plan.fill(ordered, self._cost)
        return plan

    def options(self, choice: Choice, slack: float, placed: Place | None) -> list[Option]:
        """Return a task's options that lose at most ``slack`` of its worth at these prices, and the one it now has."""
        least, worth = self._least[choice.task.name], choice.task.worth

        def promises(mode: Mode) -> bool:
            price = self._by_mode[choice.task.name, mode]
            return price <= (1 + slack) * worth and price <= least + slack * worth

        return [
            option
            for option in whole(choice)
            if promises(option.mode) or (placed is not None and placed.mode == option.mode)
        ]

    def _cost(self, place: Place) -> tuple[float, ...]:
        price = place.mode.gpus * (self._paid_until(place.end) - self._paid_until(place.start))
        return price, place.mode.gpus * place.mode.ticks, place.start

    def _paid_until(self, tick: int) -> float:
        share, cell = math.modf(tick / PER_SECOND / self._step)
        if cell >= len(self._paid) - 1:
            return self._paid[-1]
        return self._paid[int(cell)] + share * (self._paid[int(cell) + 1] - self._paid[int(cell)])
