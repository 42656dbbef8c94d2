"""Deletions that no watch tells, and what is left of TrainingJobs that somebody deletes."""

from __future__ import annotations

from typing import Any

import pytest

from builders import make_offer, make_pod, make_policy
from core_builders import FOUR_GPUS, ONE_GPU
from fake_replica import Rig, end_pod, leading, start_pod
from taskoffer.adapters.kube import (
    BATCH_JOBS,
    CONFIG_MAPS,
    JOBS_OF_TRAINING,
    OFFERS,
    PODS,
    POLICIES,
    Object,
    Resource,
    UnknownOutcomeError,
)
from virtual_time import run_virtually, virtual_time

__all__ = ["virtual_time"]
pytestmark = pytest.mark.usefixtures("virtual_time")

JOB = "a-a-uid"
FULL = ("False", "WaitingForCapacity")


async def running(rig: Rig, **fields: Any) -> Object:
    """Create an offer and wait until its Job is there and its TrainingJob says so; return the Job."""
    rig.offer(**fields)
    await rig.until(lambda: "status" in (rig.kube.all(JOBS_OF_TRAINING) or [{}])[0])
    return rig.kube.get_now(BATCH_JOBS, f"{JOB}-1")


def vanish(rig: Rig, *places: tuple[Resource, str]) -> None:
    """Let objects be gone without a word, as for a watch that was away when they were deleted."""
    for resource, name in places:
        del rig.kube.objects[resource, "default", name]


def orphan(rig: Rig) -> None:
    """Delete the TrainingJob and leave what it owns."""
    for resource in (BATCH_JOBS, CONFIG_MAPS):
        rig.kube.objects[resource, "default", f"{JOB}-1"]["metadata"]["ownerReferences"] = []
    rig.kube.remove(JOBS_OF_TRAINING, JOB)


def test_no_training_job_is_made_for_an_offer_whose_deletion_was_not_told() -> None:
    async def main() -> None:
        async with leading() as rig:
            await running(rig)
            vanish(rig, (OFFERS, "a"))
            rig.kube.remove(JOBS_OF_TRAINING, JOB)
            await rig.quiet(20)
            assert rig.kube.count("create", JOBS_OF_TRAINING) == 1
            assert rig.booked() == {}

    run_virtually(main())


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("trouble", [False, True])
def test_an_offer_is_not_refused_as_the_double_of_one_whose_deletion_was_not_told(name: str, trouble: bool) -> None:
    async def main() -> None:
        async with leading(nodes={"node-a": 1}) as rig:
            rig.kube.put(PODS, make_pod(gpus=1), uid="foreign-uid")
            rig.offer("a", task_id="task")
            await rig.until(lambda: rig.verdict("a") == FULL)
            vanish(rig, (OFFERS, "a"))
            if trouble:
                rig.kube.fail("get", OFFERS, UnknownOutcomeError("no answer"))
            rig.kube.put(OFFERS, make_offer(name=name, task_id="task", parameters=ONE_GPU), uid="new-uid")
            await rig.until(lambda: rig.verdict(name) == FULL)
            rig.kube.put(OFFERS, make_offer(name="c", task_id="task", parameters=ONE_GPU), uid="z-uid")
            await rig.until(lambda: rig.verdict("c") == ("False", "DuplicateTask"))

    run_virtually(main())


def test_no_job_is_made_for_a_training_job_whose_deletion_was_not_told() -> None:
    async def main() -> None:
        async with leading() as rig:
            await running(rig)
            vanish(rig, (OFFERS, "a"), (JOBS_OF_TRAINING, JOB))
            rig.kube.remove(BATCH_JOBS, f"{JOB}-1")
            await rig.quiet(20)
            assert rig.kube.count("create", BATCH_JOBS) == 1
            assert rig.kube.count("create", JOBS_OF_TRAINING) == 1
            assert rig.booked() == {}

    run_virtually(main())


def test_a_job_that_neither_a_training_job_nor_an_offer_is_left_for_is_removed() -> None:
    async def main() -> None:
        async with leading() as rig:
            await running(rig)
            rig.kube.objects[BATCH_JOBS, "default", f"{JOB}-1"]["metadata"]["ownerReferences"] = []
            rig.kube.remove(OFFERS, "a")
            assert not rig.kube.all(JOBS_OF_TRAINING)
            await rig.until(lambda: not rig.kube.all(BATCH_JOBS))
            await rig.until(lambda: rig.booked() == {})

    run_virtually(main())


@pytest.mark.parametrize("policy_moves_on", [False, True])
def test_a_job_that_lost_its_training_job_goes_on_under_another_one_and_ends_properly(policy_moves_on: bool) -> None:
    async def main() -> None:
        async with leading() as rig:
            start_pod(rig.kube, await running(rig))
            if policy_moves_on:
                rig.kube.change(POLICIES, "lab", {"spec": {"filters": {"maxConcurrentJobs": 3}}})
                await rig.quiet(5)
            orphan(rig)
            await rig.until(lambda: bool(rig.kube.all(JOBS_OF_TRAINING)))
            await rig.quiet(10)
            assert rig.kube.count("create", BATCH_JOBS) == 1
            assert len(rig.kube.all(PODS)) == 1
            assert rig.booked() == {"node-a": 1}
            end_pod(rig.kube, f"{JOB}-1-pod", 0)
            await rig.until(lambda: rig.finished() == "Succeeded")
            assert rig.booked() == {}

    run_virtually(main())


def test_a_training_job_that_was_deleted_is_not_made_again_where_its_gpus_were_given_away() -> None:
    async def main() -> None:
        async with leading(nodes={"node-a": 4}) as rig:
            await running(rig, parameters=FOUR_GPUS)
            # As if its second attempt had been moved away, and somebody else were on its first node since.
            rig.kube.put(PODS, make_pod(gpus=4), uid="foreign-uid")
            rig.kube.remove(JOBS_OF_TRAINING, JOB)
            await rig.until(lambda: rig.verdict() == FULL)
            assert rig.kube.count("create", JOBS_OF_TRAINING) == 1
            assert rig.booked() == {"node-a": 4}

    run_virtually(main())


@pytest.mark.parametrize("committed", [True, False])
def test_a_create_of_unknown_outcome_is_repeated_as_it_was_although_the_policy_moves_on(committed: bool) -> None:
    async def main() -> None:
        async with leading(policy=make_policy()) as rig:
            rig.kube.fail("create", JOBS_OF_TRAINING, UnknownOutcomeError("no answer"), committed=committed)
            rig.offer()
            await rig.until(lambda: rig.kube.count("create", JOBS_OF_TRAINING) == 1)
            rig.kube.change(POLICIES, "lab", {"spec": {"filters": {"maxConcurrentJobs": 3}}})
            await rig.until(lambda: bool(rig.kube.all(BATCH_JOBS)))
            admission = rig.read()["status"]["admission"]
            assert admission["policyRef"]["generation"] == 1
            (made,) = rig.kube.all(JOBS_OF_TRAINING)
            assert made["spec"]["run"]["policyRef"] == admission["policyRef"]

    run_virtually(main())
