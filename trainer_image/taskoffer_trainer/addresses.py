"""Which addresses a step may talk to, and what a signed one names.

An offer's address is foreign input, and the pod that follows it sits inside of the cluster. So it must not lead to
the cloud's metadata service, the API server or a neighbour, neither directly nor by a redirect.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit
from urllib.request import getproxies

import httpx2

from taskoffer.api.contract import SIGNATURE_PREFIXES, ExitCode, NetworkSettings
from taskoffer_trainer.failures import TrainerError

__all__ = ["TOO_MANY_REDIRECTS", "check_address", "make_client", "shown", "without_signature"]

MOST_REDIRECTS = 20
"""Redirects that are followed: httpx's own default, and what browsers follow."""

TOO_MANY_REDIRECTS = f"it leads on for more than {MOST_REDIRECTS} redirects; look where it goes with curl -sIL"
"""What is wrong with an address that leads in a circle."""

_SIGNATURE_WORDS = frozenset(
    # S3 version 2 and CloudFront; Google version 2; Azure's shared access signature.
    {"awsaccesskeyid", "signature", "expires", "key-pair-id", "policy", "googleaccessid"}
    | {"sig", "se", "st", "sp", "sv", "sr", "spr", "skoid", "sktid", "skt", "ske", "sks", "skv"}
)
_SIGNS = frozenset({"x-amz-signature", "x-goog-signature", "signature", "sig"})
_LAST_IS_IPV4 = tuple(ipaddress.IPv6Network(text) for text in ("::/96", "64:ff9b::/96", "64:ff9b:1::/48"))
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def shown(url: str) -> str:
    """Return an address as it may be logged: without its query and user, which may be secrets."""
    parts = urlsplit(url)
    host = (parts.hostname or "") + ("" if parts.port is None else f":{parts.port}")
    return urlunsplit((parts.scheme, host, parts.path, "", "")) + ("?…" if parts.query else "")


def without_signature(url: str) -> str:
    """Return what an address names: two signatures of the same object give the same text."""
    parts = urlsplit(url)
    query = parse_qsl(parts.query, keep_blank_values=True)
    if any(name.lower() in _SIGNS for name, _value in query):
        query = [
            (name, value)
            for name, value in query
            if not name.lower().startswith(SIGNATURE_PREFIXES) and name.lower() not in _SIGNATURE_WORDS
        ]
    return urlunsplit((parts.scheme, parts.netloc, parts.path, urlencode(query), ""))


def _refused(url: str, why: str) -> TrainerError:
    return TrainerError(ExitCode.BAD_CONFIG, "AddressRefused", f"{shown(url)}: {why}")


def check_address(url: str, network: NetworkSettings) -> None:
    """Refuse an address that a foreign offer must not make this pod talk to.

    A name could still be answered differently a moment later; a NetworkPolicy is the fence behind this one.

    Raises:
        TrainerError: ``BAD_CONFIG`` with the address and what is wrong with it.
    """
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and network.allow_http):
        raise _refused(url, "is not https; network.allowHttp would allow it")
    host = parts.hostname
    if not host:
        raise _refused(url, "names no host")
    if network.allow_private_addresses:
        return
    for address in _addresses(url, host, parts.port, parts.scheme):
        inner = next((one for one in (address, *_embedded(address)) if not one.is_global or one.is_multicast), None)
        if inner is not None:
            where = f"{inner}" if inner == address else f"{inner} (as {address})"
            raise _refused(url, f"leads to {where}, which is not public; network.allowPrivateAddresses would allow it")


def _addresses(url: str, host: str, port: int | None, scheme: str) -> list[_Address]:
    with contextlib.suppress(OSError):
        # However an address is written, as 127.1 or 2130706433 as well, without asking a name server.
        return _looked_up(host, port, socket.AI_NUMERICHOST)
    if not _is_direct(scheme, host):
        # The proxy looks names up and decides what it reaches.
        return []
    try:
        return _looked_up(host, port, 0)
    except OSError as error:
        # A name that does not exist is none later either; a name server that does not answer may do so.
        known = isinstance(error, socket.gaierror) and error.errno in (socket.EAI_NONAME, socket.EAI_NODATA)
        code = ExitCode.BAD_CONFIG if known else ExitCode.RESTART
        raise TrainerError(code, "HostUnknown", f"{shown(url)}: {host}: {error.strerror}") from error


def _looked_up(host: str, port: int | None, flags: int) -> list[_Address]:
    found = socket.getaddrinfo(host, port or 443, type=socket.SOCK_STREAM, flags=flags)
    return [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]


def _is_direct(scheme: str, host: str) -> bool:
    """Tell whether the client connects to a name itself: without a proxy, and where ``NO_PROXY`` names it.

    At least what httpx reads out of these variables counts; one name too many is only looked up.
    """
    proxies = getproxies()
    if scheme not in proxies and "all" not in proxies:
        return True
    for entry in proxies.get("no", "").lower().split(","):
        name = entry.strip().rpartition("://")[2].partition(":")[0].removeprefix("*").removeprefix(".")
        if entry.strip() == "*" or (name and (host == name or host.endswith(f".{name}"))):
            return True
    return False


def _embedded(address: _Address) -> list[ipaddress.IPv4Address]:
    """Return the IPv4 addresses that an IPv6 address leads to.

    RFC 4291 (mapped, and the old compatible form), RFC 3056 (6to4), RFC 4380 (Teredo), RFC 6052 and 8215 (NAT64; a
    network's own prefix is not known here).
    """
    if isinstance(address, ipaddress.IPv4Address):
        return []
    found = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    if any(address in network for network in _LAST_IS_IPV4):
        found.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return [one for one in found if one is not None]


def make_client(network: NetworkSettings, guarded: bool) -> httpx2.Client:
    """Return a client that follows redirects and takes ``Authorization`` to no other host.

    Args:
        network: timeouts and what is allowed.
        guarded: check every address, also those of redirects; off for hosts that the operator named.
    """

    def check(request: httpx2.Request) -> None:
        if guarded:
            check_address(str(request.url), network)

    return httpx2.Client(
        follow_redirects=True,
        max_redirects=MOST_REDIRECTS,
        timeout=httpx2.Timeout(network.timeout_seconds, connect=min(20.0, network.timeout_seconds)),
        event_hooks={"request": [check]},
        headers={"User-Agent": "taskoffer-trainer", "Accept-Encoding": "identity"},
    )
