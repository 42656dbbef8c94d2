"""Training settings of an offer: the size class's, scaled by the task type's factors, and what fits of them."""

from __future__ import annotations

from decimal import Decimal
from functools import lru_cache

from taskoffer.api.quantity import whole
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec, scaled_lora, scaled_train
from taskoffer.api.v1alpha1.estimation import Estimation
from taskoffer.api.v1alpha1.taskoffer import TaskOfferSpec
from taskoffer.api.v1alpha1.trainingjob import Settings
from taskoffer.decision.fit import Fit, Subject, fit
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
    resolution = spec.dataset.image.resolution if spec.dataset.image else None
    subject = Subject.of(spec.model, parameters, spec.task_type, resolution)
    return fit(subject, requested_settings(spec, policy), estimation, gpus, memory_factor)


def estimation_of(policy: CapacityPolicySpec) -> Estimation | None:
    """Return how memory and time of one unit of the policy's resource are predicted, or None where they are not.

    A unit of a shared GPU is taken to be its share of memory and speed. With time-slicing nothing enforces that.
    """
    units = policy.resources[0].units_per_gpu
    if policy.estimation is None or units is None:
        return policy.estimation
    return _shared(policy.estimation, units)


@lru_cache(maxsize=32)
def _shared(estimation: Estimation, units: int) -> Estimation:
    duration = estimation.duration
    if duration is not None:
        duration = duration.model_copy(update={"peak_teraflops": max(1, duration.peak_teraflops // units)})
    memory = str(whole(estimation.gpu_memory) // units)
    return estimation.model_copy(update={"gpu_memory": memory, "duration": duration})
