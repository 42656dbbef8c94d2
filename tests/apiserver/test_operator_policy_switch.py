"""The policy changes while jobs run: they are left alone, their GPUs stay booked, and who waits is decided anew."""

from __future__ import annotations

from typing import Any

import pytest

from operator_bench import GROUP, Bench, condition
from operator_process import OperatorProcess
from taskoffer import presets
from taskoffer_lab.api_client import MERGE_PATCH

pytestmark = pytest.mark.usefixtures("operator")

H100 = {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
DEFAULT = "taskoffer.dev/is-default-policy"
GPUS = 8
BILLION = 10**9
TEXT = ["InstructText", "GRPO"]


def offer(bench: Bench, name: str, billions: float, **fields: Any) -> None:
    """Create an offer that names no policy, of a Llama of this size."""
    fields.setdefault("hours", 6)
    gpus = fields.pop("gpus", None)
    spec = {"policyName": None, "gpuCount": gpus}
    bench.create(bench.make_offer(name, model="x/llama", parameters=int(billions * BILLION), spec=spec, **fields))


def running(bench: Bench, name: str, billions: float, gpus: int, lane: str | None = None) -> str:
    """Create an offer, check with what it is admitted, let its container run, and return its pod."""
    offer(bench, name, billions)
    admitted_with(bench, name, gpus, lane)
    return bench.run(name)


def admitted_with(bench: Bench, name: str, gpus: int, lane: str | None = None) -> None:
    """Wait until an offer is admitted under the bench's present policy; check its GPUs and its lane."""
    made = bench.decided(name, "Admitted")["status"]["admission"]
    policy = bench.get_policy()["metadata"]
    assert made["policyRef"] == {key: policy[key] for key in ("name", "uid", "generation")}
    assert [(a["count"], a.get("lane")) for a in made["assignments"]] == [(gpus, lane)]


def set_default(bench: Bench, policy: str, value: str | None) -> None:
    """Annotate a policy as the default one, or not."""
    path = f"{GROUP}/capacitypolicies/{policy}"
    bench.api.request("PATCH", path, {"metadata": {"annotations": {DEFAULT: value}}}, MERGE_PATCH)


def change(bench: Bench, spec: dict[str, Any]) -> None:
    """Change the bench's present policy and wait until the operator has taken it up."""
    bench.patch_policy(spec)
    bench.policy_condition("Ready", "Ready")


def admissions(bench: Bench, *names: str) -> list[dict[str, Any]]:
    """Return what was decided once and for all about offers."""
    return [bench.get(name)["status"]["admission"] for name in names]


def runs_on(bench: Bench, *pods: str) -> None:
    """Check that pods run and that nobody has asked them to go."""
    for name in pods:
        pod = bench.api.request("GET", bench.path("pods", name, api="/api/v1"))
        assert pod["status"]["phase"] == "Running"
        assert "deletionTimestamp" not in pod["metadata"]


def lane(name: str, gpus: int, *classes: str) -> dict[str, Any]:
    """Return a lane for text models, two GPUs for a task."""
    return {
        "name": name,
        "gpus": gpus,
        "rules": [{"taskTypes": TEXT, "sizeClasses": list(classes), "gpusPerTask": 2}],
    }


def test_another_default_policy_decides_who_waits_and_running_jobs_outlive_their_policy(
    bench: Bench, operator: OperatorProcess
) -> None:
    node = bench.node(gpus=GPUS, labels=H100)
    bench.preset("market-table", attempts={"backoffSeconds": 0})
    old = bench.policy_name
    two = running(bench, "two", 8, 2)
    four = running(bench, "four", 14, 4)
    one = running(bench, "one", 1, 1)
    before = admissions(bench, "two", "four", "one")
    # One GPU is left, and none of these can do with it.
    offer(bench, "long", 8, hours=30)
    offer(bench, "later", 14)
    offer(bench, "urgent", 8, priority_class="organic")
    for name in ("long", "later", "urgent"):
        bench.decided(name, "WaitingForCapacity")

    # The first strategy document takes over: 20 hours at most, two GPUs for each task, lanes.
    bench.preset("strategy-8xh100")
    set_default(bench, old, None)
    bench.decided("long", "TimeLimitTooLong")
    bench.booked(node, 7)
    # Then the old policy forbids what runs under it, and is removed.
    new, bench.policy_name = bench.policy_name, old
    stricter = {"minScore": "0.99", "maxTimeLimitSeconds": 3600, "maxConcurrentJobs": 1}
    fewer = [{"name": "nvidia.com/gpu", "counts": [1]}]
    classes = [{**one, "gpus": 1} for one in bench.get_policy()["spec"]["sizeClasses"]]
    change(bench, {"filters": stricter, "resources": fewer, "sizeClasses": classes})
    runs_on(bench, two, four, one)
    path, bench.policy_name = f"{GROUP}/capacitypolicies/{old}", new
    bench.api.request("DELETE", path)
    bench.gone(path)
    offer(bench, "hopeless", 8, hours=20)
    bench.decided("hopeless", "TimeLimitTooLong")
    runs_on(bench, two, four, one)
    assert admissions(bench, "two", "four", "one") == before

    # A restart finds the jobs of a policy that is no more, and books them all the same.
    with bench.audit.excused():
        assert operator.terminate() == 0
        operator.start()
    offer(bench, "small", 1)
    bench.decided("small", "WaitingForCapacity")
    bench.booked(node, 7)

    # Room comes bit by bit, and goes in the new policy's order to its lanes.
    bench.end(one)
    bench.finished("one", "Succeeded")
    admitted_with(bench, "urgent", 2, "medium-text")
    urgent = bench.run("urgent")
    bench.booked(node, GPUS)
    for name in ("later", "small"):
        assert condition(bench.get(name), "Admitted")["reason"] == "WaitingForCapacity"
    # A job tries again with the settings of its own policy, in its own place.
    bench.end(two, 1, "boom")
    again = bench.run("two", attempt=2)
    runs_on(bench, four, urgent, again)
    bench.end(four)
    admitted_with(bench, "later", 2, "large-text")
    admitted_with(bench, "small", 2, "small-text")
    bench.booked(node, GPUS)
    for name, pod in {"two": again, "urgent": urgent, "later": bench.run("later"), "small": bench.run("small")}.items():
        bench.end(pod)
        bench.finished(name, "Succeeded")
    bench.booked(node, 0)
    assert bench.audit.check() == []


def test_a_stricter_spec_and_other_lanes_bind_who_waits_and_not_who_runs(bench: Bench) -> None:
    node = bench.node(gpus=GPUS, labels=H100)
    bench.preset("strategy-8xh100")
    own = running(bench, "own", 1, 2, "small-text")
    borrowed = running(bench, "borrowed", 1, 2, "medium-text")
    large = running(bench, "large", 14, 2, "large-text")
    before = admissions(bench, "own", "borrowed", "large")

    # Two lanes of four instead of four of two: what runs in a lane that is no more holds its node's GPUs only.
    change(bench, {"lanes": [lane("small-text", 4, "Small"), lane("others", 4, "Medium", "Large", "XLarge")]})
    last = running(bench, "last", 8, 2, "others")
    bench.booked(node, GPUS)
    offer(bench, "no-node", 8)
    bench.decided("no-node", "WaitingForCapacity")
    bench.end(borrowed)
    bench.finished("borrowed", "Succeeded")
    admitted_with(bench, "no-node", 2, "others")
    second = bench.run("no-node")
    offer(bench, "no-lane", 8)
    bench.decided("no-lane", "WaitingForLane")

    # Fewer jobs at a time than run already, and no lanes: nobody is sent away, and nobody comes in either.
    change(bench, {"lanes": None, "filters": {"maxConcurrentJobs": 2}})
    bench.decided("no-lane", "WaitingForJobSlot")
    bench.end(large)
    bench.finished("large", "Succeeded")
    bench.booked(node, 6)
    assert condition(bench.get("no-lane"), "Admitted")["reason"] == "WaitingForJobSlot"
    # Now whoever waits is refused: for its GPUs, its hours, its score.
    offer(bench, "one-gpu", 8, gpus=1)
    bench.decided("one-gpu", "WaitingForJobSlot")
    counts = [{"name": "nvidia.com/gpu", "counts": [2]}]
    change(bench, {"resources": counts, "filters": {"minScore": "0.9", "maxTimeLimitSeconds": 3600}})
    for name, also in (("no-lane", set()), ("one-gpu", {"GpuCountNotAllowed"})):
        refused = bench.decided(name, "TimeLimitTooLong")
        named = {i["name"] for i in refused["status"]["explanation"] if i["type"] == "Constraint"}
        assert named == {"TimeLimitTooLong", "ScoreTooLow", *also}

    runs_on(bench, own, last, second)
    assert admissions(bench, "own", "borrowed", "large") == before
    for name, pod in {"own": own, "last": last, "no-node": second}.items():
        bench.end(pod)
        bench.finished(name, "Succeeded")
    bench.booked(node, 0)
    assert bench.audit.check() == []


TAKES = {
    "balanced-4": 2,
    "expected-value": 1,
    "lab": 1,
    "market-table": 1,
    "sound": 1,
    "strategy-8xh100": 2,
    "strategy-maximum-accuracy": None,
}
"""The GPUs that each preset gives to a tiny model, one policy after the other; for the four of the last is no room."""


def test_every_preset_takes_over_from_the_one_before_it_while_that_ones_job_runs(bench: Bench) -> None:
    node = bench.node(gpus=GPUS, labels=H100)
    pods: dict[str, str] = {}
    booked, old = 0, None
    assert sorted(TAKES) == presets.names()
    for preset, gpus in TAKES.items():
        bench.preset(preset)
        if old is not None:
            bench.api.request("DELETE", f"{GROUP}/capacitypolicies/{old}")
        old = bench.policy_name
        offer(bench, preset, 0.0005)
        if gpus is None:
            bench.decided(preset, "CapacityFull")
            continue
        admitted_with(bench, preset, gpus, "small-text" if preset == "strategy-8xh100" else None)
        pods[preset] = bench.run(preset)
        booked += gpus
    bench.booked(node, booked)
    runs_on(bench, *pods.values())
    for name, pod in pods.items():
        bench.end(pod)
        bench.finished(name, "Succeeded")
    bench.booked(node, 0)
    assert bench.audit.check() == []
