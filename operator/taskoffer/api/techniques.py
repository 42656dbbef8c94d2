"""Techniques that training settings may switch on: ranks by layer, an average of the weights, moving learning rates.

All of them are off unless a policy asks for them. Their names are those of PEFT, transformers and torch where these
have one.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from taskoffer.api.base import WireModel

AttnImplementation = Literal["flash_attention_3", "flash_attention_2", "sdpa", "eager"]
"""Ways to compute attention, in transformers' names."""

Optimizer = Literal["adamw_torch_fused", "adamw_torch", "adafactor"]
"""Optimizers that need no further package, in transformers' names."""


class LayerRank(WireModel):
    """The rank of the layers of one name, in place of the adapter's. Alpha follows, so that the scale stays."""

    module: Annotated[str, StringConstraints(min_length=1, max_length=63)] = Field(
        description="Last part of the layers' name, as k_proj."
    )
    r: Annotated[int, Field(ge=1, le=65536)] = Field(description="Rank of these layers.")


class AdaptiveLR(WireModel):
    """A factor on the learning rate that follows the held-out loss: more while it falls, less on a plateau.

    The factor stays within its bounds: at 25 steps between evaluations, a rise of 5 % that nothing bounds would be
    sevenfold after 40 good ones.
    """

    increase: Annotated[float, Field(ge=1, le=2)] = Field(1.05, description="Factor after an evaluation that improved.")
    decrease: Annotated[float, Field(gt=0, le=1)] = Field(0.8, description="Factor on a plateau.")
    min: Annotated[float, Field(gt=0, le=1)] = Field(0.05, description="Smallest product of the factors.")
    max: Annotated[float, Field(ge=1, le=10)] = Field(1.5, description="Largest product of the factors.")
    patience: Annotated[int, Field(ge=1, le=1000)] = Field(
        2, description="Evaluations without an improvement that make a plateau."
    )
    cooldown: Annotated[int, Field(ge=0, le=1000)] = Field(
        1, description="Evaluations after a decrease that count for nothing."
    )
    threshold: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.001, description="Share by which the loss must fall to have improved."
    )


class LRStage(WireModel):
    """A part of the training with its own factor on the learning rate."""

    share: Annotated[float, Field(gt=0, le=1)] = Field(description="Share of the training; all shares sum to 1.")
    factor: Annotated[float, Field(gt=0, le=10)] = Field(description="Factor on the learning rate.")


class Techniques(WireModel):
    """The part of the training settings that is off, or left to the libraries, by default."""

    optim: Optimizer = Field("adamw_torch_fused", description="Optimizer.")
    attn_implementation: Annotated[tuple[AttnImplementation, ...], Field(max_length=4)] = Field(
        (),
        description="Ways to compute attention, the first that is there is taken; empty leaves it to transformers.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    min_lr_rate: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="Share of the peak learning rate at which the cosine schedule ends."
    )
    stages: Annotated[tuple[LRStage, ...], Field(max_length=8)] = Field(
        (),
        description="Parts of the training with factors on the learning rate; empty is one part.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    adaptive_lr: AdaptiveLR | None = Field(
        None, description="Follow the held-out loss with the learning rate; absent does not."
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="Keep an exponential moving average of the adapter with this decay at most, and take it where it "
        "is better on held-out data; absent keeps none.",
    )
    ema_update_every: Annotated[int, Field(ge=1, le=10_000)] = Field(
        1, description="Steps between updates of the average."
    )
    per_device_eval_batch_size: Annotated[int, Field(ge=1, le=65536)] | None = Field(
        None, description="Rows at once per GPU in an evaluation; absent takes perDeviceTrainBatchSize."
    )
    per_device_train_max_tokens: Annotated[int, Field(ge=8, le=1_073_741_824)] | None = Field(
        None,
        description="Most tokens at once per GPU, padding counted: of long rows fewer than perDeviceTrainBatchSize go "
        "together, and at least one. Absent counts rows alone.",
    )
    eval_rows_max: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        None, description="Most rows held out for evaluations; absent leaves it to the trainer's default."
    )
    dataloader_prefetch_factor: Annotated[int, Field(ge=1, le=64)] | None = Field(
        None, description="Batches that each loading process prepares ahead; absent leaves it to torch."
    )
    fsdp: bool = Field(
        False, description="Share out the model's parameters over the GPUs (FSDP), instead of a copy on each (DDP)."
    )
    ddp_bucket_cap_mb: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        None, description="Size of the gradient buckets of several GPUs in MiB; absent leaves it to torch."
    )

    @model_validator(mode="after")
    def _check_stages(self) -> Techniques:
        total = math.fsum(stage.share for stage in self.stages)
        if self.stages and abs(total - 1) > 1e-6:
            raise ValueError(f"stages: the shares sum to {total:g} and not to 1: change one of them")
        return self

    @model_validator(mode="after")
    def _check_attention(self) -> Techniques:
        if len(set(self.attn_implementation)) < len(self.attn_implementation):
            raise ValueError("attnImplementation names one twice: remove one of them")
        return self
