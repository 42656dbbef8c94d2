"""What has failed verification is taken for the best by no other attempt, unless there is nothing else."""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from taskoffer.api.contract import ExitCode, RunConfig, SubmitConfig, Termination
from taskoffer_trainer import concluding
from taskoffer_trainer.averaging import chosen
from taskoffer_trainer.checkpoints import (
    ADAPTER_FILE,
    AVERAGED_FILE,
    Checkpoint,
    best_checkpoint,
    complete_checkpoints,
    refuse,
)
from taskoffer_trainer.failures import StopRequestedError, TrainerError
from taskoffer_trainer.mirror import mirror_best, provisional_adapter, withdraw
from taskoffer_trainer.rewards import REWARD_FAILED
from taskoffer_trainer.submit import _located

from .test_mirror import checkpoint

pytestmark = pytest.mark.trainer


@pytest.fixture
def config(base_config: dict[str, Any], tmp_path: Path) -> RunConfig:
    place = {"outputDir": str(tmp_path / "out"), "checkpointDir": str(tmp_path / "checkpoints")}
    return RunConfig.model_validate({**base_config, **place})


def kept(config: RunConfig) -> int | None:
    folder = provisional_adapter(config)
    return None if folder is None else int(folder.name.split("-")[1])


def complete(config: RunConfig, step: int) -> Checkpoint:
    return next(one for one in complete_checkpoints(config) if one.step == step)


def test_the_next_attempt_keeps_the_next_best_and_not_what_was_refused(config: RunConfig) -> None:
    for step, loss in ((8, 0.9), (16, 0.5), (24, 0.1)):
        checkpoint(config, step, loss)
    best = []
    for step in (24, 16, 8):
        mirror_best(config)
        best.append(kept(config))
        refuse(complete(config, step), "its held-out loss is off")
    assert best == [24, 16, 8]
    # What still lies there is one of those, as when a kill came before it was removed.
    assert kept(config) == 8
    assert mirror_best(config) is None
    assert kept(config) is None
    checkpoint(config, 32, 2.0)
    mirror_best(config)
    assert kept(config) == 32


def test_what_was_refused_is_still_a_complete_checkpoint_and_rather_taken_than_what_learned_nothing(
    config: RunConfig,
) -> None:
    checkpoint(config, 8, 0.1, learned=False)
    checkpoint(config, 16, 0.5)
    refuse(complete(config, 16), "its held-out loss is off")
    found = complete_checkpoints(config, remove_broken=True)
    assert [(one.step, one.refused) for one in found] == [(16, True), (8, False)]
    assert best_checkpoint(found).step == 16


def test_of_the_two_adapters_of_a_checkpoint_each_is_refused_on_its_own(config: RunConfig) -> None:
    checkpoint(config, 8, 0.5)
    refuse(Checkpoint(complete(config, 8).folder, 8, 0.4, AVERAGED_FILE), "its held-out loss is off")
    assert not complete(config, 8).refused
    refuse(complete(config, 8), "so is this one's")
    assert complete(config, 8).refused


def test_a_refusal_that_cannot_be_written_is_told_and_the_next_best_has_its_turn(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(config, 8, 0.5)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("taskoffer_trainer.checkpoints.write_json", full)
    refuse(complete(config, 8), "its held-out loss is off")
    assert "REFUSED.json could not be written: [Errno 28]" in capsys.readouterr().out


Verified = Callable[[Checkpoint], None]


@pytest.fixture
def attempt(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Callable[[Verified], tuple[int, int]]:
    """Give what an attempt does after the training: the step that it publishes, and how many it says did not pass."""

    def run(verified: Verified) -> tuple[int, int]:
        def published(_course: Any, _baseline: Any, _summary: Any, best: Checkpoint, failed: int) -> tuple[int, int]:
            verified(best)
            return best.step, failed

        monkeypatch.setattr(concluding, "_published", published)
        course: Any = SimpleNamespace(config=config, accompany=lambda _: None, device=SimpleNamespace(cuda=False))
        mirror_best(config)
        best = best_checkpoint(complete_checkpoints(config))
        nothing: Any = None
        summary = Termination(exit_code=0, reason="Completed")
        found: Any = concluding.concluded(course, nothing, summary, best)
        return int(found[0]), int(found[1])

    return run


def failing(*steps: int, killed_at: int | None = None, seen: list[int] | None = None) -> Verified:
    def verified(best: Checkpoint) -> None:
        if seen is not None:
            seen.append(best.step)
        if best.step == killed_at:
            raise StopRequestedError
        if best.step in steps:
            raise TrainerError(ExitCode.VERIFY_FAILED, "VerifyFailed", f"step {best.step}: its held-out loss is off")

    return verified


Attempt = Callable[[Verified], tuple[int, int]]


def test_a_kill_while_the_next_best_is_verified_brings_what_was_refused_not_back(
    config: RunConfig, attempt: Attempt
) -> None:
    for step, loss in ((8, 0.9), (16, 0.5), (24, 0.1)):
        checkpoint(config, step, loss)
    with pytest.raises(StopRequestedError):
        attempt(failing(24, killed_at=16))
    assert kept(config) == 16
    seen: list[int] = []
    # One that is killed before it has verified anything leaves no other.
    with pytest.raises(StopRequestedError):
        attempt(failing(killed_at=16, seen=seen))
    assert (seen, kept(config)) == ([16], 16)
    assert attempt(failing(16, seen=seen)) == (8, 2)
    assert seen == [16, 16, 8]


class Killed(BaseException):
    """Stands for SIGKILL: nobody in the trainer catches it."""


def killed(*_: object) -> None:
    raise Killed


HANDED_OVER = {
    # What the output folder holds when a kill comes as this function is called, and no other attempt follows.
    "withdraw": 24,
    "refuse": None,
    "mirror": None,
    "_make_room": None,
}


@pytest.mark.parametrize("moment", HANDED_OVER)
def test_what_is_noted_as_refused_lies_nowhere_to_be_handed_over_whenever_the_kill_comes(
    config: RunConfig, attempt: Attempt, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step, loss in ((16, 0.5), (24, 0.1)):
        checkpoint(config, step, loss)
    monkeypatch.setattr(concluding, moment, killed)
    with pytest.raises(Killed):
        attempt(failing(24))
    assert kept(config) == HANDED_OVER[moment]
    # Before the first write nothing on disk tells the kill from one in the middle of the verification.
    assert not complete(config, 24).refused or kept(config) is None
    if kept(config) is None:
        with pytest.raises(TrainerError, match="its own verification did not refuse") as empty:
            _located(handed_over(config))
        assert (empty.value.code, empty.value.reason) == (74, "ResultEmpty")


def handed_over(config: RunConfig) -> SubmitConfig:
    """What the submit step is told when no attempt is left."""
    return SubmitConfig.model_validate(
        {
            "jobName": config.job_name,
            "taskID": config.task_id,
            "adapterDir": str(Path(config.output_dir) / "provisional"),
            "baseModel": config.model.name,
            "baseModelPath": config.model.path,
            "target": {"folder": "/handed-over"},
            "unverified": True,
            "provisional": True,
        }
    )


def test_an_average_that_is_refused_leaves_the_trained_weights_where_they_are(config: RunConfig) -> None:
    checkpoint(config, 8, 0.5)
    mirror_best(config)
    withdraw(config, Checkpoint(complete(config, 8).folder, 8, 0.4, AVERAGED_FILE))
    assert kept(config) == 8
    withdraw(config, complete(config, 8))
    assert kept(config) is None
    withdraw(config, complete(config, 8))


def test_the_verified_adapter_is_handed_over_and_not_the_best_so_far_that_still_lies_beside_it(
    config: RunConfig,
) -> None:
    checkpoint(config, 8, 0.5)
    mirror_best(config)
    told = handed_over(config)
    assert _located(told).adapter_dir.endswith(str(provisional_adapter(config)))
    verified = Path(config.output_dir) / "adapter"
    verified.mkdir()
    about: dict[str, Any] = {"provisional": False, "jobName": config.job_name, "taskID": config.task_id, "files": {}}
    for files, found in (({}, False), ({"adapter_model.safetensors": {}}, True)):
        (verified / "manifest.json").write_text(json.dumps({**about, "files": files}))
        assert (_located(told).adapter_dir == str(verified)) is found
    assert (_located(told).unverified, _located(told).provisional) == (False, False)


def test_where_all_were_refused_another_attempt_verifies_them_anew_and_keeps_none_of_them(
    config: RunConfig, attempt: Attempt
) -> None:
    for step, loss in ((16, 0.5), (24, 0.1)):
        checkpoint(config, step, loss)
    seen: list[int] = []

    def verified(best: Checkpoint) -> None:
        assert len(seen) < 2 or kept(config) is None
        failing(16, 24, seen=seen)(best)

    for _ in range(2):
        with pytest.raises(TrainerError, match="step 24") as failed:
            attempt(verified)
        assert (failed.value.code, failed.value.reason) == (74, "VerifyFailed")
        assert kept(config) is None
    assert seen == [24, 16, 24, 16]
    # As after a fault of what verified them.
    assert attempt(failing(24)) == (16, 1)


def course_with_an_average(config: RunConfig, measure: Callable[[], dict[str, float]]) -> Any:
    checkpoint(config, 8, 0.5)
    newest = checkpoint(config, 16, 0.6)
    (newest / AVERAGED_FILE).write_bytes(b"")
    average = SimpleNamespace(restore=lambda _: None, in_place=contextlib.nullcontext)
    return SimpleNamespace(
        config=config,
        rank=0,
        world=SimpleNamespace(share=lambda one: one),
        average=average,
        progress=SimpleNamespace(enter=lambda _: None, note=lambda **_: None),
        trainer=SimpleNamespace(model=None),
        measure=lambda *_: measure(),
        candidates={},
    )


def the_choice(course: Any) -> tuple[int, str]:
    found = chosen(course, lambda: None)
    return found.step, found.weights


def test_an_average_that_was_refused_is_not_chosen_again(config: RunConfig) -> None:
    course = course_with_an_average(config, lambda: {"eval_loss": 0.4})
    assert the_choice(course) == (16, AVERAGED_FILE)
    refuse(chosen(course, lambda: None), "its held-out loss is off")
    assert the_choice(course) == (8, ADAPTER_FILE)


def test_the_average_is_chosen_where_all_that_was_trained_was_refused(config: RunConfig) -> None:
    course = course_with_an_average(config, lambda: {"eval_loss": 0.7})
    assert the_choice(course) == (8, ADAPTER_FILE)
    refuse(complete(config, 8), "its held-out loss is off")
    assert the_choice(course) == (16, ADAPTER_FILE)
    refuse(complete(config, 16), "its held-out loss is off")
    assert the_choice(course) == (16, AVERAGED_FILE)


def test_rewards_that_fail_when_the_average_is_measured_do_not_cost_what_was_trained(
    config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = REWARD_FAILED

    def measure() -> dict[str, float]:
        raise TrainerError(ExitCode.BAD_CONFIG, reason, "in 3 evaluations in a row mine gave no value")

    course = course_with_an_average(config, measure)
    assert the_choice(course) == (8, ADAPTER_FILE)
    assert "the average is not measured: in 3 evaluations in a row mine gave no value" in capsys.readouterr().out
    reason = "Another"
    with pytest.raises(TrainerError):
        chosen(course, lambda: None)
