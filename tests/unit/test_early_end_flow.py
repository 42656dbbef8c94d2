"""A training whose last attempt is killed, from its last report to the step that hands its best adapter so far over."""

from __future__ import annotations

from typing import Any

import pytest

from builders import make_node, make_policy
from core_builders import NOW
from fake_replica import Rig, end_pod, leading
from played_pods import JOB, created, ends, prepares, trains
from taskoffer.adapters.kube import BATCH_JOBS, CONFIG_MAPS, JOBS_OF_TRAINING, NODES, PODS, Object
from taskoffer.api.base import rfc3339
from taskoffer.api.contract import ProgressReport, SubmitConfig
from taskoffer.reconcile import replica
from virtual_time import run_virtually, virtual_time

__all__ = ["virtual_time"]
pytestmark = pytest.mark.usefixtures("virtual_time")

FOLDER = f"/data/output/{JOB}/provisional/step-40-0123456789ab"
STEPS: Object = {
    "cache": {"claimName": "cache"},
    "s3Credentials": {"name": "s3", "key": "credentials"},
    "submitSeconds": 600,
}
POLICY = make_policy(steps=STEPS, attempts={"maxAttempts": 1, "backoffSeconds": 5})
TARGET: Object = {"output": {"url": "s3://results/a/"}}
HANDED: Object = {
    "reason": "Completed",
    "message": "4 files",
    "adapterDir": FOLDER,
    "published": {"to": "s3://results/a/", "files": 4, "bytes": 99},
}
BROKEN: Object = {"reason": "AdapterBroken", "message": "it holds no tensors"}
ENDS = {
    "it is whole": (
        0,
        HANDED,
        "Succeeded",
        "the best adapter so far, of step 40, was verified and handed over to s3://",
    ),
    "it is not": (74, BROKEN, "Failed", "attempt 1 ended with exit code 137"),
}


@pytest.fixture(autouse=True)
def _reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every trainer say that it has kept an adapter."""

    async def fetch(_session: Any, _ip: str) -> ProgressReport:
        said: Object = {
            "state": "Training",
            "lastUpdatedTime": rfc3339(NOW),
            "provisional": {"step": 40, "path": FOLDER},
        }
        return ProgressReport.model_validate({"jobName": JOB, "attempt": 1, **said})

    monkeypatch.setattr(replica, "fetch_report", fetch)


def status_of(rig: Rig) -> Object:
    return dict(rig.kube.get_now(JOBS_OF_TRAINING, JOB)["status"])


@pytest.mark.parametrize("case", ENDS)
def test_what_a_killed_training_has_kept_decides_and_its_gpu_is_free_meanwhile(case: str) -> None:
    code, said, finished, words = ENDS[case]

    async def main() -> None:
        async with leading(nodes={"node-a": 1}, policy=POLICY) as rig:
            rig.offer(spec=TARGET, hours=1)
            await prepares(rig)
            await trains(rig)
            await rig.until(lambda: "provisional" in status_of(rig))
            assert rig.booked() == {"node-a": 1}
            end_pod(rig.kube, f"{JOB}-1-pod", 137, "")
            submit = await created(rig, f"{JOB}-submit")
            assert rig.booked() == {}
            assert status_of(rig)["earlyEnd"]["reason"] == "AttemptsExhausted"
            config = rig.kube.get_now(CONFIG_MAPS, f"{JOB}-submit")["data"]["submit.json"]
            asked = SubmitConfig.model_validate_json(config)
            assert (asked.unverified, asked.provisional) == (True, True)
            ends(rig, submit, code, said)
            await rig.until(lambda: rig.finished() == finished)
            (end,) = [c for c in rig.read()["status"]["conditions"] if c["type"] == "Finished"]
            assert end["message"].startswith(words)
            assert [attempt["outcome"] for attempt in status_of(rig)["attempts"]] == ["Failed"]

    run_virtually(main())


def test_a_training_that_does_not_end_is_stopped_in_time_and_its_best_adapter_so_far_handed_over() -> None:
    async def main() -> None:
        async with leading(nodes={"node-a": 1}, policy=POLICY) as rig:
            rig.offer(spec=TARGET, hours=1)
            await prepares(rig)
            await trains(rig)
            await rig.quiet(2900)
            assert not rig.kube.get_now(BATCH_JOBS, f"{JOB}-1")["spec"].get("suspend")
            await rig.until(lambda: rig.kube.get_now(BATCH_JOBS, f"{JOB}-1")["spec"].get("suspend"), seconds=110)
            end_pod(rig.kube, f"{JOB}-1-pod", 143, "")
            submit = await created(rig, f"{JOB}-submit")
            assert status_of(rig)["earlyEnd"]["reason"] == "DeadlineExceeded"
            ends(rig, submit, 0, HANDED)
            await rig.until(lambda: rig.finished() == "Succeeded")

    run_virtually(main())


MORE_ATTEMPTS = make_policy(
    steps=STEPS,
    attempts={"maxAttempts": 3, "backoffSeconds": 5, "nodeLostSeconds": 30},
)


async def _loses_its_node(rig: Rig) -> None:
    """Let a training that has kept an adapter lose its node, while there is no room elsewhere."""
    rig.offer(spec=TARGET, hours=1)
    await prepares(rig)
    await trains(rig)
    await rig.until(lambda: "provisional" in status_of(rig))
    away = {"type": "Ready", "status": "Unknown", "lastTransitionTime": rfc3339(NOW)}
    rig.kube.change(NODES, "node-a", {"status": {"conditions": [away]}}, "")
    await rig.until(lambda: status_of(rig)["attempts"][0].get("outcome") == "NodeLost", seconds=200)


def test_a_pod_that_stays_on_a_lost_node_does_not_keep_the_best_adapter_from_being_handed_over() -> None:
    async def main() -> None:
        async with leading(nodes={"node-a": 1}, policy=MORE_ATTEMPTS) as rig:
            await _loses_its_node(rig)
            submit = await created(rig, f"{JOB}-submit")
            assert status_of(rig)["earlyEnd"]["reason"] == "DeadlineExceeded"
            assert rig.booked() == {"node-a": 1}, "its pod may still run"
            ends(rig, submit, 0, HANDED)
            await rig.until(lambda: rig.finished() == "Succeeded")

    run_virtually(main())


def test_a_job_that_hands_its_best_adapter_over_takes_no_gpus_that_come_free() -> None:
    async def main() -> None:
        async with leading(nodes={"node-a": 1}, policy=MORE_ATTEMPTS) as rig:
            await _loses_its_node(rig)
            rig.kube.remove(PODS, f"{JOB}-1-pod")
            await rig.until(lambda: rig.session.world.moves)
            await created(rig, f"{JOB}-submit")
            rig.kube.put(NODES, make_node("node-b", gpus=1), uid="node-b-uid")
            rig.offer("rival", hours=0.5)
            await rig.until(lambda: rig.verdict("rival") == ("True", "Admitted"))
            assert rig.booked() == {"node-b": 1}

    run_virtually(main())
