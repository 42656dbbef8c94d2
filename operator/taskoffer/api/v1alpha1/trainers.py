"""Trainers that offers bring along: what an offer names, what a policy allows, what a job is pinned to."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field, StringConstraints

from taskoffer.api.base import WireModel, spelled
from taskoffer.api.v1alpha1.meta import ATOMIC_LIST, QuantityString, rule, rules

DEFAULT_ENTRYPOINT = "train.py"
"""What is run of a repository that names no entrypoint."""

ImageName = Annotated[str, StringConstraints(min_length=1, max_length=1024)]


class TrainerRepository(WireModel):
    """A trainer that is taken from source at a fixed commit. No image is built of it."""

    url: Annotated[
        str,
        StringConstraints(min_length=8, max_length=1024),
        spelled(r"^https?://.+", "url must be an address: begin it with https://"),
    ] = Field(
        description="https address of the repository; http only where the policy's steps.network.allowHttp lets it."
    )
    commit: Annotated[
        str,
        StringConstraints(max_length=40),
        spelled(r"^[0-9a-f]{40}$", "commit must be a full hash of 40 hexadecimal digits: not a branch or tag"),
    ] = Field(description="Full commit hash.")
    entrypoint: (
        Annotated[
            str,
            StringConstraints(max_length=253),
            spelled(
                r"^([A-Za-z0-9_][A-Za-z0-9_.-]*/)*[A-Za-z0-9_][A-Za-z0-9_.-]*[.]py$",
                "entrypoint must be a relative path without dots at the beginning of its parts that ends in .py: "
                "write for example scripts/train.py",
            ),
        ]
        | None
    ) = Field(None, description="Python file of the repository that is run; default train.py.")


class TrainerOverride(WireModel):
    """A trainer other than the policy's: an image or a repository, not both."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "has(self.image) != has(self.repository)",
                "trainer needs exactly one of image and repository: set one and remove the other",
                on_create=True,
            )
        )
    )

    image: ImageName | None = Field(None, description="Container image that follows the trainer contract.")
    repository: TrainerRepository | None = Field(
        None,
        description="Source repository at a commit. It is fetched and run as it is, in an image that the policy "
        "chooses: nothing is built or installed.",
    )


class Trainers(WireModel):
    """Which trainers of their own offers may bring. What is not listed is not allowed."""

    images: Annotated[
        tuple[Annotated[str, StringConstraints(min_length=1, max_length=1024)], ...], Field(max_length=32)
    ] = Field(
        (),
        description="Shell patterns of image references, for example registry.example.com/trainers/*; a * takes "
        "slashes too.",
        json_schema_extra=ATOMIC_LIST,
    )
    repositories: Annotated[
        tuple[
            Annotated[
                str,
                StringConstraints(min_length=8, max_length=1024),
                spelled(
                    r"^https?://[A-Za-z0-9.-]+(:[0-9]+)?(/[A-Za-z0-9._~-]+)*/?$",
                    "must be the beginning of an address: write for example https://git.example.com/team/",
                ),
            ],
            ...,
        ],
        Field(max_length=32),
    ] = Field(
        (),
        description="Beginnings of repository addresses, for example https://git.example.com/team/; each ends at a "
        "slash, whether it is written or not.",
        json_schema_extra=ATOMIC_LIST,
    )
    image: ImageName | None = Field(
        None, description="Image that repositories run in, with python in it; absent takes podTemplate.image."
    )
    ephemeral_storage: QuantityString | None = Field(
        None,
        description="Most that such a container may write to the node's own disk: checkpoints, caches, /tmp. Absent "
        "means no limit but the disk.",
    )


class OwnTrainer(WireModel):
    """The trainer that an offer has brought, as its job runs it."""

    image: ImageName = Field(description="Image of the container.")
    repository: TrainerRepository | None = Field(
        None, description="What is run in it; absent runs what the image runs by itself."
    )
    ephemeral_storage: QuantityString | None = Field(
        None, description="Most that the container may write to the node's own disk."
    )
