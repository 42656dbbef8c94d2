"""What the prepare step brings from a bucket: of AWS or another store, signed for the right region."""

from __future__ import annotations

from typing import Any

import pytest

from taskoffer.api.contract import ExitCode
from taskoffer_trainer.buckets import _parse_page

from .conftest import merge
from .step_runs import Place, contents

KEYS = "[default]\naws_access_key_id = AKIDEXAMPLE\naws_secret_access_key = secret\n"


def bucket_item(place: Place, key: str, **changes: Any) -> dict[str, Any]:
    source = {"s3": {"url": f"s3://rows/{key}", "endpoint": f"{place.hub.url}/s3"}}
    return merge({"name": "data", "kind": "data", "source": source}, changes)


def test_an_object_and_a_prefix_of_a_bucket_come_signed(place: Place) -> None:
    rows = {f"set-one/part-{n}.jsonl": b"row %d\n" % n for n in range(7)}
    place.hub.buckets["rows"] = {**rows, "set-one/readme+.md": b"no", "set-two/x.jsonl": b"x"}
    signed = {"credentials": {"s3CredentialsFile": place.secret("aws", KEYS)}}
    place.prepare(bucket_item(place, "set-one/", fileFormat="jsonl"), **signed)
    assert contents(place.item()) == {f"part-{n}.jsonl": b"row %d\n" % n for n in range(7)}
    place.prepare(bucket_item(place, "set-one/readme+.md"), jobName="other", **signed)
    assert contents(place.item(job="other")) == {"data": b"no"}
    denied = place.refusal(bucket_item(place, "set-one/"), jobName="third")
    assert (denied.code, denied.reason) == (ExitCode.NO_ACCESS, "AccessDenied")
    nothing = place.refusal(bucket_item(place, "set-nine/"), jobName="third", **signed)
    assert (nothing.code, nothing.reason) == (ExitCode.BAD_DATA, "NothingToFetch")
    gone = place.refusal(bucket_item(place, "set-one/gone.jsonl"), jobName="third", **signed)
    assert (gone.code, gone.reason, "NoSuchKey" in gone.message) == (ExitCode.BAD_DATA, "NotFound", True)


def test_a_store_that_the_policy_names_may_be_one_of_the_cluster(place: Place) -> None:
    place.hub.buckets["rows"] = {"a.jsonl": b"1"}
    signed = {"credentials": {"s3CredentialsFile": place.secret("aws", KEYS)}}
    closed = {"network": {"allowHttp": False, "allowPrivateAddresses": False}}
    place.prepare(bucket_item(place, "a.jsonl"), **signed, **closed)
    assert contents(place.item()) == {"data": b"1"}


REGIONS: list[tuple[str, tuple[int, str], list[str]]] = [
    (key, answer, words)
    for key in ("set/", "set/a.jsonl")
    for answer, words in (
        ((301, "PermanentRedirect"), ["in region eu-central-1", "s3Region of the policy to eu-central-1", "us-east-1"]),
        ((400, "AuthorizationHeaderMalformed"), ["in region eu-central-1", "s3Region of the policy to eu-central-1"]),
    )
]


@pytest.mark.parametrize(("key", "answer", "words"), REGIONS, ids=[f"{c[0]} {c[1][0]}" for c in REGIONS])
def test_a_bucket_of_another_region_is_named_with_the_field_that_says_it(
    key: str, answer: tuple[int, str], words: list[str], place: Place
) -> None:
    place.hub.buckets["rows"] = {"set/a.jsonl": b"1"}
    place.hub.region, place.hub.region_answer = "eu-central-1", answer
    signed = {"credentials": {"s3CredentialsFile": place.secret("aws", KEYS)}}
    error = place.refusal(bucket_item(place, key), **signed)
    assert (error.code, error.reason) == (ExitCode.BAD_CONFIG, "WrongRegion"), error.message
    for word in ["bucket rows", *words]:
        assert word in error.message
    right = bucket_item(place, key, source={"s3": {"region": "eu-central-1"}})
    place.prepare(right, **signed)
    assert list(contents(place.item()).values()) == [b"1"]


@pytest.mark.parametrize("more", ["", "<NextMarker>part-1</NextMarker>"])
def test_a_list_that_ends_in_the_middle_is_not_taken_for_all(more: str) -> None:
    """As a store answers that knows only the first version of such lists."""
    entry = "<Contents><Key>part-1</Key><Size>1</Size><ETag>e</ETag></Contents>"
    with pytest.raises(ValueError, match="goes on and does not say where"):
        _parse_page(f"<L>{entry}<IsTruncated>true</IsTruncated>{more}</L>".encode())
    assert [one.key for one in _parse_page(f"<L>{entry}</L>".encode())[0]] == ["part-1"]
