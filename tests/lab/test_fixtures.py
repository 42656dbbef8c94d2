"""The tiny models and the data: what they promise to whoever trains on them."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from taskoffer_lab.fixtures import (
    DATASET_FILE,
    FAMILIES,
    KINDS,
    build_chat_dataset,
    build_instruct_dataset,
    build_preference_dataset,
    build_shapes,
    build_tiny_model,
    model_folder,
)
from taskoffer_lab.fixtures.datasets import chat_rows, instruct_rows, preference_rows
from taskoffer_lab.fixtures.recipes import RECIPE_FILE

REPOSITORY = Path(__file__).parents[2]


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_are_real_answers_of_the_promised_columns_and_lengths():
    rows = instruct_rows()

    assert len(rows) >= 500
    assert all(list(row) == ["instruction", "input", "output"] for row in rows)
    assert all(40 <= len(row["output"]) <= 400 and row["instruction"] for row in rows)
    assert all(not row["output"].endswith(":") for row in rows)


def test_no_answer_occurs_twice_so_that_held_out_rows_are_unseen():
    outputs = [row["output"] for row in instruct_rows()]

    assert len(outputs) == len(set(outputs))


def test_the_answers_are_text_of_the_documentation():
    from pydoc_data.topics import topics

    text = " ".join(" ".join(topic.split()) for topic in topics.values())

    missing = [row["output"] for row in instruct_rows() if row["output"] not in text]
    assert missing == []


def test_fewer_rows_are_the_first_of_all_rows(tmp_path):
    few = read_rows(build_instruct_dataset(tmp_path / "few", rows=30))

    assert few == read_rows(build_instruct_dataset(tmp_path / "all"))[:30]
    assert len({row["instruction"] for row in few}) > 20, "the first rows must not all be of one topic"


def test_the_licence_notice_lies_beside_the_rows(tmp_path):
    path = build_instruct_dataset(tmp_path)

    assert path == tmp_path / DATASET_FILE
    assert "Python Software Foundation License" in (tmp_path / "README.md").read_text()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["README.md", DATASET_FILE]


def test_conversations_are_two_questions_with_their_answers():
    talks = [row["conversations"] for row in chat_rows()]

    assert len(talks) >= 250
    assert all([turn["from"] for turn in talk] == ["human", "gpt"] * 2 for talk in talks)
    answers = [turn["value"] for talk in talks for turn in talk if turn["from"] == "gpt"]
    assert answers == [row["output"] for row in instruct_rows()][: len(answers)]


def test_of_two_answers_the_text_is_preferred_to_its_words_backwards():
    rows = preference_rows()

    assert len(rows) == len(instruct_rows())
    assert all(row["chosen"].split() == row["rejected"].split()[::-1] for row in rows)
    assert all(row["prompt"] and row["chosen"] != row["rejected"] for row in rows)


@pytest.mark.parametrize("build", [build_chat_dataset, build_preference_dataset])
def test_the_other_rows_are_written_in_the_same_way(build, tmp_path):
    path = build(tmp_path, rows=10)

    assert len(read_rows(path)) == 10
    assert "Python Software Foundation License" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("rows", [0, -1, 10**6])
def test_a_number_of_rows_that_cannot_be_had_is_refused_with_the_limits(tmp_path, rows):
    with pytest.raises(ValueError, match=rf"between 1 and \d+, got {rows}"):
        build_instruct_dataset(tmp_path, rows=rows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"family": "bert"}, "unknown model family 'bert'; choose one of llama"),
        ({"hidden_size": 12}, "hidden_size 12 must be a positive multiple of 8"),
        ({"layers": 0}, "layers 0 at least 1"),
        ({"vocabulary": 256}, "vocabulary 256"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused_before_anything_is_written(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        build_tiny_model(tmp_path / "model", **settings)
    assert list(tmp_path.iterdir()) == []


def test_files_of_somebody_else_are_not_replaced(tmp_path):
    pytest.importorskip("transformers", reason="the extra 'trainer' is not installed")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")

    with pytest.raises(FileExistsError, match="not built here"):
        build_tiny_model(tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_text() == "{}"


def run_in_new_python(*arguments: str) -> str:
    """Run the fixtures' command line in a process of its own."""
    return in_new_python("-m", "taskoffer_lab.fixtures", *arguments)


def in_new_python(*arguments: str) -> str:
    """Run Python in a process of its own, where nothing has imported torch yet."""
    command = [sys.executable, *arguments]
    environment = {"PYTHONPATH": str(REPOSITORY / "lab"), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    pytest.importorskip("transformers", reason="the extra 'trainer' is not installed")
    directory = tmp_path_factory.mktemp("models")
    run_in_new_python("--models", str(directory), "--families", *FAMILIES)
    return directory


ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "mistral": "MistralForCausalLM",
    "gemma": "GemmaForCausalLM",
    "phi3": "Phi3ForCausalLM",
}


@pytest.mark.trainer
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_folder_names_its_architecture_and_is_readable_by_all(models, family):
    folder = models / model_folder(family)
    files = {entry.name: entry for entry in folder.iterdir()}

    assert json.loads(files["config.json"].read_text())["architectures"] == [ARCHITECTURES[family]]
    assert {"model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(files)
    assert folder.stat().st_mode & 0o555 == 0o555
    assert all(entry.stat().st_mode & 0o444 == 0o444 for entry in files.values())


@pytest.mark.trainer
def test_the_same_recipe_gives_the_same_bytes_and_is_not_built_twice(models, tmp_path):
    first, again = models / model_folder("llama"), tmp_path / model_folder("llama")
    run_in_new_python("--models", str(tmp_path))
    assert {file.name: file.read_bytes() for file in again.iterdir()} == {
        file.name: file.read_bytes() for file in first.iterdir()
    }

    built = (again / "model.safetensors").stat().st_mtime_ns
    once_more = "import sys; from taskoffer_lab.fixtures import build_tiny_model; build_tiny_model(Path(sys.argv[1]))"
    said = in_new_python("-c", f"from pathlib import Path; {once_more}; print('torch' in sys.modules)", str(again))
    assert said.strip() == "False", "a model that is there already must not cost the import of torch"
    assert (again / "model.safetensors").stat().st_mtime_ns == built


@pytest.mark.trainer
def test_another_seed_replaces_the_model_by_another_one(models, tmp_path):
    folder = tmp_path / model_folder("llama")
    run_in_new_python("--models", str(tmp_path), "--seed", "1")

    assert json.loads((folder / RECIPE_FILE).read_text())["seed"] == 1
    assert (folder / "model.safetensors").read_bytes() != (
        models / model_folder("llama") / "model.safetensors"
    ).read_bytes()
    run_in_new_python("--models", str(tmp_path), "--seed", "0")
    assert json.loads((folder / RECIPE_FILE).read_text())["seed"] == 0
    assert [entry.name for entry in tmp_path.iterdir()] == [model_folder("llama")], "no part may be left behind"


_LOADS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
text = 'Ein "Zug" → 列車\\n\\tdef f(): pass'
assert tokenizer.decode(tokenizer(text)['input_ids']) == text
chat = [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'}]
assert tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True) == (
    '<|im_start|>user\\nq<|im_end|>\\n<|im_start|>assistant\\n')
masked = tokenizer.apply_chat_template(
    chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
said = [token for token, mine in zip(masked['input_ids'], masked['assistant_masks']) if mine]
assert tokenizer.decode(said) == 'a<|im_end|>', said
out = model.generate(**tokenizer('What is', return_tensors='pt'), max_new_tokens=4, do_sample=False)
assert out.shape[1] > 2 and torch.isfinite(model(out).logits).all()
print('loaded')
"""


@pytest.mark.trainer
def test_a_model_loads_encodes_any_text_masks_the_assistant_and_generates(models):
    done = subprocess.run(
        [sys.executable, "-c", _LOADS, str(models / model_folder("phi3"))],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert done.stdout == "loaded\n", done.stderr


def test_the_pictures_are_all_different_and_the_same_every_time(tmp_path):
    with zipfile.ZipFile(build_shapes(tmp_path / "once", 60)) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    pictures = [content[name] for name in content if name.endswith(".png")]
    captions = [content[name] for name in content if name.endswith(".txt")]

    assert len(set(pictures)) == len(set(captions)) == 60
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    again = build_shapes(tmp_path / "again", 60)
    assert again.read_bytes() == (tmp_path / "once" / again.name).read_bytes()
    with pytest.raises(ValueError, match="between 1 and 60"):
        build_shapes(tmp_path, 61)


_GENERATES = """
import sys, numpy
from pathlib import Path
from diffusers import DiffusionPipeline
from taskoffer_lab.fixtures import KINDS, build_tiny_pipeline, pipeline_folder
for kind in KINDS:
    folder = Path(sys.argv[1], pipeline_folder(kind))
    build_tiny_pipeline(folder, kind)
    written = (folder / 'model_index.json').stat().st_mtime_ns
    assert build_tiny_pipeline(folder, kind) == folder
    assert (folder / 'model_index.json').stat().st_mtime_ns == written, 'what is there is not built again'
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    picture = pipeline('a red box', num_inference_steps=2, height=64, width=64, output_type='np').images
    print(picture.shape, bool(numpy.isfinite(picture).all()))
"""


@pytest.mark.trainer
def test_a_pipeline_folder_is_readable_by_all_and_generates_a_picture(tmp_path):
    pytest.importorskip("diffusers", reason="the extra 'trainer' is not installed")
    said = in_new_python("-c", _GENERATES, str(tmp_path))
    assert said.splitlines().count("(1, 64, 64, 3) True") == len(KINDS)
    for entry in tmp_path.rglob("*"):
        assert entry.stat().st_mode & 0o444 == 0o444, entry
