"""kopf's part: watch the six kinds and hand every event to the replica.

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

from taskoffer.reconcile.replica import JOB_SELECTOR, Replica

logger = logging.getLogger(__name__)

KINDS: dict[str, tuple[str, str, str]] = {
    "Node": ("", "v1", "nodes"),
    "Pod": ("", "v1", "pods"),
    "Job": ("batch", "v1", "jobs"),
    "TrainingJob": ("taskoffer.dev", "v1alpha1", "trainingjobs"),
    "CapacityPolicy": ("taskoffer.dev", "v1alpha1", "capacitypolicies"),
    "TaskOffer": ("taskoffer.dev", "v1alpha1", "taskoffers"),
}


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


def registry_for(replica: Replica, kubeconfig: Path | None) -> kopf.OperatorRegistry:
    """Return kopf's registry: settings, login and one event handler per kind."""
    registry = kopf.OperatorRegistry()

    @kopf.on.startup(registry=registry)
    async def configure(settings: kopf.OperatorSettings, **_: Any) -> None:
        settings.persistence.diffbase_storage = NoDiffBase()
        settings.persistence.progress_storage = NoProgress()
        settings.posting.enabled = False
        settings.scanning.disabled = True
        settings.queueing.idle_timeout = 0.05
        settings.watching.server_timeout = 300
        settings.watching.connect_timeout = 5
        settings.watching.reconnect_backoff = 0.1
        settings.watching.label_selectors["batch", "v1", "jobs"] = JOB_SELECTOR
        settings.networking.request_timeout = 30

    @kopf.on.login(registry=registry)
    async def login(**kwargs: Any) -> kopf.ConnectionInfo | None:
        if kubeconfig is not None:
            return kopf.login_with_kubeconfig(**kwargs)
        return by_address(kopf.login_with_service_account(**kwargs), os.environ)

    for kind, (group, version, plural) in KINDS.items():
        kopf.on.event(group, version, plural, registry=registry, id=f"watch-{plural}")(
            functools.partial(_take, replica, kind)
        )
    return registry


def by_address(login: kopf.ConnectionInfo | None, environment: Mapping[str, str]) -> kopf.ConnectionInfo | None:
    """Reach the API server as the official client does in a pod: by its address, not by a name.

    kopf asks the cluster's DNS for kubernetes.default.svc, which is absent, or away for a while, in some clusters.
    """
    host, port = environment.get("KUBERNETES_SERVICE_HOST"), environment.get("KUBERNETES_SERVICE_PORT")
    if login is None or not host or not port:
        return login
    return dataclasses.replace(login, server=f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}")


async def _take(replica: Replica, kind: str, *, event: Any, **_: Any) -> None:
    """Hand an event on. kopf swallows exceptions of handlers, so what goes wrong is said here."""
    try:
        replica.observe(kind, event["type"], event["object"])
    except Exception:
        logger.exception("event not taken in", extra={"kind": kind})
        raise
