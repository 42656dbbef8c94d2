"""The fault proxy in front of servers that break, and of clients that do not read: nothing hangs or is made up."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fault_proxy import FaultProxy
from fault_requests import Match
from faults import Stall
from operator_process import free_port
from proxied_client import BROKEN, SECONDS, Client, Watch
from taskoffer_lab.api_client import ApiClient, ClientConfig
from taskoffer_lab.process_table import wait_until

EVENT = json.dumps({"type": "ADDED", "object": {"metadata": {"name": "one"}}}).encode() + b"\n"


class Handler(BaseHTTPRequestHandler):
    """Hangs up on writes, and lets a function of the test write a watch's stream."""

    protocol_version = "HTTP/1.1"
    stream: Callable[[Handler], object]

    def do_POST(self) -> None:
        """Take the request, and hang up without an answer."""
        self.close_connection = True

    def do_GET(self) -> None:
        """Send what the test wants to be sent, and hang up before the answer has come to its end."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.flush()
        self.close_connection = True
        type(self).stream(self)

    def send(self, content: bytes) -> None:
        """Send a piece of the stream."""
        self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))

    def log_message(self, *_args: object) -> None:
        """Say nothing."""


@contextmanager
def server(stream: Callable[[Handler], object]) -> Iterator[ClientConfig]:
    """Serve on the loopback device; `stream` writes what watches get."""
    handler = type("TestHandler", (Handler,), {"stream": stream})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield ClientConfig(f"http://127.0.0.1:{made.server_port}")
        finally:
            made.shutdown()
            thread.join()


def nothing(_handler: Handler) -> None:
    """Send no event."""


def plain(proxy: FaultProxy) -> Client:
    """Return a client of the proxy."""
    return Client(proxy, ApiClient(ClientConfig("https://127.0.0.1:1")), "none")


@contextmanager
def watch(proxy: FaultProxy) -> Iterator[Watch]:
    """Open a watch through the proxy."""
    connection = http.client.HTTPConnection(proxy.address.removeprefix("http://"), timeout=SECONDS)
    connection.request("GET", "/api/v1/configmaps?watch=1")
    made = Watch(connection.getresponse())
    try:
        yield made
    finally:
        made.close(connection)


def test_a_server_that_is_down_is_a_closed_connection() -> None:
    with FaultProxy(ClientConfig(f"https://127.0.0.1:{free_port()}")) as proxy:
        client = plain(proxy)
        with pytest.raises(BROKEN):
            client.create("lost")
        with pytest.raises(BROKEN):
            client.send("GET", client.path + "?watch=1")
        assert [record.committed for record in proxy.requests] == [False, False]


def test_the_outcome_of_a_write_is_open_when_the_server_hangs_up() -> None:
    with server(nothing) as config, FaultProxy(config) as proxy:
        with pytest.raises(BROKEN):
            plain(proxy).create("who-knows")
        assert [(record.committed, record.status) for record in proxy.requests] == [(None, None)]


def test_a_watch_ends_when_the_server_breaks_off() -> None:
    with server(lambda handler: handler.send(EVENT)) as config, FaultProxy(config) as proxy:
        with watch(proxy) as broken:
            assert broken.next() == ("ADDED", "one")
            assert broken.next() is None
        wait_until(lambda: not proxy.watches, "closed", SECONDS)


def test_an_event_that_the_server_has_not_finished_is_not_passed_on() -> None:
    with (
        server(lambda handler: handler.send(EVENT + EVENT[:20])) as config,
        FaultProxy(config) as proxy,
        watch(proxy) as broken,
    ):
        assert broken.next() == ("ADDED", "one")
        assert broken.next() is None


def test_a_stalled_watch_stays_open_when_the_server_breaks_off() -> None:
    with server(nothing) as config, FaultProxy(config) as proxy:
        with proxy.fault(Match(watch=True), Stall()), watch(proxy) as stalled:
            assert stalled.silent(0.5)
            assert len(proxy.watches) == 1
        wait_until(lambda: not proxy.watches, "closed", SECONDS)


def test_a_client_that_does_not_read_keeps_nothing_from_ending() -> None:
    full = threading.Event()
    ends = threading.Event()

    def flood(handler: Handler) -> None:
        handler.connection.settimeout(0.5)
        try:
            while True:
                handler.send(EVENT * 1000)
        except OSError:
            # Every buffer on the way is full.
            full.set()
            ends.wait(SECONDS)

    with server(flood) as config:
        # The client outlives the proxy.
        with socket.socket() as deaf, FaultProxy(config) as proxy:
            deaf.connect(address_of(proxy))
            deaf.sendall(b"GET /api/v1/configmaps?watch=1 HTTP/1.1\r\nHost: proxy\r\n\r\n")
            assert full.wait(SECONDS)
            assert proxy.cut_watches() == 1
        ends.set()


def address_of(proxy: FaultProxy) -> tuple[str, int]:
    """Return host and port of a proxy."""
    host, _, port = proxy.address.removeprefix("http://").partition(":")
    return host, int(port)


def test_a_kubeconfig_leads_through_the_proxy_and_keeps_the_token(tmp_path: Path) -> None:
    cluster = {"server": "https://10.0.0.1:6443", "certificate-authority-data": "QQ=="}
    source = {
        "current-context": "there",
        "contexts": [{"name": "there", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": cluster}],
        "users": [{"name": "u", "user": {"token": "secret"}}],
    }
    path = tmp_path / "source.kubeconfig"
    path.write_text(json.dumps(source))
    with server(nothing) as config, FaultProxy(config) as proxy:
        made = ClientConfig.from_kubeconfig(proxy.kubeconfig(path, tmp_path / "made"))
        assert made == ClientConfig(proxy.address, token="secret")
        source["users"] = [{"name": "u", "user": {"client-certificate-data": "QQ==", "client-key-data": "QQ=="}}]
        path.write_text(json.dumps(source))
        with pytest.raises(ValueError, match="a certificate ends at the proxy"):
            proxy.kubeconfig(path, tmp_path)
