"""Training settings of an admitted offer: the size class's settings, scaled by the task type's factors."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal

from taskoffer.api.contract import LoraSettings, TrainSettings
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec, SizeClass, TaskTypeRule
from taskoffer.api.v1alpha1.taskoffer import TaskOfferSpec
from taskoffer.api.v1alpha1.trainingjob import Settings
from taskoffer.decision.sizing import parameters_of, size_class_of


def requested_settings(spec: TaskOfferSpec, policy: CapacityPolicySpec) -> Settings:
    """Return the settings that the policy gives this offer.

    The LoRA rank is the size class's times the task type's factor, rounded half up; alpha keeps its ratio to the
    rank, so that the adapter's scale stays what the policy says. The learning rate is scaled likewise.

    Raises:
        ValueError: when the policy has no size class or task type for the offer (such an offer is never admitted).
    """
    parameters = parameters_of(spec.model, policy.filters.unknown_parameters)
    size = size_class_of(parameters, policy.size_classes) if parameters is not None else None
    task = next((t for t in policy.task_types if t.name is spec.task_type), None)
    if size is None or task is None:
        raise ValueError(f"the policy has no settings for {spec.task_type.value} on {spec.model.name}")
    return Settings(lora=_lora(size, task), train=_train(size, task))


def _lora(size: SizeClass, task: TaskTypeRule) -> LoraSettings:
    factor = Decimal(task.lora_rank_factor or "1")
    rank = max(1, int((size.lora.r * factor).to_integral_value(ROUND_HALF_UP)))
    alpha = max(1, int((size.lora.lora_alpha * factor).to_integral_value(ROUND_HALF_UP)))
    return size.lora.model_copy(update={"r": rank, "lora_alpha": alpha})


def _train(size: SizeClass, task: TaskTypeRule) -> TrainSettings:
    factor = Decimal(task.learning_rate_factor or "1")
    rate = float(Decimal(str(size.train.learning_rate)) * factor)
    return size.train.model_copy(update={"learning_rate": rate})
