"""Runs of the prepare and submit commands: in this process where that will do, as a process where it is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hub_server import HubServer
from taskoffer.api.contract import PrepareConfig, SubmitConfig, Termination
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.interrupt import Interrupt
from taskoffer_trainer.prepare import prepare
from taskoffer_trainer.submit import submit

from .conftest import merge

SECONDS = 60.0


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder that is not hidden, by its path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


@dataclass
class Place:
    """A folder with a cache and secrets, and configurations for steps that work there."""

    root: Path
    hub: HubServer
    environment: dict[str, str] = field(default_factory=dict)
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    def secret(self, name: str, text: str) -> str:
        path = self.root / name
        path.write_text(text)
        return str(path)

    def config(self, *items: dict[str, Any], **changes: Any) -> dict[str, Any]:
        """A prepare configuration that may talk to the local server and does not wait long."""
        base = {
            "jobName": "job",
            "items": list(items),
            "cache": {"path": str(self.cache)},
            "leaseExpiresAt": "2099-01-01T00:00:00Z",
            "network": {
                "allowHttp": True,
                "allowPrivateAddresses": True,
                "timeoutSeconds": 10,
                "tries": 3,
                "retryWaitSeconds": 0.01,
            },
        }
        return merge(base, changes)

    def prepare(self, *items: dict[str, Any], **changes: Any) -> Termination:
        """Prepare in this process."""
        return prepare(PrepareConfig.model_validate(self.config(*items, **changes)), Interrupt())

    def refusal(self, *items: dict[str, Any], **changes: Any) -> TrainerError:
        """Prepare in this process and return how it failed."""
        try:
            ended = self.prepare(*items, **changes)
        except TrainerError as error:
            return error
        raise AssertionError(f"it did not fail: {ended}")

    def item(self, name: str = "data", job: str = "job") -> Path:
        return self.cache / "jobs" / job / name

    def submit(self, config: dict[str, Any]) -> Termination:
        """Submit in this process."""
        return submit(SubmitConfig.model_validate(config), Interrupt())

    def start(self, step: str, config: dict[str, Any], *arguments: str, name: str = "step") -> subprocess.Popen[str]:
        """Start a step as a process of its own."""
        path = self.root / f"{name}.json"
        path.write_text(json.dumps(config))
        env = {
            **os.environ,
            "HF_ENDPOINT": self.hub.url,
            # As in the image, which is made for the training.
            "HF_HUB_OFFLINE": "1",
            "TASKOFFER_TERMINATION_LOG": str(self.root / f"{name}-end.json"),
            "PYTHONUNBUFFERED": "1",
            **self.environment,
        }
        with (self.root / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", f"taskoffer_trainer.{step}", "--config", str(path), *arguments],
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )
        self.started.append(process)
        return process

    def log(self, name: str = "step") -> str:
        return (self.root / f"{name}.log").read_text()

    def end(self, name: str = "step") -> dict[str, Any]:
        """What the step left in its termination message."""
        data = (self.root / f"{name}-end.json").read_bytes()
        assert len(data) <= 4096
        value = json.loads(data)
        assert isinstance(value, dict)
        return value

    def stop(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()


def wait_for(condition: Callable[[], Any], seconds: float = SECONDS) -> None:
    """Poll until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.01)


def web(url: str, **changes: Any) -> dict[str, Any]:
    """An item of data behind an address."""
    return merge({"name": "data", "kind": "data", "source": {"url": {"url": url}}, "fileFormat": "jsonl"}, changes)


def model(repository: str = "acme/model", **changes: Any) -> dict[str, Any]:
    """A model on the hub."""
    return merge({"name": "model", "kind": "model", "source": {"hub": {"repository": repository}}}, changes)


def dataset(repository: str = "acme/data", **changes: Any) -> dict[str, Any]:
    """A data set on the hub."""
    source = {"hub": {"repository": repository, "repoType": "dataset"}}
    return merge({"name": "data", "kind": "data", "source": source}, changes)
