"""Every reason that taskoffer gives, in one list.

A reason is the machine-readable half of an answer; its message carries the numbers and the remedy. The same
pair goes unchanged into the condition, the event and the metric label. The text behind each member is its
documentation.
"""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """CamelCase constants for conditions, events and metric labels; ``Reason.X.meaning`` explains each."""

    meaning: str

    def __new__(cls, value: str, meaning: str) -> Reason:
        """Make a member from its wire value and the sentence that documents it."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member

    # The offer is admitted.
    ADMITTED = "Admitted", "The offer is accepted and its GPUs are booked."

    # Verdict: wait (can be admitted later without a change of the offer)
    WAITING_FOR_CAPACITY = "WaitingForCapacity", "No eligible node has enough free GPUs at the moment."
    WAITING_FOR_LANE = "WaitingForLane", "The lane that serves this kind of task is fully booked."
    WAITING_FOR_JOB_SLOT = "WaitingForJobSlot", "The policy's number of concurrent jobs is reached."
    WAITING_FOR_QUOTA = "WaitingForQuota", "The offer's namespace holds as many GPUs as the policy lets it have."
    WAITING_BEHIND_RESERVATION = (
        "WaitingBehindReservation",
        "The free GPUs are kept for an offer that needs more of them and would be kept off for ever otherwise.",
    )
    WAITING_FOR_EARLIER_END = (
        "WaitingForEarlierEnd",
        "The task is predicted to end earlier if it starts later on more GPUs than are free now.",
    )
    WAITING_FOR_PREEMPTION = (
        "WaitingForPreemption",
        "Running jobs were asked to save and stop; the offer is admitted once their GPUs are free.",
    )
    INVENTORY_NOT_READY = (
        "InventoryNotReady",
        "No Ready and schedulable node offers the resource that the policy names.",
    )
    POLICY_NOT_FOUND = (
        "PolicyNotFound",
        "The CapacityPolicy that the offer names, or a default one, does not exist.",
    )
    POLICY_NOT_READY = "PolicyNotReady", "The CapacityPolicy has no valid version yet."
    SUSPENDED = "Suspended", "The offer's spec.active is false."

    # Verdict: reject (can never be admitted as it stands)
    TASK_TYPE_NOT_ACCEPTED = "TaskTypeNotAccepted", "The policy does not accept this task type."
    FEATURE_NOT_SERVED = "FeatureNotServed", "The offer asks for something that this version does not do yet."
    MODEL_FAMILY_NOT_ACCEPTED = (
        "ModelFamilyNotAccepted",
        "The model belongs to no family that the policy accepts.",
    )
    PARAMETERS_UNKNOWN = "ParametersUnknown", "The model's size is neither given nor known by its name or architecture."
    MODEL_SIZE_NOT_ACCEPTED = (
        "ModelSizeNotAccepted",
        "No size class of the policy takes a model of this size.",
    )
    TIME_LIMIT_TOO_LONG = "TimeLimitTooLong", "The offer's time limit is longer than the policy takes."
    SCORE_TOO_LOW = "ScoreTooLow", "The score does not pass the policy's threshold."
    GPU_COUNT_NOT_ALLOWED = "GpuCountNotAllowed", "The number of GPUs is not one that the policy hands out."
    INSUFFICIENT_MEMORY = "InsufficientMemory", "Not even one row at a time fits the memory of the GPUs."
    INSUFFICIENT_STORAGE = (
        "InsufficientStorage",
        "Not even three checkpoints (best, newest, one being written) fit the space that the policy gives them.",
    )
    CANNOT_FINISH_IN_TIME = "CannotFinishInTime", "The task is predicted to take longer than the offer gives."
    PRIORITY_NOT_ALLOWED = (
        "PriorityNotAllowed",
        "The policy, or its limit for the namespace, does not let the offer ask for this priority class.",
    )
    TRAINER_NOT_ALLOWED = (
        "TrainerNotAllowed",
        "The offer brings its own trainer, and the policy's trainers do not allow it.",
    )
    NO_LANE = "NoLane", "The policy works with lanes and none takes this kind of task."
    CAPACITY_FULL = "CapacityFull", "Capacity is full and the policy says to reject instead of queueing."
    DUPLICATE_TASK = "DuplicateTask", "An older offer in the namespace carries the same task id."
    EXPIRED = "Expired", "The offer was not decided in its favour before expiresAt or its deadline."
    SOURCE_EXPIRES = (
        "SourceExpires",
        "The address of the data stops to work before the offer was admitted, and nothing can be fetched before that.",
    )
    INVALID_OFFER = "InvalidOffer", "The stored offer does not fit the schema of this version."

    # Finished
    REJECTED = "Rejected", "The offer was refused; the Admitted condition says why."
    SUCCEEDED = "Succeeded", "Training finished and its result passed verification."
    FAILED = "Failed", "Training failed for good."
    CANCELLED = "Cancelled", "The offer was made inactive after it was admitted."

    # Evicted and requeued
    POLICY_CHANGED = (
        "PolicyChanged",
        "The policy changed between decision and start; the offer is decided again.",
    )
    OVERBOOKED = (
        "Overbooked",
        "More was booked on a node than it has; the newest admission that has not started is revoked.",
    )
    PREEMPTED = (
        "Preempted",
        "The job's GPUs were taken back for another offer; it goes on from its last step once GPUs are free.",
    )
    START_TIMEOUT = "StartTimeout", "The pod did not start in time; the offer is decided again."

    # TrainingJob
    JOB_CREATED = "JobCreated", "The Job of an attempt was created."
    RUNNING = "Running", "The training container runs."
    PENDING = "Pending", "The training container has not started yet."
    PREPARING = "Preparing", "Model and data are being fetched; the training begins once they are there."
    PREPARE_FAILED = "PrepareFailed", "Model or data could not be fetched, or are not what the offer says."
    STEP_PAUSED = (
        "StepPaused",
        "A step around the training asked to be started again; it is, after a pause, while there is time for it.",
    )
    SUBMITTING = "Submitting", "The training is over and its result is being handed over; its GPUs are free."
    SUBMIT_FAILED = "SubmitFailed", "The result could not be handed over; it is still on its claim."
    ATTEMPT_FAILED = "AttemptFailed", "An attempt ended without a result; another one follows."
    ATTEMPTS_EXHAUSTED = "AttemptsExhausted", "The last attempt that the policy allows has failed."
    NODE_LOST = "NodeLost", "The node of a running attempt is gone or not Ready."
    DEADLINE_EXCEEDED = "DeadlineExceeded", "The deadline passed before training was done."
    STOPPING = "Stopping", "The pods were asked to stop; their GPUs are free once they have ended."
    NAME_CONFLICT = "NameConflict", "An object of the wanted name belongs to somebody else."
    JOB_REFUSED = (
        "JobRefused",
        "The API server does not take an attempt's Job: a quota on Jobs, an admission webhook.",
    )
    INVALID_JOB = "InvalidJob", "The stored TrainingJob does not fit the schema of this version."
    BATCH_CLAMPED = "BatchClamped", "The micro-batch was lowered to what fits; the rows per step stay the same."
    BATCH_AT_MINIMUM = "BatchAtMinimum", "The micro-batch is as small as it can be; less was asked for."
    BATCH_AT_MAXIMUM = "BatchAtMaximum", "The micro-batch is as large as is predicted to fit; more was asked for."
    BATCH_SETTLES = "BatchSettles", "The micro-batch was lowered a moment ago, so that it is not raised yet."
    RANK_CLAMPED = "RankClamped", "The LoRA rank was lowered to what is useful or allowed."
    TARGETS_CLAMPED = (
        "TargetsClamped",
        "The model's layers are called otherwise than the settings list, so that all linear layers are adapted.",
    )
    DROPOUT_UNSUPPORTED = (
        "DropoutUnsupported",
        "Adapters on the experts of a mixture-of-experts model cannot have dropout, so that there is none.",
    )
    PARAMETERS_SHARED_OUT = (
        "ParametersSharedOut",
        "A copy of the model on each GPU does not fit with the rank that is asked for: each GPU holds a share of it.",
    )
    SHARDING_NOT_SERVED = (
        "ShardingNotServed",
        "The trainer of this version cannot share out a model's parameters over its GPUs, so that each holds a copy.",
    )
    CHECKPOINTS_CLAMPED = (
        "CheckpointsClamped",
        "Fewer checkpoints are kept, so that they fit the space they have; the best and the newest always are.",
    )
    EVALUATION_CLAMPED = (
        "EvaluationClamped",
        "Fewer rows are held out, so that evaluations take a tenth of the training's time at most.",
    )
    AVERAGE_WARMED_UP = (
        "AverageWarmedUp",
        "The average of the weights begins with a small decay, which rises to the one that was asked for.",
    )
    LEARNING_RATE_BOUNDED = (
        "LearningRateBounded",
        "The factor with which the learning rate follows the held-out loss stays within bounds.",
    )
    LENGTH_CLAMPED = (
        "LengthClamped",
        "Rows, or completions, are cut at fewer tokens than was asked for: the model takes no longer texts.",
    )
    LOADERS_CLAMPED = "LoadersClamped", "Fewer processes load data, or prepare less of it ahead, than was asked for."
    SETTINGS_CLAMPED = "SettingsClamped", "Settings were not taken literally; each with its reason is in status.clamps."

    # CapacityPolicy
    READY = "Ready", "The policy is valid and in force."
    INVALID_POLICY = "InvalidPolicy", "The policy's spec is not valid; the last good version stays in force."
    DEVICES_NOT_AVAILABLE = (
        "DevicesNotAvailable",
        "The policy pins GPUs of a DeviceClass that this cluster, or its operator, cannot hand out.",
    )
    ALLOCATABLE_BELOW_BOOKED = (
        "AllocatableBelowBooked",
        "A node offers less than is booked on it; nothing more is admitted there.",
    )
    LINT_FINDINGS = "LintFindings", "The policy is in force, and its findings deserve a look."
    NO_FINDINGS = "NoFindings", "The policy has no lint findings."


ADMIT_REASONS = frozenset({Reason.ADMITTED})
"""Reasons that come with the verdict Admit."""

WAIT_REASONS = frozenset(
    {
        Reason.WAITING_FOR_CAPACITY,
        Reason.WAITING_FOR_LANE,
        Reason.WAITING_FOR_JOB_SLOT,
        Reason.WAITING_FOR_QUOTA,
        Reason.WAITING_BEHIND_RESERVATION,
        Reason.WAITING_FOR_EARLIER_END,
        Reason.WAITING_FOR_PREEMPTION,
        Reason.INVENTORY_NOT_READY,
        Reason.POLICY_NOT_FOUND,
        Reason.POLICY_NOT_READY,
        Reason.SUSPENDED,
    }
)
"""Reasons that come with the verdict Wait."""

REJECT_REASONS = frozenset(
    {
        Reason.TASK_TYPE_NOT_ACCEPTED,
        Reason.FEATURE_NOT_SERVED,
        Reason.MODEL_FAMILY_NOT_ACCEPTED,
        Reason.PARAMETERS_UNKNOWN,
        Reason.MODEL_SIZE_NOT_ACCEPTED,
        Reason.TIME_LIMIT_TOO_LONG,
        Reason.SCORE_TOO_LOW,
        Reason.GPU_COUNT_NOT_ALLOWED,
        Reason.INSUFFICIENT_MEMORY,
        Reason.INSUFFICIENT_STORAGE,
        Reason.CANNOT_FINISH_IN_TIME,
        Reason.PRIORITY_NOT_ALLOWED,
        Reason.TRAINER_NOT_ALLOWED,
        Reason.NO_LANE,
        Reason.CAPACITY_FULL,
        Reason.DUPLICATE_TASK,
        Reason.EXPIRED,
        Reason.SOURCE_EXPIRES,
        Reason.INVALID_OFFER,
    }
)
"""Reasons that come with the verdict Reject."""
