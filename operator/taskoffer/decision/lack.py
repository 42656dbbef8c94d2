"""What an offer lacks on a node, and which running jobs have it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from taskoffer.decision.placed_jobs import Running


@dataclass(frozen=True, slots=True)
class Lack:
    """What is missing on a node, and in the limits of the policy, for an offer to start there."""

    node: str
    lane: str | None
    quota: str | None
    gpus: int
    lane_gpus: int = 0
    quota_gpus: int = 0
    slots: int = 0

    def met_by(self, ended: Iterable[Running]) -> bool:
        """Tell whether nothing is missing any more once jobs on the node have ended."""
        gpus, lane_gpus, quota_gpus, slots = self.gpus, self.lane_gpus, self.quota_gpus, self.slots
        for running in ended:
            gpus -= running.gpus
            lane_gpus -= running.gpus if running.lane == self.lane else 0
            quota_gpus -= running.gpus if running.quota == self.quota else 0
            slots -= 1
        return gpus <= 0 and lane_gpus <= 0 and quota_gpus <= 0 and slots <= 0

    def helped_by(self, running: Running) -> bool:
        """Tell whether the end of a job on the node gives something that is missing."""
        in_lane = self.lane_gpus > 0 and running.lane == self.lane
        in_quota = self.quota_gpus > 0 and running.quota == self.quota
        return self.gpus > 0 or in_lane or in_quota or self.slots > 0

    def without(self, running: Running) -> Lack:
        """Return what is still missing once a job on the node has ended."""
        return replace(
            self,
            gpus=self.gpus - running.gpus,
            lane_gpus=self.lane_gpus - (running.gpus if running.lane == self.lane else 0),
            quota_gpus=self.quota_gpus - (running.gpus if running.quota == self.quota else 0),
            slots=self.slots - 1,
        )
