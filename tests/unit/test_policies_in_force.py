"""Which policies are in force where several of them name resources, and which of their versions."""

from __future__ import annotations

from typing import Any

import pytest

from builders import make_node, make_policy, stored
from core_builders import NOW
from fake_kube import FakeKube
from fake_replica import Rig, leading
from taskoffer.adapters.kube import BATCH_JOBS, NODES, POLICIES
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicyStatus
from taskoffer.decision.ledger import open_ledger
from taskoffer.decision.naming import attempt_name, job_name
from taskoffer.decision.policy_status import PolicyFacts, policy_status
from taskoffer.decision.snapshot import PolicyView
from taskoffer.reconcile.devices import Devices
from taskoffer.reconcile.in_force import pool_of, usable
from taskoffer.reconcile.views import policy_view
from virtual_time import run_virtually, virtual_time

__all__ = ["virtual_time"]

GPU, TYPO, FPGA = "nvidia.com/gpu", "nvidia.com/gpuu", "example.com/fpga"
CREATED = {"old": "2026-01-31T12:00:05Z", "young": "2026-01-31T12:00:10Z", "third": "2026-01-31T12:00:15Z"}


def named(resource: str) -> list[dict[str, Any]]:
    return [{"name": resource, "counts": [1, 2, 4]}]


def view(name: str, resource: str = GPU, *, last: str | None = GPU, **metadata: Any) -> PolicyView:
    """Return a policy whose second generation names a resource, and whose status keeps the first."""
    made = make_policy(name=name, resources=named(resource))
    if last is not None:
        made["status"] = {"activeGeneration": 1, "activeSpec": make_policy(resources=named(last))["spec"]}
    return policy_view(stored(made, uid=f"{name}-uid", generation=2, created=CREATED[name], **metadata))


def in_force(*views: PolicyView) -> dict[str, tuple[int, str] | None]:
    """Return generation and resource of each policy that is in force."""
    found = usable(views, Devices())
    return {n: (v.generation, v.spec.resources[0].name) if v.spec is not None else None for n, v in found.items()}


def test_a_mistyped_resource_in_the_oldest_policy_leaves_the_others_in_force_and_its_own_last_version() -> None:
    views = (view("old", TYPO), view("young"), view("third"))
    assert in_force(*views) == {"old": (1, GPU), "young": (2, GPU), "third": (2, GPU)}
    found = usable(views, Devices())
    assert found["old"].problem == (
        "resources: nvidia.com/gpuu is not nvidia.com/gpu, which this cluster hands out (by old, young, third): "
        "correct it, or name the new resource in every policy"
    )
    assert (found["young"].problem, found["third"].problem) == ("", "")
    pool = pool_of(found)
    assert pool is not None
    assert pool.name == GPU


def test_a_younger_policy_with_another_resource_keeps_its_last_version_too() -> None:
    assert in_force(view("old"), view("young", FPGA)) == {"old": (2, GPU), "young": (1, GPU)}


def test_a_policy_that_was_never_in_force_takes_nothing_from_those_that_were() -> None:
    assert in_force(view("old", FPGA, last=None), view("young")) == {"old": None, "young": (2, GPU)}
    assert in_force(view("old"), view("young", FPGA, last=None)) == {"old": (2, GPU), "young": None}
    assert in_force(view("old", last=None), view("young", FPGA, last=None)) == {"old": (2, GPU), "young": None}


def test_a_cluster_changes_over_with_the_last_policy_that_names_the_new_resource() -> None:
    assert in_force(view("old", FPGA)) == {"old": (2, FPGA)}
    assert in_force(view("old", FPGA), view("young"))["old"] == (1, GPU)
    assert in_force(view("old", FPGA), view("young", FPGA)) == {"old": (2, FPGA), "young": (2, FPGA)}


def test_a_policy_that_cannot_be_in_force_keeps_what_was_so_last_in_its_status() -> None:
    views = view("old"), view("young", FPGA, last=FPGA)
    young, kept = usable(views, Devices())["young"], views[1].last
    assert (young.spec, kept is not None) == (None, True)
    assert kept is not None
    before = policy_status(_facts(young)).model_copy(update={"active_spec": kept[1], "active_generation": 1})
    made = policy_status(_facts(young, before=before))
    assert (made.active_spec, made.active_generation) == (kept[1], 1)
    (ready,) = [c for c in made.conditions if c.type == "Ready"]
    assert ready.message.endswith("; generation 1, in force last, cannot be so either: mend spec")


def _facts(policy: PolicyView, **more: Any) -> PolicyFacts:
    fields = {"generation": 2, "valid": False, "nodes": (), "ledger": open_ledger([]), "pending": 0}
    return PolicyFacts(now=NOW, policy=policy, **{"before": CapacityPolicyStatus(), **fields, **more})


@pytest.mark.usefixtures("virtual_time")
def test_offers_are_admitted_and_trained_under_policies_of_which_one_was_mistyped_also_after_a_restart() -> None:
    async def main() -> None:
        kube = FakeKube()
        kube.put(POLICIES, make_policy(name="old"), uid="old-uid", creationTimestamp=CREATED["old"])
        young = make_policy(name="young", default=False)
        kube.put(POLICIES, young, uid="young-uid", creationTimestamp=CREATED["young"])
        kube.put(NODES, make_node(gpus=8))
        async with leading(kube) as rig:
            await rig.until(lambda: all(_active(rig, name) == 1 for name in ("old", "young")))
            kube.change(POLICIES, "old", {"spec": {"resources": named(TYPO)}})
            await rig.until(lambda: _ready(rig, "old") == "InvalidPolicy")
            await _trains(rig, "old1", "young1")
        async with leading(kube, identity="two") as rig:
            await _trains(rig, "old2", "young2")
            assert (_ready(rig, "young"), _active(rig, "young"), _active(rig, "old")) == ("Ready", 1, 1)
            kube.change(POLICIES, "old", {"spec": {"resources": named(GPU)}})
            await rig.until(lambda: (_ready(rig, "old"), _active(rig, "old")) == ("Ready", 3))

    run_virtually(main())


async def _trains(rig: Rig, *names: str) -> None:
    """Have offers created, each under the policy that it is called after, and wait for their Jobs."""
    for name in names:
        rig.offer(name, policy=name[:-1])
    wanted = {attempt_name(job_name(name, f"{name}-uid"), 1) for name in names}
    await rig.until(lambda: wanted <= {job["metadata"]["name"] for job in rig.kube.all(BATCH_JOBS)})


def _status(rig: Rig, name: str) -> dict[str, Any]:
    status: dict[str, Any] = rig.kube.get_now(POLICIES, name).get("status", {})
    return status


def _active(rig: Rig, name: str) -> int | None:
    return _status(rig, name).get("activeGeneration")


def _ready(rig: Rig, name: str) -> str | None:
    return next((c["reason"] for c in _status(rig, name).get("conditions", []) if c["type"] == "Ready"), None)
