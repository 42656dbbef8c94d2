"""The simulator's word on what perfect foresight would have earned, its plot, and the traces that ship with it."""

from __future__ import annotations

import gzip
import io
import json
import os
import threading
from pathlib import Path

import pytest
import yaml

from builders import make_policy
from core_builders import policy_spec
from simulation_builders import POLICY, entry, trace_of
from taskoffer.cli import simulate as simulate_command
from taskoffer.cli.main import main
from taskoffer.simulation import extras
from taskoffer.simulation.engine import Fleet, simulate
from taskoffer.simulation.hindsight import Hindsight, in_hindsight
from taskoffer.simulation.market import generate
from taskoffer.simulation.trace import write_trace
from taskoffer.simulation.truth import tasks_of

TRACES = Path(__file__).resolve().parents[2] / "examples" / "traces"


def test_hindsight_makes_room_for_what_a_policy_could_not_know_would_come() -> None:
    # The dear offer comes when the cheap one, which came first, holds all four GPUs.
    trace = trace_of(
        entry("cheap", gpus=4, seconds=1000, worth=1),
        entry("dear", at=100, gpus=4, seconds=1000, patience=60, worth=5),
        seconds=2000,
    )
    fleet = Fleet(1, 4)
    had = simulate(trace, POLICY, fleet=fleet)
    assert sum(run.worth for run in had.runs) == 1
    found = in_hindsight(trace, ("p", POLICY), fleet, 2, hint=had.runs)
    assert 5 <= found.worth <= found.bound + 0.001 <= 6.002
    assert any("dear" in run.name for run in found.runs)
    assert found.share(1) == pytest.approx(1 / found.worth)


def test_of_a_schedule_that_earns_nothing_every_share_is_nothing() -> None:
    assert Hindsight("p", (), 0.0, 0.0, 1.0).share(3) == 0.0


def test_the_command_tells_each_policys_share_of_the_best_and_draws_the_gpus(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawing, figures = tmp_path / "gpus.svg", tmp_path / "figures.json"
    arguments = ["simulate", "--policy", "market-table", "--policy", "expected-value", "--seeds", "1", "--count", "25"]
    assert main([*arguments, "--best", "3", "--plot", str(drawing), "--json", str(figures)]) == 0
    told = capsys.readouterr().out
    assert "Best schedule found in hindsight, 3 s each, trained as under" in told
    shares = {line.split()[0]: float(line.split()[1]) for line in told.splitlines()[-2:]}
    assert set(shares) == {"market-table", "expected-value"}
    assert all(0 < share <= 1.0001 for share in shares.values())
    (best,) = json.loads(figures.read_text(encoding="utf-8"))["best_in_hindsight"]
    assert best["worth"] <= best["bound"] * 1.0001
    assert best["runs"]
    text = drawing.read_text(encoding="utf-8")
    assert text.startswith("<?xml")
    assert "best in hindsight" in text


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--plot", "gpus.pdf"], 2, "--plot gpus.pdf is neither .svg nor .png"),
        (["--plot", "g.svg", "--plot-hours", "5", "5"], 2, "--plot-hours needs an earlier and a later hour"),
        (["--plot", "none/g.svg"], 1, "none/g.svg cannot be written: there is no folder none, make it first"),
        (["--plot", "taken.svg"], 1, "taken.svg cannot be written: it is a folder, give a file in it"),
        (["--json", "none/f.json"], 1, "none/f.json cannot be written: there is no folder none"),
        (["--json", "."], 1, ". cannot be written: it is a folder"),
        (["--json", "/proc/version"], 1, "/proc/version cannot be written: "),
        (["--json", "g.svg", "--plot", "g.svg"], 2, "--json and --plot would both write g.svg"),
    ],
)
def test_what_cannot_be_written_is_told_before_anything_is_simulated(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.svg").mkdir()
    monkeypatch.setattr(simulate_command, "_run", lambda _: pytest.fail("it was simulated"))
    assert main(["simulate", "--policy", "lab", "--seeds", "1", "--count", "2", *arguments]) == code
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken.svg"]


def test_a_file_that_is_there_keeps_its_content_when_nothing_comes_of_the_simulation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    target = tmp_path / "figures.json"
    target.write_text("of yesterday", encoding="utf-8")
    monkeypatch.setattr(simulate_command, "_run", interrupted)
    assert main(["simulate", "--policy", "lab", "--seeds", "1", "--count", "2", "--json", str(target)]) == 1
    assert target.read_text(encoding="utf-8") == "of yesterday"


def test_figures_can_go_into_a_pipe(tmp_path: Path) -> None:
    pipe, taken = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: taken.append(json.loads(pipe.read_text(encoding="utf-8"))))
    reader.start()
    assert main(["simulate", "--policy", "lab", "--seeds", "1", "--count", "2", "--json", str(pipe)]) == 0
    reader.join(timeout=30)
    assert taken[0]["nodes"] == 1


@pytest.mark.parametrize("hours", [("0", "inf"), ("nan", "5"), ("-1", "5"), ("0", "1e9"), ("0", "soon")])
def test_hours_that_no_trace_has_are_wrong_usage(hours: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["simulate", "--policy", "lab", "--seeds", "1", "--plot", "g.svg", "--plot-hours", *hours])
    assert end.value.code == 2
    assert "argument --plot-hours" in capsys.readouterr().err


@pytest.mark.parametrize("wanted", [["--best", "5"], ["--plot", "g.svg"]])
def test_without_the_extra_the_command_says_what_to_install_before_it_computes_anything(
    wanted: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(module: str) -> object:
        raise extras.MissingExtraError(f"{module.partition('.')[0]} is not installed: pip install '.[simulate]'")

    monkeypatch.setattr(extras, "load", missing)
    assert main(["simulate", "--policy", "lab", "--seeds", "1", *wanted]) == 1
    told = capsys.readouterr()
    assert "is not installed: pip install '.[simulate]'" in told.err
    assert told.out == ""


@pytest.mark.parametrize("load", [0.5, 1, 2])
def test_the_traces_that_ship_are_those_that_the_generator_draws(load: float) -> None:
    drawn = io.StringIO()
    write_trace(generate(0, load, 1000), drawn)
    with gzip.open(TRACES / f"load-{load:g}.jsonl.gz", "rt", encoding="utf-8") as file:
        assert file.read() == drawn.getvalue()


def test_a_compressed_trace_is_written_the_same_each_time_and_read_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / name for name in ("one.jsonl.gz", "two.jsonl.gz")]
    for path in paths:
        assert main(["trace", "--count", "5", "-o", str(path)]) == 0
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert main(["simulate", "--policy", "lab", "--offers", str(paths[0])]) == 0
    assert "5" in capsys.readouterr().out
    paths[1].write_bytes(paths[0].read_bytes()[:100])
    assert main(["simulate", "--policy", "lab", "--offers", str(paths[1])]) == 2
    assert "two.jsonl.gz cannot be read" in capsys.readouterr().err


def test_a_damaged_trace_is_told_and_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "damaged.jsonl.gz"
    packed = bytearray((TRACES / "load-1.jsonl.gz").read_bytes())
    packed[2000:2100] = bytes(100)
    path.write_bytes(bytes(packed))
    assert main(["simulate", "--policy", "lab", "--offers", str(path)]) == 2
    assert "damaged.jsonl.gz" in capsys.readouterr().err


def test_hindsight_gives_each_gpu_count_its_own_last_start_before_a_deadline() -> None:
    # Under the table's settings an offer of many rows is done sooner on more GPUs.
    policy, fleet = policy_spec(preset="market-table"), Fleet(1, 4)
    offer = {"rows": 100_000, "policy": policy, "hours": 9.0}
    trace = trace_of(
        entry("first", gpus=4, seconds=900, worth=1, patience=60, **offer),
        entry("due", at=1, seconds=3000, spec={"deadline": "2026-01-01T01:00:00Z"}, worth=5, **offer),
        seconds=4000,
    )
    due = {task.name: task for task in tasks_of(trace, policy)}["due"]
    assert due.last_start_on(1) == pytest.approx(600, abs=1)
    assert due.last_start_on(1) < due.last_start_on(2) < due.last_start_on(4)
    found = in_hindsight(trace, ("p", policy), fleet, 2)
    late = next(run for run in found.runs if run.name == "due")
    assert late.start <= due.last_start_on(late.gpus) + 1e-6
    assert late.end <= 3600 + 1e-6
    assert (found.worth, found.bound) == (pytest.approx(6), pytest.approx(6, rel=1e-4))


def test_the_command_searches_a_trace_with_deadlines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    due = tmp_path / "due.jsonl"
    with due.open("w", encoding="utf-8") as file:
        write_trace(trace_of(entry("a", seconds=600, spec={"deadline": "2026-01-01T06:00:00Z"}), seconds=100), file)
    assert main(["simulate", "--policy", "lab", "--offers", str(due), "--best", "1"]) == 0
    assert "Best schedule found in hindsight" in capsys.readouterr().out


def test_gpus_that_are_shared_cannot_be_drawn_and_that_is_said_before_it_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shared = tmp_path / "shared.yaml"
    pool = {"name": "nvidia.com/gpu.shared", "counts": [1], "unitsPerGpu": 2}
    sizes = [{"name": "All", "minParameters": 0, "gpus": 1, "sizeEfficiency": "1", "lora": {}, "train": {}}]
    shared.write_text(yaml.safe_dump(make_policy(resources=[pool], size_classes=sizes)), encoding="utf-8")
    assert main(["simulate", "--policy", str(shared), "--seeds", "1", "--count", "2", "--plot", "x.svg"]) == 2
    assert "--plot draws whole GPUs" in capsys.readouterr().err
