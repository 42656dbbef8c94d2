"""One offer of each type of task becomes a verified artefact in real pods, also when its pod is killed on the way."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from typing import Any

import pytest

from campaign import BASE_SEED, WHOLE
from taskoffer_lab.api_client import ApiError
from taskoffer_lab.demo.checks import Adapter, adapters_of, check_files
from taskoffer_lab.demo.examination import check_exam, check_figures, examine
from taskoffer_lab.demo.material import Material, build_material
from taskoffer_lab.demo.script import ALL_TYPES, Example, load_examples
from taskoffer_lab.process_table import wait_until
from training_place import (
    ATTEMPTS,
    GROUP,
    NAMESPACE,
    PODS,
    POLICY,
    SECONDS,
    SIZES,
    TRAINED_SECONDS,
    Object,
    Place,
    condition,
    ended,
    kill_trainer,
    place,
    prepared,
    trainer_image,
)

__all__ = ["place", "prepared", "trainer_image"]

OFFERS = load_examples(script=ALL_TYPES)
KILLS = 20 if WHOLE else 2
AT_ONCE = 2
"""Trainings side by side: as many as a small machine has cores."""
POD_MADE = "PodMade"
"""The phase in which nobody answers yet."""
PHASES = {POD_MADE: 6.0, "Starting": 6.0, "Evaluating": 2.0, "Training": 4.0, "Verifying": 1.0, "Saving": 0.0}
"""What a trainer reports, in its order, and how many seconds after the beginning of it a kill comes at most."""
ORDER = (*PHASES, "Done")
LATE = ORDER[ORDER.index("Verifying") :]
"""Phases in which the adapter is verified and published."""


@pytest.fixture(scope="module")
def stocked(prepared: Place) -> Material:
    """What the six offers train with, on the place's claims."""
    made = Material(prepared.root)
    build_material(made)
    return made


def pairs(offers: Sequence[Example]) -> list[Sequence[Example]]:
    """Part offers into those that train side by side."""
    return [offers[start : start + AT_ONCE] for start in range(0, len(offers), AT_ONCE)]


def make(place: Place, example: Example, name: str) -> Object:
    """Make one of the six offers under a name of its own; its stated size chooses the policy's class of settings."""
    manifest = copy.deepcopy(example.manifest)
    manifest["metadata"] |= {"name": name, "namespace": NAMESPACE}
    manifest["spec"] |= {"taskID": name, "policyName": POLICY}
    manifest["spec"]["model"]["parameters"] = SIZES["typed"]
    made: Object = place.api.request("POST", f"{GROUP}/taskoffers", manifest)
    return made


def adapter_of(place: Place, name: str) -> Adapter:
    """Return the adapter of an offer that has succeeded, with its files checked."""
    found, problems = adapters_of([place.job(name)], place.outputs)
    assert problems == []
    assert check_files(found[0]) == []
    return found[0]


def test_one_offer_of_each_type_becomes_a_verified_artefact(place: Place, stocked: Material) -> None:
    adapters = []
    for some in pairs(OFFERS):
        for example in some:
            make(place, example, example.name)
        for example in some:
            place.until(example.name, "Finished", "Succeeded", TRAINED_SECONDS)
            adapters.append(adapter_of(place, example.name))
    assert [adapter.task for adapter in adapters] == ["InstructText", "Chat", "DPO", "GRPO", "Image", "Image"]
    exams = examine(stocked, adapters)
    problems = [check_figures(adapter) + check_exam(adapter, exams[adapter.offer]) for adapter in adapters]
    assert problems == [[]] * len(adapters)
    folders = [place.outputs / ".checkpoints" / place.job(example.name)["metadata"]["name"] for example in OFFERS]
    assert [(folder.is_dir(), list(folder.glob("checkpoint-*"))) for folder in folders] == [(True, [])] * len(folders)


# Killing


class Victim:
    """An offer whose trainer is to be killed at a drawn moment: some time after a phase of its run has begun.

    The phases are drawn evenly, short ones as often as long ones. A kill is one of the processes, which leaves no time
    for anything, or the pod's deletion, at which the kubelet sends SIGTERM two seconds before. Who has passed its
    phase before that was seen is killed in the next one.
    """

    def __init__(self, place: Place, example: Example, name: str, draw: random.Random) -> None:
        self.place, self.name = place, name
        self.phase = draw.choice(tuple(PHASES))
        self.later, self.deleted = draw.uniform(0, PHASES[self.phase]), draw.random() < 0.5
        self.struck: str | None = None
        self._due: float | None = None
        self.uid = str(make(place, example, name)["metadata"]["uid"])

    def __str__(self) -> str:
        what = "pod deleted" if self.deleted else "processes killed"
        said = f"{what} in {self.struck}" if self.struck else "ended before its kill"
        return f"{self.name}: {said}, asked for {self.later:.1f} s after the beginning of {self.phase}"

    def over(self) -> bool:
        return condition(self.place.get(self.name), "Finished") != {}

    def look(self) -> bool:
        """Kill the trainer if its moment has come; tell whether there is nothing more to do. An end spares it."""
        if self.struck is not None:
            return True
        pod = next(reversed(self.place.pods(self.uid)), None)
        state = None if pod is None else self.place.report(pod).get("state", POD_MADE)
        if pod is not None and self._due is None and ORDER.index(state) >= ORDER.index(self.phase):
            self._due = time.monotonic() + self.later
        if pod is None or ended(pod) or self._due is None or time.monotonic() < self._due:
            return self.over()
        if self._kill(pod):
            self.struck = state
        return self.struck is not None or self.over()

    def _kill(self, pod: Object) -> bool:
        if not self.deleted:
            return kill_trainer(pod)
        try:
            self.place.api.request("DELETE", f"{PODS}/{pod['metadata']['name']}", {"gracePeriodSeconds": 0})
        except ApiError as error:
            if error.status != 404:
                raise
            return False
        return True

    def end(self) -> Adapter | str:
        """Wait for its end; return what it made, or the reason of its failure."""
        wait_until(self.over, f"the end of {self}", 2 * TRAINED_SECONDS, interval=0.3)
        finished = condition(self.place.get(self.name), "Finished")
        if finished["reason"] == "Succeeded":
            return adapter_of(self.place, self.name)
        failed = condition(self.place.job(self.name), "Failed")
        assert (finished["reason"], failed.get("status")) == ("Failed", "True"), str(self)
        assert failed["reason"], str(self)
        assert failed["message"], str(self)
        return f"{failed['reason']}: {failed['message']}"


def victims(place: Place, draw: random.Random) -> Iterator[tuple[Victim, ...]]:
    """Yield offers of all types, some at a time, until enough of them were killed; at most twice as many."""
    struck = 0
    start = draw.randrange(len(OFFERS))
    offers = list(islice(cycle(OFFERS), start, start + 2 * KILLS))
    for number, some in enumerate(pairs(offers)):
        if struck >= KILLS:
            return
        made = tuple(Victim(place, one, f"{one.name}-{number}", draw) for one in some)
        yield made
        struck += sum(victim.struck is not None for victim in made)


def test_a_trainer_that_is_killed_at_any_moment_ends_in_a_verified_artefact_or_fails_with_a_reason(
    place: Place, stocked: Material, record_property: Any
) -> None:
    record_property("seed", BASE_SEED)
    print(f"seed {BASE_SEED}")  # noqa: T201
    adapters: list[Adapter] = []
    failures: list[str] = []
    struck: Counter[str] = Counter()
    for some in victims(place, random.Random(BASE_SEED)):
        wait_until(
            lambda: all([victim.look() for victim in some]),  # noqa: B023, C419 - every one is to be looked at.
            "the kills of " + ", ".join(victim.name for victim in some),
            TRAINED_SECONDS,
            interval=0.1,
        )
        for victim in some:
            print(victim)  # noqa: T201
            struck.update([victim.struck] if victim.struck else [])
            made = victim.end()
            adapters.append(made) if isinstance(made, Adapter) else failures.append(made)
            place.delete(victim.name)
    print(f"kills {dict(struck)}: {len(adapters)} artefacts, failures: {failures or 'none'}")  # noqa: T201
    assert struck.total() >= KILLS
    if WHOLE:
        assert sum(struck[phase] for phase in LATE) > 0
    exams = examine(stocked, adapters)
    assert {adapter.offer for adapter in adapters} == exams.keys()
    assert [check_exam(adapter, exams[adapter.offer]) for adapter in adapters] == [[]] * len(adapters)


def test_a_trainer_that_is_killed_in_each_of_its_attempts_fails_with_a_reason_and_leaves_its_best_adapter_so_far(
    place: Place,
) -> None:
    uid = place.offer("doomed", "endless")["metadata"]["uid"]
    killed: set[str] = set()

    def kill() -> bool:
        pod = next((pod for pod in place.pods(uid) if pod["metadata"]["uid"] not in killed), None)
        # The first checkpoint comes after five steps.
        if pod is None or place.report(pod).get("step", 0) <= 5 or not kill_trainer(pod):
            return False
        killed.add(pod["metadata"]["uid"])
        return True

    for attempt in range(1, ATTEMPTS + 1):
        wait_until(kill, f"attempt {attempt} trains and is killed", TRAINED_SECONDS, interval=0.1)
    offer = place.until("doomed", "Finished", "Failed", SECONDS)

    job = place.job("doomed")
    assert [(one["outcome"], one["exitCode"]) for one in job["status"]["attempts"]] == [("Failed", 137)] * ATTEMPTS
    failed = condition(job, "Failed")
    assert (failed["status"], failed["reason"]) == ("True", "AttemptsExhausted")
    for message in (failed["message"], condition(offer, "Finished")["message"]):
        assert f"attempt {ATTEMPTS} ended with exit code 137" in message
    assert "result" not in job["status"]
    left = place.outputs / job["metadata"]["name"]
    assert not (left / "adapter").exists()
    (adapter,) = (left / "provisional").glob("step-*")
    manifest = json.loads((adapter / "manifest.json").read_text())
    assert manifest["provisional"] is True
    weights = hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert manifest["files"]["adapter_model.safetensors"]["sha256"] == weights
