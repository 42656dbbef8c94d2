"""How the command line reaches a replica: at an address, else through the API server's proxy of its Service."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from taskoffer.api.base import WireModel
from taskoffer.api.faults import path_of, what_is_wrong

M = TypeVar("M", bound=WireModel)

SECONDS = 60.0
"""How long an answer may take; running a long queue ahead takes some seconds on a busy machine."""


def _unreadable() -> tuple[type[Exception], ...]:
    """Return what reading a kubeconfig raises that is damaged, or is something else."""
    import yaml
    from kubernetes import config

    return (config.ConfigException, yaml.YAMLError, OSError, ValueError, TypeError, KeyError, AttributeError)


class AskError(Exception):
    """No answer came; the message says why and what helps."""


@dataclass(frozen=True, slots=True)
class Namespace:
    """The namespace of an offer that was asked for without one."""

    name: str
    why: str
    """Where it comes from."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where to ask."""

    server: str | None = None
    """Address of a replica's status port; None goes through the API server."""
    kubeconfig: Path | None = None
    context: str | None = None
    operator_namespace: str = "taskoffer-system"
    service: str = "taskoffer"

    def ask(self, path: str, query: Mapping[str, str], model: type[M], *, if_missing: str = "") -> M:
        """Return the answer to a question.

        Args:
            path: Where it is asked on the replica's port.
            query: Its parameters.
            model: What an answer is read as.
            if_missing: What is said beside when the replica knows nothing of what is asked for.

        Raises:
            AskError: when there is none.
        """
        if self.server is not None:
            status, body = self._at_address(path, query)
        else:
            status, body = self._through_proxy(path, query)
        if status != 200:
            raise AskError(self._problem(status, body, if_missing))
        try:
            return model.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            what = ": ".join(filter(None, (path_of(first["loc"]), what_is_wrong(first)[0])))
            raise AskError(
                f"the answer is not one that this version understands ({what}); "
                "use the command line of the operator's version"
            ) from None

    def namespace(self) -> Namespace:
        """Return the namespace of the kubeconfig's context, else default; with an address alone none is read.

        Raises:
            AskError: when the kubeconfig cannot be read or has no such context.
        """
        from kubernetes import config

        if self.server is not None and self.kubeconfig is None and self.context is None:
            return Namespace("default", "--server alone reads no kubeconfig, so the namespace is default: give -n")
        try:
            contexts, active = config.list_kube_config_contexts(str(self.kubeconfig) if self.kubeconfig else None)
            names = [context["name"] for context in contexts]
            chosen = active if self.context is None else next((c for c in contexts if c["name"] == self.context), None)
            told = (chosen or {}).get("context") or {}
            namespace = str(told.get("namespace") or "")
        except _unreadable() as error:
            raise AskError(f"no usable kubeconfig: {error}; set KUBECONFIG, or give --server") from None
        if chosen is None:
            raise AskError(f"the kubeconfig has no context {self.context}; it has {', '.join(map(str, names))}")
        if not namespace:
            return Namespace(
                "default", f"the kubeconfig's context {chosen['name']} names no namespace, so it is default: give -n"
            )
        return Namespace(namespace, f"the kubeconfig's context {chosen['name']} names that namespace: -n changes it")

    def _at_address(self, path: str, query: Mapping[str, str]) -> tuple[int, str]:
        assert self.server is not None  # noqa: S101
        url = self.server.rstrip("/") + path + (f"?{urllib.parse.urlencode(query)}" if query else "")
        odd = AskError(f"--server {self.server} is not an address: write for example http://127.0.0.1:8080")
        try:
            scheme = urllib.parse.urlsplit(url).scheme
        except ValueError:
            raise odd from None
        if scheme not in ("http", "https"):
            raise odd
        try:
            with urllib.request.urlopen(url, timeout=SECONDS) as answer:  # noqa: S310 - the scheme was checked
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode(errors="replace")
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise AskError(f"{self.server} does not answer: {reason}") from None

    def _through_proxy(self, path: str, query: Mapping[str, str]) -> tuple[int, str]:
        """Ask as ``kubectl get --raw`` does, with the credentials of the kubeconfig."""
        from kubernetes import config
        from urllib3.exceptions import HTTPError

        try:
            api = config.new_client_from_config(
                str(self.kubeconfig) if self.kubeconfig else None, context=self.context, persist_config=False
            )
        except _unreadable() as error:
            raise AskError(f"no usable kubeconfig: {error}; set KUBECONFIG, or give --server") from None
        proxied = f"/api/v1/namespaces/{self.operator_namespace}/services/{self.service}:http/proxy{path}"
        request = api.param_serialize(
            "GET",
            proxied,
            query_params=list(query.items()),
            header_params={"Accept": "application/json"},
            auth_settings=["BearerToken"],
        )
        try:
            with api:
                answer = api.call_api(*request, _request_timeout=SECONDS)
                return int(answer.status), answer.read().decode(errors="replace")
        except (HTTPError, OSError) as error:
            raise AskError(f"the API server {api.configuration.host} does not answer: {error}") from None

    def _problem(self, status: int, body: str, if_missing: str) -> str:
        """Say what a status other than 200 means; the operator's own messages and the API server's look different."""
        try:
            told = json.loads(body)
        except ValueError:
            told = {}
        told = told if isinstance(told, dict) else {}
        message = str(told.get("error") or told.get("message") or body.strip()[:300] or f"HTTP status {status}")
        if told.get("kind") != "Status":
            return f"{message} ({if_missing})" if status == 404 and "error" in told and if_missing else message
        where = f"Service {self.service} in namespace {self.operator_namespace}"
        if status == 403:
            return f"{message}; get on services/proxy of {where} is needed: bind the Role taskoffer-viewer"
        if status == 404:
            return f"{where} is not there: apply deploy/operator.yaml, or give --server ({message})"
        if status == 503:
            return f"{where} has no replica that is ready: {message}"
        return message
