"""Run one replica: election, kopf and status port side by side. The first to end takes the others with it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import uuid
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import kopf

from taskoffer.adapters.clock import monotonic
from taskoffer.adapters.events import EventWriter
from taskoffer.adapters.kube import Kube
from taskoffer.adapters.lease import LeadershipLostError, Lease, LeaseTimes
from taskoffer.adapters.status_server import Answers, StatusServer
from taskoffer.handlers.watches import registry_for
from taskoffer.reconcile.device_access import DevicesHaveComeError, until_devices_come
from taskoffer.reconcile.flow import Flow, SilentWatchError, listen
from taskoffer.reconcile.questions import Questions
from taskoffer.reconcile.replica import Replica
from taskoffer.reconcile.session import Session, Settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Options:
    """Options of a replica, as the command line gives them."""

    kubeconfig: Path | None = None
    listen: str = "0.0.0.0"
    port: int = 8080
    settings: Settings = field(default_factory=Settings)
    lease: LeaseTimes = field(default_factory=LeaseTimes)


async def run(options: Options) -> int:
    """Run until SIGTERM or SIGINT (exit code 0), or until leadership or a part of the replica is lost (1)."""
    stop = asyncio.Event()
    kube = await Kube.connect(options.kubeconfig, timeout=options.settings.write_timeout)
    identity = f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}"
    # The lease has connections of its own: its calls never queue behind the answers of a burst.
    lease_kube = await Kube.connect(options.kubeconfig, timeout=options.lease.renew_deadline)
    lease = Lease(lease_kube, options.settings.lease_namespace, options.settings.lease_name, identity, options.lease)
    session = Session(kube=kube, lease=lease, events=EventWriter(kube), settings=options.settings)
    replica = Replica(session)
    flow = Flow(replica.kinds, options.settings.watch_window, monotonic)
    questions = Questions(session, lambda: replica.leading)
    server = StatusServer(
        options.listen,
        options.port,
        healthy=flow.problem,
        ready=lambda: _ready(replica),
        answers=Answers(queue=questions.queue, offer=questions.offer),
    )
    await server.start()
    _on_signals(stop)
    tasks = {
        asyncio.create_task(replica.run(), name="replica"),
        asyncio.create_task(_watch(replica, flow, options, stop), name="watches"),
        asyncio.create_task(listen(flow, kube, replica.kinds), name="flow"),
        asyncio.create_task(until_devices_come(session), name="devices"),
        asyncio.create_task(stop.wait(), name="stop"),
    }
    try:
        done, rest = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        failed = [task for task in done if task.get_name() != "stop"]
        for task in failed:
            _explain(task)
        # A lease is given up only when nothing this replica has sent can still be committed. One that hears nothing
        # any more can still write.
        orderly = all(task.get_name() in ("flow", "devices") for task in failed)
        drained = orderly and await replica.drain(options.settings.write_timeout)
        # First what could take the lease again; all that can wait comes after somebody else may lead.
        await _end([task for task in rest if task.get_name() == "replica"])
        if drained:
            await lease.release()
        if orderly and replica.leading:
            await session.events.flush(seconds=1.0)
        await _end(rest)
    finally:
        await server.stop()
        await kube.close()
        await lease_kube.close()
    return 1 if failed else 0


async def _end(tasks: Collection[asyncio.Task[object]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=5)


def _on_signals(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)


def _explain(task: asyncio.Task[object]) -> None:
    error = task.exception() if not task.cancelled() else None
    lost = _first(error, LeadershipLostError)
    if lost is not None:
        logger.error("leadership lost, leaving: %s", lost)
    elif (silent := _first(error, SilentWatchError)) is not None:
        logger.error("watch silent, leaving: %s", silent)
    elif (come := _first(error, DevicesHaveComeError)) is not None:
        logger.warning("leaving: %s", come)
    else:
        logger.error("%s ended, leaving", task.get_name(), exc_info=error)


def _first(error: BaseException | None, kind: type[Exception]) -> BaseException | None:
    """Return the first exception of a kind, however deep in groups it lies, or None."""
    if isinstance(error, BaseExceptionGroup):
        return next((found for inner in error.exceptions if (found := _first(inner, kind)) is not None), None)
    return error if isinstance(error, kind) else None


def _ready(replica: Replica) -> str | None:
    return None if replica.session.world.complete else "not every kind has been listed"


async def _watch(replica: Replica, flow: Flow, options: Options, stop: asyncio.Event) -> None:
    """Run kopf without its peering, which is no leader election, and without its own signal handling.

    kopf takes the signals over when it starts, so they are taken back right then: on SIGTERM the answers on their way
    have to be finished while the watches still run.
    """
    if options.kubeconfig is not None:
        # kopf's kubeconfig login reads the variable and nothing else.
        os.environ["KUBECONFIG"] = str(options.kubeconfig)
    # Which kinds there are is known once the server has said whether it serves devices.
    await replica.kinds_known.wait()
    flow.watch(replica.kinds)
    before = asyncio.all_tasks()
    tasks = await kopf.spawn_tasks(
        registry=registry_for(replica, flow, options.kubeconfig),
        standalone=True,
        clusterwide=True,
    )
    _on_signals(stop)
    await kopf.run_tasks(tasks, ignored=before)
    raise RuntimeError("kopf ended by itself")


def _tune_garbage_collection() -> None:
    """Look for cycles seldom, and never among what was imported.

    A burst makes hundreds of thousands of short-lived objects, nearly all of which go by reference counting. At
    Python's defaults (a look at every 700 new ones) the looks took a fifth of the process's time; at 20,000 one look
    lasts 10 to 20 ms, which an offer that comes just then has to wait. A look at everything, which lasts longest, is
    made at each resync.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(3_000, 5, 1_000)


def main(options: Options) -> int:
    """Run a replica on uvloop where that is installed."""
    _tune_garbage_collection()
    with contextlib.suppress(ImportError):
        import uvloop

        code: int = uvloop.run(run(options))
        return code
    return asyncio.run(run(options))
