"""What is wrong with a manifest is told in lines of field, fault and remedy, without a word of pydantic's."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from builders import make_offer, make_policy
from taskoffer.api.faults import faults_of, path_of, what_is_wrong
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec
from taskoffer.api.v1alpha1.taskoffer import TaskOfferSpec
from taskoffer.cli.main import main
from taskoffer.reconcile.views import offer_entry, policy_view

Spec = dict[str, Any]
PYDANTICS = re.compile(
    r"Input should|input_value|type=|pydantic|Field required|Extra inputs|Value error|Tuple|valid dict"
)


def policy(*path: str | int, value: Any) -> Spec:
    """Return a policy's spec with one field changed."""
    spec: Spec = make_policy()["spec"]
    place: Any = spec
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    return spec


def told(model: type[CapacityPolicySpec] | type[TaskOfferSpec], spec: object, **how: Any) -> list[str]:
    with pytest.raises(ValidationError) as error:
        model.model_validate(spec)
    return faults_of(error.value, model, values=True, **how)


POLICIES: list[tuple[Spec, str]] = [
    (policy("filtres", value={}), "filtres: there is no such field: did you mean filters?"),
    (
        policy("podTemplate", "memory", value="5G"),
        "podTemplate.memory: there is no such field: did you mean memoryPerGpu?",
    ),
    (policy("zzz", value=1), "zzz: there is no such field: remove it or correct its name"),
    (policy(7, value=1), "[7]: is no name of a field: put it into quotes or remove it (given: 7)"),
    (policy("filters", value=None), "filters: must hold fields: write 'name: value' lines below it (given: nothing)"),
    (policy("filters", value=["x"]), "filters: must hold fields: write 'name: value' lines below it (given: a list)"),
    (
        policy("nodeSelector", "matchLabels", value=1),
        "nodeSelector.matchLabels: must hold fields: write 'name: value' lines below it (given: 1)",
    ),
    (policy("resources", value={}), "resources: must be a list: begin each item with '- ' (given: fields)"),
    (policy("resources", value=[]), "resources: has 0 items: give at least 1"),
    (policy("resources", value=make_policy()["spec"]["resources"] * 2), "resources: has 2 items: give at most 1"),
    (policy("resources", 0, "counts", value=[3]), "resources[0].counts[0]: must be one of 1, 2, 4, 8, got 3"),
    (
        policy("resources", 0, "name", value=""),
        "resources[0].name: is too short: give at least 1 character (given: '')",
    ),
    (
        policy("resources", 0, "name", value="a" * 300),
        f"resources[0].name: is too long: give at most 253 characters (given: '{'a' * 38}…)",
    ),
    (policy("filters", "minScore", value=0.5), "filters.minScore: must be a text: put it into quotes (given: 0.5)"),
    (policy("filters", "minScore", value=True), "filters.minScore: must be a text: put it into quotes (given: true)"),
    (
        policy("filters", "minScore", value="half"),
        "filters.minScore: must be a decimal number in a string, with at most 8 digits before and 6 after the point: "
        "write for example '0.35' (given: 'half')",
    ),
    (
        policy("filters", "onFull", value="Maybe"),
        "filters.onFull: must be 'Wait' or 'Reject': choose one (given: 'Maybe')",
    ),
    (
        policy("filters", "maxConcurrentJobs", value=0),
        "filters.maxConcurrentJobs: must be at least 1: raise it (given: 0)",
    ),
    (
        policy("filters", "maxConcurrentJobs", value=10**6),
        "filters.maxConcurrentJobs: must be at most 100000: lower it (given: 1000000)",
    ),
    (
        policy("filters", "maxConcurrentJobs", value="5 jobs"),
        "filters.maxConcurrentJobs: must be a whole number: write only its digits (given: '5 jobs')",
    ),
    (
        policy("filters", "maxConcurrentJobs", value=1.5),
        "filters.maxConcurrentJobs: must be a whole number: write only its digits (given: 1.5)",
    ),
    (
        policy("taskTypes", 0, "accepted", value="yess"),
        "taskTypes[0].accepted: must be true or false: write one of them (given: 'yess')",
    ),
    (
        policy("sizeClasses", 0, "train", value={"learningRate": "fast"}),
        "sizeClasses[0].train.learningRate: must be a number: write it without quotes or a unit (given: 'fast')",
    ),
    (
        policy("sizeClasses", 0, "lora", value={"loraDropout": 1}),
        "sizeClasses[0].lora.loraDropout: must be below 1: lower it (given: 1)",
    ),
    (
        policy("sizeClasses", 0, "train", value={"saveSteps": 7, "evalSteps": 2}),
        "sizeClasses[0].train.saveSteps (7) must be a multiple of evalSteps (2), because the best checkpoint is chosen "
        "by its evaluation",
    ),
    (
        policy("gpuChoice", value="MostValue"),
        "gpuChoice MostValue needs scoring.expectedValue: set it or choose FewestGpuHours",
    ),
]
"""Specs with one fault each, and the one line that is said of it."""


@pytest.mark.parametrize(("spec", "line"), POLICIES, ids=[line[:50] for _, line in POLICIES])
def test_each_fault_of_a_policy_is_one_line_of_field_fault_and_remedy(spec: Spec, line: str) -> None:
    assert told(CapacityPolicySpec, spec) == [line]
    assert told(CapacityPolicySpec, spec, prefix=("spec",)) == [
        path_of(["spec"]) + ("" if line[0] == "[" else ".") + line
    ]
    assert not PYDANTICS.search(line)


OFFERS: list[tuple[Callable[[Spec], Any], str]] = [
    (lambda spec: spec.update(gpuCuont=1), "gpuCuont: there is no such field: did you mean gpuCount?"),
    (lambda spec: spec.pop("taskID"), "taskID: is missing: set it"),
    (
        lambda spec: spec.update(taskID="a b"),
        "taskID: must begin with a letter or digit and hold only letters, digits, '.', '_', ':' and '-': remove the "
        "rest (given: 'a b')",
    ),
    (
        lambda spec: spec.update(deadline="soon"),
        "deadline: must be a moment with its time zone: write for example 2026-01-31T12:00:00Z (given: 'soon')",
    ),
    (
        lambda spec: spec.update(deadline="2026-01-01T00:00:00"),
        "deadline: needs a time zone, for example 2026-01-31T12:00:00Z",
    ),
    (
        lambda spec: spec.update(timeLimitSeconds=0),
        "timeLimitSeconds must be at least 1, got 0: give the time limit in seconds",
    ),
    (
        lambda spec: spec["dataset"].update(type="Chat"),
        "dataset.type Chat goes with chat, and there is instruct: set chat alone, or change type",
    ),
    (
        lambda spec: spec.update(taskType="Chat"),
        "dataset.type Instruct does not fit taskType Chat: set Chat together with its columns, or change taskType",
    ),
    (
        lambda spec: spec["model"].update(source={"persistentVolumeClaim": {"claimName": "c", "path": "/x"}}),
        "model.source.persistentVolumeClaim.path: is relative to the volume's root: remove the leading '/' "
        "(given: '/x')",
    ),
]


@pytest.mark.parametrize(("change", "line"), OFFERS, ids=[line[:50] for _, line in OFFERS])
def test_each_fault_of_an_offer_is_one_line_in_a_trace_and_in_its_condition(
    change: Callable[[Spec], Any], line: str
) -> None:
    made = make_offer()
    change(made["spec"])
    assert told(TaskOfferSpec, made["spec"], prefix=("offer", "spec")) == [f"offer.spec.{line}"]
    # Others may read a status, so it does not repeat what may be a secret.
    assert offer_entry(stored(made)).read_view().invalid == re.sub(r" \(given: .*\)$", "", line)


def stored(manifest: Any) -> Any:
    metadata = {"uid": "u", "resourceVersion": "1", "generation": 1, "creationTimestamp": "2026-01-31T12:00:00Z"}
    return {**manifest, "metadata": {**metadata, **manifest["metadata"]}}


def test_what_a_status_says_of_an_invalid_policy_names_three_faults_and_counts_the_rest() -> None:
    broken = stored(make_policy())
    for field in ("resources", "filters", "scoring", "taskTypes", "sizeClasses"):
        del broken["spec"][field]
    assert policy_view(broken).problem == (
        "resources: is missing: set it; filters: is missing: set it; scoring: is missing: set it; and 2 more"
    )


def test_names_of_any_length_and_number_leave_a_message_short() -> None:
    spec = {"x" * 5000 + str(number): 1 for number in range(1000)}
    problem = policy_view(stored({**make_policy(), "spec": spec})).problem
    assert problem.endswith("; and 1004 more")
    assert len(problem) < 2000


def test_a_fault_that_has_no_words_of_its_own_keeps_the_librarys() -> None:
    with pytest.raises(ValidationError) as error:
        TypeAdapter(bytes).validate_python(7)
    assert what_is_wrong(error.value.errors()[0]) == ("input should be a valid bytes", "correct it")


# Files


def written(folder: Path, content: bytes | str) -> Path:
    path = folder / "policy.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


MANIFEST = yaml.safe_dump(make_policy())
COMMANDS = {
    "lint": lambda path: ["lint", str(path)],
    "simulate": lambda path: ["simulate", "--policy", str(path), "--seeds", "1", "--count", "1"],
}
ONE = "one begins with apiVersion: taskoffer.dev/v1alpha1 and kind: CapacityPolicy"
ODD_FILES: dict[str, tuple[bytes | str, str]] = {
    "nothing": ("", f"is empty and holds no CapacityPolicy: {ONE}"),
    "an empty document": ("---\n", f"is empty and holds no CapacityPolicy: {ONE}"),
    "a comment": ("# later\n", f"is empty and holds no CapacityPolicy: {ONE}"),
    "a list": ("- a\n- b\n", f"holds a list and no CapacityPolicy: {ONE}, without a '-' before it"),
    "a text": ("just text", f"holds no CapacityPolicy, only the text 'just text': {ONE}"),
    "another kind": ("kind: Pod\n", f"holds no CapacityPolicy but the kind 'Pod': {ONE}"),
    "no kind": ("spec: {}\n", f"holds no CapacityPolicy but an object without kind: {ONE}"),
    "two documents": (f"{MANIFEST}---\n{MANIFEST}", "holds 2 YAML documents: keep one CapacityPolicy in it"),
    "no YAML": ("a: [1", "cannot be read as YAML at line 1, column 6: expected ',' or ']'"),
    "a tab": ("a:\n\tb: 1\n", "cannot be read as YAML at line 2, column 1: found character '\\t'"),
    "no text": (b"kind: \xff", "cannot be read: byte 6 is no text in UTF-8"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("content", "words"), ODD_FILES.values(), ids=ODD_FILES)
def test_a_file_that_holds_no_policy_is_told_in_clear_words_by_every_command(
    content: bytes | str, words: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, content)
    assert main(COMMANDS[command](path)) == 2
    assert capsys.readouterr().err.startswith(f"taskoffer: {path} {words}")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_fault_of_an_invalid_file_is_a_line_of_its_own(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, yaml.safe_dump({"kind": "CapacityPolicy", "spec": policy("filters", value={"onFull": 1})}))
    assert main(COMMANDS[command](path)) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"taskoffer: {path} is not a valid CapacityPolicy:",
        "  apiVersion: is missing: write taskoffer.dev/v1alpha1",
        "  metadata.name: is missing: set it",
        "  spec.filters.onFull: must be 'Wait' or 'Reject': choose one (given: 1)",
    ]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"apiVersion": "v1"}, "apiVersion: is 'v1': write taskoffer.dev/v1alpha1"),
        ({"metadata": {"name": "My Policy"}}, "metadata.name: 'My Policy' is no name: use lower-case letters"),
        ({"metadata": ["x"]}, "metadata.name: is missing: set it"),
        ({"spec": None}, "spec: must hold fields: write 'name: value' lines below it (given: nothing)"),
    ],
)
def test_what_is_wrong_around_the_fields_is_told_as_well(
    change: dict[str, Any], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lint", str(written(tmp_path, yaml.safe_dump(make_policy() | change)))]) == 1
    _, said = capsys.readouterr().err.splitlines()
    assert said.startswith(f"  {line}")


def test_a_policy_without_spec_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = make_policy()
    del manifest["spec"]
    assert main(["lint", str(written(tmp_path, yaml.safe_dump(manifest)))]) == 1
    assert "  spec: is missing: set it, or begin with a preset" in capsys.readouterr().err


READABLE = {
    "a byte order mark": b"\xef\xbb\xbf" + MANIFEST.encode(),
    "UTF-16": MANIFEST.encode("utf-16"),
    "Windows line ends": MANIFEST.replace("\n", "\r\n").encode(),
    "an empty document after it": f"---\n{MANIFEST}---\n".encode(),
    "JSON": json.dumps(make_policy()).encode(),
}


@pytest.mark.parametrize("content", READABLE.values(), ids=READABLE)
def test_a_policy_is_read_however_an_editor_writes_it(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lint", str(written(tmp_path, content))]) == 0
    assert "1 finding(s)" in capsys.readouterr().out


def test_a_trace_with_a_byte_order_mark_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.jsonl"
    assert main(["trace", "--count", "3", "-o", str(path)]) == 0
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert main(["simulate", "--policy", "lab", "--offers", str(path)]) == 0
    assert "offers" in capsys.readouterr().out


def test_every_fault_of_an_offer_in_a_trace_is_a_line_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.jsonl"
    offer = make_offer(rows=1)
    offer["spec"] |= {"taskID": "a b", "gpuCuont": 1}
    path.write_text('{"trace": {}}\n' + json.dumps({"at": 1, "offer": offer}) + "\n", encoding="utf-8")
    assert main(["simulate", "--policy", "lab", "--offers", str(path)]) == 2
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == f"taskoffer: {path}, line 2:"
    assert [line.split(":")[0] for line in lines] == ["  offer.spec.taskID", "  offer.spec.gpuCuont"]


def test_a_preset_with_an_image_that_is_none_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preset", "lab", "--image", ""]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "spec.podTemplate.image: is too short: give at least 1 character" in told.err
