"""What is said of the rungs at the end of a run, and of several that climb one ladder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rungs import EARLIER, LONG, RUNGS, TESTS, Climb, height, rung_of, turn


def climb(reasons: dict[str, str] | None = None, **outcomes: dict[str, int]) -> Climb:
    made = Climb()
    made.reasons = reasons or {}
    for rung, counts in outcomes.items():
        made.outcomes[rung].update(counts)
    return made


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (climb(unit={"passed": 3}), "unit ran (3 tests)"),
        (climb(unit={"passed": 3, "failed": 2, "skipped": 1}), "unit ran (5 tests, 2 failed, 1 skipped)"),
        (climb(unit={"skipped": 4}), "unit skipped (4 tests)"),
        (climb(unit={}), "unit not run"),
        (climb({"unit": "no means"}, unit={"skipped": 4}), "unit SKIPPED: no means"),
    ],
)
def test_a_rung_is_said_with_what_became_of_its_tests(given: Climb, said: str) -> None:
    assert given.line() == f"rungs: {said} · " + " · ".join(f"{rung} not run" for rung in RUNGS[1:])


def test_the_last_of_several_runs_says_what_all_of_them_have_counted(tmp_path: Path) -> None:
    file = tmp_path / "earlier.json"
    climb({"chaos": "no Go"}, unit={"passed": 3, "failed": 1}, chaos={"skipped": 2}).add_earlier(file)
    climb(trainer={"passed": 5}).add_earlier(file)
    last = climb(node={"passed": 7})
    last.add_earlier(file)
    assert last.line() == (
        "rungs: unit ran (4 tests, 1 failed) · kmock not run · lab not run · apiserver not run · "
        "chaos SKIPPED: no Go · trainer ran (5 tests) · node ran (7 tests)"
    )


def test_a_test_counts_once_also_where_several_processes_share_the_files(tmp_path: Path) -> None:
    files = [str(TESTS / "unit" / f"test_{name}.py") for name in ("login", "progress")]
    command = [sys.executable, "-m", "pytest", "-q", "--numprocesses=2", "--dist=loadfile", *files]
    environment = {**os.environ, EARLIER: str(tmp_path / "earlier.json")}
    ended = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=120)
    passed = re.search(r"^(\d+) passed", ended.stdout, re.MULTILINE)
    assert passed is not None, ended.stdout + ended.stderr
    assert f"rungs: unit ran ({passed[1]} tests)" in ended.stdout


def test_a_test_file_stands_on_the_rung_of_its_folder_and_anything_else_on_none() -> None:
    files = [TESTS / "node" / "deep" / "test_a.py", TESTS / "test_b.py", Path("/elsewhere/unit/test_c.py")]
    assert [(rung_of(file), height(file)) for file in files] == [("node", 6), (None, -1), (None, -1)]


def test_the_files_that_take_long_are_there_and_come_before_the_others() -> None:
    long = [TESTS / "trainer" / f"test_{name}.py" for name in LONG]
    assert [file.name for file in long if not file.is_file()] == []
    assert [turn(file) for file in long] == list(range(len(LONG)))
    assert turn(TESTS / "trainer" / "test_tokens.py") == len(LONG)
