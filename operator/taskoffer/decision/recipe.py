"""Training settings of an offer: the size class's, scaled by the task type's factors, and what fits of them."""

from __future__ import annotations

from decimal import Decimal
from functools import lru_cache

from taskoffer.api.quantity import whole
from taskoffer.api.tasks import TaskType
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec
from taskoffer.api.v1alpha1.estimation import Estimation
from taskoffer.api.v1alpha1.profiles import scaled_lora, scaled_train
from taskoffer.api.v1alpha1.taskoffer import TaskOfferSpec
from taskoffer.api.v1alpha1.trainingjob import Settings
from taskoffer.decision.fit import Fit, Subject, fit
from taskoffer.decision.identity import Itself
from taskoffer.decision.sizing import parameters_of, size_class_of


def requested_settings(spec: TaskOfferSpec, policy: CapacityPolicySpec) -> Settings:
    """Return the settings that the policy gives this offer.

    The LoRA rank is the size class's times the task type's factor, rounded half up; alpha keeps its ratio to the
    rank, so that the adapter's scale stays what the policy says. The learning rate is scaled likewise.

    Raises:
        ValueError: when the policy has no size class or task type for the offer (such an offer is never admitted).
    """
    parameters = parameters_of(spec.model, policy.filters.unknown_parameters)
    found = _settings_for(parameters, spec.task_type, policy) if parameters is not None else None
    if found is None:
        raise ValueError(f"the policy has no settings for {spec.task_type.value} on {spec.model.name}")
    return found


def _settings_for(parameters: int, task_type: TaskType, policy: CapacityPolicySpec) -> Settings | None:
    size = size_class_of(parameters, policy.size_classes)
    task = next((t for t in policy.task_types if t.name is task_type), None)
    if size is None or task is None:
        return None
    return Settings(
        lora=size.lora.model_copy(update=scaled_lora(size, task)),
        train=size.train.model_copy(update=scaled_train(size, task)),
    )


def fit_of(
    spec: TaskOfferSpec, policy: CapacityPolicySpec, gpus: int, memory_factor: Decimal = Decimal(1)
) -> Fit | None:
    """Return how the offer fits so many GPUs of one node, or None where the policy does not estimate.

    ``memory_factor`` is what outcomes have shown every need to be a multiple of.

    Raises:
        ValueError: as :func:`requested_settings`.
    """
    parameters = parameters_of(spec.model, policy.filters.unknown_parameters)
    estimation = estimation_of(policy)
    if estimation is None or parameters is None:
        return None
    found = _fit_under(Itself(policy), _subject_of(Itself(spec), parameters), gpus, memory_factor)
    if found is None:
        raise ValueError(f"the policy has no settings for {spec.task_type.value} on {spec.model.name}")
    return found


@lru_cache(maxsize=32)
def _subject_of(offered: Itself[TaskOfferSpec], parameters: int) -> Subject:
    """Return what an offer has trained. One evaluation asks for it with each count of GPUs."""
    spec = offered.value
    resolution = spec.dataset.image.resolution if spec.dataset.image else None
    return Subject.of(spec.model, parameters, spec.task_type, resolution)


@lru_cache(maxsize=16_384)
def _fit_under(policy: Itself[CapacityPolicySpec], subject: Subject, gpus: int, memory_factor: Decimal) -> Fit | None:
    """Return the fit of all offers that train this under the policy, or None where it has no settings for them."""
    estimation = estimation_of(policy.value)
    asked = _settings_for(subject.parameters, subject.task, policy.value)
    return (
        fit(subject, asked, estimation, gpus, memory_factor) if asked is not None and estimation is not None else None
    )


def estimation_of(policy: CapacityPolicySpec) -> Estimation | None:
    """Return how memory and time of one unit of the policy's resource are predicted, or None where they are not.

    A unit of a shared GPU is taken to be its share of memory and speed. With time-slicing nothing enforces that.
    """
    units = policy.resources[0].units_per_gpu
    if policy.estimation is None or units is None:
        return policy.estimation
    return _shared(Itself(policy.estimation), units)


@lru_cache(maxsize=32)
def _shared(whole_gpu: Itself[Estimation], units: int) -> Estimation:
    estimation = whole_gpu.value
    duration = estimation.duration
    if duration is not None:
        duration = duration.model_copy(update={"peak_teraflops": max(1, duration.peak_teraflops // units)})
    memory = str(whole(estimation.gpu_memory) // units)
    return estimation.model_copy(update={"gpu_memory": memory, "duration": duration})
