"""A training that is killed at any moment of its course leaves whole results or none, and the next attempt ends well.

The moments are exact: each is a call of a function, in which the launcher and all ranks get SIGKILL, or one rank alone.
After each kill the same command is started again. ``test_killed.py`` kills what the command line itself has started.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.numpy import load_file

from .conftest import merge
from .kill_moments import Moment
from .preloaded import Preloader
from .test_images import pictures

pytestmark = pytest.mark.trainer

STEPS, EVERY, EARLY = 12, 6, 5
"""The first checkpoint comes before the first evaluation, which comes with the second."""
PROGRESS = "taskoffer_trainer.callbacks:Progress.enter"
"""Returns when the phase can be read from outside."""
LAUNCHER_SAYS = "taskoffer_trainer.__main__:write_termination"

# In the order in which a training comes to them.
TRAINING = {
    "its rows are read": Moment("taskoffer_trainer.rank:read_instruct"),
    "its base model is loaded": Moment("taskoffer_trainer.sft:load_model", after=True),
    "its base model is measured": Moment(PROGRESS, "Evaluating", after=True),
    "the base model's figures are written": Moment("pathlib:Path.replace", "run.json"),
    "it begins to train": Moment(PROGRESS, "Training", after=True),
    "its first checkpoint is not checked": Moment("taskoffer_trainer.callbacks:mark_complete"),
    "the mark of its first checkpoint is written": Moment("pathlib:Path.replace", "COMPLETE"),
    "its first adapter is built": Moment("pathlib:Path.rename", f"step-{EARLY}-*"),
    "it trains on without an evaluation": Moment("taskoffer_trainer.steps:StepTrainer.training_step"),
    "it evaluates": Moment(PROGRESS, "Evaluating", times=2, after=True),
    "its first checkpoint is being removed": Moment("shutil:rmtree", f"checkpoint-{EARLY}"),
    "it has two adapters": Moment("taskoffer_trainer.mirror:_remove"),
    "the worse of two adapters is being removed": Moment("shutil:rmtree", f".step-{EARLY}-*.old", times=2),
    "it takes its last step": Moment("taskoffer_trainer.steps:StepTrainer.training_step", times=STEPS - EVERY),
    "its last checkpoint is not mirrored": Moment("taskoffer_trainer.callbacks:mirror_best"),
    "it has trained": Moment("taskoffer_trainer.course:chosen"),
}
PUBLISHED = Moment("taskoffer_trainer.concluding:mark_finished")
# Each of these is tried on its own, on what the kill of a training that has trained has left.
END = {
    "half of the weights are copied": [Moment("shutil:copyfile", "adapter_model.safetensors", cut=True)],
    "it says that it verifies": [Moment(PROGRESS, "Verifying", after=True)],
    "the adapter is loaded": [Moment("taskoffer_trainer.sft:load_adapter", after=True)],
    "the adapter has answered": [Moment("taskoffer_trainer.concluding:check_answers", after=True)],
    "it says that it saves": [Moment(PROGRESS, "Saving", after=True)],
    "the manifest is written": [Moment("pathlib:Path.replace", "manifest.json")],
    "the manifest is in place": [Moment("pathlib:Path.rename", ".adapter.tmp")],
    "the adapter is in place": [PUBLISHED],
    "its end is being noted": [Moment("pathlib:Path.replace", "FINISHED.json")],
    "the adapter is put aside for its successor": [
        PUBLISHED,
        Moment("pathlib:Path.rename", ".adapter.old", after=True),
    ],
    "the adapter has its successor": [PUBLISHED, Moment("shutil:rmtree", ".adapter.old", times=2)],
    "the provisional adapter is being removed": [Moment("shutil:rmtree", ".provisional.old", times=2)],
    "it says that it is done": [Moment(PROGRESS, "Done", after=True)],
    "the launcher begins its report": [Moment("taskoffer_trainer.launcher:report_end")],
    "one of two reports is written": [Moment("pathlib:Path.replace", "report.json")],
    "its checkpoint is being removed": [Moment("shutil:rmtree", f"checkpoint-{STEPS}")],
    "its checkpoint has been removed": [Moment("shutil:rmtree", f"checkpoint-{STEPS}", after=True)],
    "the launcher is about to say how it ended": [Moment(LAUNCHER_SAYS)],
}

DRAWN = "PIL.Image:Image.save"
HALF_DRAWN = Moment(DRAWN, "*before-1.png*", cut=True)
PICTURES = {
    "half of the base model's picture is drawn": HALF_DRAWN,
    "its first adapter is built": Moment("taskoffer_trainer.image:export_lora"),
    "it has trained": TRAINING["it has trained"],
    "half of the adapter's picture is drawn": Moment(DRAWN, "*after-1.png*", cut=True),
    "the manifest is in place": Moment("pathlib:Path.rename", ".adapter.tmp"),
    "the adapter is in place": PUBLISHED,
    "its end is being noted": Moment("pathlib:Path.replace", "FINISHED.json"),
}
TWO_RANKS = {
    "the second trains": Moment("taskoffer_trainer.steps:StepTrainer.training_step", times=7, rank=1, alone=True),
    "the second waits for the first's checkpoint": Moment("taskoffer_trainer.callbacks:mark_complete", alone=True),
    "the first publishes": Moment("pathlib:Path.rename", ".adapter.tmp", alone=True),
}
RANK = {
    "verifies": Moment(PROGRESS, "Verifying", after=True, alone=True),
    "has noted its end": Moment("taskoffer_trainer.concluding:remove_provisional", alone=True),
}


@dataclass
class Run:
    """A run to be killed at some moments: with which settings, and after which other one."""

    name: str
    moments: list[Moment]
    config: dict[str, Any] = field(default_factory=dict)
    after: str | None = None
    without: tuple[str, ...] = ()


@dataclass
class Ended:
    """What came of a run: how each of its attempts ended, and what it left."""

    ends: list[dict[str, Any]]
    place: Path

    def left(self, attempt: int) -> Path:
        """Return the output folder as the attempt left it, which may not be there."""
        return self.place / f"left-{attempt}" / "out"

    @property
    def kills(self) -> list[dict[str, Any]]:
        return self.ends[:-1]

    @property
    def done(self) -> dict[str, Any]:
        """How the last attempt ended, which nobody killed."""
        return self.ends[-1]


def key(text: str) -> str:
    return text.replace(" ", "-")


def texts() -> Iterator[Run]:
    """The runs on text in one process, all with the same settings."""
    trained = f"training/left-{len(TRAINING)}"
    yield Run("calm", [])
    yield Run("training", list(TRAINING.values()))
    for name, moments in END.items():
        yield Run(f"end-{key(name)}", moments, after=trained)
    for name, moment in RANK.items():
        yield Run(f"rank-{key(name)}", [moment], after=trained)


@pytest.fixture(scope="module")
def ended(
    base_config: dict[str, Any], pipelines_dir: Path, tmp_path_factory: pytest.TempPathFactory, libraries: Preloader
) -> dict[str, Ended]:
    folder = tmp_path_factory.mktemp("moments")
    train = {"maxSteps": STEPS, "evalSteps": EVERY, "saveSteps": EVERY, "saveTotalLimit": 1, "keepCheckpoints": None}
    base = merge(base_config, {"train": train})
    images = merge(base, pictures(pipelines_dir, "flux", train=train))
    others = [
        Run("two-ranks", list(TWO_RANKS.values()), {"gpus": 2}),
        Run("pictures", list(PICTURES.values()), images),
        Run("pictures-lost", [HALF_DRAWN], images, "pictures/left-3", ("checkpoints/before-1.png",)),
    ]
    # Two at a time, for there are two cores; a run that comes after another is in the same group.
    groups = {"texts": list(texts()), "others": others}
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda name: attempts(base, folder, name, groups[name], libraries), groups))
    return {name: Ended(ends, folder / name) for one in found for name, ends in one.items()}


def attempts(
    base: dict[str, Any], folder: Path, group: str, runs: list[Run], libraries: Preloader
) -> dict[str, list[dict[str, Any]]]:
    """Run a group of runs and return how their attempts ended."""
    settings, out = folder / f"{group}-settings.json", folder / f"{group}-found.json"
    given = {"config": base, "folder": str(folder), "out": str(out)}
    settings.write_text(json.dumps({**given, "runs": [asdict(run) for run in runs]}))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env.update(TOKENIZERS_PARALLELISM="false", GLOO_SOCKET_IFNAME="lo", TRANSFORMERS_VERBOSITY="error")
    done = libraries.run([str(Path(__file__).with_name("kill_moments.py")), str(settings)], env)
    assert done.returncode == 0, done.stdout
    found: dict[str, list[dict[str, Any]]] = json.loads(out.read_text())
    return found


# What a kill leaves


def check_whole(folder: Path, provisional: bool) -> None:
    """Check a folder as whoever finds it would: the manifest names every file as it is, and each can be read."""
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["provisional"] is provisional
    assert set(manifest["files"]) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= set(manifest["files"])
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])
        if name.endswith(".safetensors"):
            tensors = load_file(folder / name)
            assert tensors
            assert all(tensor.size and bool((tensor == tensor).all()) for tensor in tensors.values())
        elif name.endswith(".png"):
            with Image.open(folder / name) as picture:
                picture.load()
    if not provisional:
        assert manifest["evalLossAfter"] < manifest["evalLossBefore"]
        assert [bool(answer["after"]) for answer in manifest["sampleAnswers"]] == [True]


def results(folder: Path) -> int:
    """Check that what can be seen in an output folder is whole and is what it is said to be; return how many it is."""
    if not folder.is_dir():
        return 0
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert names <= {"adapter", "provisional", "report.json", "report.md", "log.txt"}
    found = 0
    if "adapter" in names:
        check_whole(folder / "adapter", provisional=False)
        found += 1
    for path in (folder / "provisional").glob("[!.]*"):
        assert path.name.startswith("step-")
        check_whole(path, provisional=True)
        found += 1
    return found


def check_done(run: Ended) -> None:
    """Check that a run's last attempt has ended well, and that nothing else is left of it."""
    assert (run.done["code"], run.done["termination"]["reason"]) == (0, "Completed"), run.done["log"]
    left = run.left(len(run.ends))
    assert {path.name for path in left.iterdir()} == {"adapter", "report.json", "report.md", "log.txt"}
    assert results(left) == 1
    assert list((left.parent / "checkpoints").glob("checkpoint-*")) == []
    assert {"run.json", "FINISHED.json"} <= {path.name for path in (left.parent / "checkpoints").iterdir()}
    report = json.loads((left / "report.json").read_text())
    assert (report["result"], report["adapter"]) == ("Verified", "adapter")


def said(run: Ended) -> dict[str, Any]:
    """Return what the last attempt said of its result, without where it lies and what it took."""
    left_out = ("adapterDir", "trainingSeconds", "tokensPerSecond", "peakHostBytes", "resumedFromStep")
    return {name: value for name, value in run.done["termination"].items() if name not in left_out}


def assert_killed(run: Ended) -> None:
    """See that every moment has come, and that nobody survived to say anything."""
    for end in run.kills:
        assert (end["struck"], end["code"]) == (True, -9), end["log"]


@pytest.mark.parametrize("moment", TRAINING)
def test_a_kill_while_it_trains_leaves_only_whole_adapters_that_are_marked_as_provisional(
    ended: dict[str, Ended], moment: str
) -> None:
    number = list(TRAINING).index(moment) + 1
    run = ended["training"]
    assert (run.ends[number - 1]["struck"], run.ends[number - 1]["code"]) == (True, -9), run.ends[number - 1]["log"]
    first = list(TRAINING).index("its first adapter is built") + 1
    found = results(run.left(number))
    assert found == 0 if number <= first else found > 0
    assert not (run.left(number) / "adapter").exists()


def test_a_training_that_was_killed_at_each_of_its_phases_ends_like_one_that_nobody_killed(
    ended: dict[str, Ended],
) -> None:
    check_done(ended["calm"])
    check_done(ended["training"])
    assert said(ended["training"]) == said(ended["calm"])


@pytest.mark.parametrize("moment", END)
def test_a_kill_at_the_end_leaves_a_whole_result_and_the_next_attempt_the_verified_adapter(
    ended: dict[str, Ended], moment: str
) -> None:
    run = ended[f"end-{key(moment)}"]
    for number, end in enumerate(run.kills, start=1):
        assert (end["struck"], end["code"], end["termination"]) == (True, -9, None), end["log"]
        assert results(run.left(number)) > 0
    check_done(run)
    assert said(run) == said(ended["calm"])


def test_pictures_survive_kills_as_well(ended: dict[str, Ended]) -> None:
    run = ended["pictures"]
    assert_killed(run)
    for number, moment in enumerate(PICTURES, start=1):
        assert (results(run.left(number)) > 0) == (number > 2), moment
    check_done(run)
    assert (run.left(len(run.ends)) / "adapter" / "after-1.png").is_file()


def test_half_a_picture_of_the_base_model_is_not_taken_for_a_whole_one(ended: dict[str, Ended]) -> None:
    run = ended["pictures-lost"]
    assert_killed(run)
    check_done(run)


def test_a_rank_that_dies_in_the_verification_leaves_a_reason_and_a_provisional_adapter(
    ended: dict[str, Ended],
) -> None:
    run = ended["rank-verifies"]
    (killed,) = run.kills
    assert (killed["struck"], killed["code"], killed["termination"]["reason"]) == (True, 137, "Killed"), killed["log"]
    assert "rank 0 was killed by SIGKILL" in killed["termination"]["message"]
    assert (killed["termination"]["step"], killed["termination"]["totalSteps"]) == (STEPS, STEPS)
    report = json.loads((run.left(1) / "report.json").read_text())
    assert (report["result"], results(run.left(1))) == ("Provisional", 1)
    assert (run.left(1) / report["adapter"]).is_dir()
    check_done(run)


def test_a_rank_that_dies_once_its_end_is_noted_has_done_its_work(ended: dict[str, Ended]) -> None:
    run = ended["rank-has-noted-its-end"]
    (killed,) = run.kills
    assert killed["struck"]
    assert (killed["code"], killed["termination"]["reason"]) == (0, "Completed"), killed["log"]
    assert {path.name for path in run.left(1).iterdir()} == {"adapter", "report.json", "report.md", "log.txt"}
    assert said(run) == {name: value for name, value in killed["termination"].items() if name in said(run)}
    check_done(run)


def test_one_of_two_ranks_that_dies_ends_the_attempt_with_a_reason_and_the_next_one_goes_on(
    ended: dict[str, Ended],
) -> None:
    run = ended["two-ranks"]
    for end, rank in zip(run.kills, (1, 0, 0), strict=True):
        assert (end["struck"], end["code"], end["termination"]["reason"]) == (True, 137, "Killed"), end["log"]
        assert f"rank {rank} was killed by SIGKILL" in end["termination"]["message"]
    assert [results(run.left(number)) for number in (1, 2, 3)] == [1, 1, 1]
    check_done(run)
    assert run.done["termination"]["resumedFromStep"] == STEPS
