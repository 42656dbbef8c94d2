"""Runs trainings that are killed at an exact moment: when a named function is entered or has returned.

Run as ``FILE SETTINGS``; the settings name the runs and where to write what came of them. The processes are forked from
this one, which has loaded the libraries already, and then are what the command line would have started: the launcher
with its ranks, each with the environment that the launcher makes for it. The product knows nothing of the moments: the
named function is wrapped in the fork.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NoReturn

_PR_SET_CHILD_SUBREAPER = 36
_PRELOADED = (
    "taskoffer_trainer.__main__",
    "taskoffer_trainer.rank",
    "taskoffer_trainer.sft",
    "taskoffer_trainer.image",
)
_LIBRARIES = ("accelerate", "datasets", "diffusers", "peft", "safetensors", "tokenizers", "transformers", "trl")
"""Of these it is known that loading them starts no thread, which a fork would not have."""


@dataclass(frozen=True)
class Moment:
    """When to kill.

    Attributes:
        where: the function, as ``module:name`` or ``module:class.name``.
        about: pattern; only calls with such a string or a path of such a name among their arguments count.
        times: how many such calls there are up to the fatal one.
        after: kill when the function has returned, and not when it is entered.
        cut: leave only half of the file that the call is about.
        rank: the only rank whose calls count.
        alone: only the process that makes the call dies, and not all of the run.
    """

    where: str
    about: str = ""
    times: int = 1
    after: bool = False
    cut: bool = False
    rank: int | None = None
    alone: bool = False


def _matching(pattern: str, arguments: tuple[Any, ...]) -> Any:
    # The last one: who copies names the source first.
    for one in reversed(arguments):
        name = one.name if isinstance(one, Path) else one
        if isinstance(name, str) and fnmatch(name, pattern):
            return one
    return None


def _strike(moment: Moment, launcher: int, struck: Path) -> NoReturn:
    struck.touch()
    if not moment.alone:
        # First, so that it has no time to say anything of the rank's end. The ranks die with it.
        os.kill(launcher, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("nothing comes after this signal")


def _await(moment: Moment, launcher: int, struck: Path) -> None:
    """Wrap the moment's function in this process and in those that are forked from it."""
    module, _, name = moment.where.partition(":")
    *path, last = name.split(".")
    owner = functools.reduce(getattr, path, importlib.import_module(module))
    function = getattr(owner, last)
    calls = 0

    @functools.wraps(function)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        found = _matching(moment.about, (*arguments, *named.values())) if moment.about else None
        mine = moment.rank is None or os.environ.get("RANK", "0") == str(moment.rank)
        calls += mine and (found is not None or not moment.about)
        fatal = mine and calls == moment.times and (found is not None or not moment.about)
        if fatal and not (moment.after or moment.cut):
            _strike(moment, launcher, struck)
        made = function(*arguments, **named)
        if fatal:
            if moment.cut and found is not None:
                os.truncate(found, Path(found).stat().st_size // 2)
            _strike(moment, launcher, struck)
        return made

    setattr(owner, last, wrapped)


class _Forked:
    """Takes the place of the launcher's ``subprocess.Popen``: the rank is forked instead of started."""

    def __init__(self, command: list[str], env: dict[str, str], stdin: int, start_new_session: bool) -> None:
        assert (command[1:], stdin, start_new_session) == (["-m", "taskoffer_trainer.rank"], subprocess.DEVNULL, True)
        sys.stdout.flush()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _in_fork(lambda: _rank(env))


def _rank(env: dict[str, str]) -> int:
    from taskoffer_trainer import rank

    os.setsid()
    # A program that is started anew has no handlers.
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None
    code = rank.main()
    modules = sorted(name for name in sys.modules if name.partition(".")[0] in _LIBRARIES)
    Path(env["TASKOFFER_LOADED"]).write_text(json.dumps(modules))
    return code


def _launcher(folder: Path, moment: Moment | None) -> int:
    from taskoffer_trainer import __main__ as command
    from taskoffer_trainer import launcher

    os.setsid()
    with (folder / "log.txt").open("w") as log:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    tempfile.tempdir = None
    os.environ.update(
        TASKOFFER_PROGRESS_PORT="0",
        TASKOFFER_TERMINATION_LOG=str(folder / "termination.json"),
        TASKOFFER_LOSS_PLOT="0",
        TASKOFFER_LOADED=str(folder / "loaded.json"),
        TMPDIR=str(temporary),
    )
    vars(launcher)["subprocess"] = types.SimpleNamespace(Popen=_Forked, DEVNULL=subprocess.DEVNULL)
    if moment is not None:
        _await(moment, os.getpid(), folder / "struck")
    return command.main(["--config", str(folder / "run.json")])


def _in_fork(work: Callable[[], int]) -> NoReturn:
    """Do a process's work and end it; nothing of this program comes after it."""
    code = 99
    try:
        code = work()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # noqa: BLE001 - whatever it is, the log says it.
        traceback.print_exc()
    finally:
        os._exit(code)


def _attempt(folder: Path, moment: Moment | None) -> dict[str, Any]:
    """Run one attempt, and wait until none of its processes is left."""
    for name in ("struck", "termination.json", "loaded.json"):
        (folder / name).unlink(missing_ok=True)
    # What is loaded stays: no fork has to look through it, which would give it all of that memory for its own.
    gc.freeze()
    began, before = time.monotonic(), os.times()
    pid = os.fork()
    if pid == 0:
        _in_fork(lambda: _launcher(folder, moment))
    status = os.waitpid(pid, 0)[1]
    try:
        while True:
            os.wait()
    except ChildProcessError:
        pass  # This process inherits what the launcher leaves behind, and now there is none left.
    used, said = os.times(), folder / "termination.json"
    return {
        "struck": (folder / "struck").exists(),
        "code": os.waitstatus_to_exitcode(status),
        "termination": json.loads(said.read_text()) if said.exists() else None,
        "log": (folder / "log.txt").read_text(),
        "seconds": time.monotonic() - began,
        "cpuSeconds": used.children_user + used.children_system - before.children_user - before.children_system,
    }


def _load(names: Path) -> None:
    """Load here what an attempt has loaded, so that the next ones need not."""
    if names.exists():
        for name in json.loads(names.read_text()):
            # Some are only other names of modules.
            if name not in sys.modules and importlib.util.find_spec(name) is not None:
                importlib.import_module(name)


def _run(base: dict[str, Any], folder: Path, run: dict[str, Any]) -> list[dict[str, Any]]:
    """Start a run again until it was killed at each of its moments, and then once more; keep what each has left.

    A run may begin with what an attempt of an earlier one has left, but for some files.
    """
    place = folder / run["name"]
    if run["after"] is not None:
        shutil.copytree(folder / run["after"], place)
    place.mkdir(exist_ok=True)
    for name in run["without"]:
        (place / name).unlink()
    config = {**base, **run["config"], "outputDir": str(place / "out"), "checkpointDir": str(place / "checkpoints")}
    ends = []
    moments = [Moment(**one) for one in run["moments"]]
    for number, moment in enumerate([*moments, None], start=1):
        config["attempt"] = number
        (place / "run.json").write_text(json.dumps(config))
        ends.append(_attempt(place, moment))
        _load(place / "loaded.json")
        left = place / f"left-{number}"
        for name in ("out", "checkpoints"):
            if (place / name).is_dir():
                shutil.copytree(place / name, left / name)
    return ends


def main() -> None:
    """Run what the settings name."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    given = json.loads(Path(sys.argv[1]).read_text())
    for name in _PRELOADED:
        importlib.import_module(name)
    folder = Path(given["folder"])
    found = {run["name"]: _run(given["config"], folder, run) for run in given["runs"]}
    Path(given["out"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
