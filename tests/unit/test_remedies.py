"""Remedies: what a refusal says would have changed the answer does change it."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from core_builders import at, decide, offer, policy, policy_spec, spec_of
from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec
from taskoffer.api.v1alpha1.taskoffer import TaskOfferSpec
from taskoffer.decision.evaluate import evaluate
from taskoffer.decision.remedies import told
from taskoffer.decision.verdict import Refusal, Remedy

LLAMA_8B: dict[str, Any] = {"model": "x/llama-8b", "parameters": 8_030_000_000}
_CHANGES = {"gpuCount": "gpu_count", "timeLimitSeconds": "time_limit_seconds"}
_ADVICE = re.compile(r"(gpuCount|timeLimitSeconds) (below )?(?:of at least )?(\d+)")


def remedies(spec: TaskOfferSpec, under: CapacityPolicySpec, namespace: str = "default") -> dict[str, str]:
    """Return the counterfactuals of all refusals by reason."""
    return {one.reason.value: one.counterfactual for one in evaluate(spec, under, namespace).refusals}


def test_with_several_refusals_each_remedy_is_told_and_none_as_if_it_sufficed() -> None:
    answer = decide(offer(task_type="DPO", hours=25, **LLAMA_8B), policies=[policy(preset="strategy-8xh100")]).answer
    said = [(item.name, item.message) for item in answer.explanation if item.type == "Counterfactual"]
    assert said == [
        ("TaskTypeNotAccepted", "this filter passes with taskType InstructText or GRPO or Image"),
        ("TimeLimitTooLong", "this filter passes with timeLimitSeconds below 72000"),
    ]


def test_a_remedy_that_another_filter_refuses_names_that_filter() -> None:
    under = policy_spec(preset="balanced-4")
    spec = spec_of(task_type="DPO", model="x/gemma-7b", parameters=8_500_000_000, rows=480_000, hours=1)
    assert remedies(spec, under) == {
        "CannotFinishInTime": "this filter passes with timeLimitSeconds of at least 56490, but then ScoreTooLow: "
        "score 0.5998 does not exceed the policy's 0.60"
    }


def test_counts_of_gpus_are_proposed_up_to_the_namespaces_quota_only() -> None:
    under = policy_spec(preset="market-table", namespaces=[{"name": "default", "gpus": 2}])
    spec = spec_of(**LLAMA_8B, rows=300_000, hours=2)
    assert remedies(spec, under) == {"CannotFinishInTime": "accepted with timeLimitSeconds of at least 9369"}
    assert "accepted with gpuCount 4 or timeLimitSeconds" in remedies(spec, under, "another")["CannotFinishInTime"]
    assert remedies(spec_of(**LLAMA_8B, rows=10, hours=2, gpus=4), under) == {
        "GpuCountNotAllowed": "accepted with gpuCount 2 or gpuCount 1; this filter passes once "
        "namespaces[default].gpus is raised"
    }


def test_an_offer_with_a_deadline_of_its_own_is_not_told_that_more_time_suffices() -> None:
    spec = spec_of(**LLAMA_8B, rows=300_000, hours=2, spec={"deadline": at(7200).isoformat()})
    said = remedies(spec, policy_spec(preset="market-table"))["CannotFinishInTime"]
    assert said == "this filter passes with gpuCount 4 or timeLimitSeconds of at least 9369"


@pytest.mark.parametrize("preset", ["strategy-8xh100", "balanced-4", "market-table", "expected-value", "lab"])
def test_whatever_is_said_to_be_accepted_is_accepted(preset: str) -> None:
    under = policy_spec(preset=preset, namespaces=[{"name": "small", "gpus": 2}])
    tasks, hours, rows, gpus = ("InstructText", "DPO", "GRPO"), (1, 4, 25), (20_000, 480_000), (None, 4, 8)
    sizes = (1_000_000_000, 8_500_000_000, 70_000_000_000)
    checked = 0
    for task, hour, row, count, size in itertools.product(tasks, hours, rows, gpus, sizes):
        spec = spec_of(task_type=task, hours=hour, rows=row, gpus=count, parameters=size, model="x/gemma")
        for said, namespace in ((text, n) for n in ("", "small") for text in remedies(spec, under, n).values()):
            accepted = said.partition(";")[0] if said.startswith("accepted ") else ""
            for field, below, number in re.findall(
                r"(gpuCount|timeLimitSeconds) (below )?(?:of at least )?(\d+)", accepted
            ):
                changed = spec.model_copy(update={_CHANGES[field]: int(number) - bool(below)})
                assert evaluate(changed, under, namespace).refusals == (), said
                checked += 1
    assert checked > 0


def test_an_offer_is_looked_at_again_once_for_each_remedy_of_an_only_refusal() -> None:
    looked: list[int | None] = []

    def again(spec: TaskOfferSpec) -> list[Refusal]:
        looked.append(spec.gpu_count)
        return []

    counts = tuple(Remedy(f"with gpuCount {n}", {"gpu_count": n}) for n in (1, 2))
    refusal = Refusal(Reason.GPU_COUNT_NOT_ALLOWED, "no", remedies=counts)
    assert told([refusal], spec_of(), again)[0].counterfactual == "accepted with gpuCount 1 or gpuCount 2"
    assert looked == [1, 2]
    told([refusal, refusal], spec_of(), again)
    assert looked == [1, 2]
