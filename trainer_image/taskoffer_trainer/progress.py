"""Tells the world how far a run is: rank 0 writes a small file, the launcher serves it over HTTP.

The launcher imports nothing heavy, so the endpoint answers from the first second, also while the ranks are
still importing torch or sit in a long step.
"""

from __future__ import annotations

import math
import os
import threading
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from taskoffer.api.contract import PROGRESS_PORT, ExitCode, ProgressReport, RunConfig, RunState
from taskoffer_trainer.failures import TrainerError

__all__ = ["ProgressServer", "now", "progress_port", "read_report", "render_metrics", "write_report"]


def now() -> datetime:
    """Return the present moment in UTC."""
    return datetime.now(UTC)


def progress_port() -> int:
    """Return the port to serve on: ``TASKOFFER_PROGRESS_PORT``, else the contract's; 0 takes a free one.

    Raises:
        TrainerError: ``BAD_CONFIG`` when the variable is not a port.
    """
    text = os.environ.get("TASKOFFER_PROGRESS_PORT", str(PROGRESS_PORT))
    if not text.isdecimal() or int(text) > 65535:
        raise TrainerError(
            ExitCode.BAD_CONFIG,
            "ConfigInvalid",
            f"TASKOFFER_PROGRESS_PORT={text!r} is not a port (0 to 65535)",
        )
    return int(text)


def write_report(path: Path, report: ProgressReport) -> None:
    """Replace the report on disk in one step, so that a reader never sees half of it."""
    partial = path.with_suffix(".tmp")
    partial.write_text(report.model_dump_json(by_alias=True, exclude_none=True), encoding="utf-8")
    partial.replace(path)


def read_report(path: Path, config: RunConfig, started: datetime) -> ProgressReport:
    """Return what rank 0 wrote last, or the state ``Starting`` while it has not written anything."""
    try:
        return ProgressReport.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return ProgressReport(
            job_name=config.job_name,
            attempt=config.attempt,
            state=RunState.STARTING,
            progress_percentage=0,
            last_updated_time=started,
        )


# Name in the report, name on /metrics, help text. Base units, and no object's name as a label.
_GAUGES = (
    ("loss", "loss", "Training loss of the last step, in nats per token."),
    ("eval_loss", "eval_loss", "Held-out loss of the last evaluation, in nats per token."),
    ("eval_loss_before", "eval_loss_before", "Held-out loss of the base model, in nats per token."),
    ("learning_rate", "learning_rate", "Learning rate of the last step."),
    ("grad_norm", "grad_norm", "Norm of the gradients before clipping."),
    ("epoch", "epoch", "Passes over the training rows so far."),
    ("tokens_per_second", "tokens_per_second", "Tokens trained per second, all processes together."),
    ("step_seconds", "step_seconds", "Duration of an optimizer step, averaged over the last steps."),
    (
        "skipped_steps",
        "skipped_steps",
        "Steps of this attempt that were left out for gradients that are not finite.",
    ),
)


def render_metrics(report: ProgressReport, started: datetime) -> str:
    """Render a report in Prometheus' text format, version 0.0.4."""
    lines: list[str] = []

    def add(name: str, help_text: str, value: float | int, labels: str = "") -> None:
        full = f"taskoffer_trainer_{name}"
        if not any(line.startswith(f"# TYPE {full} ") for line in lines):
            lines.extend((f"# HELP {full} {help_text}", f"# TYPE {full} gauge"))
        lines.append(f"{full}{labels} {value}")

    add("start_time_seconds", "When the trainer was started, in seconds since 1970.", started.timestamp())
    add("last_update_time_seconds", "When the figures were taken.", report.last_updated_time.timestamp())
    add("attempt", "Number of the attempt.", report.attempt)
    for state in RunState:
        here = int(state is report.state)
        add(
            "state",
            "1 for the state that the run is in, 0 for the others.",
            here,
            f'{{state="{state.value}"}}',
        )
    add("step", "Optimizer steps done.", report.step)
    if report.total_steps is not None:
        add("total_steps", "Optimizer steps planned.", report.total_steps)
    if report.total_steps:
        add("progress_ratio", "Share of the planned steps that are done.", round(report.step / report.total_steps, 6))
    if report.estimated_remaining_seconds is not None:
        add("estimated_remaining_seconds", "Seconds until the run ends.", report.estimated_remaining_seconds)
    values = {metric.name: metric.value for metric in report.metrics}
    for source, name, help_text in _GAUGES:
        if source in values and math.isfinite(float(values[source])):
            add(name, help_text, float(values[source]))
    return "\n".join(lines) + "\n"


class ProgressServer:
    """Serves ``/progress``, ``/metrics`` and ``/healthz`` from a thread until :meth:`close`."""

    def __init__(self, port: int, report_file: Path, config: RunConfig) -> None:
        started = now()

        class Handler(BaseHTTPRequestHandler):
            timeout = 10
            server_version = "taskoffer-trainer"
            sys_version = ""

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path == "/progress":
                    report = read_report(report_file, config, started)
                    self._answer(200, "application/json", report.model_dump_json(by_alias=True, exclude_none=True))
                elif path == "/metrics":
                    report = read_report(report_file, config, started)
                    self._answer(200, "text/plain; version=0.0.4; charset=utf-8", render_metrics(report, started))
                elif path == "/healthz":
                    self._answer(200, "text/plain; charset=utf-8", "ok\n")
                else:
                    self._answer(404, "text/plain; charset=utf-8", "here are /progress, /metrics and /healthz\n")

            def _answer(self, status: int, content_type: str, text: str) -> None:
                body = text.encode()
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                """Requests are frequent and say nothing about the training; leave them out of its log."""

        try:
            self._server = ThreadingHTTPServer(("0.0.0.0", port), Handler)
        except OSError as error:
            raise TrainerError(
                ExitCode.BAD_CONFIG,
                "PortInUse",
                f"the progress port {port} cannot be opened: {error.strerror or error}; "
                "set TASKOFFER_PROGRESS_PORT to a free one",
            ) from error
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="progress", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port that is served."""
        return int(self._server.server_address[1])

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
