"""Real trainings through the real command line, one process tree each, on a tiny model."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hub_server import hub_server
from taskoffer_trainer.launcher import ALLOCATOR

from .preloaded import Preloader, Started

START_SECONDS = 120.0
RUN_SECONDS = 420.0


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of nested dictionaries with changes; a value of ``None`` removes the key."""
    merged = dict(base)
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        elif value is None:
            merged.pop(key, None)
        else:
            merged[key] = value
    return merged


@dataclass
class Outcome:
    """How a training ended."""

    code: int
    termination: dict[str, Any]
    log: str
    seconds: float


@dataclass
class Training:
    """One attempt: a configuration in a folder, and the process when it runs."""

    folder: Path
    config: dict[str, Any]
    preloader: Preloader | None = None
    process: subprocess.Popen[str] | Started | None = None
    url: str = ""
    began: float = 0.0
    environment: dict[str, str] = field(default_factory=dict)
    tmp: Path = field(init=False)
    _log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        # Short, because the sockets of data loading processes lie in it and may have 107 characters.
        self.tmp = Path(tempfile.mkdtemp(prefix="tt-"))
        weakref.finalize(self, shutil.rmtree, self.tmp, ignore_errors=True)
        self._log = self.folder / "log.txt"

    @property
    def output(self) -> Path:
        return Path(self.config["outputDir"])

    @property
    def adapter(self) -> Path:
        return self.output / "adapter"

    @property
    def checkpoints(self) -> Path:
        return Path(self.config["checkpointDir"])

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def anew(self) -> Training:
        """Let its programs be started as in a pod, where nobody has imported anything for them."""
        self.preloader = None
        return self

    def start(self, *arguments: str) -> Training:
        """Start the launcher and wait until it says where its progress is."""
        (self.folder / "run.json").write_text(json.dumps(self.config), encoding="utf-8")
        (self.folder / "termination.json").unlink(missing_ok=True)
        env = {
            **os.environ,
            "TASKOFFER_PROGRESS_PORT": "0",
            "TASKOFFER_TERMINATION_LOG": str(self.folder / "termination.json"),
            "TMPDIR": str(self.tmp),
            "PYTHONUNBUFFERED": "1",
            # Drawing takes a second each time; a test that looks at the picture asks for it.
            "TASKOFFER_LOSS_PLOT": "0",
            **self.environment,
        }
        command = ["-m", "taskoffer_trainer", "--config", str(self.folder / "run.json"), *arguments]
        self.began = time.monotonic()
        with self._log.open("w") as log:
            if self.preloader is not None:
                self.process = self.preloader.start(command, env, log.fileno())
            else:
                command = [sys.executable, *command]
                self.process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, text=True)
        self.wait_for(lambda: "progress on" in self.log or self.process.poll() is not None, START_SECONDS)  # type: ignore[union-attr]
        found = re.search(r"http://0\.0\.0\.0:(\d+)/progress", self.log)
        self.url = f"http://127.0.0.1:{found[1]}" if found else ""
        return self

    def wait_for(self, condition: Callable[[], Any], seconds: float = RUN_SECONDS) -> Any:
        """Poll until the condition gives something true, and return that."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, f"not within {seconds} s; the log is\n{self.log}"
            time.sleep(0.02)
        return value

    def get(self, path: str) -> str:
        """Fetch from the progress endpoint."""
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:  # noqa: S310 - our own http URL.
            return str(answer.read().decode())

    def progress(self) -> dict[str, Any]:
        """Fetch the progress report; empty when the process has ended."""
        try:
            report = json.loads(self.get("/progress"))
        except (urllib.error.URLError, ConnectionError):
            assert self.process is not None
            assert self.process.wait(timeout=START_SECONDS) is not None
            return {}
        assert isinstance(report, dict)
        return report

    def wait_for_step(self, step: int) -> dict[str, Any]:
        """Wait until so many steps are done."""

        def there() -> dict[str, Any] | None:
            report = self.progress()
            assert report, f"ended before step {step}:\n{self.log}"
            return report if report.get("step", 0) >= step and report["state"] == "Training" else None

        found = self.wait_for(there)
        assert isinstance(found, dict)
        return found

    def children(self) -> list[int]:
        """Processes of the launcher."""
        path = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        return [int(pid) for pid in path.read_text().split()] if path.exists() else []

    def signal(self, number: int) -> None:
        """Send a signal to the launcher alone, as the kubelet does."""
        os.kill(self.pid, number)

    def finish(self, seconds: float = RUN_SECONDS) -> Outcome:
        """Wait for the end and read what was left behind."""
        assert self.process is not None
        try:
            code = self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"did not end within {seconds} s:\n{self.log}")
        path = self.folder / "termination.json"
        data = path.read_bytes() if path.exists() else b"{}"
        assert len(data) <= 4096
        return Outcome(code, json.loads(data), self.log, time.monotonic() - self.began)

    def run(self, *arguments: str) -> Outcome:
        """Start and wait for the end."""
        return self.start(*arguments).finish()

    def kill(self) -> None:
        """End everything at once; the ranks die with the launcher."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()


def side_by_side(*trainings: Training) -> list[Outcome]:
    """Run trainings two at a time, which is what two cores are good for, and return their ends in order."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(Training.run, trainings))


@pytest.fixture(scope="session")
def libraries() -> Iterator[Preloader]:
    """A process that has imported what trainings import."""
    # As ``rank_environment`` has it, for what is read once at the start or when a library is imported.
    offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY")
    settings = dict.fromkeys((*offline, "HF_HUB_DISABLE_PROGRESS_BARS"), "1")
    # Whether there is a GPU is found out without the CUDA driver, which a copy could not use after that.
    settings["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    with tempfile.TemporaryDirectory(prefix="tt-") as cache:
        settings |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        settings |= {"HF_HOME": cache, "XDG_CACHE_HOME": cache}
        made = Preloader({**os.environ, **ALLOCATOR, **settings})
        yield made
        made.close()


@pytest.fixture(scope="session")
def preloader(libraries: Preloader) -> Preloader | None:
    """Who starts trainings; a module that is about their start has a fixture of this name that returns ``None``."""
    return libraries


def _built(libraries: Preloader, script: str, folder: Path) -> Path:
    """Build models and data in a process of its own, so that this one need not import torch."""
    done = libraries.run(["-c", script, str(folder)], {**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout
    return folder


@pytest.fixture(scope="session")
def fixtures_dir(tmp_path_factory: pytest.TempPathFactory, libraries: Preloader) -> Path:
    """Models and data."""
    script = (
        "import sys; from pathlib import Path\n"
        "from taskoffer_lab.fixtures import *\n"
        "folder = Path(sys.argv[1])\n"
        "build_tiny_model(folder / 'llama', 'llama', hidden_size=64)\n"
        "build_tiny_model(folder / 'phi3', 'phi3', hidden_size=64)\n"
        "build_instruct_dataset(folder / 'data', rows=200)\n"
        "build_chat_dataset(folder / 'chat', rows=120)\n"
        "build_preference_dataset(folder / 'preferences', rows=200)\n"
    )
    return _built(libraries, script, tmp_path_factory.mktemp("fixtures"))


@pytest.fixture(scope="session")
def pipelines_dir(tmp_path_factory: pytest.TempPathFactory, libraries: Preloader) -> Path:
    """A tiny SDXL and a tiny Flux, and pictures with captions."""
    script = (
        "import sys; from pathlib import Path\n"
        "from taskoffer_lab.fixtures import build_shapes, build_tiny_pipeline\n"
        "folder = Path(sys.argv[1])\n"
        "build_tiny_pipeline(folder / 'sdxl', 'sdxl')\n"
        "build_tiny_pipeline(folder / 'flux', 'flux')\n"
        "build_shapes(folder / 'data')\n"
    )
    return _built(libraries, script, tmp_path_factory.mktemp("pipelines"))


@pytest.fixture(scope="session")
def base_config(fixtures_dir: Path) -> dict[str, Any]:
    """A short training; tests change what they are about."""
    return {
        "jobName": "job",
        "taskID": "task",
        "taskType": "InstructText",
        "gpus": 1,
        "model": {"name": "acme/tiny-llama", "path": str(fixtures_dir / "llama")},
        "data": {
            "path": str(fixtures_dir / "data" / "train.jsonl"),
            "fileFormat": "jsonl",
            "instruct": {"fieldInstruction": "instruction", "fieldInput": "input", "fieldOutput": "output"},
            "evalFraction": 0.1,
            "evalRowsMax": 12,
        },
        "lora": {"r": 8, "loraAlpha": 16},
        "train": {
            "perDeviceTrainBatchSize": 4,
            "maxSteps": 24,
            "learningRate": 0.002,
            "maxLength": 160,
            "evalSteps": 8,
            "saveSteps": 8,
            "gradientCheckpointing": False,
            # Many tests look at them.
            "keepCheckpoints": True,
        },
        "samplePrompts": ["Quote the Python reference on Modules."],
    }


Found = dict[str, dict[str, Any]]
"""What probes found, by their name."""


def found_by(file: str, config: dict[str, Any], folder: Path, libraries: Preloader) -> Found:
    """Run a file of probes (see ``probing.py``) and return what each has found; all fail together with what it said."""
    settings, out = folder / "settings.json", folder / "found.json"
    settings.write_text(json.dumps({"config": config, "folder": str(folder), "out": str(out)}))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env.update(TOKENIZERS_PARALLELISM="false", GLOO_SOCKET_IFNAME="lo", TASKOFFER_TUNING_PATH=str(folder / "none"))
    ended = libraries.run([str(Path(__file__).with_name(file)), str(settings)], env)
    assert out.exists(), ended.stdout[-8000:]
    found = json.loads(out.read_text())
    errors = {name: one["error"] for name, one in found.items() if "error" in one}
    assert not errors, "\n".join(errors.values())
    return {name: one["found"] for name, one in found.items()}


MakeTraining = Callable[..., Training]


def _maker(base: dict[str, Any], folder: Path, preloader: Preloader | None, made: list[Training]) -> MakeTraining:
    def make(name: str = "run", /, **changes: Any) -> Training:
        place = folder / name
        config = merge(base, {"outputDir": str(place / "out"), "checkpointDir": str(place / "checkpoints")})
        training = Training(place, merge(config, changes), preloader)
        made.append(training)
        return training

    return make


@pytest.fixture
def training(base_config: dict[str, Any], tmp_path: Path, preloader: Preloader | None) -> Iterator[MakeTraining]:
    """Make trainings that are ended with the test."""
    made: list[Training] = []
    yield _maker(base_config, tmp_path, preloader, made)
    for one in made:
        one.kill()


@pytest.fixture(scope="module")
def shared_training(
    base_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, preloader: Preloader | None
) -> Iterator[MakeTraining]:
    """Make trainings that several tests of a module look at."""
    made: list[Training] = []
    yield _maker(base_config, tmp_path_factory.mktemp("shared"), preloader, made)
    for one in made:
        one.kill()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cache, and a hub and a web server to fill it from; what runs there is ended with the test."""
    # Imported here, because it imports this module.
    from .step_runs import Place

    folder = tmp_path / "place"
    folder.mkdir()
    with hub_server() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        found = Place(folder, hub)
        yield found
        found.stop()
