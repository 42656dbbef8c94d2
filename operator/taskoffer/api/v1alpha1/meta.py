"""Group, version and the pieces that several kinds share."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints

from taskoffer.api.base import Time, WireModel, explained, spelled
from taskoffer.api.v1alpha1.devices import Device

GROUP = "taskoffer.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
CATEGORY = "taskoffer-all"
"""``kubectl get taskoffer-all`` shows all kinds. It must not be a resource's name: see docs/adr."""

GPU_COUNTS = (1, 2, 4, 8)
"""GPU counts that the schema knows; a policy allows some of them."""

_NAME = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"
_LONGEST_NAME = 253
_SPELLING = "use lower-case letters, digits, '-' and '.', with a letter or digit at both ends"
Name = Annotated[
    str,
    StringConstraints(min_length=1, max_length=_LONGEST_NAME),
    spelled(_NAME, f"must be an object's name: {_SPELLING}"),
]
"""An object name (RFC 1123 subdomain)."""


def name_problem(text: str) -> str | None:
    """Say why no object can have this name and what a name looks like, or return None where one can."""
    if not text:
        return "is empty: give a name"
    if len(text) > _LONGEST_NAME:
        return f"has {len(text)} characters, and a name has {_LONGEST_NAME} at most"
    return None if re.fullmatch(_NAME, text) else f"is no name: {_SPELLING}"


UID = Annotated[str, StringConstraints(min_length=1, max_length=64)]
DecimalString = Annotated[
    str,
    StringConstraints(max_length=16),
    spelled(
        r"^\d{1,8}(\.\d{1,6})?$",
        "must be a decimal number in a string, with at most 8 digits before and 6 after the point: "
        "write for example '0.35'",
    ),
]
"""A non-negative decimal number written as a string, as in ``0.35``."""

ShortText = Annotated[str, StringConstraints(max_length=253)]
Message = Annotated[str, StringConstraints(max_length=1024)]
QuantityString = Annotated[
    str,
    StringConstraints(max_length=32),
    spelled(
        r"^\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$",
        "must be a quantity in a string: write for example '110Gi' or '500m'",
    ),
]
"""A Kubernetes quantity, as in ``110Gi`` or ``500m``."""


def _known_gpu_count(value: int) -> int:
    if value not in GPU_COUNTS:
        raise ValueError(f"must be one of {', '.join(map(str, GPU_COUNTS))}, got {value}")
    return value


GpuCount = Annotated[int, AfterValidator(_known_gpu_count), Field(json_schema_extra={"enum": list(GPU_COUNTS)})]
"""A number of whole GPUs: 1, 2, 4 or 8."""


def rule(expression: str, message: str, *, field_path: str | None = None, on_create: bool = False) -> dict[str, Any]:
    """Build one CEL rule of ``x-kubernetes-validations``; the message names the field and the remedy.

    Args:
        expression: CEL expression that must be true.
        message: What the person reads who broke the rule.
        field_path: Field below the rule's own where the error is shown, for example ``.model.architecture``.
        on_create: Check new objects only. Meant for fields that never change: an object that was stored
            before the rule existed can then still be cancelled and still gets its status.
    """
    made: dict[str, Any] = {"rule": expression, "message": message}
    if on_create:
        made |= {"rule": f"oldSelf.hasValue() || ({expression})", "optionalOldSelf": True}
    return made if field_path is None else {**made, "fieldPath": field_path}


def rules(*made: dict[str, Any]) -> dict[str, Any]:
    """Attach CEL rules to a schema (for ``json_schema_extra``)."""
    return {"x-kubernetes-validations": list(made)}


def list_map(*keys: str) -> dict[str, Any]:
    """Mark a list as a map with these keys (for ``json_schema_extra``), for several writers."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": list(keys)}


ATOMIC_LIST: dict[str, Any] = {"x-kubernetes-list-type": "atomic"}


class ConditionStatus(StrEnum):
    """The three values of a condition."""

    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"


class Condition(WireModel):
    """One aspect of an object's state, as all Kubernetes kinds report it."""

    type: Annotated[str, StringConstraints(min_length=1, max_length=63)] = Field(description="Aspect, in CamelCase.")
    status: ConditionStatus = Field(description="True, False or Unknown.")
    reason: Annotated[str, StringConstraints(min_length=1, max_length=64)] = Field(description="Cause, in CamelCase.")
    message: Annotated[str, StringConstraints(max_length=2048)] = Field("", description="Cause, numbers and remedy.")
    last_transition_time: Time = Field(description="When the status last changed.")
    observed_generation: Annotated[int, Field(ge=0)] | None = Field(
        None, description="The metadata.generation that the condition was computed from."
    )


Conditions = Annotated[tuple[Condition, ...], Field(max_length=16, json_schema_extra=list_map("type"))]


class PolicyRef(WireModel):
    """The exact version of the policy that a decision was made under."""

    name: Name = Field(description="Name of the CapacityPolicy.")
    uid: UID = Field(description="UID of the CapacityPolicy.")
    generation: Annotated[int, Field(ge=0)] = Field(description="Its metadata.generation at the decision.")


class Assignment(WireModel):
    """GPUs on one node."""

    node_name: Name = Field(description="Node that holds the GPUs.")
    resource_name: Annotated[str, StringConstraints(min_length=1, max_length=253)] = Field(
        description="Extended resource, for example nvidia.com/gpu."
    )
    count: GpuCount = Field(description="Number of GPUs: 1, 2, 4 or 8.")
    lane: Annotated[str, StringConstraints(max_length=63)] | None = Field(
        None, description="Lane of the policy that the GPUs are booked in."
    )
    device_class_name: Name | None = Field(
        None, description="DeviceClass that the GPUs are claimed from; absent where the device plugin chooses them."
    )
    devices: Annotated[tuple[Device, ...], Field(min_length=1, max_length=8)] | None = Field(
        None, description="The very GPUs, where they are claimed.", json_schema_extra=ATOMIC_LIST
    )

    @property
    def device_keys(self) -> tuple[str, ...]:
        """What the ledger calls its devices; empty where nobody has chosen any."""
        return tuple(device.key for device in self.devices or ())


def _on_different_places(assignments: tuple[Assignment, ...]) -> tuple[Assignment, ...]:
    if len({(one.node_name, one.resource_name) for one in assignments}) < len(assignments):
        raise ValueError("a node and a resource occur twice: join their counts")
    return assignments


Assignments = Annotated[tuple[Assignment, ...], Field(min_length=1, max_length=8), AfterValidator(_on_different_places)]
"""Where GPUs are booked, each place once: a list with a place that occurs twice could be read but not written."""


_RELATIVE = explained(r"^[^/].*$|^$", "is relative to the volume's root: remove the leading '/'")


class ClaimPath(WireModel):
    """A path on a PersistentVolumeClaim in the offer's own namespace."""

    claim_name: Name = Field(description="Name of the PersistentVolumeClaim.")
    path: Annotated[str, StringConstraints(max_length=1024, pattern=_RELATIVE)] = Field(
        "",
        description="Path on the volume, relative to its root and without '..'; empty means the root.",
        json_schema_extra=rules(
            rule("!self.startsWith('/')", "path is relative to the volume's root: remove the leading '/'"),
            rule("!self.split('/').exists(p, p == '..')", "path must stay on the volume: remove '..'"),
        ),
    )


class ObjectMeta(WireModel):
    """The part of an object's metadata that decisions read; other fields are ignored."""

    model_config = ConfigDict(extra="ignore")

    name: str
    namespace: str | None = None
    uid: str
    resource_version: str
    generation: int = 0
    creation_timestamp: Time
    deletion_timestamp: Time | None = None
    annotations: dict[str, str] = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict)


ApiVersion = Literal["taskoffer.dev/v1alpha1"]
