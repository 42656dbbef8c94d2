"""What was written to offers, one answer after the other, as the auditor's own watch saw it."""

from __future__ import annotations

import itertools

from auditor_history import OFFER, Object, condition, in_order
from operator_bench import Bench

Answer = tuple[object, ...]

_TOLD = ("status", "reason")


class Trails:
    """The answers to all offers of a bench so far.

    Attributes:
        writes: How often a status was written.
        repeated: How many of these writes gave the answer that was there already.
    """

    def __init__(self, bench: Bench) -> None:
        assert not bench.audit.check(), "the auditor has not seen everything, or has found something"
        self.writes = 0
        self.repeated = 0
        self._answers: dict[str, list[Answer]] = {}
        self._waited: dict[str, float] = {}
        last: dict[str, Object] = {}
        came: dict[str, float] = {}
        for event in in_order(bench.audit.events):
            offer = event.object
            if event.kind != OFFER or offer["metadata"]["namespace"] != bench.namespace or event.type == "DELETED":
                continue
            name, status = offer["metadata"]["name"], offer.get("status") or {}
            answers = self._answers.setdefault(name, [])
            came.setdefault(name, event.at)
            if status == last.setdefault(name, {}):
                continue
            last[name] = status
            self._waited.setdefault(name, event.at - came[name])
            said = [condition(offer, kind).get(part) for kind in ("Admitted", "Finished") for part in _TOLD]
            answer = (*said, "admission" in status)
            self.writes += 1
            self.repeated += bool(answers) and answers[-1] == answer
            answers.append(answer)

    def of(self, name: str) -> list[Answer]:
        """Return the answers to an offer: status and reason of Admitted and of Finished, and whether it is booked."""
        return self._answers[name]

    def waited(self, name: str) -> float:
        """Return after how many seconds an offer got its first answer."""
        return self._waited[name]

    def admissions(self, name: str) -> int:
        """Return how often an offer became admitted."""
        held = [False, *(bool(answer[-1]) for answer in self.of(name))]
        return sum(after and not before for before, after in itertools.pairwise(held))

    def ends(self, name: str) -> int:
        """Return how many answers were final."""
        return sum(answer[2] == "True" for answer in self.of(name))
