"""The control plane of the lab: real, quick, several at once, and gone without a trace."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lab_fixtures import owner_of_a_cluster
from taskoffer_lab.api_client import ApiClient, ApiError, ClientConfig
from taskoffer_lab.errors import LabError
from taskoffer_lab.install import install
from taskoffer_lab.kubeconfig_provider import KubeconfigProvider
from taskoffer_lab.local_provider import LocalCluster, LocalProvider
from taskoffer_lab.paths import package_root, state_root
from taskoffer_lab.process_table import wait_until
from taskoffer_lab.spec import ClusterSpec
from taskoffer_lab.state import find_record
from taskoffer_lab.teardown import sweep

OWNER = """
import sys, time
from taskoffer_lab.local_provider import LocalProvider
from taskoffer_lab.spec import ClusterSpec
with LocalProvider().up(ClusterSpec(name=sys.argv[1])):
    print("up", flush=True)
    time.sleep(600)
"""


def processes_of(name: str) -> list[str]:
    """Command lines of all processes that mention the cluster's folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if f"{state_root() / name}/" in line or f"{state_root() / name} " in line:
                found.append(line)
    return found


def traces_of(name: str) -> list[str]:
    folder = state_root() / name
    return processes_of(name) + ([str(folder)] if folder.exists() else [])


def test_the_control_plane_answers_as_kubernetes_1_36(controlplane: LocalCluster) -> None:
    version = controlplane.api.request("GET", "/version")
    assert version["gitVersion"] == "v1.36.3"
    assert '"gitVersion": "v1.36.3"' in controlplane.kubectl("get", "--raw", "/version")


def test_rbac_refuses_a_service_account_without_a_role(controlplane: LocalCluster) -> None:
    can_i = ["auth", "can-i", "list", "secrets", "--as=system:serviceaccount:default:default"]
    assert controlplane.kubectl(*can_i, check=False).startswith("no")
    proxy = ClientConfig.from_kubeconfig(controlplane.record.layout.kubeconfig("kube-proxy"))
    with pytest.raises(ApiError) as refused:
        ApiClient(proxy).request("GET", "/api/v1/namespaces/default/secrets")
    assert refused.value.status == 403


def test_a_job_gets_its_pod_from_the_controller_manager(controlplane: LocalCluster) -> None:
    controlplane.kubectl("create", "namespace", "jobs")
    controlplane.kubectl("create", "job", "one", "-n", "jobs", "--image=none.invalid/x")
    try:
        wait_until(lambda: "one-" in controlplane.kubectl("get", "pods", "-n", "jobs", "-o", "name"), "the pod", 60)
    finally:
        # The cluster is shared: left behind, the pod would go to another test's node.
        controlplane.kubectl("delete", "job", "one", "-n", "jobs", "--cascade=foreground")


def test_two_clusters_run_at_once_and_are_not_mixed_up(controlplane: LocalCluster) -> None:
    with LocalProvider().up(ClusterSpec(name=f"two-{os.getpid()}")) as other:
        other.kubectl("create", "namespace", "only-there")
        assert other.client_config.server != controlplane.client_config.server
        assert "only-there" not in controlplane.kubectl("get", "namespaces")
    assert traces_of(other.name) == []
    assert "default" in controlplane.kubectl("get", "namespaces")


def test_a_member_can_be_paused_stopped_and_started_again() -> None:
    with LocalProvider().up(ClusterSpec(name=f"faults-{os.getpid()}")) as cluster:
        cluster.kubectl("create", "namespace", "survivor")
        apiserver, etcd = cluster.process("kube-apiserver"), cluster.process("etcd")
        etcd.pause()
        impatient = ApiClient(cluster.client_config, timeout=1.0)
        with pytest.raises(OSError, match="timed out"):
            impatient.request("POST", "/api/v1/namespaces", {"metadata": {"name": "lost"}})
        etcd.resume()
        cluster.wait_ready()
        before = apiserver.pid
        apiserver.kill()
        assert apiserver.pid is None
        apiserver.start()
        cluster.wait_ready()
        assert apiserver.pid not in (None, before)
        assert "survivor" in cluster.kubectl("get", "namespaces")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_nothing_is_left_when_the_owner_ends_by(number: signal.Signals) -> None:
    name = f"end-{os.getpid()}"
    with owner_of_a_cluster(OWNER, name) as owner:
        assert len(processes_of(name)) >= 5
        owner.send_signal(number)
        owner.communicate(timeout=60)
    wait_until(lambda: traces_of(name) == [], f"all traces of {name} gone after {number.name}", 60)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda n: n.name)
def test_nothing_is_left_when_the_owner_ends_while_its_cluster_starts_by(number: signal.Signals) -> None:
    name = f"early-{os.getpid()}"
    environment = {**os.environ, "PYTHONPATH": str(package_root())}
    with subprocess.Popen([sys.executable, "-c", OWNER, name], env=environment) as owner:
        wait_until(lambda: len(processes_of(name)) >= 3, "the start of the API server", 60, interval=0.01)
        owner.send_signal(number)
    wait_until(lambda: traces_of(name) == [], f"all traces of {name} gone after {number.name}", 60)


def test_taking_a_cluster_down_whose_supervisor_was_killed_sweeps_it() -> None:
    cluster = LocalProvider().up(ClusterSpec(name=f"headless-{os.getpid()}"))
    supervisor = find_record(cluster.name).supervisor
    assert supervisor is not None
    os.kill(supervisor.pid, signal.SIGKILL)
    wait_until(lambda: not supervisor.alive, "the supervisor's end", 30)
    assert cluster.down() is not None  # Its logs are kept: nobody meant it to end.
    assert traces_of(cluster.name) == []


def test_a_killed_supervisor_takes_its_processes_along_and_the_next_command_sweeps_the_rest() -> None:
    name = f"sweep-{os.getpid()}"
    with owner_of_a_cluster(OWNER, name):
        supervisor = find_record(name).supervisor
        assert supervisor is not None
        os.kill(supervisor.pid, signal.SIGKILL)
        wait_until(lambda: not supervisor.alive, "the supervisor's end", 30)
        wait_until(lambda: processes_of(name) == [], "the end of its children", 30)
        assert (state_root() / name).exists()
        assert name in sweep()
        assert traces_of(name) == []


def test_a_cluster_that_cannot_start_says_why_and_keeps_its_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    from taskoffer_lab import local_provider
    from taskoffer_lab.errors import LabError
    from taskoffer_lab.toolchain import ToolSet, ensure_tools

    good = ensure_tools(["controlplane"])
    broken = ToolSet({**good.paths, "etcd": Path("/bin/false")})
    monkeypatch.setattr(local_provider, "ensure_tools", lambda names: broken)
    name = f"broken-{os.getpid()}"
    with pytest.raises(LabError, match="etcd ended with status 1") as failure:
        LocalProvider().up(ClusterSpec(name=name))
    kept = re.search(r"logs: (\S+)", failure.value.remedy)
    assert kept is not None
    assert (Path(kept.group(1)) / "supervisor.log").exists()
    assert traces_of(name) == []


def test_a_name_cannot_be_taken_twice(controlplane: LocalCluster) -> None:
    from taskoffer_lab.errors import LabError

    with pytest.raises(LabError, match="is there already"):
        LocalProvider().up(ClusterSpec(name=controlplane.name))


def test_a_control_plane_takes_seconds_when_its_tools_are_built() -> None:
    started = time.monotonic()
    with LocalProvider().up(ClusterSpec(name=f"quick-{os.getpid()}")):
        assert time.monotonic() - started < 60  # 4 s on 2 idle cores; other work may run beside the tests.


def test_the_kubeconfig_provider_uses_a_cluster_and_leaves_it_alone(controlplane: LocalCluster) -> None:
    found = KubeconfigProvider(controlplane.kubeconfig).up(ClusterSpec(name="theirs"))
    with found as theirs:
        install(theirs)
        assert "taskoffers.taskoffer.dev" in theirs.kubectl("get", "crds", "-o", "name")
        assert "ok" in theirs.kubectl("get", "--raw", "/readyz")
        with pytest.raises(LabError, match="are not the lab's") as refused:
            theirs.process("etcd")
        assert "use the local provider" in str(refused.value)
    assert controlplane.api.ready(), "a cluster that was there before outlives the lab's use of it"


def test_the_kubeconfig_provider_says_what_is_missing(tmp_path: Path, controlplane: LocalCluster) -> None:
    with pytest.raises(LabError, match="no kubeconfig at") as refused:
        KubeconfigProvider(tmp_path / "none").up(ClusterSpec(name="theirs"))
    assert "set KUBECONFIG" in str(refused.value)
    dead = tmp_path / "dead"
    text = controlplane.kubeconfig.read_text()
    dead.write_text(text.replace(controlplane.client_config.server, "https://127.0.0.1:1"))
    with pytest.raises(LabError, match="does not answer"):
        KubeconfigProvider(dead).up(ClusterSpec(name="theirs"))
