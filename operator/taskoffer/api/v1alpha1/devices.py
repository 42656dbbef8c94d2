"""Devices of dynamic resource allocation (resource.k8s.io/v1): which GPU, not only how many."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from taskoffer.api.base import WireModel

PCI_BUS_ID = "resource.kubernetes.io/pciBusID"
PCIE_ROOT = "resource.kubernetes.io/pcieRoot"
"""Attributes that Kubernetes itself defines (k8s.io/dynamic-resource-allocation/deviceattribute)."""

UUID = "uuid"
"""Attribute in the driver's own domain; the drivers of several vendors publish it."""


class Device(WireModel):
    """One device of a node, and the attribute by which a ResourceClaim can name it: its name is not in reach of CEL."""

    driver: Annotated[str, StringConstraints(min_length=1, max_length=63)] = Field(
        description="DRA driver that publishes the device."
    )
    pool: Annotated[str, StringConstraints(min_length=1, max_length=253)] = Field(
        description="Pool of the driver, as a rule the node's name."
    )
    name: Annotated[str, StringConstraints(min_length=1, max_length=63)] = Field(
        description="Name of the device in its pool."
    )
    attribute: Annotated[str, StringConstraints(min_length=1, max_length=96)] = Field(
        description="Attribute that tells it from all others of the node, as domain/name."
    )
    value: Annotated[str, StringConstraints(min_length=1, max_length=64)] = Field(
        description="What the attribute says of this device."
    )

    @property
    def key(self) -> str:
        """Driver, pool and name in one: what the ledger knows the device by."""
        return device_key(self.driver, self.pool, self.name)


def device_key(driver: str, pool: str, name: str) -> str:
    """Return how the ledger calls a device. None of the three holds a space."""
    return f"{driver} {pool} {name}"
