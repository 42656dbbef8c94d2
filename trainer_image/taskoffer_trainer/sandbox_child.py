"""The program of a sandbox: confines itself, loads one reward's source text and answers calls. Standard library only.

It talks in lines of JSON over what were its standard input and output. The source text finds ``/dev/null`` there
instead. Nothing that the source text does to this process matters to the one that asks: that one checks each answer,
and ends this process when it does not like one.
"""

from __future__ import annotations

import ast
import inspect
import json
import numbers
import os
import sys
import time
import traceback
import types
from collections.abc import Callable
from typing import Any

from taskoffer_trainer.confinement import LAYERS, confine, die_with

__all__ = ["LARGEST_REWARD", "MESSAGE_LENGTH", "find_function", "main"]

LARGEST_REWARD = 1e6
"""Largest reward by size; far larger ones would overflow single precision when they are squared."""
MESSAGE_LENGTH = 300
"""Longest message about a failure in characters."""
_FILE = "<reward>"


class BadAnswerError(Exception):
    """The function returned something that is no list of rewards."""


def find_function(source: str) -> str:
    """Return the name of the one function at the top level whose first argument is ``completions``.

    The source text is read, not executed.

    Raises:
        ValueError: with what is wrong; also for source text that is no Python.
    """
    try:
        tree = ast.parse(source, _FILE)
    except SyntaxError as error:
        raise ValueError(f"line {error.lineno}: {error.msg}") from error
    except (RecursionError, MemoryError) as error:
        raise ValueError("it is nested too deeply") from error
    found = []
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names = [one.arg for one in (*node.args.posonlyargs, *node.args.args)]
            if names[:1] == ["completions"]:
                found.append(node)
    if len(found) != 1:
        some = ", ".join(node.name for node in found) or "there is none"
        raise ValueError(
            f"it needs exactly one function at the top level whose first argument is completions ({some}): "
            "write def reward(completions, **kwargs)"
        )
    if isinstance(found[0], ast.AsyncFunctionDef):
        raise ValueError(f"{found[0].name} is async: write def instead of async def")
    return found[0].name


def _shorten(text: str) -> str:
    return text if len(text) <= MESSAGE_LENGTH else text[: MESSAGE_LENGTH - 1] + "…"


def _describe(error: BaseException) -> str:
    """Say what went wrong in one line, with the line of the source text."""
    if isinstance(error, BadAnswerError):
        return _shorten(str(error))
    if isinstance(error, MemoryError):
        return "MemoryError: it needs more memory than the sandbox has"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == _FILE]
    place = f" in line {lines[-1]}" if lines else ""
    if isinstance(error, ModuleNotFoundError):
        return _shorten(f"{error}{place}: only Python's standard library is in the sandbox; remove the import")
    try:
        text = str(error)
    except BaseException:  # noqa: BLE001 - the text is foreign code as well.
        text = "its message cannot be read"
    return _shorten(f"{type(error).__name__}{place}: {text}".rstrip(": "))


def _load(source: str) -> Callable[..., Any]:
    module = types.ModuleType("reward")
    sys.modules["reward"] = module
    exec(compile(source, _FILE, "exec", dont_inherit=True), module.__dict__)  # noqa: S102 - this is what the sandbox is for.
    function = getattr(module, find_function(source))
    if not callable(function):
        raise BadAnswerError(f"the function is gone after loading, there is {type(function).__name__} in its place")
    return function  # type: ignore[no-any-return]


def _wanted(function: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    """Return those of the offered arguments that the function takes."""
    parameters = inspect.signature(function).parameters
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        return offered
    return {name: value for name, value in offered.items() if name in list(parameters)[1:]}


def _rewards(value: Any, count: int) -> list[float | None]:
    """Check what a function returned.

    Raises:
        BadAnswerError: when it is no list of so many finite numbers.
    """
    if not isinstance(value, (list, tuple)):
        raise BadAnswerError(f"it returned {type(value).__name__}: return a list with a number for each completion")
    if len(value) != count:
        raise BadAnswerError(f"it returned {len(value)} rewards for {count} completions: return one for each")
    found: list[float | None] = []
    for place, one in enumerate(value):
        if one is None:
            found.append(None)
            continue
        if not isinstance(one, numbers.Real):
            raise BadAnswerError(f"reward {place} is {type(one).__name__}: return numbers, or None for not applicable")
        try:
            number = float(one)
        except OverflowError:
            number = float("inf")
        if not abs(number) <= LARGEST_REWARD:
            raise BadAnswerError(f"reward {place} is not a number within ±{LARGEST_REWARD:g}")
        found.append(number)
    return found


def _answer(request: dict[str, Any], state: dict[str, Callable[..., Any]]) -> dict[str, Any]:
    try:
        if "source" in request:
            state["function"] = _load(request["source"])
            return {"rewards": []}
        function = state["function"]
        completions = request["completions"]
        value = function(completions, **_wanted(function, request["arguments"]))
        return {"rewards": _rewards(value, len(completions))}
    except BaseException as error:  # noqa: BLE001 - foreign code may raise anything, SystemExit too.
        return {"error": _describe(error)}


def main() -> None:
    """Confine this process, then answer one request after the other until the input ends."""
    settings = json.loads(sys.argv[2])
    # The folder of this package was put there to import it; the source text gets the standard library alone.
    sys.path.remove(sys.argv[1])
    die_with(settings["parent"])
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    os.close(nowhere)
    layers = confine(settings["memoryBytes"], settings["cpuSeconds"], tuple(settings.get("layers", LAYERS)))
    state: dict[str, Callable[..., Any]] = {}
    answer: dict[str, Any] = {"layers": layers}
    identity = "hello"
    while True:
        line = json.dumps({**answer, "id": identity, "cpuSeconds": time.process_time()})
        answers.write(line.encode() + b"\n")
        answers.flush()
        text = requests.readline()
        if not text:
            return
        request = json.loads(text)
        identity = request["id"]
        answer = _answer(request, state)
