"""The contract between operator and trainer, and the only module of the operator that the trainer imports.

The operator renders one :class:`RunConfig` per attempt into a file in the pod. The trainer answers on its own
port with a :class:`ProgressReport`, leaves a :class:`Termination` behind when it ends, and ends with an
:class:`ExitCode`. What a trainer says may have fields that an older operator passes over. A field of the
RunConfig is another matter, since no setting may be dropped in silence: a trainer that does not know it refuses
the run and says that its image is too old. So new images come first, then the operator. Whatever is not an added
field with a default needs a new ``version``.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from taskoffer.api.addresses import SIGNATURE_PREFIXES, expiry
from taskoffer.api.base import Time, WireModel
from taskoffer.api.grpo import DRAWN_PER_TRAINED, GRPOSettings
from taskoffer.api.limits import (
    CHECKPOINT_BYTES,
    EVAL_FRACTION,
    EVAL_ROWS_MAX,
    FEWEST_CHECKPOINTS,
    MIN_ROWS,
    checkpoint_bytes,
    evaluated_rows_cap,
    rank_cap,
)
from taskoffer.api.report import AttemptEnd, FigureChange, HistoryPoint, Report, ReportedChange
from taskoffer.api.reports import (
    PROVISIONAL_FOLDER,
    Clamp,
    InForce,
    Metric,
    ProgressReport,
    Provisional,
    RunState,
    Termination,
)
from taskoffer.api.steps import (
    PREPARE_CONFIG_PATH,
    SUBMIT_CONFIG_PATH,
    BucketFiles,
    CacheSettings,
    Credentials,
    FetchedItem,
    FetchItem,
    FetchSource,
    GitFiles,
    HubFiles,
    HubTarget,
    ItemKind,
    NetworkSettings,
    PrepareConfig,
    Published,
    RepoType,
    SubmitConfig,
    SubmitTarget,
    WebFile,
    item_path,
    job_folder,
)
from taskoffer.api.tasks import (
    CHAT_TEMPLATES,
    COMPARING_BUILTINS,
    Architecture,
    BuiltinName,
    BuiltinReward,
    ChatColumns,
    DPOColumns,
    FileFormat,
    GRPOColumns,
    ImageColumns,
    InstructColumns,
    RewardFunction,
    TaskType,
    chat_template_of,
)
from taskoffer.api.techniques import AdaptiveLR, AttnImplementation, LayerRank, LRStage, Optimizer, Techniques
from taskoffer.api.tuning import TUNING_PATH, AppliedTuning, Tuning

__all__ = [
    "CHAT_TEMPLATES",
    "CHECKPOINT_BYTES",
    "COMPARING_BUILTINS",
    "CONFIG_PATH",
    "DRAWN_PER_TRAINED",
    "EVAL_FRACTION",
    "EVAL_ROWS_MAX",
    "FEWEST_CHECKPOINTS",
    "MAX_TERMINATION_BYTES",
    "MIN_ROWS",
    "POD_UID_VARIABLE",
    "PREPARE_CONFIG_PATH",
    "PROGRESS_PORT",
    "PROVISIONAL_FOLDER",
    "SIGNATURE_PREFIXES",
    "SUBMIT_CONFIG_PATH",
    "TERMINATION_LOG",
    "TUNING_PATH",
    "AdaptiveLR",
    "AppliedTuning",
    "Architecture",
    "AttemptEnd",
    "AttnImplementation",
    "BucketFiles",
    "BuiltinName",
    "BuiltinReward",
    "CacheSettings",
    "ChatColumns",
    "Clamp",
    "Credentials",
    "DPOColumns",
    "DPOLossType",
    "DataConfig",
    "ExitCode",
    "FetchItem",
    "FetchSource",
    "FetchedItem",
    "FigureChange",
    "FileFormat",
    "GRPOColumns",
    "GRPOSettings",
    "GitFiles",
    "HistoryPoint",
    "HubFiles",
    "HubTarget",
    "ImageColumns",
    "InForce",
    "InstructColumns",
    "ItemKind",
    "LRStage",
    "LayerRank",
    "LoraSettings",
    "Metric",
    "ModelConfig",
    "NetworkSettings",
    "Optimizer",
    "PrepareConfig",
    "ProgressReport",
    "Provisional",
    "Published",
    "RepoType",
    "Report",
    "ReportedChange",
    "RewardFunction",
    "RunConfig",
    "RunState",
    "SubmitConfig",
    "SubmitTarget",
    "TaskType",
    "Termination",
    "TrainSettings",
    "Tuning",
    "WebFile",
    "chat_template_of",
    "checkpoint_bytes",
    "evaluated_rows_cap",
    "expiry",
    "item_path",
    "job_folder",
    "rank_cap",
]

CONFIG_PATH = "/etc/taskoffer/run.json"
"""Where the pod finds its RunConfig."""

PROGRESS_PORT = 9500
"""TCP port where rank 0 serves ``GET /progress`` (ProgressReport as JSON), ``/metrics`` and ``/healthz``."""

POD_UID_VARIABLE = "TASKOFFER_POD_UID"
"""Environment variable that holds the pod's UID."""

TERMINATION_LOG = "/dev/termination-log"
"""File whose content the kubelet copies into the container status when the container ends."""

MAX_TERMINATION_BYTES = 4096
"""The kubelet's limit on a termination message."""


class ExitCode(IntEnum):
    """How a training container ends. Only retryable codes are worth another attempt with the same settings.

    The retryable codes 137, 138 and 143 are Kubeflow Trainer's; 64 to 77 are those of sysexits.h. A fault in the
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
    """Training ended, but the result did not pass verification, or what was handed over is not what arrived."""
    NO_ACCESS = 77
    """A hub, a bucket or an address refused access: a token, a permission or a signature that has expired."""
    KILLED = 137
    """Killed, as a rule for lack of memory."""
    RESTART = 138
    """It asks to be started again, as for want of memory; training goes on from its checkpoint, a download as well."""
    STOPPED = 143
    """Stopped by SIGTERM; training has written a checkpoint, a download is kept as far as it came."""

    @property
    def retryable(self) -> bool:
        """Tell whether another attempt with the same settings can succeed."""
        return self in (ExitCode.INTERNAL, ExitCode.KILLED, ExitCode.RESTART, ExitCode.STOPPED)


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
    rank_pattern: Annotated[tuple[LayerRank, ...], Field(max_length=64)] = Field(
        (),
        description="Ranks of single layers in place of r; their alpha follows, so that their scale stays.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["module"]},
    )

    @model_validator(mode="after")
    def _check_rank_pattern(self) -> LoraSettings:
        if len({layer.module for layer in self.rank_pattern}) < len(self.rank_pattern):
            raise ValueError("rankPattern names a module twice: remove one of its ranks")
        return self


class DPOLossType(StrEnum):
    """Losses of preference data by their names in TRL's DPOConfig (1.16), where the papers are cited as well.

    All of them are a mean over pairs. TRL's other three are left out: ``aot`` and ``aot_unpaired`` sort the pairs
    that go through the model together, so that what is learned would depend on the micro-batch, and ``sft`` alone
    does not look at the rejected answers.
    """

    SIGMOID = "sigmoid"
    """The loss of the DPO paper (Rafailov et al. 2023, arXiv:2305.18290)."""
    SIGMOID_NORM = "sigmoid_norm"
    HINGE = "hinge"
    IPO = "ipo"
    EXO_PAIR = "exo_pair"
    NCA_PAIR = "nca_pair"
    ROBUST = "robust"
    BCO_PAIR = "bco_pair"
    SPPO_HARD = "sppo_hard"
    APO_ZERO = "apo_zero"
    APO_DOWN = "apo_down"
    DISCOPOP = "discopop"

    @property
    def smooths(self) -> bool:
        """Tell whether label smoothing has an effect on this loss."""
        return self in (DPOLossType.EXO_PAIR, DPOLossType.ROBUST)


class TrainSettings(Techniques):
    """Training settings, named as in transformers' TrainingArguments and TRL's SFTConfig and DPOConfig.

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
    keep_checkpoints: bool = Field(False, description="Keep checkpoints of a training whose adapter was verified.")
    reserve_minutes: Annotated[float, Field(ge=0, le=240)] | None = Field(
        None,
        description="Minutes before the deadline at which the result is to be ready, at most a tenth of the time that "
        "an attempt has. Absent means 3, or 12 where rewards are source text.",
    )
    dataloader_num_workers: Annotated[int, Field(ge=0, le=64)] = Field(0, description="Data loading processes per GPU.")
    seed: Annotated[int, Field(ge=0, le=4294967295)] = Field(42, description="Random seed.")
    snr_gamma: Annotated[float, Field(gt=0, le=1000)] | None = Field(
        None, description="Min-SNR weighting of the loss of SDXL, 5 in its paper; absent weighs all timesteps alike."
    )
    beta: Annotated[float, Field(gt=0, le=100)] | None = Field(
        None, description="How strongly the model is held near the base model; absent means 0.1 for DPO."
    )
    loss_type: DPOLossType = Field(DPOLossType.SIGMOID, description="Loss of preference data (DPO).")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Share of wrong preferences that the losses robust and exo_pair reckon with."
    )
    grpo: GRPOSettings | None = Field(
        None, description="How completions are drawn, rewarded and learned from (GRPO); absent means the defaults."
    )

    @model_validator(mode="after")
    def _check_save_steps(self) -> TrainSettings:
        if self.save_steps % self.eval_steps:
            raise ValueError(
                f"saveSteps ({self.save_steps}) must be a multiple of evalSteps ({self.eval_steps}), "
                "because the best checkpoint is chosen by its evaluation"
            )
        return self

    @model_validator(mode="after")
    def _check_label_smoothing(self) -> TrainSettings:
        if self.loss_type is DPOLossType.EXO_PAIR and self.label_smoothing == 0:
            raise ValueError("labelSmoothing must be above 0 with lossType exo_pair; its paper recommends 0.001")
        if self.loss_type is DPOLossType.ROBUST and self.label_smoothing >= 0.5:
            raise ValueError(
                f"labelSmoothing ({self.label_smoothing:g}) must be below 0.5 with lossType robust: at 0.5 the "
                "preferences would be a coin's"
            )
        return self


class ModelConfig(WireModel):
    """The base model as the pod finds it."""

    name: str = Field(description="Public name of the base model, written into the adapter's card.")
    revision: str | None = Field(None, description="Revision of the base model.")
    path: str = Field(
        description="Folder in the pod that holds config.json, weights and tokenizer; for an image model the folder "
        "with model_index.json."
    )
    architecture: Architecture | None = Field(None, description="Architecture of an image model.")
    yarn_factor: Annotated[int, Field(ge=2, le=32)] | None = Field(None, description="YaRN factor of its context.")


class DataConfig(WireModel):
    """The data as the pod finds it, and how much of it is held out."""

    path: str = Field(description="File or folder in the pod.")
    file_format: FileFormat | None = Field(
        None, description="How the rows are stored; absent means as the files are called, and jsonl where that is mute."
    )
    instruct: InstructColumns | None = Field(None, description="Columns of instruction data.")
    chat: ChatColumns | None = Field(None, description="Columns of conversation data.")
    dpo: DPOColumns | None = Field(None, description="Columns of preference data.")
    grpo: GRPOColumns | None = Field(None, description="Columns and rewards of a reinforcement task.")
    image: ImageColumns | None = Field(None, description="Picture data.")
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(EVAL_FRACTION, description="Share of the rows held out.")
    eval_rows_max: Annotated[int, Field(ge=1)] = Field(EVAL_ROWS_MAX, description="Most rows held out.")
    min_rows: Annotated[int, Field(ge=2)] = Field(MIN_ROWS, description="Fewest usable rows to start a training with.")


class RunConfig(WireModel):
    """All that one attempt of a training job needs to know. Paths are absolute paths inside the pod."""

    version: Literal["v1alpha1"] = "v1alpha1"
    job_name: str = Field(description="Name of the TrainingJob.")
    attempt: Annotated[int, Field(ge=1)] = Field(1, description="Number of the attempt, from 1.")
    lacked_memory: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None, description="Earlier attempts that were killed as a whole for lack of memory, without a last word."
    )
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
    time_limit_seconds: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Seconds from the container's start; absent where the clock runs from the admission."
    )
    expected_seconds: Annotated[int, Field(ge=0)] | None = Field(
        None, description="What the operator predicts from the first step to the end of the whole run."
    )
    sample_prompts: tuple[str, ...] = Field((), description="Prompts that are answered before and after training.")
