"""The ResourceClaim of an attempt whose very GPUs were chosen, and how its pod refers to it."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from taskoffer.api.v1alpha1.devices import Device
from taskoffer.api.v1alpha1.meta import Assignment
from taskoffer.api.v1alpha1.trainingjob import Attempt

Manifest = dict[str, Any]

_CLAIM = "gpus"
"""What pod and container call the claim."""


def is_pinned(assignment: Assignment) -> bool:
    """Tell whether the very GPUs of an assignment were chosen, so that they are claimed and not asked for by count."""
    return assignment.device_class_name is not None and assignment.devices is not None


def claim_spec(assignments: Sequence[Assignment]) -> Manifest | None:
    """Return the spec of the ResourceClaim for an attempt's pinned GPUs, or None where none are pinned.

    The scheduler can allocate nothing but the chosen devices: as many are asked for as the selector fits.
    """
    requests = [
        {
            "name": f"{_CLAIM}-{number}",
            "exactly": {
                "deviceClassName": assignment.device_class_name,
                "allocationMode": "ExactCount",
                "count": len(assignment.devices or ()),
                "selectors": [{"cel": {"expression": selector(assignment.devices or ())}}],
            },
        }
        for number, assignment in enumerate((a for a in assignments if is_pinned(a)), 1)
    ]
    return {"devices": {"requests": requests}} if requests else None


def selector(devices: Iterable[Device]) -> str:
    """Return the CEL expression that is true of these devices of one node and of no others.

    An attribute is looked at only where it is there: an error in the expression would keep the pod off the node.
    """
    values: dict[tuple[str, str], list[str]] = defaultdict(list)
    for device in devices:
        values[device.driver, device.attribute].append(device.value)
    return " || ".join(_among(driver, attribute, found) for (driver, attribute), found in sorted(values.items()))


def _among(driver: str, attribute: str, values: Sequence[str]) -> str:
    domain, _, name = attribute.rpartition("/")
    field = f"device.attributes[{_text(domain)}].{name}"
    listed = ", ".join(_text(value) for value in values)
    return f"(device.driver == {_text(driver)} && has({field}) && {field} in [{listed}])"


def _text(value: str) -> str:
    """Write a text as CEL does, which is how JSON does it."""
    return json.dumps(value, ensure_ascii=False)


def pod_claims(attempt: Attempt) -> list[Manifest]:
    """Return the ``resourceClaims`` of an attempt's pod: the claim carries the attempt's name."""
    pinned = any(is_pinned(assignment) for assignment in attempt.assignments)
    return [{"name": _CLAIM, "resourceClaimName": attempt.job_name}] if pinned else []


def container_claims(attempt: Attempt) -> list[Manifest]:
    """Return the ``resources.claims`` of the trainer's container."""
    return [{"name": claim["name"]} for claim in pod_claims(attempt)]
