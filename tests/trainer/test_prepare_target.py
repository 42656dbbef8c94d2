"""Where a result may not be written is told before anything is fetched, and nothing is left where it was asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from file_server import WebFile
from taskoffer.api.contract import ExitCode

from .step_runs import SECONDS, Place, web

TOKEN = "hf_token"
REPOSITORY = "miner/0b8f"
KEYS = "[default]\naws_access_key_id = AKIDEXAMPLE\naws_secret_access_key = secret\n"
OTHER_KEYS = KEYS.replace("AKIDEXAMPLE", "AKIDOTHER")


def who(name: str = "miner", role: str = "write", orgs: tuple[str, ...] = (), **token: Any) -> dict[str, Any]:
    """An answer of whoami-v2."""
    about = {"type": "access_token", "accessToken": {"displayName": "taskoffer", "role": role, **token}}
    return {"type": "user", "name": name, "orgs": [{"type": "org", "name": org} for org in orgs], "auth": about}


def scoped(*permissions: str) -> dict[str, Any]:
    entity = {"type": "user", "name": "miner"}
    return {"fineGrained": {"global": [], "scoped": [{"entity": entity, "permissions": list(permissions)}]}}


@pytest.fixture
def rows(place: Place) -> Place:
    """A web server with rows to fetch, and a hub that knows the token and whose it is."""
    place.hub.files["rows"] = WebFile(b'{"a": 1}\n', '"v1"')
    place.hub.token, place.hub.who = TOKEN, who()
    return place


def fetch(place: Place) -> dict[str, Any]:
    return web(f"{place.hub.url}/files/rows")


def to_hub(place: Place, *, token: str = TOKEN, **target: Any) -> dict[str, Any]:
    return {
        "target": {"hub": {"repository": REPOSITORY, **target}},
        "credentials": {"hubTokenFile": place.secret("token", token)},
    }


def to_store(place: Place, keys: str = KEYS, bucket: str = "results") -> dict[str, Any]:
    return {
        "target": {"s3": {"url": f"s3://{bucket}/one/", "endpoint": f"{place.hub.url}/s3"}},
        "credentials": {"s3CredentialsFile": place.secret("aws", keys)},
    }


def untouched(place: Place) -> bool:
    """Whether nothing was fetched, created or left behind."""
    changed = [one.path for one in place.hub.asked if one.method != "GET" and "/s3/" not in one.path]
    empty = not any(place.hub.buckets.values()) and not place.hub.pieces
    return empty and not changed and not place.hub.requests("GET", "/files/") and not place.item().exists()


GRANTED: list[tuple[str, dict[str, Any] | None, str]] = [
    # Whose the token is, None for a hub that does not tell; and what is said of a repository that is not there yet.
    ("its owner's", who(), "is not there yet, and will be created; nothing speaks against writing to it"),
    ("of an organization", who("alice", orgs=("other", "Miner")), "nothing speaks against"),
    ("a fine-grained one", who(role="fineGrained", **scoped("repo.content.read", "repo.write")), "nothing speaks"),
    ("of an app", {"type": "app", "name": "ci", "auth": {"type": "app"}}, "nothing speaks against"),
    ("unknown", None, "nothing speaks against"),
    ("odd", {"auth": "x", "orgs": 3, "name": None}, "nothing speaks against"),
    ("odder", who(fineGrained={"scoped": ["x", {"permissions": 1}]}), "nothing speaks against"),
]
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("for reading", who(role="read"), "the token of miner is one for reading"),
    ("too fine", who(role="fineGrained", **scoped("repo.content.read")), "a fine-grained one without repo.write"),
    ("of a stranger", who("bob", orgs=("bobs",)), "that of bob, who is no member of miner"),
]


@pytest.mark.parametrize(("what", "answer", "said"), GRANTED, ids=[row[0] for row in GRANTED])
def test_what_a_token_may_create_is_fetched_for(
    what: str, answer: dict[str, Any] | None, said: str, rows: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    rows.hub.who = answer
    assert rows.prepare(fetch(rows), **to_hub(rows)).exit_code == 0
    assert said in capsys.readouterr().out, what
    assert REPOSITORY not in rows.hub.repositories


@pytest.mark.parametrize(("what", "answer", "why"), REFUSED, ids=[row[0] for row in REFUSED])
def test_a_repository_that_a_token_cannot_create_is_refused_before_anything_is_fetched(
    what: str, answer: dict[str, Any], why: str, rows: Place
) -> None:
    rows.hub.who = answer
    error = rows.refusal(fetch(rows), **to_hub(rows))
    assert (error.code, error.reason) == (ExitCode.NO_ACCESS, "AccessDenied"), what
    assert f"the result could not be handed over: {REPOSITORY}: " in error.message
    assert why in error.message
    assert "credentials.hubTokenFile" in error.message
    assert TOKEN not in error.message
    assert untouched(rows)


def test_a_repository_that_the_token_may_only_read_is_refused(rows: Place) -> None:
    rows.hub.add(REPOSITORY, {"README.md": b""}, private=True)
    assert rows.prepare(fetch(rows), **to_hub(rows)).exit_code == 0
    rows.hub.read_only = {REPOSITORY}
    rows.hub.asked.clear()
    error = rows.refusal(fetch(rows), jobName="other", **to_hub(rows))
    assert (error.code, error.reason) == (ExitCode.NO_ACCESS, "AccessDenied")
    assert f"writing to {REPOSITORY} answered 403" in error.message
    # A hub that does not know the question leaves it to the hand-over.
    rows.hub.who = None
    assert rows.prepare(fetch(rows), jobName="other", **to_hub(rows)).exit_code == 0


def test_a_token_that_the_hub_does_not_know_is_refused(rows: Place) -> None:
    error = rows.refusal(fetch(rows), **to_hub(rows, token="hf_gone"))
    assert (error.code, error.reason) == (ExitCode.NO_ACCESS, "AccessDenied")
    assert "Invalid credentials" in error.message
    assert untouched(rows)


MEANT: list[tuple[str, dict[str, str], str, str]] = [
    # What is there, the names that the hub has given anew, and how it is refused.
    ("public", {}, "RepositoryPublic", "exists and is public"),
    ("private", {REPOSITORY: "Miner/0b8f"}, "NameMismatch", "knows miner/0b8f as Miner/0b8f"),
]


@pytest.mark.parametrize(("kind", "renamed", "reason", "why"), MEANT, ids=[row[2] for row in MEANT])
def test_a_repository_other_than_the_one_that_is_meant_is_refused(
    kind: str, renamed: dict[str, str], reason: str, why: str, rows: Place
) -> None:
    rows.hub.add(REPOSITORY, {"README.md": b""}, private=kind == "private")
    rows.hub.renamed = renamed
    error = rows.refusal(fetch(rows), **to_hub(rows))
    assert (error.code, error.reason) == (ExitCode.BAD_CONFIG, reason)
    assert why in error.message
    assert untouched(rows)


@pytest.mark.parametrize("target", [to_hub, to_store], ids=["hub", "store"])
def test_a_place_that_does_not_answer_now_is_left_to_the_hand_over(
    target: Callable[[Place], dict[str, Any]], rows: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    rows.hub.buckets["results"] = {}
    # The hub's library asks for something else first, once in a process.
    rows.prepare(fetch(rows), jobName="before", **target(rows))
    rows.hub.faults.statuses = [503] * rows.config()["network"]["tries"]
    assert rows.prepare(fetch(rows), **target(rows)).exit_code == 0
    assert "whether the result can be handed over shows later" in capsys.readouterr().out


def test_of_a_store_an_upload_is_begun_and_given_up(rows: Place, capsys: pytest.CaptureFixture[str]) -> None:
    rows.hub.buckets["results"] = {}
    assert rows.prepare(fetch(rows), **to_store(rows)).exit_code == 0
    assert "s3://results/one/: the key may write there" in capsys.readouterr().out
    assert [one.method for one in rows.hub.asked if "/s3/results/one/" in one.path] == ["POST", "DELETE"]
    assert (rows.hub.buckets["results"], rows.hub.pieces) == ({}, {})


STORES: list[tuple[str, str, str, ExitCode, str, str]] = [
    # The key, the bucket, and how it is refused.
    ("key", OTHER_KEYS, "results", ExitCode.NO_ACCESS, "AccessDenied", "check credentials.s3CredentialsFile"),
    ("rights", KEYS, "archive", ExitCode.NO_ACCESS, "AccessDenied", "the store answered 403"),
    ("bucket", KEYS, "gone", ExitCode.BAD_CONFIG, "BucketMissing", "there is no bucket gone"),
]


@pytest.mark.parametrize(("what", "keys", "bucket", "code", "reason", "why"), STORES, ids=[row[0] for row in STORES])
def test_a_bucket_that_takes_nothing_is_refused_before_anything_is_fetched(
    what: str, keys: str, bucket: str, code: ExitCode, reason: str, why: str, rows: Place
) -> None:
    rows.hub.buckets |= {"results": {}, "archive": {}}
    rows.hub.read_only = {"archive"}
    error = rows.refusal(fetch(rows), **to_store(rows, keys, bucket))
    assert (error.code, error.reason) == (code, reason), what
    assert "the result could not be handed over" in error.message
    assert why in error.message
    assert untouched(rows)


def test_a_store_without_uploads_in_pieces_leaves_it_to_the_hand_over(
    rows: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    rows.hub.buckets["results"] = {}
    rows.hub.faults.statuses = [405]
    assert rows.prepare(fetch(rows), **to_store(rows)).exit_code == 0
    assert "shows later: the store does not say" in capsys.readouterr().out


def test_a_target_without_its_secret_is_a_bad_configuration(rows: Place) -> None:
    for target in (to_hub(rows), to_store(rows)):
        error = rows.refusal(fetch(rows), target=target["target"])
        assert (error.code, error.reason) == (ExitCode.BAD_CONFIG, "SecretMissing")


def test_a_task_whose_parts_lie_on_claims_is_asked_about_its_target_alone(rows: Place) -> None:
    ended = rows.prepare(**to_hub(rows))
    assert (ended.exit_code, ended.fetched) == (0, ())
    rows.hub.who = who(role="read")
    assert rows.refusal(**to_hub(rows)).code == ExitCode.NO_ACCESS


def test_the_check_of_a_configuration_asks_as_well(rows: Place) -> None:
    rows.hub.who = who(role="read")
    config = rows.config(fetch(rows), **to_hub(rows))
    step = rows.start("prepare", config, "--check")
    assert step.wait(SECONDS) == ExitCode.NO_ACCESS
    assert "one for reading" in rows.log()
    rows.hub.who = who()
    step = rows.start("prepare", config, "--check")
    assert step.wait(SECONDS) == ExitCode.DONE
    assert "ready to fetch data" in rows.log()
