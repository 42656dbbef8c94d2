"""What the trainer serves at ``/metrics``: Prometheus' text format, version 0.0.4.

Each rank writes what it knows of itself into a small file, and the launcher puts these files and the progress report
together when it is asked. No label carries the name of an object.
"""

from __future__ import annotations

import bisect
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from taskoffer.api.contract import ProgressReport, RunState
from taskoffer_trainer.clock import Clock

__all__ = ["FAMILIES", "STEP_BUCKETS", "Family", "RankFigures", "read_rank_figures", "render_metrics"]

PREFIX = "taskoffer_trainer_"
STEP_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)
"""Upper bounds of the step times that are counted, in seconds: from a tiny model's to that of 70B parameters."""


@dataclass
class RankFigures:
    """What one training process says of itself.

    Attributes:
        rank: its number.
        allocated_bytes: GPU memory that tensors take, by torch's allocator; ``None`` without a GPU.
        reserved_bytes: GPU memory that torch's allocator has taken from the driver.
        step_counts: steps by :data:`STEP_BUCKETS`, the last one those that took longer.
        step_seconds: all steps together.
        checkpoint_at: when the last complete checkpoint was written, in seconds since 1970.
    """

    rank: int
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    step_counts: list[int] = field(default_factory=lambda: [0] * (len(STEP_BUCKETS) + 1))
    step_seconds: float = 0.0
    checkpoint_at: float | None = None

    def observe(self, seconds: float) -> None:
        """Count a step."""
        self.step_counts[bisect.bisect_left(STEP_BUCKETS, seconds)] += 1
        self.step_seconds += seconds

    def write(self, run_dir: Path) -> None:
        """Replace this rank's file in one step."""
        path = run_dir / f"figures-{self.rank}.json"
        partial = path.with_suffix(".tmp")
        partial.write_text(json.dumps(asdict(self)), encoding="utf-8")
        partial.replace(path)


def read_rank_figures(run_dir: Path) -> list[RankFigures]:
    """Return what the ranks have written so far, in their order."""
    found = [RankFigures(**json.loads(path.read_bytes())) for path in run_dir.glob("figures-*.json")]
    return sorted(found, key=lambda figures: figures.rank)


@dataclass(frozen=True)
class Family:
    """A metric: its name without prefix and suffix, its type, its labels and what it means.

    Attributes:
        name: without the prefix, and for a counter without ``_total``.
        kind: ``gauge``, ``counter`` or ``histogram``.
        help: what it means, in a sentence.
        labels: names of its labels.
        source: name of the figure in the progress report, where it is one.
    """

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()
    source: str | None = None

    @property
    def full_name(self) -> str:
        """The name of its samples; a histogram's have further suffixes."""
        return f"{PREFIX}{self.name}{'_total' if self.kind == 'counter' else ''}"


_NATS = "in nats per token where the method trains text"
_ATTEMPTS = "over all attempts of the run"
FAMILIES = (
    Family("start_time_seconds", "gauge", "When the container was started, in seconds since 1970."),
    Family("last_update_time_seconds", "gauge", "When the figures were taken, in seconds since 1970."),
    Family("attempt", "gauge", "Number of the attempt."),
    Family("state", "gauge", "1 for the state that the run is in, 0 for the others.", ("state",)),
    Family("step", "gauge", "Optimizer steps done."),
    Family("total_steps", "gauge", "Optimizer steps planned."),
    Family("progress_ratio", "gauge", "Share of the planned steps that are done."),
    Family("estimated_remaining_seconds", "gauge", "Seconds until the run ends, as estimated."),
    Family("seconds_to_deadline", "gauge", "Seconds until the result must be there; negative after that."),
    Family("reserve_seconds", "gauge", "How long before the deadline the result is planned to be there."),
    Family("checkpoint_age_seconds", "gauge", "Seconds since the last complete checkpoint, of any attempt."),
    Family("tokens", "counter", f"Tokens trained, all processes together, {_ATTEMPTS}.", source="tokens_total"),
    Family("samples", "counter", f"Rows trained, all processes together, {_ATTEMPTS}.", source="samples_total"),
    Family("out_of_memory", "counter", f"Steps repeated in smaller pieces, {_ATTEMPTS}.", source="out_of_memory"),
    Family(
        "evaluation_out_of_memory",
        "counter",
        "Times that this attempt repeated held-out rows, fewer at once.",
        source="evaluation_out_of_memory",
    ),
    Family(
        "skipped_steps",
        "counter",
        "Steps of this attempt that were left out for gradients that are not finite.",
        source="skipped_steps",
    ),
    Family("step_seconds", "histogram", "Duration of this attempt's optimizer steps, rests included."),
    Family("tokens_per_second", "gauge", "Tokens trained per second, all processes.", source="tokens_per_second"),
    Family("loss", "gauge", f"Training loss of the last step, {_NATS}.", source="loss"),
    Family("learning_rate", "gauge", "Learning rate of the last step.", source="learning_rate"),
    Family("grad_norm", "gauge", "Norm of the gradients before clipping.", source="grad_norm"),
    Family("epoch", "gauge", "Passes over the training rows so far.", source="epoch"),
    Family("eval_loss", "gauge", f"Held-out loss of the last evaluation, {_NATS}.", source="eval_loss"),
    Family("eval_loss_before", "gauge", f"Held-out loss of the base model, {_NATS}.", source="eval_loss_before"),
    Family("evaluation", "gauge", "Every figure of the last evaluation.", ("figure",)),
    Family("evaluation_before", "gauge", "Every figure of the base model's evaluation.", ("figure",)),
    Family("tuning_generation", "gauge", "Generation of the tuning in force; 0 before any was asked for."),
    Family("micro_batch", "gauge", "Rows that go through the model at once on each GPU."),
    Family("micro_batch_limit", "gauge", "Most rows at once that memory has allowed; absent while all did."),
    Family("duty_cycle", "gauge", "Share of the time that is work and not rest, as asked for."),
    Family("gpu_allocated_bytes", "gauge", "GPU memory that a rank's tensors take.", ("rank",)),
    Family("gpu_reserved_bytes", "gauge", "GPU memory that a rank's allocator holds.", ("rank",)),
)
"""Every metric that the trainer serves."""

Sample = tuple[Mapping[str, str], float | None]


def _figure(values: Mapping[str, float], prefix: str, suffix: str) -> Iterator[Sample]:
    for name, value in values.items():
        if name.startswith(prefix) and name.endswith("_before") == bool(suffix):
            yield {"figure": name.removesuffix(suffix)}, value


def _values(report: ProgressReport) -> dict[str, float]:
    found = {}
    for metric in report.metrics:
        try:
            found[metric.name] = float(metric.value)
        except ValueError:
            continue
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _samples(report: ProgressReport, clock: Clock, ranks: Sequence[RankFigures], now: float) -> dict[str, list[Sample]]:
    """Return the samples of every family but histograms, by its name; a value of ``None`` is not known."""
    values, tuning = _values(report), report.tuning
    checkpoint = max((one.checkpoint_at for one in ranks if one.checkpoint_at is not None), default=None)
    single: dict[str, float | None] = {
        "start_time_seconds": clock.started.timestamp(),
        "last_update_time_seconds": report.last_updated_time.timestamp(),
        "attempt": report.attempt,
        "step": report.step,
        "total_steps": report.total_steps,
        "progress_ratio": round(report.step / report.total_steps, 6) if report.total_steps else None,
        "estimated_remaining_seconds": report.estimated_remaining_seconds,
        "seconds_to_deadline": clock.deadline.timestamp() - now if clock.deadline is not None else None,
        "reserve_seconds": clock.reserve if clock.deadline is not None else None,
        "checkpoint_age_seconds": max(0.0, now - checkpoint) if checkpoint is not None else None,
        "tuning_generation": tuning.generation if tuning else None,
        "micro_batch": tuning.micro_batch if tuning else None,
        "micro_batch_limit": tuning.micro_batch_limit if tuning else None,
        "duty_cycle": tuning.duty_cycle if tuning else None,
    }
    made: dict[str, list[Sample]] = {name: [({}, value)] for name, value in single.items()}
    for family in FAMILIES:
        if family.source is not None:
            # A counter that has not been needed yet stands at 0, so that its first increase is seen.
            made[family.name] = [({}, values.get(family.source, 0.0 if family.kind == "counter" else None))]
    made["state"] = [({"state": state.value}, float(state is report.state)) for state in RunState]
    made["evaluation"] = list(_figure(values, "eval_", ""))
    made["evaluation_before"] = list(_figure(values, "eval_", "_before"))
    made["gpu_allocated_bytes"] = [({"rank": str(one.rank)}, one.allocated_bytes) for one in ranks]
    made["gpu_reserved_bytes"] = [({"rank": str(one.rank)}, one.reserved_bytes) for one in ranks]
    return made


def _labels(labels: Mapping[str, str]) -> str:
    def escaped(text: str) -> str:
        return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

    return "{" + ",".join(f'{name}="{escaped(value)}"' for name, value in labels.items()) + "}" if labels else ""


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def _histogram(family: Family, figures: RankFigures) -> Iterator[str]:
    total = 0
    for bound, count in zip((*STEP_BUCKETS, math.inf), figures.step_counts, strict=True):
        total += count
        yield f'{family.full_name}_bucket{{le="{"+Inf" if math.isinf(bound) else bound}"}} {total}'
    yield f"{family.full_name}_sum {_number(figures.step_seconds)}"
    yield f"{family.full_name}_count {total}"


def render_metrics(
    report: ProgressReport, clock: Clock, ranks: Sequence[RankFigures] = (), now: float | None = None
) -> str:
    """Render what is known of a run.

    Args:
        report: what rank 0 wrote last.
        clock: the attempt's time.
        ranks: what the ranks say of themselves.
        now: the present moment in seconds since 1970.
    """
    samples = _samples(report, clock, ranks, time.time() if now is None else now)
    lines: list[str] = []
    for family in FAMILIES:
        if family.kind == "histogram":
            made = list(_histogram(family, next((one for one in ranks if one.rank == 0), RankFigures(0))))
        else:
            known: list[tuple[Mapping[str, str], Any]] = [one for one in samples[family.name] if one[1] is not None]
            made = [f"{family.full_name}{_labels(labels)} {_number(value)}" for labels, value in known]
        if made:
            lines += [f"# HELP {family.full_name} {family.help}", f"# TYPE {family.full_name} {family.kind}", *made]
    return "\n".join(lines) + "\n"
