#!/usr/bin/env python3
"""Take each of the ledger's rules out of the code, one at a time, and see its tests turn red.

A copy of the operator is changed; the working tree is not touched. Each line says which rule, what was done to it,
and whether its tests noticed. Ends with 1 when a rule is not missed by its tests.

    hack/ledger_mutations.py            # all, about ten minutes
    hack/ledger_mutations.py 5 8        # the rules 5 and 8
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DECISION, RENDER, RECONCILE, ADAPTERS = (
    f"taskoffer/{part}" for part in ("decision", "render", "reconcile", "adapters")
)


@dataclass(frozen=True)
class Mutation:
    """A rule taken out.

    Attributes:
        rule: Its number in docs/explanation/ledger.md.
        what: What the operator does then.
        edits: Files below ``operator/``, each with code that makes the rule, which must be there exactly once, and what
            stands there instead.
        tests: pytest's arguments that select the tests which show the rule.
    """

    rule: int
    what: str
    edits: tuple[tuple[str, str, str], ...]
    tests: tuple[str, ...]


def unit(name: str, words: str) -> tuple[str, ...]:
    """Select unit tests of a file by words of their names."""
    return (f"tests/unit/test_{name}.py", "-k", words)


def kmock(words: str) -> tuple[str, ...]:
    """Select tests of the whole operator against an emulated server."""
    return ("tests/kmock/test_operator.py", "-k", words)


def server(name: str, words: str) -> tuple[str, ...]:
    """Select tests of the apiserver rung."""
    return (f"tests/apiserver/test_operator_{name}.py", "-k", words)


MUTATIONS = (
    Mutation(
        1,
        "decides before every kind has been listed",
        (
            (f"{RECONCILE}/world.py", "return all(store.listed for store in self.stores)", "return True"),
            (
                f"{RECONCILE}/replica.py",
                "        await self.resync()\n        await session.lease.acquire()",
                "        await session.lease.acquire()",
            ),
            (
                f"{RECONCILE}/replica.py",
                "        await self.resync()\n        self.leading = True",
                "        self.leading = True",
            ),
        ),
        unit("admission_under_faults", "before_every_kind_was_listed"),
    ),
    Mutation(
        1,
        "leads on what it knew before it gained the lease",
        (
            (
                f"{RECONCILE}/replica.py",
                "        await self.resync()\n        self.leading = True",
                "        self.leading = True",
            ),
        ),
        unit("admission_under_faults", "restart or lists_again or leader"),
    ),
    Mutation(
        2,
        "keeps what a list no longer has",
        ((f"{RECONCILE}/cache.py", "            corrected += self._remove(uid, at)", "            pass"),),
        unit("cache", "drops_what_the_watch_has_missed"),
    ),
    Mutation(
        2,
        "never lists again",
        (
            (
                f"{RECONCILE}/replica.py",
                "            await asyncio.sleep(self.session.settings.resync)\n            await self.resync()",
                "            await asyncio.sleep(1e9)",
            ),
        ),
        unit("admission_under_faults", "watch_never_told"),
    ),
    Mutation(
        3,
        "writes answers whatever the offer has become",
        (
            (
                f"{RENDER}/offers.py",
                'return {"metadata": {"resourceVersion": offer.resource_version, "uid": offer.uid}, "status": status}',
                'return {"status": status}',
            ),
        ),
        unit("admission_under_faults", "edited_meanwhile or created_anew or carries_the_version"),
    ),
    Mutation(
        4,
        "takes an object of the wanted name for its own",
        (
            (
                f"{RECONCILE}/attempts.py",
                "return any(o",
                "return True or any(o",
            ),
        ),
        server("jobs", "of_the_wanted_name_is_not_adopted"),
    ),
    Mutation(
        5,
        "forgets a booking after a timeout",
        ((f"{RECONCILE}/admission.py", "                maybe_written = True\n", "                return False\n"),),
        unit("admission_under_faults", "after_a_timeout or unknown_outcome"),
    ),
    Mutation(
        5,
        "takes a conflict for a refusal without reading the offer",
        (
            (
                f"{RECONCILE}/admission.py",
                "                stands = await self._stands(offer, decision)\n",
                "                stands = False\n",
            ),
        ),
        unit("admission_under_faults", "timeout or unknown_outcome or conflict"),
    ),
    Mutation(
        6,
        "adds up what an admission, its Job and its pod say",
        ((f"{DECISION}/ledger.py", "charge = max(*by_source.values(), ", "charge = max(sum(by_source.values()), "),),
        unit("ledger", "charges"),
    ),
    Mutation(
        6,
        "forgets devices that only one of an attempt's views names",
        ((f"{DECISION}/ledger.py", ", len(known.get(place, ())))", ", 0)"),),
        unit("devices", "charged_for_each_of_its_devices"),
    ),
    Mutation(
        6,
        "hands out devices that somebody else has claimed",
        ((f"{RECONCILE}/world.py", "        yield from self.devices.charges(pool)\n", ""),),
        unit("device_claims", "foreign_claims_are_booked"),
    ),
    Mutation(
        6,
        "takes a GPU for free while its pod still ends",
        ((f"{RECONCILE}/charges.py", "if count and pod.node is not None and not pod.view.terminal:", "if False:"),),
        server("jobs", "keeps_its_gpus_until_the_pod_has_ended"),
    ),
    Mutation(
        6,
        "overlooks the pods of others",
        (
            (
                f"{RECONCILE}/replica.py",
                'if wanted and any("/" in name for name in wanted):\n                return True',
                'if wanted and any("/" in name for name in wanted):\n                return False',
            ),
        ),
        server("ledger", "pod_of_somebody_else"),
    ),
    Mutation(
        7,
        "leaves the choice of the node to the scheduler",
        ((f"{RENDER}/job.py", '        "affinity": ', '        "x-affinity": '),),
        unit("render", "tied_to_the_decided_node"),
    ),
    Mutation(
        7,
        "waits for ever for a container that does not start",
        (
            (
                f"{DECISION}/lifecycle.py",
                'if self.facts.now >= gives_up:\n            message = f"the container did not start',
                'if False:\n            message = f"the container did not start',
            ),
        ),
        unit("lifecycle", "start"),
    ),
    Mutation(
        8,
        "writes without a look at the lease",
        (
            (
                f"{ADAPTERS}/lease.py",
                "        if not self.held:\n            raise LeadershipLostError",
                "        if False:\n            raise LeadershipLostError",
            ),
        ),
        unit("admission_under_faults", "without_the_lease"),
    ),
    Mutation(
        8,
        "counts the lease from when its renewal was answered",
        (
            (
                f"{ADAPTERS}/lease.py",
                "self._held_until = before + self.times.renew_deadline",
                "self._held_until = monotonic() + self.times.renew_deadline",
            ),
        ),
        unit("lease", "before_its_renewing or two_candidates"),
    ),
    Mutation(
        8,
        "decides before the old leader's last write has arrived",
        (
            (
                f"{RECONCILE}/replica.py",
                "                await asyncio.sleep(session.settings.write_timeout)",
                "                pass",
            ),
        ),
        unit("admission_under_faults", "new_leader_waits"),
    ),
    Mutation(
        8,
        "takes a lease that somebody removed for one that was given up",
        ((f"{RECONCILE}/replica.py", "        if len(session.world.offers) > 0:", "        if False:"),),
        unit("admission_under_faults", "finds_no_lease"),
    ),
    Mutation(
        8,
        "leaves what an old leader overbooked",
        (
            (
                f"{RECONCILE}/admission.py",
                "            if over <= 0:\n                continue",
                "            if True:\n                continue",
            ),
        ),
        unit("admission_under_faults", "old_leader_overbooked"),
    ),
    Mutation(
        8,
        "makes a job of a late write that overbooks",
        ((f"{RECONCILE}/jobs.py", "if foreign and (overbooked :=", "if False and (overbooked :="),),
        unit("jobs_under_faults", "late_write"),
    ),
    Mutation(
        9,
        "writes what was decided under another version of the policy",
        (
            (
                f"{RECONCILE}/admission.py",
                "return any(entry.view.ref == ref for entry in self._session.world.policies)",
                "return True",
            ),
        ),
        unit("jobs_under_faults", "waits_for_its_turn"),
    ),
    Mutation(
        9,
        "starts what was admitted under another version of the policy",
        (
            (
                f"{RECONCILE}/jobs.py",
                "        if policy is None or policy.spec is None:\n            await self._take_back(",
                "        if False:\n            await self._take_back(",
            ),
        ),
        unit("jobs_under_faults", "policy"),
    ),
    Mutation(
        10,
        "has Kubernetes repeat an attempt",
        ((f"{RENDER}/job.py", '"backoffLimit": 0,', '"backoffLimit": 3,'),),
        unit("render", "kubernetes_itself_never_repeats"),
    ),
    Mutation(
        10,
        "starts an attempt before it is written down",
        (
            (
                f"{DECISION}/lifecycle.py",
                '        node = ", ".join(a.node_name for a in assignments)\n',
                "        self.actions.append(EnsureAttempt(self.attempts[-1], number))\n"
                '        node = ", ".join(a.node_name for a in assignments)\n',
            ),
        ),
        unit("lifecycle", "attempt"),
    ),
    Mutation(
        11,
        "lets offers of one second tie",
        ((f"{DECISION}/cycle.py", "(s.created, s.uid) < (offer.created, offer.uid)", "s.created < offer.created"),),
        unit("cycle", "one_second or lower_uid"),
    ),
    Mutation(
        11,
        "sets the clock of a task back with each attempt",
        (
            (
                f"{DECISION}/lifecycle.py",
                "                deadline=self.current.deadline,\n",
                "                deadline=None,\n",
            ),
        ),
        unit("lifecycle", "clock or deadline"),
    ),
)


def try_one(mutation: Mutation, scratch: Path) -> tuple[bool, float, str]:
    """Run a mutation's tests on a changed copy; return whether they failed, the seconds, and their last line."""
    copy = scratch / "operator"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(ROOT / "operator", copy, ignore=shutil.ignore_patterns("__pycache__"))
    for file, find, put in mutation.edits:
        target = copy / file
        text = target.read_text()
        if text.count(find) != 1:
            sys.exit(f"rule {mutation.rule}, {mutation.what}: {file} has {find!r} not exactly once")
        target.write_text(text.replace(find, put))
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *mutation.tests],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        check=False,
    )
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    if done.returncode not in (0, 1):
        sys.exit(
            f"rule {mutation.rule}, {mutation.what}: the tests did not run\n{done.stdout[-3000:]}{done.stderr[-2000:]}"
        )
    return done.returncode == 1, time.monotonic() - started, last


def main() -> int:
    """Try the mutations."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rules", nargs="*", type=int, help="numbers of rules; default: all")
    wanted = parser.parse_args().rules
    unnoticed = 0
    with tempfile.TemporaryDirectory() as scratch:
        for mutation in MUTATIONS:
            if wanted and mutation.rule not in wanted:
                continue
            red, seconds, last = try_one(mutation, Path(scratch))
            unnoticed += not red
            print(
                f"{'red  ' if red else 'GREEN'} rule {mutation.rule:2}: {mutation.what} ({seconds:.0f} s; {last})",
                flush=True,
            )
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
