"""Which devices a node offers, which of them a task gets, and that none is ever given away twice."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

from core_builders import FOUR_GPUS, NOW, ONE_GPU, TWO_GPUS, at, claim, cycle, decide, node, offer, policy, snapshot
from device_builders import CLASS, DRIVER, make_device, make_device_class, make_slice
from taskoffer.api.v1alpha1.devices import Device, device_key
from taskoffer.api.v1alpha1.meta import Assignment
from taskoffer.decision.cycle import plan
from taskoffer.decision.devices import NodeDevice, choose
from taskoffer.decision.inventory import ClassRule, Inventory, PublishedDevice, class_rule, inventory, nodes_of
from taskoffer.decision.keys import OfferKey
from taskoffer.decision.ledger import Claim, NodeView, open_ledger
from taskoffer.decision.placed_jobs import MoveRequest, Resumption
from taskoffer.decision.snapshot import OfferView
from taskoffer.reconcile.device_views import device_class_entry, slice_entry

Object = dict[str, Any]
POOL = {"name": "nvidia.com/gpu", "counts": [1, 2, 4], "deviceClassName": CLASS}
PINNING = policy(resources=[POOL])
RULE = ClassRule(DRIVER, ((f"{DRIVER}/type", "gpu"),))


def device(number: int, at_node: str = "node-a", root: str = "") -> NodeDevice:
    """Return a device of a node as it is offered."""
    name = f"gpu-{number}"
    return NodeDevice(
        Device(driver=DRIVER, pool=at_node, name=name, attribute=f"{DRIVER}/uuid", value=f"GPU-{at_node}-{name}"), root
    )


def keys(at_node: str, *numbers: int) -> tuple[str, ...]:
    return tuple(device_key(DRIVER, at_node, f"gpu-{number}") for number in numbers)


def device_node(name: str = "node-a", count: int = 8) -> NodeView:
    """Return a node that tells its GPUs apart."""
    return replace(node(name, count), devices=tuple(device(n, name) for n in range(count)))


def numbers(chosen: Sequence[Device] | None) -> list[int] | None:
    return None if chosen is None else [int(one.name.removeprefix("gpu-")) for one in chosen]


# The choice

HALVES = "aaaabbbb"
CHOICES: dict[str, tuple[str, list[int], int, list[int] | None]] = {
    "the first of a free node": ("........", [], 1, [0]),
    "neighbours of a free node": ("........", [], 2, [0, 1]),
    "a block of four": ("........", [], 4, [0, 1, 2, 3]),
    "all of it": ("........", [], 8, [0, 1, 2, 3, 4, 5, 6, 7]),
    "one that fills a broken pair": ("........", [0], 1, [1]),
    "a pair of the block that is broken already": ("........", [0], 2, [2, 3]),
    "the whole block, not the broken one": ("........", [0], 4, [4, 5, 6, 7]),
    "a whole pair elsewhere and not two halves": ("........", [0, 2], 2, [4, 5]),
    "two halves where no pair is left": ("....", [0, 2], 2, [1, 3]),
    "as few blocks as there must be": ("........", [0, 4], 4, [1, 2, 3, 5]),
    "nothing where too few are free": ("....", [0, 1, 2], 2, None),
    "one root and not two": (HALVES, [0], 4, [4, 5, 6, 7]),
    "the root of which less is free": (HALVES, [4, 5], 2, [6, 7]),
    "the root of which less is free, for one": (HALVES, [4], 1, [5]),
    "both roots where one is too small": (HALVES, [0], 7, [1, 2, 3, 4, 5, 6, 7]),
    "pairs of one root, which its names do not show": ("abababab", [], 4, [0, 2, 4, 6]),
    "tenths behind ones": ("............", [0, 1, 2, 3, 4, 5, 6, 7], 2, [8, 9]),
}


@pytest.mark.parametrize("case", CHOICES)
def test_devices_are_chosen_close_together_and_leave_whole_blocks(case: str) -> None:
    roots, taken, count, expected = CHOICES[case]
    offered = [device(number, root=root.strip(".")) for number, root in enumerate(roots)]
    assert numbers(choose(offered, keys("node-a", *taken), count)) == expected


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.text("ab.", min_size=1, max_size=10),
    st.sets(st.integers(0, 9)),
    st.sampled_from([1, 2, 4, 8]),
    st.randoms(use_true_random=False),
)
def test_a_choice_is_of_free_devices_complete_and_independent_of_the_order(
    roots: str, taken: set[int], count: int, shuffle: random.Random
) -> None:
    offered = [device(number, root=root) for number, root in enumerate(roots)]
    busy = set(keys("node-a", *taken))
    free = {one.device.key for one in offered} - busy
    found = choose(offered, busy, count)
    assert (found is None) == (len(free) < count)
    assert found == choose(shuffle.sample(offered, len(offered)), busy, count)
    if found is not None:
        assert len({one.key for one in found} & free) == count


# What a class means

OWN = f"device.attributes['{DRIVER}']"
CLASSES: dict[str, tuple[list[str], ClassRule | str]] = {
    "NVIDIA's": ([f"device.driver == '{DRIVER}' && {OWN}.type == 'gpu'"], RULE),
    "in two selectors": ([f'device.driver == "{DRIVER}"', f'device.attributes["{DRIVER}"]["type"]=="gpu"'], RULE),
    "the driver alone": (["device.driver == 'gpu.amd.com'"], ClassRule("gpu.amd.com")),
    "a number": ([f"device.driver == 'd' && {OWN}.index == 3"], ClassRule("d", ((f"{DRIVER}/index", 3),))),
    "a truth": ([f"device.driver == 'd' && {OWN}.ok == true"], ClassRule("d", ((f"{DRIVER}/ok", True),))),
    "no driver": ([f"{OWN}.type == 'gpu'"], "do not name one driver"),
    "two drivers": (["device.driver == 'a'", "device.driver == 'b'"], "do not name one driver"),
    "nothing at all": ([], "do not name one driver"),
    "an or": (["device.driver == 'a' || device.driver == 'b'"], "is not understood"),
    "a comparison of capacity": (
        ["device.driver == 'a' && device.capacity['a'].memory.compareTo(quantity('40Gi')) >= 0"],
        "is not understood",
    ),
    "a negation": (["!(device.driver == 'a')"], "is not understood"),
    "an operator inside of a text": (["device.driver == 'a && b'"], "is not understood"),
    "a quote that does not end": (["device.driver == 'a"], "is not understood"),
}


@pytest.mark.parametrize("case", CLASSES)
def test_a_device_class_is_understood_in_full_or_not_at_all(case: str) -> None:
    expressions, expected = CLASSES[case]
    found = class_rule(expressions)
    if isinstance(expected, str):
        assert isinstance(found, str)
        assert expected in found
    else:
        assert found == expected


@pytest.mark.parametrize(("value", "meant"), [(1, True), (True, False), ("1", False), (None, False), (2, False)])
def test_an_attribute_is_compared_with_its_type(value: Any, meant: bool) -> None:
    attributes = {} if value is None else {"d/index": value}
    assert ClassRule("d", (("d/index", 1),)).means("d", PublishedDevice("x", attributes)) is meant


# What nodes offer


def offered(*raw: Object) -> dict[str, list[str]]:
    """Return the names of the devices that are offered, by node."""
    found = inventory([slice_entry(one) for one in raw], RULE)
    return {name: sorted(one.device.name for one in devices) for name, devices in found.offered.items()}


def one_device(**over: Any) -> Object:
    return make_slice(devices=[make_device(**over)])


def attributes(**over: Any) -> Object:
    """Return a slice whose one device has other attributes; None takes one away."""
    made = make_device()
    changed = {**made["attributes"], **over}
    made["attributes"] = {name: value for name, value in changed.items() if value is not None}
    return make_slice(devices=[made])


BUS = {"resource.kubernetes.io/pciBusID": {"string": "0000:3b:00.0"}}
ONE = {"node-a": ["gpu-0"]}
INVENTORIES: dict[str, tuple[list[Object], dict[str, list[str]]]] = {
    "a node's devices": ([make_slice(devices=2)], {"node-a": ["gpu-0", "gpu-1"]}),
    "two nodes": ([make_slice(devices=1), make_slice("b", 1)], {**ONE, "b": ["gpu-0"]}),
    "the newest generation only": ([make_slice(devices=4), make_slice(devices=1, generation=2)], ONE),
    "a pool in two slices": (
        [
            make_slice(devices=[make_device("gpu-0")], slices=2),
            make_slice(devices=[make_device("gpu-1")], slices=2, name="b"),
        ],
        {"node-a": ["gpu-0", "gpu-1"]},
    ),
    "no incomplete pool": ([make_slice(slices=2)], {}),
    "not the old pool while the new one is incomplete": ([make_slice(), make_slice(generation=2, slices=2)], {}),
    "no pool in which a name occurs twice": ([make_slice(devices=[make_device(), make_device()])], {}),
    "no device that may not be scheduled": ([one_device(taint="NoSchedule")], {}),
    "no device that is to be left": ([one_device(taint="NoExecute")], {}),
    "a device whose taint only informs": ([one_device(taint="None")], ONE),
    "no device that several may have": ([one_device(allowMultipleAllocations=True)], {}),
    "no device that shares its counters": ([one_device(consumesCounters=[{"counterSet": "x"}])], {}),
    "no device of another type": ([attributes(type={"string": "mig"})], {}),
    "no device of another driver": ([make_slice(driver="gpu.example.com")], {}),
    "no device outside of nodes": ([make_slice(nodeName=None, allNodes=True)], {}),
    "no device that cannot be named": ([attributes(uuid=None)], {}),
    "a device that its place on the bus names": ([attributes(uuid=None, **BUS)], ONE),
    "no devices that one name means": (
        [make_slice(devices=[make_device("gpu-0"), {**make_device("gpu-0"), "name": "gpu-1"}, make_device("gpu-2")])],
        {"node-a": ["gpu-2"]},
    ),
    "nothing of an empty object": ([{**make_slice(), "spec": None}], {}),
}


@pytest.mark.parametrize("case", INVENTORIES)
def test_a_node_offers_what_its_drivers_publish_for_it(case: str) -> None:
    raw, expected = INVENTORIES[case]
    assert offered(*raw) == expected


def test_devices_that_no_claim_could_name_are_counted() -> None:
    assert inventory([slice_entry(attributes(uuid=None))], RULE) == Inventory({}, 1)


def test_the_newest_slice_says_where_a_device_is() -> None:
    slices = [slice_entry(make_slice("pool", 1, generation=2, nodeName="new")), slice_entry(make_slice("pool", 2))]
    assert nodes_of(slices) == {keys("pool", 0)[0]: "new", keys("pool", 1)[0]: "pool"}


def test_the_class_that_ships_with_the_driver_is_read() -> None:
    assert device_class_entry(make_device_class()).rule == RULE
    assert device_class_entry({"metadata": {"name": "x"}, "spec": None}).rule == class_rule([])


# The cycle


def places_of(made: Any) -> dict[str, list[int] | None]:
    """Return the devices of each admitted offer."""
    return {
        d.offer.key.name: numbers(d.answer.admission.assignments[0].devices)
        for d in made.decisions
        if d.answer.admission is not None
    }


def test_an_admission_names_the_very_devices_and_its_message_too() -> None:
    made = decide(offer("a", parameters=TWO_GPUS), nodes=[device_node()], policies=[PINNING])
    assert made.answer.admission is not None
    (assignment,) = made.answer.admission.assignments
    assert (assignment.count, assignment.device_class_name) == (2, CLASS)
    assert assignment.device_keys == keys("node-a", 0, 1)
    assert "2 x nvidia.com/gpu on node-a (gpu-0, gpu-1), where 2 of 8 are booked now" in made.answer.message


def test_a_policy_without_a_device_class_books_counts_as_ever() -> None:
    made = decide(offer("a", parameters=TWO_GPUS), nodes=[node()])
    assert made.answer.admission is not None
    assert made.answer.admission.assignments[0].to_wire() == {
        "nodeName": "node-a",
        "resourceName": "nvidia.com/gpu",
        "count": 2,
    }


def test_offers_of_one_cycle_get_different_devices() -> None:
    pending = [offer(f"o{n}", parameters=size, created=at(n)) for n, size in enumerate([ONE_GPU, FOUR_GPUS, TWO_GPUS])]
    made = cycle(pending, nodes=[device_node()], policies=[PINNING])
    assert places_of(made) == {"o0": [0], "o1": [4, 5, 6, 7], "o2": [2, 3]}


def test_a_device_that_a_foreign_claim_has_is_left_alone() -> None:
    theirs = Claim("claim:x", "node-a", 1, "claim", devices=keys("node-a", 0))
    made = cycle([offer("a", parameters=FOUR_GPUS)], nodes=[device_node()], claims=[theirs], policies=[PINNING])
    assert places_of(made) == {"a": [4, 5, 6, 7]}


def test_an_offer_is_charged_for_each_of_its_devices_whoever_names_them() -> None:
    views = [
        Claim("a", "node-a", 2, "admission", "lab", devices=keys("node-a", 2, 3)),
        Claim("a", "node-a", 2, "claim", "lab", devices=keys("node-a", 1, 2)),
    ]
    assert open_ledger(views[:1]).booked == {"node-a": 2}
    assert open_ledger(views).booked == {"node-a": 3}


def test_a_pod_whose_request_became_a_claim_is_charged_once() -> None:
    views = [claim("pod:x", count=2, source="pod"), Claim("pod:x", "node-a", 2, "claim", devices=keys("node-a", 0, 1))]
    assert open_ledger(views).booked == {"node-a": 2}


def move(count: int = 2, avoid: Sequence[str] = ()) -> MoveRequest:
    return MoveRequest(OfferKey("default", "a-job"), "a", "lab", count, None, frozenset(avoid))


def test_a_job_that_moves_gets_devices_of_its_new_node() -> None:
    lost = Claim("a", "node-a", 2, "admission", "lab", devices=keys("node-a", 0, 1))
    nodes = [device_node(), device_node("node-b")]
    (found,) = cycle([], nodes=nodes, claims=[lost], moves=[move(avoid=["node-a"])], policies=[PINNING]).moves
    (assignment,) = found.assignments
    assert (assignment.node_name, assignment.device_keys) == ("node-b", keys("node-b", 0, 1))
    assert assignment.device_class_name == CLASS


def test_a_job_that_goes_on_after_it_was_stopped_for_another_gets_free_devices() -> None:
    stopped = Resumption(
        key=OfferKey("default", "a-job"),
        offer_uid="a",
        name="default/a",
        policy="lab",
        gpus=2,
        lane=None,
        quota=None,
        level=0,
        since=NOW,
        occupies=600.0,
        left_for="b",
        deadline=None,
    )
    other = Claim("b", "node-a", 2, "admission", "lab", devices=keys("node-a", 0, 1))
    world = snapshot([], nodes=[device_node(count=4)], claims=[other], policies=[PINNING])
    (found,) = plan(replace(world, resumptions=[stopped])).moves
    assert found.assignments[0].device_keys == keys("node-a", 2, 3)


def test_a_job_that_cannot_move_gets_its_own_devices_again() -> None:
    own = Claim("a", "node-a", 2, "admission", "lab", devices=keys("node-a", 1, 2))
    other = Claim("b", "node-a", 2, "admission", "lab", devices=keys("node-a", 0, 3))
    nodes = [device_node(count=4)]
    (found,) = cycle([], nodes=nodes, claims=[own, other], moves=[move()], policies=[PINNING]).moves
    assert found.assignments[0].device_keys == keys("node-a", 1, 2)


def test_a_job_whose_device_somebody_else_got_takes_another_one() -> None:
    own = Claim("a", "node-a", 1, "admission", "lab", devices=keys("node-a", 0))
    thief = Claim("claim:x", "node-a", 1, "claim", devices=keys("node-a", 0))
    (found,) = cycle([], nodes=[device_node()], claims=[own, thief], moves=[move(1)], policies=[PINNING]).moves
    assert found.assignments[0].device_keys == keys("node-a", 1)


@pytest.mark.parametrize(("count", "expected"), [(1, None), (2, keys("node-a", 1))])
def test_a_job_that_stays_on_its_node_leaves_the_device_that_its_last_attempt_still_has(
    count: int, expected: tuple[str, ...] | None
) -> None:
    views = [Claim("a", "node-a", 1, source, "lab", devices=keys("node-a", 0)) for source in ("admission", "claim")]  # type: ignore[arg-type]
    moves = cycle([], nodes=[device_node(count=count)], claims=views, moves=[move(1)], policies=[PINNING]).moves
    assert [found.assignments[0].device_keys for found in moves] == ([expected] if expected else [])


def test_devices_that_two_holders_have_are_told() -> None:
    views = [Claim(holder, "node-a", 1, "admission", devices=keys("node-a", 0)) for holder in "ab"]
    ledger = open_ledger([*views, Claim("c", "node-a", 1, "admission", devices=keys("node-a", 1))])
    assert ledger.shared_devices("node-a", keys("node-a", 1, 0)) == keys("node-a", 0)[0]
    assert ledger.shared_devices("node-a", keys("node-a", 1)) is None
    assert ledger.shared_devices("node-b", keys("node-a", 0)) is None


class PinnedCluster(RuleBasedStateMachine):
    """Offers come and go, attempts move, claims outlive them, drivers withdraw devices, others take some too."""

    running: Bundle[str] = Bundle("running")

    def __init__(self) -> None:
        super().__init__()
        self.nodes = {name: device_node(name, count) for name, count in (("n0", 8), ("n1", 4))}
        self.booked: dict[str, Assignment] = {}
        self.held: dict[tuple[str, int], Claim] = {}
        self.foreign: dict[str, Claim] = {}
        self.waiting: list[OfferView] = []
        self.number = 0

    @property
    def claims(self) -> list[Claim]:
        admitted = [
            Claim(uid, a.node_name, a.count, "admission", "lab", devices=a.device_keys)
            for uid, a in self.booked.items()
        ]
        return [*admitted, *self.held.values(), *self.foreign.values()]

    def taken(self, besides: str = "") -> set[tuple[str, str]]:
        return {(c.node, key) for c in self.claims if c.holder != besides for key in c.devices}

    def start(self, uid: str, assignment: Assignment) -> None:
        places = {(assignment.node_name, key) for key in assignment.device_keys}
        assert len(places) == assignment.count
        assert not places & self.taken(besides=uid), f"{uid} gets what somebody has"
        offered = {one.device.key for one in self.nodes[assignment.node_name].devices}
        assert set(assignment.device_keys) <= offered
        self.booked[uid] = assignment

    @rule(target=running, parameters=st.lists(st.sampled_from([ONE_GPU, TWO_GPUS, FOUR_GPUS]), max_size=5))
    def offers_come(self, parameters: list[int]) -> object:
        for size in parameters:
            self.number += 1
            self.waiting.append(offer(f"o{self.number}", parameters=size, created=at(self.number)))
        made = cycle(self.waiting, nodes=list(self.nodes.values()), claims=self.claims, policies=[PINNING])
        started = []
        for decision in made.decisions:
            if decision.answer.admission is not None:
                self.start(decision.offer.uid, decision.answer.admission.assignments[0])
                started.append(decision.offer.uid)
        self.waiting = [one for one in self.waiting if one.uid not in self.booked]
        return multiple(*started)

    @rule(uid=running)
    def an_offer_is_deleted_while_its_claim_stays(self, uid: str) -> None:
        self.booked.pop(uid, None)

    @rule(uid=running)
    def an_attempt_claims_its_devices(self, uid: str) -> None:
        if (found := self.booked.get(uid)) is not None:
            self.number += 1
            made = Claim(uid, found.node_name, found.count, "claim", "lab", devices=found.device_keys)
            self.held[uid, self.number] = made

    @rule(uid=running, all_of_it=st.booleans())
    def claims_are_given_back(self, uid: str, all_of_it: bool) -> None:
        for held in [held for held in self.held if held[0] == uid]:
            del self.held[held]
        if all_of_it:
            self.booked.pop(uid, None)

    @rule(uid=running)
    def an_attempt_moves(self, uid: str) -> None:
        if uid not in self.booked:
            return
        wanted = MoveRequest(OfferKey("default", uid), uid, "lab", self.booked[uid].count, None, frozenset())
        nodes = list(self.nodes.values())
        for found in cycle([], nodes=nodes, claims=self.claims, moves=[wanted], policies=[PINNING]).moves:
            self.start(uid, found.assignments[0])

    @rule(name=st.sampled_from(["n0", "n1"]), lost=st.sets(st.integers(0, 7), max_size=3))
    def a_driver_publishes_anew(self, name: str, lost: set[int]) -> None:
        whole = device_node(name, 8 if name == "n0" else 4)
        left = tuple(one for number, one in enumerate(whole.devices) if number not in lost)
        self.nodes[name] = replace(whole, allocatable=len(left), devices=left)

    @rule(name=st.sampled_from(["n0", "n1"]), number=st.integers(0, 7))
    def somebody_else_takes_a_free_device(self, name: str, number: int) -> None:
        (key,) = keys(name, number)
        offered = {one.device.key for one in self.nodes[name].devices}
        if key in offered and (name, key) not in self.taken():
            self.foreign[f"{name}-{number}"] = Claim(f"claim:{name}-{number}", name, 1, "claim", devices=(key,))

    @rule(name=st.sampled_from(["n0", "n1"]), number=st.integers(0, 7))
    def somebody_else_gives_it_back(self, name: str, number: int) -> None:
        self.foreign.pop(f"{name}-{number}", None)

    @invariant()
    def nobody_shares_a_device(self) -> None:
        for name, found in open_ledger(self.claims).devices.items():
            assert all(len(holders) == 1 for holders in found.values()), name


PinnedCluster.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None, derandomize=True)
TestPinnedCluster = PinnedCluster.TestCase
