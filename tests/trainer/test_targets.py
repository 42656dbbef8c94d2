"""Which layers are adapted where a policy lists the layers of another kind of model."""

from __future__ import annotations

from typing import Any

import pytest
from diffusers import UNet2DConditionModel
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from taskoffer.api.contract import ExitCode, LoraSettings, rank_cap
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.lora import linear_shapes, lora_config
from taskoffer_trainer.sdxl import SDXL

pytestmark = pytest.mark.trainer

SEVEN = "q_proj,v_proj,k_proj,o_proj,gate_proj,up_proj,down_proj"
WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
OF_GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64}

MODELS: dict[str, tuple[dict[str, Any], str]] = {
    # Kind: its widths, and the layers of a block.
    "phi3": ({**WIDTHS, **HEADS, "pad_token_id": 0}, "down_proj gate_up_proj o_proj qkv_proj"),
    "gpt2": (OF_GPT2, "c_attn c_fc c_proj"),
    "gptj": ({**OF_GPT2, "rotary_dim": 8}, "fc_in fc_out k_proj out_proj q_proj v_proj"),
    "gpt_neo": (
        {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 64, "attention_types": [[["global"], 1]]},
        "c_fc c_proj k_proj out_proj q_proj v_proj",
    ),
    "opt": (
        {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
        | {"word_embed_proj_dim": 32},
        "fc1 fc2 k_proj out_proj q_proj v_proj",
    ),
    "starcoder2": ({**WIDTHS, **HEADS}, "c_fc c_proj k_proj o_proj q_proj v_proj"),
}


# What PEFT and transformers say of each other.
@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning", "ignore:fan_in_fan_out is set:UserWarning"
)
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_whose_layers_are_called_otherwise_is_adapted_in_all_of_them(kind: str) -> None:
    widths, layers = MODELS[kind]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **widths))
    settings, clamps = lora_config(model, LoraSettings(r=64, lora_alpha=64, target_modules=SEVEN))
    (told,) = [clamp for clamp in clamps if clamp.field == "lora.targetModules"]
    assert (told.requested, told.effective, told.reason) == (SEVEN, "all-linear", "TargetsClamped")
    assert told.message.endswith(f"this model has {', '.join(layers.split())}.")
    adapted = get_peft_model(model, settings)
    ranks = {name: module.r["default"] for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    assert {name.rpartition(".")[2] for name in ranks} == set(layers.split())
    for name, rank in ranks.items():
        adapter = adapted.get_submodule(name)
        assert rank == min(64, rank_cap(adapter.in_features, adapter.out_features)), name


def test_layers_that_the_model_has_are_taken_as_they_are_listed() -> None:
    widths, _ = MODELS["starcoder2"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("starcoder2", **widths))
    settings, clamps = lora_config(model, LoraSettings(r=4, lora_alpha=4, target_modules="q_proj, c_fc"))
    assert (set(settings.target_modules), clamps) == ({"q_proj", "c_fc"}, ())


def tiny_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def test_a_network_of_pictures_gets_its_own_layers_in_place_of_a_text_models() -> None:
    settings, clamps = lora_config(
        tiny_unet(), LoraSettings(r=4, lora_alpha=4, target_modules=SEVEN), SDXL.target_modules
    )
    assert settings.target_modules == SDXL.target_modules
    assert [(clamp.field, clamp.effective) for clamp in clamps] == [("lora.targetModules", "all-linear")]


def test_a_model_without_any_layer_to_adapt_is_refused() -> None:
    with pytest.raises(TrainerError, match="no linear layers that all-linear means") as refusal:
        linear_shapes(tiny_unet(), "all-linear", "nothing")
    assert (refusal.value.code, refusal.value.reason) == (ExitCode.BAD_CONFIG, "TargetModuleMissing")
