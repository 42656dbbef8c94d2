"""What the how-to pages show is what is read: each page's offer, as the operator makes a run of it, with its rows."""

from __future__ import annotations

import json
import platform
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from builders import make_admission
from core_builders import at, policy_spec
from taskoffer.api.base import rfc3339
from taskoffer.api.contract import RunConfig
from taskoffer.api.v1alpha1.taskoffer import Admission, TaskOfferSpec
from taskoffer.api.v1alpha1.trainingjob import Attempt, TrainingJob
from taskoffer.decision.keys import OfferKey
from taskoffer.render.trainingjob import run_config, training_job
from taskoffer_trainer.chat_data import read_chat
from taskoffer_trainer.dpo_data import read_dpo
from taskoffer_trainer.grpo_data import read_grpo
from taskoffer_trainer.image_data import read_pair_split
from taskoffer_trainer.instruct_data import read_instruct
from taskoffer_trainer.rewards import Asked, open_rewards
from taskoffer_trainer.seccomp import ARCHITECTURES

HOWTO = Path(__file__).resolve().parents[2] / "docs" / "howto"
UID = "0123abcd-0000-4000-8000-000000000000"
Row = dict[str, Any]


def blocks(page: str, language: str) -> list[str]:
    """Return the fenced blocks of a page in a language."""
    text = (HOWTO / f"train-{page}.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.M | re.S)


def run_of(page: str, data: Path) -> RunConfig:
    """Return what the trainer is given for a page's offer, but for where the data lies."""
    spec = TaskOfferSpec.model_validate(yaml.safe_load(blocks(page, "yaml")[0])["spec"])
    admission = Admission.model_validate(make_admission(gpus=1, policy="sound", deadline=rfc3339(at(7200))))
    made = training_job(OfferKey("default", "offer"), UID, spec, admission, policy_spec(preset="sound"))
    meta = {"uid": "u", "resourceVersion": "1", "creationTimestamp": rfc3339(at(0))}
    job = TrainingJob.model_validate({**made, "metadata": {**made["metadata"], **meta}})
    place = {"nodeName": "n", "resourceName": "nvidia.com/gpu", "count": 1}
    attempt = Attempt.model_validate({"jobName": "offer-1", "assignments": [place], "createdAt": rfc3339(at(0))})
    config = run_config(job, attempt, 1)
    return config.model_copy(update={"data": config.data.model_copy(update={"path": str(data)})})


def rows_of(page: str) -> list[Row]:
    """Return the rows that a page shows, an object per line."""
    return [json.loads(line) for block in blocks(page, "json") for line in block.splitlines() if line.strip()]


def enough(rows: list[Row], column: str, change: Callable[[Any, int], Any]) -> list[Row]:
    """Return twelve rows, no two of them alike, for fewer are refused."""
    return [{**row, column: change(row[column], n)} for n in range(12) for row in [rows[n % len(rows)]]]


def in_words(text: str, number: int) -> str:
    return f"{text} ({number})"


def in_the_first_message(messages: list[dict[str, str]], number: int) -> list[dict[str, str]]:
    (first, *others) = messages
    return [{**first, "value": f"{first['value']} ({number})"}, *others]


def stored(rows: list[Row], config: RunConfig) -> None:
    """Write rows where a run reads them, as its offer says."""
    path = Path(config.data.path)
    if config.data.file_format == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        assert config.data.file_format == "jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


PAGES: list[tuple[str, str, Callable[[Any, int], Any], Callable[[RunConfig], Any], Callable[[Any], Any], list[Any]]] = [
    # Page, the column that makes rows differ, how; what reads them, what is looked at of each, and what that is.
    (
        "instruct",
        "question",
        in_words,
        read_instruct,
        lambda one: (one.system, one.user, one.answer),
        [
            ("You are a helpful assistant.", "What is a claim? (0)", "A request for storage."),
            ("You are a helpful assistant.", "Translate to German. (1)\ngood morning", "Guten Morgen"),
        ],
    ),
    (
        "chat",
        "conversations",
        in_the_first_message,
        read_chat,
        lambda one: [(message.role, message.content) for message in one.messages],
        [
            [("user", "Hi (0)"), ("assistant", "Hello! How can I help?")],
            [
                ("system", "Be brief. (1)"),
                ("user", "2+2?"),
                ("assistant", "4"),
                ("user", "And 3+3?"),
                ("assistant", "6"),
            ],
        ],
    ),
    (
        "dpo",
        "prompt",
        in_words,
        read_dpo,
        lambda one: (one.prompt, one.chosen, one.rejected),
        [("Is the earth flat? (0)", "No. It is nearly a ball.", "Yes.")],
    ),
    (
        "grpo",
        "question",
        in_words,
        read_grpo,
        lambda one: (one.text, one.extra),
        [("A pen costs 3 and a book 12. What do two pens and a book cost? (0)", "18")],
    ),
]


@pytest.mark.parametrize(("page", "column", "change", "read", "seen", "first"), PAGES, ids=[row[0] for row in PAGES])
def test_the_rows_of_a_page_are_read_as_its_offer_says(
    page: str,
    column: str,
    change: Callable[[Any, int], Any],
    read: Callable[[RunConfig], Any],
    seen: Callable[[Any], Any],
    first: list[Any],
    tmp_path: Path,
) -> None:
    config = run_of(page, tmp_path / "rows")
    stored(enough(rows_of(page), column, change), config)
    split = read(config)
    found = [seen(one) for one in (*split.train, *split.held_out)]
    assert len(found) == 12
    assert not split.left_out
    for one in first:
        assert one in found


def test_the_pictures_of_a_page_are_read_as_its_offer_says(tmp_path: Path) -> None:
    names = re.findall(r"\S+\.\S+", blocks("image", "text")[0])
    assert {Path(name).suffix for name in names} == {".png", ".jpg", ".jpeg", ".txt"}
    path = tmp_path / "pictures.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for copy in range(4):
            for number, name in enumerate(names):
                if name.endswith(".txt"):
                    archive.writestr(f"{copy}/{name}", "on a bicycle")
                    continue
                with archive.open(f"{copy}/{name}", "w") as file:
                    kind = "PNG" if name.endswith(".png") else "JPEG"
                    Image.new("RGB", (8, 8), (copy * 60, number * 20, 0)).save(file, kind)
    split = read_pair_split(run_of("image", path))
    pairs = [*split.train, *split.held_out]
    assert len(pairs) == 12
    assert {pair.caption for pair in pairs} == {"zorbo, on a bicycle"}


@pytest.mark.skipif(platform.machine() not in ARCHITECTURES, reason="THE SANDBOX KNOWS NO SUCH MACHINE")
def test_the_rewards_of_the_page_reward_what_they_say(tmp_path: Path) -> None:
    config = run_of("grpo", tmp_path / "rows")
    stored(enough(rows_of("grpo"), "question", in_words), config)
    prompts = read_grpo(config).train
    said = ["2 * 3 + 12 = 18", "It is 17."]
    with open_rewards(config, prompts) as rewards:
        found = rewards(Asked([prompts[0].text] * 2, said, [prompts[0].extra] * 2))
    assert rewards.weights == {"right": 0.6, "brief": 0.2, "shows-its-work": 0.2}
    assert found["right"] == [1.0, 0.0]
    assert found["shows-its-work"] == [1.0, 0.0]
    # Of forty words the first has four, and the second three.
    assert found["brief"] == pytest.approx([4 / 40, 3 / 40])
