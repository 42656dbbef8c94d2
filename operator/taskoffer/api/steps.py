"""The steps around a training: what is fetched before it, where it lies meanwhile, and where the result goes.

An admitted task has three pods. *Prepare* has the network and the tokens and puts model and data into a cache;
*train* has a GPU and neither; *submit* has the network again and hands the adapter over. Each of the two outer
steps gets one file of the types below. Names inside of the cache follow from the configuration alone, so that the
operator knows the paths of the training before anything was fetched.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import PurePosixPath
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from taskoffer.api.base import Time, WireModel, explained
from taskoffer.api.tasks import FileFormat

__all__ = [
    "PREPARE_CONFIG_PATH",
    "SUBMIT_CONFIG_PATH",
    "BucketFiles",
    "CacheSettings",
    "Credentials",
    "FetchItem",
    "FetchSource",
    "FetchedItem",
    "GitFiles",
    "HubFiles",
    "HubTarget",
    "ItemKind",
    "NetworkSettings",
    "PrepareConfig",
    "Published",
    "RepoType",
    "SubmitConfig",
    "SubmitTarget",
    "WebFile",
    "item_path",
    "job_folder",
]

PREPARE_CONFIG_PATH = "/etc/taskoffer/prepare.json"
"""Where the prepare step finds its configuration."""

SUBMIT_CONFIG_PATH = "/etc/taskoffer/submit.json"
"""Where the submit step finds its configuration."""

_REPOSITORY = explained(
    r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$",
    "must be name or owner/name, of letters, digits, dots, dashes and underscores",
)
_HTTP = explained(r"^https?://[^\s]+$", "an address begins with https:// or http:// and holds no spaces")
_S3 = explained(
    r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]/[^\s]+$",
    "an s3 address is s3://bucket/key, or s3://bucket/folder/ with a slash at its end for all that lies below it",
)
_JOB = explained(r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$", "a job's name is lower-case letters, digits, dots, dashes")
_ABSOLUTE = explained(r"^/[^\x00]*$", "a path in the pod is absolute: begin it with /")
_SUBFOLDER = explained(
    r"^[A-Za-z0-9_-][A-Za-z0-9_-]*(/[A-Za-z0-9_-]+)*$", "a subfolder is a relative path without dots"
)
_ENTRYPOINT = explained(
    r"^([A-Za-z0-9_-][A-Za-z0-9._-]*/)*[A-Za-z0-9_-][A-Za-z0-9._-]*\.py$",
    "an entrypoint is the relative path of a .py file, and no part of it begins with a dot",
)


def _with_a_host(url: str) -> str:
    """Refuse what only looks like an address, before something has to be made of its parts."""
    try:
        parts = urlsplit(url)
        known = bool(parts.hostname) and parts.port != 0
    except ValueError as error:
        raise ValueError(f"cannot be read as an address: {error}") from None
    if not known:
        raise ValueError("cannot be read as an address: it names no host, or the port 0")
    return url


Address = Annotated[str, StringConstraints(max_length=4096, pattern=_HTTP), AfterValidator(_with_a_host)]
Repository = Annotated[str, StringConstraints(max_length=253, pattern=_REPOSITORY)]
BucketUrl = Annotated[str, StringConstraints(max_length=1200, pattern=_S3)]
Endpoint = Annotated[str, StringConstraints(max_length=1024, pattern=_HTTP)]
PodPath = Annotated[str, StringConstraints(max_length=4096, pattern=_ABSOLUTE)]
JobName = Annotated[str, StringConstraints(pattern=_JOB)]
Pattern = Annotated[str, StringConstraints(min_length=1, max_length=253)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Bytes = Annotated[int, Field(ge=1, le=10**15)]


class RepoType(StrEnum):
    """What a repository on a hub holds."""

    MODEL = "model"
    DATASET = "dataset"


class ItemKind(StrEnum):
    """What an item is for; a fault of it is reported as one of the model or of the data."""

    MODEL = "model"
    DATA = "data"
    TRAINER = "trainer"


class HubFiles(WireModel):
    """Files of a repository on a model hub; names follow ``huggingface_hub.snapshot_download``.

    Of a model without patterns, what training reads is taken: configuration, tokenizer and safetensors. Of a data
    set without patterns, the files of one split are taken.
    """

    repository: Repository = Field(description="Name on the hub.")
    revision: Annotated[str, StringConstraints(min_length=1, max_length=253)] | None = Field(
        None, description="Branch, tag or commit; absent means main."
    )
    repo_type: RepoType = Field(RepoType.MODEL, description="model or dataset.")
    config_name: Annotated[str, StringConstraints(min_length=1, max_length=253)] | None = Field(
        None, description="Subset of a data set, as its card names it."
    )
    split: Annotated[str, StringConstraints(min_length=1, max_length=63)] | None = Field(
        None, description="Split of a data set; absent means train."
    )
    allow_patterns: Annotated[tuple[Pattern, ...], Field(max_length=32)] = Field(
        (), description="Take only files that match one of these shell patterns."
    )
    ignore_patterns: Annotated[tuple[Pattern, ...], Field(max_length=32)] = Field(
        (), description="Leave out files that match one of these shell patterns."
    )


class WebFile(WireModel):
    """One file behind an address, as a rule a presigned one."""

    url: Address = Field(description="Address. Its query may be a signature, so it is never logged.")
    expires_at: Time | None = Field(
        None, description="When the address stops to work; read from S3's and Google's signatures when absent."
    )


class BucketFiles(WireModel):
    """An object in a bucket, or all objects below a prefix that ends with a slash."""

    url: BucketUrl = Field(description="s3://bucket/key or s3://bucket/prefix/.")
    endpoint: Endpoint | None = Field(
        None,
        description="Address of a store other than AWS; addressed by path. It is the operator's choice, as the hub is, "
        "so that it may be one of the cluster.",
    )
    region: Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,63}$")] = Field(
        "us-east-1", description="Region that requests are signed for."
    )


class GitFiles(WireModel):
    """The files of a git repository at one commit, whose hash they are checked against."""

    url: Annotated[Address, StringConstraints(max_length=1024)] = Field(description="Address that git clones from.")
    commit: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")] = Field(description="Full commit hash.")
    entrypoint: Annotated[str, StringConstraints(max_length=253, pattern=_ENTRYPOINT)] | None = Field(
        None, description="File that will be run: a commit without it is refused before anything waits for a GPU."
    )


class FetchSource(WireModel):
    """Where an item comes from: exactly one member."""

    hub: HubFiles | None = Field(None, description="A repository on a model hub.")
    git: GitFiles | None = Field(None, description="A git repository at a commit.")
    url: WebFile | None = Field(None, description="A file behind an address.")
    s3: BucketFiles | None = Field(None, description="An object or a prefix in a bucket.")
    path: PodPath | None = Field(None, description="File or folder in the pod, for example on a mounted claim.")

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        given = [name for name in ("hub", "git", "url", "s3", "path") if getattr(self, name) is not None]
        if len(given) != 1:
            found = ", ".join(given) or "none of them"
            raise ValueError(f"needs exactly one of hub, git, url, s3 and path, and there is {found}")
        return self


class FetchItem(WireModel):
    """One thing to have in the cache before the training starts."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")] = Field(
        description="Name of the item below the job's folder."
    )
    kind: ItemKind = Field(description="model, data or trainer.")
    source: FetchSource = Field(description="Where it comes from.")
    sha256: Sha256 | None = Field(None, description="SHA-256 that a single file must have.")
    size_limit: Bytes | None = Field(None, description="Most bytes that the item may have.")
    file_format: FileFormat | None = Field(
        None,
        description="Format of data: of several in a data set only this one is taken; hf takes a whole folder, and "
        "of a repository on a hub what is found.",
    )

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        if (self.kind is ItemKind.TRAINER) != (self.source.git is not None):
            raise ValueError("source.git: a trainer comes from there, and nothing else does")
        if self.kind is ItemKind.MODEL and self.source.url is not None:
            raise ValueError("source.url: a model is a folder and an address is one file; use hub, s3 or path")
        if self.kind is not ItemKind.DATA and self.file_format is not None:
            raise ValueError("fileFormat: only data has one")
        if self.sha256 is not None and self.source.git is not None:
            raise ValueError("sha256: a repository is many files; its commit is their checksum")
        if self.sha256 is not None and self.source.hub is not None:
            raise ValueError("sha256: a repository is many files; pin source.hub.revision to a commit instead")
        if self.sha256 is not None and self.source.s3 is not None and self.source.s3.url.endswith("/"):
            raise ValueError("sha256: a prefix is many files; name one object or leave it out")
        hub = self.source.hub
        if hub is not None and (hub.repo_type is RepoType.MODEL) != (self.kind is ItemKind.MODEL):
            raise ValueError(f"source.hub.repoType: {hub.repo_type.value} does not go with kind {self.kind.value}")
        return self

    @property
    def file_name(self) -> str | None:
        """Name of the file when the item is one file by its source alone, else None: the item is a folder."""
        single = self.source.url is not None
        single = single or (self.source.s3 is not None and not self.source.s3.url.endswith("/"))
        if not single:
            return None
        return "data" if self.file_format is None else f"data.{self.file_format.value}"


class CacheSettings(WireModel):
    """A folder that jobs share; on a volume, all pods that mount it must see the same locks."""

    path: PodPath = Field("/cache", description="Folder in the pod.")
    size_limit: Bytes | None = Field(None, description="Most bytes to keep; absent means no limit but the disk.")
    min_age_seconds: Annotated[int, Field(ge=0, le=31_536_000)] = Field(
        3600, description="What was used within this time is never removed."
    )


class Credentials(WireModel):
    """Files with secrets, as a rule keys of a mounted Secret. Nothing here is a secret itself."""

    hub_token_file: PodPath | None = Field(None, description="File that holds a token of the hub and nothing else.")
    s3_credentials_file: PodPath | None = Field(
        None, description="File in the format of ~/.aws/credentials; its section [default] is used."
    )


class NetworkSettings(WireModel):
    """What addresses an offer may make the pod talk to, and how long it waits for them."""

    allow_http: bool = Field(False, description="Allow http:// as well as https://.")
    allow_private_addresses: bool = Field(
        False,
        description="Allow addresses of the cluster, the node and private networks in an offer's url.",
    )
    timeout_seconds: Annotated[float, Field(gt=0, le=3600)] = Field(
        60.0, description="Give a connection up when nothing came for so long."
    )
    tries: Annotated[int, Field(ge=1, le=100)] = Field(
        6, description="Tries of one request that brings nothing new; the waits between them double."
    )
    retry_wait_seconds: Annotated[float, Field(ge=0, le=60)] = Field(1.0, description="The first of these waits.")


class HubTarget(WireModel):
    """A repository on a model hub that receives the adapter."""

    repository: Repository = Field(description="Exact name; created when it is missing.")
    private: bool = Field(True, description="Whether a repository that is created is private.")
    subfolder: Annotated[str, StringConstraints(max_length=253, pattern=_SUBFOLDER)] | None = Field(
        None, description="Folder inside of the repository."
    )


class SubmitTarget(WireModel):
    """Where the result goes: exactly one member."""

    hub: HubTarget | None = Field(None, description="A repository on a model hub.")
    folder: PodPath | None = Field(None, description="Folder in the pod, for example on a mounted claim.")
    s3: BucketFiles | None = Field(None, description="A prefix in a bucket, with a slash at its end.")

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        given = [name for name in ("hub", "folder", "s3") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of hub, folder and s3, and there is {', '.join(given) or 'none'}")
        if self.s3 is not None and not self.s3.url.endswith("/"):
            raise ValueError("s3.url: the result is several files; end the address with a slash")
        return self


class PrepareConfig(WireModel):
    """All that the prepare step needs to know."""

    version: Literal["v1alpha1"] = "v1alpha1"
    job_name: JobName = Field(description="Name of the TrainingJob.")
    attempt: Annotated[int, Field(ge=1)] = Field(1, description="Number of the attempt, from 1.")
    items: Annotated[tuple[FetchItem, ...], Field(max_length=8)] = Field(description="What to fetch.")
    cache: CacheSettings = Field(default_factory=CacheSettings)
    lease_expires_at: Time = Field(
        description="Until when the job keeps its files in the cache: its deadline and some grace for submitting."
    )
    deadline: Time | None = Field(None, description="When to give up fetching.")
    credentials: Credentials = Field(default_factory=Credentials)
    network: NetworkSettings = Field(default_factory=NetworkSettings)
    target: SubmitTarget | None = Field(
        None,
        description="Where the result will go: whether it may be written there is asked before anything is fetched.",
    )

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = [item.name for item in self.items]
        if len(set(names)) != len(names):
            raise ValueError(f"items: two have the same name: {', '.join(sorted(names))}")
        if not names and self.target is None:
            raise ValueError("items: name what to fetch, or a target to ask about")
        return self


class SubmitConfig(WireModel):
    """All that the submit step needs to know."""

    version: Literal["v1alpha1"] = "v1alpha1"
    job_name: JobName = Field(description="Name of the TrainingJob.")
    task_id: str = Field(description="Identity of the task in its market.")
    attempt: Annotated[int, Field(ge=1)] = Field(1, description="Number of the attempt, from 1.")
    adapter_dir: PodPath = Field(description="Folder with the adapter that the training left.")
    base_model: Annotated[str, StringConstraints(min_length=1, max_length=253)] = Field(
        description="Public name of the base model, which card and adapter must name."
    )
    base_model_path: PodPath | None = Field(
        None, description="Folder of the base model; with its config.json every tensor's place and shape is checked."
    )
    target: SubmitTarget | None = Field(
        None, description="Where the result goes; absent means that it stays where it is once it was checked."
    )
    unverified: bool = Field(
        False,
        description="Whether a trainer that is not ours left the result: there is no manifest, so that it is loaded "
        "onto the base model and used here.",
    )
    provisional: bool = Field(
        False,
        description="Whether the training has ended early: adapterDir then holds folders step-N-…, and the latest one, "
        "the best adapter so far, is handed over.",
    )
    cache: CacheSettings | None = Field(None, description="Cache where the job's files are given up at the end.")
    deadline: Time | None = Field(None, description="When the result must be there.")
    credentials: Credentials = Field(default_factory=Credentials)
    network: NetworkSettings = Field(default_factory=NetworkSettings)

    @model_validator(mode="after")
    def _check_target(self) -> Self:
        if self.target is None and not self.unverified:
            raise ValueError("target: say where the result goes: there is nothing else to do with it")
        if self.provisional and not self.unverified:
            raise ValueError("provisional: nobody has verified the best adapter so far; set unverified")
        if self.unverified and self.base_model_path is None:
            raise ValueError("baseModelPath: a result that nobody has verified is loaded onto it; name its folder")
        return self


class FetchedItem(WireModel):
    """What the prepare step says of an item in its termination message."""

    name: Annotated[str, StringConstraints(max_length=63)]
    digest: Sha256 = Field(description="SHA-256 over the names and contents of all its files.")
    revision: Annotated[str, StringConstraints(max_length=64)] | None = Field(
        None, description="Commit that a branch or tag stood for."
    )
    files: int = Field(description="Number of files.")
    bytes: int = Field(description="Their size.")
    fetched_bytes: int = Field(description="Bytes that were not in the cache and came over the network.")
    file_format: FileFormat | None = Field(None, description="Format of the data that was found.")


class Published(WireModel):
    """What the submit step says of the result in its termination message."""

    to: Annotated[str, StringConstraints(max_length=1400)] = Field(description="Repository, folder or s3 address.")
    revision: Annotated[str, StringConstraints(max_length=64)] | None = Field(None, description="Commit on the hub.")
    files: int = Field(description="Number of files.")
    bytes: int = Field(description="Their size.")


def job_folder(job_name: str) -> PurePosixPath:
    """Return the folder of a job relative to the cache; a training pod needs no more of the cache than this."""
    return PurePosixPath("jobs") / job_name


def item_path(job_name: str, item: FetchItem) -> PurePosixPath:
    """Return where an item lies relative to the cache: a folder, or a file where its source is a single one."""
    folder = job_folder(job_name) / item.name
    return folder if item.file_name is None else folder / item.file_name
