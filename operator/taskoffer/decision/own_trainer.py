"""Trainers that offers bring along: whether the policy lets them, what a job is pinned to, when their time is over."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from fnmatch import fnmatchcase

from pydantic import ValidationError

from taskoffer.api.contract import FetchItem, FetchSource, GitFiles, HubFiles, ItemKind
from taskoffer.api.faults import what_is_wrong
from taskoffer.api.quantity import whole
from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec
from taskoffer.api.v1alpha1.steps import Steps
from taskoffer.api.v1alpha1.taskoffer import ClockMode, TaskOfferSpec
from taskoffer.api.v1alpha1.trainers import DEFAULT_ENTRYPOINT, OwnTrainer, TrainerRepository, Trainers
from taskoffer.api.v1alpha1.trainingjob import Attempt, Run
from taskoffer.decision.moments import later
from taskoffer.decision.trainer_arguments import LONGEST_ARGUMENT, described
from taskoffer.decision.verdict import Refusal, Remedy

_TOLD_PATTERNS = 4
_WITHOUT = Remedy("without spec.trainer", {"trainer": None})
_PLAIN = re.compile(
    r"(https?)://([A-Za-z0-9.-]+(?::[0-9]{1,5})?)((?:/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)*)/?", re.IGNORECASE
)
"""Addresses that mean the same to everybody: without a user, ``..``, escaped characters, empty parts or a query."""


def own_trainer(spec: TaskOfferSpec, policy: CapacityPolicySpec) -> OwnTrainer | None:
    """Return the trainer that an offer's job is pinned to, or None where it is the policy's.

    Raises:
        ValueError: when the policy, which may have changed since the admission, does not allow it.
    """
    asked, allowed = spec.trainer, policy.trainers
    if asked is None:
        return None
    problem = _not_allowed(spec, policy)
    if problem is not None:
        raise ValueError(problem.message)
    assert allowed is not None  # noqa: S101 - else there would be a problem.
    return OwnTrainer(
        image=asked.image or allowed.image or policy.pod_template.image,
        repository=asked.repository,
        ephemeral_storage=allowed.ephemeral_storage,
    )


def trainer_item(repository: TrainerRepository, steps: Steps) -> FetchItem:
    """Return how a repository is fetched: exactly the files of its commit.

    Raises:
        ValidationError: when the address is none that can be asked for.
    """
    run = repository.entrypoint or DEFAULT_ENTRYPOINT
    source = FetchSource(git=GitFiles(url=repository.url, commit=repository.commit, entrypoint=run))
    limit = whole(steps.item_size_limit) if steps.item_size_limit is not None else None
    return FetchItem(name="trainer", kind=ItemKind.TRAINER, source=source, size_limit=limit)


def check_trainer(spec: TaskOfferSpec, policy: CapacityPolicySpec) -> Iterator[Refusal]:
    """Say what stands against an offer's own trainer: what the policy does not allow, and what it cannot be told."""
    if spec.trainer is None:
        return
    problem = _not_allowed(spec, policy)
    if problem is not None:
        yield problem
    steps = policy.steps
    if steps is not None and spec.time_limit_seconds <= steps.submit_seconds:
        least = steps.submit_seconds + 1
        yield Refusal(
            Reason.CANNOT_FINISH_IN_TIME,
            f"timeLimitSeconds {spec.time_limit_seconds} leaves no time to train: the policy's steps.submitSeconds "
            f"keeps {steps.submit_seconds} for verifying and handing over",
            remedies=(Remedy(f"with timeLimitSeconds of at least {least}", {"time_limit_seconds": least}),),
        )
    for field, wrong, remedy in _untold(spec):
        message = f"spec.{field} is not served with a trainer of the offer's own: {wrong}; {remedy}"
        yield Refusal(Reason.FEATURE_NOT_SERVED, message, f"{remedy}, or remove spec.trainer")


def _not_allowed(spec: TaskOfferSpec, policy: CapacityPolicySpec) -> Refusal | None:
    asked, allowed = spec.trainer, policy.trainers
    assert asked is not None  # noqa: S101 - asked by the caller.
    if allowed is None:
        return _refusal("the policy lets no offer bring its own trainer")
    if asked.image is not None:
        if image_allowed(asked.image, allowed):
            return None
        return _refused(f"image {asked.image}", "images that match", allowed.images)
    assert asked.repository is not None  # noqa: S101 - the schema asks for one of the two.
    url = asked.repository.url
    if not repository_allowed(url, allowed):
        return _refused(f"repository {url}", "repositories below", allowed.repositories)
    if url.startswith("http://") and not (policy.steps is not None and policy.steps.network.allow_http):
        message = f"repository {url} is not fetched over http unless steps.network.allowHttp says so"
        return _refusal(message, "with an https address")
    return None


def _refused(what: str, which: str, allowed: Sequence[str]) -> Refusal:
    if not allowed:
        kind = what.partition(" ")[0]
        return _refusal(f"{what}: the policy allows none of this kind ({kind})")
    told = ", ".join(allowed[:_TOLD_PATTERNS])
    more = f" and {len(allowed) - _TOLD_PATTERNS} more" if len(allowed) > _TOLD_PATTERNS else ""
    return _refusal(
        f"{what} is not one that the policy allows, which are {which} {told}{more}",
        f"with one of the {which} {told}{more}",
    )


def _refusal(message: str, remedy: str | None = None) -> Refusal:
    remedies = (_WITHOUT,) if remedy is None else (Remedy(remedy), _WITHOUT)
    return Refusal(Reason.TRAINER_NOT_ALLOWED, f"spec.trainer: {message}", remedies=remedies)


def image_allowed(image: str, trainers: Trainers) -> bool:
    """Tell whether a policy allows an image, by the text of its reference."""
    return any(fnmatchcase(image, pattern) for pattern in trainers.images)


def repository_allowed(url: str, trainers: Trainers) -> bool:
    """Tell whether a policy allows a repository: its address is one of the listed ones, or lies below one.

    An address that a server could understand otherwise than it is compared here, with ``..`` or escaped characters in
    it, is never allowed.
    """
    given = _plain(url)
    listed = (_plain(prefix) for prefix in trainers.repositories)
    return given is not None and any(
        one is not None and (given in (one, f"{one}.git") or given.startswith(f"{one}/")) for one in listed
    )


def _plain(url: str) -> str | None:
    """Return an address as all would write it, without a slash at its end; None for one that is not plain."""
    found = _PLAIN.fullmatch(url)
    if found is None:
        return None
    scheme, host, path = found.groups()
    return f"{scheme.lower()}://{host.lower()}{path}"


def _untold(spec: TaskOfferSpec) -> Iterator[tuple[str, str, str]]:
    """Name each field that cannot be said in the market's arguments, with what is wrong and the remedy."""
    try:
        HubFiles(repository=spec.model.name)
    except ValidationError as error:
        yield "model.name", f"it {what_is_wrong(error.errors()[0])[0]}", "name the model as a hub does"
    rewards = spec.dataset.grpo.reward_functions if spec.dataset.grpo is not None else ()
    for number, reward in enumerate(rewards):
        if reward.source is None:
            field = f"dataset.grpo.rewardFunctions[{number}].builtin"
            yield field, "it is a reward of the policy's trainer", "give its source"
    for field, asked in (("minRows", spec.dataset.min_rows), ("samplePrompts", spec.dataset.sample_prompts)):
        if asked:
            yield f"dataset.{field}", "no argument of that contract says it", "remove it"
    told = len(described(spec.dataset).encode())
    if told > LONGEST_ARGUMENT:
        member = spec.dataset.type.value.lower()
        wrong = f"it takes {told} bytes as an argument, and Linux takes {LONGEST_ARGUMENT}"
        yield f"dataset.{member}", wrong, "make it shorter"


# The clock


def training_ends(run: Run, attempt: Attempt) -> datetime | None:
    """Return when an attempt of an offer's own trainer is stopped; None for ours, which knows its deadline.

    None as well while a Training clock has not started. What is left then is for verifying and handing over.
    """
    if run.trainer is None or attempt.deadline is None:
        return None
    return max(attempt.created_at, later(attempt.deadline, -submit_seconds(run)))


def training_seconds(run: Run, attempt: Attempt, now: datetime) -> int | None:
    """Return the seconds that an attempt has whose Job is made now.

    Kubernetes counts a Job's time from its creation, which can come long after the admission: what was fetched
    meanwhile, or who was asked to make room, is off the same clock. Our trainer has until its deadline, and None
    before a Training clock has started; one that an offer has brought has a time of its own even then.
    """
    if run.trainer is None:
        return None if attempt.deadline is None else max(1, int((attempt.deadline - now).total_seconds()))
    limit, ends = run.time_limit_seconds - submit_seconds(run), training_ends(run, attempt)
    left = limit if ends is None else min(limit, int((ends - now).total_seconds()))
    return max(1, left)


def starts_its_clock(run: Run, attempt: Attempt) -> bool:
    """Tell whether an attempt's time begins to run with its container."""
    return run.clock_mode is ClockMode.TRAINING and attempt.deadline is None


def submit_seconds(run: Run) -> int:
    """Return the seconds before a deadline that a policy keeps for handing a result over."""
    return run.steps.submit_seconds if run.steps is not None else 0
