"""Settings of a reinforcement task with group-relative advantages (GRPO)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from taskoffer.api.base import WireModel

DRAWN_PER_TRAINED = 4
"""How many completions are drawn at once for each that is trained at once: drawing keeps keys and values of all layers
and no activations, which is about a quarter for models with grouped attention."""


class GRPOSettings(WireModel):
    """How completions are drawn, rewarded and learned from, named as in TRL's GRPOConfig where it has the setting.

    The completions of a prompt count as rows of a step: the global batch is a multiple of ``num_generations``.
    Group size, length and ``beta`` default to those of the task market's own GRPO configuration.
    """

    num_generations: Annotated[int, Field(ge=2, le=64)] = Field(
        4, description="Completions of a prompt, which are compared with each other."
    )
    num_generations_eval: Annotated[int, Field(ge=1, le=16)] = Field(
        2, description="Completions of a held-out prompt in an evaluation."
    )
    max_completion_length: Annotated[int, Field(ge=1, le=32768)] = Field(
        256, description="Longest completion in tokens; prompt and completion share maxLength."
    )
    temperature: Annotated[float, Field(gt=0, le=2)] = Field(1.0, description="Temperature of the draws.")
    beta: Annotated[float, Field(ge=0, le=10)] = Field(
        0.04, description="Weight of the KL divergence from the base model, in the loss and in the evaluation."
    )
    loss_type: Literal["dapo", "grpo", "bnpo", "dr_grpo"] = Field(
        "dapo", description="What the loss is a mean over, as in TRL."
    )
    scale_rewards: Literal["group", "none"] = Field(
        "group", description="Whether advantages are divided by the standard deviation of their group."
    )
    reward_call_seconds: Annotated[float, Field(gt=0, le=3600)] = Field(
        30.0, description="Longest time that a reward given as source text may take for the completions of a call."
    )
    reward_memory_bytes: Annotated[int, Field(ge=128 << 20, le=64 << 30)] = Field(
        512 << 20, description="Address space of a reward given as source text."
    )
    reward_failures: Annotated[int, Field(ge=1, le=1000)] = Field(
        3, description="Failed calls of a reward in a row that end the run."
    )
