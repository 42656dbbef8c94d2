"""Which policies are in force, and what they hand out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
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
_TOLD = 3
"""Policies that a message names."""


def usable(views: Iterable[PolicyView], devices: Devices) -> dict[str, PolicyView]:
    """Return policies by name, with the specs that are in force.

    The ledger counts one resource: with two, GPUs of the one would be lent as the other. It is the one that all specs
    name. While they name several nothing changes hands, or one mistyped name would put all the others out of force: it
    stays the one that the oldest policy handed out last. A policy that names another one keeps its last version with
    this one, or has no spec where it has none. Thus a cluster changes over once the last of its policies names the new
    resource.
    """
    found = {view.name: view for view in views}
    wanted = _in_use(found.values())
    kept = {name: _with(view, wanted) for name, view in found.items()}
    names = [name for name, view in kept.items() if view.spec is not None]
    for name, view in kept.items():
        problems = [view.problem] if view.problem else []
        if view is not found[name]:
            problems.append(_is_another(found[name], wanted, names))
            kept[name] = view = replace(view, problem="; ".join(problems))
        if view.spec is not None and (lacks := devices.problem(view.spec.resources[0])) is not None:
            problem = "; ".join([*problems, lacks])
            kept[name] = replace(view, spec=None, problem=problem, cause=Reason.DEVICES_NOT_AVAILABLE)
    return kept


def _is_another(view: PolicyView, wanted: str | None, names: list[str]) -> str:
    """Say that a policy names another resource than these policies hand out, and what helps."""
    assert view.spec is not None  # noqa: S101 - asked by the caller.
    by = ", ".join(names[:_TOLD]) + (f" and {len(names) - _TOLD} more" if len(names) > _TOLD else "")
    return (
        f"resources: {_handed_out(view.spec)} is not {wanted}, which this cluster hands out (by {by}): correct it, or "
        "name the new resource in every policy"
    )


def _in_use(views: Collection[PolicyView]) -> str | None:
    """Say what policies hand out: what all of them name, else what the oldest one did that was in force."""
    specs = {view.name: view.spec for view in views if view.spec is not None}
    if len(named := {_handed_out(spec) for spec in specs.values()}) == 1:
        return named.pop()
    by_age = sorted(views, key=lambda view: (view.created is not None, view.created, view.name))
    lasting = [view.last[1] for view in by_age if view.last is not None]
    specified = [specs[view.name] for view in by_age if view.name in specs]
    return next((_handed_out(spec) for spec in (*lasting, *specified)), None)


def _with(view: PolicyView, wanted: str | None) -> PolicyView:
    """Return a policy's version that hands out what is wanted: its own, or its last one; without a spec if neither."""
    if view.spec is None or _handed_out(view.spec) == wanted:
        return view
    if view.last is not None and _handed_out(view.last[1]) == wanted:
        return replace(view, generation=view.last[0], spec=view.last[1])
    return replace(view, spec=None)


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
