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
from taskoffer.api.v1alpha1.model_and_data import Dataset, DatasetSource, Model
from taskoffer.api.v1alpha1.steps import Steps
from taskoffer.api.v1alpha1.taskoffer import Output, TaskOfferSpec
from taskoffer.decision.step_needs import data_claim, model_claim

_LONGEST_NAME = 96
"""Characters of a repository's name without its owner."""


def format_of(dataset: Dataset) -> FileFormat | None:
    """Return how the rows are stored: as the offer says, else as is usual for where they come from.

    None where a data set on a hub has to be looked at, which is also what hf means there: it comes in one format, and
    the training reads what has come.
    """
    on_hub = dataset.source is not None and dataset.source.hub is not None
    if dataset.file_format is not None and not (on_hub and dataset.file_format is FileFormat.HF):
        return dataset.file_format
    if dataset.type is DatasetType.IMAGE:
        return FileFormat.ZIP
    return None if on_hub else FileFormat.JSONL


def told_format(dataset: Dataset) -> FileFormat:
    """Return the format that a trainer of somebody else is told, which has to know it before anything was looked at."""
    return dataset.file_format or format_of(dataset) or FileFormat.PARQUET


def other_format(spec: TaskOfferSpec) -> str | None:
    """Say which format the trainer reads in place of the offer's, or None where it reads that."""
    given, pictures = spec.dataset.file_format, spec.dataset.type is DatasetType.IMAGE
    if spec.trainer is not None or given is None:
        return None
    if pictures and given is not FileFormat.ZIP:
        return "set it to zip: pictures with captions come as an archive, or as a folder of the same files"
    if not pictures and given is FileFormat.ZIP:
        return f"set it to one of {_names_without(FileFormat.ZIP)}: zip holds pictures"
    if given is FileFormat.HF and _is_one_file(spec.dataset.source):
        return (
            f"set it to one of {_names_without(FileFormat.ZIP, FileFormat.HF)}, as the file is: hf is a folder, and "
            "dataset.source.url is one file unless it is a prefix in a bucket, s3://bucket/folder/"
        )
    return None


def _names_without(*formats: FileFormat) -> str:
    return ", ".join(form.value for form in FileFormat if form not in formats)


def _is_one_file(source: DatasetSource | None) -> bool:
    url = source.url.url if source is not None and source.url is not None else None
    return url is not None and not (url.startswith("s3://") and url.endswith("/"))


def model_item(model: Model, steps: Steps) -> FetchItem:
    """Return how the base model is fetched: from its bucket, else from the hub by its name.

    Raises:
        ValidationError: when the name or the address is none that can be asked for.
    """
    source = model.source
    if source is not None and source.url is not None:
        found = FetchSource(s3=_in_bucket(source.url, steps))
    else:
        found = FetchSource(hub=HubFiles(repository=model.name, revision=model.revision))
    return FetchItem(name="model", kind=ItemKind.MODEL, source=found, size_limit=_limit(steps))


def data_item(dataset: Dataset, steps: Steps, told: FileFormat | None = None) -> FetchItem:
    """Return how the data is fetched.

    Args:
        dataset: What the offer says.
        steps: What the policy says.
        told: The format that a trainer of somebody else is told; None for ours, which sees what has come.

    Raises:
        ValidationError: when the name or the address is none that can be asked for.
        ValueError: when the offer does not say where the data is.
    """
    source = dataset.source
    if source is None or (source.hub is None and source.url is None):
        raise ValueError("dataset.source says nothing of where the data is")
    return FetchItem(
        name="data",
        kind=ItemKind.DATA,
        source=_data_source(source, steps),
        sha256=source.url.sha256 if source.url is not None else None,
        size_limit=_limit(steps),
        file_format=told or format_of(dataset),
    )


def _data_source(source: DatasetSource, steps: Steps) -> FetchSource:
    hub, url = source.hub, source.url
    if hub is not None:
        files = HubFiles(
            repository=hub.name,
            revision=hub.revision,
            repo_type=RepoType.DATASET,
            config_name=hub.config_name,
            split=hub.split,
        )
        return FetchSource(hub=files)
    assert url is not None  # noqa: S101 - one of the two was given.
    if url.url.startswith("s3://"):
        return FetchSource(s3=_in_bucket(url.url, steps))
    return FetchSource(url=WebFile(url=url.url, expires_at=url.expires_at))


def _in_bucket(url: str, steps: Steps) -> BucketFiles:
    where = {"endpoint": steps.s3_endpoint, "region": steps.s3_region}
    return BucketFiles.model_validate({"url": url, **{name: value for name, value in where.items() if value}})


def target_of(output: Output, steps: Steps) -> SubmitTarget | None:
    """Return where a result is handed over, or None where it stays on its claim.

    Raises:
        ValidationError: when the name or the address is none that can be asked for.
    """
    if output.url is not None:
        return SubmitTarget(s3=_in_bucket(output.url, steps))
    if output.repository is not None:
        private = steps.private_repositories
        return SubmitTarget(hub=HubTarget(repository=output.repository, private=private, subfolder=output.subfolder))
    return None


def misnamed(spec: TaskOfferSpec, steps: Steps | None) -> Iterator[tuple[str, str]]:
    """Name each field of an offer that nothing could be fetched from or handed over to, with what is wrong."""
    if steps is None:
        return
    output = spec.output
    asked: list[tuple[str, Callable[[], FetchItem | SubmitTarget | None]]] = []
    if model_claim(spec.model) is None:
        field = "model.source.url" if spec.model.source is not None and spec.model.source.url else "model.name"
        asked.append((field, lambda: model_item(spec.model, steps)))
    if spec.dataset.source is not None and data_claim(spec.dataset) is None:
        asked.append(("dataset.source", lambda: data_item(spec.dataset, steps)))
    if output is not None:
        asked.append(("output", lambda: target_of(output, steps)))
    for field, make in asked:
        try:
            wrong = _no_name_of_a_hub(make())
        except ValidationError as error:
            wrong = what_is_wrong(error.errors()[0])[0]
        if wrong is not None:
            yield field, f"it {wrong}"


def _no_name_of_a_hub(made: FetchItem | SubmitTarget | None) -> str | None:
    """Say why there can be no repository of this name on a hub; None where there can, or where none is asked for.

    The rules are those of ``huggingface_hub.utils.validate_repo_id``. A repository is created below an owner, and
    without one it would be the token's, of which nobody but the hub knows.
    """
    hub = made.hub if isinstance(made, SubmitTarget) else made.source.hub if made is not None else None
    if hub is None:
        return None
    owner, slash, name = hub.repository.rpartition("/")
    if not slash and isinstance(hub, HubTarget):
        return "must be owner/name: say whose repository receives the result"
    if len(name) > _LONGEST_NAME:
        return f"must have at most {_LONGEST_NAME} characters in a repository's name"
    odd = "--" in hub.repository or ".." in hub.repository or name.endswith(".git")
    if odd or any(part.strip("-.") != part for part in (owner, name)):
        return "must be a name that a hub has: no -- or .., no - or . at an end, and not .git at the last one"
    return None


def _limit(steps: Steps) -> int | None:
    limit = steps.item_size_limit
    return whole(limit) if limit is not None else None
