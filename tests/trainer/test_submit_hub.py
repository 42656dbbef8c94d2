"""A result reaches a hub whatever its size, its card and its name are, and whatever the hub says meanwhile."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from file_server import sha256
from taskoffer.api.contract import ExitCode, Published, SubmitConfig
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.interrupt import Interrupt
from taskoffer_trainer.submit_hub import to_hub
from taskoffer_trainer.submit_verify import Part

from .step_runs import Place

TOKEN = "hf_write"
REPOSITORY = "miner/0b8f"
CARD = '---\nbase_model: "{}"\ndatasets:\n- /cache/rows.json\n---\n# Mine\n'


def hand_over(place: Place, base_model: str = "acme/tiny", repository: str = REPOSITORY, *more: Part) -> Published:
    place.hub.token = TOKEN
    card = CARD.format(base_model).encode()
    about = {"files": {"README.md": {"bytes": len(card), "sha256": sha256(card)}}, "step": 3}
    parts = [Part.of("README.md", card), Part.of("manifest.json", json.dumps(about).encode()), *more]
    wire: dict[str, Any] = {
        "jobName": "job",
        "taskID": "task",
        "adapterDir": "/nowhere",
        "baseModel": base_model,
        "target": {"hub": {"repository": repository}},
        "network": place.config()["network"],
        "credentials": {"hubTokenFile": place.secret("token", TOKEN)},
    }
    config = SubmitConfig.model_validate(wire)
    assert config.target is not None
    assert config.target.hub is not None
    return to_hub(config, config.target.hub, parts, Interrupt())


REFUSED: list[tuple[str, tuple[str, ...], str, str]] = [
    # What the hub does not take, the base model, and how the card begins that arrives.
    ("a data set", ("/cache/rows.json",), "acme/tiny", '---\nbase_model: "acme/tiny"\nlibrary_name: peft\n---\n'),
    ("the base model", ("Our Model", "/cache"), "Our Model v2", "Base model: Our Model v2\n\n# Mine\n"),
]


@pytest.mark.parametrize(("what", "words", "base_model", "begin"), REFUSED, ids=[row[0] for row in REFUSED])
def test_a_card_that_the_hub_refuses_arrives_with_less_in_its_front_matter(
    what: str, words: tuple[str, ...], base_model: str, begin: str, place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    place.hub.refused_in_cards = words
    first = hand_over(place, base_model)
    files = place.hub.repositories[REPOSITORY].head
    card = files["README.md"].decode()
    assert card.startswith(begin), what
    assert card.endswith("# Mine\n")
    manifest = json.loads(files["manifest.json"])
    assert (manifest["files"]["README.md"], manifest["step"]) == (
        {"bytes": len(files["README.md"]), "sha256": sha256(files["README.md"])},
        3,
    )
    assert "is not valid.; it goes with less in its front matter" in capfd.readouterr().out
    # Once more: nothing is lacking, and nothing is committed.
    assert hand_over(place, base_model) == first


def test_a_card_that_is_refused_without_any_front_matter_ends_the_step_with_the_hubs_words(place: Place) -> None:
    place.hub.refused_in_cards = ("",)
    with pytest.raises(TrainerError, match="Invalid metadata in README") as caught:
        hand_over(place)
    assert (caught.value.code, caught.value.reason) == (ExitCode.VERIFY_FAILED, "CardRefused")


def test_a_page_in_the_place_of_an_answer_is_a_hub_that_is_down_for_a_moment(place: Place) -> None:
    hand_over(place, repository="miner/other")
    # The library looks for agents once in a process.
    asked = [one.path for one in place.hub.asked if "agent" not in one.path]
    place.hub.faults.statuses = [0] * asked.index("/api/validate-yaml") + [503]
    hand_over(place)
    assert place.hub.repositories[REPOSITORY].head.keys() >= {"README.md", "manifest.json"}


def test_a_name_that_no_repository_can_have_is_a_refusal_with_its_reason(place: Place) -> None:
    with pytest.raises(TrainerError, match="Cannot have -- or") as caught:
        hand_over(place, repository="miner/a--b")
    assert (caught.value.code, caught.value.reason) == (ExitCode.VERIFY_FAILED, "SubmitRefused")


def test_a_large_file_goes_in_the_pieces_that_the_hub_asks_for(place: Place, tmp_path: Path) -> None:
    weights, path = os.urandom(5500), tmp_path / "adapter_model.safetensors"
    path.write_bytes(weights)
    place.hub.lfs_piece = 1000
    hand_over(place, "acme/tiny", REPOSITORY, Part(path.name, len(weights), sha256(weights), path=path))
    assert place.hub.repositories[REPOSITORY].head[path.name] == weights
    pieces = place.hub.requests("PUT", "/part/")
    assert [int(one.headers["content-length"]) for one in pieces] == [1000] * 5 + [500]
    assert not [one for one in pieces if "authorization" in one.headers]
