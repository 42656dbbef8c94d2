"""Where an offer's address may make the step go: not into the cluster, neither directly nor by a redirect."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from file_server import WebFile
from taskoffer.api.contract import ExitCode, NetworkSettings
from taskoffer_trainer import addresses
from taskoffer_trainer.addresses import check_address
from taskoffer_trainer.failures import TrainerError

from .step_runs import Place, contents, web

ADDRESSES = [
    ("http://example.com/x", {}, "is not https"),
    ("http://169.254.169.254/latest/meta-data", {"allow_http": True}, "169.254.169.254, which is not public"),
    ("https://127.0.0.1/x", {}, "not public"),
    ("https://[::1]/x", {}, "not public"),
    ("https://[::ffff:10.0.0.1]/x", {}, "10.0.0.1"),
    ("https://[64:ff9b::a9fe:a9fe]/x", {}, "169.254.169.254 (as 64:ff9b::a9fe:a9fe)"),
    ("https://[64:ff9b:1::a00:1]/x", {}, "10.0.0.1"),
    ("https://[2002:a9fe:a9fe::1]/x", {}, "169.254.169.254"),
    ("https://[::169.254.169.254]/x", {}, "169.254.169.254"),
    ("https://[fe80::1]/x", {}, "not public"),
    ("https://2852039166/x", {}, "169.254.169.254"),
    ("https://10.96.0.1/api", {}, "not public"),
    ("https://localhost/x", {}, "not public"),
    ("ftp://example.com/x", {"allow_http": True}, "is not https"),
    ("https:///x", {}, "names no host"),
]


@pytest.mark.parametrize(("url", "network", "words"), ADDRESSES, ids=[case[0] for case in ADDRESSES])
def test_an_offer_cannot_make_the_step_talk_to_the_cluster(url: str, network: dict[str, Any], words: str) -> None:
    with pytest.raises(TrainerError, match=re.escape(words)) as caught:
        check_address(url, NetworkSettings(**network))
    assert (caught.value.code, caught.value.reason) == (ExitCode.BAD_CONFIG, "AddressRefused")


@pytest.mark.parametrize("url", ["https://[2606:4700::1111]/x", "https://[64:ff9b::808:808]/x", "https://8.8.8.8/x"])
def test_an_address_that_leads_to_a_public_one_is_taken(url: str) -> None:
    check_address(url, NetworkSettings())


PROXIED = [
    ("https://localhost/x", "localhost,127.0.0.1", "not public"),
    ("https://localhost/x", "*", "not public"),
    ("https://api.localhost/x", ".localhost", "not public"),
    ("https://api.localhost/x", "https://*.localhost:443", "not public"),
    ("https://10.0.0.1/x", "", "not public"),
    ("https://2852039166/x", "", "not public"),
    # Only the proxy can know what these names stand for.
    ("https://localhost/x", "", None),
    ("https://localhost/x", "host,.example.com", None),
]


@pytest.mark.parametrize("proxy", ["HTTPS_PROXY", "ALL_PROXY"])
@pytest.mark.parametrize(("url", "direct", "words"), PROXIED, ids=[f"{c[0]} {c[1]}" for c in PROXIED])
def test_a_proxy_is_trusted_with_what_goes_through_it_alone(
    url: str, direct: str, words: str | None, proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(addresses.socket, "getaddrinfo", _resolved_to("127.0.0.1", ("localhost", "api.localhost")))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv(proxy, "http://proxy.test:3128")
    monkeypatch.setenv("NO_PROXY", direct)
    if words is None:
        check_address(url, NetworkSettings())
        return
    with pytest.raises(TrainerError, match=re.escape(words)):
        check_address(url, NetworkSettings())


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (socket.EAI_NONAME, ExitCode.BAD_CONFIG),
        (socket.EAI_NODATA, ExitCode.BAD_CONFIG),
        (socket.EAI_AGAIN, ExitCode.RESTART),
        (socket.EAI_FAIL, ExitCode.RESTART),
    ],
)
def test_a_name_that_does_not_exist_is_not_waited_for(
    number: int, code: ExitCode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look_up(*_arguments: Any, **_options: Any) -> Any:
        raise socket.gaierror(number, "said by the resolver")

    monkeypatch.setattr(addresses.socket, "getaddrinfo", look_up)
    with pytest.raises(TrainerError, match=r"nowhere\.test: said by the resolver") as caught:
        check_address("https://nowhere.test/x", NetworkSettings())
    assert (caught.value.code, caught.value.reason) == (code, "HostUnknown")


def _resolved_to(address: str, names: tuple[str, ...]) -> Callable[..., Any]:
    """A resolver that knows names of the tests; addresses in digits mean what they always mean."""
    real = socket.getaddrinfo

    def look_up(host: str, port: Any, *rest: Any, **options: Any) -> Any:
        if host in names and not options.get("flags", 0) & socket.AI_NUMERICHOST:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]
        return real(host, port, *rest, **options)

    return look_up


def test_a_redirect_is_followed_to_where_the_step_may_go(place: Place) -> None:
    place.hub.files["rows"] = WebFile(b"rows", '"v1"')
    place.prepare(web(f"{place.hub.url}/redirect/x?to={place.hub.url}/files/rows"))
    assert contents(place.item()) == {"data.jsonl": b"rows"}


@pytest.mark.parametrize("to", ["http://127.0.0.1:{port}/files/rows", "http://[::ffff:127.0.0.1]:{port}/files/rows"])
def test_a_redirect_into_the_cluster_is_not_followed(to: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first address counts as public for the check alone, and is served here like the one that it leads to."""
    own = SimpleNamespace(**vars(socket))
    own.getaddrinfo = _resolved_to("93.184.215.14", ("localhost",))
    monkeypatch.setattr(addresses, "socket", own)
    place.hub.files["rows"] = WebFile(b"secret", '"v1"')
    first = f"http://localhost:{place.hub.port}/redirect/x?to={to.format(port=place.hub.port)}"
    error = place.refusal(web(first), network={"allowPrivateAddresses": False})
    assert (error.code, error.reason) == (ExitCode.BAD_CONFIG, "AddressRefused"), error.message
    assert "127.0.0.1" in error.message
    assert [one.path for one in place.hub.asked] == ["/redirect/x"]


def test_a_redirect_that_never_ends_is_the_address_own_fault(place: Place) -> None:
    error = place.refusal(web(f"{place.hub.url}/redirect/loop"))
    assert (error.code, error.reason) == (ExitCode.BAD_DATA, "RedirectLoop"), error.message
    assert "20 redirects" in error.message
