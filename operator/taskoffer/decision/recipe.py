"""Training settings of an offer: the size class's, as its task type changes them; and what its GPUs are."""

from __future__ import annotations

from functools import lru_cache

from taskoffer.api.quantity import whole
from taskoffer.api.tasks import Architecture, TaskType
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec
from taskoffer.api.v1alpha1.estimation import Estimation
from taskoffer.api.v1alpha1.profiles import lora_of, train_of
from taskoffer.api.v1alpha1.taskoffer import TaskOfferSpec
from taskoffer.api.v1alpha1.trainingjob import Settings
from taskoffer.decision.identity import Itself
from taskoffer.decision.sizing import parameters_of, size_class_of


def requested_settings(spec: TaskOfferSpec, policy: CapacityPolicySpec) -> Settings:
    """Return the settings that the policy gives this offer.

    They are the size class's; what the task type sets is laid over them, and over that what it sets for the
    architecture of an image model. Then come the factors: the LoRA rank times the task type's, rounded half up; alpha
    keeps its ratio to the rank, so that the adapter's scale stays what the policy says. The learning rate is scaled
    likewise.

    Raises:
        ValueError: when the policy has no size class or task type for the offer (such an offer is never admitted).
    """
    parameters = parameters_of(spec.model, policy.filters.unknown_parameters)
    architecture = spec.model.architecture
    found = settings_for(parameters, spec.task_type, policy, architecture) if parameters is not None else None
    if found is None:
        raise ValueError(f"the policy has no settings for {spec.task_type.value} on {spec.model.name}")
    return found


def settings_for(
    parameters: int, task_type: TaskType, policy: CapacityPolicySpec, architecture: Architecture | None = None
) -> Settings | None:
    """Return what the policy trains such a task on a model of this size with, or None where it says nothing of it."""
    size = size_class_of(parameters, policy.size_classes)
    task = next((t for t in policy.task_types if t.name is task_type), None)
    if size is None or task is None:
        return None
    return Settings(lora=lora_of(size, task, architecture), train=train_of(size, task, architecture))


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
