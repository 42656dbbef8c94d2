"""Traces: what a file says and what is wrong with it, and the market that they are drawn from."""

from __future__ import annotations

import io
import json
import math
import statistics
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from builders import make_offer, stored
from core_builders import policy_spec
from simulation_builders import entry, run_of, trace_of
from taskoffer.api.reasons import Reason
from taskoffer.api.tasks import TaskType
from taskoffer.decision.evaluate import evaluate
from taskoffer.simulation.market import Market, generate, market_gpus, offered_load, time_limit, worth_of
from taskoffer.simulation.trace import Header, Trace, TraceError, lines_of, read_trace, write_trace
from taskoffer.simulation.truth import REFERENCE_SETTINGS, course_of, duration_of, expiry_of

HEADER = {"trace": {}}


def line(**fields: Any) -> dict[str, Any]:
    """Return one offer's line; ``offer`` holds keywords of ``make_offer``."""
    offer = make_offer(**{"rows": 100, **fields.pop("offer", {})})
    return {"at": 0, "offer": offer, **fields}


def read(*lines: dict[str, Any] | str) -> Trace:
    return read_trace([each if isinstance(each, str) else json.dumps(each) for each in lines], "t.jsonl")


def test_a_trace_that_was_written_is_read_again() -> None:
    drawn = generate(0, 1, 50)
    file = io.StringIO()
    write_trace(drawn, file)
    file.seek(0)
    assert read_trace(file, "t.jsonl") == drawn


def test_namespaces_and_losses_are_written_too() -> None:
    trace = trace_of(entry("team/a", task_id="t", losses=(1.5, 1.25), patience=None), entry("a", at=3))
    again = read_trace(lines_of(trace), "t.jsonl")
    assert again.offers == trace.offers


def test_the_tokens_that_an_offer_declares_are_kept_and_count() -> None:
    (silent, told) = read(HEADER, line(offer={"name": "a"}), line(offer={"name": "b", "tokens": 200_000})).offers
    (again,) = read_trace(lines_of(Trace(Header(), (told,))), "t.jsonl").offers
    assert again.spec.dataset.tokens == 200_000
    # 2,000 tokens in each of 100 rows, where the reference assumes 400.
    assert duration_of(again, REFERENCE_SETTINGS, 1) > duration_of(silent, REFERENCE_SETTINGS, 1)


def test_an_offer_may_stand_as_kubectl_prints_it() -> None:
    printed = stored(make_offer(name="a", namespace="team", rows=5, status={"score": "0.5", "conditions": []}))
    (offer,) = read(HEADER, {"at": 1, "offer": printed}).offers
    assert (offer.name, offer.at, offer.worth, offer.patience) == ("team/a", 1, 1, None)
    assert (offer.truth.factor, offer.truth.fails_after, offer.losses) == (1, None, None)


def test_offers_are_put_in_the_order_of_their_arrival() -> None:
    trace = read(HEADER, line(at=7, offer={"name": "b"}), "", line(at=3, offer={"name": "a"}))
    assert [offer.name for offer in trace.offers] == ["a", "b"]
    assert trace.seconds == 7


FAULTS: list[tuple[str, list[dict[str, Any] | str], str]] = [
    ("nothing", [], "t.jsonl is empty: a trace begins with a line"),
    ("no header", [line()], 't.jsonl, line 1: the first line is to be {"trace": {...}} and nothing else'),
    ("no JSON", [HEADER, "{"], "t.jsonl, line 2 is not JSON"),
    ("no object", [HEADER, "[]"], "t.jsonl, line 2 is no JSON object"),
    (
        "a header's field",
        [{"trace": {"gpus": 0}}],
        "t.jsonl, line 1: trace.gpus: must be at least 1: raise it (given: 0)",
    ),
    ("a cut file", [{"trace": {"offers": 2}}, line()], "trace.offers in line 1 says 2, but 1 follow"),
    ("a name used twice", [HEADER, line(), "", line()], "line 4: offer.metadata.name offer was used in line 2 already"),
    ("no moment", [HEADER, {"offer": make_offer(rows=1)}], "line 2: at: is missing: set it"),
    ("a moment before the start", [HEADER, line(at=-1)], "line 2: at: must be at least 0: raise it (given: -1)"),
    (
        "a moment that is none",
        [HEADER, '{"at": NaN}'],
        "line 2:\n  at: must be a finite number: give another one (given: nan)\n  offer: is",
    ),
    ("no patience at all", [HEADER, line(patience=0)], "line 2: patience: must be above 0: raise it (given: 0)"),
    ("a negative worth", [HEADER, line(worth=-1)], "line 2: worth: "),
    ("an impossible factor", [HEADER, line(truth={"factor": 0})], "line 2: truth.factor: "),
    ("a share above one", [HEADER, line(truth={"fails_after": 1})], "line 2: truth.fails_after: must be below 1"),
    ("half of the losses", [HEADER, line(losses={"own": 1})], "line 2: losses.best_other: is missing: set it"),
    ("a field of no meaning", [HEADER, line(wroth=1)], "line 2: wroth: there is no such field: did you mean worth?"),
    ("an offer's field", [HEADER, line(offer={"hours": 0})], "line 2: offer.spec.timeLimitSeconds must be at least 1"),
    ("no rows", [HEADER, line(offer={"rows": None})], "line 2: offer.spec.dataset.rows is not set"),
    ("no size", [HEADER, line(offer={"model": "x/phi-4"})], "line 2: offer.spec.model.parameters is not set"),
]


@pytest.mark.parametrize(("lines", "message"), [case[1:] for case in FAULTS], ids=[case[0] for case in FAULTS])
def test_a_fault_is_told_with_its_line_and_field(lines: list[dict[str, Any] | str], message: str) -> None:
    with pytest.raises(TraceError) as error:
        read(*lines)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("patience", "expires", "end"),
    [
        (None, None, None),
        (60, None, 70),
        (None, "2026-01-01T00:00:30Z", 30),
        (60, "2026-01-01T00:00:30Z", 30),
        (10, "2026-01-01T00:00:30Z", 20),
    ],
)
def test_the_first_of_patience_and_expiry_counts(
    patience: float | None, expires: str | None, end: float | None
) -> None:
    assert expiry_of(entry("a", at=10, patience=patience, expires_at=expires)) == end


# The market


def test_a_seed_always_gives_the_same_trace_and_another_one_another() -> None:
    assert generate(5, 1, 40) == generate(5, 1, 40)
    assert generate(5, 1, 40) != generate(6, 1, 40)


def test_the_offers_of_a_seed_are_the_same_under_every_load_only_closer() -> None:
    half, double = generate(5, 0.5, 40), generate(5, 2, 40)
    assert [offer.spec for offer in half.offers] == [offer.spec for offer in double.offers]
    assert [offer.truth for offer in half.offers] == [offer.truth for offer in double.offers]
    assert [offer.at / 4 for offer in half.offers] == pytest.approx([offer.at for offer in double.offers])


def test_a_drawn_offer_stays_what_it_is() -> None:
    """Published figures name seeds, so a seed must mean the same on every machine and version of Python."""
    first = generate(0, 1, 2).offers[0]
    assert (first.spec.task_type, first.spec.model.name) == (TaskType.IMAGE, "black-forest-labs/FLUX.1-dev")
    assert (first.spec.dataset.rows, first.patience) == (1200, 1339.82)
    assert first.truth.factor == pytest.approx(0.6379145744377944)


@pytest.mark.parametrize("load", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("gpus", [8, 16])
def test_the_load_is_exactly_what_was_asked_for(load: float, gpus: int) -> None:
    trace = generate(1, load, 100, gpus=gpus)
    assert offered_load(trace) == pytest.approx(load, rel=1e-9)
    assert trace.offers[-1].at == pytest.approx(trace.seconds)


def test_times_of_any_size_are_taken() -> None:
    far = [entry("a", at=1e11, patience=1e11), entry("b", expires_at="9999-12-31T23:59:59.999999Z", gpus=4)]
    past = entry("c", at=5, expires_at="0001-01-01T00:00:00Z")
    result = run_of(*far, past, gpus=2)
    assert ([run.name for run in result.runs], list(result.refusals)) == (["a"], ["c", "b"])


def test_a_trace_without_offers_has_no_load() -> None:
    assert offered_load(trace_of()) == 0


@pytest.mark.parametrize(("load", "count"), [(0, 1), (-1, 1), (math.nan, 1), (math.inf, 1), (1, 0)])
def test_a_trace_that_cannot_be_is_not_drawn(load: float, count: int) -> None:
    with pytest.raises(ValueError, match=r"load must be above 0|at least one offer"):
        generate(0, load, count)


@pytest.mark.parametrize(
    ("task", "billions", "gpus"),
    [
        ("InstructText", 4, 1), ("Chat", 4.1, 2), ("InstructText", 8, 2), ("InstructText", 13, 4),
        ("InstructText", 70, 8), ("DPO", 1.3, 1), ("DPO", 7, 4), ("DPO", 14, 8), ("GRPO", 2, 1), ("GRPO", 8, 4),
        ("GRPO", 21, 8), ("Image", 11.9, 1),
    ],
)  # fmt: skip
def test_the_gpus_are_those_of_the_markets_table(task: str, billions: float, gpus: int) -> None:
    assert market_gpus(TaskType(task), billions) == gpus


@pytest.mark.parametrize(
    ("task", "billions", "rows", "hours"),
    [
        # 2 x 100,000 x 400 x 6 x 8e9 FLOPs on 2 x 148.35 TFLOP/s are 3.595 h, 4.345 with what is added.
        ("InstructText", 8, 100_000, 4.5),
        # 1.4 times that on the 4 GPUs of 24 effective billions: 2.517 h, 3.267 with what is added.
        ("DPO", 8, 100_000, 3.5),
        ("Chat", 0.135, 8_000, 1.0),
        ("Chat", 12, 175_000, 5.0),
        ("GRPO", 4, 8_000, 1.5),
        ("GRPO", 8, 8_000, 2.5),
        ("GRPO", 27, 8_000, 4.0),
        ("GRPO", 70, 8_000, 6.0),
    ],
)
def test_time_limits_follow_the_markets_rule(task: str, billions: float, rows: int, hours: float) -> None:
    assert time_limit(TaskType(task), billions, rows) == hours


@pytest.mark.parametrize(
    ("task", "billions", "hours", "worth"),
    [
        ("InstructText", 4, 4, 2.8),
        ("Chat", 0.5, 4, 1.4),
        ("DPO", 70, 2.5, 3.0),
        ("GRPO", 9, 1, 1.8),
        ("Image", 1, 1, 0.4),
    ],
)
def test_worth_is_the_work_value_times_the_types_weight(task: str, billions: float, hours: float, worth: float) -> None:
    assert worth_of(TaskType(task), billions, hours) == pytest.approx(worth)


@pytest.fixture(scope="module")
def drawn() -> Trace:
    return generate(11, 1, 3000)


def test_task_types_come_in_the_shares_of_the_market(drawn: Trace) -> None:
    counts = Counter(offer.spec.task_type for offer in drawn.offers)
    shares = {"InstructText": 0.20, "Chat": 0.20, "DPO": 0.15, "GRPO": 0.25, "Image": 0.20}
    # Three standard deviations of a share are at most 2.4 points.
    assert {task.value: count / 3000 for task, count in counts.items()} == pytest.approx(shares, abs=0.024)


def test_models_rows_and_limits_stay_within_the_bounds_of_the_market(drawn: Trace) -> None:
    text = [o for o in drawn.offers if o.spec.task_type is not TaskType.IMAGE]
    sizes = [(o.spec.model.parameters or 0) / 1e9 for o in text]
    assert min(sizes) >= 0.1
    assert max(sizes) <= 71
    assert sum(size > 12 for size in sizes) / len(sizes) == pytest.approx(0.05, abs=0.015)
    assert sum("anonymous/" in o.spec.model.name for o in text) / len(text) == pytest.approx(0.2, abs=0.03)
    plain = [o for o in text if o.spec.task_type is not TaskType.GRPO]
    assert all(8_000 <= (o.spec.dataset.rows or 0) <= 175_000 for o in plain)
    # Evenly in the logarithm: the median is the geometric mean of the bounds.
    assert statistics.median(o.spec.dataset.rows or 0 for o in plain) == pytest.approx(37_400, rel=0.08)
    assert all(0.75 <= o.spec.time_limit_seconds / 3600 <= 6 for o in text)
    images = [o for o in drawn.offers if o.spec.task_type is TaskType.IMAGE]
    assert {o.spec.time_limit_seconds for o in images} == {1800, 2700, 3600}
    assert {o.spec.model.architecture for o in images} == {"sdxl", "flux"}
    assert {o.spec.priority_class_name for o in drawn.offers} == {"organic", "tournament", "benchmark"}


def test_noise_failures_and_patience_are_those_of_the_assumptions(drawn: Trace) -> None:
    factors = [math.log(o.truth.factor) for o in drawn.offers]
    assert statistics.fmean(factors) == pytest.approx(0, abs=0.012)
    assert statistics.stdev(factors) == pytest.approx(0.2, abs=0.01)
    assert sum(o.truth.fails_after is not None for o in drawn.offers) / 3000 == pytest.approx(0.05, abs=0.012)
    patience = [o.patience or 0 for o in drawn.offers]
    assert statistics.median(patience) == pytest.approx(1800, rel=0.08)
    assert (min(patience) >= 60, max(patience) <= 6 * 3600) == (True, True)


def test_offers_come_in_bursts(drawn: Trace) -> None:
    arrivals = [offer.at for offer in drawn.offers]
    assert arrivals == sorted(arrivals)
    gaps = [later - earlier for earlier, later in pairwise(arrivals)]
    # An even Poisson process would have a ratio of 1.
    assert statistics.stdev(gaps) / statistics.fmean(gaps) > 1.5


def test_a_market_without_bursts_can_be_asked_for() -> None:
    arrivals = [offer.at for offer in generate(0, 1, 3000, market=Market(busy_rate=1.0)).offers]
    gaps = [later - earlier for earlier, later in pairwise(arrivals)]
    assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(1, abs=0.1)


def test_most_tasks_can_be_done_on_the_markets_gpus_and_some_cannot(drawn: Trace) -> None:
    outcomes = Counter()
    for offer in drawn.offers:
        gpus = market_gpus(offer.spec.task_type, (offer.spec.model.parameters or 0) / 1e9)
        outcomes[course_of(offer, REFERENCE_SETTINGS, gpus, offer.at).outcome] += 1
    assert outcomes["InTime"] / 3000 > 0.8
    assert outcomes["Late"] / 3000 > 0.02
    assert outcomes["Failed"] / 3000 > 0.03


def test_no_drawn_offer_asks_for_what_is_not_served() -> None:
    policy = policy_spec(preset="strategy-8xh100")
    reasons = {
        refusal.reason for offer in generate(2, 1, 200).offers for refusal in evaluate(offer.spec, policy).refusals
    }
    assert reasons.isdisjoint({Reason.FEATURE_NOT_SERVED, Reason.PARAMETERS_UNKNOWN})
