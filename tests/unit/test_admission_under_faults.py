"""Answers to offers: written once, at the version that was decided on, and never booked twice whatever goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import Any, cast

import pytest

from builders import make_node, make_offer, make_pod, make_policy
from core_builders import FOUR_GPUS, ONE_GPU, TWO_GPUS
from fake_kube import FakeKube, refused
from fake_replica import leading, make_replica
from taskoffer.adapters.events import EventWriter, Subject
from taskoffer.adapters.kube import (
    BATCH_JOBS,
    EVENTS,
    JOBS_OF_TRAINING,
    LEASES,
    NODES,
    OFFERS,
    PODS,
    POLICIES,
    Kube,
    ThrottledError,
    UnknownOutcomeError,
)
from taskoffer.adapters.lease import LeadershipLostError
from taskoffer.api.reasons import Reason
from virtual_time import Clock, run_virtually, virtual_time

__all__ = ["virtual_time"]
pytestmark = pytest.mark.usefixtures("virtual_time")

GONE = UnknownOutcomeError("no answer")
ADMITTED, FULL = ("True", "Admitted"), ("False", "WaitingForCapacity")


def test_a_decision_is_one_write_that_carries_the_version_it_was_decided_on() -> None:
    async def main() -> None:
        async with leading() as rig:
            made = rig.offer()
            await rig.until(lambda: rig.verdict() == ADMITTED)
            await rig.quiet(30)
            writes = rig.kube.asked("status", OFFERS)
            assert len(writes) == 1
            assert writes[0].body is not None
            assert writes[0].body["metadata"] == {
                "resourceVersion": made["metadata"]["resourceVersion"],
                "uid": "a-uid",
            }
            assert ("TaskOffer", "a", "Admitted") in rig.events()

    run_virtually(main())


def test_an_answer_that_stays_the_same_is_not_written_again() -> None:
    async def main() -> None:
        async with leading(nodes={"node-a": 2}, resync=5) as rig:
            rig.offer(parameters=FOUR_GPUS)
            await rig.until(lambda: rig.verdict() == FULL)
            rig.kube.put(PODS, make_pod("other"))
            await rig.quiet(30)
            assert rig.kube.count("status", OFFERS) == 1

    run_virtually(main())


def test_what_comes_free_while_a_wait_is_being_written_is_not_missed() -> None:
    async def main() -> None:
        async with leading(nodes={"node-a": 1}) as rig:
            rig.kube.put(PODS, make_pod("other", node="node-a", gpus=1))
            rig.kube.fail("status", OFFERS, None, delay=1.0)
            rig.offer(parameters=ONE_GPU)
            await asyncio.sleep(0.5)
            rig.kube.remove(PODS, "other")
            await rig.until(lambda: rig.verdict() == ADMITTED, seconds=10)

    run_virtually(main())


def test_a_burst_of_offers_is_decided_together_in_the_order_of_their_scores() -> None:
    async def main() -> None:
        async with leading(nodes={"node-a": 2}) as rig:
            for name, hours in (("slow", 10.0), ("quick", 1.0), ("quickest", 0.5)):
                rig.offer(name, hours=hours)
            await rig.until(lambda: all(rig.verdict(n) for n in ("slow", "quick", "quickest")))
            assert {n: rig.verdict(n) for n in ("quickest", "quick", "slow")} == {
                "quickest": ADMITTED,
                "quick": ADMITTED,
                "slow": FULL,
            }

    run_virtually(main())


def test_an_offer_that_was_edited_meanwhile_is_decided_again() -> None:
    async def main() -> None:
        async with leading() as rig:
            rig.offer()
            rig.kube.fail(
                "status",
                OFFERS,
                None,
                before=lambda: rig.kube.change(OFFERS, "a", {"spec": {"active": False}}) and None,
            )
            await rig.until(lambda: rig.verdict() == ("False", "Suspended"))
            assert "admission" not in rig.read()["status"]
            assert rig.booked() == {}

    run_virtually(main())


def test_an_offer_that_was_deleted_meanwhile_books_nothing() -> None:
    async def main() -> None:
        async with leading() as rig:
            rig.offer()
            rig.kube.fail("status", OFFERS, None, before=lambda: rig.kube.remove(OFFERS, "a"))
            await rig.until(lambda: rig.kube.count("status", OFFERS) == 1)
            await rig.quiet()
            assert rig.booked() == {}
            assert rig.session.world.assumed == {}

    run_virtually(main())


def test_an_offer_that_was_created_anew_under_its_name_is_decided_on_its_own() -> None:
    async def main() -> None:
        async with leading() as rig:
            rig.offer()

            def swap() -> None:
                rig.kube.remove(OFFERS, "a")
                rig.kube.put(OFFERS, make_offer(name="a", parameters=FOUR_GPUS), uid="second-uid")

            rig.kube.fail("status", OFFERS, None, before=swap)
            await rig.until(lambda: rig.verdict() == ADMITTED)
            await rig.quiet()
            assert rig.read()["status"]["admission"]["jobName"] == "a-second-u"
            assert rig.booked() == {"node-a": 4}

    run_virtually(main())


@pytest.mark.parametrize("committed", [True, False])
@pytest.mark.parametrize("watching", [True, False])
def test_after_a_timeout_the_same_write_goes_out_again_and_stays_booked_meanwhile(
    committed: bool, watching: bool
) -> None:
    async def main() -> None:
        async with leading(nodes={"node-a": 1}) as rig:
            rig.kube.fail("status", OFFERS, GONE, committed=committed, delay=4)
            rig.offer("a")
            await rig.quiet(0.5)
            rig.kube.watching = watching
            rig.kube.version += 1
            rival = rig.offer("b", hours=0.1)
            rig.replica.observe("TaskOffer", "ADDED", rival)
            while rig.kube.count("status", OFFERS, "a") < 2:
                assert rig.booked() == {"node-a": 1}
                await asyncio.sleep(0.05)
            await rig.until(lambda: rig.verdict("b") == FULL and rig.verdict("a") == ADMITTED)
            await rig.quiet(1)
            first, second = rig.kube.asked("status", OFFERS, "a")
            assert first.body == second.body
            assert rig.booked() == {"node-a": 1}

    run_virtually(main())


def test_a_booking_of_unknown_outcome_outlives_a_conflict_until_the_offer_could_be_read() -> None:
    """The first write was committed, its answer lost; the second gets 409, and reading fails for a while."""

    async def main() -> None:
        async with leading(nodes={"node-a": 1}) as rig:
            rig.kube.watching = False
            rig.kube.fail("status", OFFERS, GONE, committed=True)
            rig.kube.fail("get", OFFERS, GONE, times=5)
            made = rig.offer("a")
            rig.replica.observe("TaskOffer", "ADDED", made)
            await rig.until(lambda: rig.kube.count("get", OFFERS) >= 3)
            assert rig.booked() == {"node-a": 1}
            rival = rig.offer("b")
            rig.replica.observe("TaskOffer", "ADDED", rival)
            await rig.until(lambda: rig.verdict("b"))
            assert rig.verdict("b") == FULL
            await rig.quiet(10)
            assert rig.booked() == {"node-a": 1}
            assert rig.kube.count("status", OFFERS, "a") == 2

    run_virtually(main())


def test_a_booking_of_unknown_outcome_outlives_a_change_of_its_policy() -> None:
    async def main() -> None:
        async with leading(nodes={"node-a": 1}) as rig:

            def change_policy() -> None:
                rig.kube.change(POLICIES, "lab", {"spec": {"filters": {"minScore": "0.1"}}})
                rig.kube.watching = False

            rig.kube.fail("status", OFFERS, GONE, committed=True, delay=1, before=change_policy)
            rig.offer("a")
            await rig.until(lambda: rig.verdict("a"))
            while rig.kube.count("status", OFFERS) < 2:
                assert rig.booked() == {"node-a": 1}
                await asyncio.sleep(0.05)
            rig.kube.watching = True
            await rig.until(
                lambda: rig.read()["status"].get("admission", {}).get("policyRef", {}).get("generation") == 2
            )
            await rig.until(lambda: len(rig.kube.all(JOBS_OF_TRAINING)) == 1)
            assert ("TaskOffer", "a", "PolicyChanged") in rig.events()

    run_virtually(main())


def test_a_throttled_write_waits_as_long_as_the_server_says() -> None:
    async def main() -> None:
        async with leading() as rig:
            rig.kube.fail("status", OFFERS, ThrottledError(7))
            rig.offer()
            await rig.until(lambda: rig.verdict() == ADMITTED)
            first, second = rig.kube.asked("status", OFFERS)
            assert second.at - first.at == pytest.approx(7, abs=0.1)
            assert first.body == second.body

    run_virtually(main())


def test_an_answer_that_the_server_refuses_is_held_back_until_the_next_resync() -> None:
    async def main() -> None:
        async with leading(resync=50) as rig:
            rig.kube.fail("status", OFFERS, refused())
            rig.offer("a")
            rig.offer("b")
            await rig.until(lambda: rig.verdict("b") == ADMITTED)
            await rig.quiet(20)
            assert rig.kube.count("status", OFFERS, "a") == 1, "trying again at once would spin"
            assert rig.booked() == {"node-a": 1}
            await rig.until(lambda: rig.verdict("a") == ADMITTED)

    run_virtually(main())


@pytest.mark.parametrize("missing", [NODES, PODS, JOBS_OF_TRAINING, POLICIES, OFFERS])
def test_nothing_is_decided_before_every_kind_was_listed(missing: Any) -> None:
    async def main() -> None:
        kube = FakeKube()
        # A lease that was given up, so that nothing but the lists is waited for.
        kube.put(LEASES, {"metadata": {"name": "taskoffer", "namespace": "system"}, "spec": {"holderIdentity": ""}})
        kube.put(PODS, make_pod("foreign", gpus=8))
        fault = kube.fail("list", missing, GONE, times=5)
        node = kube.put(NODES, make_node(), uid="n")
        policy = kube.put(POLICIES, make_policy(), uid="lab-uid")
        offer = kube.put(OFFERS, make_offer(name="a", parameters=ONE_GPU), uid="a-uid")
        replica = make_replica(kube)
        # Watches begin in any order: here an offer, all that it needs, and not yet the pod that is in its way.
        for kind, known in (("TaskOffer", offer), ("CapacityPolicy", policy), ("Node", node)):
            replica.observe(kind, None, known)
        kube.observer = replica.observe
        task = asyncio.create_task(replica.run())
        while fault.times > 0:
            assert kube.count("status", OFFERS) == 0
            await asyncio.sleep(0.05)
        await asyncio.sleep(5)
        conditions = kube.get_now(OFFERS, "a")["status"]["conditions"]
        assert (conditions[0]["status"], conditions[0]["reason"]) == FULL
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    run_virtually(main())


def test_a_gpu_is_free_when_its_foreign_pod_has_ended_and_not_before() -> None:
    async def main() -> None:
        async with leading(nodes={"node-a": 2}) as rig:
            rig.kube.put(PODS, make_pod("foreign", gpus=1))
            rig.offer(parameters=TWO_GPUS)
            await rig.until(lambda: rig.verdict() == FULL)
            rig.kube.change(PODS, "foreign", {"metadata": {"deletionTimestamp": "2026-01-31T12:00:00Z"}})
            await rig.quiet()
            assert rig.verdict() == FULL
            rig.kube.change(PODS, "foreign", {"status": {"phase": "Succeeded"}})
            await rig.until(lambda: rig.verdict() == ADMITTED)

    run_virtually(main())


def test_a_deletion_that_the_watch_never_told_is_found_by_the_next_list() -> None:
    async def main() -> None:
        async with leading(nodes={"node-a": 1}, resync=60) as rig:
            rig.kube.put(PODS, make_pod("ghost", gpus=1))
            rig.offer()
            await rig.until(lambda: rig.verdict() == FULL)
            rig.kube.watching = False
            rig.kube.remove(PODS, "ghost")
            rig.kube.watching = True
            await rig.until(lambda: rig.verdict() == ADMITTED, seconds=120)

    run_virtually(main())


def test_without_the_lease_nothing_is_written() -> None:
    async def main() -> None:
        async with leading() as rig:
            rig.kube.change(LEASES, "taskoffer", {"spec": {"holderIdentity": "thief"}}, "system")
            rig.kube.fail("get", LEASES, GONE, delay=1000, times=100)
            await asyncio.sleep(rig.session.lease.times.renew_deadline + 0.5)
            before = len([r for r in rig.kube.requests if r.verb not in ("get", "list")])
            rig.offer()
            with pytest.raises(ExceptionGroup) as end:
                await asyncio.wait_for(rig.task, 30)
            assert end.value.subgroup(LeadershipLostError) is not None
            assert len([r for r in rig.kube.requests if r.verb not in ("get", "list")]) == before
            assert rig.verdict() is None

    run_virtually(main())


def test_a_new_leader_waits_until_the_old_leaders_last_write_cannot_arrive_any_more() -> None:
    async def main() -> None:
        kube = FakeKube()
        async with leading(kube):
            pass
        started = Clock.monotonic()
        async with leading(kube, identity="two", write_timeout=3.0) as rig:
            duration = rig.session.lease.times.duration
            assert Clock.monotonic() - started > duration + 3.0
            lists = [r.at for r in kube.requests if r.verb == "list" and r.at >= started]
            # The first six warm a standby's cache; a leader decides on the six that come after its wait.
            assert len(lists) > 6
            assert min(lists[-6:]) - started > duration + 3.0, "what is listed must hold that write"

    run_virtually(main())


@pytest.mark.parametrize(("offers", "waits"), [(0, False), (1, True)])
def test_a_leader_that_finds_no_lease_waits_for_late_writes_only_where_there_are_offers(
    offers: int, waits: bool
) -> None:
    async def main() -> None:
        kube = FakeKube()
        for number in range(offers):
            kube.put(OFFERS, make_offer(name=f"o-{number}"), uid=f"o-{number}")
        started = Clock.monotonic()
        async with leading(kube, write_timeout=3.0) as rig:
            assert (Clock.monotonic() - started > rig.session.lease.times.renew_deadline + 3.0) is waits

    run_virtually(main())


def test_a_restart_books_nothing_twice_and_loses_nothing() -> None:
    async def main() -> None:
        kube = FakeKube()
        async with leading(kube, nodes={"node-a": 4}) as rig:
            for name in "abcdef":
                rig.offer(name)
            await rig.until(lambda: all(rig.verdict(name) for name in "abcdef"))
            before = {name: rig.read(name)["status"] for name in "abcdef"}
            assert [rig.verdict(n) for n in "abcdef"].count(ADMITTED) == 4
        async with leading(kube) as rig:
            await rig.quiet(10)
            assert {name: rig.read(name)["status"] for name in "abcdef"} == before
            assert rig.booked() == {"node-a": 4}
            assert len(kube.all(JOBS_OF_TRAINING)) == 4

    run_virtually(main())


def test_what_an_old_leader_overbooked_is_taken_back_newest_first() -> None:
    async def main() -> None:
        kube = FakeKube()
        kube.put(NODES, make_node(gpus=1), uid="n")
        kube.put(POLICIES, make_policy(), uid="lab-uid")
        for name, moment in (("old", "2026-01-31T11:00:00Z"), ("new", "2026-01-31T11:00:01Z")):
            admission = {
                "policyRef": {"name": "lab", "uid": "lab-uid", "generation": 1},
                "jobName": f"{name}-{name}-uid",
                "decidedAt": moment,
                "assignments": [{"nodeName": "node-a", "resourceName": "nvidia.com/gpu", "count": 1}],
            }
            conditions = [
                {
                    "type": "Admitted",
                    "status": "True",
                    "reason": "Admitted",
                    "lastTransitionTime": moment,
                    "message": "",
                }
            ]
            status = {"admission": admission, "conditions": conditions, "observedGeneration": 1}
            kube.put(OFFERS, make_offer(name=name, parameters=ONE_GPU, status=status), uid=f"{name}-uid")
        async with leading(kube) as rig:
            await rig.until(lambda: rig.verdict("new") == FULL)
            await rig.quiet()
            assert rig.verdict("old") == ADMITTED
            assert rig.booked() == {"node-a": 1}
            assert ("TaskOffer", "new", "Overbooked") in rig.events()

    run_virtually(main())


def test_a_draining_replica_decides_nothing_more_and_finishes_what_is_on_its_way() -> None:
    async def main() -> None:
        async with leading() as rig:
            rig.kube.fail("status", OFFERS, None, delay=1)
            rig.offer("a")
            await rig.quiet(0.1)
            drained = asyncio.create_task(rig.replica.drain(4))
            await rig.quiet(0.1)
            rig.offer("b")
            assert await drained
            await rig.quiet(1)
            assert rig.verdict("a") == ADMITTED
            assert rig.verdict("b") is None

    run_virtually(main())


def test_a_draining_replica_leaves_to_the_next_one_what_it_has_not_sent_yet() -> None:
    async def main() -> None:
        async with leading(concurrent_writes=2) as rig:
            rig.kube.fail("status", OFFERS, None, delay=1, times=100)
            names = [f"o{number}" for number in range(20)]
            for name in names:
                rig.offer(name)
            await rig.quiet(0.1)
            assert len(rig.session.world.in_flight) == 20
            assert await rig.replica.drain(4)
            assert [rig.verdict(name) for name in names].count(None) == 18
            assert rig.kube.count("status", OFFERS) == 2

    run_virtually(main())


def test_a_drain_waits_for_every_write_also_of_a_policy() -> None:
    async def main() -> None:
        async with leading() as rig:
            await rig.quiet()
            rig.kube.fail("status", POLICIES, None, delay=1)
            rig.kube.put(NODES, make_node("node-new"))
            await rig.until(lambda: rig.replica.session.writing == 1)
            started = Clock.monotonic()
            assert await rig.replica.drain(4)
            assert Clock.monotonic() - started > 0.5
            assert rig.replica.session.writing == 0

    run_virtually(main())


def test_events_that_are_left_are_written_after_the_loops_have_ended() -> None:
    async def main() -> None:
        kube = FakeKube()
        writer = EventWriter(cast(Kube, kube))
        for number in range(20):
            subject = Subject("taskoffer.dev/v1alpha1", "TaskOffer", "default", f"o{number}", f"{number}")
            writer.emit(subject, Reason.ADMITTED, "admitted")
        await writer.flush(seconds=1)
        assert len(kube.all(EVENTS)) == 20

    run_virtually(main())


def test_a_drain_does_not_wait_for_ever_and_says_so() -> None:
    async def main() -> None:
        async with leading() as rig:
            rig.kube.fail("status", OFFERS, GONE, times=1000)
            rig.offer("a")
            await rig.quiet(0.1)
            assert not await rig.replica.drain(4)

    run_virtually(main())


def test_an_offer_expires_when_its_time_comes_and_nothing_else_happens() -> None:
    async def main() -> None:
        async with leading(nodes={"node-a": 1}) as rig:
            rig.offer(parameters=TWO_GPUS, expires_at="2026-01-31T12:10:00Z")
            await rig.until(lambda: rig.verdict() == FULL)
            await rig.until(lambda: rig.verdict() == ("False", "Expired"), seconds=700)
            assert 600 <= Clock.monotonic() < 601
            assert rig.finished() == "Rejected"

    run_virtually(main())


def test_an_offer_that_cannot_be_read_is_answered_and_the_others_are_decided() -> None:
    async def main() -> None:
        async with leading() as rig:
            rig.offer("bad", spec={"timeLimitSeconds": -1})
            rig.offer("good")
            await rig.until(lambda: rig.verdict("good") and rig.verdict("bad"))
            assert rig.verdict("good") == ADMITTED
            assert rig.verdict("bad") == ("False", "InvalidOffer")

    run_virtually(main())


def test_offers_of_a_broken_policy_wait_and_those_of_another_are_decided() -> None:
    async def main() -> None:
        async with leading() as rig:
            rig.kube.put(POLICIES, make_policy(name="broken", default=False, scoring={"terms": []}), uid="broken-uid")
            rig.offer("a", policy="broken")
            rig.offer("b")
            rig.offer("c", policy="missing")
            await rig.until(lambda: all(rig.verdict(n) for n in "abc"))
            assert rig.verdict("a") == ("False", "PolicyNotReady")
            assert rig.verdict("b") == ADMITTED
            assert rig.verdict("c") == ("False", "PolicyNotFound")

    run_virtually(main())


def test_in_a_burst_answers_go_before_the_jobs_and_events_that_follow_from_them() -> None:
    async def main() -> None:
        async with leading(nodes={f"node-{n}": 8 for n in range(8)}) as rig:
            rig.kube.latency = 0.05
            offers = 400
            for n in range(offers):
                rig.offer(f"o{n}")
            await rig.until(lambda: rig.kube.count("status", OFFERS) == offers)
            writes = [r for r in rig.kube.requests if r.verb in ("create", "status") and r.kind != "Lease"]
            answers = [n for n, r in enumerate(writes) if r.kind == "TaskOffer"]
            # The burst is over when few answers are left.
            first, last = answers[0], answers[-rig.session.settings.concurrent_writes]
            seconds = writes[last].at - writes[first].at
            beside = Counter(r.kind for r in writes[first:last])
            # One job worker and one event writer go on meanwhile, each with one request at a time.
            most = seconds / rig.kube.latency + 2
            assert beside["TrainingJob"] + beside["ConfigMap"] + beside["Job"] <= most
            assert 0 < beside["Event"] <= most
            admitted = sum(rig.verdict(f"o{n}") == ADMITTED for n in range(offers))
            assert admitted > 10
            await rig.until(lambda: rig.kube.count("create", BATCH_JOBS) == admitted)
            assert rig.kube.count("status", OFFERS) == offers

    run_virtually(main())


def test_a_cycle_is_spared_when_nothing_waits_for_a_decision() -> None:
    async def main() -> None:
        async with leading() as rig:
            rig.offer()
            await rig.until(lambda: rig.verdict() == ADMITTED)
            await rig.quiet(1)
            before = rig.replica.admission._cycles
            for n in range(20):
                rig.kube.put(PODS, make_pod(f"other-{n}", gpus=1))
            await rig.quiet(5)
            assert rig.replica.admission._cycles == before
            rig.offer("b", parameters=TWO_GPUS)
            await rig.until(lambda: rig.verdict("b") == FULL)

    run_virtually(main())
