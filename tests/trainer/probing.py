"""Looks into trainings in one process of their own, and writes what it found as JSON.

A file of probes is run as ``FILE SETTINGS``: the settings name a RunConfig to start from, a folder, and where to write.
The tests look at what was found; so torch is imported once for many of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PROBES: dict[str, Callable[[Probe], Any]] = {}


def probe(function: Callable[[Probe], Any]) -> Callable[[Probe], Any]:
    PROBES[function.__name__] = function
    return function


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    found = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = merged(found[key], value) if both else value
    return found


class Probe:
    """Makes courses on the command's settings, each in a folder of its own."""

    def __init__(self, base: dict[str, Any], folder: Path) -> None:
        self.base, self.folder, self._made = base, folder, 0

    def course(self, *, place: Path | None = None, arguments: dict[str, Any] | None = None, **changes: Any) -> Any:
        """Prepare a supervised training up to its first step."""
        from taskoffer_trainer.world import World

        course = self.whole(place=place, **changes)
        course.read()
        made = course.arguments()
        for name, value in (arguments or {}).items():
            setattr(made, name, value)
        course.world = course.stop.world = World()
        course.trainer = course.prepare(made)
        course._place()
        course._announce()
        return course

    def whole(self, *, place: Path | None = None, **changes: Any) -> Any:
        """Make a supervised training that is yet to be run from its beginning."""
        from accelerate.state import AcceleratorState

        from taskoffer.api.contract import RunConfig
        from taskoffer_trainer import sft
        from taskoffer_trainer.clock import Clock, now
        from taskoffer_trainer.effective import effective
        from taskoffer_trainer.instruct_data import read_instruct
        from taskoffer_trainer.stop import Stop

        AcceleratorState._reset_state(True)
        if place is None:
            self._made += 1
            place = self.folder / str(self._made)
        place.mkdir(parents=True, exist_ok=True)
        where = {"outputDir": str(place / "out"), "checkpointDir": str(place / "checkpoints")}
        (place / "checkpoints").mkdir(exist_ok=True)
        config = RunConfig.model_validate(merged(merged(self.base, where), changes))
        return sft._Supervised(config, read_instruct(effective(config).config), place, 0, Stop(Clock.of(config, now())))


def tiny_mixture(llama: Path, folder: Path, **settings: Any) -> Path:
    """Build a mixture of experts, with the tokenizer of another tiny model."""
    import transformers

    common = {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.2}
    some = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    config = transformers.Qwen3MoeConfig(**common, **heads, **some, **settings)
    transformers.set_seed(1)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for pattern in ("*token*", "chat_template*"):
        for file in llama.glob(pattern):
            shutil.copy(file, folder)
    return folder


def train(course: Any, resume: Path | None = None) -> Any:
    """Take all steps, or those after a checkpoint."""
    first = 0
    if resume is not None:
        first = int(resume.name.partition("-")[2])
        course.steps.restore(resume)
        if course.average is not None:
            course.average.restore(resume)
    course.trainer.begin(course.steps, first)
    course.trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return course


def history(course: Any, name: str) -> list[float]:
    return [entry[name] for entry in course.trainer.state.log_history if name in entry]


def clamps(course: Any) -> list[dict[str, Any]]:
    return [clamp.to_wire() for clamp in course.progress.clamps]


def trained(course: Any) -> dict[str, Any]:
    return {name: one.detach() for name, one in course.trainer.model.named_parameters() if one.requires_grad}


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def listening(course: Any, event: str, function: Callable[..., None]) -> Iterator[None]:
    """Call a function at one of transformers' events, behind all other callbacks."""
    from transformers import TrainerCallback

    callback = type("Listener", (TrainerCallback,), {event: lambda self, *a, **k: function(*a, **k)})()
    course.trainer.add_callback(callback)
    yield
    course.trainer.remove_callback(callback)


def main() -> None:
    """Run all probes of the file, or those that are named behind the settings."""
    given = json.loads(Path(sys.argv[1]).read_text())
    found = {}
    for name in sys.argv[2:] or list(PROBES):
        began = time.monotonic()
        try:
            found[name] = {"found": PROBES[name](Probe(given["config"], Path(given["folder"]) / name))}
        except Exception:  # noqa: BLE001 - whatever it is, the test says it.
            found[name] = {"error": traceback.format_exc()}
        found[name]["seconds"] = time.monotonic() - began
    Path(given["out"]).write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)
