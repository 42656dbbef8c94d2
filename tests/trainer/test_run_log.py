"""The run's log outlives the pod: bounded, over all attempts, and never in the way of the training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from taskoffer_trainer.run_log import LogFile

pytestmark = pytest.mark.trainer

KEPT = """
import os, subprocess, sys
from pathlib import Path
from taskoffer_trainer.run_log import kept_log

print("before")
with kept_log(Path(sys.argv[1]), sys.argv[2]):
    print("of the launcher")
    print("a fault of the launcher", file=sys.stderr)
    rank = "print('of a rank'); import os; os.write(2, b'a fault of a rank\\\\n')"
    subprocess.run([sys.executable, "-c", rank], check=True)
    os.write(1, b"half a line")
print("after")
"""


def run_kept(folder: Path, heading: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", KEPT, str(folder), heading]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)


def test_what_launcher_and_ranks_say_is_in_the_file_and_in_the_containers_log(tmp_path: Path) -> None:
    said = run_kept(tmp_path, "--- attempt 1")
    assert said.stdout.splitlines() == ["before", "of the launcher", "of a rank", "half a lineafter"]
    assert said.stderr.splitlines() == ["a fault of the launcher", "a fault of a rank"]
    # Two pipes lead into the file, so that only what came through one of them has an order.
    log = (tmp_path / "log.txt").read_text()
    assert log.startswith("--- attempt 1\n")
    for text in (said.stdout.removeprefix("before\n").removesuffix("after\n"), said.stderr):
        for line in text.splitlines():
            assert line in log
    assert "before" not in log
    assert "after" not in log


def test_a_further_attempt_goes_on_in_the_same_file(tmp_path: Path) -> None:
    for number in (1, 2):
        run_kept(tmp_path, f"--- attempt {number}")
    log = (tmp_path / "log.txt").read_text()
    assert log.index("--- attempt 1") < log.index("--- attempt 2")
    assert log.count("of a rank") == 4


def test_the_latest_part_is_kept_when_there_is_too_much(tmp_path: Path) -> None:
    lines = [f"line {number:03}\n".encode() for number in range(100)]
    log = LogFile(tmp_path, limit=90)
    for line in lines:
        assert log.write(line) is None
    older, latest = (tmp_path / "log.1.txt").read_bytes(), (tmp_path / "log.txt").read_bytes()
    assert len(older) <= 90
    assert len(latest) <= 90
    assert (older + latest).splitlines(keepends=True) == lines[-len((older + latest).splitlines()) :]
    again = LogFile(tmp_path, limit=90)
    again.write(b"x" * 80)
    assert (tmp_path / "log.1.txt").read_bytes() == latest


def test_a_full_disk_is_said_once_and_the_output_goes_on(tmp_path: Path) -> None:
    (tmp_path / "log.txt").symlink_to("/dev/full")
    said = run_kept(tmp_path, "--- attempt 1")
    (note,) = [line for line in said.stdout.splitlines() if "is not written any more" in line]
    assert "No space left on device" in note
    assert {"of the launcher", "of a rank"} <= set(said.stdout.splitlines())


def test_a_disk_that_is_full_in_the_middle_of_a_run_is_said_once(tmp_path: Path) -> None:
    log = LogFile(tmp_path)
    assert log.write(b"x") is None
    log.path.unlink()
    log.path.symlink_to("/dev/full")
    assert "No space left on device" in (log.write(b"x") or "")
    assert log.write(b"x") is None
