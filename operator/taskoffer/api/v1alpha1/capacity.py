"""What a policy's status says of its GPUs."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from taskoffer.api.base import WireModel
from taskoffer.api.v1alpha1.meta import Name, list_map


class NodeCapacity(WireModel):
    """GPUs of one node as the operator sees them."""

    name: Name = Field(description="Node.")
    allocatable: Annotated[int, Field(ge=0)] = Field(description="GPUs that the node offers.")
    booked: Annotated[int, Field(ge=0)] = Field(description="GPUs that are booked or requested by pods.")
    ready: bool = Field(description="Whether the node is Ready and schedulable.")


class Capacity(WireModel):
    """GPUs of all nodes of the policy."""

    total: Annotated[int, Field(ge=0)] = Field(description="GPUs that Ready and schedulable nodes offer.")
    used: Annotated[int, Field(ge=0)] = Field(description="GPUs that are booked or requested by pods.")
    pending: Annotated[int, Field(ge=0)] = Field(description="Offers that wait.")
    running: Annotated[int, Field(ge=0)] = Field(description="Offers that are admitted and not finished.")
    nodes: Annotated[tuple[NodeCapacity, ...], Field(max_length=256)] = Field(
        (), description="The nodes.", json_schema_extra=list_map("name")
    )
