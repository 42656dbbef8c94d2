"""A trainer that the offer has brought, from the admission to its end by the clock and the step that looks at it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from builders import make_policy
from core_builders import HIGH_TAKES
from fake_replica import end_pod, leading
from played_pods import JOB, created, ends, trains
from taskoffer.adapters.kube import BATCH_JOBS, CONFIG_MAPS, JOBS_OF_TRAINING, PODS, Object
from taskoffer.api.contract import SubmitConfig
from taskoffer.reconcile import replica
from taskoffer.reconcile.preemptible import running_jobs
from virtual_time import run_virtually, virtual_time

__all__ = ["virtual_time"]
pytestmark = pytest.mark.usefixtures("virtual_time")

IMAGE: Object = {"trainer": {"image": "registry.test/mine:1"}}
STEPS: Object = {"cache": {"claimName": "cache"}, "submitSeconds": 600}


def allowing(**fields: Any) -> Object:
    return make_policy(steps=STEPS, trainers={"images": ["registry.test/*"]}, **fields)


VERIFIED: Object = {
    "reason": "Completed",
    "message": "2 files",
    "adapterDir": f"/data/output/{JOB}/adapter",
    "adapterSha256": "ab" * 32,
    "published": {"to": f"/data/output/{JOB}/adapter", "files": 2, "bytes": 99},
}
EMPTY: Object = {"reason": "EmptyResult", "message": "the trainer has left nothing"}


@pytest.mark.parametrize(
    ("code", "said", "finished", "words"),
    [
        (0, VERIFIED, "Succeeded", "trained and verified"),
        (74, EMPTY, "Failed", "step Submit ended with exit code 74: EmptyResult: the trainer has left nothing"),
    ],
    ids=["something to show", "nothing"],
)
def test_one_that_never_ends_is_stopped_in_time_and_what_it_has_left_decides(
    code: int, said: Object, finished: str, words: str
) -> None:
    async def main() -> None:
        async with leading(nodes={"node-a": 1}, policy=allowing()) as rig:
            rig.offer(spec=IMAGE, hours=1)
            job = await trains(rig)
            assert rig.kube.all(CONFIG_MAPS) == []
            await rig.quiet(2900)
            assert not rig.kube.get_now(BATCH_JOBS, f"{JOB}-1")["spec"].get("suspend")
            await rig.until(lambda: rig.kube.get_now(BATCH_JOBS, f"{JOB}-1")["spec"].get("suspend"), seconds=110)
            assert rig.booked() == {"node-a": 1}, "its GPU is free only once it has ended"
            rig.kube.remove(PODS, f"{job['metadata']['name']}-pod")
            submit = await created(rig, f"{JOB}-submit")
            assert rig.booked() == {}
            config = rig.kube.get_now(CONFIG_MAPS, f"{JOB}-submit")["data"]["submit.json"]
            assert SubmitConfig.model_validate_json(config).unverified
            ends(rig, submit, code, said)
            await rig.until(lambda: rig.finished() == finished)
            (end,) = [c for c in rig.read()["status"]["conditions"] if c["type"] == "Finished"]
            assert end["message"] == words
            status = rig.kube.get_now(JOBS_OF_TRAINING, JOB)["status"]
            assert [attempt["outcome"] for attempt in status["attempts"]] == ["Succeeded"]
            assert "submittedTo" not in status.get("result", {})

    run_virtually(main())


def test_one_that_was_killed_by_the_clock_while_nobody_led_is_looked_at_by_the_next_leader() -> None:
    async def main() -> None:
        async with leading(nodes={"node-a": 1}, policy=allowing()) as rig:
            rig.offer(spec=IMAGE, hours=1)
            job = await trains(rig)
            kube = rig.kube
        # The Job controller ends it by activeDeadlineSeconds, and removes its pod.
        assert 3000 <= job["spec"]["activeDeadlineSeconds"] <= 3060
        kube.remove(PODS, f"{job['metadata']['name']}-pod")
        kube.change(BATCH_JOBS, f"{JOB}-1", {"status": {"conditions": [{"type": "Failed", "status": "True"}]}})
        await asyncio.sleep(3100)
        async with leading(kube, identity="two") as rig:
            await created(rig, f"{JOB}-submit")

    run_virtually(main())


def test_one_that_fails_is_tried_again_and_a_trainers_word_for_done_means_nothing() -> None:
    async def main() -> None:
        async with leading(policy=allowing(attempts={"maxAttempts": 2, "backoffSeconds": 5})) as rig:
            rig.offer(spec=IMAGE, hours=1)
            await trains(rig)
            end_pod(rig.kube, f"{JOB}-1-pod", 64, json.dumps({**VERIFIED, "exitCode": 0}))
            await created(rig, f"{JOB}-2")
            assert "result" not in rig.kube.get_now(JOBS_OF_TRAINING, JOB)["status"]

    run_virtually(main())


def test_it_is_not_asked_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    async def fetch(_session: Any, ip: str) -> None:
        asked.append(ip)

    monkeypatch.setattr(replica, "fetch_report", fetch)

    async def main() -> None:
        async with leading(policy=allowing()) as rig:
            rig.offer(spec=IMAGE, hours=1)
            await trains(rig)
            await rig.quiet(30)
            assert asked == []
            rig.offer("b", hours=1)
            await trains(rig, "b-b-uid")
            await rig.until(lambda: asked)

    run_virtually(main())


def test_it_is_not_stopped_for_others_because_nobody_knows_whether_it_can_go_on() -> None:
    async def main() -> None:
        policy = allowing(queue={"priorities": ["low", "high"]}, preemption=HIGH_TAKES)
        async with leading(policy=policy) as rig:
            rig.offer(spec=IMAGE, hours=1)
            await trains(rig)
            rig.offer("b", hours=1)
            await trains(rig, "b-b-uid")
            world = rig.session.world
            assert [job.name for job in running_jobs(world, world.policy_views())] == ["default/b"]

    run_virtually(main())
