"""The lease: judged on the candidate's own clock, bounded in every call, given up before anybody else can have it."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from fake_kube import FakeKube, refused
from taskoffer.adapters.kube import LEASES, Kube, UnknownOutcomeError
from taskoffer.adapters.lease import LeadershipLostError, Lease, LeaseTimes
from virtual_time import Clock, run_virtually, virtual_time

__all__ = ["virtual_time"]
pytestmark = pytest.mark.usefixtures("virtual_time")

TIMES = LeaseTimes(duration=8, renew_deadline=5, retry_period=1)
GONE = UnknownOutcomeError("no answer")


def candidate(kube: FakeKube, name: str = "one") -> Lease:
    return Lease(cast(Kube, kube), "system", "taskoffer", name, TIMES)


def spec(kube: FakeKube) -> dict[str, Any]:
    found: dict[str, Any] = kube.get_now(LEASES, "taskoffer", "system")["spec"]
    return found


def test_the_first_candidate_creates_the_lease_and_may_act() -> None:
    async def main() -> None:
        kube = FakeKube()
        one = candidate(kube)
        assert not one.held
        with pytest.raises(LeadershipLostError, match="one does not hold the lease system/taskoffer"):
            one.check()
        await one.acquire()
        one.check()
        assert spec(kube)["holderIdentity"] == "one"
        assert spec(kube)["leaseDurationSeconds"] == 8

    run_virtually(main())


def test_a_lease_counts_from_before_its_renewing_request() -> None:
    async def main() -> None:
        kube = FakeKube(latency=0.4)
        one = candidate(kube)
        await one.acquire()
        assert Clock.monotonic() == pytest.approx(0.8)
        await asyncio.sleep(5 - 0.8 - 0.001)
        assert one.held
        await asyncio.sleep(0.002)
        assert not one.held

    run_virtually(main())


@pytest.mark.parametrize("verb", ["get", "replace"])
@pytest.mark.parametrize("error", [GONE, refused(403, "Forbidden")])
def test_a_leader_that_cannot_renew_in_time_is_told_before_another_may_lead(verb: str, error: Exception) -> None:
    async def main() -> None:
        kube = FakeKube()
        one = candidate(kube)
        await one.acquire()
        kube.fail(verb, LEASES, error, times=1000)
        started = Clock.monotonic()
        with pytest.raises(LeadershipLostError, match="could not renew within 5 s"):
            await one.keep()
        assert not one.held
        assert Clock.monotonic() - started < TIMES.duration

    run_virtually(main())


def test_a_short_disturbance_does_not_cost_the_leadership() -> None:
    async def main() -> None:
        kube = FakeKube()
        one = candidate(kube)
        await one.acquire()
        kube.fail("get", LEASES, GONE, times=3)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(one.keep(), 60)
        assert one.held
        assert spec(kube)["leaseTransitions"] == 0

    run_virtually(main())


def test_a_call_that_hangs_is_cut_short() -> None:
    async def main() -> None:
        kube = FakeKube()
        one = candidate(kube)
        await one.acquire()
        kube.fail("get", LEASES, GONE, delay=300, times=100)
        started = Clock.monotonic()
        with pytest.raises(LeadershipLostError):
            await one.keep()
        assert Clock.monotonic() - started < TIMES.duration

    run_virtually(main())


def test_a_renewal_whose_outcome_is_unknown_does_not_lengthen_the_lease() -> None:
    async def main() -> None:
        kube = FakeKube()
        one = candidate(kube)
        await one.acquire()
        await asyncio.sleep(1)
        kube.fail("replace", LEASES, GONE, committed=True)
        assert not await one._try()
        assert one.held
        await asyncio.sleep(4)
        assert not one.held

    run_virtually(main())


def test_another_candidate_takes_over_only_after_a_full_duration_without_renewal() -> None:
    async def main() -> None:
        kube = FakeKube()
        one, two = candidate(kube), candidate(kube, "two")
        await one.acquire()
        waiting = asyncio.create_task(two.acquire())
        for _ in range(20):
            await asyncio.sleep(1)
            assert await one._try()
        assert not waiting.done()
        renewed = Clock.monotonic()
        await waiting
        assert TIMES.duration < Clock.monotonic() - renewed < TIMES.duration + 3 * TIMES.retry_period
        assert not one.held
        assert not two.released_before
        assert (two.transitions, spec(kube)["holderIdentity"]) == (1, "two")

    run_virtually(main())


def test_at_no_moment_do_two_candidates_hold_the_lease() -> None:
    async def main() -> None:
        kube = FakeKube()
        one, two = candidate(kube), candidate(kube, "two")
        await one.acquire()
        kube.fail("replace", LEASES, GONE, times=4)
        waiting = asyncio.create_task(two.acquire())
        ending = asyncio.create_task(one.keep())
        for _ in range(400):
            await asyncio.sleep(0.1)
            assert not (one.held and two.held)
        for task in (waiting, ending):
            task.cancel()
        await asyncio.gather(waiting, ending, return_exceptions=True)

    run_virtually(main())


def test_a_released_lease_is_taken_at_once_and_known_to_be_released() -> None:
    async def main() -> None:
        kube = FakeKube()
        one, two = candidate(kube), candidate(kube, "two")
        await one.acquire()
        await one.release()
        assert not one.held
        assert spec(kube)["holderIdentity"] == ""
        started = Clock.monotonic()
        await two.acquire()
        assert Clock.monotonic() - started < 0.1
        assert two.released_before

    run_virtually(main())


def test_a_candidate_that_waits_finds_a_released_lease_at_once() -> None:
    async def main() -> None:
        kube = FakeKube()
        one, two = candidate(kube), candidate(kube, "two")
        await one.acquire()
        waiting = asyncio.create_task(two.acquire())
        await asyncio.sleep(3.3)
        await one.release()
        released = Clock.monotonic()
        await waiting
        assert Clock.monotonic() - released <= 0.3
        assert two.released_before

    run_virtually(main())


def test_a_lease_that_somebody_removed_is_not_taken_for_one_that_was_given_up() -> None:
    async def main() -> None:
        kube = FakeKube()
        one, two = candidate(kube), candidate(kube, "two")
        await one.acquire()
        kube.remove(LEASES, one._name, one._namespace)
        await two.acquire()
        assert two.missing_before
        assert not two.released_before
        assert not await one._try()
        assert not one.held, "whoever led learns it at its next renewal"

    run_virtually(main())


def test_a_release_that_fails_leaves_the_lease_to_run_out() -> None:
    async def main() -> None:
        kube = FakeKube()
        one = candidate(kube)
        await one.acquire()
        kube.fail("get", LEASES, GONE, delay=100)
        started = Clock.monotonic()
        await one.release()
        assert Clock.monotonic() - started <= TIMES.retry_period + 0.1
        assert not one.held
        assert spec(kube)["holderIdentity"] == "one"

    run_virtually(main())


def test_a_candidate_that_never_led_releases_nothing() -> None:
    async def main() -> None:
        kube = FakeKube()
        await candidate(kube).acquire()
        two = candidate(kube, "two")
        asked = len(kube.requests)
        await two.release()
        assert len(kube.requests) == asked

    run_virtually(main())


def test_a_leader_stops_at_once_when_it_reads_that_another_holds_the_lease() -> None:
    async def main() -> None:
        kube = FakeKube()
        one = candidate(kube)
        await one.acquire()
        kube.change(LEASES, "taskoffer", {"spec": {"holderIdentity": "thief"}}, "system")
        with pytest.raises(LeadershipLostError):
            await one.keep()
        assert Clock.monotonic() < TIMES.renew_deadline

    run_virtually(main())


def test_of_two_candidates_that_come_at_once_one_wins() -> None:
    async def main() -> None:
        kube = FakeKube()
        kube.put(LEASES, {"metadata": {"name": "taskoffer", "namespace": "system"}})
        one, two = candidate(kube), candidate(kube, "two")
        won = await asyncio.gather(one._try(), two._try())
        assert sorted(won) == [False, True]
        assert one.held != two.held

    run_virtually(main())


@pytest.mark.parametrize(("duration", "deadline", "retry"), [(8, 8, 1), (8, 5, 5), (4, 5, 1)])
def test_times_in_the_wrong_order_are_refused(duration: float, deadline: float, retry: float) -> None:
    with pytest.raises(ValueError, match="choose the times in this order"):
        LeaseTimes(duration, deadline, retry)
