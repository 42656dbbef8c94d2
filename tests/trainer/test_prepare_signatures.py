"""Requests to an object store are signed as AWS's own examples are."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from taskoffer.api.contract import BucketFiles, Credentials
from taskoffer_trainer.buckets import EMPTY_SHA256, Bucket, Keys, read_keys, sign
from taskoffer_trainer.failures import TrainerError

from .step_runs import Place

KEYS = Keys("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
MOMENT = datetime(2013, 5, 24, tzinfo=UTC)
HOST = "https://examplebucket.s3.amazonaws.com"
# Amazon S3 API reference, "Examples: Signature Calculations" (Authorization header).
EXAMPLES = [
    (
        "GET",
        f"{HOST}/test.txt",
        {"Range": "bytes=0-9"},
        EMPTY_SHA256,
        "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41",
    ),
    (
        "PUT",
        f"{HOST}/test%24file.text",
        {"Date": "Fri, 24 May 2013 00:00:00 GMT", "x-amz-storage-class": "REDUCED_REDUNDANCY"},
        "44ce7dd67c959e0d3524ffac1771dfbba87d2b6b4b4e99e42034a8b803f8b072",
        "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd",
    ),
    (
        "GET",
        f"{HOST}/?lifecycle",
        {},
        EMPTY_SHA256,
        "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543",
    ),
    (
        "GET",
        f"{HOST}/?max-keys=2&prefix=J",
        {},
        EMPTY_SHA256,
        "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7",
    ),
]


@pytest.mark.parametrize(("method", "url", "headers", "payload", "signature"), EXAMPLES, ids=[c[1] for c in EXAMPLES])
def test_a_request_is_signed_as_in_the_reference(
    method: str, url: str, headers: dict[str, str], payload: str, signature: str
) -> None:
    signed = sign(method, url, headers, payload, KEYS, "us-east-1", MOMENT)
    assert signed["authorization"].endswith(f"Signature={signature}")
    assert "Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request" in signed["authorization"]


def test_the_secret_key_is_in_no_text(place: Place) -> None:
    text = "[default]\naws_access_key_id = a\naws_secret_access_key = topsecret\naws_session_token = more\n"
    keys = read_keys(Credentials(s3_credentials_file=place.secret("aws", text)))
    assert keys is not None
    assert keys.secret_key == "topsecret"
    assert "topsecret" not in repr(keys) + str(keys)
    signed = sign("GET", HOST, {}, EMPTY_SHA256, keys, "us-east-1", MOMENT)
    assert signed["x-amz-security-token"] == "more"
    assert "topsecret" not in str(signed)
    for broken in ("[other]\n", "topsecret", "[default]\naws_access_key_id = a\n"):
        with pytest.raises(TrainerError) as caught:
            read_keys(Credentials(s3_credentials_file=place.secret("aws", broken)))
        assert caught.value.reason == "SecretUnreadable"
        assert "topsecret" not in caught.value.message


def test_another_store_is_addressed_by_path_and_asked_anonymously_without_keys() -> None:
    files = BucketFiles(url="s3://my-bucket/k", endpoint="http://minio:9000/", region="eu-west-1")
    bucket = Bucket.of(files, None)
    assert bucket.url(bucket.prefix) == "http://minio:9000/my-bucket/k"
    assert bucket.headers("GET", bucket.url("k")) == {}


def test_a_key_is_quoted_for_its_address() -> None:
    bucket = Bucket.of(BucketFiles(url="s3://my-bucket/a/"), None)
    assert bucket.url("a/b c+ü~.json") == "https://my-bucket.s3.us-east-1.amazonaws.com/a/b%20c%2B%C3%BC~.json"


def test_a_bucket_of_aws_with_a_dot_in_its_name_is_addressed_by_path() -> None:
    """The certificate of AWS is for one name before its own."""
    bucket = Bucket.of(BucketFiles(url="s3://models.example.com/a/", region="eu-west-1"), None)
    assert bucket.url("a/b.json") == "https://s3.eu-west-1.amazonaws.com/models.example.com/a/b.json"
