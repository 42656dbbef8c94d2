"""What an offer and its policy say of hubs, addresses and buckets, as the steps are told it."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from builders import Object, merged
from core_builders import at, decide, offer, policy
from stated_answers import ROOT
from step_jobs import FETCHED, STEPS, job
from taskoffer.api.contract import BucketFiles, PrepareConfig, SubmitConfig
from taskoffer.api.reasons import Reason
from taskoffer.api.tasks import FileFormat
from taskoffer.api.v1alpha1.model_and_data import Dataset
from taskoffer.api.v1alpha1.steps import Steps
from taskoffer.api.v1alpha1.trainingjob import StepName
from taskoffer.decision.items import data_item, told_format
from taskoffer.decision.job_facts import EnsureStep
from taskoffer.render.steps import step_config_map

STORE: Object = {"s3Endpoint": "https://minio.storage.svc:9000", "s3Region": "eu-central-1"}
SHA256 = "0123456789abcdef" * 4


def told_to(name: StepName, run: Object, steps: Object) -> str:
    made = job({**run, "steps": merged(STEPS, steps)})
    return str(*step_config_map(made, EnsureStep(name, 600, at(3600), at(7200)))["data"].values())


IN_BUCKETS: Object = {
    "model": {"source": {"persistentVolumeClaim": None, "url": "s3://models/llama/"}},
    "dataset": {"source": {"persistentVolumeClaim": None, "url": {"url": "s3://rows/a.jsonl", "sha256": SHA256}}},
    "output": {"persistentVolumeClaim": None, "url": "s3://results/one/"},
}


@pytest.mark.parametrize(
    ("steps", "endpoint", "region"),
    [({}, None, "us-east-1"), ({"s3Region": "eu-central-1"}, None, "eu-central-1"), (STORE, *STORE.values())],
    ids=["AWS", "another region", "another store"],
)
def test_buckets_are_asked_where_the_policy_says(steps: Object, endpoint: str | None, region: str) -> None:
    prepare = PrepareConfig.model_validate_json(told_to(StepName.PREPARE, IN_BUCKETS, steps))
    submit = SubmitConfig.model_validate_json(told_to(StepName.SUBMIT, IN_BUCKETS, steps))
    assert submit.target is not None
    found = [*(item.source.s3 for item in prepare.items), submit.target.s3]
    urls = ("s3://models/llama/", "s3://rows/a.jsonl", "s3://results/one/")
    assert found == [BucketFiles(url=url, endpoint=endpoint, region=region) for url in urls]
    assert [item.sha256 for item in prepare.items] == [None, SHA256]


@pytest.mark.parametrize("url", ["https://data.test/rows.jsonl?sig=1", "s3://rows/a.jsonl"])
def test_a_file_behind_an_address_is_held_against_the_sum_that_the_offer_gives(url: str) -> None:
    data: Object = {"dataset": {"source": {"persistentVolumeClaim": None, "url": {"url": url, "sha256": SHA256}}}}
    (item,) = PrepareConfig.model_validate_json(told_to(StepName.PREPARE, data, {})).items
    assert item.sha256 == SHA256


def test_a_sum_of_many_files_is_refused_before_the_task_holds_a_gpu() -> None:
    source: Object = {"persistentVolumeClaim": None, "url": {"url": "s3://rows/all/", "sha256": SHA256}}
    answer = decide(offer(spec={"dataset": {"source": source}}), policies=[policy(steps=STEPS)]).answer
    assert answer.reason is Reason.FEATURE_NOT_SERVED
    assert "sha256: a prefix is many files; name one object or leave it out" in answer.message


def test_a_subset_of_a_data_set_is_asked_for_by_its_name() -> None:
    run = merged(FETCHED, {"dataset": {"source": {"hub": {"configName": "small"}}}})
    hub = PrepareConfig.model_validate_json(told_to(StepName.PREPARE, run, {})).items[1].source.hub
    assert hub is not None
    assert (hub.config_name, hub.split) == ("small", "train")


FORMATS: list[tuple[Object, FileFormat | None, FileFormat]] = [
    ({"source": {"hub": {"name": "acme/rows"}}}, None, FileFormat.PARQUET),
    ({"source": {"hub": {"name": "acme/rows"}}, "fileFormat": "csv"}, FileFormat.CSV, FileFormat.CSV),
    ({"source": {"hub": {"name": "acme/rows"}}, "fileFormat": "hf"}, None, FileFormat.HF),
    ({"source": {"url": {"url": "https://data.test/rows"}}}, FileFormat.JSONL, FileFormat.JSONL),
    ({"source": {"url": {"url": "s3://rows/set/"}}, "fileFormat": "hf"}, FileFormat.HF, FileFormat.HF),
    ({"type": "Image", "instruct": None, "image": {}, "source": {"hub": {"name": "acme/pictures"}}},
     FileFormat.ZIP, FileFormat.ZIP),
]  # fmt: skip


@pytest.mark.parametrize(("said", "ours", "foreign"), FORMATS, ids=[str(case[1:]) for case in FORMATS])
def test_a_format_that_nobody_has_told_is_looked_for_on_a_hub_alone(
    said: Object, ours: FileFormat | None, foreign: FileFormat
) -> None:
    columns: Object = {"type": "Instruct", "instruct": {"fieldInstruction": "a"}}
    wire = {key: value for key, value in {**columns, **said}.items() if value is not None}
    dataset = Dataset.model_validate(wire)
    steps = Steps.model_validate(STEPS)
    assert data_item(dataset, steps).file_format is ours
    assert data_item(dataset, steps, told_format(dataset)).file_format is foreign


FOLDERS: list[Object] = [{"hub": {"name": "acme/rows"}}, {"url": {"url": "s3://rows/set/"}}]


@pytest.mark.parametrize(("source"), FOLDERS, ids=["hub", "prefix"])
def test_a_data_sets_folder_is_taken_from_where_there_are_folders(source: Object) -> None:
    spec: Object = {"dataset": {"source": {"persistentVolumeClaim": None, **source}, "fileFormat": "hf"}}
    assert decide(offer(spec=spec), policies=[policy(steps=STEPS)]).answer.reason is Reason.ADMITTED


def test_a_data_sets_folder_behind_the_address_of_one_file_is_refused_with_the_formats_of_files() -> None:
    source: Object = {"persistentVolumeClaim": None, "url": {"url": "s3://rows/set"}}
    answer = decide(
        offer(spec={"dataset": {"source": source, "fileFormat": "hf"}}), policies=[policy(steps=STEPS)]
    ).answer
    assert answer.reason is Reason.FEATURE_NOT_SERVED
    assert "set it to one of json, jsonl, csv, parquet, as the file is: hf is a folder" in answer.message
    assert "s3://bucket/folder/" in answer.message


def test_the_example_of_the_guide_names_files_that_are_there() -> None:
    from taskoffer_trainer.fetch_hub import choose_split

    text = (ROOT / "docs/howto/fetch-and-hand-over.md").read_text(encoding="utf-8")
    (example,) = [block for block in text.split("```yaml\n") if block.startswith("spec:\n  model:")]
    spec: Any = yaml.safe_load(example.partition("```")[0])["spec"]
    dataset = Dataset.model_validate(spec["dataset"])
    item = data_item(dataset, Steps.model_validate(STEPS))
    assert item.source.hub is not None
    assert item.source.hub.repository == "yahma/alpaca-cleaned"
    # All that this repository holds.
    there = [".gitattributes", "README.md", "alpaca_data_cleaned.json"]
    assert choose_split(there, item.source.hub, item.file_format, {}) == (["alpaca_data_cleaned.json"], "json")
