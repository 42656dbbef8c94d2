"""A result reaches a bucket whatever its size, with no more rights than writing and reading, and as a whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from file_server import sha256
from taskoffer.api.contract import ExitCode, Published, SubmitConfig
from taskoffer_trainer import submit_files
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.interrupt import Interrupt
from taskoffer_trainer.submit_verify import Part

from .step_runs import Place

KEYS = "[default]\naws_access_key_id = AKIDEXAMPLE\naws_secret_access_key = secret\n"
PIECE = 1000
WEIGHTS = os.urandom(4 * PIECE + 500)


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Part]:
    """Weights that take five pieces, and a small file from memory."""
    monkeypatch.setattr(submit_files, "PIECE", PIECE)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(WEIGHTS)
    return [Part(path.name, len(WEIGHTS), sha256(WEIGHTS), path=path), Part.of("manifest.json", b"{}")]


def hand_over(place: Place, parts: list[Part]) -> Published:
    place.hub.buckets.setdefault("results", {})
    wire: dict[str, Any] = {
        "jobName": "job",
        "taskID": "task",
        "adapterDir": "/nowhere",
        "baseModel": "acme/tiny",
        "target": {"s3": {"url": "s3://results/one/", "endpoint": f"{place.hub.url}/s3"}},
        "network": place.config()["network"],
        "credentials": {"s3CredentialsFile": place.secret("aws", KEYS)},
    }
    config = SubmitConfig.model_validate(wire)
    assert config.target is not None
    assert config.target.s3 is not None
    return submit_files.to_bucket(config, config.target.s3, parts, Interrupt())


def test_a_large_file_goes_in_pieces_and_becomes_one_object(place: Place, parts: list[Part]) -> None:
    assert hand_over(place, parts).bytes == len(WEIGHTS) + 2
    assert place.hub.buckets["results"] == {"one/adapter_model.safetensors": WEIGHTS, "one/manifest.json": b"{}"}
    sizes = [int(one.headers["content-length"]) for one in place.hub.requests("PUT", "adapter_model")]
    assert sizes == [PIECE] * 4 + [500]
    assert place.hub.pieces == {}
    place.hub.asked.clear()
    hand_over(place, parts)
    assert not place.hub.requests("PUT", "") + place.hub.requests("POST", "")


def test_of_pieces_only_the_one_that_breaks_is_sent_again(place: Place, parts: list[Part]) -> None:
    # The look at what is there, the beginning, and then the second piece.
    place.hub.faults.statuses = [0, 0, 0, 503]
    hand_over(place, parts)
    numbers = [one.query["partNumber"][0] for one in place.hub.requests("PUT", "adapter_model")]
    assert numbers == ["1", "2", "2", "3", "4", "5"]


def test_pieces_that_were_put_together_without_word_of_it_are_not_taken_for_lost(
    place: Place, parts: list[Part]
) -> None:
    place.hub.faults.lose_answers = 1
    hand_over(place, parts)
    assert place.hub.buckets["results"]["one/adapter_model.safetensors"] == WEIGHTS


def test_an_upload_in_pieces_that_fails_leaves_none_of_them(place: Place, parts: list[Part]) -> None:
    place.hub.faults.statuses = [0, 0, 0, 503, 503, 503]
    with pytest.raises(TrainerError) as caught:
        hand_over(place, parts)
    assert (caught.value.code, caught.value.reason) == (ExitCode.RESTART, "NetworkFailed")
    assert place.hub.requests("DELETE", "adapter_model")
    assert place.hub.pieces == {}
    assert place.hub.buckets["results"] == {}


def test_a_key_that_may_write_and_read_and_not_list_is_enough(place: Place, parts: list[Part]) -> None:
    place.hub.faults.unlisted = True
    hand_over(place, parts)
    assert place.hub.buckets["results"].keys() == {"one/adapter_model.safetensors", "one/manifest.json"}
