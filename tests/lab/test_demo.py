"""The demo without a cluster: its examples, what it shows, what makes it fail, and its processes."""

import hashlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors import safe_open

from taskoffer import presets
from taskoffer.api.tasks import Architecture, TaskType
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec
from taskoffer.api.v1alpha1.taskoffer import TaskOfferSpec
from taskoffer.decision.evaluate import evaluate
from taskoffer.decision.sizing import parameters_of
from taskoffer_lab.api_client import ApiError
from taskoffer_lab.demo import crew as crew_module
from taskoffer_lab.demo.checks import Adapter, adapters_of, check_answers, check_files, check_losses
from taskoffer_lab.demo.crew import Crew
from taskoffer_lab.demo.deployment import operator_manifest, policy_of
from taskoffer_lab.demo.exam import EXAMS
from taskoffer_lab.demo.examination import EXAM_FIGURES, FIGURES, check_exam, check_figures
from taskoffer_lab.demo.follow import Seen, follow
from taskoffer_lab.demo.interrupts import every_end_as_interrupt, undisturbed
from taskoffer_lab.demo.material import KEPT_RUNS, Material, build_material, new_outputs
from taskoffer_lab.demo.rows import Row, rows_of
from taskoffer_lab.demo.screen import Screen, offers_table
from taskoffer_lab.demo.script import ALL_TYPES, EXAM_ROWS, EXPECTED, MODELS, Example, load_examples
from taskoffer_lab.errors import LabError
from taskoffer_lab.fixtures import KINDS, SHAPES_FILE, SHAPES_NAME, pipeline_folder
from taskoffer_lab.process_table import start_time, wait_until

LAB_POLICY = CapacityPolicySpec.model_validate(presets.load("lab")["spec"])
EXAMPLES = {example.name: example for example in load_examples()}
TYPES = {example.name: example for example in load_examples(script=ALL_TYPES)}


# The examples


@pytest.mark.parametrize("name", EXPECTED)
def test_the_lab_policy_answers_each_example_as_the_demo_expects(name: str) -> None:
    expected = EXPECTED[name]
    found = evaluate(TaskOfferSpec.model_validate(EXAMPLES[name].manifest["spec"]), LAB_POLICY)
    assert [refusal.reason.value for refusal in found.refusals] == ([expected.refusal] if expected.refusal else [])
    if expected.gpus is not None:
        assert found.gpus == expected.gpus


def test_the_offers_of_all_types_are_one_of_each_type_and_architecture_and_admitted_on_one_gpu() -> None:
    policy = CapacityPolicySpec.model_validate(policy_of(ALL_TYPES, "trainer:1")["spec"])
    specs = [TaskOfferSpec.model_validate(example.manifest["spec"]) for example in TYPES.values()]
    kinds = {(spec.task_type, spec.model.architecture) for spec in specs}
    expected = {(task, None) for task in TaskType if task is not TaskType.IMAGE}
    assert kinds == expected | {(TaskType.IMAGE, architecture) for architecture in Architecture}
    assert len(specs) == len(kinds)
    assert len({spec.task_id for spec in specs}) == len(specs)
    for spec in specs:
        found = evaluate(spec, policy)
        assert (list(found.refusals), found.gpus) == ([], 1)


def test_the_policy_of_all_types_changes_the_preset_in_what_the_script_says_and_nothing_else() -> None:
    preset, changed_one = presets.load("lab", image="trainer:1"), policy_of(ALL_TYPES, "trainer:1")
    assert changed_one["spec"]["filters"].pop("maxConcurrentJobs") == ALL_TYPES.at_once
    preset["spec"]["filters"].pop("maxConcurrentJobs")
    for ours, theirs in zip(changed_one["spec"]["sizeClasses"], preset["spec"]["sizeClasses"], strict=True):
        assert {name: ours["train"][name] for name in ALL_TYPES.train} == ALL_TYPES.train
        theirs["train"].update(ALL_TYPES.train)
    assert changed_one == preset


def test_the_examples_need_one_two_and_four_gpus_and_together_more_than_a_node_has() -> None:
    counts = [expected.gpus for expected in EXPECTED.values() if expected.gpus is not None]
    assert set(counts) == {1, 2, 4}
    assert sum(counts) > 8


def test_task_ids_and_names_of_the_examples_are_all_different() -> None:
    assert len({example.manifest["spec"]["taskID"] for example in EXAMPLES.values()}) == len(EXAMPLES) == len(EXPECTED)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Material:
    target = Material(tmp_path_factory.mktemp("demo"))
    build_material(target)
    return target


TRAINED = {name: one for name, one in (EXAMPLES | TYPES).items() if one.expected.gpus}


@pytest.mark.parametrize("name", TRAINED)
def test_the_models_of_the_examples_are_there_and_as_large_as_the_examples_say(name: str, built: Material) -> None:
    spec = TaskOfferSpec.model_validate(TRAINED[name].manifest["spec"])
    assert spec.model.source is not None
    assert spec.model.source.persistent_volume_claim is not None
    folder = built.models / spec.model.source.persistent_volume_claim.path
    # Of an image model the size is that of the network that is trained.
    trained = {None: "model", "sdxl": "unet/diffusion_pytorch_model", "flux": "transformer/diffusion_pytorch_model"}
    with safe_open(folder / f"{trained[spec.model.architecture]}.safetensors", "pt") as file:
        real = sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    said = parameters_of(spec.model, None)
    assert said is not None
    if spec.model.parameters is not None:
        assert said == real
    else:
        assert said == pytest.approx(real, rel=0.1)


def test_the_rows_of_the_exam_are_in_no_data_that_a_trainer_sees(built: Material) -> None:
    files = list(built.data.rglob("*.jsonl"))
    assert len(files) == 3
    seen = "".join(path.read_text(encoding="utf-8") for path in files)
    exam = built.exam.read_text(encoding="utf-8").splitlines()
    assert len(exam) == EXAM_ROWS
    assert [row for row in map(json.loads, exam) if json.dumps(row["output"], ensure_ascii=False) in seen] == []


@pytest.mark.parametrize("name", TYPES)
def test_the_data_of_the_offers_of_all_types_are_there(name: str, built: Material) -> None:
    source = TYPES[name].manifest["spec"]["dataset"]["source"]["persistentVolumeClaim"]
    assert (built.data / source["path"]).exists()


@pytest.mark.parametrize("kind", KINDS)
def test_the_image_models_and_pictures_are_there_with_a_caption_for_each(kind: str, built: Material) -> None:
    folder = built.models / pipeline_folder(kind)
    assert "_class_name" in json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    with zipfile.ZipFile(built.data / SHAPES_NAME / SHAPES_FILE) as archive:
        names = archive.namelist()
    pictures, captions = ({Path(n).stem for n in names if n.endswith(ending)} for ending in (".png", ".txt"))
    assert pictures == captions
    assert 10 <= len(pictures) <= 50


def test_only_the_outputs_of_the_last_runs_are_kept(tmp_path: Path) -> None:
    target = Material(tmp_path)
    for number in range(KEPT_RUNS + 2):
        folder = new_outputs(target, f"run-{number}")
        folder.mkdir(parents=True)
        os.utime(folder, (number, number))
    assert {folder.name for folder in target.outputs.iterdir()} == {f"run-{n}" for n in (2, 3, 4)}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("kind: TaskOffer\nmetadata: {name: stranger}\n", "how offer 'stranger' must end"),
        ("kind: ConfigMap\nmetadata: {name: x}\n", "just one TaskOffer"),
        ("kind: TaskOffer\nmetadata: {name: too-long}\n---\nkind: TaskOffer\n", "just one TaskOffer"),
        ("kind: TaskOffer\nmetadata: {name: too-long}\n", "lacks the offers"),
    ],
    ids=["unknown", "other kind", "two", "missing ones"],
)
def test_a_folder_of_examples_that_the_demo_cannot_judge_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(LabError, match=complaint):
        load_examples(tmp_path)


def test_the_operator_is_deployed_as_shipped_but_for_image_and_further_arguments() -> None:
    manifests = {found["kind"]: found for found in operator_manifest("registry/operator:1", "--more")["items"]}
    manifest = manifests["Deployment"]
    container = manifest["spec"]["template"]["spec"]["containers"][0]
    assert manifest["spec"]["replicas"] == 2
    assert container["image"] == "registry/operator:1"
    assert container["args"][0] == "run"
    assert container["args"][-1] == "--more"
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    selected = manifests["Service"]["spec"]["selector"]
    assert selected.items() <= manifest["spec"]["template"]["metadata"]["labels"].items()


# What is shown


def offer_object(name: str, **status: Any) -> dict[str, Any]:
    spec = {"taskID": f"id-{name}", "model": {"name": f"lab/{name}-1m"}}
    return {"metadata": {"name": name, "uid": f"uid-{name}"}, "spec": spec, "status": status}


def condition(kind: str, status: bool, reason: str, message: str = "") -> dict[str, str]:
    return {"type": kind, "status": str(status), "reason": reason, "message": message}


def admitted(name: str, gpus: int = 2) -> dict[str, Any]:
    admission = {"jobName": f"{name}-1", "assignments": [{"nodeName": "node-a", "count": gpus}]}
    return offer_object(name, conditions=[condition("Admitted", True, "Admitted")], score="0.7", admission=admission)


def job_object(name: str, *conditions: dict[str, str], **status: Any) -> dict[str, Any]:
    run = {"taskType": "InstructText", "gpus": 2, "model": {"name": f"lab/{name}-1m"}}
    spec = {"offerRef": {"name": name, "uid": f"uid-{name}"}, "run": run}
    return {"metadata": {"name": f"{name}-1"}, "spec": spec, "status": {"conditions": list(conditions), **status}}


def pod_object(name: str, phase: str, gpus: int, waiting: str | None = None) -> dict[str, Any]:
    statuses = [{"state": {"waiting": {"reason": waiting}}}] if waiting else []
    return {
        "metadata": {"labels": {"taskoffer.dev/offer-uid": f"uid-{name}"}},
        "spec": {"containers": [{"resources": {"limits": {"nvidia.com/gpu": str(gpus)}}}]},
        "status": {"phase": phase, "containerStatuses": statuses},
    }


PROGRESS = {
    "progressPercentage": 40,
    "estimatedRemainingSeconds": 12,
    "metrics": [{"name": "loss", "value": "7.123456"}, {"name": "eval_loss_before", "value": "9.3"}],
}
RESULT = {"evalLossBefore": "9.3", "evalLossAfter": "6.9", "adapterPath": "/data/output/a-1/adapter", "sha256": "00"}


@pytest.mark.parametrize(
    ("offer", "jobs", "pods", "expected"),
    [
        (offer_object("a"), [], [], {"verdict": "", "reason": "", "state": "", "gpus": None}),
        (
            offer_object("a", conditions=[condition("Admitted", False, "WaitingForCapacity")], score="0.5"),
            [],
            [],
            {"verdict": "Wait", "reason": "WaitingForCapacity", "score": "0.5", "ended": False},
        ),
        (
            offer_object(
                "a",
                conditions=[
                    condition("Admitted", False, "TimeLimitTooLong"),
                    condition("Finished", True, "Rejected"),
                ],
            ),
            [],
            [],
            {"verdict": "Reject", "reason": "TimeLimitTooLong", "ended": True},
        ),
        (
            admitted("a"),
            [job_object("a", condition("Running", False, "Pending"))],
            [pod_object("a", "Pending", 2, "ContainerCreating")],
            {"verdict": "Admit", "gpus": 2, "state": "Pending", "waits_for": "ContainerCreating", "ended": False},
        ),
        (
            admitted("a"),
            [job_object("a", condition("Running", True, "Running"), trainerStatus=PROGRESS)],
            [pod_object("a", "Running", 2)],
            {"state": "Running", "progress": 40, "eta": 12, "loss": "7.123456", "loss_before": "9.3", "ended": False},
        ),
        (
            admitted("a"),
            [job_object("a", condition("Complete", True, "Succeeded"), result=RESULT)],
            [],
            {"state": "Succeeded", "loss_before": "9.3", "loss_after": "6.9", "ended": True},
        ),
        (
            admitted("a"),
            [job_object("a", condition("Failed", True, "Failed", "no such column"))],
            [],
            {"state": "Failed", "message": "no such column", "ended": True},
        ),
    ],
    ids=["undecided", "waits", "refused", "starting", "running", "done", "failed"],
)
def test_a_row_says_what_the_objects_say(
    offer: dict[str, Any], jobs: list[dict[str, Any]], pods: list[dict[str, Any]], expected: dict[str, Any]
) -> None:
    (row,) = rows_of([offer], jobs, pods)
    assert {key: getattr(row, key) for key in expected} == expected


def plain_screen() -> tuple[Screen, io.StringIO]:
    text = io.StringIO()
    return Screen(console=Console(file=text, width=140, force_terminal=False)), text


def test_without_a_terminal_a_line_is_printed_for_each_change_and_none_without() -> None:
    screen, text = plain_screen()
    waiting = Row("a", "m", "Wait", "WaitingForCapacity", "0.7")
    with screen:
        for rows in ([waiting], [waiting], [Row("a", "m", "Admit", "Admitted", "0.7", 4, "Running", progress=10)]):
            screen.show(rows)
    lines = text.getvalue().splitlines()
    assert len(lines) == 2
    assert "Wait  WaitingForCapacity  score 0.7" in lines[0]
    assert "4 GPUs  Running  10 %" in lines[1]


def test_a_failed_phase_is_shown_as_failed_and_its_stderr_as_its_progress() -> None:
    screen, text = plain_screen()

    def fail() -> None:
        with screen.phase("images"), screen.stderr_into("images"):
            sys.stderr.write("[lab] layer 3\n")
            raise LabError("no space")

    with screen, pytest.raises(LabError):
        fail()
    assert "images: layer 3" in text.getvalue()
    assert "images: failed" in text.getvalue()


def test_the_picture_holds_the_table_and_what_was_printed(tmp_path: Path) -> None:
    screen, _ = plain_screen()
    with screen:
        screen.print("first words")
        screen.show([Row("small-llama", "llama-0.6m", "Admit", "Admitted", "0.7375", 1, "Running", progress=50)])
        screen.snapshot("After 9 s")
    screen.export_svg(tmp_path / "docs" / "demo.svg", "demo")
    # Words are cut at style changes, and a picture writes spaces that do not break.
    text = (tmp_path / "docs" / "demo.svg").read_text(encoding="utf-8").replace("&#160;", " ")
    assert text.startswith("<svg")
    for word in ("first words", "After 9 s", "small-llama", "█████", "0.7375"):
        assert word in text


def test_a_narrow_terminal_shows_whole_verdicts_and_leaves_columns_out_instead() -> None:
    long = Row("medium-mistral", "mistral-1.7m", "Wait", "ModelFamilyNotAccepted", "0.7375", 4, "Running", progress=50)
    for width in (80, 120):
        text = io.StringIO()
        Console(file=text, width=width).print(offers_table([long], width))
        assert "medium-mistral" in text.getvalue()
        assert "ModelFamilyNotAccepted" in text.getvalue()
        assert " 50 %" in text.getvalue()
        assert ("mistral-1.7m" in text.getvalue()) is (width == 120)


# What is followed and checked


class FakeApi:
    """Answers each GET from a script: one state of the world per look, the last one for ever."""

    def __init__(self, *worlds: tuple[list[Any], list[Any], list[Any]]) -> None:
        self._worlds = list(worlds)
        self._asked = 0

    def request(self, method: str, path: str) -> dict[str, Any]:
        assert method == "GET"
        world = self._worlds[min(self._asked // 3, len(self._worlds) - 1)]
        self._asked += 1
        kind = path.rpartition("/")[2]
        return {"items": world[("taskoffers", "trainingjobs", "pods").index(kind)]}


def test_following_remembers_who_waited_and_how_many_gpus_each_running_pod_had() -> None:
    waits = offer_object("b", conditions=[condition("Admitted", False, "WaitingForCapacity")])
    done = condition("Complete", True, "Succeeded")
    api = FakeApi(
        ([admitted("a"), waits], [job_object("a")], [pod_object("a", "Running", 2)]),
        ([admitted("a"), admitted("b", 4)], [job_object("a", done), job_object("b")], [pod_object("b", "Running", 4)]),
        ([admitted("a"), admitted("b", 4)], [job_object("a", done), job_object("b", done)], []),
    )
    seen = follow(api, ["a", "b"], lambda rows: None, seconds=5, poll=0)  # type: ignore[arg-type]
    assert seen.waited("WaitingForCapacity") == ["b"]
    assert seen.gpus == {"a": 2, "b": 4}
    assert seen.first_adapter is not None
    assert [row.state for row in seen.ended] == ["Succeeded", "Succeeded"]


def test_following_gives_up_in_time_and_names_what_is_left() -> None:
    api = FakeApi(([admitted("a")], [job_object("a")], [pod_object("a", "Pending", 2, "ErrImagePull")]))
    with pytest.raises(LabError, match=r"a: Admitted Pending ErrImagePull"):
        follow(api, ["a"], lambda rows: None, seconds=0, poll=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [TimeoutError("the handshake timed out"), ApiError(503, "GET", "/", "starting")])
def test_following_bears_an_api_server_that_does_not_answer_for_a_while(error: Exception) -> None:
    class Busy(FakeApi):
        failures = 5

        def request(self, method: str, path: str) -> dict[str, Any]:
            if self.failures and "pods" in path:
                self.failures -= 1
                self._asked = 0
                raise error
            return super().request(method, path)

    world = ([admitted("a")], [job_object("a", condition("Complete", True, "Succeeded"))], [])
    seen = follow(Busy(world), ["a"], lambda rows: None, seconds=5, poll=0)  # type: ignore[arg-type]
    assert [row.state for row in seen.ended] == ["Succeeded"]
    with pytest.raises(LabError, match=r"the API server has not answered for 0 s: .*(timed out|starting)"):
        follow(Busy(world), ["a"], lambda rows: None, poll=0, silent=0)  # type: ignore[arg-type]


def good_run() -> tuple[list[Example], Seen]:
    """All examples as they are meant to end."""
    rows, answers, gpus = [], {}, {}
    for name, expected in EXPECTED.items():
        if expected.refusal:
            rows.append(Row(name, "m", "Reject", expected.refusal))
            answers[name] = [("Reject", expected.refusal)]
        else:
            rows.append(Row(name, "m", "Admit", "Admitted", "0.7", expected.gpus, "Succeeded"))
            answers[name] = [("Admit", "Admitted")]
            gpus[name] = expected.gpus or 0
    answers["large-phi"].insert(0, ("Wait", "WaitingForCapacity"))
    return list(EXAMPLES.values()), Seen(answers, gpus, 40.0, rows)


def changed(seen: Seen, name: str, **changes: Any) -> Seen:
    rows = [Row(**{**vars(row), **changes}) if row.name == name else row for row in seen.ended]
    return Seen(seen.answers, seen.gpus, seen.first_adapter, rows)


def test_a_run_as_it_is_meant_has_no_problems() -> None:
    examples, seen = good_run()
    assert check_answers(examples, seen, 8) == []


@pytest.mark.parametrize(
    ("name", "changes", "complaint"),
    [
        ("too-long", {"reason": "ScoreTooLow"}, "meant is Reject TimeLimitTooLong"),
        ("unknown-family", {"verdict": "Admit", "reason": "Admitted"}, "meant is Reject ModelFamilyNotAccepted"),
        ("small-llama", {"state": "Failed", "message": "exit code 65"}, "exit code 65"),
        ("small-llama", {"gpus": 2}, "meant is a trained adapter on 1 GPUs"),
        ("large-llama", {"verdict": "Reject", "reason": "ScoreTooLow", "state": ""}, "Reject ScoreTooLow"),
    ],
)
def test_an_example_with_another_answer_fails_the_demo(name: str, changes: dict[str, Any], complaint: str) -> None:
    examples, seen = good_run()
    (problem,) = check_answers(examples, changed(seen, name, **changes), 8)
    assert complaint in problem


def test_a_run_in_which_nobody_waited_fails_where_gpus_are_short_and_only_there() -> None:
    examples, seen = good_run()
    seen.answers["large-phi"] = [("Admit", "Admitted")]
    (problem,) = check_answers(examples, seen, 8)
    assert "no offer was seen waiting" in problem
    assert check_answers(examples, seen, 16) == []


def test_a_pod_with_another_number_of_gpus_fails_the_demo() -> None:
    examples, seen = good_run()
    seen.gpus |= {"large-phi": 2, "large-llama": 2}
    assert len(check_answers(examples, seen, 8)) == 3


@pytest.mark.parametrize(
    ("before", "after", "fails"),
    [(9.0, 6.0, False), (10.0, 8.5, False), (10.0, 8.6, True), (7.0, 7.0, True), (7.0, 9.0, True), (0.0, 0.0, True)],
)
def test_a_loss_that_did_not_fall_by_the_margin_fails_the_demo(before: float, after: float, fails: bool) -> None:
    assert bool(check_losses("a", before, after, "the loss", 0.15)) is fails


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    folder = tmp_path / "a-1" / "adapter"
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    settings = {"peft_type": "LORA", "base_model_name_or_path": "lab/a-1m"}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return Adapter("a", "lab/a-1m", folder, hashlib.sha256(b"weights").hexdigest(), 9.3, 6.9)


def test_an_adapter_is_found_on_the_host_by_its_path_in_the_pod(adapter: Adapter, tmp_path: Path) -> None:
    found, problems = adapters_of([job_object("a", result={**RESULT, "sha256": adapter.sha256})], tmp_path)
    assert found == [adapter]
    assert problems == []
    assert check_files(found[0]) == []


@pytest.mark.parametrize("lacking", ["adapterPath", "sha256", "evalLossBefore", "evalLossAfter"])
def test_a_result_without_a_field_is_a_problem(lacking: str, tmp_path: Path) -> None:
    result = {key: value for key, value in RESULT.items() if key != lacking}
    found, problems = adapters_of([job_object("a", result=result)], tmp_path)
    assert found == []
    assert lacking in problems[0]


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("adapter_model.safetensors", "other weights", "SHA-256"),
        ("adapter_model.safetensors", None, "is missing"),
        ("adapter_config.json", None, "is missing"),
        ("adapter_config.json", '{"peft_type": "IA3", "base_model_name_or_path": "lab/a-1m"}', "peft_type 'IA3'"),
        ("adapter_config.json", '{"peft_type": "LORA", "base_model_name_or_path": "/data/model"}', "/data/model"),
    ],
)
def test_an_adapter_with_a_wrong_file_is_a_problem(
    adapter: Adapter, file: str, content: str | None, complaint: str
) -> None:
    path = adapter.folder / file
    path.unlink()
    if content is not None:
        path.write_text(content, encoding="utf-8")
    (problem,) = check_files(adapter)
    assert complaint in problem


def types_adapter(adapter: Adapter, task: str, before: dict[str, float], after: dict[str, float]) -> Adapter:
    manifest = {"figuresBefore": before, "figuresAfter": after}
    (adapter.folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return replace(adapter, task=task)


FIGURE_ROWS: list[tuple[str, dict[str, float], dict[str, float], str | None]] = [
    ("InstructText", {"eval_loss": 9.0}, {"eval_loss": 7.0}, None),
    ("InstructText", {"eval_loss": 9.0}, {"eval_loss": 8.5}, "held-out loss went from 9.0000 to 8.5000"),
    ("Chat", {"eval_loss": 9.0}, {"eval_loss": math.nan}, "held-out loss went from 9.0000 to nan"),
    ("DPO", {"eval_accuracy": 0.5, "eval_margin": 0.0}, {"eval_accuracy": 0.9, "eval_margin": 2.0}, None),
    ("DPO", {"eval_accuracy": 0.5, "eval_margin": 0.0}, {"eval_accuracy": 0.9, "eval_margin": 0.1}, "held-out margin"),
    ("DPO", {"eval_accuracy": 0.5, "eval_margin": 0.0}, {"eval_accuracy": 0.5, "eval_margin": 2.0}, "accuracy went"),
    ("GRPO", {"reward": 0.2}, {"reward": 0.4}, None),
    ("GRPO", {"reward": 0.4}, {"reward": 0.2}, "meant is a change of +0.05 at least"),
    ("Image", {"eval_loss": 1.1}, {"eval_loss": 1.0}, None),
    ("Image", {"eval_loss": 1.0}, {"eval_loss": 1.0}, "meant is a change of -1% at least"),
    ("Image", {}, {"eval_loss": 1.0}, "does not say what the training came to"),
]


@pytest.mark.parametrize(("task", "before", "after", "complaint"), FIGURE_ROWS)
def test_an_adapter_whose_methods_figures_did_not_move_as_they_must_fails_the_demo(
    adapter: Adapter, task: str, before: dict[str, float], after: dict[str, float], complaint: str | None
) -> None:
    problems = check_figures(types_adapter(adapter, task, before, after))
    assert len(problems) == (complaint is not None)
    assert complaint is None or complaint in problems[0]


@pytest.mark.parametrize("task", [task.value for task in TaskType])
def test_an_adapter_that_changes_nothing_fails_the_exam_of_its_type(adapter: Adapter, task: str) -> None:
    assert set(FIGURES) == set(EXAM_FIGURES) == set(EXAMS)
    (problem,) = check_exam(replace(adapter, task=task), {"before": 0.5, "after": 0.5})
    assert problem.startswith("in the exam, a: ")


# The exam


@pytest.mark.trainer
def test_the_exam_refuses_an_adapter_that_changes_nothing_and_measures_one_that_does(
    built: Material, tmp_path: Path
) -> None:
    exams = _exam(built, tmp_path, scale=0.0), _exam(built, tmp_path, scale=0.5)
    unchanged, spoiled = (json.loads(exam.stdout)["a"] for exam in exams)
    assert unchanged["after"] == pytest.approx(unchanged["before"], abs=1e-6)
    assert unchanged["answer_after"] == unchanged["answer_before"]
    assert abs(spoiled["after"] - spoiled["before"]) > 0.01
    assert check_losses("a", unchanged["before"], unchanged["after"], "the loss in the exam")


@pytest.mark.trainer
def test_the_exam_fails_on_weights_that_are_not_finite(built: Material, tmp_path: Path) -> None:
    result = _exam(built, tmp_path, scale=math.nan)
    assert result.returncode != 0
    assert "is not finite" in result.stderr


def _exam(built: Material, folder: Path, scale: float) -> "subprocess.CompletedProcess[str]":
    """Examine an adapter whose weights are random, times a scale."""
    model = built.models / MODELS[0].folder
    make = """
import sys, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
model, folder, scale = sys.argv[1], sys.argv[2], float(sys.argv[3])
torch.manual_seed(0)
base = AutoModelForCausalLM.from_pretrained(model)
tuned = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
with torch.no_grad():
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            weight.normal_().mul_(scale)
tuned.save_pretrained(folder)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", make, str(model), str(folder / "adapter"), str(scale)]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    pupils = [{"name": "a", "model": str(model), "adapter": str(folder / "adapter")}]
    return subprocess.run(
        [sys.executable, "-m", "taskoffer_lab.demo.exam"],
        input=json.dumps({"rows": str(built.exam), "pupils": pupils}),
        capture_output=True,
        text=True,
        check=False,
    )


# The preparation's processes


SLEEPER = """
import subprocess, sys, time
child = subprocess.Popen(["sleep", "600"])
print(child.pid, flush=True)
print("[lab] layer 1", file=sys.stderr, flush=True)
try:
    time.sleep(600)
finally:
    print("cleaned up", flush=True)
"""


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which `taskoffer_lab.demo.prepare` is a script of the test's."""
    package = tmp_path / "taskoffer_lab" / "demo"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    monkeypatch.setattr(crew_module, "package_root", lambda: tmp_path)
    return package / "prepare.py"


def test_ending_the_crew_lets_a_part_clean_up_and_leaves_none_of_its_processes(parts: Path) -> None:
    parts.write_text(SLEEPER, encoding="utf-8")
    told: list[tuple[str, str]] = []
    with Crew(lambda name, line: told.append((name, line))) as crew:
        crew.start("images")
        wait_until(lambda: len(told) > 0, "the first line", 10)
    output = crew.output_of("images")
    assert told[0] == ("images", "layer 1")
    assert output[1:] == ["cleaned up"]
    assert start_time(int(output[0])) is None


def test_an_interrupt_while_a_part_is_started_does_not_lose_it(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts.write_text(SLEEPER, encoding="utf-8")
    start = subprocess.Popen

    def interrupted_start(*arguments: Any, **options: Any) -> "subprocess.Popen[str]":
        process: subprocess.Popen[str] = start(*arguments, **options)
        signal.raise_signal(signal.SIGINT)
        return process

    monkeypatch.setattr(crew_module.subprocess, "Popen", interrupted_start)
    crew = Crew(lambda name, line: None)
    with crew, pytest.raises(KeyboardInterrupt):
        crew.start("images")
    assert not crew.running("images")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_every_signal_that_ends_counts_as_an_interrupt_but_not_while_things_are_taken_down(number: int) -> None:
    before = signal.getsignal(number)
    with every_end_as_interrupt():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        with undisturbed():
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_a_part_that_does_not_end_is_killed(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew_module, "END_SECONDS", 0.2)
    parts.write_text(
        "import signal, sys, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "print('up', file=sys.stderr, flush=True)\ntime.sleep(600)\n",
        encoding="utf-8",
    )
    told: list[str] = []
    with Crew(lambda name, line: told.append(line)) as crew:
        crew.start("images")
        wait_until(lambda: told == ["up"], "the first line", 10)
    assert not crew.running("images")


def test_the_failure_of_one_part_ends_the_wait_for_another_and_carries_its_last_lines(parts: Path) -> None:
    parts.write_text(
        "import sys, time\nif 'tools' in sys.argv:\n    sys.exit('no compiler')\ntime.sleep(600)\n", encoding="utf-8"
    )
    started = time.monotonic()
    with Crew(lambda name, line: None) as crew:
        crew.start("images", "images")
        crew.start("tools", "tools")
        with pytest.raises(LabError, match=r"tools failed \(exit status 1\):\nno compiler"):
            crew.wait("images")
    assert time.monotonic() - started < 30


def run_main(arguments: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "taskoffer_lab.cli", "demo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [(["--provider", "kind"], "mounts folders of this machine"), (["--nodes", "0"], "trainings need a node")],
)
def test_what_the_demo_cannot_do_is_said_at_once_with_a_remedy(arguments: list[str], complaint: str) -> None:
    result = run_main(arguments)
    assert result.returncode == 1
    assert complaint in result.stderr
    assert "remedy: " in result.stderr
