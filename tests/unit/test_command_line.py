"""The command line, the log's shape, and what the distribution promises of itself."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from kubernetes.aio.config import ConfigException

import taskoffer
from builders import make_policy
from taskoffer.cli import main as command_line
from taskoffer.cli.exit_codes import MEANINGS, Exit
from taskoffer.cli.main import main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        *([command, "--help"] for command in ("run", "preset", "lint", "simulate", "trace", "explain", "queue")),
    ],
)
def test_every_command_explains_itself(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0
    assert "usage: taskoffer" in capsys.readouterr().out


def subcommands() -> dict[str, argparse.ArgumentParser]:
    parser = command_line._parser()
    (found,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)


@pytest.mark.parametrize("name", subcommands())
def test_every_option_is_explained_and_every_exit_code_is_stated(name: str) -> None:
    command = subcommands()[name]
    for action in command._actions:
        assert action.help, f"{name} {action.dest} is not explained"
    shown = " ".join(command.format_help().split())
    assert command.description
    for code, meaning in MEANINGS[name].items():
        assert f"{code:d} {meaning}" in shown
    assert set(MEANINGS[name]) == set(Exit)


def test_no_exit_code_is_stated_for_a_command_that_is_not_there() -> None:
    assert set(MEANINGS) == set(subcommands())


PRESETS = [
    "balanced-4",
    "expected-value",
    "lab",
    "market-table",
    "sound",
    "strategy-8xh100",
    "strategy-maximum-accuracy",
]


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"taskoffer {taskoffer.__version__}\n"


@pytest.fixture
def replica(root_logger: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    """Have a replica end with an exception as soon as it is run."""

    def fails_with(error: Exception) -> None:
        def fail(_: object) -> int:
            raise error

        monkeypatch.setattr("taskoffer.handlers.run.main", fail)
        monkeypatch.setattr(sys, "setrecursionlimit", lambda _: None)

    return fails_with


@pytest.mark.parametrize(
    ("arguments", "place"),
    [(["--kubeconfig", "none"], "none"), ([], "neither a kubeconfig nor a pod's ServiceAccount")],
)
def test_a_replica_without_a_cluster_says_what_to_give(
    arguments: list[str],
    place: str,
    replica: Callable[[Exception], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("KUBECONFIG", raising=False)
    replica(ConfigException("there is nothing"))
    assert main(["run", *arguments]) == 1
    assert capsys.readouterr().err == (f"taskoffer: {place}: there is nothing; give --kubeconfig or set KUBECONFIG\n")


def test_a_port_that_is_taken_is_named(
    replica: Callable[[Exception], None], capsys: pytest.CaptureFixture[str]
) -> None:
    replica(OSError(errno.EADDRINUSE, "error while attempting to bind"))
    assert main(["run", "--listen", "127.0.0.1", "--port", "8080"]) == 1
    assert capsys.readouterr().err == (
        "taskoffer: 127.0.0.1:8080 cannot be listened on: Address already in use; choose another --port or --listen\n"
    )


def test_another_error_of_the_system_is_not_taken_for_one_of_the_port(replica: Callable[[Exception], None]) -> None:
    replica(OSError(errno.EIO, "a disk"))
    with pytest.raises(OSError, match="a disk"):
        main(["run"])


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["run", "--port", "70000"],
        ["run", "--port", "many"],
        ["lint"],
        ["lint", "policy.yaml", "--gpus", "0"],
        ["explain"],
        ["queue", "--limit", "x"],
    ],
)
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_presets_are_listed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preset"]) == 0
    assert capsys.readouterr().out.split() == PRESETS
    assert main(["preset", "lab", "--image", "registry.test/trainer:9"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["kind"] == "CapacityPolicy"
    assert printed["spec"]["podTemplate"]["image"] == "registry.test/trainer:9"


def test_an_unknown_preset_is_answered_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preset", "nope"]) == 2
    known = ", ".join(PRESETS)
    assert f"no preset 'nope'; there are {known}" in capsys.readouterr().err


def written(folder: Path, content: str | bytes) -> str:
    path = folder / "policy.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


@pytest.mark.parametrize(
    ("fields", "code", "text"),
    [
        ({}, 0, "Warning: filters.minScore: 0.45 rejects nothing"),
        ({"filters": {"minScore": "0.6"}}, 0, "0 finding(s)"),
        ({"filters": {"minScore": "0.99"}}, 1, "Error: filters.minScore: 0.99 rejects everything"),
    ],
)
def test_lint_fails_on_errors_only(
    fields: dict[str, object], code: int, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lint", written(tmp_path, yaml.safe_dump(make_policy(**fields)))]) == code
    assert text in capsys.readouterr().out


SLOTS = {"filters": {"minScore": None, "maxConcurrentJobs": 9}}
LANE = {
    "filters": {"minScore": None, "maxConcurrentJobs": None},
    "lanes": [{"name": "all", "gpus": 4, "rules": [{"gpusPerTask": 1}]}],
}
SHARED = {
    "resources": [{"name": "nvidia.com/gpu.shared", "counts": [1], "unitsPerGpu": 2}],
    "size_classes": [{"name": "All", "minParameters": 0, "gpus": 1, "sizeEfficiency": "1", "lora": {}, "train": {}}],
}


@pytest.mark.parametrize(
    ("fields", "options", "found"),
    [
        (SLOTS, [], []),
        (SLOTS, ["--gpus", "8"], ["maxConcurrentJobs: 9 never binds: with whole GPUs at most 8 jobs run at a time"]),
        (SLOTS, ["--nodes", "2", "--gpus", "8"], []),
        (SLOTS | SHARED, ["--gpus", "4"], ["maxConcurrentJobs: 9 never binds: with shared GPUs at most 8 jobs run"]),
        (SLOTS | SHARED, ["--nodes", "1"], []),
        (LANE, [], []),
        (LANE, ["--nodes", "1"], ["lanes: the lanes hand out 4 of the 8 GPUs that the selected nodes offer"]),
        (LANE, ["--nodes", "3", "--gpus", "1"], ["lanes: the lanes hand out 4 GPUs and the selected nodes offer 3"]),
    ],
)
def test_lint_compares_limits_and_lanes_with_the_gpus_that_it_is_given_and_else_says_how(
    fields: dict[str, object],
    options: list[str],
    found: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["lint", written(tmp_path, yaml.safe_dump(make_policy(**fields))), *options]) == 0
    printed = capsys.readouterr()
    told = [line for line in printed.out.splitlines() if "maxConcurrentJobs" in line or "hand out" in line]
    assert len(told) == len(found)
    assert all(text in line for text, line in zip(found, told, strict=True))
    how = "taskoffer: limits and lanes were not compared with GPUs: give --nodes and --gpus\n"
    assert printed.err == ("" if options else how)


def test_lint_names_the_faults_of_an_invalid_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = make_policy(resources=[{"name": "nvidia.com/gpu", "counts": [3]}])
    assert main(["lint", written(tmp_path, yaml.safe_dump(broken))]) == 1
    assert "must be one of 1, 2, 4, 8, got 3" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "- a list", "just text", "kind: Pod", "a: [1", b"\xff\xfe\x00"])
def test_lint_says_that_a_file_holds_no_policy(
    content: str | bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lint", written(tmp_path, content)]) == 2
    assert "policy.yaml" in capsys.readouterr().err


def test_lint_says_that_a_file_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", str(tmp_path / "none.yaml")]) == 2
    assert "cannot be read" in capsys.readouterr().err


# Logging


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    kept, level = root.handlers[:], root.level
    yield root
    root.handlers[:] = kept
    root.setLevel(level)


def test_json_logs_are_one_object_per_line_with_the_extra_fields(
    root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    command_line._log("json", verbose=False)
    log = logging.getLogger("taskoffer.test")
    log.info("offer %s decided", "a", extra={"offer": "default/a", "gpus": 2})
    log.debug("not shown")
    try:
        raise ValueError("boom")
    except ValueError:
        log.exception("two\nlines")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["message"] for line in lines] == ["offer a decided", "two\nlines"]
    assert (lines[0]["level"], lines[0]["logger"]) == ("info", "taskoffer.test")
    assert (lines[0]["offer"], lines[0]["gpus"]) == ("default/a", 2)
    assert "ValueError: boom" in lines[1]["exception"]
    assert not {"args", "msg", "lineno"} & lines[0].keys()


def test_text_logs_end_with_the_extra_fields(root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    command_line._log("text", verbose=True)
    logging.getLogger("taskoffer.test").debug("decided", extra={"offer": "default/a"})
    assert capsys.readouterr().err.rstrip().endswith("DEBUG taskoffer.test: decided offer=default/a")


# Packaging


def test_the_source_root_does_not_shadow_the_standard_library() -> None:
    assert not (ROOT / "operator" / "__init__.py").exists()
    import operator

    assert operator.itemgetter(1)("ab") == "b"


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "operator" / "taskoffer" / "py.typed").exists()


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "taskoffer", "preset"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "operator")},
    )
    assert done.stdout.split() == PRESETS


def test_the_contract_loads_without_any_of_the_operators_libraries() -> None:
    """The trainer image holds pydantic and the training stack, and neither kopf nor a Kubernetes client."""
    probe = (
        "import sys; import taskoffer.api.contract; "
        "print(sorted({'kopf', 'kubernetes', 'aiohttp', 'prometheus_client', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_layers_of_the_architecture_hold() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout
