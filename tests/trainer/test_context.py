"""No row is longer than what the model takes in, and YaRN stretches that where it is asked for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from taskoffer.api.contract import ExitCode, RunConfig
from taskoffer_trainer.config import fingerprint, identity
from taskoffer_trainer.context import Context, context_of
from taskoffer_trainer.effective import effective
from taskoffer_trainer.failures import TrainerError

from .conftest import Found, found_by, merge
from .preloaded import Preloader

pytestmark = pytest.mark.trainer


@pytest.fixture(scope="module")
def found(base_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, libraries: Preloader) -> Found:
    return found_by("context_probes.py", base_config, tmp_path_factory.mktemp("context"), libraries)


@pytest.fixture
def wire(base_config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    folders = {"outputDir": "/o", "checkpointDir": str(tmp_path / "checkpoints")}
    return merge(base_config, {**folders, "model": {"path": str(tmp_path)}})


def config(wire: dict[str, Any], said: Any, **changes: Any) -> RunConfig:
    text = said if isinstance(said, str) else json.dumps(said)
    (Path(wire["model"]["path"]) / "config.json").write_text(text)
    return RunConfig.model_validate(merge(wire, changes))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}

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
    "no JSON": ("{", None),
}


@pytest.mark.parametrize(("said", "positions"), SAID.values(), ids=SAID)
def test_the_longest_row_is_read_from_what_a_model_says(said: Any, positions: int | None, wire: dict[str, Any]) -> None:
    assert context_of(config(wire, said)) == Context(positions)


def test_a_model_that_is_not_there_bounds_nothing(wire: dict[str, Any]) -> None:
    assert context_of(RunConfig.model_validate(merge(wire, {"model": {"path": "/missing"}}))) == Context()


STRETCHED: list[tuple[Any, int, Context]] = [
    # What config.json says, the factor that is asked for, and what is made of both
    ({"max_position_embeddings": 2048}, 4, Context(8192, 2048)),
    ({"max_position_embeddings": 2048, "rope_scaling": None}, 2, Context(4096, 2048)),
    ({"max_position_embeddings": 2048, "rope_parameters": {"rope_type": "default"}}, 2, Context(4096, 2048)),
    ({"max_position_embeddings": 8192, "rope_parameters": YARN}, 4, Context(8192)),
    ({"max_position_embeddings": 2048, "rope_parameters": YARN}, 4, Context(8192)),
    ({"max_position_embeddings": 2048, "rope_scaling": {"type": "yarn", "factor": 4}}, 4, Context(8192)),
]


@pytest.mark.parametrize(("said", "factor", "context"), STRETCHED)
def test_a_model_is_stretched_unless_it_was_before(
    said: Any, factor: int, context: Context, wire: dict[str, Any]
) -> None:
    assert context_of(config(wire, said, model={"yarnFactor": factor})) == context


REFUSED = [
    ({"max_position_embeddings": 8192, "rope_parameters": YARN}, "has positions that are scaled already, by yarn with"),
    (
        {"max_position_embeddings": 8192, "rope_scaling": {"rope_type": "llama3", "factor": 8}},
        "by llama3 with factor 8",
    ),
    ({"alibi": True}, "does not say how many positions it has"),
]


@pytest.mark.parametrize(("said", "why"), REFUSED)
def test_a_model_that_cannot_be_stretched_is_refused_with_the_field(said: Any, why: str, wire: dict[str, Any]) -> None:
    with pytest.raises(TrainerError) as error:
        effective(config(wire, said, model={"yarnFactor": 2}))
    assert error.value.code is ExitCode.BAD_CONFIG
    assert error.value.message.startswith("model.yarnFactor: acme/tiny-llama ")
    assert why in error.value.message


LENGTHS: list[tuple[dict[str, Any], dict[str, Any], int, list[str]]] = [
    # Changes of the task, of its settings, the length in force, and what is said to be changed
    ({}, {"maxLength": 160}, 64, ["train.maxLength 160 -> 64"]),
    ({}, {"maxLength": 64}, 64, []),
    ({"model": {"yarnFactor": 2}}, {"maxLength": 160}, 128, ["train.maxLength 160 -> 128"]),
    ({"model": {"yarnFactor": 4}}, {"maxLength": 160}, 160, []),
]


@pytest.mark.parametrize(("changes", "train", "length", "said"), LENGTHS)
def test_rows_are_cut_where_the_models_positions_end(
    changes: dict[str, Any], train: dict[str, Any], length: int, said: list[str], wire: dict[str, Any]
) -> None:
    found = effective(config(wire, {"max_position_embeddings": 64}, train=train, **changes))
    assert found.config.train.max_length == length
    clamps = [clamp for clamp in found.clamps if clamp.reason == "LengthClamped"]
    assert [f"{one.field} {one.requested} -> {one.effective}" for one in clamps] == said


@pytest.mark.parametrize(("asked", "used"), [(32, 32), (63, 63), (64, 32), (120, 32)])
def test_completions_leave_room_for_the_prompt_in_a_short_context(asked: int, used: int, wire: dict[str, Any]) -> None:
    grpo = {"fieldPrompt": "instruction", "rewardFunctions": [{"name": "json", "builtin": {"name": "JSONValid"}}]}
    drawn = config(
        wire,
        {"n_positions": 64},
        taskType="GRPO",
        data={"instruct": None, "grpo": grpo},
        train={"maxLength": 160, "grpo": {"maxCompletionLength": asked}},
    )
    found = effective(drawn)
    assert found.config.train.grpo is not None
    assert found.config.train.grpo.max_completion_length == used < found.config.train.max_length == 64
    fields = [clamp.field for clamp in found.clamps if clamp.reason == "LengthClamped"]
    assert fields == ["train.maxLength"] + ["train.grpo.maxCompletionLength"] * (asked != used)


def test_checkpoints_of_a_stretched_model_are_those_of_another_run(wire: dict[str, Any]) -> None:
    plain, twice = (config(wire, {}, model={"yarnFactor": factor}) for factor in (None, 2))
    assert fingerprint(plain) != fingerprint(twice)
    model = identity(plain)["model"]
    assert isinstance(model, dict)
    assert "yarnFactor" not in model


def test_a_model_with_learned_positions_is_trained_and_asked_within_them(found: Found) -> None:
    said = found["learned_positions"]
    assert said["code"] == 0
    assert said["longest"] == 48
    assert [(one["effective"], one["reason"]) for one in said["clamps"]] == [("48", "LengthClamped")]


def test_a_stretched_model_is_the_same_however_it_is_loaded(found: Found) -> None:
    plain, stretched = found["stretching"]["plain"], found["stretching"]["stretched"]
    assert set(stretched["type"]) == {"yarn"}
    assert stretched["positions"] == [4 * one for one in plain["positions"]]
    # The paper's: the slowest turn 4 times slower, and 0.1 ln(4) + 1 on what attention compares.
    assert stretched["slowest"] == pytest.approx([one / 4 for one in plain["slowest"]])
    assert stretched["scaling"] == pytest.approx([0.1 * math.log(4) + 1] * 2)
    assert plain["scaling"] == [1.0] * 2


def test_the_adapter_of_a_stretched_model_says_how_its_base_is_loaded(found: Found) -> None:
    said = found["stretched_run"]
    assert (said["code"], said["inForce"]["yarnFactor"]) == (0, "2")
    assert '{"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": ' in said["card"]
