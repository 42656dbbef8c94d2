"""Tells the world how far a run is: rank 0 writes a small file, the launcher serves it over HTTP.

The launcher imports nothing heavy, so the endpoint answers from the first second, also while the ranks are
still importing torch or sit in a long step.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from taskoffer.api.contract import PROGRESS_PORT, ExitCode, ProgressReport, RunConfig, RunState
from taskoffer_trainer.clock import Clock
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.metrics import read_rank_figures, render_metrics
from taskoffer_trainer.mirror import best_so_far

__all__ = ["ProgressServer", "Spoken", "progress_port", "read_report", "write_report"]


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


class Spoken:
    """Writes what is told of a run. Where that fails, as on a full disk, it says so once: the training goes on."""

    def __init__(self) -> None:
        self._failed = False

    def __call__(self, write: Callable[[], None]) -> None:
        """Write, and go on."""
        try:
            write()
        except OSError as error:
            if not self._failed:
                print(f"train: how far the run is cannot be told any more, and it goes on: {error}", flush=True)
            self._failed = True
        else:
            self._failed = False


def read_report(path: Path, config: RunConfig, clock: Clock) -> ProgressReport:
    """Return what rank 0 wrote last, or the state ``Starting`` while it has not written anything.

    The best adapter so far lies where the ranks put it; what is said of it is what lies there at this moment.
    What the operator predicted is said until something is measured, but never more than the time that there is.
    """
    best = best_so_far(config)
    try:
        return ProgressReport.model_validate_json(path.read_bytes()).model_copy(update={"provisional": best})
    except FileNotFoundError:
        return ProgressReport(
            provisional=best,
            job_name=config.job_name,
            attempt=config.attempt,
            state=RunState.STARTING,
            progress_percentage=0,
            estimated_remaining_seconds=_predicted(config, clock),
            last_updated_time=clock.started,
        )


def _predicted(config: RunConfig, clock: Clock) -> int | None:
    left = clock.planned_left()
    if config.expected_seconds is None or left is None:
        return config.expected_seconds
    return max(0, min(config.expected_seconds, math.ceil(left)))


class ProgressServer:
    """Serves ``/progress``, ``/metrics`` and ``/healthz`` from a thread until :meth:`close`."""

    def __init__(self, port: int, run_dir: Path, config: RunConfig, clock: Clock) -> None:
        report_file = run_dir / "progress.json"

        class Handler(BaseHTTPRequestHandler):
            timeout = 10
            server_version = "taskoffer-trainer"
            sys_version = ""

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path == "/progress":
                    report = read_report(report_file, config, clock)
                    self._answer(200, "application/json", report.model_dump_json(by_alias=True, exclude_none=True))
                elif path == "/metrics":
                    report = read_report(report_file, config, clock)
                    text = render_metrics(report, clock, read_rank_figures(run_dir))
                    self._answer(200, "text/plain; version=0.0.4; charset=utf-8", text)
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
