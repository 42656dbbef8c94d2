"""The order of the rows is a function of seed and epoch; what imports torch runs in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.trainer

_SCRIPT = """
import json
from types import SimpleNamespace
from taskoffer_trainer.trainer import EpochSampler, _EpochOrder

def orders(seed, lengths=None):
    sampler = EpochSampler(200, seed, lengths)
    callback = _EpochOrder(sampler)
    found = []
    for epoch in (0, 0.5, 1.0, 1.37, 2.0):
        callback.on_epoch_begin(None, SimpleNamespace(epoch=epoch), None)
        found.append(list(sampler))
    return found

lengths = [row % 50 for row in range(200)]
print(json.dumps({"a": orders(1), "again": orders(1), "b": orders(2), "grouped": orders(1, lengths)}))
"""


@pytest.fixture(scope="module")
def orders() -> dict[str, Any]:
    answer = subprocess.run([sys.executable, "-c", _SCRIPT], check=True, capture_output=True, text=True)
    found = json.loads(answer.stdout)
    assert isinstance(found, dict)
    return found


def test_every_epoch_has_an_order_of_its_own_also_when_entered_in_its_middle(orders: dict[str, Any]) -> None:
    first, first_resumed, second, second_resumed, third = orders["a"]
    assert first == first_resumed
    assert second == second_resumed
    assert len({tuple(order) for order in (first, second, third)}) == 3
    assert all(sorted(order) == list(range(200)) for order in orders["a"])


def test_the_order_depends_on_the_seed_alone(orders: dict[str, Any]) -> None:
    assert orders["a"] == orders["again"]
    assert orders["a"][0] != orders["b"][0]


def test_rows_of_like_length_come_together_within_a_group(orders: dict[str, Any]) -> None:
    order = orders["grouped"][0]
    lengths = [row % 50 for row in order[:64]]
    assert lengths == sorted(lengths, reverse=True)
    assert set(order[:64]) == set(orders["a"][0][:64])
