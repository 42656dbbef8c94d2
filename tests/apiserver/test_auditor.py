"""The auditor at work on a real API server: it sees what happens, also across a restart, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from auditor import AuditFailure, Auditor
from auditor_judgement import Limits
from builders import make_admission, make_condition, make_job, make_node, make_offer, make_pod, make_training_job
from taskoffer_lab.api_client import MERGE_PATCH
from taskoffer_lab.local_provider import LocalCluster
from taskoffer_lab.process_table import wait_until

# ruff: noqa: PT012 - the failure comes from leaving the auditor's block, whatever is in it.

NODE = "audited-node"
GROUP = "/apis/taskoffer.dev/v1alpha1"


@pytest.fixture
def node(crds: LocalCluster) -> Iterator[str]:
    """A node with 8 GPUs that only the API server knows; no pod ever runs there."""
    made = make_node(NODE, gpus=8)
    crds.api.request("POST", "/api/v1/nodes", made)
    crds.api.request("PATCH", f"/api/v1/nodes/{NODE}/status", {"status": made["status"]}, MERGE_PATCH)
    yield NODE
    crds.api.request("DELETE", f"/api/v1/nodes/{NODE}")


class ByHand:
    """Does by hand what the operator would do."""

    def __init__(self, cluster: LocalCluster, namespace: str) -> None:
        self.cluster, self.namespace = cluster, namespace
        self.uids: dict[str, str] = {}

    def offer(self, name: str) -> None:
        path = f"{GROUP}/namespaces/{self.namespace}/taskoffers"
        self.uids[name] = self.cluster.api.request("POST", path, make_offer(name=name, namespace=self.namespace))[
            "metadata"
        ]["uid"]

    def answer(self, name: str, **status: Any) -> None:
        path = f"{GROUP}/namespaces/{self.namespace}/taskoffers/{name}/status"
        self.cluster.api.request("PATCH", path, {"status": status}, MERGE_PATCH)

    def admit(self, name: str, gpus: int) -> None:
        made = make_admission(job=f"{name}-job", gpus=gpus, node=NODE)
        self.answer(name, admission=made, conditions=[make_condition("Admitted", True, "Admitted")])

    def training_job(self, name: str) -> None:
        made = make_training_job(name=f"{name}-job", namespace=self.namespace, offer=name, offer_uid=self.uids[name])
        self.cluster.api.request("POST", f"{GROUP}/namespaces/{self.namespace}/trainingjobs", made)

    def job(self, name: str, gpus: int) -> None:
        made = make_job(
            training_job=f"{name}-job",
            offer_uid=self.uids[name],
            namespace=self.namespace,
            gpus=gpus,
            node=NODE,
        )
        self.cluster.api.request("POST", f"/apis/batch/v1/namespaces/{self.namespace}/jobs", made)

    def run(self, name: str, gpus: int) -> None:
        self.offer(name)
        self.admit(name, gpus)
        self.training_job(name)
        self.job(name, gpus)


@pytest.fixture
def hand(crds: LocalCluster, namespace: str, node: str) -> ByHand:
    return ByHand(crds, namespace)


def test_work_that_fits_is_clean(crds: LocalCluster, hand: ByHand) -> None:
    with Auditor(crds.kubeconfig) as audit:
        hand.run("one", 4)
        hand.run("two", 4)
        # The Job controller makes the pods in its own time.
        wait_until(lambda: made_of(audit) >= {"TaskOffer", "TrainingJob", "Job", "Pod"}, "every kind was seen", 30)
        assert audit.check() == []
    assert audit.gaps == []


def made_of(audit: Auditor) -> set[str]:
    return {event.kind for event in list(audit.events) if event.type == "ADDED"}


def test_a_job_too_many_fails_the_audit_with_the_numbers_and_the_history(crds: LocalCluster, hand: ByHand) -> None:
    with pytest.raises(AuditFailure) as caught, Auditor(crds.kubeconfig):
        hand.run("one", 8)
        hand.run("two", 1)
    text = str(caught.value)
    assert f"(a) Job {hand.namespace}/two-job-1: asks 1 nvidia.com/gpu on {NODE}, which offers 8 with 8 charged" in text
    assert f"{hand.uids['one']} holds 8" in text
    assert "ADDED" in text


def test_a_foreign_pod_counts(crds: LocalCluster, hand: ByHand) -> None:
    with pytest.raises(AuditFailure, match="foreign holds 1"), Auditor(crds.kubeconfig, Limits(lag=0)):
        pod = make_pod("foreign", namespace=hand.namespace, gpus=1, node=NODE)
        hand.cluster.api.request("POST", f"/api/v1/namespaces/{hand.namespace}/pods", pod)
        hand.run("one", 8)


def test_an_admission_that_nobody_carries_out_fails_the_audit(crds: LocalCluster, hand: ByHand) -> None:
    with pytest.raises(AuditFailure, match="without its TrainingJob"), Auditor(crds.kubeconfig, Limits(bound=0.5)) as a:
        hand.offer("one")
        hand.admit("one", 1)
        wait_until(lambda: bool(a.check()), "the bound has passed", 10)


def test_what_the_auditor_saw_is_added_to_a_failure_of_the_test_itself(crds: LocalCluster, hand: ByHand) -> None:
    with pytest.raises(ZeroDivisionError) as caught, Auditor(crds.kubeconfig):
        hand.run("one", 8)
        hand.run("two", 8)
        raise ZeroDivisionError
    assert "the auditor found" in caught.value.__notes__[0]


def test_nothing_is_missed_while_the_api_server_restarts(crds: LocalCluster, hand: ByHand) -> None:
    with pytest.raises(AuditFailure) as caught, Auditor(crds.kubeconfig) as audit:
        hand.run("one", 8)
        server = crds.process("kube-apiserver")
        with audit.excused():
            server.kill()
            server.start()
            crds.wait_ready()
            hand.run("two", 8)
    found = [line.strip() for line in str(caught.value).splitlines() if line.startswith("  (")]
    assert len(found) == 1
    assert f"(a) Job {hand.namespace}/two-job-1: asks 8" in found[0]
