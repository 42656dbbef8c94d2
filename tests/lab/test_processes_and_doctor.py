"""Children of a supervisor, its control socket, caches, and what the doctor says."""

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from taskoffer_lab import cli, debian, node_requirements
from taskoffer_lab.cli import main
from taskoffer_lab.control_channel import ControlSocket, ask
from taskoffer_lab.doctor import CAPABILITIES, Finding, report, verdicts
from taskoffer_lab.errors import LabError
from taskoffer_lab.locking import try_lock
from taskoffer_lab.node_store import claim_slot, prune_slots, store_root
from taskoffer_lab.paths import folder_size, package_root, state_root
from taskoffer_lab.process_table import Command, ProcessTable, start_time, wait_until
from taskoffer_lab.prune import cache_use, prune
from taskoffer_lab.toolchain import ensure_tools, missing_tool_names


def sleeper(folder: Path, script: str = "import time; time.sleep(600)") -> Command:
    return Command("sleeper", [sys.executable, "-c", script], folder / "sleeper.log")


def test_a_member_is_stopped_and_started_with_the_same_arguments(tmp_path: Path) -> None:
    table = ProcessTable()
    first = table.start(sleeper(tmp_path))
    assert table.act("sleeper", "stop") == {"pid": None}
    second = table.act("sleeper", "start")["pid"]
    assert second not in (None, first)
    table.kill_all()
    assert not table.alive("sleeper")


def test_a_paused_member_stands_still_until_it_is_resumed(tmp_path: Path) -> None:
    table = ProcessTable()
    pid = table.start(sleeper(tmp_path))
    table.act("sleeper", "pause")
    wait_until(lambda: state_of(pid) == "T", "the pause", 5)
    table.act("sleeper", "resume")
    wait_until(lambda: state_of(pid) != "T", "the resumption", 5)
    table.kill_all()


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_member_that_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taskoffer_lab.process_table.STOP_SECONDS", 0.2)
    script = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    table = ProcessTable()
    table.start(sleeper(tmp_path, script))
    wait_until(lambda: "deaf" in (tmp_path / "sleeper.log").read_text(), "the member to be deaf", 10)
    table.stop("sleeper")
    assert table.dead() == [("sleeper", -signal.SIGKILL, tmp_path / "sleeper.log")]


def test_members_die_with_their_starter_even_when_it_is_killed(tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from taskoffer_lab.process_table import Command, ProcessTable
command = Command("s", [sys.executable, "-c", "import time; time.sleep(600)"], Path(sys.argv[1]))
print(ProcessTable().start(command), flush=True)
time.sleep(600)
"""
    environment = {**os.environ, "PYTHONPATH": str(package_root())}
    arguments = [sys.executable, "-c", script, str(tmp_path / "log")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment) as starter:
        assert starter.stdout is not None
        child = int(starter.stdout.readline())
        assert start_time(child) is not None
        starter.kill()
    wait_until(lambda: start_time(child) is None, "the child's end", 5)


@pytest.mark.parametrize(("name", "action"), [("sleeper", "dance"), ("nobody", "stop"), ("sleeper", "start")])
def test_what_cannot_be_done_to_a_member_is_refused(tmp_path: Path, name: str, action: str) -> None:
    table = ProcessTable()
    table.start(sleeper(tmp_path))
    with pytest.raises(LabError):
        table.act(name, action)
    table.kill_all()


def test_the_control_socket_answers_refuses_and_outlives_nonsense(tmp_path: Path) -> None:
    def handle(request: dict[str, Any]) -> dict[str, Any]:
        if request["op"] == "bad":
            raise LabError("no", "do something else")
        return {"echo": request["op"]}

    control = ControlSocket(tmp_path / "ctl")
    stop = threading.Event()

    def serve() -> None:
        while not stop.wait(0.01):
            control.serve_one(handle)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with socket.socket(socket.AF_UNIX) as rude:
            rude.connect(str(control.path))
            rude.sendall(b"not json\n")
            assert rude.recv(100) == b""
        assert ask(control.path, {"op": "good"})["echo"] == "good"
        with pytest.raises(LabError, match="no") as refused:
            ask(control.path, {"op": "bad"})
        assert refused.value.remedy == "do something else"
    finally:
        stop.set()
        thread.join()
        control.close()
    with pytest.raises(LabError, match="no answer"):
        ask(control.path, {"op": "good"})


def test_a_waiting_that_has_become_pointless_ends_at_once() -> None:
    def check() -> None:
        raise LabError("it has died")

    with pytest.raises(LabError, match="it has died"):
        wait_until(lambda: False, "something", 60, check=check)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TASKOFFER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_free_storage_is_given_to_one_node_only_and_again_afterwards(cache: Path) -> None:
    first, second = claim_slot(), claim_slot()
    assert [first.folder.name, second.folder.name] == ["slot-1", "slot-2"]
    os.close(first.lock)
    third = claim_slot()
    assert third.folder == first.folder
    os.close(second.lock)
    os.close(third.lock)


def test_pruning_takes_the_last_free_storage_first_and_none_that_is_in_use(cache: Path) -> None:
    slots = [claim_slot() for _ in range(3)]
    for slot in slots:
        (slot.folder / "layer").write_bytes(b"x" * 300_000)
    for slot in slots[1:]:
        os.close(slot.lock)
    assert folder_size(cache) >= 900_000
    assert prune(bound=700_000) == [store_root() / "slot-3"]
    assert sum(use.size for use in cache_use()) <= 700_000
    assert prune(bound=0) == [store_root() / "slot-2"]
    assert prune_slots() == []
    os.close(slots[0].lock)


def test_a_lock_is_free_when_its_holder_has_died(tmp_path: Path) -> None:
    script = "import sys; from pathlib import Path; from taskoffer_lab.locking import try_lock\n"
    script += "assert try_lock(Path(sys.argv[1])) is not None; print('held', flush=True); sys.stdin.read()"
    environment = {**os.environ, "PYTHONPATH": str(package_root())}
    arguments = [sys.executable, "-c", script, str(tmp_path / "lock")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(arguments, env=environment, text=True, **pipes) as holder:  # type: ignore[call-overload]
        assert holder.stdout.readline() == "held\n"
        assert try_lock(tmp_path / "lock") is None
        holder.kill()
    found = try_lock(tmp_path / "lock")
    assert found is not None
    os.close(found)


def test_a_state_folder_too_deep_for_sockets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKOFFER_STATE", "/tmp/" + "x" * 60)
    with pytest.raises(LabError, match="sockets"):
        state_root()


def test_an_unknown_tool_is_refused_by_name() -> None:
    with pytest.raises(LabError, match="kubeadm"):
        ensure_tools(["kubeadm"])


def fake_asset(folder: Path, name: str, output: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\necho '{output}'\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("name", "output", "used"),
    [
        ("kube-apiserver", "Kubernetes v1.36.9", True),
        ("kube-apiserver", "Kubernetes v1.33.0", False),
        ("etcd", "etcd Version: 3.6.8", True),
        ("etcd", "etcd Version: 3.4.1", False),
        ("kubectl", "Client Version: v1.36.0", True),
        ("kubectl", "Client Version: v1.3.6", False),
    ],
)
def test_assets_are_used_if_their_version_fits(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, output: str, used: bool
) -> None:
    fake_asset(tmp_path / "assets", name, output)
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path / "assets"))
    assert (missing_tool_names([name]) == []) is used
    if used:
        assert ensure_tools([name])[name] == tmp_path / "assets" / name


def test_missing_programs_without_root_name_the_command_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian, "find_program", lambda name: None)
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    with pytest.raises(LabError, match="runc") as missing:
        debian.ensure_programs(["runc", "bridge"])
    assert "apt-get install" in missing.value.remedy
    assert "containernetworking-plugins runc" in missing.value.remedy


def test_without_root_nodes_are_impossible_and_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "root: running as user 1000" in node_requirements.why_no_nodes()


FINDINGS = [
    Finding("Go", "none", False, ("control plane", "nodes"), "installed from PyPI", automatic=True),
    Finding("root", "user 1000", False, ("nodes",), "sudo"),
    Finding("memory", "24 GB", True, ("control plane",)),
    Finding("kind", "missing", False, ("kind",), "install kind"),
]


def test_what_the_lab_brings_itself_stands_in_nobodys_way() -> None:
    found = verdicts(FINDINGS)
    assert set(found) == set(CAPABILITIES)
    assert found["control plane"] == []
    assert found["nodes"] == ["root"]
    assert found["kind"] == ["kind"]


def test_the_report_names_every_finding_with_its_remedy() -> None:
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    assert report(FINDINGS, console) is False
    text = console.export_text()
    console.file.close()
    assert all(item.name in text and (item.ok or item.remedy in text) for item in FINDINGS)
    assert "nodes          no: root" in text


@pytest.mark.parametrize("command", [[], ["doctor"], ["up"], ["down"], ["status"], ["tools"], ["prune"], ["demo"]])
def test_every_command_explains_itself(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    assert "usage: taskoffer-lab" in capsys.readouterr().out


def test_a_failure_is_one_message_with_its_remedy_and_status_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_status", lambda arguments: (_ for _ in ()).throw(LabError("broken", "mend it")))
    assert main(["status"]) == 1
    assert capsys.readouterr().err == "taskoffer-lab: broken\n  remedy: mend it\n"


def test_an_impossible_wish_on_the_command_line_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "--nodes", "99"]) == 1
    assert "0 to 16" in capsys.readouterr().err
