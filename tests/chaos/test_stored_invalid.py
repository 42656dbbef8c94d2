"""Objects that really are stored although our schemas would refuse them, as an upgrade or a hand leaves them.

The server's schemas are opened for a while, drawn objects are stored under them, and the real schemas come back. The
operator, which never stops deciding healthy offers meanwhile, answers what is left, and so does one that starts anew.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from builders import make_admission, make_condition, make_offer, make_policy, make_training_job
from campaign import Campaign
from core_builders import ONE_GPU
from crd_schema import PLURALS
from crd_strategies import parts
from operator_bench import GROUP, SECONDS, Bench, Object
from operator_process import OperatorProcess
from permissive_crds import anything_goes, eventually, refused
from taskoffer.api.reasons import Reason
from taskoffer_lab.api_client import ApiError
from taskoffer_lab.process_table import wait_until

REASONS = {reason.value for reason in Reason}
REFUSALS = (400, 413, 422)
"""What the server says to an object that it cannot take, an open schema or not."""
MOST_VERSIONS = 10
"""Versions that an object may go through from its creation to the end of a test."""


@dataclass
class Drawer:
    """Where the invalid objects are kept: a namespace of their own, and names of their own for policies."""

    bench: Bench
    namespace: str
    stored: list[tuple[str, str]] = field(default_factory=list)
    """Kind and name of what the server took."""

    def path(self, kind: str, name: str = "") -> str:
        place = "" if kind == "CapacityPolicy" else f"/namespaces/{self.namespace}"
        return f"{GROUP}{place}/{PLURALS[kind]}" + (f"/{name}" if name else "")

    def ask(self, method: str, path: str, body: object = None) -> Object:
        """Send a request; again where the server is still taking up a changed schema."""
        for _ in range(200):
            try:
                made: Object = self.bench.api.request(method, path, body)
            except ApiError as error:
                if error.status != 429:
                    raise
                time.sleep(0.1)  # The server says Retry-After; nothing can be polled meanwhile.
            else:
                return made
        raise AssertionError(f"{method} {path}: the server has not taken up the schema")

    def store(self, kind: str, name: str, spec: object, status: object) -> str:
        """Store an object and its status; return what the server said to it."""
        made = {"apiVersion": "taskoffer.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec}
        try:
            self.ask("POST", self.path(kind), made)
        except ApiError as error:
            if error.status not in REFUSALS:
                raise
            return "refused"
        self.stored.append((kind, name))
        if status is None:
            return "stored"
        return "stored with a status" if self._put_status(kind, name, status) else "stored without its status"

    def _put_status(self, kind: str, name: str, status: object) -> bool:
        """Store a status as it is; the operator writes at the same time."""
        for _ in range(20):
            found = self.ask("GET", self.path(kind, name))
            try:
                self.ask("PUT", self.path(kind, name) + "/status", {**found, "status": status})
            except ApiError as error:
                if error.status == 409:
                    continue
                if error.status not in REFUSALS:
                    raise
                return False
            return True
        raise AssertionError(f"{kind} {name} never stood still: somebody writes it all the time")

    def all(self) -> dict[tuple[str, str], Object]:
        """Return what is stored now, by kind and name."""
        found = {}
        for kind in PLURALS:
            for raw in self.ask("GET", self.path(kind))["items"]:
                key = (kind, str(raw["metadata"]["name"]))
                if key in self.stored:
                    found[key] = raw
        return found

    def empty(self) -> None:
        """Delete everything and wait until it is gone."""
        for kind, name in self.stored:
            try:
                self.ask("DELETE", self.path(kind, name))
            except ApiError as error:
                if error.status != 404:
                    raise
        wait_until(lambda: not self.all(), "invalid objects gone", SECONDS)


@pytest.fixture
def drawer(operator: OperatorProcess, bench: Bench) -> Iterator[Drawer]:
    """An empty drawer; what it holds at the end is deleted and kept out of the audit."""
    namespace = f"{bench.namespace}-odd"
    bench.api.request("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
    made = Drawer(bench, namespace)
    try:
        yield made
    finally:
        made.empty()
        bench.api.request("DELETE", f"/api/v1/namespaces/{namespace}")
        bench.audit.events[:] = [e for e in bench.audit.events if e.object["metadata"].get("namespace") != namespace]


def drawn(campaign: Campaign, base: dict[str, Object], count: int) -> list[tuple[str, object, object]]:
    """Draw kind, spec and status of so many objects."""
    made: list[tuple[str, object, object]] = []

    @seed(campaign.seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(
        st.sampled_from(["TaskOffer"] * 3 + ["CapacityPolicy", "TrainingJob"]).flatmap(
            lambda kind: st.tuples(st.just(kind), parts(kind, base[kind]))
        )
    )
    def draw(one: tuple[str, tuple[object, object]]) -> None:
        made.append((one[0], *one[1]))

    draw()
    return made


def bases(bench: Bench) -> dict[str, Object]:
    """Return good objects to start from. They are to be placed on nodes that do not exist."""
    policy = f"{bench.namespace}-odd"
    held = {
        "admission": make_admission(job="x", node="no-such-node", policy=policy),
        "conditions": [make_condition("Admitted", True, "Admitted")],
    }
    attempt = {"jobName": "x-1", "createdAt": "2026-01-31T12:00:00Z", "assignments": held["admission"]["assignments"]}
    spec = make_policy()["spec"]
    return {
        "TaskOffer": make_offer(policy=policy, parameters=ONE_GPU, status=held),
        "CapacityPolicy": make_policy(
            node_selector={"matchLabels": {"pool": "nothing"}}, status={"activeSpec": spec, "activeGeneration": 1}
        ),
        "TrainingJob": make_training_job(status={"attempts": [attempt]}),
    }


def answered(raw: Object, jobs: set[str]) -> bool:
    """Tell whether an offer has an answer."""
    status = raw.get("status")
    if not isinstance(status, dict):
        return False
    stored = status.get("conditions")
    conditions = [c for c in stored if isinstance(c, dict)] if isinstance(stored, list) else []
    if any(c.get("type") == "Finished" and c.get("status") == "True" for c in conditions):
        return True
    if status.get("admission") is not None:
        return f"{raw['metadata']['name']}-{raw['metadata']['uid'][:8]}" in jobs
    admitted = next((c for c in conditions if c.get("type") == "Admitted"), {})
    return admitted.get("reason") in REASONS and status.get("observedGeneration") == raw["metadata"]["generation"]


def told_by_events(drawer: Drawer) -> set[str]:
    """Return the names of what events say that the server does not store its status: of such there is no other way.

    The server judges a spec by its rules at every write of a status, and gives up where a value has the wrong type.
    """
    found: list[Object] = drawer.bench.api.request("GET", "/api/v1/events")["items"]
    return {str(e["involvedObject"]["name"]) for e in found if "the API server does not store" in e["message"]}


def unanswered(drawer: Drawer) -> list[Object]:
    jobs = {str(raw["metadata"]["name"]) for raw in drawer.ask("GET", drawer.path("TrainingJob"))["items"]}
    found = drawer.all().items()
    offers = [raw for (kind, _), raw in found if kind == "TaskOffer" and not answered(raw, jobs)]
    policies = [raw for (kind, _), raw in found if kind == "CapacityPolicy"]
    silent = offers + [p for p in policies if ready_of(p) not in ("Ready", "InvalidPolicy")]
    told = told_by_events(drawer) if silent else set()
    return [raw for raw in silent if raw["metadata"]["name"] not in told]


def ready_of(policy: Object) -> object:
    """Return the reason of a policy's Ready condition, whatever its status looks like."""
    status = policy.get("status")
    found = status.get("conditions") if isinstance(status, dict) else None
    made = [c for c in found if isinstance(c, dict)] if isinstance(found, list) else []
    return next((c.get("reason") for c in made if c.get("type") == "Ready"), None)


def versions_over(drawer: Drawer, seconds: float) -> Counter[tuple[str, str]]:
    """Return how often each object was seen to have changed over a while."""
    changes: Counter[tuple[str, str]] = Counter()
    last: dict[tuple[str, str], str] = {}
    ends = time.monotonic() + seconds

    def over() -> bool:
        for key, raw in drawer.all().items():
            version = str(raw["metadata"]["resourceVersion"])
            changes[key] += last.get(key, version) != version
            last[key] = version
        return time.monotonic() >= ends

    wait_until(over, "the end of the look", seconds + 30)
    return +changes


def brief(found: list[Object]) -> str:
    return "\n".join(f"{raw['kind']} {raw['metadata']['name']}: {str(raw.get('status'))[:600]}" for raw in found[:5])


def test_objects_that_no_schema_allows_stop_nobody_and_are_answered(
    operator: OperatorProcess, bench: Bench, drawer: Drawer, campaign: Campaign
) -> None:
    since = operator.log_size()
    bench.node()
    bench.policy()
    bench.admitted("before")
    with ExitStack() as lax:
        for plural in PLURALS.values():
            lax.enter_context(anything_goes(bench, plural, shapeless=True))
        for kind in PLURALS:
            eventually(lambda kind=kind: probe(drawer, kind), f"{kind} takes anything")
        for number, (kind, spec, status) in enumerate(drawn(campaign, bases(bench), campaign.size(60, 1000))):
            campaign.counts[drawer.store(kind, f"{bench.namespace}-odd-{number}", spec, status)] += 1
            if number % 20 == 0:
                bench.admitted(f"among-{number // 20}") if number < 80 else None
    for kind in PLURALS:
        refused(lambda kind=kind: probe(drawer, kind), f"the strict schema of {kind} in force again")
    bench.run_through("after")
    left: list[Object] = []

    def all_answered() -> bool:
        left[:] = unanswered(drawer)
        return not left

    try:
        wait_until(all_answered, "all invalid objects answered", 90)
    except Exception as error:
        error.add_note(f"{len(left)} without an answer:\n{brief(left)}")
        raise
    quiet(drawer, campaign.size(6, 40))
    assert operator.terminate() == 0
    operator.start()
    bench.run_through("restarted")
    quiet(drawer, campaign.size(6, 40))
    assert not unanswered(drawer)
    versions = Counter(
        e.object["metadata"]["name"]
        for e in bench.audit.events
        if e.object["metadata"].get("namespace") == drawer.namespace
    )
    assert max(versions.values(), default=0) <= MOST_VERSIONS, versions.most_common(3)
    log = operator.log(since)
    assert "Traceback" not in log, log[log.index("Traceback") - 500 :][:4000]
    assert operator.running
    assert operator.leads


def probe(drawer: Drawer, kind: str) -> Object:
    """Offer something to the server that only an open schema takes."""
    made = {"apiVersion": "taskoffer.dev/v1alpha1", "kind": kind, "metadata": {"name": "probe"}, "spec": ["anything"]}
    return drawer.ask("POST", drawer.path(kind) + "?dryRun=All", made)


def quiet(drawer: Drawer, seconds: float) -> None:
    """Look for a while: what has its answer is not written any more."""
    changes = versions_over(drawer, seconds)
    assert max(changes.values(), default=0) <= 1, changes.most_common(5)


@pytest.fixture
def deep_json() -> Iterator[None]:
    """Let this process read what is nested as deep as the server allows: the test and the auditor see it too."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(12_000)
    yield
    sys.setrecursionlimit(before)


def test_an_object_that_is_nested_as_deep_as_the_server_allows_blinds_nobody(
    deep_json: None, operator: OperatorProcess, bench: Bench, drawer: Drawer
) -> None:
    since = operator.log_size()
    bench.node()
    bench.policy()
    # A round of brackets belongs to the object around it.
    lists, mappings = json.loads("[" * 9_900 + "]" * 9_900), json.loads('{"a":' * 9_900 + "1" + "}" * 9_900)
    with ExitStack() as lax:
        for plural in PLURALS.values():
            lax.enter_context(anything_goes(bench, plural, shapeless=True))
        for kind, base in bases(bench).items():
            eventually(lambda kind=kind: probe(drawer, kind), f"{kind} takes anything")
            name = f"{bench.namespace}-deep"
            spec, status = {**base["spec"], "taskID": lists}, {"score": mappings}
            assert drawer.store(kind, name, spec, status) == "stored with a status"
            spec, status = {**base["spec"], "taskID": mappings}, {"score": lists}
            assert drawer.store(kind, f"{name}-too", spec, status) == "stored with a status"
        bench.admitted("among")
    bench.run_through("after")
    wait_until(lambda: not unanswered(drawer), "deep objects answered", SECONDS)
    assert operator.terminate() == 0
    operator.start()
    bench.run_through("restarted")
    assert "Traceback" not in operator.log(since), operator.log(since)[-4000:]
