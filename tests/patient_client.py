"""A client that bears an API server that is away or overloaded for a while, as kubelets and controllers do."""

from __future__ import annotations

import time
from typing import Any

from kept_client import KeptClient
from taskoffer_lab.api_client import ClientConfig

_PAUSE = 0.1
_TRY_AGAIN = (429, 500, 503, 504)


class PatientClient(KeptClient):
    """As `KeptClient`, but every request is repeated until it is answered properly, or its time is over.

    A create whose answer was lost is answered with 409 when it is repeated.

    Args:
        config: How to reach the server.
        patience: Seconds after which an absence is told to the caller.
    """

    def __init__(self, config: ClientConfig, patience: float = 90.0) -> None:
        super().__init__(config)
        self._patience = patience

    def raw(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> tuple[int, bytes]:
        """Send a request until the server answers it; returns status and body."""
        end = time.monotonic() + self._patience
        while True:
            try:
                status, content = super().raw(method, path, body, kind)
                if status not in _TRY_AGAIN or time.monotonic() >= end:
                    return status, content
            except OSError:
                if time.monotonic() >= end:
                    raise
            time.sleep(_PAUSE)
