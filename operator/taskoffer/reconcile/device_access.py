"""Whether devices can be watched here. They are an extra: a cluster need not serve them, nor let the operator read.

What is watched is settled when a replica starts. One that finds later that a policy could have its devices after all
leaves, and whoever started it starts it again.
"""

from __future__ import annotations

import asyncio
import logging

from taskoffer.adapters.kube import (
    WATCHED_DEVICES,
    ApiError,
    Kube,
    NotFoundError,
    ThrottledError,
    UnknownOutcomeError,
)
from taskoffer.reconcile.devices import Access
from taskoffer.reconcile.session import Session
from taskoffer.reconcile.world import World

logger = logging.getLogger(__name__)

_LOOK_AGAIN_SECONDS = 30.0


class DevicesHaveComeError(Exception):
    """The devices that a policy asks for can be watched now, and could not when this replica started."""


async def find_access(kube: Kube) -> Access:
    """Ask the server whether the operator may read every kind of devices. Tries until it knows."""
    delay = 0.2
    while True:
        try:
            return await _access(kube)
        except (ApiError, ThrottledError, UnknownOutcomeError) as error:
            logger.warning("devices not asked for", extra={"error": str(error)})
        await asyncio.sleep(delay)
        delay = min(delay * 2, 10.0)


async def _access(kube: Kube) -> Access:
    for resource in WATCHED_DEVICES.values():
        try:
            await kube.probe(resource)
        except NotFoundError:
            return Access.NOT_SERVED
        except ApiError as error:
            if error.status == 403:
                return Access.NOT_ALLOWED
            raise
    return Access.WATCHED


async def until_devices_come(session: Session) -> None:
    """Look now and then for the devices that a policy asks for in vain.

    Raises:
        DevicesHaveComeError: when they can be watched.
    """
    devices = session.world.devices
    while True:
        await asyncio.sleep(min(_LOOK_AGAIN_SECONDS, session.settings.resync))
        if devices.access is Access.WATCHED or not _wanted(session.world):
            continue
        found = await find_access(session.kube)
        if found is Access.WATCHED:
            raise DevicesHaveComeError("a policy pins GPUs, and this cluster lets the operator do so now")
        if found is not devices.access:
            devices.tell(found)
            session.cycle_wanted.set()
            session.policies_wanted.set()


def _wanted(world: World) -> bool:
    """Tell whether a policy names a DeviceClass, or did so when it was in force last."""
    views = [entry.view for entry in world.policies]
    specs = [view.spec for view in views if view.spec is not None] + [view.last[1] for view in views if view.last]
    return any(spec.resources[0].device_class_name is not None for spec in specs)
