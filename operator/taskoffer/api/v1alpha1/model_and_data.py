"""What a task is trained from: the base model and the data, what they are and where they lie."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from taskoffer.api.addresses import expiry
from taskoffer.api.base import Time, WireModel, spelled
from taskoffer.api.limits import MIN_ROWS
from taskoffer.api.tasks import Architecture as Architecture
from taskoffer.api.tasks import (
    ChatColumns,
    DatasetType,
    DPOColumns,
    FileFormat,
    GRPOColumns,
    ImageColumns,
    InstructColumns,
)
from taskoffer.api.v1alpha1.meta import ATOMIC_LIST, ClaimPath, rule, rules

DATASET_MEMBERS = {t: t.value.lower() for t in DatasetType}
"""The member of a dataset that is set for each type."""

_TOKENS_OF_PICTURES = "dataset.tokens counts text, and pictures have none: remove dataset.tokens"


class ModelSource(WireModel):
    """Where the base model is: on a claim or in a bucket."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!has(self.persistentVolumeClaim) || !has(self.url)",
                "model.source takes persistentVolumeClaim or url, not both: remove one of them",
                on_create=True,
            )
        )
    )

    persistent_volume_claim: ClaimPath | None = Field(None, description="Folder on a claim in the offer's namespace.")
    url: (
        Annotated[
            str,
            StringConstraints(min_length=8, max_length=1200),
            spelled(r"^s3://[^/]+/.+/$", "url must be a prefix in a bucket: write s3://bucket/folder/"),
        ]
        | None
    ) = Field(None, description="Prefix in a bucket that holds the model's files: s3://bucket/folder/.")


class Model(WireModel):
    """The base model of the task."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=253)] = Field(
        description="Public name of the base model, for example meta-llama/Llama-3.1-8B.",
        json_schema_extra=rules(rule("self.trim() != ''", "model.name must not be blank: give the base model's name")),
    )
    revision: Annotated[str, StringConstraints(min_length=1, max_length=253)] | None = Field(
        None, description="Branch, tag or commit of the base model."
    )
    parameters: Annotated[int, Field(ge=1, le=10**15, json_schema_extra={"format": "int64"})] | None = Field(
        None,
        description="Number of parameters. When absent it is read from the name (1.5B, 8x7B, 135M), else it is the "
        "architecture's.",
    )
    architecture: Architecture | None = Field(None, description="sdxl or flux; only for the task type Image.")
    yarn_factor: Annotated[int, Field(json_schema_extra={"enum": [2, 4, 8, 16, 32]})] | None = Field(
        None, description="YaRN factor by which the context is stretched: 2, 4, 8, 16 or 32."
    )
    source: ModelSource | None = Field(None, description="Where the model lies; absent means the public hub.")


class UrlSource(WireModel):
    """Data behind a (presigned) address."""

    url: Annotated[
        str,
        StringConstraints(min_length=8, max_length=4096),
        spelled(r"^(https|http|s3)://.+", "url must be an address: begin it with https://, http:// or s3://"),
    ] = Field(description="https, http or s3 address.")
    expires_at: Time | None = Field(None, description="When the address stops to work.")
    sha256: (
        Annotated[
            str,
            StringConstraints(min_length=64, max_length=64),
            spelled(
                r"^[0-9a-f]{64}$", "sha256 must be a checksum: write 64 lower-case hex digits, as sha256sum prints them"
            ),
        ]
        | None
    ) = Field(None, description="SHA-256 that the file must have; of a single file, not of a prefix in a bucket.")

    @property
    def ends(self) -> datetime | None:
        """When nothing can be fetched any more, as the offer or the address's signature says.

        A bucket is asked with credentials, which no address limits.
        """
        said = (None, None) if self.url.startswith("s3://") else (self.expires_at, expiry(self.url))
        return min((moment for moment in said if moment is not None), default=None)


class HubSource(WireModel):
    """Data set on the public hub."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=253)] = Field(description="Name on the hub.")
    revision: Annotated[str, StringConstraints(min_length=1, max_length=253)] | None = Field(
        None, description="Branch, tag or commit."
    )
    config_name: Annotated[str, StringConstraints(min_length=1, max_length=253)] | None = Field(
        None, description="Subset of the data set, as its card names it."
    )
    split: Annotated[str, StringConstraints(min_length=1, max_length=63)] | None = Field(
        None, description="Split to read."
    )


class DatasetSource(WireModel):
    """Where the data is: exactly one member."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "[has(self.persistentVolumeClaim), has(self.url), has(self.hub)].filter(x, x).size() == 1",
                "dataset.source needs exactly one of persistentVolumeClaim, url and hub: set one and remove the others",
                on_create=True,
            )
        )
    )

    persistent_volume_claim: ClaimPath | None = Field(None, description="File or folder on a claim of the namespace.")
    url: UrlSource | None = Field(None, description="A (presigned) address.")
    hub: HubSource | None = Field(None, description="A data set on the public hub.")


class Dataset(WireModel):
    """The data of the task: its type and exactly the member of that type."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            *(
                rule(
                    f"has(self.{member}) == (self.type == '{kind.value}')",
                    f"dataset.{member} must be set exactly when dataset.type is {kind.value}: "
                    f"set dataset.type to {kind.value} or remove dataset.{member}",
                    on_create=True,
                )
                for kind, member in DATASET_MEMBERS.items()
            ),
            rule(
                f"!has(self.tokens) || self.type != '{DatasetType.IMAGE.value}'",
                _TOKENS_OF_PICTURES,
                on_create=True,
            ),
        )
    )

    type: DatasetType = Field(description="Which of the members below is set.")
    instruct: InstructColumns | None = Field(None, description="Columns of instruction data.")
    chat: ChatColumns | None = Field(None, description="Columns of conversation data.")
    dpo: DPOColumns | None = Field(None, description="Columns of preference data.")
    grpo: GRPOColumns | None = Field(None, description="Columns and rewards of a reinforcement task.")
    image: ImageColumns | None = Field(None, description="Picture data.")
    rows: Annotated[int, Field(ge=1, le=10**12, json_schema_extra={"format": "int64"})] | None = Field(
        None, description="Number of rows or picture pairs, where it is known."
    )
    tokens: Annotated[int, Field(ge=1, le=10**15, json_schema_extra={"format": "int64"})] | None = Field(
        None,
        description="Tokens of the text in all, as whoever offers it has counted them: prompt and answer of each row, "
        "of preference data the prompt with one of its answers, of a GRPO task the prompt. The time is predicted with "
        "tokens/rows for each row, so it takes rows as well; absent means what the policy assumes of a row.",
    )
    size_bytes: Annotated[int, Field(ge=1, le=10**15, json_schema_extra={"format": "int64"})] | None = Field(
        None, description="Size of the data in bytes, where it is known."
    )
    file_format: FileFormat | None = Field(
        None,
        description="How the rows are stored; absent means what a data set on a hub is found to hold, else jsonl, and "
        "zip of pictures.",
    )
    source: DatasetSource | None = Field(None, description="Where the data lies.")
    min_rows: Annotated[int, Field(ge=2, le=10**12, json_schema_extra={"format": "int64"})] | None = Field(
        None, description=f"Fewest usable rows or picture pairs to train on; absent means {MIN_ROWS}."
    )
    sample_prompts: Annotated[
        tuple[Annotated[str, StringConstraints(min_length=1, max_length=2000)], ...], Field(max_length=8)
    ] = Field(
        (),
        description="Prompts that are answered, or drawn, before and after the training, to compare; absent takes the "
        "first of the held-out rows.",
        json_schema_extra=ATOMIC_LIST,
    )

    @model_validator(mode="after")
    def _check_member(self) -> Dataset:
        wanted = DATASET_MEMBERS[self.type]
        present = [m for m in DATASET_MEMBERS.values() if getattr(self, m) is not None]
        if present != [wanted]:
            found = ", ".join(present) or "none of them"
            raise ValueError(
                f"type {self.type.value} goes with {wanted}, and there is {found}: set {wanted} alone, or change type"
            )
        if self.type is DatasetType.IMAGE and self.tokens is not None:
            raise ValueError(_TOKENS_OF_PICTURES)
        return self

    @property
    def tokens_per_row(self) -> float | None:
        """Tokens of a row in the mean, at least one; None where the offer does not declare tokens and rows."""
        if self.tokens is None or self.rows is None:
            return None
        return max(1.0, self.tokens / self.rows)
