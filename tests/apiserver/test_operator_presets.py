"""The examples under every preset: each gets the answer that docs/explanation/presets.md states."""

from __future__ import annotations

import pytest

from operator_bench import Bench
from stated_answers import FOLDERS, ROOT, answers, rows
from taskoffer import presets

pytestmark = pytest.mark.usefixtures("operator")

H100 = {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_page_has_a_row_for_each_example_and_a_column_for_each_preset(folder: str) -> None:
    shown = [row for row in rows() if row.path.parent == ROOT / folder]
    assert [row.path for row in shown] == sorted((ROOT / folder).glob("*.yaml"))
    for row in shown:
        assert sorted(row.answers) == presets.names()


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("preset", presets.names())
def test_the_examples_get_the_answers_that_the_page_states(bench: Bench, preset: str, folder: str) -> None:
    bench.node(labels=H100)
    bench.preset(preset)
    found = answers(bench, preset, folder)
    assert found.given == found.stated
