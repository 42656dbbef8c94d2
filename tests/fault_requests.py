"""The requests that pass through the fault proxy: what is written down of each, and how a fault describes its own."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

Object = dict[str, Any]

WRITES = ("create", "update", "patch", "delete", "deletecollection")
"""The verbs, as RBAC calls them, that change something."""


@dataclass(slots=True, eq=False)
class Record:
    """One request that came to the proxy.

    Attributes:
        number: Counts the requests from 1.
        at: When it came, by `time.monotonic`.
        verb: As RBAC calls it: get, list, watch, create, update, patch, delete or deletecollection.
        path: Without the query.
        query: Behind the question mark.
        plural: The resource, "" for a path that is none.
        subresource: Such as status, "" for the object itself.
        name: Of the object; of one that is created the name in the body, "" when the server shall make one.
        revision: The resourceVersion that a write carries.
        status: What the client was answered; None while it waits, or when it got nothing.
        fault: The name of the fault that struck it.
        committed: Whether the server has carried out this write; None when it was sent and
            no definite answer came (yet).
        answered: When the server's answer came.
    """

    number: int
    at: float
    verb: str
    path: str
    query: str
    plural: str
    subresource: str
    namespace: str
    name: str
    revision: str | None = None
    status: int | None = None
    fault: str | None = None
    committed: bool | None = False
    answered: float | None = None

    @property
    def watch(self) -> bool:
        """Whether it is a watch."""
        return self.verb == "watch"

    @property
    def write(self) -> bool:
        """Whether it changes something."""
        return self.verb in WRITES

    def __str__(self) -> str:
        kind = "/".join(part for part in (self.plural or self.path, self.subresource) if part)
        place = "/".join(part for part in (self.namespace, self.name) if part)
        return " ".join(part for part in (f"#{self.number}", self.verb, kind, place) if part)


@dataclass(frozen=True)
class Match:
    """Which requests a fault is about; what is left out does not matter.

    Args:
        verbs: As in `Record.verb`.
        plural: A regular expression for the whole name of the resource, such as ``jobs|pods``.
        subresource: "" for the object itself, None for both.
        namespace: The namespace.
        name: A regular expression for the whole name.
        watch: Whether it is a watch.
        body: Asked with what a write carries; a request without a JSON object does not match then.
    """

    verbs: tuple[str, ...] = ()
    plural: str = ""
    subresource: str | None = None
    namespace: str = ""
    name: str = ""
    watch: bool | None = None
    body: Callable[[Object], bool] | None = None

    def fits(self, record: Record, body: Object | None) -> bool:
        """Tell whether this request is meant."""
        return (
            (not self.verbs or record.verb in self.verbs)
            and (not self.plural or re.fullmatch(self.plural, record.plural) is not None)
            and (self.subresource is None or record.subresource == self.subresource)
            and (not self.namespace or record.namespace == self.namespace)
            and (not self.name or re.fullmatch(self.name, record.name) is not None)
            and (self.watch is None or record.watch == self.watch)
            and (self.body is None or (body is not None and self.body(body)))
        )

    def __str__(self) -> str:
        given = [f"{field.name}={value!r}" for field in fields(self) if (value := getattr(self, field.name))]
        return ", ".join(given) or "everything"


OWN_WRITES = Match(WRITES, "(?!leases|events).*")
"""What a replica writes but for the election and Events: the boundaries at which a campaign kills it."""

_PATH = re.compile(
    r"/(?:api|apis/[^/]+)/[^/]+(?:/namespaces/(?P<namespace>[^/]+))?"
    r"/(?P<plural>[^/]+)(?:/(?P<name>[^/]+))?(?:/(?P<subresource>.+))?"
)
_VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete", "GET": "get"}


def read_request(number: int, method: str, path: str, query: Mapping[str, str], body: Object | None) -> Record:
    """Read off a request what it is about."""
    found = _PATH.fullmatch(path)
    parts = {key: value or "" for key, value in found.groupdict().items()} if found else dict.fromkeys(_NO_RESOURCE, "")
    if parts["plural"] in ("status", "finalize") and not parts["name"]:
        parts = {"namespace": "", "plural": "namespaces", "name": parts["namespace"], "subresource": parts["plural"]}
    verb = _VERBS.get(method, method.lower())
    if parts["plural"] and not parts["name"] and verb in ("get", "delete"):
        verb = {"get": "list", "delete": "deletecollection"}[verb]
    if query.get("watch") in ("1", "true"):
        verb = "watch"
    meta = (body or {}).get("preconditions" if verb == "delete" else "metadata") or {}
    revision = meta.get("resourceVersion")
    if verb == "create" and not parts["name"]:
        parts["name"] = str(meta.get("name") or "")
    asked = "&".join(f"{key}={value}" for key, value in query.items())
    return Record(number, time.monotonic(), verb, path, asked, revision=revision, **parts)


_NO_RESOURCE = ("namespace", "plural", "name", "subresource")
