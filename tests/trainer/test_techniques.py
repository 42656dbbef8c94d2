"""Each technique of a training really does what its setting says: looked at from within, not at the setting."""

from __future__ import annotations

from typing import Any

import pytest

from .conftest import Found, found_by
from .preloaded import Preloader

pytestmark = pytest.mark.trainer


@pytest.fixture(scope="module")
def found(base_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, libraries: Preloader) -> Found:
    return found_by("technique_probes.py", base_config, tmp_path_factory.mktemp("techniques"), libraries)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def falls(losses: list[float], least: float = 0.1) -> bool:
    """Tell whether the last quarter of the steps has smaller losses than the first."""
    part = max(1, len(losses) // 4)
    return mean(losses[-part:]) < mean(losses[:part]) - least


def test_with_bf16_the_base_is_halved_and_the_adapter_stays_exact(found: Found) -> None:
    said = found["bf16"]
    assert (said["base"], said["adapter"]) == (["torch.bfloat16"], ["torch.float32"])
    assert said["said"] == "bfloat16"
    assert "NoBF16" not in {clamp["reason"] for clamp in said["clamps"]}
    assert falls(said["losses"])


@pytest.mark.parametrize(
    ("wish", "in_use", "clamped"),
    [("none", "sdpa", None), ("all", "sdpa", "flash_attention_3, flash_attention_2, sdpa, eager"),
     ("flash", "sdpa", "flash_attention_2"), ("eager", "eager", None)],
)  # fmt: skip
def test_attention_falls_back_to_what_is_there_and_says_what_is_in_use(
    wish: str, in_use: str, clamped: str | None, found: Found
) -> None:
    said = found["attention"][wish]
    assert said["inUse"] == said["loaded"] == in_use
    requested = [clamp["requested"] for clamp in said["clamps"] if clamp["effective"] == in_use]
    assert requested == ([] if clamped is None else [clamped])


def test_two_ways_to_compute_attention_agree(found: Found) -> None:
    assert 0 < found["attention"]["apart"] < 1e-4


def test_gradient_checkpointing_computes_layers_again_and_changes_no_loss(found: Found) -> None:
    off, on = found["checkpointing"]["False"], found["checkpointing"]["True"]
    assert on["calls"] == 2 * off["calls"] > 0
    assert on["losses"] == pytest.approx(off["losses"], rel=1e-5)


@pytest.mark.parametrize("way", ["sdpa", "eager"])
def test_packed_rows_learn_what_they_would_alone(way: str, found: Found) -> None:
    said = found["packing"][way]
    assert said["sequences"] < 0.8 * said["rows"]
    assert said["together"] == pytest.approx(said["apart"], rel=1e-6)
    assert all(0 < loss < 20 for loss in said["losses"])


@pytest.mark.parametrize("way", ["sdpa", "eager"])
def test_packed_rows_do_not_see_each_other(way: str, found: Found) -> None:
    said = found["packing"][way]
    assert said["firstChanged"] > 0.1
    assert said["secondChanged"] == 0


def test_gradients_are_clipped_to_the_norm_that_was_asked_for(found: Found) -> None:
    said = found["clipping"]
    assert all(norm > 0.5 for norm in said["before"])
    assert said["after"] == pytest.approx([0.01] * 4, rel=1e-3)


def test_a_limit_of_tokens_makes_the_pieces_smaller_and_changes_no_loss(found: Found) -> None:
    free, limited = found["tokens"]["None"], found["tokens"]["200"]
    assert len(free["padded"]) == 3
    assert max(limited["padded"]) <= 200 < max(free["padded"])
    assert limited["losses"] == pytest.approx(free["losses"], rel=1e-5)
    # Evaluations are planned with the memory of a step: one row of 160 tokens.
    assert (free["evaluated"], limited["evaluated"]) == (8, 1)


def test_no_row_and_no_sample_is_longer_than_the_model_can_take(found: Found) -> None:
    said = found["context"]
    assert (said["answers"], len(said["losses"]), said["longest"]) == (1, 1, 96)
    (clamp,) = [one for one in said["clamps"] if one["field"] == "train.maxLength"]
    assert (clamp["requested"], clamp["effective"], clamp["reason"]) == ("2048", "96", "LengthClamped")


def test_the_optimizer_is_the_one_that_was_asked_for(found: Found) -> None:
    said = found["optimizers"]
    assert (said["adamw_torch_fused"]["class"], said["adamw_torch_fused"]["fused"]) == ("AdamW", True)
    assert (said["adamw_torch"]["class"], said["adamw_torch"]["fused"]) == ("AdamW", False)
    assert said["adafactor"]["class"] == "Adafactor"
    assert "exp_avg_sq_row" in said["adafactor"]["state"]


# Hidden size 64, feed-forward 128, 4 heads of 16 with 2 key-value heads; a layer's rank and its scale.
SCALES: dict[str, dict[str, tuple[int, float]]] = {
    "plain": {"q_proj": (8, 2.0), "k_proj": (8, 2.0), "down_proj": (8, 2.0)},
    # alpha / sqrt(r), which the smaller rank of the small layers keeps.
    "rslora": {"q_proj": (16, 4.0), "k_proj": (10, 4.0), "down_proj": (16, 4.0)},
    "pattern": {"q_proj": (4, 2.0), "k_proj": (10, 2.0), "down_proj": (8, 2.0)},
}


@pytest.mark.parametrize("name", SCALES)
def test_every_layer_has_its_own_rank_and_the_scale_of_all(name: str, found: Found) -> None:
    layers = found["scales"][name]["layers"]
    for layer, (rank, scale) in SCALES[name].items():
        assert layers[layer] == pytest.approx([rank, scale]), layer


def test_a_rank_of_a_pattern_that_a_layer_cannot_use_is_clamped_and_said(found: Found) -> None:
    clamps = [clamp for clamp in found["scales"]["pattern"]["clamps"] if clamp["reason"] == "RankClamped"]
    assert [(one["field"], one["requested"], one["effective"]) for one in clamps] == [("lora.r[k_proj]", "64", "10")]


def test_experts_and_their_router_are_adapted_within_what_they_can_use_and_without_dropout(found: Found) -> None:
    said = found["experts"]
    effective = {clamp["field"]: clamp["effective"] for clamp in said["clamps"]}
    assert effective["lora.loraDropout"] == "0"
    # Four experts of 64 x 32; two layers of that are joined in one tensor, which has the rank of both.
    assert (effective["lora.r[experts.down_proj]"], effective["lora.r[experts.gate_up_proj]"]) == ("10", "16")
    assert said["adapters"]["experts.lora_A"] == [4 * 10, 32]
    assert said["adapters"]["experts.base_layer.lora_A"] == [4 * 16, 64]
    assert said["adapters"]["gate.lora_A"] == [1, 64]


def test_an_adapter_of_experts_learns_and_does_after_loading_what_it_did_in_training(found: Found) -> None:
    said = found["experts"]
    assert falls(said["losses"], 0.0)
    assert said["verified"] == pytest.approx(said["measured"], rel=1e-6)


def test_a_run_recovers_from_steps_whose_gradients_are_no_numbers(found: Found) -> None:
    said = found["nan_steps"]
    assert said["skipped"] == 2
    assert said["finite"]
    assert falls(said["losses"])
    # The steps in question have the loss of the one before them, for there is none of their own.
    assert said["losses"][3:5] == [said["losses"][2]] * 2


@pytest.mark.parametrize(("mib", "messages"), [("1", 6), ("2", 3), ("200", 1), ("None", 1)])
def test_the_bucket_size_decides_how_many_messages_carry_the_gradients(mib: str, messages: int, found: Found) -> None:
    assert found["buckets"][mib] == {"messages": messages, "values": [0.25]}


def test_what_is_trained_last_is_evaluated_as_well(found: Found) -> None:
    assert found["evaluations"]["plain"] == [4, 8, 10]


def test_evaluations_that_take_long_come_less_often_and_as_often_after_a_restart(found: Found) -> None:
    said = found["evaluations"]
    assert said["slow"] == [6, 12, 18, 20]
    assert said["stretch"] == 3
    assert [(one["requested"], one["effective"]) for one in said["clamps"]] == [("2", "6")]


def test_no_more_checkpoints_are_kept_than_asked_for_the_best_included(found: Found) -> None:
    assert len(found["evaluations"]["kept"]) == 3
