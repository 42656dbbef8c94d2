"""Who is charged for what, and where the next task goes."""

import pytest

from core_builders import claim, node
from taskoffer.decision.ledger import Claim, Ledger, best_fit, open_ledger

CHARGES: list[tuple[str, list[Claim], dict[str, int]]] = [
    ("nothing is booked without claims", [], {}),
    ("an admission charges its node", [claim("a", "n1", 4)], {"n1": 4}),
    (
        "the views of one booking charge their maximum",
        [
            claim("a", "n1", 2, "assumed"),
            claim("a", "n1", 2, "admission"),
            claim("a", "n1", 2, "job"),
            claim("a", "n1", 2, "pod"),
        ],
        {"n1": 2},
    ),
    (
        "a pod that is larger than its admission charges what it has",
        [claim("a", count=1), claim("a", count=4, source="pod")],
        {"node-a": 4},
    ),
    (
        "several pods of one holder add up",
        [claim("a", count=2), claim("a", count=2, source="pod"), claim("a", count=2, source="pod")],
        {"node-a": 4},
    ),
    (
        "pods that end slowly keep their node charged while the next attempt has another one",
        [claim("a", "n2", 2), claim("a", "n1", 2, "pod")],
        {"n1": 2, "n2": 2},
    ),
    ("holders add up", [claim("a", count=2), claim("b", count=4)], {"node-a": 6}),
    (
        "foreign pods count like ours",
        [claim("a", count=2), claim("pod:x", count=3, source="pod", policy=None)],
        {"node-a": 5},
    ),
]


@pytest.mark.parametrize(("claims", "booked"), [c[1:] for c in CHARGES], ids=[c[0] for c in CHARGES])
def test_charges(claims: list[Claim], booked: dict[str, int]) -> None:
    assert open_ledger(claims).booked == booked
    assert open_ledger(reversed(claims)).booked == booked


def test_lanes_and_running_holders_are_counted_once_per_booking() -> None:
    ledger = open_ledger(
        [
            claim("a", count=2, lane="text"),
            claim("a", count=2, source="pod", lane="text"),
            claim("b", count=1, lane="text"),
            claim("c", count=1, lane="image"),
            claim("d", count=1, policy="other", lane="text"),
            claim("pod:x", count=1, source="pod", policy=None),
        ]
    )
    assert ledger.lane_used("lab", "text") == 3
    assert ledger.lane_used("lab", "image") == 1
    assert ledger.lane_used("other", "text") == 1
    assert ledger.lane_used("lab", "unknown") == 0
    assert ledger.running("lab") == 3
    assert ledger.running("unknown") == 0


def test_a_shortened_lane_label_of_a_pod_does_not_hide_the_lane_of_the_admission() -> None:
    claims = [claim("a", count=2, lane="my lane"), claim("a", count=2, source="pod", lane="my-lane")]
    for order in (claims, claims[::-1]):
        assert open_ledger(order).lane_used("lab", "my lane") == 2


def test_free_is_what_is_allocatable_and_not_booked_on_a_ready_node() -> None:
    ledger = open_ledger([claim("a", "n1", 4), claim("b", "small", 4)])
    assert ledger.free(node("n1", 8)) == 4
    assert ledger.free(node("other", 8)) == 8
    assert ledger.free(node("n1", 8, ready=False)) == 0
    assert ledger.free(node("small", 2)) == -2


def test_booking_adds_to_node_lane_and_policy() -> None:
    ledger = open_ledger([])
    ledger.book("a", "n1", 2, "lab", "text")
    ledger.book("b", "n1", 4, "lab", None)
    assert ledger.free(node("n1", 8)) == 2
    assert ledger.lane_used("lab", "text") == 2
    assert ledger.running("lab") == 2


FITS = [
    ("the fullest node that fits", {"n1": 8, "n2": 4, "n3": 2}, 2, "n3"),
    ("a gap is left whole", {"n1": 8, "n2": 4, "n3": 1}, 4, "n2"),
    ("ties go by name", {"n2": 4, "n1": 4}, 2, "n1"),
    ("nothing fits", {"n1": 1, "n2": 3}, 4, None),
    ("there are no nodes", {}, 1, None),
]


@pytest.mark.parametrize(("free", "count", "wanted"), [c[1:] for c in FITS], ids=[c[0] for c in FITS])
def test_best_fit(free: dict[str, int], count: int, wanted: str | None) -> None:
    found = best_fit([node(name, gpus) for name, gpus in free.items()], Ledger({}, {}, {}), count)
    assert (found.name if found else None) == wanted


def test_best_fit_passes_over_nodes_that_are_not_ready() -> None:
    found = best_fit([node("n1", 2, ready=False), node("n2", 8)], Ledger({}, {}, {}), 2)
    assert found is not None
    assert found.name == "n2"


def test_two_two_and_four_fill_one_node_of_eight_before_the_next_is_touched() -> None:
    nodes, ledger = [node("n1", 8), node("n2", 8)], open_ledger([])
    for holder, count in (("a", 2), ("b", 2), ("c", 4), ("d", 2)):
        found = best_fit(nodes, ledger, count)
        assert found is not None
        assert found.name == ("n2" if holder == "d" else "n1")
        ledger.book(holder, found.name, count, "lab", None)
    assert ledger.booked == {"n1": 8, "n2": 2}


def test_a_namespaces_quota_counts_by_the_admissions_policy_and_not_by_a_shortened_label() -> None:
    whole = "p" * 70
    claims = [
        Claim("a", "n1", 2, "admission", whole, None, "team"),
        Claim("a", "n1", 2, "pod", whole[:63], None, "team"),
    ]
    for order in (claims, claims[::-1]):
        assert open_ledger(order).held_by(whole, "team") == 2
