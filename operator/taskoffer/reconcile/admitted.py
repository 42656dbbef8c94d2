"""How many offers of a task type were admitted lately."""

from __future__ import annotations

from collections import Counter
from datetime import datetime

from taskoffer.api.tasks import TaskType


class Admitted:
    """The admissions of the stored offers, running and finished, by their moment."""

    def __init__(self) -> None:
        self._of: dict[str, tuple[str, TaskType, datetime]] = {}

    def add(self, uid: str, policy: str, task_type: TaskType, moment: datetime) -> None:
        """Take in that an offer was admitted."""
        self._of[uid] = policy, task_type, moment

    def drop(self, uid: str) -> None:
        """Take in that an offer is gone or has changed."""
        self._of.pop(uid, None)

    def since(self, moment: datetime) -> dict[tuple[str, TaskType], int]:
        """Return how many were admitted since then, by policy and task type."""
        return dict(Counter((policy, task) for policy, task, at in self._of.values() if at >= moment))
