"""What a policy may not say: each fault is met by a message that names the field and the remedy."""

from __future__ import annotations

import ast
import inspect
from types import ModuleType
from typing import Any

import pytest
from pydantic import ValidationError

from builders import make_policy
from taskoffer.api.v1alpha1 import capacitypolicy, queueing, scoring
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec

SMALL: dict[str, Any] = {
    "name": "S", "minParameters": 0, "maxParameters": 10, "gpus": 1, "sizeEfficiency": "1", "lora": {}, "train": {},
}  # fmt: skip
LARGE: dict[str, Any] = {**SMALL, "name": "L", "minParameters": 10, "maxParameters": None, "gpus": 2}
LANE: dict[str, Any] = {"name": "a", "gpus": 2, "rules": [{"sizeClasses": ["S"], "gpusPerTask": 1}]}
TASK: dict[str, Any] = {"name": "InstructText", "accepted": True, "weight": "1", "successRate": "1"}
WORTH: dict[str, Any] = {"terms": None, "expectedValue": {}}
TIMED: dict[str, Any] = {"gpuMemory": "80G", "duration": {}}


def term(name: str, *table: tuple[str | None, str], **fields: Any) -> dict[str, Any]:
    steps = [{"value": value, **({"below": below} if below else {})} for below, value in table]
    return {"terms": [{"name": name, "weight": "1", **({"table": steps} if steps else {}), **fields}]}


def expecting(**fields: Any) -> dict[str, Any]:
    return {"scoring": {"terms": None, "expectedValue": fields}, "estimation": TIMED}


def sized(*classes: dict[str, Any]) -> dict[str, Any]:
    return {"size_classes": list(classes), "lanes": []}


FAULTS: list[tuple[dict[str, Any], str]] = [
    (
        {"scoring": term("TaskWeight", (None, "1"))},
        "scoring.terms[TaskWeight].table: this term has no table; remove it",
    ),
    (
        {"scoring": term("TaskWeight", value="1")},
        "scoring.terms[TaskWeight].value: only Bonus and AccuracyBonus have one; remove it",
    ),
    ({"scoring": term("Bonus", (None, "1"), value="1")}, "scoring.terms[Bonus]: set either value or table"),
    (
        {"scoring": term("Bonus", ("4", "1"), ("2", "0.5"))},
        "scoring.terms[Bonus].table[].below must rise, and only the last may be absent",
    ),
    (
        {"scoring": term("Bonus", ("4", "1"), ("4", "0.5"))},
        "scoring.terms[Bonus].table[].below must rise",
    ),
    (
        {"scoring": term("Bonus", (None, "1"), ("2", "0.5"))},
        "scoring.terms[Bonus].table[].below must rise, and only the last may be absent",
    ),
    (
        {"scoring": term("SizeEfficiency", ("4", "1.5"))},
        "scoring.terms[SizeEfficiency].table: value 1.5 must be from 0 to 1",
    ),
    (
        expecting(minBillions="41"),
        "scoring.expectedValue: minBillions 41 is above maxBillions 40: lower the one or raise the other",
    ),
    (expecting(durationSpread="0"), "scoring.expectedValue.durationSpread 0 must be above 0 and at most 2"),
    (expecting(spareShare="1.5"), "scoring.expectedValue.spareShare 1.5 must be at most 1: 0.75 is three quarters"),
    (expecting(durationSpread="2.1"), "scoring.expectedValue.durationSpread 2.1 must be above 0 and at most 2"),
    (
        {"scoring": {"expectedValue": {}}, "estimation": TIMED},
        "scoring.terms and scoring.expectedValue: set exactly one of them",
    ),
    ({"scoring": {"terms": []}}, "scoring.terms and scoring.expectedValue: set exactly one of them"),
    (
        {"queue": {"priorities": ["low", "high", "low"]}},
        "queue.priorities names a class twice: name each once, from the lowest to the highest",
    ),
    (
        {"queue": {"priorities": ["low", "high"], "defaultPriority": "middle"}},
        "queue.defaultPriority middle is not one of priorities ['low', 'high']: name one of them or remove it",
    ),
    (
        {"preemption": {}},
        "preemption needs rules, gainFactor or both: set one, or remove preemption",
    ),
    (
        {"queue": {"priorities": ["low", "high"]}, "preemption": {"rules": [{"by": ["high"], "of": ["low", "high"]}]}},
        "preemption.rules: high is in both by and of: jobs of one priority would stop each other in turn",
    ),
    (
        {"queue": {"priorities": ["low"]}, "preemption": {"rules": [{"by": ["high"], "of": ["low"]}]}},
        "preemption.rules[0] names high, which is not one of queue.priorities ['low']: name one of them, or add it",
    ),
    (
        {"preemption": {"gainFactor": "1"}},
        "preemption.gainFactor needs scoring.expectedValue: set it, or use rules alone",
    ),
    (
        {"resources": [{"name": "nvidia.com/gpu", "counts": [1, 2], "unitsPerGpu": 4}]},
        "resources[nvidia.com/gpu].counts must be [1] with unitsPerGpu 4: several units can be parts of one GPU",
    ),
    (
        {"resources": [{"name": "nvidia.com/gpu", "counts": [1], "unitsPerGpu": 2, "deviceClassName": "gpu.x.com"}]},
        "resources[nvidia.com/gpu].deviceClassName pins whole GPUs and unitsPerGpu shares them out: remove one",
    ),
    (
        sized({**SMALL, "minParameters": 10}),
        "sizeClasses[S].maxParameters must be greater than minParameters: raise it or remove it",
    ),
    (
        sized(SMALL, {**LARGE, "minParameters": 9}),
        "sizeClasses[L] starts at 9, inside S: order the classes from small to large without overlap",
    ),
    (
        sized({**LARGE, "minParameters": 0}, {**SMALL, "minParameters": 5}),
        "sizeClasses[S] starts at 5, inside L: order the classes from small to large without overlap",
    ),
    (
        {**sized(SMALL), "lanes": [{**LANE, "rules": [{"sizeClasses": ["S", "M"], "gpusPerTask": 1}]}]},
        "lanes[a].rules[].sizeClasses: M is not one of sizeClasses: name one of ['S']",
    ),
    (
        {**sized(SMALL), "lanes": [{**LANE, "rules": [{"gpusPerTask": 4}]}]},
        "lanes[a] gives 4 GPUs per task but has only 2: raise gpus or lower gpusPerTask",
    ),
    (
        {**sized(SMALL), "lanes": [{**LANE, "borrowFrom": ["b"]}]},
        "lanes[a].borrowFrom names b: name another lane of the policy",
    ),
    (
        {**sized(SMALL), "lanes": [{**LANE, "borrowFrom": ["a"]}]},
        "lanes[a].borrowFrom names a: name another lane of the policy",
    ),
    (
        {"queue": {"priorities": ["low"]}, "namespaces": [{"name": "team", "highestPriority": "high"}]},
        "namespaces[team].highestPriority high is not one of queue.priorities ['low']: name one of them or remove it",
    ),
    (
        {"namespaces": [{"name": "team", "highestPriority": "high"}]},
        "namespaces[team].highestPriority high is not one of queue.priorities []",
    ),
    (
        {"gpu_choice": "MostValue"},
        "gpuChoice MostValue needs scoring.expectedValue: set it or choose FewestGpuHours",
    ),
    ({"scoring": WORTH}, "scoring.expectedValue needs predicted times: set estimation.duration"),
    (
        {"scoring": WORTH, "estimation": {"gpuMemory": "80G"}},
        "scoring.expectedValue needs predicted times: set estimation.duration",
    ),
    (
        {**sized({**SMALL, "lora": {"r": 40_000}}), "task_types": [{**TASK, "loraRankFactor": "2"}]},
        "taskTypes[InstructText] scales r of sizeClasses[S] to 80000, which must be at most 65536: change the factor",
    ),
    (
        {**sized({**SMALL, "lora": {"r": 1, "loraAlpha": 1_000_000}}), "task_types": [{**TASK, "loraRankFactor": "2"}]},
        "taskTypes[InstructText] scales loraAlpha of sizeClasses[S] to 2000000, which "
        "must be at most 1048576: change the factor",
    ),
    (
        {**sized(SMALL), "task_types": [{**TASK, "learningRateFactor": "0"}]},
        "taskTypes[InstructText] scales learningRate of sizeClasses[S] to 0.0, which "
        "must be above 0: change the factor",
    ),
    (
        {**sized({**SMALL, "gpus": 8})},
        "sizeClasses[S].gpus is 8, and resources[0].counts allows [1, 2, 4]: choose one of them or add it there",
    ),
]


def told(fields: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as fault:
        CapacityPolicySpec.model_validate(make_policy(**fields)["spec"])
    return str(fault.value)


@pytest.mark.parametrize(("fields", "message"), FAULTS, ids=[message[:60] for _, message in FAULTS])
def test_a_fault_is_told_with_its_field_and_its_remedy(fields: dict[str, Any], message: str) -> None:
    assert f"Value error, {message}" in told(fields)


def fragments(module: ModuleType) -> list[list[str]]:
    """Return the constant parts of every message that a module raises a ValueError with."""
    found = []
    for raised in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(raised, ast.Raise) and isinstance(raised.exc, ast.Call):
            parts = [part.value for part in ast.walk(raised.exc) if isinstance(part, ast.Constant)]
            found.append([part for part in parts if isinstance(part, str) and len(part) > 8])
    return found


@pytest.mark.parametrize("module", [scoring, queueing, capacitypolicy], ids=lambda module: module.__name__)
def test_no_fault_is_left_out_of_the_table(module: ModuleType) -> None:
    reached = [told(fields) for fields, _ in FAULTS]
    raised = fragments(module)
    assert raised
    for parts in raised:
        assert any(all(part in message for part in parts) for message in reached), parts
