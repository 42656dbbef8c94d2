"""What a task needs that does not lie on a claim: how it is fetched, and where its result is handed over."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pydantic import ValidationError

from taskoffer.api.contract import (
    BucketFiles,
    FetchItem,
    FetchSource,
    FileFormat,
    HubFiles,
    HubTarget,
    ItemKind,
    RepoType,
    SubmitTarget,
    WebFile,
)
from taskoffer.api.faults import what_is_wrong
from taskoffer.api.quantity import whole
from taskoffer.api.tasks import DatasetType
from taskoffer.api.v1alpha1.model_and_data import Dataset, Model
from taskoffer.api.v1alpha1.steps import Steps
from taskoffer.api.v1alpha1.taskoffer import Output, TaskOfferSpec
from taskoffer.decision.step_needs import data_claim, model_claim


def format_of(dataset: Dataset) -> FileFormat:
    """Return how the rows are stored: as the offer says, else as is usual for where they come from."""
    if dataset.file_format is not None:
        return dataset.file_format
    if dataset.type is DatasetType.IMAGE:
        return FileFormat.ZIP
    source = dataset.source
    return FileFormat.PARQUET if source is not None and source.hub is not None else FileFormat.JSONL


def other_format(spec: TaskOfferSpec) -> str | None:
    """Say which format the trainer reads in place of the offer's, or None where it reads that."""
    given, pictures = spec.dataset.file_format, spec.dataset.type is DatasetType.IMAGE
    if spec.trainer is not None or given is None or (given is FileFormat.ZIP) == pictures:
        return None
    if pictures:
        return "set it to zip: pictures with captions come as an archive, or as a folder of the same files"
    others = ", ".join(form.value for form in FileFormat if form is not FileFormat.ZIP)
    return f"set it to one of {others}: zip holds pictures"


def model_item(model: Model, steps: Steps) -> FetchItem:
    """Return how the base model is fetched: from its bucket, else from the hub by its name.

    Raises:
        ValidationError: when the name or the address is none that can be asked for.
    """
    source = model.source
    if source is not None and source.url is not None:
        found = FetchSource(s3=BucketFiles(url=source.url))
    else:
        found = FetchSource(hub=HubFiles(repository=model.name, revision=model.revision))
    return FetchItem(name="model", kind=ItemKind.MODEL, source=found, size_limit=_limit(steps))


def data_item(dataset: Dataset, steps: Steps) -> FetchItem:
    """Return how the data is fetched.

    Raises:
        ValidationError: when the name or the address is none that can be asked for.
        ValueError: when the offer does not say where the data is.
    """
    source = dataset.source
    if source is not None and source.hub is not None:
        hub = source.hub
        files = HubFiles(repository=hub.name, revision=hub.revision, repo_type=RepoType.DATASET, split=hub.split)
        found = FetchSource(hub=files)
    elif source is not None and source.url is not None and source.url.url.startswith("s3://"):
        found = FetchSource(s3=BucketFiles(url=source.url.url))
    elif source is not None and source.url is not None:
        found = FetchSource(url=WebFile(url=source.url.url, expires_at=source.url.expires_at))
    else:
        raise ValueError("dataset.source says nothing of where the data is")
    return FetchItem(
        name="data", kind=ItemKind.DATA, source=found, size_limit=_limit(steps), file_format=format_of(dataset)
    )


def target_of(output: Output, private: bool = True) -> SubmitTarget | None:
    """Return where a result is handed over, or None where it stays on its claim.

    Args:
        output: What the offer says.
        private: Whether a repository that is created for it is private.

    Raises:
        ValidationError: when the name or the address is none that can be asked for.
    """
    if output.url is not None:
        return SubmitTarget(s3=BucketFiles(url=output.url))
    if output.repository is not None:
        return SubmitTarget(hub=HubTarget(repository=output.repository, private=private, subfolder=output.subfolder))
    return None


def misnamed(spec: TaskOfferSpec, steps: Steps | None) -> Iterator[tuple[str, str]]:
    """Name each field of an offer that nothing could be fetched from or handed over to, with what is wrong."""
    if steps is None:
        return
    output = spec.output
    asked: list[tuple[str, Callable[[], object]]] = []
    if model_claim(spec.model) is None:
        field = "model.source.url" if spec.model.source is not None and spec.model.source.url else "model.name"
        asked.append((field, lambda: model_item(spec.model, steps)))
    if spec.dataset.source is not None and data_claim(spec.dataset) is None:
        asked.append(("dataset.source", lambda: data_item(spec.dataset, steps)))
    if output is not None:
        asked.append(("output", lambda: target_of(output)))
    for field, make in asked:
        try:
            make()
        except ValidationError as error:
            yield field, f"it {what_is_wrong(error.errors()[0])[0]}"


def _limit(steps: Steps) -> int | None:
    limit = steps.item_size_limit
    return whole(limit) if limit is not None else None
