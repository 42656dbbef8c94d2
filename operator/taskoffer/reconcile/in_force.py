"""Which policies are in force, and what they hand out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec, ResourcePool
from taskoffer.decision.ledger import NodeView
from taskoffer.decision.snapshot import PolicyView
from taskoffer.reconcile.devices import Devices

if TYPE_CHECKING:
    from taskoffer.reconcile.world import World

USUAL_RESOURCE = "nvidia.com/gpu"


def usable(views: Iterable[PolicyView], devices: Devices) -> dict[str, PolicyView]:
    """Return policies by name. One that hands out another resource than the oldest does has no spec.

    The ledger counts one resource: with two, GPUs of the one would be lent as the other.
    """
    found = {view.name: view for view in views}
    specified = [(view, view.spec) for view in found.values() if view.spec is not None]
    oldest = min(specified, key=lambda one: (one[0].created is not None, one[0].created, one[0].name), default=None)
    for view, spec in specified:
        assert oldest is not None  # noqa: S101
        name, wanted = _handed_out(spec), _handed_out(oldest[1])
        if name != wanted:
            problem = f"resources: {name} is not what the oldest policy, {oldest[0].name}, hands out ({wanted})"
            found[view.name] = replace(view, spec=None, problem=problem)
        elif (lacks := devices.problem(spec.resources[0])) is not None:
            found[view.name] = replace(view, spec=None, problem=lacks, cause=Reason.DEVICES_NOT_AVAILABLE)
    return found


def _handed_out(spec: CapacityPolicySpec) -> str:
    """Say what a policy hands out."""
    pool = spec.resources[0]
    return f"{pool.name} of DeviceClass {pool.device_class_name}" if pool.device_class_name else pool.name


def pool_of(policies: Mapping[str, PolicyView]) -> ResourcePool | None:
    """Return the resource that the ledger counts. Policies of one cluster hand out the same one."""
    return next((policy.spec.resources[0] for policy in policies.values() if policy.spec is not None), None)


def counts_days(policies: Mapping[str, PolicyView]) -> bool:
    """Tell whether some policy asks how many offers were admitted within a day."""
    specs = (view.spec for view in policies.values())
    return any(task.daily_floor is not None for spec in specs if spec is not None for task in spec.task_types)


def node_views(world: World, policy: PolicyView) -> list[NodeView]:
    """Return the nodes that a policy selects."""
    if policy.spec is None:
        return []
    pool = policy.spec.resources[0]
    views = (world.devices.seen(node.view(pool.name), pool) for node in world.nodes)
    return [view for view in views if policy.selects(view)]
