"""Which steps a task needs around its training, by where its model, its data and its result lie."""

from __future__ import annotations

from collections.abc import Iterator

from taskoffer.api.v1alpha1.meta import ClaimPath
from taskoffer.api.v1alpha1.model_and_data import Dataset, Model
from taskoffer.api.v1alpha1.steps import Steps
from taskoffer.api.v1alpha1.taskoffer import Output, TaskOfferSpec
from taskoffer.api.v1alpha1.trainingjob import Run

_REMEDY = "give the policy steps.cache, or"
_FOR_HUBS = "give the policy steps.hubToken, or"
_FOR_BUCKETS = "give the policy steps.s3Credentials, or"
_WITHOUT_TARGET = "remove it and take the adapter from the output claim"


def model_claim(model: Model) -> ClaimPath | None:
    """Return the claim that the model lies on, or None where it has to be fetched."""
    return model.source.persistent_volume_claim if model.source is not None else None


def data_claim(dataset: Dataset) -> ClaimPath | None:
    """Return the claim that the data lies on, or None where it has to be fetched."""
    return dataset.source.persistent_volume_claim if dataset.source is not None else None


def output_claim(output: Output | None, steps: Steps | None) -> ClaimPath | None:
    """Return the claim that receives results and checkpoints: the offer's, else the policy's workspace."""
    if output is not None and output.persistent_volume_claim is not None:
        return output.persistent_volume_claim
    return steps.workspace if steps is not None else None


def is_fetched(run: Run) -> bool:
    """Tell whether something has to be fetched before the training."""
    lacking = model_claim(run.model) is None or data_claim(run.dataset) is None
    return run.steps is not None and (lacking or (run.trainer is not None and run.trainer.repository is not None))


def is_prepared(run: Run) -> bool:
    """Tell whether there is something to do before the training: to fetch, or to ask where the result is to go."""
    return is_fetched(run) or (run.steps is not None and has_target(run))


def is_submitted(run: Run) -> bool:
    """Tell whether the result is handed over after the training, or verified where another's trainer has left it."""
    if run.steps is None:
        return False
    return run.trainer is not None or has_target(run)


def has_target(run: Run) -> bool:
    """Tell whether the offer says where else the result is to go than to its claim."""
    return run.output is not None and (run.output.repository or run.output.url) is not None


def unserved(spec: TaskOfferSpec, steps: Steps | None) -> Iterator[tuple[str, str]]:
    """Name each field of an offer that asks for what no step of the policy does, with the remedy."""
    if steps is None and model_claim(spec.model) is None:
        yield "model.source", f"{_REMEDY} put the model on a claim and set model.source.persistentVolumeClaim"
    if spec.dataset.source is None:
        yield "dataset.source", "say where the data lies: dataset.source.persistentVolumeClaim, url or hub"
    elif steps is None and data_claim(spec.dataset) is None:
        yield "dataset.source", f"{_REMEDY} put the data on a claim and set dataset.source.persistentVolumeClaim"
    if output_claim(spec.output, steps) is None:
        yield "output", "set output.persistentVolumeClaim, the claim that receives the adapter"
    output = spec.output
    # Nothing can be written to either without a secret; to be told so after the training would be late.
    if output is not None and output.repository is not None and (steps is None or steps.hub_token is None):
        yield "output.repository", f"{_REMEDY if steps is None else _FOR_HUBS} {_WITHOUT_TARGET}"
    if output is not None and output.url is not None and (steps is None or steps.s3_credentials is None):
        yield "output.url", f"{_REMEDY if steps is None else _FOR_BUCKETS} {_WITHOUT_TARGET}"
