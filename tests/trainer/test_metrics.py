"""What the trainer serves at /metrics, read with the client library's own parser."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Metric as Parsed
from prometheus_client.parser import text_string_to_metric_families

from taskoffer.api.contract import AppliedTuning, Metric, ProgressReport, RunConfig, RunState
from taskoffer_trainer.callbacks import Progress
from taskoffer_trainer.clock import Clock
from taskoffer_trainer.metrics import FAMILIES, PREFIX, STEP_BUCKETS, RankFigures, read_rank_figures, render_metrics
from taskoffer_trainer.telemetry import Telemetry
from taskoffer_trainer.timings import Timings

pytestmark = pytest.mark.trainer

NOW = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)
CLOCK = Clock(NOW - timedelta(minutes=10), NOW + timedelta(minutes=50), 180)
REPORTED = {
    "tokens_total": "12345678901",
    "samples_total": "4096",
    "out_of_memory": "2",
    "skipped_steps": "1",
    "loss": "1.25",
    "learning_rate": "0.0002",
    "grad_norm": "0.5",
    "epoch": "1.5",
    "tokens_per_second": "2000",
    "eval_loss": "1.5",
    "eval_loss_before": "3.5",
    "eval_accuracy": "0.75",
    "eval_accuracy_before": "0.5",
}


def report(**changes: Any) -> ProgressReport:
    settings: dict[str, Any] = {
        "job_name": "offer-0123abcd",
        "state": RunState.TRAINING,
        "last_updated_time": NOW,
        "step": 30,
        "total_steps": 120,
        "estimated_remaining_seconds": 900,
        "metrics": tuple(Metric(name=name, value=value) for name, value in REPORTED.items()),
        "tuning": AppliedTuning(generation=3, micro_batch=2, micro_batch_limit=4, duty_cycle=0.5, step=7),
    }
    return ProgressReport(**{**settings, **changes})


def ranks() -> list[RankFigures]:
    first = RankFigures(0, allocated_bytes=10 << 30, reserved_bytes=12 << 30, checkpoint_at=NOW.timestamp() - 30)
    for seconds in (0.05, 0.2, 0.2, 7.0, 1000.0):
        first.observe(seconds)
    return [first, RankFigures(1, allocated_bytes=11 << 30, reserved_bytes=13 << 30)]


def parsed(text: str) -> dict[str, Parsed]:
    return {family.name: family for family in text_string_to_metric_families(text)}


@pytest.fixture
def families() -> dict[str, Parsed]:
    return parsed(render_metrics(report(), CLOCK, ranks(), NOW.timestamp()))


def value(families: dict[str, Parsed], name: str, **labels: str) -> float:
    samples = [one for family in families.values() for one in family.samples if one.name == PREFIX + name]
    (found,) = [one.value for one in samples if one.labels == labels]
    return float(found)


def test_every_declared_metric_is_served_with_its_type_and_help(families: dict[str, Parsed]) -> None:
    said = {name: (family.type, family.documentation) for name, family in families.items()}
    assert said == {PREFIX + one.name: (one.kind, one.help) for one in FAMILIES}


VALUES = [
    ("tokens_total", 12345678901),
    ("samples_total", 4096),
    ("out_of_memory_total", 2),
    ("skipped_steps_total", 1),
    ("loss", 1.25),
    ("learning_rate", 0.0002),
    ("tuning_generation", 3),
    ("micro_batch", 2),
    ("micro_batch_limit", 4),
    ("duty_cycle", 0.5),
    ("checkpoint_age_seconds", 30),
    ("seconds_to_deadline", 3000),
    ("reserve_seconds", 180),
    ("progress_ratio", 0.25),
    ("estimated_remaining_seconds", 900),
    ("start_time_seconds", NOW.timestamp() - 600),
]


@pytest.mark.parametrize(("name", "expected"), VALUES)
def test_a_figure_is_served_with_all_of_its_digits(name: str, expected: float, families: dict[str, Parsed]) -> None:
    assert value(families, name) == expected


def test_memory_is_told_for_each_rank(families: dict[str, Parsed]) -> None:
    for rank, gibibytes in (("0", 10), ("1", 11)):
        assert value(families, "gpu_allocated_bytes", rank=rank) == gibibytes << 30
        assert value(families, "gpu_reserved_bytes", rank=rank) == (gibibytes + 2) << 30


def test_each_figure_of_an_evaluation_is_told_before_and_now(families: dict[str, Parsed]) -> None:
    for figure, before, now in (("eval_loss", 3.5, 1.5), ("eval_accuracy", 0.5, 0.75)):
        assert value(families, "evaluation_before", figure=figure) == before
        assert value(families, "evaluation", figure=figure) == now


def test_step_times_are_counted_up_to_each_bound(families: dict[str, Parsed]) -> None:
    counts = [
        one.value for one in families[f"{PREFIX}step_seconds"].samples if one.name == f"{PREFIX}step_seconds_bucket"
    ]
    bounds = [*STEP_BUCKETS, float("inf")]
    assert counts == [sum(seconds <= bound for seconds in (0.05, 0.2, 0.2, 7.0, 1000.0)) for bound in bounds]
    assert value(families, "step_seconds_count") == 5
    assert value(families, "step_seconds_sum") == pytest.approx(1007.45)


def test_one_state_is_told_at_a_time(families: dict[str, Parsed]) -> None:
    states = {one.labels["state"]: one.value for one in families[f"{PREFIX}state"].samples}
    assert states == {state.value: float(state is RunState.TRAINING) for state in RunState}


def test_what_nobody_knows_is_absent_and_counters_begin_at_0() -> None:
    families = parsed(render_metrics(report(metrics=(), tuning=None, total_steps=None), Clock(NOW), [], 0.0))
    absent = ("seconds_to_deadline", "checkpoint_age_seconds", "gpu_allocated_bytes", "loss", "micro_batch")
    assert not {PREFIX + name for name in absent} & set(families)
    assert value(families, "tokens_total") == value(families, "step_seconds_count") == 0


def test_no_object_is_named_and_a_strange_figure_breaks_no_line() -> None:
    strange = (Metric(name='eval_"a\\b\n', value="1"), Metric(name="loss", value="nan"), Metric(name="x", value="y"))
    text = render_metrics(report(metrics=strange), CLOCK, [], NOW.timestamp())
    assert value(parsed(text), "evaluation", figure='eval_"a\\b\n') == 1
    assert f"{PREFIX}loss " not in text
    assert "offer-0123abcd" not in text


def test_what_the_ranks_wrote_is_read_in_their_order(tmp_path: Path) -> None:
    for one in reversed(ranks()):
        one.write(tmp_path)
    assert read_rank_figures(tmp_path) == ranks()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures-0.json", "figures-1.json"]


def test_a_training_goes_on_when_what_is_told_of_it_cannot_be_written(
    tmp_path: Path, base_config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = RunConfig.model_validate({**base_config, "outputDir": "/o", "checkpointDir": str(tmp_path)})
    place, timings = tmp_path / "run", Timings(config)
    telemetry = Telemetry(config, place, 0, timings)
    progress = Progress(config, place / "progress.json", timings, CLOCK)
    for _ in range(2):
        telemetry.on_train_begin(None, None, None)
        progress.write()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert all("cannot be told any more, and it goes on" in line for line in said)
    place.mkdir()
    telemetry.on_train_begin(None, None, None)
    progress.write()
    assert {path.name for path in place.iterdir()} == {"figures-0.json", "progress.json"}
