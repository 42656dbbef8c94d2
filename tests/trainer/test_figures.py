"""What a training process says that it took: peaks of memory, where there is one to measure."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from taskoffer.api.contract import FigureChange, Report, RunConfig, Termination
from taskoffer_trainer.export import Result, _card
from taskoffer_trainer.figures import as_held_out, in_a_cell, largest_peaks, metrics_of, peaks
from taskoffer_trainer.reporting import text_of

pytestmark = pytest.mark.trainer

GIB = 2**30


def fake_torch(*, available: bool = True, initialized: bool = True) -> Any:
    """A GPU of 80 GiB: the allocator holds 20 GiB now and held 50, and 3 GiB are in use beside it."""
    cuda = SimpleNamespace(
        is_available=lambda: available,
        is_initialized=lambda: initialized,
        mem_get_info=lambda: (57 * GIB, 80 * GIB),
        memory_reserved=lambda: 20 * GIB,
        max_memory_reserved=lambda: 50 * GIB,
    )
    return SimpleNamespace(cuda=cuda)


def test_a_gpus_peak_counts_what_no_allocator_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", fake_torch())
    assert peaks()["peak_gpu_bytes"] == 53 * GIB


@pytest.mark.parametrize("state", [{"available": False}, {"initialized": False}])
def test_without_cuda_there_is_no_peak_of_a_gpu(monkeypatch: pytest.MonkeyPatch, state: dict[str, bool]) -> None:
    monkeypatch.setitem(sys.modules, "torch", fake_torch(**state))
    assert peaks()["peak_gpu_bytes"] is None


def test_the_resident_sets_peak_is_this_programs_in_bytes_and_needs_no_torch() -> None:
    code = (
        "import sys; from taskoffer_trainer.figures import peaks; held = bytearray(b'x') * (200 << 20); "
        "made = peaks(); assert 'torch' not in sys.modules; assert made['peak_gpu_bytes'] is None; "
        "print(made['peak_host_bytes'])"
    )
    # Whoever starts a program may be larger than it; that is not the program's peak.
    large = f"import subprocess, sys; held = bytearray(b'x') * (600 << 20); subprocess.run([sys.executable, '-c', {code!r}], check=True)"  # noqa: E501
    made = subprocess.run([sys.executable, "-c", large], capture_output=True, text=True, check=True, timeout=60)
    assert 200 << 20 < int(made.stdout) < 400 << 20


def test_the_largest_peak_of_all_ranks_counts() -> None:
    said = [
        Termination(exit_code=0, reason="Completed", peak_host_bytes=5, peak_gpu_bytes=7),
        None,
        Termination(exit_code=0, reason="Completed", peak_host_bytes=6),
    ]
    assert largest_peaks(said) == {"peak_host_bytes": 6, "peak_gpu_bytes": 7}
    assert largest_peaks([None]) == {"peak_host_bytes": None, "peak_gpu_bytes": None}


def test_held_out_figures_have_names_that_the_training_itself_does_not_use() -> None:
    assert as_held_out({"eval_loss": 1.0, "reward": 2.0}) == {"eval_loss": 1.0, "eval_reward": 2.0}


def test_figures_travel_as_text_with_all_digits_of_counts_and_without_what_is_not_finite() -> None:
    figures = {"tokens": 12345678901.0, "loss": 1.23456789, "nan": float("nan"), "n" * 80: -3}
    said = [(one.name, one.value) for one in metrics_of(figures)]
    assert said == [("loss", "1.23457"), ("n" * 48 + "-feed930b", "-3"), ("tokens", "12345678901")]


@pytest.mark.parametrize("length", [40, 45, 46, 51, 52, 63])
def test_figures_of_long_names_stay_apart_and_find_what_was_before(length: int) -> None:
    """Of rewards, the last letter of whose names is another one; in the status one name has one value."""
    names = [f"reward_{'n' * (length - 1)}{last}" for last in "ab"]
    now = as_held_out({names[0]: 1.0, names[1]: 2.0})
    said = metrics_of({**now, **{f"{name}_before": -value for name, value in now.items()}})
    found = {one.name: float(one.value) for one in said}
    assert len(found) == 4
    assert sorted(found.values()) == [-2, -1, 1, 2]
    after = {name: value for name, value in found.items() if not name.endswith("_before")}
    assert {name: -found[f"{name}_before"] for name in after} == after


def test_a_name_with_signs_of_its_own_stays_in_its_cell() -> None:
    assert in_a_cell("eval_reward_a|b\n| c") == "eval reward a\\|b \\| c"
    figures = (FigureChange(name="eval_reward_a|b\nc", before=1.0, after=2.0),)
    told = {"job_name": "job", "task_id": "t", "task_type": "GRPO", "base_model": "a/b", "reason": "R", "message": ""}
    text = text_of(Report(result="Nothing", step=1, figures=figures, **told))
    assert "| eval reward a\\|b c | 1.0000 |  | 2.0000 |" in text.splitlines()
    result = Result(1, 1, None, {"a|b": 1.0}, {"a|b": 2.0}, "Completed")
    wire = {
        "jobName": "j",
        "taskID": "t",
        "taskType": "GRPO",
        "gpus": 1,
        "lora": {},
        "train": {},
        "data": {"path": "/d"},
    }
    config = RunConfig.model_validate(
        {**wire, "model": {"name": "a/b", "path": "/m"}, "outputDir": "/o", "checkpointDir": "/c"}
    )
    assert "| a\\|b, 0 rows | 1.0000 | 2.0000 |" in _card(config, result).splitlines()
