"""Pinned GPUs and the operator's rights: without them the policy says so, with them it comes into force by itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from device_bench import RIGHTS, a_driver, allocation, chosen, claims, device_node, pinning
from operator_bench import SECONDS, Bench, condition
from operator_process import OperatorProcess, until_its_end
from taskoffer_lab.local_provider import LocalCluster


@pytest.fixture
def driver(operator_home: LocalCluster) -> Iterator[LocalCluster]:
    """A cluster with a driver's DeviceClass; rights that a test gives are taken away again."""
    with a_driver(operator_home):
        yield operator_home
    operator_home.kubectl("delete", "--ignore-not-found", "-f", RIGHTS)


@pytest.fixture
def replica(driver: LocalCluster, bench: Bench, operator_directory: Path) -> Iterator[OperatorProcess]:
    """A replica that is not started yet and looks at everything every two seconds."""
    yield from until_its_end(OperatorProcess(driver, operator_directory, "--resync", "2"))


def test_an_operator_without_rights_says_what_to_apply_and_takes_them_up_by_starting_again(
    driver: LocalCluster, bench: Bench, replica: OperatorProcess
) -> None:
    device_node(bench, "a", 2)
    with bench.audit.excused():
        replica.start()
        pinning(bench, ready="DevicesNotAvailable")
        ready = condition(bench.get_policy(), "Ready")
        assert (ready["status"], ready["reason"]) == ("False", "DevicesNotAvailable")
        assert "the operator may not read resource.k8s.io/v1: apply deploy/devices.yaml" in ready["message"]
        bench.offer("waits", 2)
        bench.decided("waits", "PolicyNotReady")
        driver.kubectl("apply", "--server-side", "-f", RIGHTS)
        assert replica.wait_ended(SECONDS) == 1
        assert "leaving: a policy pins GPUs" in replica.log()
        replica.start()
    bench.policy_condition("Ready", "Ready")
    assert chosen(bench.decided("waits", "Admitted")) == ["gpu-0", "gpu-1"]
    bench.bound_pod("waits")


def test_a_restart_knows_who_has_which_device(driver: LocalCluster, bench: Bench, replica: OperatorProcess) -> None:
    driver.kubectl("apply", "--server-side", "-f", RIGHTS)
    device_node(bench, "a", 4)
    with bench.audit.excused():
        replica.start()
    pinning(bench)
    first = chosen(bench.admitted("first", 2))
    bench.bound_pod("first")
    with bench.audit.excused():
        replica.kill(forget_lease=True)
        bench.delete("first")
        bench.offer("second", 2)
        replica.start()
    # The claim of the deleted offer is in use by a pod that nobody has ended, and no admission tells of it any more.
    assert first == ["gpu-0", "gpu-1"]
    assert chosen(bench.decided("second", "Admitted")) == ["gpu-2", "gpu-3"]
    bench.offer("third", 1)
    bench.decided("third", "WaitingForCapacity")
    bench.bound_pod("second")
    assert sorted(allocation(claim) for claim in claims(bench)) == [["gpu-0", "gpu-1"], ["gpu-2", "gpu-3"]]
