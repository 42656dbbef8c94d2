"""Objects of any shape beside healthy ones: all the operator's loops go on, and every offer is answered.

No cluster is needed: a replica runs on virtual time over a server in memory, which refuses what the real one would
refuse of the operator's own writes. Half of the drawn objects are found when it starts, the others come by watch, and
a second replica finds all of them.
"""

from __future__ import annotations

import asyncio
import copy
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from hypothesis import strategies as st

from builders import make_admission, make_condition, make_node, make_offer, make_policy, make_training_job
from campaign import Campaign
from core_builders import ONE_GPU, TWO_GPUS
from crd_schema import PLURALS, faults, schema_of
from crd_strategies import NODES as FUZZ_NODES
from crd_strategies import parts, spoiled
from fake_kube import KINDS, FakeKube
from fake_replica import Rig, end_pod, leading, start_pod
from odd_objects import odd_job, odd_node, odd_pod
from taskoffer.adapters.kube import (
    BATCH_JOBS,
    EVENTS,
    JOBS_OF_TRAINING,
    NODES,
    OFFERS,
    POLICIES,
    ApiError,
    Object,
    Resource,
)
from taskoffer.api.reasons import Reason
from virtual_time import run_virtually, virtual_time

__all__ = ["virtual_time"]
pytestmark = pytest.mark.usefixtures("virtual_time")

MOST_WRITES = {"TaskOffer": 8, "TrainingJob": 24, "CapacityPolicy": 12, "Job": 24, "Event": 24}
"""Writes that one object may cost in the minutes of a run, its attempts and a restart included."""
LATER = "2026-01-31T12:00:30Z"
RESOURCES: dict[str, Resource] = {kind: resource for resource, kind in KINDS.items()}


@dataclass
class StrictKube(FakeKube):
    """A server that keeps to the schemas of our kinds in what is written; a test can still put there what it likes."""

    refusals: list[str] = field(default_factory=list)

    def _patch(self, resource: Resource, namespace: str | None, name: str, body: Object) -> Object:
        kind, place = KINDS[resource], self._place(resource, namespace, name)
        self._check_version(place, body)
        before = self._found(place)
        after = super()._patch(resource, namespace, name, body)
        if kind in PLURALS:
            broken = self._broken(kind, after, before)
            if broken:
                self.objects[place] = before
                raise self._refusal(f"{kind} {name}", broken)
        return after

    def _create(self, resource: Resource, body: Object, *, with_status: bool = False) -> Object:
        kind = KINDS[resource]
        if kind in PLURALS and not with_status:
            broken = self._broken(kind, body, {})
            if broken:
                raise self._refusal(f"{kind} {body['metadata']['name']}", broken)
        return super()._create(resource, body, with_status=with_status)

    def _broken(self, kind: str, after: Object, before: Object) -> list[str]:
        schema = schema_of(kind)["properties"]
        given_parts = [part for part in ("spec", "status") if part in after]
        return [f for part in given_parts for f in faults(schema[part], after[part], before.get(part), part)]

    def _refusal(self, what: str, broken: list[str]) -> ApiError:
        self.refusals.append(f"{what}: {'; '.join(broken[:3])}")
        return ApiError(422, "Invalid", self.refusals[-1])


@dataclass(frozen=True)
class Odd:
    """A drawn object, whether it is there when the operator starts, and what becomes of it later."""

    kind: str
    raw: Object
    early: bool
    later: Object | None = None

    @property
    def name(self) -> str:
        return str(self.raw["metadata"]["name"])


def uid_of(name: str) -> str:
    return f"{name[:12]}-uid-{len(name)}"


def job_of(name: str) -> str:
    return f"{name}-{uid_of(name)[:8]}"


def admitted(name: str) -> Object:
    admission = make_admission(job=job_of(name), node="fuzz-1", policy="fuzz", policy_uid="fuzz-uid")
    return {"admission": admission, "conditions": [make_condition("Admitted", True, "Admitted")]}


def owned(name: str) -> Object:
    """Return the TrainingJob of an admitted offer after its first attempt was made."""
    admission = admitted(name)["admission"]
    attempt = {"jobName": f"{job_of(name)}-1", "createdAt": "2026-01-31T12:00:00Z"}
    status = {"attempts": [attempt | {"assignments": admission["assignments"]}]}
    return make_training_job(name=job_of(name), offer=name, offer_uid=uid_of(name), status=status)


@st.composite
def odd_objects(draw: st.DrawFn, number: int) -> Odd:
    """Draw one object of any kind."""
    kind = draw(
        st.sampled_from(["TaskOffer"] * 8 + ["TrainingJob"] * 4 + ["CapacityPolicy"] * 4 + ["Pod", "Job", "Node"])
    )
    early = draw(st.booleans())
    offer = f"fuzz-{draw(st.sampled_from([number, number, 0]))}"
    if kind == "Pod":
        return Odd(kind, draw(odd_pod(number, job_of(offer))), early)
    if kind == "Job":
        return Odd(kind, draw(odd_job(number, job_of(offer))), early)
    if kind == "Node":
        return Odd(kind, draw(odd_node(number)), early)
    metadata: Object = {"creationTimestamp": LATER}
    if kind == "TaskOffer":
        name = draw(st.sampled_from([f"fuzz-{number}"] * 9 + [f"fuzz-{number}-{'n' * 240}"]))
        base = make_offer(name=name, policy="fuzz", parameters=ONE_GPU, status=admitted(name))
        metadata["uid"] = uid_of(name)
    elif kind == "TrainingJob":
        base = owned(offer)
        if draw(st.booleans()):
            owner = {"apiVersion": base["apiVersion"], "kind": "TaskOffer", "name": offer, "uid": uid_of(offer)}
            metadata["ownerReferences"] = [owner | {"controller": True}]
    else:
        spec = make_policy()["spec"]
        base = make_policy(name=f"odd-{number}", status={"activeSpec": spec, "activeGeneration": 1})
        base["metadata"]["annotations"]["taskoffer.dev/is-default-policy"] = draw(st.sampled_from(["true", "x", ""]))
    made = {key: base[key] for key in ("apiVersion", "kind", "metadata")}
    made["metadata"] |= metadata
    first, second = draw(parts(kind, base)), draw(st.none() | parts(kind, base))
    return Odd(kind, made | _present(first), early, made | _present(second) if second is not None else None)


def _present(drawn: tuple[Any, Any]) -> Object:
    return {part: value for part, value in zip(("spec", "status"), drawn, strict=True) if value is not None}


BATCHES = st.integers(1, 8).flatmap(lambda size: st.tuples(*(odd_objects(n) for n in range(size))))


@contextmanager
def nothing_raised() -> Iterator[None]:
    """Fail when an exception was logged: the loops catch what one object does, and must have nothing to catch."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    root = logging.getLogger("taskoffer")
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
    caught = [(record.getMessage(), record.__dict__.get("job"), record.exc_info) for record in records]
    caught = [one for one in caught if one[2]]
    if caught:
        assert caught[0][2] is not None
        raise AssertionError(f"logged: {caught[0][:2]}") from caught[0][2][1]


def put(kube: FakeKube, odd: Odd) -> bool:
    """Store a drawn object; tell whether its name was free."""
    resource = RESOURCES[odd.kind]
    namespace = "default" if resource.namespaced else ""
    if (resource, namespace, odd.name) in kube.objects:
        return False
    kube.put(resource, copy.deepcopy(odd.raw))
    return True


def change(kube: FakeKube, odd: Odd) -> None:
    """Replace what is stored of a drawn object by its later form."""
    place = next((key for key in kube.objects if key[0] == RESOURCES[odd.kind] and key[2] == odd.name), None)
    # A Job that nobody is left for is removed.
    if odd.later is not None and place is not None:
        metadata = kube.get_now(RESOURCES[odd.kind], odd.name)["metadata"]
        kube._store(RESOURCES[odd.kind], place, {**copy.deepcopy(odd.later), "metadata": metadata}, bump=True)


def prepared() -> StrictKube:
    """Return a server with what healthy offers need, and the same for those drawn offers that are fine."""
    kube = StrictKube()
    for pool, policy, nodes in (("healthy", "lab", ("node-a",)), ("fuzz", "fuzz", FUZZ_NODES[:2])):
        selector = {"matchLabels": {"pool": pool}}
        kube.put(POLICIES, make_policy(name=policy, default=False, node_selector=selector), uid=f"{policy}-uid")
        for node in nodes:
            kube.put(NODES, make_node(node, gpus=8, labels={"pool": pool}), uid=f"{node}-uid")
    return kube


def well(rig: Rig, name: str, **fields: Any) -> None:
    rig.offer(name, policy="lab", **fields)


async def running(rig: Rig, name: str) -> Object:
    """Wait for the Job of an offer and let its pod run; return the pod."""
    job = f"{rig.read(name)['status']['admission']['jobName']}-1"
    await rig.until(lambda: any(o["metadata"]["name"] == job for o in rig.kube.all(BATCH_JOBS)))
    return start_pod(rig.kube, rig.kube.get_now(BATCH_JOBS, job))


async def campaign_of(batch: tuple[Odd, ...], data: st.DataObject, counts: Counter[str]) -> None:
    """Play one batch of drawn objects among healthy offers."""
    kube = prepared()
    stored = [odd for odd in batch if odd.early and put(kube, odd)]
    async with leading(kube) as rig:
        well(rig, "victim", parameters=TWO_GPUS)
        well(rig, "first")
        stored += [odd for odd in batch if not odd.early and put(kube, odd)]
        well(rig, "second")
        await rig.until(lambda: all(rig.verdict(n) == ("True", "Admitted") for n in ("victim", "first", "second")))
        await running(rig, "victim")
        pod = await running(rig, "first")
        end_pod(kube, pod["metadata"]["name"], 0)
        await rig.until(lambda: rig.finished("first") == "Succeeded")
        await rig.quiet(10)
        spoil_victim(kube, data)
        for odd in stored:
            change(kube, odd)
        for number in range(6):
            well(rig, f"filler-{number}")
        await rig.quiet(30)
        check(rig, stored)
    async with leading(kube, identity="two") as rig:
        well(rig, "third", active=False)
        await rig.until(lambda: rig.verdict("third") == ("False", "Suspended"))
        await rig.quiet(30)
        check(rig, stored)
    counts.update(odd.kind for odd in stored)


def spoil_victim(kube: FakeKube, data: st.DataObject) -> None:
    """Spoil what is stored of an offer whose pod runs: the GPUs of that pod stay booked all the same."""
    name = kube.get_now(OFFERS, "victim")["status"]["admission"]["jobName"]
    resource, which, part = data.draw(
        st.sampled_from(
            [(OFFERS, "victim", "status"), (JOBS_OF_TRAINING, name, "status"), (JOBS_OF_TRAINING, name, "spec")]
        )
    )
    place = (resource, "default", which)
    made = kube.get_now(resource, which)
    made[part] = data.draw(spoiled(st.just(made[part])))
    kube._store(resource, place, made)


def check(rig: Rig, odd: list[Odd]) -> None:
    """Compare what has become of everything."""
    kube = rig.kube
    assert isinstance(kube, StrictKube)
    assert not kube.refusals, kube.refusals[:3]
    for name in ("first", "second"):
        assert rig.verdict(name) == ("True", "Admitted"), name
    fillers = Counter(rig.verdict(f"filler-{number}") for number in range(6))
    assert set(fillers) <= {("True", "Admitted"), ("False", "WaitingForCapacity")}, fillers
    # Of 8 GPUs the victim's pod has 2 and "second" has 1, whatever is stored of the victim.
    assert fillers["True", "Admitted"] <= 5, fillers
    assert rig.booked()["node-a"] >= 2
    for one in odd:
        if one.kind not in ("TaskOffer", "CapacityPolicy"):
            # Nothing is owed to the others; a Job that nobody is left for is even removed.
            continue
        raw = kube.get_now(RESOURCES[one.kind], one.name)
        if one.kind == "TaskOffer":
            assert answered(kube, raw), f"{one.name} has no answer: {str(raw.get('status'))[:400]}"
        if one.kind == "CapacityPolicy":
            ready = condition_of(raw, "Ready")
            assert ready is not None, one.name
            assert ready["reason"] in ("Ready", "InvalidPolicy"), f"{one.name}: {str(raw.get('status'))[:400]}"
    busy = Counter((r.kind, r.name) for r in kube.requests if r.verb in ("status", "create", "patch", "delete"))
    told = Counter(("Event", e["involvedObject"]["name"]) for e in kube.all(EVENTS))
    for (kind, name), count in (busy | told).items():
        assert count <= MOST_WRITES.get(kind, 10**6), f"{count} writes of {kind} {name}"


def condition_of(raw: Object, kind: str) -> Object | None:
    status = raw.get("status")
    conditions = status.get("conditions") if isinstance(status, dict) else None
    if not isinstance(conditions, list):
        return None
    return next((c for c in conditions if isinstance(c, dict) and c.get("type") == kind), None)


def answered(kube: FakeKube, raw: Object) -> bool:
    """Tell whether an offer carries an answer: it was over before, it is admitted, or its condition says why not."""
    finished = condition_of(raw, "Finished")
    if finished is not None and finished.get("status") == "True":
        return True
    status, found = raw.get("status") or {}, condition_of(raw, "Admitted")
    if status.get("admission") is not None:
        # What is held is held for a job, or an event says what it is held for.
        name = raw["metadata"]["name"]
        jobs = [j["metadata"]["name"] for j in kube.all(JOBS_OF_TRAINING)]
        told = [e["message"] for e in kube.all(EVENTS) if e["involvedObject"]["name"] == name]
        return job_of(name) in jobs or any("not taken back while" in message for message in told)
    known = found is not None and found.get("reason") in {reason.value for reason in Reason}
    return known and status.get("observedGeneration") == raw["metadata"]["generation"]


def test_ten_thousand_fuzzed_objects_stop_nobody(campaign: Campaign) -> None:
    # A batch has four and a half objects on average.
    examples = campaign.size(60, 2400)

    @seed(campaign.seed)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(BATCHES, st.data())
    def play(batch: tuple[Odd, ...], data: st.DataObject) -> None:
        for odd in batch:
            note(f"{odd.kind} {odd.name:.40} early={odd.early} {odd.raw!s:.1500} later {odd.later!s:.1500}")
        with nothing_raised():
            run_virtually(campaign_of(batch, data, campaign.counts))

    play()
    assert campaign.counts.total() >= campaign.size(150, 10_000)


def test_the_server_of_these_tests_refuses_what_the_schema_refuses() -> None:
    async def main() -> None:
        kube = StrictKube()
        kube.put(OFFERS, make_offer(status={"conditions": "none", "score": "1"}))
        with pytest.raises(ApiError, match="score"):
            await kube.patch_status(OFFERS, "default", "offer", {"status": {"score": "much"}})
        assert kube.get_now(OFFERS, "offer")["status"]["score"] == "1"
        await kube.patch_status(OFFERS, "default", "offer", {"status": {"score": "2"}})
        assert len(kube.refusals) == 1
        with pytest.raises(ApiError, match="spec"):
            await kube.create(JOBS_OF_TRAINING, "default", {**make_training_job(), "spec": {}})
        await asyncio.sleep(0)

    run_virtually(main())
