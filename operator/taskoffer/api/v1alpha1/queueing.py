"""How a policy orders the offers that wait, and where it places those that it admits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, model_validator

from taskoffer.api.base import WireModel
from taskoffer.api.v1alpha1.meta import ATOMIC_LIST, GpuCount, Name


class NodeSelector(WireModel):
    """Nodes: all whose labels match."""

    match_labels: Annotated[dict[str, Annotated[str, Field(max_length=63)]], Field(max_length=16)] = Field(
        default_factory=dict, description="Labels that a node must carry with these values."
    )

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Tell whether a node with these labels is meant."""
        return all(labels.get(key) == value for key, value in self.match_labels.items())


class Queue(WireModel):
    """The order of the offers: priority, then the earliest deadline, then the score, then age."""

    priorities: Annotated[tuple[Name, ...], Field(max_length=16)] = Field(
        (),
        description="priorityClassNames of offers from the lowest to the highest; empty treats all alike.",
        json_schema_extra=ATOMIC_LIST,
    )
    default_priority: Name | None = Field(
        None, description="Priority of offers that name no class; absent means the lowest."
    )
    raise_after_seconds: Annotated[int, Field(ge=1, le=31_536_000)] | None = Field(
        None, description="An offer that has waited so long counts one priority higher, and so on; absent never raises."
    )
    reserve_from_gpus: GpuCount | None = Field(
        None,
        description="An offer of so many GPUs or more that waits for capacity keeps a node: others go there only if "
        "they are predicted to end before it can start; absent keeps none.",
    )

    @model_validator(mode="after")
    def _check(self) -> Queue:
        if len(set(self.priorities)) != len(self.priorities):
            raise ValueError("queue.priorities names a class twice: name each once, from the lowest to the highest")
        if self.default_priority is not None and self.default_priority not in self.priorities:
            raise ValueError(
                f"queue.defaultPriority {self.default_priority} is not one of priorities {list(self.priorities)}: "
                "name one of them or remove it"
            )
        return self


class NamespaceLimit(WireModel):
    """What the offers of a namespace may take."""

    name: Name = Field(description="The namespace.")
    gpus: Annotated[int, Field(ge=1, le=100_000)] | None = Field(
        None, description="GPUs that its offers hold at a time, under this policy; absent does not bind."
    )
    highest_priority: Name | None = Field(
        None, description="Highest of queue.priorities that its offers may ask for; absent allows all."
    )


class Placement(WireModel):
    """Which of the nodes that fit is taken: the one that loses the fewest free blocks of four, then fits best."""

    nvlink_pairs: NodeSelector | None = Field(
        None,
        description="Nodes whose GPUs are joined in pairs: free pairs are kept whole there too.",
    )
