"""The ledger: who gets which GPUs, when they are free again, and what happens when nodes change or vanish."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from builders import merged
from fake_node import Script
from operator_bench import GROUP, LABEL, Bench, condition

pytestmark = pytest.mark.usefixtures("operator")


def node_of(offer: dict[str, object]) -> str:
    """Return the node that an offer was admitted on."""
    status = offer["status"]
    assert isinstance(status, dict)
    return str(status["admission"]["assignments"][0]["nodeName"])


def test_a_waiting_offer_is_admitted_when_a_pod_ends(bench: Bench) -> None:
    bench.node(gpus=4)
    bench.policy()
    bench.admitted("first", 4)
    pod = bench.run("first")
    bench.offer("second", 4)
    bench.decided("second", "WaitingForCapacity")
    bench.end(pod)
    second = bench.decided("second", "Admitted")
    assert len(bench.status_writes("second")) == 2
    assert condition(second, "Admitted")["status"] == "True"
    bench.run("second")


def test_of_waiting_offers_the_one_with_the_higher_score_comes_first(bench: Bench) -> None:
    bench.node(gpus=1)
    bench.policy()
    bench.admitted("first")
    pod = bench.run("first")
    for name, model in (("worse", "microsoft/phi-4"), ("better", "meta-llama/Llama-3.1-8B")):
        bench.offer(name, model=model)
        bench.decided(name, "WaitingForCapacity")
    bench.end(pod)
    bench.decided("better", "Admitted")
    assert condition(bench.get("worse"), "Admitted")["reason"] == "WaitingForCapacity"


def test_a_large_waiting_offer_does_not_hold_up_a_small_one(bench: Bench) -> None:
    bench.node(gpus=4)
    bench.policy()
    bench.admitted("first", 2)
    bench.offer("large", 4)
    bench.decided("large", "WaitingForCapacity")
    bench.admitted("small", 2)


PACKING: dict[str, tuple[dict[str, int], list[tuple[int, str]]]] = {
    "small ones share the node that is fuller already": ({"a": 4, "b": 4}, [(2, "a"), (1, "a"), (1, "a"), (1, "b")]),
    "the smallest node that fits is taken": ({"a": 8, "b": 2, "c": 4}, [(2, "b"), (4, "c"), (4, "a")]),
    "a large gap stays whole for a large offer": ({"a": 4, "b": 8}, [(1, "a"), (4, "b"), (2, "a"), (4, "b")]),
}


@pytest.mark.parametrize("case", PACKING)
def test_offers_are_packed_where_they_leave_the_least_free(bench: Bench, case: str) -> None:
    nodes, wishes = PACKING[case]
    names = {short: bench.node(short, gpus) for short, gpus in nodes.items()}
    bench.policy()
    for number, (gpus, short) in enumerate(wishes):
        assert node_of(bench.admitted(f"offer-{number}", gpus)) == names[short]
    for number, (_, short) in enumerate(wishes):
        bench.bound_pod(f"offer-{number}")
        assert bench.pods(bench.get(f"offer-{number}"))[0]["spec"]["nodeName"] == names[short]


def test_gpus_are_not_added_up_over_nodes(bench: Bench) -> None:
    bench.node("a", gpus=2)
    bench.node("b", gpus=2)
    bench.policy()
    bench.offer("split", 4)
    offer = bench.decided("split", "WaitingForCapacity")
    assert "needs 4 x nvidia.com/gpu on one node" in condition(offer, "Admitted")["message"]


def test_a_pod_of_somebody_else_is_counted(bench: Bench) -> None:
    node = bench.node(gpus=4)
    bench.policy()
    bench.foreign_pod("foreign", node, 3)
    bench.booked(node, 3)
    bench.offer("two", 2)
    offer = bench.decided("two", "WaitingForCapacity")
    assert "1 of 4" in condition(offer, "Admitted")["message"]
    bench.admitted("one", 1)
    bench.kubelet.release(bench.namespace, "foreign")
    bench.decided("two", "Admitted")


def test_a_foreign_pod_that_has_ended_holds_nothing(bench: Bench) -> None:
    node = bench.node(gpus=2)
    bench.policy()
    bench.foreign_pod("foreign", node, 2)
    bench.booked(node, 2)
    bench.end("foreign", 0)
    bench.booked(node, 0)
    bench.admitted("two", 2)


def test_policies_that_share_a_node_share_its_ledger(bench: Bench) -> None:
    bench.node(gpus=4)
    bench.policy()
    other = f"{bench.policy_name}-other"
    second = merged(bench.make_policy(), {})
    second["metadata"]["name"] = other
    bench.api.request("POST", f"{GROUP}/capacitypolicies", second)
    bench.clean_up(f"{GROUP}/capacitypolicies/{other}")
    bench.admitted("mine", 4)
    bench.offer("theirs", 1, policy=other)
    bench.decided("theirs", "WaitingForCapacity")


def test_a_burst_of_offers_never_books_more_than_there_is(bench: Bench) -> None:
    node = bench.node(gpus=8)
    bench.policy()
    for number in range(30):
        bench.offer(f"burst-{number}", (1, 2, 4)[number % 3])
    for number in range(30):
        bench.until(f"burst-{number}", lambda o: condition(o, "Admitted") != {}, "decided")
    offers = [bench.get(f"burst-{number}") for number in range(30)]
    booked = [o["status"]["admission"]["assignments"][0] for o in offers if "admission" in o["status"]]
    assert sum(a["count"] for a in booked) == 8
    assert {a["nodeName"] for a in booked} == {node}
    waiting = {condition(o, "Admitted")["reason"] for o in offers if "admission" not in o["status"]}
    assert waiting == {"WaitingForCapacity"}


def test_a_queue_drains_to_the_last_offer(bench: Bench) -> None:
    node = bench.node(gpus=8)
    bench.kubelet.automate(node, Script(run_seconds=0.1))
    bench.policy()
    for number in range(20):
        bench.offer(f"queued-{number}", (1, 2, 4)[number % 3])
    for number in range(20):
        bench.finished(f"queued-{number}", "Succeeded", 60)
    bench.booked(node, 0)


def test_a_node_that_shrinks_below_what_is_booked_is_reported_and_gets_nothing(bench: Bench) -> None:
    node = bench.node(gpus=8)
    bench.policy()
    bench.admitted("four", 4)
    bench.admitted("two", 2)
    pods = [bench.run(name) for name in ("four", "two")]
    bench.kubelet.set_gpus(node, 4)
    policy = bench.policy_condition("CapacityConsistent", "AllocatableBelowBooked")
    consistent = condition(policy, "CapacityConsistent")
    assert consistent["status"] == "False"
    assert f"{node} offers 4 and 6 are booked" in consistent["message"]
    bench.offer("one", 1)
    bench.decided("one", "WaitingForCapacity")
    bench.end(pods[0])
    bench.decided("one", "Admitted")
    bench.policy_condition("CapacityConsistent", "Ready")
    assert condition(bench.get("two"), "Finished") == {}, "what runs is left alone"


def test_an_unschedulable_node_gets_nothing(bench: Bench) -> None:
    node = bench.node("a", gpus=8)
    bench.policy()
    bench.admitted("before", 2)
    pod = bench.run("before")
    bench.kubelet.cordon(node)
    bench.offer("after", 2)
    bench.decided("after", "InventoryNotReady")
    other = bench.node("b", gpus=4)
    assert node_of(bench.decided("after", "Admitted")) == other
    bench.end(pod)
    bench.finished("before", "Succeeded")


def test_an_uncordoned_node_is_used_again(bench: Bench) -> None:
    node = bench.node()
    bench.kubelet.cordon(node)
    bench.policy()
    bench.offer("early")
    bench.decided("early", "InventoryNotReady")
    bench.kubelet.cordon(node, False)
    assert node_of(bench.decided("early", "Admitted")) == node


def test_a_node_that_the_policy_does_not_select_gets_nothing(bench: Bench) -> None:
    bench.kubelet.add_node(f"{bench.namespace}-z", 8, {LABEL: "another"})
    bench.nodes.append(f"{bench.namespace}-z")
    bench.policy()
    bench.offer("early")
    bench.decided("early", "InventoryNotReady")


def lose_readiness(bench: Bench, node: str) -> None:
    """Let a node say that it is not Ready; its pods stay, and nobody knows whether they still run."""
    bench.kubelet.set_ready(node, False)


def vanish(bench: Bench, node: str) -> None:
    """Remove a node; its pods stay as objects until the garbage collector takes them."""
    bench.kubelet.remove_node(node)


@pytest.mark.parametrize("lose", [lose_readiness, vanish])
def test_a_job_whose_node_is_lost_says_so_and_starts_again_elsewhere(
    bench: Bench, lose: Callable[[Bench, str], None]
) -> None:
    first = bench.node("a", gpus=4)
    bench.policy(attempts={"nodeLostSeconds": 4})
    bench.admitted("moved", 4)
    bench.run("moved")
    second = bench.node("b", gpus=4)
    lose(bench, first)
    told = bench.job_condition("moved", "Running", "NodeLost")
    assert condition(told, "Running")["status"] == "Unknown"
    assert first in condition(told, "Running")["message"]
    pod = bench.run("moved", attempt=2)
    job = bench.training_job("moved")
    attempts = job["status"]["attempts"]
    assert [a.get("outcome") for a in attempts] == ["NodeLost", None]
    assert attempts[1]["assignments"][0]["nodeName"] == second
    assert bench.get("moved")["status"]["admission"]["assignments"][0]["nodeName"] == first, "a record"
    bench.end(pod)
    bench.finished("moved", "Succeeded")


def test_the_gpus_of_a_lost_node_are_not_handed_out_while_its_pod_may_run(bench: Bench) -> None:
    first = bench.node("a", gpus=4)
    bench.policy()
    bench.admitted("moved", 4)
    old = bench.run("moved")
    second = bench.node("b", gpus=4)
    bench.kubelet.set_ready(first, False)
    bench.run("moved", attempt=2)
    # The node comes back, and the pod that was given up still runs there.
    bench.kubelet.set_ready(first, True)
    bench.booked(first, 4)
    bench.booked(second, 4)
    bench.offer("next", 1)
    bench.decided("next", "WaitingForCapacity")
    bench.end(old, 143)
    assert node_of(bench.decided("next", "Admitted")) == first


def test_a_short_absence_of_a_node_costs_no_attempt(bench: Bench) -> None:
    node = bench.node()
    bench.policy(attempts={"nodeLostSeconds": 60})
    bench.admitted("steady", 2)
    pod = bench.run("steady")
    bench.kubelet.set_ready(node, False)
    bench.job_condition("steady", "Running", "NodeLost")
    bench.offer("next")
    bench.decided("next", "InventoryNotReady")
    bench.kubelet.set_ready(node, True)
    bench.job_condition("steady", "Running", "Running")
    bench.decided("next", "Admitted")
    bench.end(pod)
    bench.finished("steady", "Succeeded")
    assert len(bench.training_job("steady")["status"]["attempts"]) == 1


def test_without_room_elsewhere_a_job_whose_node_is_lost_waits_for_some(bench: Bench) -> None:
    first = bench.node("a", gpus=4)
    bench.node("b", gpus=2)
    bench.policy()
    bench.admitted("moved", 4)
    bench.run("moved")
    bench.kubelet.set_ready(first, False)
    bench.job_condition("moved", "Running", "WaitingForCapacity")
    third = bench.node("c", gpus=4)
    bench.run("moved", attempt=2)
    assert bench.training_job("moved")["status"]["attempts"][1]["assignments"][0]["nodeName"] == third
