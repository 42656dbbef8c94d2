"""What is odd about the trainers that a policy lets offers bring: whoever runs them, and nobody who could."""

from __future__ import annotations

from collections.abc import Iterator

from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec, LintFinding
from taskoffer.api.v1alpha1.trainers import Trainers
from taskoffer.decision.lint_profiles import finding

_WILD = "*?["


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
