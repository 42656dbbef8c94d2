"""What no schema kept out: objects stored under other rules, broken statuses, and the operator's own rights."""

from __future__ import annotations

import json
from typing import Any

import pytest

from builders import make_admission
from operator_bench import GROUP, Bench, condition
from operator_process import OperatorProcess
from permissive_crds import anything_goes, eventually, refused
from taskoffer_lab.api_client import ApiClient, ClientConfig
from taskoffer_lab.install import operator_kubeconfig
from taskoffer_lab.local_provider import LocalCluster

pytestmark = pytest.mark.usefixtures("operator")

MALFORMED: dict[str, dict[str, Any]] = {
    "unknown-type": {"taskType": "Telepathy"},
    "no-model": {"model": None},
    "number-as-text": {"timeLimitSeconds": "an hour"},
    "negative-time": {"timeLimitSeconds": -1},
    "list-for-object": {"dataset": []},
    "two-datasets": {"dataset": {"type": "Instruct", "chat": {"chatColumn": "x"}, "dpo": {"fieldPrompt": "y"}}},
    "empty-name": {"model": {"name": ""}},
    "bad-date": {"expiresAt": "tomorrow"},
    "number-for-text": {"taskID": 7},
    "huge-number": {"model": {"name": "meta-llama/Llama-3.1-8B", "parameters": 10**17}},
}


BROKEN_STATUSES: tuple[dict[str, Any], ...] = (
    {"conditions": "none"},
    {"conditions": [17, {"type": 4}]},
    {"conditions": [{"type": "Admitted"}], "score": {"a": 1}},
    {"admission": {"assignments": "everything"}},
    {"admission": []},
)


def malformed_offer(bench: Bench, name: str) -> dict[str, Any]:
    offer = bench.make_offer(name)
    offer["spec"].update(MALFORMED[name])
    return offer


def test_malformed_offers_are_answered_and_do_not_keep_the_others_from_being_decided(bench: Bench) -> None:
    bench.node()
    bench.policy()
    with anything_goes(bench, "taskoffers"):
        for name in MALFORMED:
            eventually(lambda name=name: bench.create(malformed_offer(bench, name)), f"offer {name} stored")
    dry = bench.path("taskoffers") + "?dryRun=All"
    probe = {**malformed_offer(bench, "unknown-type"), "metadata": {"name": "probe"}}
    refused(lambda: bench.api.request("POST", dry, probe), "the strict schema in force again")
    for number in range(3):
        bench.admitted(f"good-{number}")
    for name in MALFORMED:
        offer = bench.decided(name, "InvalidOffer")
        assert condition(offer, "Finished")["reason"] == "Rejected", name
        assert "not valid" in condition(offer, "Admitted")["message"], name
        assert len(bench.status_writes(name)) == 1, name
    for number in range(3):
        bench.bound_pod(f"good-{number}")


def test_the_answer_to_a_malformed_offer_names_the_field(bench: Bench) -> None:
    bench.node()
    bench.policy()
    with anything_goes(bench, "taskoffers"):
        eventually(lambda: bench.create(malformed_offer(bench, "negative-time")), "offer stored")
        offer = bench.decided("negative-time", "InvalidOffer")
    assert "timeLimitSeconds" in condition(offer, "Admitted")["message"]


def test_a_policy_with_an_unknown_value_keeps_its_last_good_version_in_force(bench: Bench) -> None:
    bench.node()
    bench.policy()
    with anything_goes(bench, "capacitypolicies"):
        eventually(lambda: bench.patch_policy({"filters": {"onFull": "Explode"}}), "policy stored")
        policy = bench.policy_condition("Ready", "InvalidPolicy")
        assert "onFull" in condition(policy, "Ready")["message"]
        assert bench.admitted("one")["status"]["admission"]["policyRef"]["generation"] == 1


def test_a_broken_status_of_one_offer_does_not_stop_the_others(bench: Bench) -> None:
    bench.node()
    bench.policy()
    with anything_goes(bench, "taskoffers"):
        odd = []
        for number, status in enumerate(BROKEN_STATUSES):
            offer = bench.make_offer(f"odd-{number}", active=False)
            eventually(lambda offer=offer: odd.append(bench.create(offer)), "offer stored")
            eventually(lambda n=number, s=status: bench.patch_status("taskoffers", f"odd-{n}", s), "status stored")
        bench.admitted("good", 2)
        bench.bound_pod("good")
        for offer in odd:
            bench.delete(offer["metadata"]["name"])
    bench.keep_out_of_the_audit(*odd)


def test_an_unreadable_training_job_does_not_stop_the_others(bench: Bench) -> None:
    bench.node()
    bench.policy()
    bench.admitted("first")
    pod = bench.run("first")
    name = bench.training_job("first")["metadata"]["name"]
    with anything_goes(bench, "trainingjobs"):
        attempts = [{"jobName": 5, "assignments": "here"}]
        eventually(lambda: bench.patch_status("trainingjobs", name, {"attempts": attempts}), "status stored")
        second = bench.run_through("second")
        assert second["status"]["admission"]["jobName"].startswith("second-")
        bench.patch_status("trainingjobs", name, {"attempts": None, "conditions": None})
        bench.end(pod)
        bench.finished("first", "Succeeded")


def test_a_foreign_pod_that_asks_for_an_odd_amount_does_no_harm(bench: Bench) -> None:
    node = bench.node(gpus=4)
    bench.policy()
    containers = [
        {"name": "trainer", "image": "x.invalid/x", "resources": {"limits": {"nvidia.com/gpu": "1"}}},
        {"name": "other", "image": "x.invalid/x", "resources": {"limits": {"nvidia.com/gpu": "2"}}},
        {"name": "third", "image": "x.invalid/x", "resources": {"limits": {"example.com/fpga": "2000m"}}},
    ]
    spec = {"nodeName": node, "containers": containers}
    bench.api.request("POST", bench.path("pods", api="/api/v1"), {"metadata": {"name": "odd"}, "spec": spec})
    bench.booked(node, 3)
    bench.admitted("one")


def test_an_admission_on_a_node_that_does_not_exist_harms_nobody(bench: Bench) -> None:
    bench.node()
    policy = bench.policy(attempts={"nodeLostSeconds": 1, "maxAttempts": 1})
    offer = bench.offer("lost", active=False)
    bench.decided("lost", "Suspended")
    made = make_admission(
        job=f"lost-{offer['metadata']['uid'][:8]}",
        node="no-such-node",
        policy=bench.policy_name,
        policy_uid=policy["metadata"]["uid"],
    )
    bench.patch_status("taskoffers", "lost", {"admission": made})
    bench.admitted("good")
    bench.bound_pod("good")
    bench.finished("lost", "Cancelled")


RULES = {
    ("", "configmaps"): {"get", "create"},
    ("", "events"): {"create"},
    ("", "nodes"): {"get", "list", "watch"},
    ("", "pods"): {"get", "list", "watch"},
    ("", "pods/log"): {"get"},
    ("batch", "jobs"): {"get", "list", "watch", "create", "patch", "delete"},
    ("taskoffer.dev", "taskoffers"): {"get", "list", "watch"},
    ("taskoffer.dev", "taskoffers/status"): {"patch"},
    ("taskoffer.dev", "capacitypolicies"): {"get", "list", "watch"},
    ("taskoffer.dev", "capacitypolicies/status"): {"patch"},
    ("taskoffer.dev", "trainingjobs"): {"get", "list", "watch", "create"},
    ("taskoffer.dev", "trainingjobs/status"): {"patch"},
}
"""All that the operator may do; more of it here is a decision that somebody has to take."""

FORBIDDEN: list[tuple[str, str, dict[str, Any] | None]] = [
    ("GET", "/api/v1/namespaces/default/secrets", None),
    ("GET", "/api/v1/secrets", None),
    ("PATCH", f"{GROUP}/namespaces/default/taskoffers/x", {"spec": {"active": False}}),
    ("DELETE", f"{GROUP}/namespaces/default/taskoffers/x", None),
    ("PATCH", f"{GROUP}/capacitypolicies/x", {"spec": {}}),
    ("PATCH", f"{GROUP}/namespaces/default/trainingjobs/x", {"spec": {}}),
    ("DELETE", f"{GROUP}/namespaces/default/trainingjobs/x", None),
    ("POST", "/api/v1/namespaces/default/pods", {"metadata": {"name": "x"}}),
    ("DELETE", "/api/v1/namespaces/default/pods/x", None),
    ("PATCH", "/api/v1/nodes/x", {"spec": {"unschedulable": True}}),
    ("GET", "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases/x", None),
]


@pytest.fixture
def as_operator(operator_home: LocalCluster, operator_directory: Any) -> ApiClient:
    """A client with the operator's credentials."""
    return ApiClient(ClientConfig.from_kubeconfig(operator_kubeconfig(operator_home, operator_directory)))


def test_the_operator_has_the_rights_that_it_needs_and_no_others(as_operator: ApiClient) -> None:
    review = {"kind": "SelfSubjectRulesReview", "apiVersion": "authorization.k8s.io/v1", "spec": {"namespace": "x"}}
    path = "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews"
    rules = as_operator.request("POST", path, review)["status"]["resourceRules"]
    held: dict[tuple[str, str], set[str]] = {}
    for rule in rules:
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                held.setdefault((group, resource), set()).update(rule["verbs"])
    everybody = {key for key in held if key[0] in ("authentication.k8s.io", "authorization.k8s.io")}
    assert {key: verbs for key, verbs in held.items() if key not in everybody} == RULES


@pytest.mark.parametrize(("method", "path", "body"), FORBIDDEN, ids=lambda value: str(value)[:60])
def test_the_operator_is_refused(as_operator: ApiClient, method: str, path: str, body: Any) -> None:
    kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
    status, content = as_operator.raw(method, path, body, kind)
    assert status == 403, json.loads(content)


def test_nothing_that_was_stored_made_the_operator_stumble(operator: OperatorProcess, bench: Bench) -> None:
    with anything_goes(bench, "taskoffers"):
        eventually(lambda: bench.create(malformed_offer(bench, "list-for-object")), "offer stored")
        bench.decided("list-for-object", "InvalidOffer")
        unreadable = operator.metric("taskoffer_objects_unreadable_total", kind="TaskOffer")
    assert unreadable is not None
    assert unreadable >= 1
    assert operator.leads
