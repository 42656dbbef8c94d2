"""The best adapter so far lies whole in the output folder at every moment from the first checkpoint on."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from taskoffer.api.contract import RunConfig, Termination
from taskoffer_trainer import launcher
from taskoffer_trainer.checkpoints import (
    complete_checkpoints,
    finished_run,
    mark_finished,
    remove_checkpoints,
    rotate,
)
from taskoffer_trainer.mirror import mirror_best, provisional_adapter, provisional_folders, remove_provisional
from taskoffer_trainer.world import World

pytestmark = pytest.mark.trainer


@pytest.fixture
def config(base_config: dict[str, Any], tmp_path: Path) -> RunConfig:
    place = {"outputDir": str(tmp_path / "out"), "checkpointDir": str(tmp_path / "checkpoints")}
    return RunConfig.model_validate({**base_config, **place})


def checkpoint(config: RunConfig, step: int, loss: float | None, weights: bytes = b"", learned: bool = True) -> Path:
    """Lay down what a complete checkpoint has of what is copied."""
    folder = Path(config.checkpoint_dir) / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    data = weights or f"weights of step {step}".encode()
    (folder / "adapter_model.safetensors").write_bytes(data)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/data/model", "r": 8}))
    files = {"adapter_model.safetensors": [len(data), hashlib.sha256(data).hexdigest()]}
    (folder / "COMPLETE").write_text(json.dumps({"step": step, "eval_loss": loss, "learned": learned, "files": files}))
    return folder


def manifest_of(folder: Path) -> dict[str, Any]:
    value = json.loads((folder / "manifest.json").read_text())
    assert isinstance(value, dict)
    return value


def test_without_a_checkpoint_there_is_nothing_to_keep(config: RunConfig) -> None:
    assert mirror_best(config) is None
    assert provisional_adapter(config) is None


def test_what_has_learned_nothing_is_not_kept_whatever_its_loss_is(config: RunConfig) -> None:
    checkpoint(config, 5, 0.1, learned=False)
    assert mirror_best(config) is None
    checkpoint(config, 8, 0.3)
    folder = mirror_best(config)
    assert folder is not None
    assert manifest_of(folder)["step"] == 8
    checkpoint(config, 16, 0.2, learned=False)
    assert mirror_best(config) == folder


def test_what_is_kept_is_whole_says_that_it_is_provisional_and_names_the_public_base_model(config: RunConfig) -> None:
    checkpoint(config, 5, None)
    folder = mirror_best(config)
    assert folder is not None
    assert folder == provisional_adapter(config)
    manifest = manifest_of(folder)
    assert (manifest["provisional"], manifest["step"], manifest["evalLoss"]) == (True, 5, None)
    assert set(manifest["files"]) == {"adapter_config.json", "adapter_model.safetensors"}
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "acme/tiny-llama"


def test_what_its_user_needs_beside_it_is_there_too_and_in_the_manifest(config: RunConfig) -> None:
    checkpoint(config, 5, None)
    folder = mirror_best(config, lambda path: path.joinpath("chat_template.jinja").write_text("{{ x }}") and None)
    assert folder is not None
    assert manifest_of(folder)["files"]["chat_template.jinja"]["bytes"] == len("{{ x }}")


def test_weights_on_the_same_file_system_are_not_copied_and_outlive_their_checkpoint(config: RunConfig) -> None:
    source = checkpoint(config, 5, 1.0) / "adapter_model.safetensors"
    folder = mirror_best(config)
    assert folder is not None
    kept = folder / "adapter_model.safetensors"
    assert kept.samefile(source)
    source.unlink()
    assert kept.read_bytes() == b"weights of step 5"


def test_where_files_cannot_have_two_names_they_are_copied(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    source = checkpoint(config, 5, 1.0) / "adapter_model.safetensors"
    folder = mirror_best(config)
    assert folder is not None
    assert (folder / "adapter_model.safetensors").read_bytes() == source.read_bytes()
    assert not (folder / "adapter_model.safetensors").samefile(source)


def test_only_a_better_checkpoint_takes_the_place_of_the_one_that_is_kept(config: RunConfig) -> None:
    kept = []
    for step, loss in ((5, None), (8, 2.0), (16, 3.0), (24, 1.0)):
        checkpoint(config, step, loss)
        folder = mirror_best(config)
        assert folder is not None
        kept.append(manifest_of(folder)["step"])
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert kept == [5, 8, 8, 24]


def test_what_another_run_left_under_the_same_step_is_not_taken_for_this_ones(config: RunConfig) -> None:
    folder = checkpoint(config, 5, 1.0, b"another run's")
    other = mirror_best(config)
    (folder / "adapter_model.safetensors").unlink()
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    checkpoint(config, 5, 1.0, b"this run's")
    mine = mirror_best(config)
    assert mine is not None
    assert mine != other
    assert (mine / "adapter_model.safetensors").read_bytes() == b"this run's"
    assert [path.name for path in mine.parent.iterdir()] == [mine.name]


def test_it_goes_once_there_is_a_verified_result(config: RunConfig) -> None:
    checkpoint(config, 5, 1.0)
    mirror_best(config)
    remove_provisional(config)
    assert provisional_adapter(config) is None
    assert list(Path(config.output_dir).iterdir()) == []
    remove_provisional(config)


def test_a_provisional_adapter_is_never_taken_for_a_finished_run(config: RunConfig) -> None:
    """Neither where it lies nor under the finished one's name."""
    checkpoint(config, 5, 1.0)
    folder = mirror_best(config)
    assert folder is not None
    digest = manifest_of(folder)["files"]["adapter_model.safetensors"]["sha256"]
    mark_finished(config, Termination(exit_code=0, reason="Completed", adapter_sha256=digest))
    assert finished_run(config) is None
    folder.rename(Path(config.output_dir) / "adapter")
    assert finished_run(config) is None
    manifest = Path(config.output_dir) / "adapter" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "provisional": False}))
    assert finished_run(config) is not None


def test_the_checkpoints_of_a_finished_run_go_unless_they_are_to_be_kept(config: RunConfig) -> None:
    folders = [checkpoint(config, 5, 1.0), checkpoint(config, 8, 0.9)]
    (folders[1] / "COMPLETE").unlink()
    mark_finished(config, Termination(exit_code=0, reason="Completed"))
    remove_checkpoints(config.model_copy(update={"train": config.train.model_copy(update={"keep_checkpoints": True})}))
    assert all(folder.is_dir() for folder in folders)
    remove_checkpoints(config.model_copy(update={"train": config.train.model_copy(update={"keep_checkpoints": False})}))
    assert [path.name for path in Path(config.checkpoint_dir).iterdir()] == ["FINISHED.json"]


def test_a_checkpoint_that_cannot_be_removed_is_told_and_costs_nothing_else(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stuck, other = checkpoint(config, 8, 0.9), checkpoint(config, 5, 1.0)
    remove = shutil.rmtree

    def busy(folder: Path) -> None:
        if folder == stuck:
            raise OSError(errno.EBUSY, "Device or resource busy", str(folder))
        remove(folder)

    monkeypatch.setattr("shutil.rmtree", busy)
    remove_checkpoints(config.model_copy(update={"train": config.train.model_copy(update={"keep_checkpoints": False})}))
    assert (stuck.is_dir(), other.exists()) == (True, False)
    assert f"{stuck} is not needed any more and could not be removed: [Errno 16]" in capsys.readouterr().out


def no_room(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def saved(config: RunConfig, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a training save a checkpoint, whose tensors nobody looks at."""
    from taskoffer_trainer import callbacks
    from taskoffer_trainer.timings import Timings

    monkeypatch.setattr(callbacks, "mark_complete", lambda *_: None)
    steps: Any = SimpleNamespace(world=World(), keep=lambda _: None)
    keeper = callbacks.CheckpointKeeper(config, 0, steps, Timings(), lambda _: None)
    keeper.on_save(SimpleNamespace(output_dir=config.checkpoint_dir), SimpleNamespace(global_step=step), None)


def test_an_output_folder_without_room_costs_no_training_and_the_next_checkpoint_tries_again(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(config, 8, 0.9)
    before = mirror_best(config)
    checkpoint(config, 16, 0.8)
    with monkeypatch.context() as full:
        full.setattr(os, "link", no_room)
        full.setattr(shutil, "copyfile", no_room)
        saved(config, 16, full)
    assert "could not be brought up to step 16: [Errno 28] No space left on device" in capsys.readouterr().out
    assert provisional_adapter(config) == before
    saved(config, 24, monkeypatch)
    after = provisional_adapter(config)
    assert after is not None
    assert manifest_of(after)["step"] == 16


def busy(*names: str) -> Callable[..., None]:
    """Remove folders, but not those with such a name, as on a network share where somebody reads what lies there."""
    remove = shutil.rmtree

    def removed(folder: Path, ignore_errors: bool = False) -> None:
        if not folder.name.startswith(names):
            remove(folder, ignore_errors=ignore_errors)
        elif folder.is_dir() and not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(folder))

    return removed


def test_what_cannot_be_removed_is_out_of_sight_and_costs_neither_training_nor_result(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(config, 8, 0.9)
    mirror_best(config)
    checkpoint(config, 16, 0.8)
    monkeypatch.setattr(shutil, "rmtree", busy(".step-8-", ".provisional.old"))
    folder = mirror_best(config)
    assert folder is not None
    assert provisional_folders(folder.parent) == [folder]
    remove_provisional(config)
    assert provisional_adapter(config) is None
    assert capsys.readouterr().out.count("could not be removed: [Errno 39]") >= 2
    monkeypatch.undo()
    remove_provisional(config)
    assert list(Path(config.output_dir).iterdir()) == []


def test_a_finished_run_stays_finished_where_its_provisional_adapter_cannot_even_be_hidden(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(config, 8, 0.9)
    mirror_best(config)
    done = Termination(exit_code=0, reason="Completed", adapter_sha256="0")
    monkeypatch.setattr(launcher, "finished_run", lambda _: done)
    monkeypatch.setattr(Path, "rename", no_room)
    monkeypatch.setattr(launcher, "has_report", lambda _: True)
    assert launcher.launch(config) == done
    assert "could not be removed: [Errno 28]" in capsys.readouterr().out


def test_a_fallback_profile_that_cannot_be_noted_does_not_hide_what_has_ended_the_attempt(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("taskoffer_trainer.fallback.write_run", no_room)
    launcher._fall_back(config, Termination(exit_code=138, reason="OutOfMemory"))
    assert "no fallback profile could be noted" in capsys.readouterr().out


def test_a_checkpoint_too_many_that_cannot_be_removed_costs_no_training(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for step, loss in ((8, 0.9), (16, 0.8), (24, 0.7), (32, 0.6)):
        checkpoint(config, step, loss)
    monkeypatch.setattr(shutil, "rmtree", busy("checkpoint-16"))
    rotate(config)
    assert "checkpoint-16 is one too many and could not be removed: [Errno 39]" in capsys.readouterr().out
    # It counts no more, and the others that are too many are gone.
    assert [one.step for one in complete_checkpoints(config)] == [32, 24]


# A child brings the output folder up to two checkpoints, each better than the one before, and is killed at its n-th
# operation on files; the parent then looks at what there is. It ends when a child comes through unharmed.
KILLS = """
import hashlib, json, os, shutil, signal, sys
from pathlib import Path
from taskoffer.api.contract import RunConfig
from taskoffer_trainer.mirror import mirror_best, provisional_adapter

sys.path.insert(0, sys.argv[1])
from mirror_pieces import lay_down

config = RunConfig.model_validate_json(sys.argv[2])
output, checkpoints = Path(config.output_dir), Path(config.checkpoint_dir)
TOUCHING = ("open", "os.", "shutil.")
# What the kernel was told stays told when a program is killed, and a disk is slow.
os.fsync = lambda _: None


def work(kill_at):
    count = 0

    def count_and_kill(event, _):
        nonlocal count
        if event.startswith(TOUCHING):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count_and_kill)
    for step, loss in ((8, 2.0), (16, 1.5)):
        lay_down(config, step, loss)
        mirror_best(config)


def faults():
    if provisional_adapter(config) is None:
        return ["there is no adapter"]
    # Whichever of them somebody finds must be whole.
    return [fault for folder in (output / "provisional").glob("step-*") for fault in faults_of(folder)]


def faults_of(folder):
    if not (folder / "manifest.json").is_file():
        return ["there is no manifest"]
    manifest = json.loads((folder / "manifest.json").read_text())
    found = [] if manifest["provisional"] is True else ["not marked as provisional"]
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
            found.append(f"{name} is not what the manifest says")
    return found


kills = 0
while True:
    for folder in (output, checkpoints):
        shutil.rmtree(folder, ignore_errors=True)
    lay_down(config, 5, None)
    mirror_best(config)
    child = os.fork()
    if child == 0:
        work(kills + 1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert not faults(), (kills + 1, faults())
    again = mirror_best(config)
    assert not faults()
    assert [path.name for path in again.parent.iterdir()] == [again.name]
    if os.waitstatus_to_exitcode(status) == 0:
        break
    kills += 1
print(kills)
"""


def test_a_kill_at_any_operation_on_files_leaves_a_whole_adapter(config: RunConfig, tmp_path: Path) -> None:
    pieces = tmp_path / "pieces"
    pieces.mkdir()
    (pieces / "mirror_pieces.py").write_text(
        "import hashlib, json\nfrom pathlib import Path\n\n\n"
        "def lay_down(config, step, loss):\n"
        "    folder = Path(config.checkpoint_dir) / f'checkpoint-{step}'\n"
        "    folder.mkdir(parents=True)\n"
        "    data = f'weights of step {step}'.encode()\n"
        "    (folder / 'adapter_model.safetensors').write_bytes(data)\n"
        "    (folder / 'adapter_config.json').write_text('{}')\n"
        "    files = {'adapter_model.safetensors': [len(data), hashlib.sha256(data).hexdigest()]}\n"
        "    record = {'step': step, 'eval_loss': loss, 'files': files}\n"
        "    (folder / 'COMPLETE.tmp').write_text(json.dumps(record))\n"
        "    (folder / 'COMPLETE.tmp').rename(folder / 'COMPLETE')\n"
    )
    wire = config.model_dump_json(by_alias=True, exclude_none=True)
    command = [sys.executable, "-c", KILLS, str(pieces), wire]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert said.returncode == 0, said.stderr
    # Two adapters are put together, renamed and removed; that many operations are the least there can be.
    assert int(said.stdout) >= 25
