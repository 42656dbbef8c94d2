"""The smallest objects that once stopped the operator, or kept it from answering: each is met in its own way now."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from builders import (
    make_admission,
    make_condition,
    make_job,
    make_node,
    make_offer,
    make_pod,
    make_policy,
    make_training_job,
    merged,
    stored,
)
from core_builders import FOUR_GPUS, NOW, ONE_GPU, policy_spec, spec_of
from fake_kube import FakeKube, refused
from fake_replica import Rig, leading
from taskoffer.adapters.kube import BATCH_JOBS, EVENTS, JOBS_OF_TRAINING, NODES, OFFERS, PODS, POLICIES
from taskoffer.api.quantity import whole
from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec, CapacityPolicyStatus
from taskoffer.api.v1alpha1.meta import Condition
from taskoffer.api.v1alpha1.trainingjob import Attempt, TrainingJob
from taskoffer.decision.conditions import set_condition
from taskoffer.decision.evaluate import evaluate
from taskoffer.decision.moments import later
from taskoffer.decision.own_trainer import training_seconds
from taskoffer.reconcile.views import OfferState, offer_entry, policy_entry, training_job_entry
from taskoffer.render.job import attempt_job
from virtual_time import run_virtually, virtual_time

__all__ = ["virtual_time"]

ADMITTED = ("True", "Admitted")
OUT_OF_TIME = ("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-12:00")

# What cannot be read


@pytest.mark.parametrize("moment", OUT_OF_TIME)
@pytest.mark.parametrize("field", ["deadline", "expiresAt"])
def test_a_time_that_utc_cannot_express_makes_an_offer_invalid(field: str, moment: str) -> None:
    view = offer_entry(stored(make_offer(spec={field: moment}))).read_view()
    assert view.invalid == f"{field}: lies outside of the years 1 to 9999 once it is turned into UTC"


@pytest.mark.parametrize("status", ["x", ["x"], 7, {"conditions": 7}, {"conditions": [{"type": []}]}])
def test_a_status_of_any_shape_leaves_an_offer_to_be_decided(status: Any) -> None:
    entry = offer_entry({**stored(make_offer()), "status": status})
    assert entry.state is OfferState.PENDING
    assert entry.read_view().spec is not None
    assert entry.conditions() == ()


@pytest.mark.parametrize("spec", ["x", ["x"], 7])
def test_a_spec_of_any_shape_makes_an_offer_invalid(spec: Any) -> None:
    assert "taskID: is missing: set it" in (
        offer_entry({**stored(make_offer()), "spec": spec}).read_view().invalid or ""
    )


def test_of_the_conditions_the_readable_ones_count() -> None:
    good = make_condition("Evicted", True, "Overbooked")
    status = {"conditions": [17, {"type": "Admitted"}, good]}
    conditions = offer_entry(stored(make_offer(status=status))).conditions()
    assert [c.type for c in conditions] == ["Evicted"]


def test_what_is_said_of_an_unknown_field_is_short_however_long_its_name_is() -> None:
    invalid = offer_entry(stored(make_offer(spec={"x" * 100_000: 1}))).read_view().invalid
    assert invalid is not None
    assert len(invalid) < 700


@pytest.mark.parametrize("generation", ["x", -1, None, [], True])
def test_an_unreadable_active_generation_is_the_stored_one(generation: Any) -> None:
    status = {"activeSpec": make_policy()["spec"], "activeGeneration": generation}
    view = policy_entry(stored(make_policy(scoring={"terms": []}, status=status), generation=5)).view
    assert view.ref.generation == 5


@pytest.mark.parametrize(
    ("quantity", "number"),
    [("8", 8), ("1k", 1000), ("2M", 2_000_000), ("1Ki", 1024), ("500m", 0), ("²", 0), ("-1", 0), ("9" * 5000, 0)],
)
def test_whole_quantities_are_read_in_the_form_in_which_the_server_keeps_them(quantity: str, number: int) -> None:
    assert whole(quantity) == number


# What could not be written


def _conditions(*kinds: str) -> tuple[Condition, ...]:
    return tuple(Condition.model_validate(make_condition(kind, True, "Other")) for kind in kinds)


def test_conditions_of_others_give_way_where_the_list_is_full() -> None:
    full = _conditions("Admitted", *(f"Foreign{number}" for number in range(15)))
    made = set_condition(full, "Finished", True, Reason.REJECTED, "m", now=NOW, generation=1)
    assert [c.type for c in made] == ["Admitted", *(f"Foreign{number}" for number in range(1, 15)), "Finished"]


def test_a_condition_that_is_there_twice_is_written_once() -> None:
    made = set_condition(_conditions("Ready", "Ready"), "Linted", True, Reason.NO_FINDINGS, "m", now=NOW, generation=1)
    assert [c.type for c in made] == ["Ready", "Linted"]


def test_a_score_is_never_more_than_a_status_can_hold() -> None:
    terms = [{"name": "Bonus", "weight": "99999999", "value": "99999999"}]
    made = evaluate(spec_of(parameters=ONE_GPU), policy_spec(scoring={"terms": terms, "cap": None}))
    assert made.score is not None
    assert made.score.total == Decimal("99999999.9999")
    assert sum(Decimal(term.value) for term in made.score.terms) == made.score.total
    assert made.score.terms[-1].message == "no score can be above 99999999.9999"


@pytest.mark.parametrize(
    ("factor", "what"),
    [({"loraRankFactor": "99999999"}, "scales r of"), ({"learningRateFactor": "0"}, "scales learningRate of")],
)
def test_a_policy_whose_factors_lead_to_impossible_settings_is_invalid(factor: dict[str, str], what: str) -> None:
    spec = make_policy()["spec"]
    spec["taskTypes"][0] |= factor
    with pytest.raises(ValueError, match=f"taskTypes.*{what} sizeClasses.*: change the factor"):
        CapacityPolicySpec.model_validate(spec)


def test_a_time_never_ends_after_the_last_year() -> None:
    last = datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)
    assert later(NOW, 2**63 - 1) == later(last, 1) == last


def test_a_job_gets_no_deadline_that_overflows() -> None:
    job = TrainingJob.model_validate(stored(make_training_job()))
    assignments = make_admission()["assignments"]
    made = {"jobName": "a-1", "createdAt": "2026-01-31T12:00:00Z", "deadline": "9999-12-31T00:00:00Z"}
    attempt = Attempt.model_validate({**made, "assignments": assignments})
    seconds = training_seconds(job.spec.run, attempt, NOW)
    assert attempt_job(job, attempt, 1, seconds)["spec"]["activeDeadlineSeconds"] == 2**31 - 1


def test_a_training_job_whose_pods_would_be_charged_to_another_offer_is_not_followed() -> None:
    raw = stored(make_training_job(offer_uid="mine"))
    raw["metadata"]["ownerReferences"] = [{"kind": "TaskOffer", "uid": "another", "controller": True}]
    entry = training_job_entry(raw)
    assert (entry.job, entry.problem) == (None, "spec.offerRef.uid: mine is not the owner's, another")


# What is left of it in the ledger


def _held(name: str, **admission: Any) -> dict[str, Any]:
    """Return an offer whose admission was stored by somebody."""
    admission = merged(make_admission(job=f"{name}-{name}-uid"[:10], policy_uid="lab-uid", gpus=4), admission)
    status = {"admission": admission, "conditions": [make_condition("Admitted", True, "Admitted")]}
    return make_offer(name=name, parameters=FOUR_GPUS, status=status)


def test_an_admission_that_cannot_be_read_books_what_can_be_read_of_it() -> None:
    entry = offer_entry(stored(_held("a", policyRef={"generation": "x"}), uid="a-uid"))
    assert (entry.state, entry.admission) == (OfferState.HOLDING, None)
    assert "policyRef.generation" in (entry.admission_problem or "")
    assert [(a.node_name, a.count) for a in entry.booked] == [("node-a", 4)]


def test_assignments_that_are_repeated_book_a_node_once() -> None:
    raw = stored(_held("a"), uid="a-uid")
    raw["status"]["admission"]["assignments"] *= 20
    assert [(a.node_name, a.count) for a in offer_entry(raw).booked] == [("node-a", 4)]


pytest_virtual = pytest.mark.usefixtures("virtual_time")
BROKEN_ADMISSIONS: dict[str, Any] = {
    "text": "everything",
    "list": [17],
    "unreadable": {"jobName": "a-a-uid", "assignments": [{"nodeName": "node-a"}]},
    "another's job": make_admission(job="b-b-uid", policy_uid="lab-uid"),
}


@pytest_virtual
@pytest.mark.parametrize("admission", BROKEN_ADMISSIONS.values(), ids=BROKEN_ADMISSIONS)
def test_an_offer_whose_admission_cannot_be_read_is_told_so_and_decided_anew(admission: Any) -> None:
    async def main() -> None:
        kube = FakeKube()
        kube.put(OFFERS, make_offer(name="a", parameters=ONE_GPU, status={"admission": admission}), uid="a-uid")
        async with leading(kube) as rig:
            rig.offer("b")
            await rig.until(lambda: rig.verdict("a") == rig.verdict("b") == ADMITTED)
            await rig.until(lambda: len(kube.all(BATCH_JOBS)) == 2)
            told = [e["message"] for e in kube.all(EVENTS) if e["reason"] == "InvalidOffer"]
            assert len(told) == 1
            assert told[0].startswith("the stored admission cannot be read: ")
            assert rig.read("a")["status"]["admission"]["jobName"] == "a-a-uid"
            assert kube.count("status", OFFERS, "a") == 2
            assert rig.booked() == {"node-a": 2}

    run_virtually(main())


@pytest_virtual
def test_gpus_of_an_unreadable_admission_are_not_given_away_while_its_job_is_there() -> None:
    async def main() -> None:
        async with leading(nodes={"node-a": 4}) as rig:
            rig.offer("a", parameters=FOUR_GPUS)
            await rig.until(lambda: bool(rig.kube.all(BATCH_JOBS)))
            rig.kube.change(OFFERS, "a", {"status": {"admission": {"decidedAt": "yesterday"}}})
            rig.offer("b")
            await rig.until(lambda: rig.verdict("b") == ("False", "WaitingForCapacity"))
            await rig.quiet(30)
            assert rig.booked() == {"node-a": 4}
            assert rig.verdict("b") == ("False", "WaitingForCapacity")

    run_virtually(main())


@pytest_virtual
def test_an_admission_that_cannot_be_taken_back_says_what_is_in_the_way_until_that_has_ended() -> None:
    async def main() -> None:
        kube = FakeKube()
        kube.put(OFFERS, make_offer(name="a", parameters=ONE_GPU, status={"admission": "lost"}), uid="a-uid")
        kube.put(BATCH_JOBS, make_job(training_job="a-a-uid", offer_uid="a-uid"))
        async with leading(kube) as rig:
            await rig.quiet(60)
            told = [e["message"] for e in kube.all(EVENTS) if e["reason"] == "InvalidOffer"]
            assert len(told) == 1
            assert "not taken back while Job a-a-uid-1 may use its GPUs: remove what is left" in told[0]
            assert rig.booked() == {"node-a": 1}
            kube.change(BATCH_JOBS, "a-a-uid-1", {"status": {"conditions": [{"type": "Failed", "status": "True"}]}})
            await rig.until(lambda: rig.verdict("a") == ADMITTED)

    run_virtually(main())


@pytest_virtual
def test_a_job_without_an_attempt_whose_place_cannot_be_read_ends_and_says_why() -> None:
    async def main() -> None:
        kube = FakeKube()
        kube.put(OFFERS, make_offer(name="a", parameters=ONE_GPU, status={"admission": "lost"}), uid="a-uid")
        made = make_training_job(name="a-a-uid", offer="a", offer_uid="a-uid")
        owner = {"apiVersion": "taskoffer.dev/v1alpha1", "kind": "TaskOffer", "name": "a", "uid": "a-uid"}
        kube.put(JOBS_OF_TRAINING, made, ownerReferences=[owner | {"controller": True}])
        async with leading(kube) as rig:
            await rig.until(lambda: rig.finished("a") == "Failed")
            failed = [c for c in rig.read("a")["status"]["conditions"] if c["type"] == "Finished"]
            assert "the offer's admission cannot be read" in failed[0]["message"]
            assert rig.booked() == {}

    run_virtually(main())


@pytest_virtual
def test_an_unreadable_training_job_is_reported_once_on_it_and_on_its_offer() -> None:
    async def main() -> None:
        async with leading(resync=5) as rig:
            rig.offer("a")
            await rig.until(lambda: bool(rig.kube.all(BATCH_JOBS)))
            name = rig.read("a")["status"]["admission"]["jobName"]
            rig.kube.change(JOBS_OF_TRAINING, name, {"status": {"attempts": "many"}})
            await rig.quiet(30)
            told = sorted(event for event in rig.events() if event[2] == "InvalidJob")
            assert told == [("TaskOffer", "a", "InvalidJob"), ("TrainingJob", name, "InvalidJob")]

    run_virtually(main())


@pytest_virtual
def test_an_admission_that_the_policy_would_not_give_is_taken_back() -> None:
    async def main() -> None:
        kube = FakeKube()
        status = {"admission": make_admission(job="a-a-uid", policy_uid="lab-uid")}
        kube.put(OFFERS, make_offer(name="a", model="unknown/size", status=status), uid="a-uid")
        async with leading(kube) as rig:
            await rig.until(lambda: rig.finished("a") == "Rejected")
            assert rig.booked() == {}

    run_virtually(main())


@pytest_virtual
def test_a_name_that_leaves_no_room_for_those_of_jobs_is_refused() -> None:
    async def main() -> None:
        async with leading() as rig:
            name = "n" * 250
            rig.offer(name)
            rig.offer("b")
            await rig.until(lambda: rig.verdict("b") == ADMITTED)
            assert rig.verdict(name) == ("False", "InvalidOffer")
            message = rig.read(name)["status"]["conditions"][0]["message"]
            assert "metadata.name has 250 characters, at most 45 leave room for Jobs" in message

    run_virtually(main())


@pytest_virtual
@pytest.mark.parametrize("admission", [None, "lost"], ids=["answer", "taking back"])
def test_of_an_offer_whose_status_the_server_refuses_an_event_tells_the_answer_once(admission: str | None) -> None:
    async def main() -> None:
        kube = FakeKube()
        status = None if admission is None else {"admission": admission}
        kube.put(OFFERS, make_offer(name="a", parameters=ONE_GPU, status=status), uid="a-uid")
        kube.fail("status", OFFERS, refused(), name="a", times=1000)
        async with leading(kube, resync=20) as rig:
            rig.offer("b")
            await rig.until(lambda: rig.verdict("b") == ADMITTED)
            await rig.quiet(90)
            told = [e for e in kube.all(EVENTS) if e["involvedObject"]["name"] == "a"]
            assert [e["reason"] for e in told] == ["Admitted" if admission is None else "InvalidOffer"]
            assert "but the API server does not store it: 422 Invalid" in told[0]["message"]
            assert kube.count("status", OFFERS, "a") <= 6

    run_virtually(main())


@pytest_virtual
def test_a_policys_status_that_the_server_refuses_is_told_in_an_event_and_not_sent_again_and_again() -> None:
    async def main() -> None:
        kube = FakeKube()
        kube.fail("status", POLICIES, refused(), times=1000)
        async with leading(kube, nodes={"node-a": 8}, resync=5) as rig:
            for number in range(10):
                rig.offer(f"a-{number}")
                await rig.quiet(5)
            assert kube.count("status", POLICIES) == 1
            assert [e for e in rig.events() if e[0] == "CapacityPolicy"] == [("CapacityPolicy", "lab", "InvalidPolicy")]

    run_virtually(main())


# Policies


@pytest_virtual
def test_a_policy_whose_conditions_are_full_gets_its_status_all_the_same() -> None:
    async def main() -> None:
        conditions = [make_condition(f"Foreign{number}", True, "Other") for number in range(16)]
        async with leading(policy=make_policy(status={"conditions": conditions})) as rig:
            await rig.until(lambda: _ready(rig, "lab") == "Ready")
            status = CapacityPolicyStatus.model_validate(rig.kube.get_now(POLICIES, "lab")["status"])
            assert len(status.conditions) == 16

    run_virtually(main())


@pytest_virtual
def test_a_policy_for_another_resource_than_the_oldest_policys_is_told_so_and_changes_nothing() -> None:
    async def main() -> None:
        kube = FakeKube()
        other = [{"name": "example.com/fpga", "counts": [1, 2, 4, 8]}]
        later_one = make_policy(name="a-other", default=False, resources=other)
        kube.put(POLICIES, later_one, uid="other-uid", creationTimestamp="2026-01-31T12:00:10Z")
        kube.put(POLICIES, make_policy(), uid="lab-uid", creationTimestamp="2026-01-31T12:00:05Z")
        kube.put(NODES, make_node(gpus=2))
        kube.put(PODS, make_pod("foreign", gpus=1))
        async with leading(kube) as rig:
            rig.offer("b", policy="a-other")
            rig.offer("a")
            await rig.until(lambda: rig.verdict("a") == ADMITTED)
            await rig.until(lambda: _ready(rig, "a-other") == "InvalidPolicy")
            assert rig.verdict("b") == ("False", "PolicyNotReady")
            assert rig.booked() == {"node-a": 2}
            message = rig.kube.get_now(POLICIES, "a-other")["status"]["conditions"][0]["message"]
            assert "example.com/fpga is not nvidia.com/gpu, which this cluster hands out (by lab)" in message

    run_virtually(main())


def _ready(rig: Rig, name: str) -> str | None:
    conditions = rig.kube.get_now(POLICIES, name).get("status", {}).get("conditions", [])
    return next((c["reason"] for c in conditions if c["type"] == "Ready"), None)
