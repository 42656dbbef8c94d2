"""What is odd about the trainers that a policy lets offers bring: whoever runs them, and nobody who could."""

from __future__ import annotations

from collections.abc import Iterator

from taskoffer.api.quantity import whole
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec, LintFinding
from taskoffer.api.v1alpha1.steps import Steps
from taskoffer.api.v1alpha1.trainers import Trainers
from taskoffer.decision.lint_profiles import finding
from taskoffer.decision.sizing import billions

_WILD = "*?["
_BYTES_PER_PARAMETER = 2
"""A base model in half precision, which is the least that a result is tried on."""


def lint_trainers(spec: CapacityPolicySpec) -> Iterator[LintFinding]:
    """Yield the patterns that allow more or less than they seem to, and what else does not go with such trainers."""
    trainers, steps = spec.trainers, spec.steps
    if trainers is None or steps is None:
        return
    if not trainers.images and not trainers.repositories:
        yield finding("trainers", "allows no trainer: list images or repositories, or remove it")
    yield from _images(trainers)
    yield from _repositories(trainers, allow_http=steps.network.allow_http)
    if trainers.image is not None and not trainers.repositories:
        yield finding("trainers.image", "is never used: only repositories run in it, and none is allowed", "Info")
    if steps.submit_seconds == 0:
        message = (
            "0 leaves no time to verify what another's trainer has left: one that is stopped when its time is over has "
            "missed its deadline; set it"
        )
        yield finding("steps.submitSeconds", message)
    yield from _memory(spec, steps)


def _memory(spec: CapacityPolicySpec, steps: Steps) -> Iterator[LintFinding]:
    """Yield the smallest size class whose models do not even fit into the pod that tries a result on them."""
    room = whole(steps.memory)
    if not room:
        return  # No limit is stated, or none in whole units.
    for size in sorted(spec.size_classes, key=lambda size: size.min_parameters):
        least = size.min_parameters * _BYTES_PER_PARAMETER
        if least > room:
            message = (
                f"{steps.memory} holds no model of sizeClasses[{size.name}], from {billions(size.min_parameters)} "
                f"parameters ({least / 1e9:.3g} GB): a result of another's trainer is tried on its base model there"
            )
            yield finding("steps.memory", message)
            return


def _images(trainers: Trainers) -> Iterator[LintFinding]:
    for number, pattern in enumerate(trainers.images):
        field, (host, slash, _) = f"trainers.images[{number}]", pattern.partition("/")
        if not pattern.strip("*"):
            message = f"{pattern} allows every image of every registry: name the registry, as registry.example.com/*"
            yield finding(field, message)
        elif any(sign in (host if slash else host.partition(":")[0]) for sign in _WILD):
            message = f"{pattern} has a wildcard in the registry's name, where anybody can have one that matches it"
            yield finding(field, message)
        elif pattern != pattern.strip() or " " in pattern:
            yield finding(field, f"{pattern!r} matches nothing: no image reference has blanks in it")


def _repositories(trainers: Trainers, *, allow_http: bool) -> Iterator[LintFinding]:
    for number, prefix in enumerate(trainers.repositories):
        field, parts = f"trainers.repositories[{number}]", prefix.rstrip("/").split("/")[3:]
        if prefix.startswith("http://") and not allow_http:
            yield finding(field, f"{prefix} matches nothing: steps.network.allowHttp is false; write https://")
        elif any(part.startswith(".") for part in parts):
            yield finding(field, f"{prefix} matches nothing: no part of a repository's address may begin with a dot")
        elif not parts:
            message = f"{prefix} allows every repository of its host, whoever owns it: name an owner, as {prefix}"
            yield finding(field, f"{message.rstrip('/')}/team/")
