"""Process 1: nobody is left behind, whoever dies, and the exit code is the one that explains the run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from taskoffer.api.contract import RunConfig, Termination
from taskoffer_trainer.clock import Clock, process_started
from taskoffer_trainer.launcher import RankEnd, decide, rank_environment

from .conftest import MakeTraining, Training

pytestmark = pytest.mark.trainer


@pytest.fixture(scope="module")
def preloader() -> None:
    """Who is process 1, and of whom, is what this is about; so everything is started as in a pod."""


def said(code: int, reason: str) -> Termination:
    return Termination(exit_code=code, reason=reason)


DECISIONS = [
    ("all done", [RankEnd(0, 0, 2.0), RankEnd(1, 0, 1.0)], 0),
    ("the cause and not what followed", [RankEnd(0, 70, 1.0), RankEnd(1, 138, 1.1, said=said(138, "X"))], 1),
    ("the first of equal failures", [RankEnd(0, 70, 2.0), RankEnd(1, 70, 1.0)], 1),
    ("killed by the kernel, the other by us", [RankEnd(0, 137, 9.0, by_us=True), RankEnd(1, 137, 1.0)], 1),
    ("stopped wins over done", [RankEnd(0, 143, 2.0), RankEnd(1, 0, 1.0)], 0),
    ("the stop that says how far", [RankEnd(0, 143, 2.0), RankEnd(1, 143, 1.0, said=said(143, "Stopped"))], 1),
    ("stopped, the other did not follow", [RankEnd(0, 137, 9.0, by_us=True), RankEnd(1, 143, 1.0)], 1),
    ("only killed by us", [RankEnd(0, 137, 9.0, by_us=True)], 0),
    ("out of memory in Python before a broken collective", [RankEnd(0, 70, 1.0), RankEnd(1, 138, 2.0)], 1),
]


@pytest.mark.parametrize(("ends", "rank"), [case[1:] for case in DECISIONS], ids=[case[0] for case in DECISIONS])
def test_the_rank_that_explains_the_run_is_chosen(ends: list[RankEnd], rank: int) -> None:
    assert decide(ends).rank == rank


def test_a_signal_that_comes_before_the_configuration_is_read_ends_the_run_with_143(tmp_path: Path) -> None:
    """As process 1 it would not get one that it does not wait for."""
    config = tmp_path / "run.json"
    os.mkfifo(config)
    command = [sys.executable, "-m", "taskoffer_trainer", "--config", str(config)]
    program = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # Whoever opens a pipe to write waits for its reader.
    with program, config.open("w"):
        program.send_signal(signal.SIGTERM)
        assert program.wait(30) == 143


def test_a_rank_is_offline_and_keeps_a_thread_count_that_is_set(
    training: MakeTraining, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    # torch sets some of these itself when another test imports it in this process.
    for name in ("HF_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    config = RunConfig.model_validate(training().config)
    clock = Clock.of(config, process_started())
    alone = rank_environment(config, 0, 0, tmp_path, clock)
    assert (alone["OMP_NUM_THREADS"], alone["MKL_NUM_THREADS"], alone["HF_HUB_OFFLINE"]) == ("3", "1", "1")
    assert "RANK" not in alone
    assert alone["CUDA_VISIBLE_DEVICES"] == "2"
    second = rank_environment(config.model_copy(update={"gpus": 2}), 1, 4711, tmp_path, clock)
    assert (second["RANK"], second["WORLD_SIZE"], second["MASTER_PORT"]) == ("1", "2", "4711")
    assert second["CUDA_VISIBLE_DEVICES"] == "2,3"
    for name in ("HF_HOME", "TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        assert Path(second[name]).is_relative_to(tmp_path)


def gone(pid: int) -> bool:
    """Tell whether a process has ended and was reaped."""
    return not Path(f"/proc/{pid}").exists()


def two_ranks(run: Training) -> list[int]:
    """Wait until two ranks note signals; before that they may not even have become a program of their own."""
    ranks: list[int] = run.wait_for(lambda: pids if len(pids := run.children()) == 2 else None)
    run.wait_for(lambda: all(is_rank(pid) for pid in ranks))
    return ranks


def is_rank(pid: int) -> bool:
    """Tell whether a process is a rank that notes signals, and so has tied its life to the launcher's."""
    command, status = Path(f"/proc/{pid}/cmdline"), Path(f"/proc/{pid}/status")
    if not command.exists() or b"taskoffer_trainer.rank" not in command.read_bytes():
        return False
    caught = int(next(line for line in status.read_text().splitlines() if line.startswith("SigCgt")).split()[1], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def test_process_1_serves_and_reports_without_the_heavy_libraries() -> None:
    code = (
        "import sys; import taskoffer_trainer.__main__; "
        "print(sorted({'torch', 'transformers', 'numpy', 'matplotlib', 'safetensors'} & set(sys.modules)))"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert said.stdout == "[]\n"


def test_one_killed_rank_ends_the_run_with_137_and_takes_the_others_along(training: MakeTraining) -> None:
    run = training(gpus=2).start()
    first, second = two_ranks(run)
    os.kill(first, signal.SIGKILL)
    outcome = run.finish()
    assert (outcome.code, outcome.termination["reason"]) == (137, "Killed"), outcome.log
    assert "rank 0 was killed by SIGKILL; as a rule the container ran out of memory" in outcome.termination["message"]
    assert gone(first)
    assert gone(second)
    assert list(run.tmp.iterdir()) == []


def test_a_rank_that_hangs_is_killed_after_another_one_failed(
    training: MakeTraining,
) -> None:
    run = training(gpus=2).start()
    first, second = two_ranks(run)
    os.kill(second, signal.SIGSTOP)  # A stopped process notices no SIGTERM, like one that waits in a collective.
    os.kill(first, signal.SIGKILL)
    outcome = run.finish()
    assert outcome.code == 137
    assert "ranks [1] did not follow, killing them" in outcome.log
    assert gone(second)


def test_the_ranks_die_with_the_launcher(training: MakeTraining) -> None:
    run = training(gpus=2).start()
    ranks = two_ranks(run)
    run.kill()
    run.wait_for(lambda: all(gone(pid) for pid in ranks))


def test_ctrl_c_twice_ends_at_once(training: MakeTraining) -> None:
    run = training(train={"maxSteps": 100000}).start()
    run.wait_for(lambda: [pid for pid in run.children() if is_rank(pid)])
    run.signal(signal.SIGINT)
    run.wait_for(lambda: "got SIGINT, stopping" in run.log)
    if run.children():
        run.signal(signal.SIGINT)
    assert run.finish().code in (130, 143)


def test_what_a_killed_rank_had_started_is_ended_and_reaped(training: MakeTraining) -> None:
    """The process that loads data becomes an orphan; process 1 inherits it and must not leave it running."""
    run = training(train={"dataloaderNumWorkers": 1, "maxSteps": 100000}).start()
    run.wait_for_step(1)
    (rank,) = run.children()
    loaders = [int(pid) for pid in Path(f"/proc/{rank}/task/{rank}/children").read_text().split()]
    assert loaders
    os.kill(rank, signal.SIGKILL)
    outcome = run.finish()
    assert outcome.code == 137
    # It had no time to say how far it came, but its last report has it.
    assert (outcome.termination["step"] >= 1, outcome.termination["totalSteps"]) == (True, 100000)
    assert gone(rank)
    assert all(gone(pid) for pid in loaders)


def test_a_progress_port_in_use_is_said(training: MakeTraining) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        run = training()
        run.environment["TASKOFFER_PROGRESS_PORT"] = str(port)
        outcome = run.run()
    assert (outcome.code, outcome.termination["reason"]) == (64, "PortInUse")
    assert f"progress port {port}" in outcome.termination["message"]
