"""Changes that may turn an answer around. They are guesses: whether one does is for ``rerun`` to find out."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from taskoffer.api.base import rfc3339
from taskoffer.api.contract import CHAT_TEMPLATES, chat_template_of
from taskoffer.api.reasons import Reason
from taskoffer.api.tasks import DATASET_OF_TASK, TaskType
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec
from taskoffer.api.v1alpha1.model_and_data import Architecture
from taskoffer.api.v1alpha1.taskoffer import LONGEST_TIME_LIMIT, TaskOfferSpec
from taskoffer.decision.evaluate import Evaluation, refused
from taskoffer.decision.finish import duration_text
from taskoffer.decision.items import other_format
from taskoffer.decision.moments import later
from taskoffer.decision.outcomes import NOTHING, Learned
from taskoffer.decision.sizing import billions, family_of, parameters_of
from taskoffer.decision.step_needs import unserved

Patch = Mapping[str, Any]

MUTABLE = frozenset({"active", "expiresAt", "priorityClassName"})
"""Fields of a spec that may change; any other change takes a new offer."""
_ANY_CLAIM = "claim"
"""Stands for a PersistentVolumeClaim of the reader's own: which one it is decides nothing."""
_ANY_ADDRESS = "https://address.example/data"
"""Stands for an address of the reader's own, which decides nothing either."""
_FAMILIES_TOLD = 3
_HIGHEST_VALUE = 10**8 - 1
"""The most that spec.value can hold."""
_MARGIN_SECONDS = 60
"""How much later than just in time a deadline is proposed."""


@dataclass(frozen=True, slots=True)
class Change:
    """A change of an offer, in words and as a merge patch of its spec."""

    says: str
    patch: Patch = field(default_factory=dict)
    anew: bool = False
    """Whether it is a new offer even if nothing of the spec changes."""

    @property
    def replaces(self) -> bool:
        """Tell whether it takes a new offer, because fields change that never do."""
        return self.anew or not MUTABLE.issuperset(self.patch)

    def and_then(self, other: Change) -> Change:
        """Return both changes as one."""
        return Change(f"{self.says} and {other.says}", applied(self.patch, other.patch), self.anew or other.anew)


@dataclass(frozen=True, slots=True)
class Case:
    """An offer under a policy, as changes are looked for."""

    spec: TaskOfferSpec
    policy: CapacityPolicySpec
    namespace: str
    uid: str
    now: datetime
    evaluation: Evaluation
    learned: Learned = NOTHING

    @property
    def parameters(self) -> int | None:
        """The model's size, as far as it is known."""
        return parameters_of(self.spec.model, self.policy.filters.unknown_parameters)

    def refused(self, patch: Patch) -> frozenset[Reason]:
        """Return why the offer is refused once its spec is patched."""
        made = refused(patched(self.spec, patch), self.policy, self.namespace, self.learned)
        return frozenset(refusal.reason for refusal in made)

    def least(self, low: int, high: int, patch: Callable[[int], Patch], *gone: Reason) -> int | None:
        """Return the least number of low..high with which these reasons are gone; None if high has one."""
        numbers = range(low, high + 1)

        def passes(number: int) -> bool:
            return self.refused(patch(number)).isdisjoint(gone)

        if not numbers or not passes(high):
            return None
        return numbers[bisect_left(numbers, True, hi=len(numbers) - 1, key=passes)]

    def most(self, low: int, high: int, patch: Callable[[int], Patch], *gone: Reason) -> int | None:
        """Return the greatest number of low..high with which these reasons are gone; None if low has one."""
        numbers = range(low, high + 1)

        def fails(number: int) -> bool:
            return not self.refused(patch(number)).isdisjoint(gone)

        if not numbers or fails(low):
            return None
        return numbers[bisect_left(numbers, True, lo=1, key=fails) - 1]


def applied(base: Patch, patch: Patch) -> dict[str, Any]:
    """Lay a merge patch (RFC 7396) on another one, so that None still removes."""
    made = dict(base)
    for key, value in patch.items():
        before = made.get(key)
        made[key] = (
            applied(before if isinstance(before, Mapping) else {}, value) if isinstance(value, Mapping) else value
        )
    return made


def patched(spec: TaskOfferSpec, patch: Patch) -> TaskOfferSpec:
    """Return a spec with a merge patch applied.

    Raises:
        ValueError: when the result is no valid spec.
    """
    return TaskOfferSpec.model_validate(_present(applied(spec.to_wire(), patch)))


def _present(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _present(part) for key, part in value.items() if part is not None}
    return value


def changes_for(case: Case, reason: Reason) -> Iterator[Change]:
    """Yield what may remove a refusal or an obstacle for this reason, the likeliest first."""
    for propose in _PROPOSALS.get(reason, ()):
        yield from propose(case)


def _gpu_counts(case: Case) -> Iterator[Change]:
    # Where the policy chooses among several counts, each of them is a change of an offer that states none.
    own = case.spec.gpu_count if case.evaluation.options else case.evaluation.gpus
    for count in sorted(case.policy.resources[0].counts, key=lambda n: (abs(n - case.evaluation.gpus), n)):
        if count != own:
            yield Change(f"gpuCount {count}", {"gpuCount": count})


def _limit(seconds: int) -> Patch:
    return {"timeLimitSeconds": seconds}


def _shorter_limit(case: Case) -> Iterator[Change]:
    """Propose the longest time limit that the policy takes."""
    longest = case.policy.filters.max_time_limit_seconds
    if longest is not None and longest > 1:
        yield Change(f"timeLimitSeconds at most {longest - 1}", _limit(longest - 1))


def _longer_limit(case: Case) -> Iterator[Change]:
    """Propose the shortest time limit in which the task ends."""
    longest = case.policy.filters.max_time_limit_seconds
    bound = LONGEST_TIME_LIMIT if longest is None else min(LONGEST_TIME_LIMIT, longest - 1)
    found = case.least(case.spec.time_limit_seconds + 1, bound, _limit, Reason.CANNOT_FINISH_IN_TIME)
    if found is not None:
        yield Change(f"timeLimitSeconds of at least {found} ({duration_text(found)})", _limit(found))


def _limit_for_score(case: Case) -> Iterator[Change]:
    """Propose the time limits nearest to the offer's with which the score suffices."""
    asked, longest = case.spec.time_limit_seconds, case.policy.filters.max_time_limit_seconds
    bound = LONGEST_TIME_LIMIT if longest is None else min(LONGEST_TIME_LIMIT, longest - 1)
    least = case.least(1, asked, _limit, Reason.CANNOT_FINISH_IN_TIME) or 1
    shorter = case.most(least, asked - 1, _limit, Reason.SCORE_TOO_LOW)
    if shorter is not None:
        yield Change(f"timeLimitSeconds at most {shorter} ({duration_text(shorter)})", _limit(shorter))
    longer = case.least(asked + 1, bound, _limit, Reason.SCORE_TOO_LOW)
    if longer is not None:
        yield Change(f"timeLimitSeconds of at least {longer} ({duration_text(longer)})", _limit(longer))


def _model_of(parameters: int) -> Patch:
    return {"model": {"parameters": parameters}}


def _smaller_model(case: Case) -> Iterator[Change]:
    """Propose the largest smaller model that fits and ends in time, in three digits."""
    if case.parameters is None:
        return
    gone = Reason.INSUFFICIENT_MEMORY, Reason.INSUFFICIENT_STORAGE, Reason.CANNOT_FINISH_IN_TIME
    found = case.most(1, case.parameters - 1, _model_of, *gone)
    if found is not None:
        step = max(1, 10 ** (len(str(found)) - 3))
        size = found // step * step
        yield Change(f"a model of at most {billions(size)} parameters", _model_of(size))


def _sizes(case: Case) -> Iterator[Change]:
    """Propose for each size class its size nearest to the model's."""
    present, found = case.parameters, []
    for size in case.policy.size_classes:
        low, high = max(1, size.min_parameters), (size.max_parameters or 10**15) - 1
        nearest = low if present is None else min(max(present, low), high)
        if nearest != present:
            found.append((abs(nearest - (present or 0)), nearest, size.name))
    for _, nearest, name in sorted(found):
        yield Change(f"model.parameters {nearest} (size class {name})", _model_of(nearest))


def _families(case: Case) -> Iterator[Change]:
    """Propose models of the families with the highest success rates, of the same size."""
    own = family_of(case.spec.model.name, case.policy.families)
    others = sorted((f for f in case.policy.families if f != own), key=lambda f: (-float(f.success_rate), f.name))
    for family in others[:_FAMILIES_TOLD]:
        model: dict[str, Any] = {"name": family.patterns[0]}
        if case.parameters is not None:
            model["parameters"] = case.parameters
        yield Change(f"a model of the family {family.name} and the same size", {"model": model})


def _task_types(case: Case) -> Iterator[Change]:
    """Propose task types that are accepted; their data is of another type, so its columns are too."""
    accepted = [t.name for t in case.policy.task_types if t.accepted]
    before = DATASET_OF_TASK[case.spec.task_type].value.lower()
    for task in accepted:
        if task is case.spec.task_type or task is TaskType.GRPO:
            continue
        kind = DATASET_OF_TASK[task]
        dataset: dict[str, Any] = {"type": kind.value, before: None, kind.value.lower(): {}}
        architecture = Architecture.SDXL.value if task is TaskType.IMAGE else None
        if task is TaskType.IMAGE and case.spec.dataset.tokens is not None:
            dataset["tokens"] = None
        patch = {"taskType": task.value, "dataset": dataset, "model": {"architecture": architecture}}
        yield Change(f"taskType {task.value} and data of dataset.type {kind.value}", patch)


def _priorities(case: Case) -> Iterator[Change]:
    """Propose the priority classes above the offer's own, the next one first, and those instead of a refused one."""
    queue = case.policy.queue
    names = queue.priorities if queue is not None else ()
    asked = case.spec.priority_class_name
    known = asked is None or asked in names
    level = case.evaluation.priority.level if case.evaluation.priority is not None and known else -1
    refused = Reason.PRIORITY_NOT_ALLOWED in {refusal.reason for refusal in case.evaluation.refusals}
    for name in reversed(names) if refused else names[level + 1 :]:
        if name != asked:
            yield Change(f"priorityClassName {name}", {"priorityClassName": name})


def _fewer_rows(case: Case) -> Iterator[Change]:
    rows, tokens = case.spec.dataset.rows, case.spec.dataset.tokens
    if rows is None:
        return

    def left(count: int) -> dict[str, int]:
        # Rows that go take their tokens along, or those that stay would be longer.
        return {"rows": count} | ({"tokens": max(1, tokens * count // rows)} if tokens is not None else {})

    found = case.most(1, rows - 1, lambda n: {"dataset": left(n)}, Reason.CANNOT_FINISH_IN_TIME)
    if found is not None:
        kept = left(found)
        fields = " and ".join(f"{number} {name} (dataset.{name})" for name, number in kept.items())
        yield Change(f"at most {fields}", {"dataset": kept})


def _more_value(case: Case) -> Iterator[Change]:
    """Propose the least whole value with which the score suffices, where scores go by value."""
    if case.policy.scoring.expected_value is None:
        return
    found = case.least(0, _HIGHEST_VALUE, lambda n: {"value": str(n)}, Reason.SCORE_TOO_LOW)
    if found is not None:
        yield Change(f"a value of at least {found}", {"value": str(found)})


def _features(case: Case) -> Iterator[Change]:
    """Propose a spec without everything that is not served."""
    spec, says = case.spec, []
    missing = {name for name, _ in unserved(spec, case.policy.steps)}
    patch: dict[str, Any] = {}
    claim = {"persistentVolumeClaim": {"claimName": _ANY_CLAIM}}
    if spec.dataset.chat is not None and chat_template_of(spec.dataset.chat.chat_template) is None:
        patch["dataset"] = {"chat": {"chatTemplate": CHAT_TEMPLATES[0]}}
        says.append(f"dataset.chat.chatTemplate {CHAT_TEMPLATES[0]}")
    for field_name, change, words in (
        ("model.source", {"model": {"source": {"url": None, **claim}}}, "the model on a claim"),
        ("dataset.source", {"dataset": {"source": {"url": None, "hub": None, **claim}}}, "the data on a claim"),
        ("output", {"output": dict(claim)}, "an output claim"),
        ("output.repository", {"output": {"repository": None}}, "no output.repository"),
        ("output.url", {"output": {"url": None}}, "no output.url"),
    ):
        if field_name in missing:
            for name, part in change.items():
                patch[name] = {**patch.get(name, {}), **part}
            says.append(words)
    if other_format(spec) is not None:
        patch["dataset"] = {**patch.get("dataset", {}), "fileFormat": None}
        says.append("no dataset.fileFormat")
    if spec.model.yarn_factor is not None and spec.task_type is TaskType.IMAGE:
        patch["model"] = {**patch.get("model", {}), "yarnFactor": None}
        says.append("no model.yarnFactor")
    for field_name, given in (
        ("klCoefficient", spec.kl_coefficient),
        ("extraDatasets", spec.extra_datasets),
    ):
        if given:
            patch[field_name] = None
            says.append(f"no {field_name}")
    if spec.tracking is not None and spec.tracking.mode != "Disabled":
        patch["tracking"] = {"mode": "Disabled"}
        says.append("tracking.mode Disabled")
    if says:
        yield Change(", ".join(says), patch)


def _policys_trainer(_case: Case) -> Iterator[Change]:
    yield Change("no trainer", {"trainer": None})


def _later_end(case: Case) -> Iterator[Change]:
    """Propose to let the offer live for longer: a later deadline, no expiresAt, or a new one where its time is up."""
    spec, now = case.spec, case.now
    patch: dict[str, Any] = {}
    says = []
    if spec.expires_at is not None and spec.expires_at <= now:
        patch["expiresAt"] = None
        says.append("no expiresAt, or a later one")
    needs = later(now, case.evaluation.seconds)
    if spec.deadline is not None and spec.deadline <= needs:
        moment = later(needs.replace(microsecond=0), _MARGIN_SECONDS)
        patch["deadline"] = rfc3339(moment)
        says.append(f"a deadline of {rfc3339(moment)} or later")
    if says:
        yield Change(" and ".join(says), patch)
    if case.evaluation.ttl is not None:
        yield Change(" and ".join(["the offer created anew", *says]), patch, anew=True)


def _other_address(case: Case) -> Iterator[Change]:
    """Propose an address of the data that works as long as the offer may wait and a while longer."""
    if case.spec.source_ends is not None:
        until = rfc3339(later(case.now.replace(microsecond=0), case.spec.time_limit_seconds))
        patch = {"dataset": {"source": {"url": {"url": _ANY_ADDRESS, "expiresAt": until}}}}
        yield Change(f"a new address of the data that works until {until}", patch)


def _other_task(case: Case) -> Iterator[Change]:
    task = f"{case.spec.task_id[:100]}-{case.uid[:8]}"
    yield Change("a taskID of its own", {"taskID": task})


def _active(_case: Case) -> Iterator[Change]:
    yield Change("active true", {"active": True})


def _no_longer_than(case: Case) -> Iterator[Change]:
    """Propose half the time limit where nothing is predicted, so that it fits before somebody else's start."""
    if not case.evaluation.seconds and case.spec.time_limit_seconds > 1:
        half = case.spec.time_limit_seconds // 2
        yield Change(f"timeLimitSeconds {half}", _limit(half))


Proposal = Callable[[Case], Iterator[Change]]

_FULL: tuple[Proposal, ...] = (_gpu_counts, _priorities)
_PROPOSALS: dict[Reason, tuple[Proposal, ...]] = {
    Reason.TASK_TYPE_NOT_ACCEPTED: (_task_types,),
    Reason.FEATURE_NOT_SERVED: (_features,),
    Reason.MODEL_FAMILY_NOT_ACCEPTED: (_families,),
    Reason.PARAMETERS_UNKNOWN: (_sizes,),
    Reason.MODEL_SIZE_NOT_ACCEPTED: (_sizes,),
    Reason.TIME_LIMIT_TOO_LONG: (_shorter_limit,),
    Reason.SCORE_TOO_LOW: (_limit_for_score, _gpu_counts, _more_value, _families, _sizes),
    Reason.GPU_COUNT_NOT_ALLOWED: (_gpu_counts,),
    Reason.INSUFFICIENT_MEMORY: (_gpu_counts, _smaller_model),
    Reason.INSUFFICIENT_STORAGE: (_smaller_model,),
    Reason.CANNOT_FINISH_IN_TIME: (_gpu_counts, _longer_limit, _fewer_rows, _smaller_model, _later_end),
    Reason.PRIORITY_NOT_ALLOWED: (_priorities,),
    Reason.TRAINER_NOT_ALLOWED: (_policys_trainer,),
    Reason.NO_LANE: (_sizes, _task_types),
    Reason.CAPACITY_FULL: _FULL,
    Reason.DUPLICATE_TASK: (_other_task,),
    Reason.EXPIRED: (_later_end,),
    Reason.SOURCE_EXPIRES: (_other_address,),
    Reason.SUSPENDED: (_active,),
    Reason.WAITING_FOR_CAPACITY: _FULL,
    Reason.WAITING_FOR_LANE: _FULL,
    Reason.WAITING_FOR_JOB_SLOT: (_priorities,),
    Reason.WAITING_FOR_QUOTA: _FULL,
    Reason.WAITING_BEHIND_RESERVATION: (*_FULL, _no_longer_than),
    Reason.WAITING_FOR_EARLIER_END: (_gpu_counts,),
    Reason.WAITING_FOR_PREEMPTION: _FULL,
}
