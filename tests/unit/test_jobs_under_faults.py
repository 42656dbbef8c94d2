"""From an admission to its end: TrainingJob, ConfigMap, Job, pods, and what goes wrong on the way."""

from __future__ import annotations

import json
from typing import Any

import pytest

from builders import make_admission, make_condition, make_policy, make_training_job
from core_builders import TWO_GPUS
from fake_kube import refused
from fake_replica import Rig, end_pod, leading, start_pod
from taskoffer.adapters.kube import (
    BATCH_JOBS,
    CONFIG_MAPS,
    JOBS_OF_TRAINING,
    NODES,
    OFFERS,
    PODS,
    POLICIES,
    Object,
    ThrottledError,
    UnknownOutcomeError,
)
from taskoffer.api.contract import ProgressReport
from taskoffer.decision.keys import OfferKey
from taskoffer.decision.moves import Move
from virtual_time import run_virtually, virtual_time

__all__ = ["virtual_time"]
pytestmark = pytest.mark.usefixtures("virtual_time")

GONE = UnknownOutcomeError("no answer")
ADMITTED, FULL = ("True", "Admitted"), ("False", "WaitingForCapacity")
JOB = "a-a-uid"


def quick(**attempts: int) -> Object:
    """A policy with short times."""
    return make_policy(attempts={"maxAttempts": 2, "backoffSeconds": 5, "startTimeoutSeconds": 60, **attempts})


async def created(rig: Rig, number: int = 1) -> Object:
    """Wait for the Job of an attempt."""
    name = f"{JOB}-{number}"
    await rig.until(lambda: any(j["metadata"]["name"] == name for j in rig.kube.all(BATCH_JOBS)), seconds=600)
    return rig.kube.get_now(BATCH_JOBS, name)


def condition(rig: Rig, kind: str) -> tuple[str, str] | None:
    found = [job for job in rig.kube.all(JOBS_OF_TRAINING) if job["metadata"]["name"] == JOB]
    conditions = [c for job in found for c in job.get("status", {}).get("conditions", [])]
    return next(((c["status"], c["reason"]) for c in conditions if c["type"] == kind), None)


def attempts(rig: Rig) -> list[Object]:
    found: list[Object] = rig.kube.get_now(JOBS_OF_TRAINING, JOB)["status"]["attempts"]
    return found


def test_an_admitted_offer_becomes_a_training_job_a_config_map_and_a_job() -> None:
    async def main() -> None:
        async with leading() as rig:
            rig.offer()
            job = await created(rig)
            training = rig.kube.get_now(JOBS_OF_TRAINING, JOB)
            config = rig.kube.get_now(CONFIG_MAPS, f"{JOB}-1")
            assert training["metadata"]["ownerReferences"][0]["uid"] == "a-uid"
            assert job["metadata"]["ownerReferences"][0]["uid"] == training["metadata"]["uid"]
            assert json.loads(config["data"]["run.json"])["jobName"] == JOB
            await rig.until(lambda: condition(rig, "Running") == ("False", "Pending"))
            await rig.quiet(20)
            assert rig.booked() == {"node-a": 1}
            assert rig.kube.count("create", BATCH_JOBS) == 1

    run_virtually(main())


def test_a_training_reaches_its_offer_and_frees_its_gpus_when_its_pod_has_ended() -> None:
    async def main() -> None:
        async with leading(nodes={"node-a": 1}) as rig:
            rig.offer()
            start_pod(rig.kube, await created(rig))
            await rig.until(lambda: condition(rig, "Running") == ("True", "Running"))
            rig.offer("b")
            await rig.until(lambda: rig.verdict("b") == FULL)
            words = {"exitCode": 0, "reason": "Done", "evalLossBefore": 2.0, "evalLossAfter": 1.0}
            end_pod(rig.kube, f"{JOB}-1-pod", 0, json.dumps(words))
            await rig.until(lambda: rig.finished() == "Succeeded")
            await rig.until(lambda: rig.verdict("b") == ADMITTED)
            result = rig.kube.get_now(JOBS_OF_TRAINING, JOB)["status"]["result"]
            assert (result["evalLossBefore"], result["evalLossAfter"]) == ("2", "1")
            assert "admission" in rig.read()["status"], "the admission stays as a record"
            assert rig.kube.count("status", OFFERS, "a") == 2

    run_virtually(main())


@pytest.mark.parametrize("resource", [JOBS_OF_TRAINING, CONFIG_MAPS, BATCH_JOBS])
@pytest.mark.parametrize("committed", [True, False])
def test_a_create_of_unknown_outcome_is_repeated_and_its_own_object_accepted(resource: Any, committed: bool) -> None:
    async def main() -> None:
        async with leading() as rig:
            rig.kube.fail("create", resource, GONE, committed=committed)
            rig.offer()
            await created(rig)
            await rig.quiet(10)
            assert [len(rig.kube.all(kind)) for kind in (JOBS_OF_TRAINING, CONFIG_MAPS, BATCH_JOBS)] == [1, 1, 1]
            assert rig.booked() == {"node-a": 1}

    run_virtually(main())


@pytest.mark.parametrize("error", [ThrottledError(3), GONE, refused(500, "x"), refused(403, "Forbidden")])
@pytest.mark.parametrize(("verb", "resource"), [("status", JOBS_OF_TRAINING), ("create", BATCH_JOBS)])
def test_a_pass_that_fails_is_repeated(verb: str, resource: Any, error: Exception) -> None:
    async def main() -> None:
        async with leading() as rig:
            rig.kube.fail(verb, resource, error, times=2)
            rig.offer()
            await created(rig)
            await rig.until(lambda: condition(rig, "Running") == ("False", "Pending"))

    run_virtually(main())


@pytest.mark.parametrize("error", [refused(403, "Forbidden"), GONE])
@pytest.mark.parametrize("resource", [CONFIG_MAPS, BATCH_JOBS])
def test_a_refused_attempt_says_so_once_and_gives_its_gpus_back_when_its_time_is_over(
    resource: Any, error: Exception
) -> None:
    async def main() -> None:
        async with leading(policy=quick(maxAttempts=1)) as rig:
            rig.kube.fail("create", resource, error, times=1000)
            rig.offer()
            await rig.until(lambda: condition(rig, "Running") == ("False", "JobRefused"))
            await rig.until(lambda: ("TrainingJob", JOB, "JobRefused") in rig.events())
            asked = rig.kube.count("create", resource)
            writes = rig.kube.count("status", JOBS_OF_TRAINING)
            await rig.quiet(30)
            assert 1 <= rig.kube.count("create", resource) - asked <= 3, "a growing pause lies between two tries"
            assert rig.kube.count("status", JOBS_OF_TRAINING) == writes, "nothing new is to be said"
            await rig.until(lambda: rig.finished() == "Failed", seconds=120)
            assert [a["outcome"] for a in attempts(rig)] == ["StartTimeout"]
            assert rig.booked() == {}
            assert rig.events().count(("TrainingJob", JOB, "JobRefused")) == 1

    run_virtually(main())


def test_a_training_job_that_is_refused_is_told_on_its_offer() -> None:
    async def main() -> None:
        async with leading() as rig:
            rig.kube.fail("create", JOBS_OF_TRAINING, refused(422), times=2)
            rig.offer()
            await rig.until(lambda: ("TaskOffer", "a", "JobRefused") in rig.events())
            await created(rig)
            assert rig.events().count(("TaskOffer", "a", "JobRefused")) == 1

    run_virtually(main())


def test_an_admission_that_books_one_place_twice_is_not_built_on() -> None:
    async def main() -> None:
        async with leading() as rig:
            place = {"nodeName": "node-a", "resourceName": "nvidia.com/gpu", "count": 1}
            admission = {**make_admission(policy="lab"), "jobName": JOB, "assignments": [place, place]}
            rig.offer(status={"admission": admission, "conditions": [make_condition("Admitted", "True", "Admitted")]})
            await rig.until(lambda: ("TaskOffer", "a", "InvalidOffer") in rig.events())
            await rig.quiet(20)
            assert rig.kube.count("status", JOBS_OF_TRAINING) <= 1

    run_virtually(main())


def test_a_name_that_belongs_to_somebody_else_is_not_adopted() -> None:
    async def main() -> None:
        async with leading() as rig:
            foreign = make_training_job(name=JOB, offer="other", offer_uid="other-uid")
            foreign["metadata"]["ownerReferences"] = [{"uid": "other-uid", "controller": True}]
            rig.kube.put(JOBS_OF_TRAINING, foreign)
            rig.kube.watching = True
            rig.session.world.jobs.forget(rig.kube.get_now(JOBS_OF_TRAINING, JOB)["metadata"]["uid"], 10**6)
            rig.offer()
            await rig.until(lambda: ("TaskOffer", "a", "NameConflict") in rig.events())
            await rig.quiet(10)
            assert rig.kube.get_now(JOBS_OF_TRAINING, JOB)["spec"] == foreign["spec"]
            assert rig.kube.all(BATCH_JOBS) == []
            assert rig.booked() == {"node-a": 1}, "the admission stands"

    run_virtually(main())


def test_a_foreign_job_of_the_wanted_name_is_not_adopted() -> None:
    async def main() -> None:
        async with leading() as rig:
            rig.kube.put(BATCH_JOBS, {"metadata": {"name": f"{JOB}-1", "namespace": "default"}, "spec": {"x": 1}})
            rig.offer()
            await rig.until(lambda: rig.kube.count("get", BATCH_JOBS) >= 1)
            await rig.quiet(10)
            assert rig.kube.get_now(BATCH_JOBS, f"{JOB}-1")["spec"] == {"x": 1}
            assert not any(a.get("startedAt") for a in rig.kube.get_now(JOBS_OF_TRAINING, JOB).get("status", {}).get("attempts", []))  # fmt: skip  # noqa: E501

    run_virtually(main())


def test_a_policy_that_changed_between_decision_and_start_takes_the_admission_back() -> None:
    async def main() -> None:
        async with leading() as rig:
            rig.kube.watching = False
            rig.kube.fail("status", OFFERS, None, delay=1)
            rig.replica.observe("TaskOffer", "ADDED", rig.offer())
            await rig.quiet(0.5)
            assert rig.verdict() == ADMITTED
            changed = rig.kube.change(POLICIES, "lab", {"spec": {"filters": {"minScore": "0.1"}}}, "")
            rig.replica.observe("CapacityPolicy", "MODIFIED", changed)
            rig.kube.watching = True
            await created(rig)
            assert rig.read()["status"]["admission"]["policyRef"]["generation"] == 2
            assert ("TaskOffer", "a", "PolicyChanged") in rig.events()
            evicted = next(c for c in rig.read()["status"]["conditions"] if c["type"] == "Evicted")
            assert evicted["status"] == "False", "it is admitted again"

    run_virtually(main())


def test_an_answer_that_waits_for_its_turn_while_its_policy_changes_is_decided_anew() -> None:
    async def main() -> None:
        async with leading() as rig:
            rig.kube.fail("status", OFFERS, ThrottledError(5))
            rig.offer()
            await rig.until(lambda: rig.kube.count("status", OFFERS) == 1)
            rig.kube.change(POLICIES, "lab", {"spec": {"filters": {"minScore": "0.99"}}})
            await rig.until(lambda: rig.finished() == "Rejected")
            assert [w.body["status"].get("admission") is not None for w in rig.kube.asked("status", OFFERS)] == [
                True,
                False,
            ]

    run_virtually(main())


def test_a_late_write_of_another_leader_that_overbooks_becomes_no_job() -> None:
    async def main() -> None:
        async with leading(nodes={"node-a": 1}) as rig:
            rig.offer("a")
            await created(rig)
            policy = rig.kube.get_now(POLICIES, "lab")["metadata"]
            admission = make_admission(job="late-late-uid", policy_uid=policy["uid"], node="node-a")
            said = [make_condition("Admitted", True, "Admitted")]
            status = {"admission": admission, "conditions": said, "observedGeneration": 1}
            rig.offer("late", status=status)
            await rig.until(lambda: rig.verdict("late") == ("False", "WaitingForCapacity"))
            await rig.quiet(5)
            assert len(rig.kube.all(JOBS_OF_TRAINING)) == 1
            assert rig.booked() == {"node-a": 1}
            assert ("TaskOffer", "late", "Overbooked") in rig.events()

    run_virtually(main())


# Cancel, delete


def test_making_an_offer_inactive_asks_its_pods_to_stop_at_once_and_frees_the_gpus_when_they_have() -> None:
    async def main() -> None:
        async with leading(nodes={"node-a": 1}) as rig:
            rig.offer()
            start_pod(rig.kube, await created(rig))
            await rig.until(lambda: condition(rig, "Running") == ("True", "Running"))
            rig.kube.change(OFFERS, "a", {"spec": {"active": False}})
            await rig.until(lambda: rig.kube.get_now(BATCH_JOBS, f"{JOB}-1")["spec"].get("suspend"), seconds=1)
            rig.offer("b")
            await rig.quiet(5)
            assert (rig.verdict("b"), rig.finished()) == (FULL, None)
            end_pod(rig.kube, f"{JOB}-1-pod", 143)
            await rig.until(lambda: rig.finished() == "Cancelled")
            await rig.until(lambda: rig.verdict("b") == ADMITTED)
            assert condition(rig, "Failed") == ("True", "Cancelled")

    run_virtually(main())


def test_an_offer_that_a_finalizer_holds_while_it_is_deleted_is_cancelled_too() -> None:
    async def main() -> None:
        async with leading() as rig:
            rig.offer()
            start_pod(rig.kube, await created(rig))
            rig.kube.change(OFFERS, "a", {"metadata": {"deletionTimestamp": "2026-01-31T12:00:00Z"}})
            await rig.until(lambda: rig.kube.get_now(BATCH_JOBS, f"{JOB}-1")["spec"].get("suspend"), seconds=1)

    run_virtually(main())


def test_a_deleted_offers_gpus_stay_charged_until_its_pod_has_ended() -> None:
    async def main() -> None:
        async with leading(nodes={"node-a": 1}) as rig:
            rig.offer()
            start_pod(rig.kube, await created(rig))
            rig.kube.remove(OFFERS, "a")
            rig.offer("b")
            await rig.until(lambda: rig.verdict("b") == FULL)
            await rig.quiet(5)
            assert rig.booked() == {"node-a": 1}
            assert rig.kube.all(JOBS_OF_TRAINING) == []
            rig.kube.remove(PODS, f"{JOB}-1-pod")
            await rig.until(lambda: rig.verdict("b") == ADMITTED)

    run_virtually(main())


def test_a_job_that_is_gone_when_it_is_to_be_stopped_is_forgotten() -> None:
    async def main() -> None:
        async with leading() as rig:
            rig.offer()
            await created(rig)
            await rig.quiet()
            rig.kube.watching = False
            rig.kube.remove(BATCH_JOBS, f"{JOB}-1")
            rig.kube.watching = True
            rig.kube.change(OFFERS, "a", {"spec": {"active": False}})
            await rig.until(lambda: rig.finished() == "Cancelled")
            assert rig.kube.count("patch", BATCH_JOBS) == 1, "asking again for ever would spin"

    run_virtually(main())


# Failures and attempts


def test_a_failed_pod_is_followed_by_another_attempt_and_then_the_log_tells_why_it_failed() -> None:
    async def main() -> None:
        async with leading(policy=quick()) as rig:
            rig.offer()
            start_pod(rig.kube, await created(rig))
            rig.kube.logs[f"{JOB}-1-pod"] = "line 1\nCUDA error: device lost"
            end_pod(rig.kube, f"{JOB}-1-pod", 1)
            second = await created(rig, 2)
            assert attempts(rig)[0]["message"].endswith("CUDA error: device lost")
            assert rig.booked() == {"node-a": 1}
            start_pod(rig.kube, second)
            rig.kube.logs[f"{JOB}-2-pod"] = "again"
            end_pod(rig.kube, f"{JOB}-2-pod", 1)
            await rig.until(lambda: rig.finished() == "Failed")
            failed = next(c for c in rig.read()["status"]["conditions"] if c["type"] == "Finished")
            assert "log ends: again" in failed["message"]
            assert ("TrainingJob", JOB, "AttemptFailed") in rig.events()

    run_virtually(main())


def test_an_attempt_is_persisted_before_its_job_is_created() -> None:
    async def main() -> None:
        async with leading(policy=quick()) as rig:
            rig.offer()
            start_pod(rig.kube, await created(rig))
            end_pod(rig.kube, f"{JOB}-1-pod", 1)
            rig.kube.fail("status", JOBS_OF_TRAINING, GONE, times=3)
            await created(rig, 2)
            creation = rig.kube.asked("create", BATCH_JOBS)[-1].at
            written = [
                r.at
                for r in rig.kube.asked("status", JOBS_OF_TRAINING)
                if r.body and len(r.body["status"]["attempts"]) == 2
            ]
            assert min(written) < creation
            assert len(attempts(rig)) == 2

    run_virtually(main())


def test_a_log_that_cannot_be_read_does_not_stop_the_end() -> None:
    async def main() -> None:
        async with leading(policy=quick(maxAttempts=1)) as rig:
            rig.offer()
            start_pod(rig.kube, await created(rig))
            rig.kube.fail("log", PODS, GONE)
            end_pod(rig.kube, f"{JOB}-1-pod", 1)
            await rig.until(lambda: rig.finished() == "Failed")

    run_virtually(main())


def test_a_pod_that_never_starts_is_given_up_and_moves_to_a_node_with_room() -> None:
    async def main() -> None:
        async with leading(policy=quick(), nodes={"node-a": 1, "node-b": 8}) as rig:
            rig.offer()
            start_pod(rig.kube, await created(rig), phase="Pending")
            await rig.until(lambda: len(attempts(rig)) == 2, seconds=200)
            assert [a["assignments"][0]["nodeName"] for a in attempts(rig)] == ["node-a", "node-b"]
            assert rig.booked() == {"node-a": 1, "node-b": 1}, "the pod that is being deleted still holds its node"
            rig.kube.remove(PODS, f"{JOB}-1-pod")
            await rig.until(lambda: rig.booked() == {"node-b": 1})

    run_virtually(main())


def test_a_pod_that_never_starts_on_the_only_node_is_tried_there_again() -> None:
    async def main() -> None:
        async with leading(policy=quick(), nodes={"node-a": 1}) as rig:
            rig.offer()
            start_pod(rig.kube, await created(rig), phase="Pending")
            await rig.until(lambda: attempts(rig)[0].get("outcome") == "StartTimeout", seconds=200)
            await rig.quiet(20)
            assert len(attempts(rig)) == 1, "its pod still holds the GPU"
            rig.kube.remove(PODS, f"{JOB}-1-pod")
            await created(rig, 2)
            assert rig.booked() == {"node-a": 1}

    run_virtually(main())


def test_a_lost_nodes_gpus_are_not_handed_out_twice_and_its_job_moves() -> None:
    async def main() -> None:
        async with leading(policy=quick(nodeLostSeconds=30), nodes={"node-a": 2, "node-b": 4}) as rig:
            rig.offer(parameters=TWO_GPUS)
            start_pod(rig.kube, await created(rig))
            await rig.until(lambda: condition(rig, "Running") == ("True", "Running"))
            lost = {"type": "Ready", "status": "Unknown", "lastTransitionTime": "2026-01-31T12:00:01Z"}
            rig.kube.change(NODES, "node-a", {"status": {"conditions": [lost]}}, "")
            await rig.until(lambda: condition(rig, "Running") == ("Unknown", "NodeLost"))
            await created(rig, 2)
            assert attempts(rig)[1]["assignments"][0]["nodeName"] == "node-b"
            assert rig.booked() == {"node-a": 2, "node-b": 2}
            ready = {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-31T12:02:00Z"}
            rig.kube.change(NODES, "node-a", {"status": {"conditions": [ready]}}, "")
            rig.offer("b", parameters=TWO_GPUS)
            await rig.until(lambda: rig.verdict("b") == ADMITTED)
            assert rig.read("b")["status"]["admission"]["assignments"][0]["nodeName"] == "node-b"

    run_virtually(main())


def refuse_after_move(rig: Rig, times: int) -> None:
    """Let the writes fail that follow once the cycle has found a place."""
    take = rig.replica.jobs.take_move

    def take_and_fail(move: Move) -> None:
        rig.kube.fail("status", JOBS_OF_TRAINING, GONE, times=times)
        take(move)

    rig.replica.jobs.take_move = take_and_fail  # type: ignore[method-assign]


def test_the_place_of_a_moving_job_is_booked_before_its_attempt_is_written() -> None:
    async def main() -> None:
        async with leading(policy=quick(), nodes={"node-a": 1, "node-b": 1}) as rig:
            rig.offer()
            start_pod(rig.kube, await created(rig), phase="Pending")
            await rig.until(lambda: attempts(rig)[0].get("outcome") == "StartTimeout", seconds=200)
            refuse_after_move(rig, 4)
            await rig.until(lambda: rig.session.world.moved)
            rig.offer("rival", hours=0.1)
            await rig.until(lambda: rig.verdict("rival"))
            assert rig.verdict("rival") == FULL
            await created(rig, 2)
            assert rig.session.world.moved == {}
            assert max(rig.booked().values()) == 1

    run_virtually(main())


def test_a_cancelled_job_gives_up_the_place_that_was_found_for_it() -> None:
    async def main() -> None:
        async with leading(policy=quick(), nodes={"node-a": 1, "node-b": 1}) as rig:
            rig.offer()
            start_pod(rig.kube, await created(rig), phase="Pending")
            await rig.until(lambda: attempts(rig)[0].get("outcome") == "StartTimeout", seconds=200)
            refuse_after_move(rig, 2)
            await rig.until(lambda: rig.session.world.moved)
            rig.kube.change(OFFERS, "a", {"spec": {"active": False}})
            rig.kube.remove(PODS, f"{JOB}-1-pod")
            await rig.until(lambda: rig.finished() == "Cancelled")
            await rig.until(lambda: rig.booked() == {})

    run_virtually(main())


# What foreign data may say


def test_a_trainers_report_goes_into_the_status_and_a_hostile_one_harms_nobody() -> None:
    async def main() -> None:
        async with leading() as rig:
            rig.offer()
            start_pod(rig.kube, await created(rig))
            await rig.until(lambda: condition(rig, "Running") == ("True", "Running"))
            hostile = {
                "jobName": JOB,
                "state": "Training",
                "progressPercentage": 50,
                "lastUpdatedTime": "2026-01-31T12:00:30Z",
                "metrics": [{"name": "loss", "value": str(i)} for i in range(2000)],
            }
            rig.replica.jobs.reports[OfferKey("default", JOB)] = ProgressReport.model_validate(hostile)
            rig.session.want_job(OfferKey("default", JOB))
            await rig.until(
                lambda: (
                    rig.kube.get_now(JOBS_OF_TRAINING, JOB)["status"].get("trainerStatus", {}).get("progressPercentage")
                    == 50
                )
            )
            assert len(rig.kube.get_now(JOBS_OF_TRAINING, JOB)["status"]["trainerStatus"]["metrics"]) == 1

    run_virtually(main())


def test_one_job_that_cannot_be_rendered_does_not_stop_the_others() -> None:
    async def main() -> None:
        async with leading() as rig:
            odd = make_policy(name="odd", default=False)
            rig.kube.put(POLICIES, odd, uid="odd-uid")
            rig.offer("bad", policy="odd")
            world = rig.session.world
            await rig.until(lambda: rig.verdict("bad") == ADMITTED)
            entry = world.jobs_by_key.get(OfferKey("default", "bad-bad-uid"))
            await rig.until(lambda: world.jobs_by_key.get(OfferKey("default", "bad-bad-uid")) is not None)
            assert entry is None or entry.job is not None
            broken = rig.kube.get_now(JOBS_OF_TRAINING, "bad-bad-uid")
            rig.kube.change(JOBS_OF_TRAINING, "bad-bad-uid", {"spec": {"run": {"gpus": 3}}})
            rig.offer("a")
            await created(rig)
            assert broken["spec"]["run"]["gpus"] == 1
            assert not rig.task.done()

    run_virtually(main())


# Policies


def test_a_policys_status_is_written_when_something_changed_and_then_rests() -> None:
    async def main() -> None:
        async with leading() as rig:
            await rig.until(lambda: rig.kube.get_now(POLICIES, "lab", "").get("status"))
            await rig.quiet(30)
            rested = rig.kube.count("status", POLICIES)
            rig.kube.change(POLICIES, "lab", {"spec": {"filters": {"minScore": None, "maxConcurrentJobs": None}}}, "")
            await rig.until(lambda: rig.kube.get_now(POLICIES, "lab", "")["status"]["activeGeneration"] == 2)
            await rig.quiet(30)
            status = rig.kube.get_now(POLICIES, "lab", "")["status"]
            assert "minScore" not in status["activeSpec"]["filters"], "the removed bound is gone"
            assert rig.kube.count("status", POLICIES) == rested + 1

    run_virtually(main())


def test_an_invalid_change_of_a_policy_keeps_the_last_good_version_in_force() -> None:
    async def main() -> None:
        async with leading() as rig:
            await rig.until(lambda: rig.kube.get_now(POLICIES, "lab", "").get("status"))
            rig.kube.change(POLICIES, "lab", {"spec": {"scoring": {"terms": []}}}, "")
            rig.offer()
            await rig.until(lambda: rig.verdict() == ADMITTED)
            await created(rig)
            assert rig.read()["status"]["admission"]["policyRef"]["generation"] == 1
            await rig.until(lambda: ("CapacityPolicy", "lab", "InvalidPolicy") in rig.events())

    run_virtually(main())


@pytest.mark.parametrize("error", [GONE, ThrottledError(1)])
def test_a_policys_status_that_was_not_written_is_written_later(error: Exception) -> None:
    async def main() -> None:
        async with leading() as rig:
            rig.kube.fail("status", POLICIES, error)
            await rig.until(lambda: rig.kube.get_now(POLICIES, "lab", "").get("status"), seconds=10)

    run_virtually(main())
