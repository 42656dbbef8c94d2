"""kopf's part: watch the kinds and hand every event to the replica.

Only ``on.event`` handlers are used: they need no finalizer, no annotation and no bookkeeping write. kopf would still
deep-copy every object to compute a difference that nobody reads; the null storages switch that off.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import kopf

from taskoffer.handlers.streams import listening
from taskoffer.reconcile.flow import Flow
from taskoffer.reconcile.replica import JOB_SELECTOR, Replica

logger = logging.getLogger(__name__)


class NoDiffBase(kopf.DiffBaseStorage):
    """Stores no last-handled state and builds none."""

    def build(self, *, body: kopf.Body, extra_fields: Iterable[Any] | None = None) -> kopf.BodyEssence:
        """Return an empty essence instead of a deep copy of the object."""
        return kopf.BodyEssence({})

    def fetch(self, *, body: kopf.Body) -> kopf.BodyEssence | None:
        """Know no earlier state."""
        return None

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: kopf.BodyEssence) -> None:
        """Store nothing."""


class NoProgress(kopf.ProgressStorage):
    """Stores no handler progress: the handlers used here have none."""

    def fetch(self, *, key: Any, body: kopf.Body) -> Any:
        """Know no progress."""
        return None

    def store(self, *, key: Any, record: Any, body: kopf.Body, patch: kopf.Patch) -> None:
        """Store nothing."""

    def purge(self, *, key: Any, body: kopf.Body, patch: kopf.Patch) -> None:
        """Have nothing to remove."""

    def touch(self, *, body: kopf.Body, patch: kopf.Patch, value: str | None) -> None:
        """Write no dummy change."""

    def clear(self, *, essence: kopf.BodyEssence) -> kopf.BodyEssence:
        """Leave the essence as it is."""
        return essence


def registry_for(replica: Replica, flow: Flow, kubeconfig: Path | None) -> kopf.OperatorRegistry:
    """Return kopf's registry: settings, login and one event handler per kind."""
    registry = kopf.OperatorRegistry()
    kinds = {resource.plural: kind for kind, resource in replica.kinds.items()}

    @kopf.on.startup(registry=registry)
    async def configure(settings: kopf.OperatorSettings, **_: Any) -> None:
        settings.persistence.diffbase_storage = NoDiffBase()
        settings.persistence.progress_storage = NoProgress()
        settings.posting.enabled = False
        settings.scanning.disabled = True
        settings.queueing.idle_timeout = 0.05
        settings.watching.server_timeout = flow.window
        # A stream that says nothing for longer than a window is dead; kopf opens another one where it broke off.
        settings.watching.inactivity_timeout = 1.25 * flow.window
        settings.watching.connect_timeout = 5
        settings.watching.chunk_size = 500
        settings.watching.reconnect_backoff = 0.1
        settings.watching.label_selectors["batch", "v1", "jobs"] = JOB_SELECTOR
        settings.networking.request_timeout = 30

    @kopf.on.login(registry=registry)
    async def login(**kwargs: Any) -> kopf.AiohttpSession | None:
        if kubeconfig is not None:
            info = kopf.login_with_kubeconfig(**kwargs)
        else:
            info = by_address(kopf.login_with_service_account(**kwargs), os.environ)
        return listening(info, flow, kinds) if info is not None else None

    for kind, resource in replica.kinds.items():
        kopf.on.event(
            resource.group, resource.version, resource.plural, registry=registry, id=f"watch-{resource.plural}"
        )(functools.partial(_take, replica, flow, kind))
    return registry


def by_address(login: kopf.ConnectionInfo | None, environment: Mapping[str, str]) -> kopf.ConnectionInfo | None:
    """Reach the API server as the official client does in a pod: by its address, not by a name.

    kopf asks the cluster's DNS for kubernetes.default.svc, which is absent, or away for a while, in some clusters.
    """
    host, port = environment.get("KUBERNETES_SERVICE_HOST"), environment.get("KUBERNETES_SERVICE_PORT")
    if login is None or not host or not port:
        return login
    return dataclasses.replace(login, server=f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}")


async def _take(replica: Replica, flow: Flow, kind: str, *, event: Any, **_: Any) -> None:
    """Hand an event on. kopf swallows exceptions of handlers, so what goes wrong is said here."""
    flow.handled(kind)
    try:
        replica.observe(kind, event["type"], event["object"])
    except Exception:
        logger.exception("event not taken in", extra={"kind": kind})
        raise
