"""Trainers that offers bring along: who may, what they are told, where they run, when their time is over."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from builders import Object, make_admission, make_training_job, merged, stored
from core_builders import NOW, ONE_GPU, TWO_GPUS, at, decide, offer, policy, policy_spec, spec_of
from taskoffer.api.base import rfc3339
from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.taskoffer import Admission, TaskOfferSpec
from taskoffer.api.v1alpha1.trainers import Trainers
from taskoffer.api.v1alpha1.trainingjob import TrainingJob
from taskoffer.decision.evaluate import Evaluation, evaluate
from taskoffer.decision.keys import OfferKey
from taskoffer.decision.lint import lint
from taskoffer.decision.outcomes import Estimate, Kind, Learned, outcome_of
from taskoffer.decision.own_trainer import image_allowed, repository_allowed
from taskoffer.render.trainingjob import training_job

COMMIT = "c0ffee" * 6 + "abcd"
URL = "https://git.example.com/team/trainer"
STEPS: Object = {
    "cache": {"claimName": "cache"},
    "workspace": {"claimName": "work", "path": "runs"},
    "itemSizeLimit": "10Gi",
    "submitSeconds": 600,
}
TRAINERS: Object = {
    "images": ["registry.example.com/trainers/*", "*@sha256:" + "ab" * 32],
    "repositories": ["https://git.example.com/team/"],
}
IMAGE: Object = {"image": "registry.example.com/trainers/mine:1"}
REPOSITORY: Object = {"repository": {"url": URL, "commit": COMMIT}}
ALLOWING: Object = {"steps": STEPS, "trainers": TRAINERS}


# Who may


@pytest.mark.parametrize(
    ("image", "allowed"),
    [
        ("registry.example.com/trainers/mine:1", True),
        ("registry.example.com/trainers/deep/down@sha256:" + "00" * 32, True),
        ("anywhere/at:all@sha256:" + "ab" * 32, True),
        ("registry.example.com/other/mine:1", False),
        ("registry.example.com.evil.test/trainers/mine:1", False),
        ("REGISTRY.example.com/trainers/mine:1", False),
    ],
)
def test_images_are_allowed_by_patterns(image: str, allowed: bool) -> None:
    assert image_allowed(image, Trainers.model_validate(TRAINERS)) is allowed


@pytest.mark.parametrize("prefix", ["https://git.example.com/team", "https://Git.example.com/team/"])
@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        (URL, True),
        (f"{URL}/", True),
        (f"{URL}.git", True),
        ("https://GIT.example.com/team/trainer", True),
        ("https://git.example.com/team", True),
        ("https://git.example.com/team.git", True),
        ("https://git.example.com/team-of-others/trainer", False),
        ("https://git.example.com/Team/trainer", False),
        ("http://git.example.com/team/trainer", False),
        ("https://git.example.com:8443/team/trainer", False),
        ("https://git.example.com.evil.test/team/trainer", False),
        ("https://git.example.com@evil.test/team/trainer", False),
        ("https://git.example.com/team/../others/trainer", False),
        ("https://git.example.com/team/%2e%2e/others/trainer", False),
        ("https://git.example.com/team/..\\others", False),
        ("https://git.example.com/team//trainer", False),
        ("https://git.example.com/team/trainer?ref=x", False),
        ("https://git.example.com/team/trainer#x", False),
    ],
)
def test_repositories_are_allowed_by_the_beginning_of_their_address(prefix: str, url: str, allowed: bool) -> None:
    assert repository_allowed(url, Trainers(repositories=(prefix,))) is allowed


def test_an_allowed_host_and_port_hold_for_all_below_them() -> None:
    trainers = Trainers(repositories=("http://10.0.0.1:8080",))
    assert repository_allowed("http://10.0.0.1:8080/any/thing", trainers)
    assert not repository_allowed("http://10.0.0.1:80/any/thing", trainers)


REFUSALS: dict[str, tuple[Object, Object, Reason, str, str]] = {
    "a policy that allows none": (
        {"trainer": IMAGE},
        {"steps": STEPS},
        Reason.TRAINER_NOT_ALLOWED,
        "spec.trainer: the policy lets no offer bring its own trainer",
        "accepted without spec.trainer",
    ),
    "an image that is not listed": (
        {"trainer": {"image": "evil.test/x:1"}},
        ALLOWING,
        Reason.TRAINER_NOT_ALLOWED,
        "image evil.test/x:1 is not one that the policy allows, which are images that match registry.example.com",
        "this filter passes with one of the images that match registry.example.com/trainers/*",
    ),
    "a repository that is not listed": (
        {"trainer": {"repository": {"url": "https://evil.test/x", "commit": COMMIT}}},
        ALLOWING,
        Reason.TRAINER_NOT_ALLOWED,
        "repository https://evil.test/x is not one that the policy allows",
        "this filter passes with one of the repositories below https://git.example.com/team/",
    ),
    "a repository where images are allowed": (
        {"trainer": REPOSITORY},
        {"steps": STEPS, "trainers": {"images": ["x/*"]}},
        Reason.TRAINER_NOT_ALLOWED,
        "the policy allows none of this kind (repository)",
        "accepted without spec.trainer",
    ),
    "a repository over http": (
        {"trainer": {"repository": {"url": "http://git.example.com/team/x", "commit": COMMIT}}},
        {"steps": STEPS, "trainers": {"repositories": ["http://git.example.com"]}},
        Reason.TRAINER_NOT_ALLOWED,
        "is not fetched over http unless steps.network.allowHttp says so",
        "this filter passes with an https address",
    ),
    "no time to train": (
        {"trainer": IMAGE, "timeLimitSeconds": 600},
        ALLOWING,
        Reason.CANNOT_FINISH_IN_TIME,
        "timeLimitSeconds 600 leaves no time to train: the policy's steps.submitSeconds keeps 600",
        "accepted with timeLimitSeconds of at least 601",
    ),
    "what no argument says": (
        {"trainer": IMAGE, "dataset": {"minRows": 100}},
        ALLOWING,
        Reason.FEATURE_NOT_SERVED,
        "spec.dataset.minRows is not served with a trainer of the offer's own: no argument of that contract says it",
        "remove it, or remove spec.trainer",
    ),
    "prompts that nobody would ask": (
        {"trainer": IMAGE, "dataset": {"samplePrompts": ["Hello?"]}},
        ALLOWING,
        Reason.FEATURE_NOT_SERVED,
        "spec.dataset.samplePrompts is not served with a trainer of the offer's own",
        "remove it, or remove spec.trainer",
    ),
    "a model whose name is no path": (
        {"trainer": IMAGE, "model": {"name": "x/../llama"}},
        ALLOWING,
        Reason.FEATURE_NOT_SERVED,
        "spec.model.name is not served with a trainer of the offer's own: it ",
        "name the model as a hub does, or remove spec.trainer",
    ),
}


def refused(spec: Object, fields: Object, **more: Any) -> dict[Reason, tuple[str, str]]:
    made = evaluate(spec_of(**{"parameters": ONE_GPU, "spec": spec, **more}), policy_spec(**fields))
    return {one.reason: (one.message, one.counterfactual) for one in made.refusals}


@pytest.mark.parametrize(("spec", "fields", "reason", "message", "remedy"), REFUSALS.values(), ids=REFUSALS)
def test_what_is_not_allowed_is_refused_with_what_is(
    spec: Object, fields: Object, reason: Reason, message: str, remedy: str
) -> None:
    found = refused(spec, fields)
    assert set(found) == {reason}
    assert message in found[reason][0]
    assert remedy in found[reason][1]


def rewards(*functions: Object) -> Object:
    return {"dataset": {"grpo": {"rewardFunctions": list(functions)}}}


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ([{"name": "l", "builtin": {"name": "LengthTarget", "words": 9}}], "rewardFunctions[0].builtin is not served"),
        (
            [{"name": f"r{n}", "source": "x = '\\'\n" + "é" * 16_000} for n in range(8)],
            "spec.dataset.grpo is not served with a trainer of the offer's own: it takes ",
        ),
    ],
    ids=["a reward that only our trainer has", "more than an argument holds"],
)
def test_rewards_that_cannot_be_handed_on_are_refused(functions: list[Object], message: str) -> None:
    found = refused(merged({"trainer": IMAGE}, rewards(*functions)), ALLOWING, task_type="GRPO")
    assert message in found[Reason.FEATURE_NOT_SERVED][0]
    assert not refused(rewards(*functions), ALLOWING, task_type="GRPO")


@pytest.mark.parametrize("trainer", [IMAGE, REPOSITORY], ids=["image", "repository"])
def test_what_the_policy_allows_is_admitted(trainer: Object) -> None:
    answer = decide(offer(spec={"trainer": trainer}), policies=[policy(**ALLOWING)]).answer
    assert answer.reason is Reason.ADMITTED


def test_the_how_to_can_be_copied() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "howto" / "bring-your-own-trainer.md"
    part, whole_offer, image = (
        yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```$", page.read_text(), flags=re.M | re.S)
    )
    copied = policy(spec=part["spec"])
    assert copied.spec is not None
    assert not [found for found in lint(copied.spec) if found.field.startswith(("trainers", "steps"))]
    for trainer in (whole_offer["spec"]["trainer"], image["trainer"]):
        spec = {**whole_offer["spec"], "trainer": trainer}
        answer = decide(replace(offer(), spec=TaskOfferSpec.model_validate(spec)), policies=[copied]).answer
        assert answer.reason is Reason.ADMITTED, answer.message


# What is predicted: nothing

PREDICTING: Object = {
    **ALLOWING,
    "estimation": {"gpuMemory": "1G", "duration": {"startSeconds": 60, "reserveSeconds": 0}},
    "learning": {"priorStrength": "5"},
}


def evaluated(spec: Object, fields: Object, learned: Learned | None = None, **more: Any) -> Evaluation:
    made = spec_of(**{"parameters": TWO_GPUS, "spec": spec, **more})
    return evaluate(made, policy_spec(**fields), "", learned or Learned())


@pytest.mark.parametrize("choice", [None, "FewestGpuHours", "EarliestEnd"])
def test_nothing_is_predicted_of_another_trainer_and_the_size_table_says_its_gpus(choice: str | None) -> None:
    fields = {**PREDICTING, "gpuChoice": choice} if choice else PREDICTING
    large: Object = {"parameters": 400_000_000_000, "rows": 10**9}
    assert Reason.INSUFFICIENT_MEMORY in {one.reason for one in evaluated({}, fields, **large).refusals}
    found = evaluated({"trainer": IMAGE}, fields, **large)
    assert (found.refusals, found.prediction, found.options, found.seconds) == ((), None, (), 0.0)
    assert found.gpus == evaluated({}, ALLOWING, **large).gpus
    # Its GPUs are held for as long as it may take.
    assert found.occupies == 3600
    (told,) = found.estimates
    assert (told.type, told.name) == ("Estimate", "OwnTrainer")
    assert told.message == "not estimated: the offer brings its own trainer"


def test_its_status_says_that_nothing_was_estimated() -> None:
    answer = decide(offer(spec={"trainer": IMAGE}), policies=[policy(**PREDICTING)]).answer
    assert [item.name for item in answer.explanation if item.type == "Estimate"] == ["OwnTrainer"]


def test_outcomes_of_others_say_nothing_of_it() -> None:
    ours = evaluated({}, ALLOWING)
    assert ours.score is not None
    (kind,) = {Kind(ours_spec().task_type, "Llama", ours.size_class, ours.gpus)}
    failing = Learned(estimates={kind: Estimate(judged=50)})
    with_learning: Object = {**ALLOWING, "learning": {"priorStrength": "5"}}
    learned, plain = evaluated({}, with_learning, failing), evaluated({"trainer": IMAGE}, with_learning, failing)
    assert learned.score is not None
    assert plain.score is not None
    assert learned.score.total < ours.score.total == plain.score.total
    assert (learned.group is None, plain.group) == (False, None)


def ours_spec() -> TaskOfferSpec:
    return spec_of(parameters=TWO_GPUS)


def test_under_expected_values_it_has_no_score_and_comes_last() -> None:
    scoring = {"scoring": {"terms": None, "expectedValue": {"penalty": "1"}}}
    found = evaluated({"trainer": IMAGE}, {**PREDICTING, **scoring, "gpuChoice": "MostValue"})
    assert (found.refusals, found.score, found.rank) == ((), None, 0)
    assert found.gpus == 2


# The job


def made_from(spec: Object, fields: Object, **more: Any) -> TrainingJob:
    admission = Admission.model_validate(make_admission(gpus=2, deadline=rfc3339(at(3600))))
    made = training_job(
        OfferKey("default", "offer"),
        "0123abcd-0000-4000-8000-000000000000",
        spec_of(**{"parameters": TWO_GPUS, "spec": spec, **more}),
        admission,
        policy_spec(**fields),
    )
    return TrainingJob.model_validate(stored(made, uid="tj-uid"))


def test_the_job_is_pinned_to_the_trainer_and_not_to_a_recipe_of_ours() -> None:
    # Of these settings our own trainer would be given less, for its pod has one core.
    class_of_all = {"name": "All", "minParameters": 0, "gpus": 2, "sizeEfficiency": "1", "lora": {}}
    greedy = {
        "sizeClasses": [{**class_of_all, "train": {"dataloaderNumWorkers": 8}}],
        "podTemplate": {"cpuPerGpu": "1"},
    }
    fields = merged(PREDICTING, {**greedy, "estimation": {"gpuMemory": "80G"}})
    assert made_from({}, fields).spec.run.clamps
    run = made_from({"trainer": IMAGE}, fields).spec.run
    assert run.trainer is not None
    assert (run.trainer.image, run.trainer.repository) == (IMAGE["image"], None)
    assert (run.predicted, run.clamps) == (None, ())
    assert run.effective == run.requested


def test_what_the_policy_does_not_allow_any_more_becomes_no_job() -> None:
    """Between decision and start the policy may change; where something has come of the admission, it stands."""
    with pytest.raises(ValueError, match="the policy lets no offer bring its own trainer"):
        made_from({"trainer": IMAGE}, {"steps": STEPS})


@pytest.mark.parametrize(("chosen", "image"), [(None, "taskoffer/trainer:lab"), ("python:3.13", "python:3.13")])
def test_a_repository_runs_in_the_image_that_the_policy_chooses(chosen: str | None, image: str) -> None:
    fields = merged(ALLOWING, {"trainers": {"image": chosen, "ephemeralStorage": "50Gi"}} if chosen else {})
    fields = merged(fields, {"podTemplate": {"image": "taskoffer/trainer:lab"}})
    trainer = made_from({"trainer": REPOSITORY}, fields).spec.run.trainer
    assert trainer is not None
    assert trainer.image == image
    assert trainer.ephemeral_storage == ("50Gi" if chosen else None)


def test_what_it_comes_to_teaches_nothing() -> None:
    complete = {"type": "Complete", "status": "True", "reason": "Succeeded", "lastTransitionTime": rfc3339(NOW)}
    run: Object = {"sizeClass": "Small", "family": "Llama"}
    ours = TrainingJob.model_validate(
        stored(make_training_job(spec={"run": run}, status={"conditions": [complete]}), uid="u")
    )
    theirs = TrainingJob.model_validate(
        stored(make_training_job(spec={"run": {**run, "trainer": IMAGE}}, status={"conditions": [complete]}), uid="u")
    )
    assert outcome_of(ours) is not None
    assert outcome_of(theirs) is None
