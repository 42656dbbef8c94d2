"""A kind whose schema takes anything for a while, as an earlier or a later version of it might."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from operator_bench import Bench
from taskoffer_lab.api_client import ApiError
from taskoffer_lab.install import project_root
from taskoffer_lab.process_table import wait_until


@contextmanager
def anything_goes(bench: Bench, plural: str, *, shapeless: bool = False) -> Iterator[None]:
    """Let a kind take anything for a while.

    The server cuts the watches of a kind whose schema changes, and forgets its history: nobody can have seen it.

    Args:
        bench: Whose cluster it is.
        plural: The kind.
        shapeless: Let spec and status be something else than objects, too.
    """
    cluster = bench.cluster
    path = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{plural}.taskoffer.dev"
    lax = copy.deepcopy(cluster.api.request("GET", path))
    for version in lax["spec"]["versions"]:
        free = {"x-kubernetes-preserve-unknown-fields": True} | ({} if shapeless else {"type": "object"})
        version["schema"]["openAPIV3Schema"] = {"type": "object", "properties": {"spec": free, "status": free}}
    with bench.audit.excused():
        cluster.api.request("PUT", path, lax)
        try:
            yield
        finally:
            manifest = project_root() / "crds" / f"taskoffer.dev_{plural}.yaml"
            cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(manifest))


def eventually(attempt: Callable[[], object], what: str) -> None:
    """Repeat a call until the server takes it: a changed schema takes a moment to be in force."""

    def done() -> bool:
        try:
            attempt()
        except ApiError as error:
            if error.status in (400, 422, 404):
                return False
            raise
        return True

    wait_until(done, what, 60)


def refused(attempt: Callable[[], Any], what: str) -> None:
    """Repeat a dry run until the server refuses it."""

    def done() -> bool:
        try:
            attempt()
        except ApiError as error:
            return error.status in (400, 422)
        return False

    wait_until(done, what, 60)
