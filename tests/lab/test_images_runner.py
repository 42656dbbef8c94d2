"""Long programs: what is said of them, how they fail, and that they end when the caller wants."""

import os
import sys
import threading

import pytest

from taskoffer_lab.errors import LabError
from taskoffer_lab.images import runner
from taskoffer_lab.images.runner import CancelledError, Reporter, run_program
from taskoffer_lab.process_table import wait_until


def shell(script: str) -> list[str]:
    return ["sh", "-c", script]


def test_output_of_both_streams_is_returned_and_logged(tmp_path):
    lines: list[str] = []
    log = tmp_path / "logs" / "a.log"

    output = run_program(shell("echo one; echo two >&2; printf three"), "counting", Reporter(lines.append), log=log)

    assert output == "one\ntwo\nthree"
    assert log.read_text() == "one\ntwo\nthree\n"
    assert lines == [], "a program that ends at once is not worth a line"


def test_a_failure_carries_the_status_the_last_lines_and_the_log(tmp_path):
    log = tmp_path / "a.log"

    with pytest.raises(LabError) as caught:
        run_program(shell("seq 1 100; echo disk full; exit 3"), "packing", Reporter([].append), log=log)

    message = str(caught.value)
    assert message.startswith("packing failed with status 3:")
    assert "disk full" in message
    assert "\n50\n" not in message
    assert str(log) in message


def test_a_long_program_is_reported_at_its_start_now_and_then_and_at_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(runner, "HEARTBEAT_SECONDS", 0.0)
    lines: list[str] = []
    gate = tmp_path / "gate"
    os.mkfifo(gate)

    def report(line: str) -> None:
        lines.append(line)
        if "compiling" in line:
            gate.write_text("go on\n")

    run_program(
        shell(f"echo STEP compiling; read line < {gate}"),
        "building",
        Reporter(report),
        log=tmp_path / "a.log",
        milestone=lambda line: line.partition("STEP ")[2] or None,
    )

    assert lines[0] == "building …"
    assert any(line.startswith("building, ") and line.endswith(" s: compiling") for line in lines)
    assert lines[-1].startswith("building: done in ")


def test_a_cancelled_program_is_killed(tmp_path):
    cancelled = threading.Event()
    log = tmp_path / "a.log"
    pid_file = tmp_path / "pid"

    def cancel_when_running() -> None:
        try:
            wait_until(lambda: pid_file.exists() and pid_file.read_text() != "", "the program's start", 60)
        finally:
            cancelled.set()

    thread = threading.Thread(target=cancel_when_running)
    thread.start()
    script = f"import os, time; open('{pid_file}', 'w').write(str(os.getpid())); time.sleep(60)"
    with pytest.raises(CancelledError):
        run_program([sys.executable, "-c", script], "waiting", Reporter([].append, cancelled), log=log)
    thread.join()

    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
