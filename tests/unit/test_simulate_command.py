"""``taskoffer simulate`` and ``taskoffer trace``: figures, tables, and how they end when something is wrong."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from builders import make_policy
from simulation_builders import POLICY, entry, run_of, trace_of
from taskoffer.cli import simulate as command
from taskoffer.cli.main import main
from taskoffer.simulation.engine import Fleet, simulate
from taskoffer.simulation.report import Figures, Spread, figures_of, table
from taskoffer.simulation.trace import write_trace

ROOT = Path(__file__).parents[2]


def figures(*offers: Any, seconds: float | None = None, gpus: int = 4) -> Figures:
    trace = trace_of(*offers, seconds=seconds)
    return figures_of(trace, simulate(trace, POLICY, fleet=Fleet(1, gpus)))


def test_the_figures_of_a_trace_are_those_that_one_counts_by_hand() -> None:
    found = figures(
        entry("done", gpus=4, seconds=1800, worth=5),
        entry("late", at=1, gpus=4, seconds=9000, hours=0.5, worth=3),
        entry("fails", at=2, gpus=2, seconds=3600, fails_after=0.5, worth=2),
        entry("gone", at=3, patience=60, gpus=4),
        entry("refused", at=4, model="x/falcon"),
        entry("paused", at=5, active=False),
        seconds=7200,
    )
    assert (found.offers, found.accepted, found.refused, found.waiting) == (6, 3, 2, 1)
    assert (found.in_time, found.late, found.failed) == (1, 1, 1)
    assert found.penalty_rate == pytest.approx(2 / 3)
    assert found.refusals == {"Expired": 1, "ModelFamilyNotAccepted": 1}
    # Half an hour on 4 GPUs, half an hour on 4, half an hour on 2; two hours of 4 GPUs in all.
    assert (found.busy_hours, found.idle_hours, found.utilisation) == pytest.approx((5, 3, 0.625))
    assert (found.earned, found.worth) == (5, 13)


def test_first_places_count_results_in_time_with_the_lowest_loss() -> None:
    found = figures(
        entry("first", losses=(1.0, 1.1)),
        entry("second", losses=(1.2, 1.1)),
        entry("equal", losses=(1.1, 1.1)),
        entry("late", losses=(1.0, 1.1), seconds=9000),
        entry("unknown"),
        gpus=8,
    )
    assert (found.judged, found.first_places) == (3, 1)


def test_nothing_accepted_is_no_penalty() -> None:
    assert figures(entry("a", model="x/falcon")).penalty_rate == 0
    assert figures().utilisation == 0


@pytest.mark.parametrize(
    ("values", "spread"),
    [([3], Spread(3, 3, 3, 0)), ([1, 2, 6], Spread(3, 1, 6, pytest.approx(2.6458, abs=1e-4)))],
)
def test_a_spread_has_mean_bounds_and_deviation(values: list[float], spread: Spread) -> None:
    assert Spread.of(values) == spread


def test_the_table_has_a_column_for_each_policy_and_a_row_for_each_reason_of_any() -> None:
    some = figures(entry("a", losses=(1, 2)), entry("b", model="x/falcon"))
    none = figures(entry("a", gpus=4), entry("b", gpus=4, patience=5))
    lines = {line[:26].rstrip(): line[26:].split() for line in table({"one": [some], "two": [none]}).splitlines()}
    assert lines[""] == ["one", "two"]
    assert lines["accepted"] == ["1", "1"]
    assert lines["  ModelFamilyNotAccepted"] == ["1", "0"]
    assert lines["  Expired"] == ["0", "1"]
    assert lines["with known losses"] == ["1", "0"]


def test_the_table_gives_mean_and_bounds_where_there_are_several_traces() -> None:
    told = table({"p": [figures(entry("a")), figures(entry("a"), entry("b", at=2))]})
    assert "1.5 (1..2)" in told
    assert "first place" not in told


def test_without_losses_nothing_is_said_of_first_places() -> None:
    assert "first place" not in table({"p": [figures_of(trace_of(entry("a")), run_of(entry("a")))]})


# The command


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    with path.open("w", encoding="utf-8") as file:
        write_trace(trace_of(entry("a", gpus=4), entry("b", at=1, gpus=4, patience=60), seconds=3600), file)
    return path


def test_a_given_trace_is_run_under_presets_and_policy_files(
    trace_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump(make_policy(filters={"onFull": "Reject"})), encoding="utf-8")
    arguments = ["--policy", "lab", "--policy", str(mine), "--offers", str(trace_file), "--gpus", "4"]
    assert main(["simulate", *arguments]) == 0
    told = capsys.readouterr()
    assert told.err == ""
    assert told.out.startswith("1 trace, 1 x 4 GPUs\n")
    rows = [line.split() for line in told.out.splitlines()]
    assert ["lab", str(mine)] in rows
    assert ["Expired", "1", "0"] in rows
    assert ["CapacityFull", "0", "1"] in rows


def test_figures_go_into_a_file_or_to_the_output_as_json(
    trace_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "figures.json"
    arguments = ["simulate", "--policy", "lab", "--offers", str(trace_file), "--gpus", "4", "--json"]
    assert main([*arguments, str(target)]) == 0
    assert "accepted" in capsys.readouterr().out
    assert main([*arguments, "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(target.read_text(encoding="utf-8"))
    assert (found["nodes"], found["gpus_per_node"]) == (1, 4)
    (each,) = found["policies"]["lab"]["traces"]
    assert (each["trace"], each["accepted"], each["refusals"]) == (str(trace_file), 1, {"Expired": 1})
    assert found["policies"]["lab"]["over_all"]["accepted"] == {"mean": 1, "least": 1, "most": 1, "deviation": 0}


def test_drawn_traces_give_the_same_figures_however_many_processes_share_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = []
    arguments = ["simulate", "--policy", "market-table", "--seeds", "3", "--count", "30", "--load", "2"]
    for jobs in ("1", "2"):
        assert main([*arguments, "--jobs", jobs]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]
    assert told[0].startswith("3 traces of 30 offers each, offered load 2, 1 x 8 GPUs; mean (least..most)")


def test_a_written_trace_is_the_one_that_simulate_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "drawn.jsonl"
    assert main(["trace", "--count", "40", "-o", str(path)]) == 0
    assert main(["trace", "--count", "40"]) == 0
    assert capsys.readouterr().out == path.read_text(encoding="utf-8")
    assert main(["simulate", "--policy", "strategy-8xh100", "--offers", str(path)]) == 0
    given = capsys.readouterr().out.splitlines()
    assert main(["simulate", "--policy", "strategy-8xh100", "--seeds", "1", "--count", "40"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == given[1:]


FAULTS: list[tuple[list[str], int, str]] = [
    (["--policy", "nope"], 2, "nope is neither a file nor a preset; presets are balanced-4, expected-value, lab"),
    (["--policy", "lab", "--policy", "lab"], 2, "a --policy is given twice"),
    (["--policy", "lab", "--offers", "none.jsonl"], 2, "none.jsonl cannot be read"),
    (["--policy", "lab", "--offers", "broken.jsonl"], 2, "broken.jsonl, line 1 is not JSON"),
    (["--policy", "lab", "--offers", "binary.jsonl"], 2, "binary.jsonl cannot be read"),
    (["--policy", "lab", "--offers", "broken.jsonl", "--seeds", "2"], 2, "leave them out where --offers"),
    (["--policy", "invalid.yaml"], 1, "invalid.yaml is not a valid CapacityPolicy"),
    (["--policy", "broken.jsonl"], 2, "broken.jsonl holds no CapacityPolicy"),
    (["--policy", "lab", "--seeds", "1", "--count", "1", "--json", "no/folder.json"], 1, "cannot be written"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "broken.jsonl").write_text("broken\n", encoding="utf-8")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "invalid.yaml").write_text("kind: CapacityPolicy\nspec: {}\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("arguments", "code", "message"), FAULTS)
def test_what_is_wrong_is_told_and_ends_with_its_code(
    arguments: list[str], code: int, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", *arguments]) == code
    told = capsys.readouterr()
    assert (told.err.startswith("taskoffer: "), told.out) == (True, "")
    assert message in told.err


def test_a_trace_that_cannot_be_written_ends_with_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "--count", "1", "-o", "no/folder.jsonl"]) == 1
    assert "no/folder.jsonl cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["simulate"],
        ["simulate", "--policy", "lab", "--seeds", "0"],
        ["simulate", "--policy", "lab", "--load", "nan"],
        ["simulate", "--policy", "lab", "--gpus", "many"],
        ["trace", "--load", "0"],
        ["trace", "--count", "1000001"],
        ["trace", "--seed", "-1"],
    ],
)
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: taskoffer" in capsys.readouterr().err


def test_ctrl_c_ends_quietly_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(work: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_run", interrupted)
    assert main(["simulate", "--policy", "lab", "--seeds", "2", "--jobs", "1"]) == 1
    assert capsys.readouterr().err == "taskoffer: interrupted\n"


class Watched(io.StringIO):
    """A standard error that says when something was written to it."""

    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self.written = threading.Event()
        self.isatty = lambda: terminal  # type: ignore[method-assign]

    def write(self, text: str) -> int:
        self.written.set()
        return super().write(text)


PROGRESS = r"[01] of 2 traces after \d+ s"


@pytest.mark.parametrize(("terminal", "shape"), [(False, rf"({PROGRESS}\n)+"), (True, rf"(\r{PROGRESS})+\n")])
def test_what_takes_long_tells_how_far_it_is(terminal: bool, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, run, runs = Watched(terminal=terminal), command._run, []

    def second_one_is_slow(work: Any) -> list[Figures]:
        runs.append(work.title)
        assert len(runs) == 1 or error.written.wait(30)
        return run(work)

    monkeypatch.setattr(command, "_run", second_one_is_slow)
    monkeypatch.setattr(command, "_QUIET_SECONDS", 0.2)
    monkeypatch.setattr(sys, "stderr", error)
    assert main(["simulate", "--policy", "lab", "--seeds", "2", "--count", "1", "--jobs", "1"]) == 0
    assert re.fullmatch(shape, error.getvalue())


def test_a_reader_that_has_seen_enough_ends_the_writing_without_a_word() -> None:
    program = [sys.executable, "-m", "taskoffer", "trace", "--count", "400"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "operator")}
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
