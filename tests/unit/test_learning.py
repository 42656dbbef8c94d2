"""Outcomes that come in while the operator runs: when they count, for whom, and that a restart changes nothing."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import Object, make_node, make_offer, make_policy, stored
from core_builders import NOW, at
from fake_replica import end_pod, leading, start_pod
from finished_jobs import finished
from taskoffer.adapters.kube import BATCH_JOBS, JOBS_OF_TRAINING
from taskoffer.adapters.metrics import LEARNED_DURATION_FACTOR, LEARNED_SUCCESS_RATE, REGISTRY
from taskoffer.api.tasks import TaskType
from taskoffer.decision.evaluate import evaluate
from taskoffer.decision.outcomes import Kind
from taskoffer.reconcile import evaluations
from taskoffer.reconcile.world import World
from virtual_time import run_virtually, virtual_time

__all__ = ["virtual_time"]

LEARNING = {"priorStrength": "1", "newest": 20, "refreshSeconds": 300}
SMALL = Kind(TaskType.INSTRUCT_TEXT, "Llama", "Small", 1)
SLOW = {"peakTeraflops": 1, "mfu": [{"mfu": "0.01"}], "startSeconds": 0, "reserveSeconds": 0}
PREDICTING = {"gpuMemory": "80G", "duration": SLOW}
"""The lab's smallest tasks take about a minute, which whole seconds can say."""


class Cluster:
    """A world with a policy that learns, and no GPU, so that offers wait."""

    def __init__(self, **policy: Any) -> None:
        self.world = World()
        self.versions = itertools.count(1)
        self.objects: dict[tuple[str, str], Object] = {}
        self.put("nodes", "node-a", make_node("node-a", gpus=0))
        self.policy(**{"learning": LEARNING, **policy})

    def put(self, kind: str, uid: str, made: Object, **metadata: Any) -> None:
        raw = stored(made, uid=uid, resource_version=str(next(self.versions)), **metadata)
        self.objects[kind, uid] = raw
        getattr(self.world, kind).observe("MODIFIED", raw)

    def policy(self, **fields: Any) -> None:
        self.put("policies", "lab-uid", make_policy(**fields), generation=next(self.versions))

    def ends(self, name: str, **fields: Any) -> None:
        self.put("jobs", f"{name}-uid", finished(name, **fields))

    def gone(self, name: str) -> None:
        raw = self.objects.pop(("jobs", f"{name}-uid"))
        version = str(next(self.versions))
        self.world.jobs.observe("DELETED", {**raw, "metadata": {**raw["metadata"], "resourceVersion": version}})

    def offer(self, name: str, **fields: Any) -> None:
        self.put("offers", f"{name}-uid", make_offer(**{"name": name, "parameters": 500_000, **fields}))

    def restarted(self) -> World:
        made = World()
        for kind in ("nodes", "jobs", "policies", "offers"):
            listed = [raw for (of, _), raw in self.objects.items() if of == kind]
            getattr(made, kind).replace(listed, str(next(self.versions)))
        return made

    def scores(self, seconds: float) -> dict[str, str]:
        """Run a cycle's snapshot and return what the offers are worth."""
        made = self.world.snapshot(at(seconds))
        found = {uid: evaluation for (uid, _), evaluation in made.evaluations.items()}
        found |= {offer.uid: evaluation for group in made.standing.values() for *_, offer, evaluation in group}
        return {uid.removesuffix("-uid"): str(e.score.total) for uid, e in found.items() if e.score is not None}


def test_an_outcome_counts_once_the_policys_time_has_passed() -> None:
    cluster = Cluster()
    cluster.offer("waits")
    before = cluster.scores(0)
    cluster.ends("one", success=False)
    assert cluster.scores(1) == cluster.scores(300) == before
    assert cluster.world.outcomes.wake_at(None) == at(301)
    assert cluster.world.outcomes.wake_at(at(5)) == at(5)
    # The rate falls from 0.9 to 0.45 with one failure against a prior of one; its weight is 0.2.
    assert float(before["waits"]) - float(cluster.scores(301)["waits"]) == pytest.approx(0.09)
    assert cluster.world.outcomes.wake_at(None) is None


def test_outcomes_that_come_in_meanwhile_are_learned_from_together() -> None:
    cluster = Cluster()
    cluster.world.snapshot(NOW)
    for number in range(5):
        cluster.ends(f"j{number}", ended=number, training=2000, predicted=1000)
        cluster.world.snapshot(at(10 * number))
        assert cluster.world.outcomes.learned("lab").estimates == {}
    cluster.world.snapshot(at(300))
    known = cluster.world.outcomes.learned("lab").of(SMALL)
    assert (known.judged, known.durations, str(known.duration_factor)) == (5, 5, "1.78")  # 2 ** (5/6)


@pytest.mark.parametrize("preset", ["market-table", "sound", "expected-value"])
def test_the_presets_that_are_ours_learn_as_they_are(preset: str) -> None:
    cluster = Cluster()
    cluster.policy(preset=preset)
    cluster.offer("waits", parameters=2_000_000_000, rows=20_000, hours=9, gpus=1)

    def told() -> str:
        (evaluation,) = cluster.world.snapshot(at(seconds)).evaluations.values()
        return evaluation.estimates[1].message

    seconds = 0
    before = told()
    for number in range(8):
        cluster.ends(f"j{number}", ended=number, training=2000, predicted=1000, size="UpTo4B")
    told()
    seconds = 300
    # Of eight outcomes at twice the time and a prior of ten: 2 ** (8 / 18).
    assert told().split(": ", 1)[1] == before.split(": ", 1)[1] + ", x1.36 from 8 outcomes"


def standing(cluster: Cluster, name: str, **fields: Any) -> None:
    """Add an offer that waits with an answer that still holds."""
    condition = {
        "type": "Admitted",
        "status": "False",
        "reason": "InventoryNotReady",
        "message": "",
        "lastTransitionTime": "2026-01-31T12:00:00Z",
    }
    cluster.offer(name, status={"observedGeneration": 1, "conditions": [condition]}, **fields)


def test_standing_offers_are_evaluated_again_and_only_those_that_it_concerns(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def noting(spec: Any, *rest: Any) -> Any:
        asked.append(spec.task_id)
        return evaluate(spec, *rest)

    monkeypatch.setattr(evaluations, "evaluate", noting)
    cluster = Cluster()
    standing(cluster, "small")
    standing(cluster, "large", parameters=5_000_000)
    standing(cluster, "other", model="x/mistral")
    before = cluster.scores(0)
    assert len(cluster.world.standing) == 3
    assert sorted(asked) == ["large", "other", "small"]
    asked.clear()
    cluster.ends("one", success=False)
    cluster.scores(1)
    after = cluster.scores(301)
    assert asked == ["small"]
    assert len(cluster.world.standing) == 3
    assert float(after["small"]) < float(before["small"])
    assert (after["large"], after["other"]) == (before["large"], before["other"])
    asked.clear()
    cluster.ends("unjudged", success=False, reason="Cancelled", outcome="Stopped")
    cluster.scores(302)
    cluster.scores(700)
    assert asked == [], "what says nothing changes nothing"


ENDINGS = st.fixed_dictionaries(
    {
        "success": st.booleans(),
        "ended": st.integers(0, 5),
        "training": st.sampled_from([None, 500, 1000, 3000]),
        "peak": st.sampled_from([None, 10, 30]),
        "size": st.sampled_from(["Small", "Large", "Unheard"]),
        "family": st.sampled_from(["Llama", "Forgotten", None]),
        "policy": st.sampled_from(["lab", "lab", "other"]),
    }
)
CHANGES = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.none() | ENDINGS, st.integers(0, 400)), max_size=25)


@given(CHANGES)
def test_a_restart_knows_the_same_from_the_objects_alone(changes: list[tuple[str, Object | None, int]]) -> None:
    cluster, now = Cluster(), 0
    for name, fields, passed in changes:
        now += passed
        if fields is not None:
            cluster.ends(name, predicted=1000, predicted_peak=20, **fields)
        elif ("jobs", f"{name}-uid") in cluster.objects:
            cluster.gone(name)
        cluster.world.snapshot(at(now))
    cluster.world.snapshot(at(now + 1000))
    cluster.world.snapshot(at(now + 2000))
    again = cluster.restarted()
    again.snapshot(at(now + 2000))
    kept, rebuilt = cluster.world.outcomes.learned("lab"), again.outcomes.learned("lab")
    assert (kept.strength, kept.estimates) == (rebuilt.strength, rebuilt.estimates)
    assert {(kind.family, kind.size_class) for kind in kept.estimates} <= {
        (family, size) for family in ("Llama", "") for size in ("Small", "Large")
    }


def test_new_settings_of_a_policy_apply_at_once_and_without_them_nothing_was_learned() -> None:
    cluster = Cluster()
    cluster.offer("waits")
    before = cluster.scores(0)["waits"]
    cluster.ends("one", success=False)
    cluster.policy(learning={**LEARNING, "priorStrength": "9"})
    assert float(before) - float(cluster.scores(1)["waits"]) == pytest.approx(0.2 * 0.09, abs=1e-4)
    cluster.policy()
    assert cluster.scores(2)["waits"] == before
    cluster.policy(learning={**LEARNING, "priorStrength": "1"})
    assert float(before) - float(cluster.scores(3)["waits"]) == pytest.approx(0.09)


def series(gauge: Any) -> dict[tuple[str, ...], float]:
    return {
        tuple(sample.labels[name] for name in ("policy", "task_type", "family", "size_class", "gpus")): sample.value
        for metric in gauge.collect()
        for sample in metric.samples
        if sample.labels["policy"] == "lab"
    }


def test_the_metrics_show_what_the_policy_knows_and_forget_what_it_forgets() -> None:
    for gauge in (LEARNED_SUCCESS_RATE, LEARNED_DURATION_FACTOR):
        gauge.clear()
    cluster = Cluster()
    cluster.world.snapshot(NOW)
    assert series(LEARNED_SUCCESS_RATE) == {}
    cluster.ends("one", success=False, training=4000, predicted=1000)
    cluster.ends("two", size="Unheard")
    cluster.world.snapshot(at(0))
    cluster.world.snapshot(at(300))
    kind = ("lab", "InstructText", "Llama", "Small", "1")
    assert series(LEARNED_SUCCESS_RATE) == {kind: 0.45}
    assert series(LEARNED_DURATION_FACTOR) == {kind: 2.0}
    cluster.gone("one")
    cluster.world.snapshot(at(301))
    cluster.world.snapshot(at(601))
    assert series(LEARNED_SUCCESS_RATE) == series(LEARNED_DURATION_FACTOR) == {}
    cluster.ends("three")
    cluster.world.snapshot(at(602))
    cluster.world.snapshot(at(902))
    assert set(series(LEARNED_SUCCESS_RATE)) == {kind}
    cluster.policy()
    cluster.world.snapshot(at(903))
    assert series(LEARNED_SUCCESS_RATE) == {}


def error_count(quantity: str) -> float:
    labels = {"policy": "lab", "task_type": "InstructText", "quantity": quantity}
    return REGISTRY.get_sample_value("taskoffer_prediction_error_ratio_count", labels) or 0.0


@pytest.mark.usefixtures("virtual_time")
def test_a_finish_brings_its_figures_in_one_write_and_later_offers_are_told_of_it() -> None:
    async def main() -> None:
        policy = make_policy(learning=LEARNING, estimation=PREDICTING)
        async with leading(nodes={"node-a": 1}, policy=policy) as rig:
            rig.offer()
            name = "a-a-uid"
            await rig.until(lambda: rig.kube.all(BATCH_JOBS))
            start_pod(rig.kube, rig.kube.all(BATCH_JOBS)[0])
            await rig.until(lambda: "startedAt" in rig.kube.get_now(JOBS_OF_TRAINING, name)["status"]["attempts"][0])
            await rig.quiet(90)
            predicted = rig.kube.get_now(JOBS_OF_TRAINING, name)["spec"]["run"]["predicted"]
            writes, errors = rig.kube.count("status", JOBS_OF_TRAINING, name), error_count("Duration")
            words = {"exitCode": 0, "reason": "Completed", "step": 40, "totalSteps": 40, "trainingSeconds": 41.2}
            end_pod(rig.kube, f"{name}-1-pod", 0, json.dumps(words))
            await rig.until(lambda: rig.finished() == "Succeeded")
            await rig.quiet(20)
            assert rig.kube.count("status", JOBS_OF_TRAINING, name) == writes + 1
            assert error_count("Duration") == errors + 1
            measured = rig.kube.get_now(JOBS_OF_TRAINING, name)["status"]["measured"]
            assert (measured["trainingSeconds"], measured["trainedShare"]) == (41, "1.000")
            assert measured["predictedSeconds"] == predicted["trainingSeconds"]
            assert predicted["durationFactor"] == predicted["memoryFactor"] == "1"
            rig.offer("early")
            await rig.until(lambda: rig.verdict("early") == ("True", "Admitted"))
            await rig.quiet(10)
            early = rig.kube.get_now(JOBS_OF_TRAINING, rig.read("early")["status"]["admission"]["jobName"])
            assert early["spec"]["run"]["predicted"] == predicted
            # It waits, so that there is a cycle to come.
            rig.offer("waits")
            await rig.quiet(320)
            known = rig.session.world.outcomes.learned("lab").of(SMALL)
            assert (known.judged, known.successes, known.durations) == (1, 1, 1)

    run_virtually(main())
