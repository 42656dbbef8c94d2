"""The adapter's half of the ledger's rules: which errors are definite, and what exactly goes over the wire."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from builders import make_offer
from taskoffer.adapters.kube import (
    BATCH_JOBS,
    NODES,
    OFFERS,
    ApiError,
    ConflictError,
    Kube,
    NotFoundError,
    ThrottledError,
    UnknownOutcomeError,
    proxy_for,
)

OFFER = "/apis/taskoffer.dev/v1alpha1/namespaces/default/taskoffers/a"


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, ApiError),
        (403, ApiError),
        (404, NotFoundError),
        (409, ConflictError),
        (422, ApiError),
        (429, ThrottledError),
        (500, UnknownOutcomeError),
        (503, UnknownOutcomeError),
        (504, UnknownOutcomeError),
    ],
)
async def test_only_an_answer_below_500_is_definite(
    kmock: Any, kube: Kube, status: int, error: type[Exception]
) -> None:
    kmock[f"patch {OFFER}/status"] << status
    with pytest.raises(error) as found:
        await kube.patch_status(OFFERS, "default", "a", {"status": {}})
    assert type(found.value) is error


async def test_a_refusal_carries_the_servers_reason_and_message(kmock: Any, kube: Kube) -> None:
    kmock[f"get {OFFER}"] << 422 << {"reason": "Invalid", "message": "spec.model.name must not be blank"}
    with pytest.raises(ApiError, match=r"422 Invalid: spec\.model\.name must not be blank"):
        await kube.get(OFFERS, "default", "a")


@pytest.mark.parametrize("body", [b"<html>nginx</html>", b'["a list"]', b'"a text"', b"null", b""])
async def test_an_answer_that_is_no_status_object_is_an_error_all_the_same(kmock: Any, kube: Kube, body: bytes) -> None:
    kmock[f"get {OFFER}"] << 403 << body
    with pytest.raises(ApiError) as found:
        await kube.get(OFFERS, "default", "a")
    assert found.value.status == 403


@pytest.mark.parametrize(("header", "seconds"), [("7", 7.0), (None, 1.0), ("Wed, 21 Oct 2026 07:28:00 GMT", 1.0)])
async def test_a_throttled_request_says_when_to_come_back(
    kmock: Any, kube: Kube, header: str | None, seconds: float
) -> None:
    kmock[f"get {OFFER}"] << 429 << ({} if header is None else kmock.headers({"Retry-After": header}))
    with pytest.raises(ThrottledError) as found:
        await kube.get(OFFERS, "default", "a")
    assert found.value.retry_after == seconds


async def test_a_server_that_does_not_answer_leaves_the_outcome_unknown(kmock: Any, kube: Kube) -> None:
    async def never(_: Any) -> None:
        await asyncio.sleep(30)

    kmock[f"patch {OFFER}/status"] << never
    kube.timeout = 0.3
    started = asyncio.get_running_loop().time()
    with pytest.raises(UnknownOutcomeError):
        await kube.patch_status(OFFERS, "default", "a", {"status": {}})
    assert asyncio.get_running_loop().time() - started < 10


async def test_a_server_that_is_not_there_leaves_the_outcome_unknown(unused_tcp_port: int, tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{name: c, context: {cluster: c, user: u}}]\n"
        f"clusters: [{{name: c, cluster: {{server: 'http://127.0.0.1:{unused_tcp_port}'}}}}]\n"
        "users: [{name: u, user: {token: t}}]\n",
        encoding="utf-8",
    )
    kube = await Kube.connect(path, timeout=1)
    try:
        with pytest.raises(UnknownOutcomeError):
            await kube.get(NODES, None, "n")
    finally:
        await kube.close()


async def test_a_status_patch_is_a_merge_patch_on_the_subresource(kmock: Any, kube: Kube) -> None:
    made = kmock.put("taskoffer.dev/v1alpha1/taskoffers", make_offer(name="a"))
    version = made["metadata"]["resourceVersion"]
    patch = {"metadata": {"resourceVersion": version}, "spec": {"taskID": "x"}, "status": {"score": "1"}}
    answer = await kube.patch_status(OFFERS, "default", "a", patch)
    assert answer["status"] == {"score": "1"}
    assert answer["spec"]["taskID"] == "a"
    request = list(kmock["patch"])[-1]
    assert str(request.url.path) == f"{OFFER}/status"
    assert request.headers["Content-Type"] == "application/merge-patch+json"
    with pytest.raises(ConflictError):
        await kube.patch_status(OFFERS, "default", "a", patch)


async def test_credentials_of_the_kubeconfig_are_sent(kmock: Any, kubeconfig: Path) -> None:
    kube = await Kube.connect(kubeconfig)
    try:
        await kube.list(NODES)
    finally:
        await kube.close()
    assert list(kmock["get"])[-1].headers["Authorization"] == "Bearer secret"


async def test_a_long_list_is_read_page_by_page(kmock: Any, kube: Kube) -> None:
    def page(request: Any) -> dict[str, Any]:
        assert request.params["limit"] == "500"
        assert request.params["labelSelector"] == "a=b"
        if "continue" not in request.params:
            return {"metadata": {"resourceVersion": "9", "continue": "next"}, "items": [{"n": 1}]}
        assert request.params["continue"] == "next"
        return {"metadata": {"resourceVersion": "9"}, "items": [{"n": 2}]}

    kmock["get /api/v1/nodes"] << page
    assert await kube.list(NODES, label_selector="a=b") == ([{"n": 1}, {"n": 2}], "9")


async def test_an_empty_list_may_carry_null(kmock: Any, kube: Kube) -> None:
    kmock["get /api/v1/nodes"] << {"metadata": {"resourceVersion": "9"}, "items": None}
    assert await kube.list(NODES) == ([], "9")


async def test_a_deletion_names_the_very_object_and_takes_what_it_owns_along(kmock: Any, kube: Kube) -> None:
    kmock.put("batch/v1/jobs", {"metadata": {"name": "j", "namespace": "default", "uid": "u1"}})
    with pytest.raises(ConflictError):
        await kube.delete(BATCH_JOBS, "default", "j", uid="another")
    await kube.delete(BATCH_JOBS, "default", "j", uid="u1")
    assert list(kmock["delete"])[-1].data == {
        "kind": "DeleteOptions",
        "apiVersion": "v1",
        "propagationPolicy": "Background",
        "preconditions": {"uid": "u1"},
    }
    with pytest.raises(NotFoundError):
        await kube.get(BATCH_JOBS, "default", "j")


async def test_the_end_of_a_log_is_bounded(kmock: Any, kube: Kube) -> None:
    kmock["get /api/v1/namespaces/default/pods/p/log"] << b"last \xff words"
    assert await kube.log_tail("default", "p", "trainer", lines=12) == "last � words"
    params = list(kmock["get"])[-1].params
    assert (params["tailLines"], params["limitBytes"], params["container"]) == ("12", "16384", "trainer")


async def test_a_name_that_is_taken_is_a_conflict(kmock: Any, kube: Kube) -> None:
    await kube.create(OFFERS, "default", make_offer(name="a"))
    with pytest.raises(ConflictError, match="already exists"):
        await kube.create(OFFERS, "default", make_offer(name="a"))


@pytest.mark.parametrize(
    ("environment", "proxy"),
    [
        ({}, None),
        ({"https_proxy": "http://proxy:3128"}, "http://proxy:3128"),
        ({"https_proxy": "http://proxy:3128", "no_proxy": "10.0.0.1"}, None),
        ({"https_proxy": "http://proxy:3128", "no_proxy": "example.com"}, "http://proxy:3128"),
        ({"http_proxy": "http://proxy:3128"}, None),
    ],
)
def test_a_proxy_of_the_environment_is_used_unless_the_server_is_excepted(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], proxy: str | None
) -> None:
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert proxy_for("https://10.0.0.1:6443") == proxy
