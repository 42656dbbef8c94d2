"""What ships beside the operator is taken by a real API server, and says what its pages say."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from taskoffer.render.names import STEP_LABEL
from taskoffer_lab.install import project_root
from taskoffer_lab.local_provider import LocalCluster

POLICIES = project_root() / "deploy" / "network-policies.yaml"


@pytest.mark.parametrize("manifest", sorted((project_root() / "deploy").glob("*.yaml")), ids=lambda path: path.name)
def test_the_server_takes_every_manifest_that_ships(manifest: Path, operator_home: LocalCluster) -> None:
    said = operator_home.kubectl("apply", "--dry-run=server", "--server-side", "--force-conflicts", "-f", str(manifest))
    assert "serverside-applied (server dry run)" in said


def test_a_training_reaches_nothing_and_the_steps_around_it_reach_names_and_https() -> None:
    train, steps = (part["spec"] for part in yaml.safe_load_all(POLICIES.read_text(encoding="utf-8")))
    assert train["podSelector"]["matchLabels"] == {STEP_LABEL: "train"}
    assert train["egress"] == []
    (chosen,) = steps["podSelector"]["matchExpressions"]
    assert (chosen["key"], set(chosen["values"])) == (STEP_LABEL, {"prepare", "submit"})
    assert {port["port"] for rule in steps["egress"] for port in rule["ports"]} == {53, 443}
