"""What a policy says of the steps around a training: how model and data come, and how the result goes away."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from taskoffer.api.base import WireModel, spelled
from taskoffer.api.contract import NetworkSettings
from taskoffer.api.v1alpha1.meta import ClaimPath, Name, QuantityString

SecretKeyName = Annotated[
    str,
    StringConstraints(min_length=1, max_length=253),
    spelled(r"^[-._a-zA-Z0-9]+$", "key must be the key of a Secret: use letters, digits, '-', '_' and '.'"),
]

Endpoint = Annotated[
    str,
    StringConstraints(min_length=8, max_length=1024),
    spelled(r"^https?://[^/ ].*$", "must be an address: begin it with https:// or http://"),
]


Region = Annotated[
    str,
    StringConstraints(min_length=1, max_length=63),
    spelled(r"^[a-z0-9-]+$", "must be a region as eu-central-1: use lower-case letters, digits and '-'"),
]


class SecretKey(WireModel):
    """A key of a Secret in the offer's namespace."""

    name: Name = Field(description="Name of the Secret.")
    key: SecretKeyName = Field(description="Key whose value is used.")


class Cache(WireModel):
    """The claim that the tasks of a namespace share what was fetched on."""

    claim_name: Name = Field(description="Claim in the offer's namespace; ReadWriteMany where there are several nodes.")
    size_limit: QuantityString | None = Field(None, description="Most that is kept; absent means the claim's size.")
    min_age_seconds: Annotated[int, Field(ge=0, le=31_536_000)] = Field(
        3600, description="What was used within this time is never removed."
    )


class Steps(WireModel):
    """How the pods before and after a training work. They have the network and the tokens, and no GPU."""

    cache: Cache = Field(description="Where models and data are kept between tasks.")
    workspace: ClaimPath | None = Field(
        None, description="Where results and checkpoints of offers lie that name no claim for them."
    )
    image: Annotated[str, StringConstraints(min_length=1, max_length=1024)] | None = Field(
        None, description="Image of the steps; absent takes podTemplate.image."
    )
    hub_endpoint: Endpoint | None = Field(None, description="Address of the hub; absent means the public one.")
    hub_token: SecretKey | None = Field(None, description="Token of the hub, in a Secret of the offer's namespace.")
    private_repositories: bool = Field(
        True,
        description="Whether repositories that are created for results are private. Then none goes into one that is "
        "there and public.",
    )
    s3_credentials: SecretKey | None = Field(
        None, description="Credentials file of S3 in a Secret of the offer's namespace; its section [default] counts."
    )
    s3_endpoint: Endpoint | None = Field(
        None, description="Address of an S3 store other than AWS, which is addressed by path; absent means AWS."
    )
    s3_region: Region | None = Field(
        None, description="Region of the buckets, which requests are signed for; absent means us-east-1."
    )
    network: NetworkSettings = Field(default_factory=NetworkSettings, description="What addresses are allowed.")
    item_size_limit: QuantityString | None = Field(None, description="Most that a model or a data set may have.")
    cpu: QuantityString | None = Field(None, description="CPU request of a step.")
    memory: QuantityString | None = Field(None, description="Memory request and limit of a step.")
    timeout_seconds: Annotated[int, Field(ge=60, le=604_800)] = Field(
        21_600,
        description="Seconds after which a step is ended that has not ended by itself, and within which Prepare, or "
        "any step of a task without a deadline, is begun again.",
    )
    backoff_limit: Annotated[int, Field(ge=0, le=20)] = Field(
        3, description="Times that a failed step is tried again at once, by Kubernetes."
    )
    backoff_seconds: Annotated[int, Field(ge=1, le=86_400)] = Field(
        30,
        description="Pause before a step that asks to be started again (exit code 138) is begun anew; doubled each "
        "time, while there is time for it.",
    )
    backoff_max_seconds: Annotated[int, Field(ge=1, le=86_400)] = Field(600, description="The longest of these pauses.")
    lease_seconds: Annotated[int, Field(ge=3600, le=31_536_000)] = Field(
        604_800, description="Seconds that a job without a deadline keeps its files in the cache."
    )
    submit_seconds: Annotated[int, Field(ge=0, le=86_400)] = Field(
        300, description="Seconds that the training leaves before the deadline for handing the result over."
    )
