"""How long a row may be for a model is what its configuration says, in the words of each family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from taskoffer.api.contract import RunConfig
from taskoffer_trainer.context import context_of, within_context
from taskoffer_trainer.failures import TrainerError

from .conftest import merge

pytestmark = pytest.mark.trainer

# What the config.json of such a model says, and the longest row that it was made for.
SAID: dict[str, tuple[Any, int | None]] = {
    "llama 2": ({"max_position_embeddings": 4096}, 4096),
    "gpt 2": ({"n_ctx": 1024, "n_positions": 1024}, 1024),
    "mpt": ({"max_seq_len": 2048}, 2048),
    "llama 3.1": (
        {
            "max_position_embeddings": 131072,
            "rope_scaling": {"factor": 8.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        },
        131072,
    ),
    "vicuna 16k": ({"max_position_embeddings": 4096, "rope_scaling": {"factor": 4.0, "type": "linear"}}, 16384),
    "qwen with yarn": (
        {
            "max_position_embeddings": 32768,
            "rope_parameters": {"factor": 4.0, "original_max_position_embeddings": 32768, "rope_type": "yarn"},
        },
        131072,
    ),
    "gemma 3": (
        {
            "text_config": {
                "max_position_embeddings": 32768,
                "rope_parameters": {"full_attention": {"factor": 8.0}, "sliding_attention": {"rope_theta": 1e4}},
            }
        },
        262144,
    ),
    "phi 3": ({"max_position_embeddings": 131072, "rope_scaling": {"long_factor": [1.0], "type": "longrope"}}, 131072),
    "bloom": ({"hidden_size": 64}, None),
    "nothing of use": ({"max_position_embeddings": None, "n_positions": -1, "rope_scaling": "dynamic"}, None),
    "no object": ([1], None),
}


def write(folder: Path, said: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize(("said", "positions"), SAID.values(), ids=SAID)
def test_the_longest_row_is_read_from_what_a_model_says(said: Any, positions: int | None, tmp_path: Path) -> None:
    assert context_of(write(tmp_path, said)) == positions


def test_a_model_that_is_not_there_bounds_nothing(tmp_path: Path) -> None:
    assert context_of(tmp_path / "missing") is None


@pytest.fixture
def wire(base_config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    model = {"name": "acme/short", "path": str(write(tmp_path, {"n_positions": 512}))}
    return {**base_config, "model": model, "outputDir": "/o", "checkpointDir": "/c"}


@pytest.mark.parametrize(("asked", "effective"), [(2048, 512), (512, None), (100, None)])
def test_longer_rows_are_clamped_and_shorter_ones_are_not(
    asked: int, effective: int | None, wire: dict[str, Any]
) -> None:
    found, clamps = within_context(RunConfig.model_validate(merge(wire, {"train": {"maxLength": asked}})))
    assert found.train.max_length == (effective or asked)
    said = [(one.field, one.requested, one.effective, one.reason) for one in clamps]
    assert said == ([("train.maxLength", str(asked), str(effective), "ContextClamped")] if effective else [])


def test_completions_that_fill_the_model_leave_no_room_for_a_prompt(wire: dict[str, Any]) -> None:
    changes = {"taskType": "GRPO", "train": {"maxLength": 2048, "grpo": {"maxCompletionLength": 512}}}
    with pytest.raises(TrainerError, match=r"maxCompletionLength: 512 tokens .* the 512 that acme/short") as error:
        within_context(RunConfig.model_validate(merge(wire, changes)))
    assert error.value.code == 64
