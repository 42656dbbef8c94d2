"""The contract between operator and trainer, and the only module of the operator that the trainer imports.

The operator renders one :class:`RunConfig` per attempt into a file in the pod. The trainer answers on its own
port with a :class:`ProgressReport`, leaves a :class:`Termination` behind when it ends, and ends with an
:class:`ExitCode`. Adding a field with a default keeps both sides compatible; anything else needs a new
``version``.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from taskoffer.api.base import Time, WireModel
from taskoffer.api.tasks import (
    ChatColumns,
    DPOColumns,
    FileFormat,
    GRPOColumns,
    ImageColumns,
    InstructColumns,
    TaskType,
)

__all__ = [
    "CONFIG_PATH",
    "MAX_TERMINATION_BYTES",
    "PROGRESS_PORT",
    "SERVED_TASK_TYPES",
    "SHARDING_SERVED",
    "TERMINATION_LOG",
    "ChatColumns",
    "Clamp",
    "DPOColumns",
    "DataConfig",
    "ExitCode",
    "FileFormat",
    "GRPOColumns",
    "ImageColumns",
    "InstructColumns",
    "LoraSettings",
    "Metric",
    "ModelConfig",
    "ProgressReport",
    "RunConfig",
    "RunState",
    "TaskType",
    "Termination",
    "TrainSettings",
    "rank_cap",
]

SERVED_TASK_TYPES: frozenset[TaskType] = frozenset({TaskType.INSTRUCT_TEXT})
"""Task types that the trainer of this version has a method for."""

SHARDING_SERVED = False
"""Whether the trainer can share out a model's parameters over its GPUs (FSDP)."""

CONFIG_PATH = "/etc/taskoffer/run.json"
"""Where the pod finds its RunConfig."""

PROGRESS_PORT = 9500
"""TCP port where rank 0 serves ``GET /progress`` (ProgressReport as JSON), ``/metrics`` and ``/healthz``."""

TERMINATION_LOG = "/dev/termination-log"
"""File whose content the kubelet copies into the container status when the container ends."""

MAX_TERMINATION_BYTES = 4096
"""The kubelet's limit on a termination message."""


class ExitCode(IntEnum):
    """How a training container ends. Only retryable codes are worth another attempt with the same settings.

    The retryable codes 137, 138 and 143 are Kubeflow Trainer's; 64 to 74 are those of sysexits.h. A fault in the
    trainer itself may be one of the machine, so it is tried again as well, as is any code that is not listed.
    """

    DONE = 0
    """Trained, verified and written to the output folder."""
    BAD_CONFIG = 64
    """The RunConfig cannot be read or asks for something this trainer does not do."""
    BAD_DATA = 65
    """The data is missing, empty or lacks a column."""
    NO_MODEL = 66
    """The model is missing or cannot be loaded."""
    INTERNAL = 70
    """A fault in the trainer itself."""
    VERIFY_FAILED = 74
    """Training ended, but the result did not pass verification."""
    OUT_OF_MEMORY = 137
    """Killed, as a rule for lack of memory."""
    RESTART = 138
    """The trainer asks to be started again from its last checkpoint."""
    STOPPED = 143
    """Stopped by SIGTERM with a checkpoint written."""

    @property
    def retryable(self) -> bool:
        """Tell whether another attempt with the same settings can succeed."""
        return self in (ExitCode.INTERNAL, ExitCode.OUT_OF_MEMORY, ExitCode.RESTART, ExitCode.STOPPED)


def rank_cap(in_features: int, out_features: int) -> int:
    """Return the largest useful LoRA rank of a linear layer: floor(0.5 * in * out / (in + out)), at least 1.

    At rank in*out/(in+out) the two adapter matrices have as many parameters as the layer itself; half of that
    is the point where LoRA still saves something. Both the operator and the trainer apply this one function.

    Raises:
        ValueError: when a dimension is not positive.
    """
    if in_features < 1 or out_features < 1:
        raise ValueError(f"layer dimensions must be positive, got {in_features} x {out_features}")
    return max(1, (in_features * out_features) // (2 * (in_features + out_features)))


class Clamp(WireModel):
    """A setting that could not be taken literally: what was asked, what is done, and why."""

    field: Annotated[str, StringConstraints(max_length=128)] = Field(description="Name of the setting.")
    requested: Annotated[str, StringConstraints(max_length=256)] = Field(description="The value that was asked for.")
    effective: Annotated[str, StringConstraints(max_length=256)] = Field(description="The value that is used.")
    reason: Annotated[str, StringConstraints(max_length=64)] = Field(description="Reason in CamelCase.")
    message: Annotated[str, StringConstraints(max_length=512)] = Field("", description="The reason in a sentence.")


class LoraSettings(WireModel):
    """LoRA adapter settings, named as in PEFT."""

    r: Annotated[int, Field(ge=1, le=65536)] = Field(16, description="Rank.")
    lora_alpha: Annotated[int, Field(ge=1, le=1048576)] = Field(
        32, description="Scaling numerator; scale is alpha / r."
    )
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Dropout on the adapter's input.")
    target_modules: Annotated[str, StringConstraints(max_length=1024)] = Field(
        "all-linear", description="Modules to adapt: all-linear, or names separated by commas."
    )
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(r) instead of alpha / r.")


class TrainSettings(WireModel):
    """Training settings, named as in transformers' TrainingArguments and TRL's SFTConfig.

    ``per_device_train_batch_size`` is the micro-batch. The global batch, the number of rows that an optimizer
    step learns from, is ``per_device_train_batch_size * gradient_accumulation_steps * GPUs``.
    """

    num_train_epochs: Annotated[float, Field(gt=0, le=1000)] = Field(1.0, description="Passes over the data.")
    max_steps: Annotated[int, Field(ge=-1)] = Field(-1, description="Optimizer steps; -1 means by epochs.")
    per_device_train_batch_size: Annotated[int, Field(ge=1, le=65536)] = Field(1, description="Rows at once per GPU.")
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=65536)] = Field(1, description="Micro-batches per step.")
    learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(2e-4, description="Peak learning rate.")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "cosine", description="Learning rate schedule."
    )
    warmup_steps: Annotated[float, Field(ge=0)] = Field(
        0.03, description="Warm-up: a number of steps, or a share of all steps when below 1."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="Weight decay.")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="Gradient clipping norm.")
    max_length: Annotated[int, Field(ge=8, le=1048576)] = Field(2048, description="Longest sequence in tokens.")
    packing: bool = Field(False, description="Pack short rows into full sequences.")
    group_by_length: bool = Field(False, description="Batch rows of like length together.")
    bf16: bool = Field(True, description="Compute in bfloat16.")
    gradient_checkpointing: bool = Field(True, description="Trade compute for activation memory.")
    torch_compile: bool = Field(False, description="Compile the model with torch.compile.")
    eval_steps: Annotated[int, Field(ge=1)] = Field(25, description="Steps between evaluations.")
    save_steps: Annotated[int, Field(ge=1)] = Field(
        25, description="Steps between checkpoints; a multiple of eval_steps."
    )
    save_total_limit: Annotated[int, Field(ge=1, le=64)] = Field(2, description="Checkpoints to keep.")
    dataloader_num_workers: Annotated[int, Field(ge=0, le=64)] = Field(0, description="Data loading processes per GPU.")
    seed: Annotated[int, Field(ge=0, le=4294967295)] = Field(42, description="Random seed.")

    @model_validator(mode="after")
    def _check_save_steps(self) -> TrainSettings:
        if self.save_steps % self.eval_steps:
            raise ValueError(
                f"saveSteps ({self.save_steps}) must be a multiple of evalSteps ({self.eval_steps}), "
                "because the best checkpoint is chosen by its evaluation"
            )
        return self


class ModelConfig(WireModel):
    """The base model as the pod finds it."""

    name: str = Field(description="Public name of the base model, written into the adapter's card.")
    revision: str | None = Field(None, description="Revision of the base model.")
    path: str = Field(description="Folder in the pod that holds config.json, weights and tokenizer.")


class DataConfig(WireModel):
    """The data as the pod finds it, and how much of it is held out."""

    path: str = Field(description="File or folder in the pod.")
    file_format: FileFormat = Field(FileFormat.JSONL, description="How the rows are stored.")
    instruct: InstructColumns | None = Field(None, description="Columns of instruction data.")
    chat: ChatColumns | None = Field(None, description="Columns of conversation data.")
    dpo: DPOColumns | None = Field(None, description="Columns of preference data.")
    grpo: GRPOColumns | None = Field(None, description="Columns and rewards of a reinforcement task.")
    image: ImageColumns | None = Field(None, description="Picture data.")
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(0.1, description="Share of the rows held out.")
    eval_rows_max: Annotated[int, Field(ge=1)] = Field(400, description="Most rows held out.")


class RunConfig(WireModel):
    """All that one attempt of a training job needs to know. Paths are absolute paths inside the pod."""

    version: Literal["v1alpha1"] = "v1alpha1"
    job_name: str = Field(description="Name of the TrainingJob.")
    attempt: Annotated[int, Field(ge=1)] = Field(1, description="Number of the attempt, from 1.")
    task_id: str = Field(description="Identity of the task in its market.")
    task_type: TaskType = Field(description="What kind of training this is.")
    gpus: Annotated[int, Field(ge=1, le=8)] = Field(description="Training processes to start, one per GPU.")
    model: ModelConfig
    data: DataConfig
    lora: LoraSettings
    train: TrainSettings
    output_dir: str = Field(description="Folder that receives the verified adapter.")
    checkpoint_dir: str = Field(description="Folder that keeps checkpoints over restarts.")
    deadline: Time | None = Field(None, description="When the result must be there; the trainer stops before it.")
    sample_prompts: tuple[str, ...] = Field((), description="Prompts that are answered before and after training.")


class RunState(StrEnum):
    """Where a run is."""

    STARTING = "Starting"
    TRAINING = "Training"
    EVALUATING = "Evaluating"
    SAVING = "Saving"
    VERIFYING = "Verifying"
    DONE = "Done"
    STOPPED = "Stopped"
    FAILED = "Failed"


class Metric(WireModel):
    """A named value as a decimal string, in the shape of Kubeflow Trainer's trainerStatus."""

    name: Annotated[str, StringConstraints(max_length=64)] = Field(description="Name of the metric.")
    value: Annotated[str, StringConstraints(max_length=64)] = Field(description="Its value as a string.")


class ProgressReport(WireModel):
    """What the trainer says of itself at ``GET /progress``.

    ``progress_percentage``, ``estimated_remaining_seconds``, ``metrics`` and ``last_updated_time`` carry
    Kubeflow Trainer's field names and go into ``TrainingJob.status.trainerStatus`` as they are.
    """

    job_name: str
    attempt: int = 1
    state: RunState
    progress_percentage: Annotated[int, Field(ge=0, le=100)] | None = None
    estimated_remaining_seconds: Annotated[int, Field(ge=0)] | None = None
    metrics: tuple[Metric, ...] = ()
    last_updated_time: Time
    step: int = 0
    total_steps: int | None = None
    resumed_from_step: int | None = Field(None, description="Step of the checkpoint this run continued from.")
    clamps: tuple[Clamp, ...] = ()


class Termination(WireModel):
    """What the trainer leaves in the termination log: at most MAX_TERMINATION_BYTES as JSON."""

    exit_code: int
    reason: Annotated[str, StringConstraints(max_length=64)] = Field(description="Reason in CamelCase.")
    message: Annotated[str, StringConstraints(max_length=1024)] = ""
    step: int = 0
    total_steps: int | None = None
    train_loss: float | None = None
    eval_loss_before: float | None = Field(None, description="Held-out loss of the base model.")
    eval_loss_after: float | None = Field(None, description="Held-out loss with the adapter.")
    adapter_dir: str | None = None
    adapter_sha256: str | None = None
    resumed_from_step: int | None = None
    training_seconds: float | None = Field(None, description="This attempt, from its first step to its end.")
    tokens_per_second: float | None = Field(None, description="Mean over this attempt's steps, all processes together.")
    peak_gpu_bytes: int | None = Field(None, description="Most memory in use on a GPU of this attempt.")
    peak_host_bytes: int | None = Field(None, description="Largest resident set of a training process.")
    clamps: tuple[Clamp, ...] = ()
