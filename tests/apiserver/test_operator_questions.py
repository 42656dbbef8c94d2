"""Questions to a running operator: over its port, on the command line, and through the API server's proxy."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from operator_bench import Bench, condition
from operator_process import OperatorProcess, until_its_end
from taskoffer.api.inquiry import OfferAnswer, QueueAnswer
from taskoffer.cli.main import main
from taskoffer_lab.api_client import MERGE_PATCH, ApiError
from taskoffer_lab.local_provider import LocalCluster
from taskoffer_lab.process_table import wait_until

pytestmark = pytest.mark.usefixtures("operator")

SYSTEM = "/api/v1/namespaces/taskoffer-system"
ROOT = Path(__file__).parents[2]
ROLES = "/apis/rbac.authorization.k8s.io/v1/namespaces/taskoffer-system"


def ask(operator: OperatorProcess, path: str) -> Any:
    with urllib.request.urlopen(f"http://127.0.0.1:{operator.port}{path}", timeout=60) as answer:
        return json.loads(answer.read())


def queue_of(operator: OperatorProcess, bench: Bench) -> QueueAnswer:
    return QueueAnswer.model_validate(ask(operator, f"/v1/queue?policy={bench.policy_name}"))


def explained(operator: OperatorProcess, bench: Bench, name: str) -> OfferAnswer:
    return OfferAnswer.model_validate(ask(operator, f"/v1/offers/{bench.namespace}/{name}"))


def test_offers_that_wait_are_told_as_their_statuses_say_and_nothing_is_written(
    bench: Bench, operator: OperatorProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    node = bench.node(gpus=4)
    bench.policy(queue={"priorities": ["low", "high"]})
    bench.admitted("first", 2)
    for name, priority in (("large", "low"), ("urgent", "high")):
        bench.offer(name, 4, priority_class=priority)
        bench.decided(name, "WaitingForCapacity")
    bench.offer("paused", active=False)
    bench.decided("paused", "Suspended")
    bench.offer("long", hours=40)
    bench.decided("long", "TimeLimitTooLong")
    before = {offer["metadata"]["name"]: offer for offer in bench.offers()}

    made = queue_of(operator, bench)
    assert made.leading
    assert [one.name for one in made.offers] == ["urgent", "large", "paused"]
    for one in made.offers:
        status = before[one.name]["status"]
        assert one.reason == condition(before[one.name], "Admitted")["reason"]
        assert one.score == status["score"]
    first, second = made.offers[0].start, made.offers[1].start
    assert first is not None
    assert second is not None
    # Both need the whole node: one follows the job that runs, the other follows it an hour later.
    assert 3500 < (second.expected - first.expected).total_seconds() < 3700

    for name, stored in before.items():
        told = explained(operator, bench, name).offer
        said = condition(stored, "Admitted")
        assert (told.stored_reason or told.reason) == said["reason"], name
        if told.state == "Pending":
            assert told.message == said["message"]
        if "score" in stored["status"]:
            assert told.score == stored["status"]["score"]
            terms = {i["name"]: i["value"] for i in stored["status"]["explanation"] if i["type"] == "Term"}
            assert not terms or {term.name: term.points for term in told.terms} == terms
    changes = {c.change.split(",")[0]: c for c in explained(operator, bench, "urgent").offer.counterfactuals}
    assert set(changes) == {f"after {bench.namespace}/first ends", "with gpuCount 2", "with gpuCount 1"}

    server = ("--server", f"http://127.0.0.1:{operator.port}")
    assert main(["explain", "urgent", "-n", bench.namespace, *server]) == 0
    shown = capsys.readouterr().out
    assert f"{bench.namespace}/urgent: WAITING (accepted, WaitingForCapacity) needs 4 x nvidia.com/gpu" in shown
    assert f"{node} has the most free, 2 of 4" in shown
    assert "*  admitted now  with gpuCount 2" in shown
    assert main(["queue", "--policy", bench.policy_name, "-o", "json", *server]) == 0
    listed = QueueAnswer.model_validate_json(capsys.readouterr().out)
    assert [one.name for one in listed.offers] == ["urgent", "large", "paused"]
    assert main(["explain", "nobody", "-n", bench.namespace, *server]) == 1
    assert f"there is no TaskOffer nobody in namespace {bench.namespace}" in capsys.readouterr().err

    assert {offer["metadata"]["name"]: offer for offer in bench.offers()} == before


def test_what_is_told_to_help_helps(bench: Bench, operator: OperatorProcess) -> None:
    bench.node(gpus=4)
    bench.policy()
    bench.admitted("first", 2)
    bench.offer("asked", 4)
    bench.decided("asked", "WaitingForCapacity")
    told = explained(operator, bench, "asked").offer.counterfactuals
    change = next(c for c in told if c.spec)
    assert (change.verdict, change.replaces) == ("Admit", True)
    bench.delete("asked")
    bench.create(bench.make_offer("asked-anew", 4, spec=change.spec))
    bench.decided("asked-anew", "Admitted")


@pytest.fixture
def standby(operator_home: LocalCluster, operator_directory: Path) -> Iterator[OperatorProcess]:
    """A second replica, which does not lead, and which the API server can reach."""
    replica = OperatorProcess(operator_home, operator_directory, "--listen", "0.0.0.0")
    for it in until_its_end(replica):
        yield it.start(leading=False)


def address_of_this_machine() -> str | None:
    """Return an address that is not the loopback's, which a Service's endpoints may not have."""
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return None
        found = str(probe.getsockname()[0])
    return None if found.startswith("127.") else found


@pytest.fixture
def service(bench: Bench, operator_home: LocalCluster, standby: OperatorProcess) -> Iterator[OperatorProcess]:
    """The Service that ships with one pod of the Deployment that ships, behind whose address the standby listens."""
    address = address_of_this_machine()
    if address is None:
        pytest.skip("this machine has no address besides the loopback's")
    api = operator_home.api
    shipped = {part["kind"]: part for part in yaml.safe_load_all((ROOT / "deploy/operator.yaml").read_text())}
    template = shipped["Deployment"]["spec"]["template"]
    template["spec"]["nodeName"] = bench.node(gpus=1)
    template["spec"]["containers"][0]["ports"][0]["containerPort"] = standby.port
    pod = {"metadata": {**template["metadata"], "name": "standby"}, "spec": template["spec"]}
    api.request("POST", f"{SYSTEM}/services", shipped["Service"])
    api.request("POST", f"{SYSTEM}/pods", pod)
    ready = {"type": "Ready", "status": "True"}
    status = {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}], "conditions": [ready]}
    api.request("PATCH", f"{SYSTEM}/pods/standby/status", {"status": status}, MERGE_PATCH)
    try:
        yield standby
    finally:
        api.request("DELETE", f"{SYSTEM}/services/taskoffer")
        api.request("DELETE", f"{SYSTEM}/pods/standby", {"gracePeriodSeconds": 0})


def viewer(home: LocalCluster, folder: Path, name: str) -> Path:
    """Make a ServiceAccount, and return a kubeconfig with its token."""
    with contextlib.suppress(ApiError):
        home.api.request("POST", f"{SYSTEM}/serviceaccounts", {"metadata": {"name": name}})
    token = home.kubectl("create", "token", name, "-n", "taskoffer-system").strip()
    authority = base64.b64encode((home.client_config.authority or "").encode()).decode()
    cluster = {"server": home.client_config.server, "certificate-authority-data": authority}
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "clusters": [{"name": "c", "cluster": cluster}],
        "users": [{"name": "u", "user": {"token": token}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "default"}}],
    }
    path = folder / f"{name}.kubeconfig"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def let_view(home: LocalCluster, account: str) -> None:
    subject = {"kind": "ServiceAccount", "name": account, "namespace": "taskoffer-system"}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "taskoffer-viewer"}
    body = {"metadata": {"name": account}, "roleRef": role, "subjects": [subject]}
    home.api.request("POST", f"{ROLES}/rolebindings", body)


def standby_answers(replica: OperatorProcess) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{replica.port}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


PROXIED = f"{SYSTEM}/services/taskoffer:http/proxy"
ODD_PATHS = {
    "/v1/queue?namespace=": 400,
    "/v1/queue?policy=%00": 400,
    "/v1/offers/default/a%2Fb": 404,
    "/v1/offers/default/%25": 400,
    "/v1/offers/default/a%20b": 400,
    "/v1/offers/default/%C3%A4": 400,
    "/v1/offers/de%0Afault/a": 400,
    f"/v1/offers/default/{'a' * 300}": 400,
    "/v1/offers/default": 404,
    "/v2": 404,
}


def test_without_an_address_the_service_is_asked_through_the_api_server_with_the_rights_that_ship(
    bench: Bench,
    operator_home: LocalCluster,
    service: OperatorProcess,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The node of the standby's pod has one GPU.
    bench.policy()
    bench.admitted("first")
    bench.offer("second")
    bench.decided("second", "WaitingForCapacity")
    wait_until(lambda: standby_answers(service), "the standby is ready", 40)
    allowed, other = viewer(operator_home, tmp_path, "looks"), viewer(operator_home, tmp_path, "stranger")
    let_view(operator_home, "looks")

    def shown(kubeconfig: Path, *arguments: str) -> tuple[int, str]:
        code = main([*arguments, "--kubeconfig", str(kubeconfig)])
        taken = capsys.readouterr()
        return code, taken.out + taken.err

    asked = ("queue", "--policy", bench.policy_name)
    wait_until(lambda: shown(allowed, *asked)[0] == 0, "the proxy serves", 40, interval=0.5)
    code, text = shown(allowed, *asked)
    assert f"{bench.namespace}/second" in text
    assert "answered by a replica that does not lead" in text
    code, text = shown(allowed, "explain", "second", "-n", bench.namespace)
    assert code == 0
    assert f"after {bench.namespace}/first ends" in text
    code, text = shown(allowed, "explain", "nobody")
    assert code == 1
    assert text == (
        "taskoffer: there is no TaskOffer nobody in namespace default "
        "(the kubeconfig's context c names that namespace: -n changes it)\n"
    )
    for odd, wanted in ODD_PATHS.items():
        status, body = operator_home.api.raw("GET", f"{PROXIED}{odd}")
        assert status == wanted, (odd, body)
        assert set(json.loads(body)) == {"error"}, odd
    code, text = shown(other, "queue")
    assert code == 1
    assert "get on services/proxy of Service taskoffer in namespace taskoffer-system is needed" in text
    unready = {"status": {"conditions": [{"type": "Ready", "status": "False"}]}}
    operator_home.api.request("PATCH", f"{SYSTEM}/pods/standby/status", unready, MERGE_PATCH)
    wait_until(lambda: "has no replica that is ready" in shown(allowed, "queue")[1], "no endpoints", 40, interval=0.5)


def test_a_cluster_without_the_service_says_what_to_apply(
    operator_home: LocalCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    allowed = viewer(operator_home, tmp_path, "looks-in-vain")
    let_view(operator_home, "looks-in-vain")

    def asked() -> str:
        assert main(["queue", "--kubeconfig", str(allowed)]) == 1
        return capsys.readouterr().err

    wait_until(lambda: "apply deploy/operator.yaml" in asked(), "not found", 40, interval=0.5)
