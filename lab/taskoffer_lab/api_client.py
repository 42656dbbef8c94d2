"""A small synchronous client for the API server: what the lab itself needs, from the standard library."""

import base64
import http.client
import json
import os
import ssl
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from taskoffer_lab.errors import LabError

MERGE_PATCH = "application/merge-patch+json"


class ApiError(LabError):
    """The API server refused a request.

    Attributes:
        status: The HTTP status.
    """

    def __init__(self, status: int, method: str, path: str, message: str) -> None:
        super().__init__(f"{method} {path}: {status} {message}")
        self.status = status


@dataclass(frozen=True)
class ClientConfig:
    """How to reach a cluster as one user.

    Attributes:
        server: `https://HOST:PORT`.
        authority: The authority's certificate (PEM), None for the system's trust store.
        certificate: The client certificate (PEM), None where a token is used.
        key: Its key (PEM).
        token: A bearer token, None where a certificate is used.
    """

    server: str
    authority: str | None = None
    certificate: str | None = None
    key: str | None = None
    token: str | None = None

    @staticmethod
    def from_kubeconfig(path: Path) -> "ClientConfig":
        """Read the current context of a kubeconfig with certificates or a token.

        Raises:
            LabError: The file is broken or its user logs in by a plugin, which this small client cannot.
        """
        try:
            content = yaml.safe_load(path.read_text())
            context = _named(content["contexts"], content["current-context"])["context"]
            cluster = _named(content["clusters"], context["cluster"])["cluster"]
            user = _named(content["users"], context["user"])["user"]
        except (OSError, KeyError, TypeError, yaml.YAMLError) as error:
            raise LabError(f"kubeconfig {path} cannot be read: {error!r}") from error
        token = user.get("token")
        certificate = _embedded(user, "client-certificate", path)
        if token is None and certificate is None:
            raise LabError(
                f"the user of {path} has neither a client certificate nor a token",
                "make a kubeconfig with one: kubectl create token …",
            )
        return ClientConfig(
            server=cluster["server"],
            authority=_embedded(cluster, "certificate-authority", path),
            certificate=certificate,
            key=_embedded(user, "client-key", path),
            token=token,
        )

    def ssl_context(self) -> ssl.SSLContext:
        """Return a TLS context that trusts the cluster and shows the client certificate."""
        context = ssl.create_default_context(cadata=self.authority)
        if self.certificate is not None and self.key is not None:
            # OpenSSL wants a file; an anonymous one leaves no key on disk.
            descriptor = os.memfd_create("client-pem")
            with os.fdopen(descriptor, "wb") as file:
                file.write((self.certificate + "\n" + self.key).encode())
                file.flush()
                context.load_cert_chain(f"/proc/self/fd/{descriptor}")
        return context

    @property
    def headers(self) -> dict[str, str]:
        """The headers that authenticate a request."""
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}


class ApiClient:
    """JSON over HTTPS, one connection per request."""

    def __init__(self, config: ClientConfig, timeout: float = 10.0) -> None:
        self.config = config
        self._timeout = timeout
        self._context = config.ssl_context()
        parts = urllib.parse.urlsplit(config.server)
        self._host, self._port, self._prefix = parts.hostname or "", parts.port or 443, parts.path.rstrip("/")

    def raw(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> tuple[int, bytes]:
        """Send one request; returns status and body.

        Raises:
            OSError: No connection (refused, reset, timed out).
        """
        headers = {"Accept": "application/json", **self.config.headers}
        payload = None
        if body is not None:
            payload, headers["Content-Type"] = json.dumps(body).encode(), kind
        connection = http.client.HTTPSConnection(self._host, self._port, timeout=self._timeout, context=self._context)
        try:
            connection.request(method, self._prefix + path, payload, headers)
            response = connection.getresponse()
            return response.status, response.read()
        except http.client.HTTPException as error:
            raise ConnectionError(f"{method} {path}: {error!r}") from error
        finally:
            connection.close()

    def request(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> Any:
        """Send one request and return the decoded answer.

        Raises:
            ApiError: The server refused it.
            OSError: No connection.
        """
        status, content = self.raw(method, path, body, kind)
        decoded = json.loads(content) if content else None
        if status >= 400:
            message = decoded.get("message", "") if isinstance(decoded, dict) else str(decoded)
            raise ApiError(status, method, path, message)
        return decoded

    def ready(self) -> bool:
        """Whether `/readyz` says ok; False also when nobody answers."""
        try:
            return self.raw("GET", "/readyz") == (200, b"ok")
        except OSError:
            return False

    def exists(self, path: str) -> bool:
        """Whether an object is there; False also when nobody answers."""
        try:
            return self.raw("GET", path)[0] == 200
        except OSError:
            return False


def _named(items: list[dict[str, Any]], name: str) -> dict[str, Any]:
    for item in items:
        if item["name"] == name:
            return item
    raise KeyError(name)


def _embedded(section: dict[str, Any], key: str, kubeconfig: Path) -> str | None:
    if f"{key}-data" in section:
        return base64.b64decode(section[f"{key}-data"]).decode()
    if key in section:
        return (kubeconfig.parent / str(section[key])).read_text()
    return None
