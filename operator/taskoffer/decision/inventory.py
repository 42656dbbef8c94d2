"""Which devices the nodes offer, from what drivers publish: ResourceSlices, as far as a DeviceClass means them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import ValidationError

from taskoffer.api.v1alpha1.devices import PCI_BUS_ID, PCIE_ROOT, UUID, Device, device_key
from taskoffer.decision.devices import NodeDevice

Attribute = str | int | bool


@dataclass(frozen=True, slots=True)
class PublishedDevice:
    """A device as its driver publishes it."""

    name: str
    attributes: Mapping[str, Attribute]
    """By domain/name; those of the driver's own domain too. Versions count as texts."""
    closed: bool = False
    """Whether a taint keeps new claims off it."""
    shared: bool = False
    """Whether it can be given away several times, or shares counters with devices of which it is a part."""


@dataclass(frozen=True, slots=True)
class Slice:
    """A ResourceSlice: a part of a pool's devices, on one node."""

    driver: str
    pool: str
    generation: int
    slices: int
    """Of how many slices the pool consists at this generation."""
    node: str | None
    """None where its devices do not belong to one node."""
    devices: tuple[PublishedDevice, ...]


@dataclass(frozen=True, slots=True)
class ClassRule:
    """What a DeviceClass means: one driver, and attributes that must have certain values."""

    driver: str
    attributes: tuple[tuple[str, Attribute], ...] = ()

    def means(self, driver: str, device: PublishedDevice) -> bool:
        """Tell whether a device belongs to the class. True is no 1 here, as in CEL."""
        if driver != self.driver:
            return False
        found = [(device.attributes.get(name), wanted) for name, wanted in self.attributes]
        return all(type(value) is type(wanted) and value == wanted for value, wanted in found)


@dataclass(frozen=True, slots=True)
class Inventory:
    """The devices of one class."""

    offered: Mapping[str, tuple[NodeDevice, ...]] = field(default_factory=dict)
    """By node, what may be given away."""
    unnamed: int = 0
    """Devices of the class that no claim can name, because no attribute tells them from the others."""


_TEXT = r"\"(?P<{0}d>[^\"\\]*)\"|'(?P<{0}s>[^'\\]*)'"
_DRIVER = re.compile(rf"device\.driver\s*==\s*(?:{_TEXT.format('v')})")
_ATTRIBUTE = re.compile(
    rf"device\.attributes\[\s*(?:{_TEXT.format('d')})\s*\]"
    r"(?:\.(?P<name>[A-Za-z_]\w*)|\[\s*[\"'](?P<key>\w+)[\"']\s*\])\s*==\s*"
    rf"(?:{_TEXT.format('v')}|(?P<number>-?\d+)|(?P<truth>true|false))"
)


def class_rule(expressions: Sequence[str]) -> ClassRule | str:
    """Read a DeviceClass's CEL selectors; all of them must hold. Return what they mean, or why that is not known.

    Comparisons of the driver and of attributes with constants, joined by ``&&``, are understood: the classes of the
    GPU drivers say no more. Anything else could mean other devices than the ones that would be counted.
    """
    drivers: set[str] = set()
    attributes: list[tuple[str, Attribute]] = []
    for expression in expressions:
        for term in _terms(expression):
            if (found := _DRIVER.fullmatch(term)) is not None:
                drivers.add(_text(found, "v"))
            elif (found := _ATTRIBUTE.fullmatch(term)) is not None:
                attributes.append((f"{_text(found, 'd')}/{found['name'] or found['key']}", _constant(found)))
            else:
                return f"its selector {term[:200]} is not understood: only comparisons with == joined by && are"
    if len(drivers) != 1:
        return "its selectors do not name one driver: device.driver == ... must be among them"
    return ClassRule(drivers.pop(), tuple(attributes))


def _terms(expression: str) -> list[str]:
    """Split a conjunction; an operator inside of quotes makes a term that is not understood, never a wrong one."""
    return [term.strip() for term in expression.split("&&")]


def _text(found: re.Match[str], group: str) -> str:
    double, single = found[f"{group}d"], found[f"{group}s"]
    return str(double if double is not None else single)


def _constant(found: re.Match[str]) -> Attribute:
    if found["number"] is not None:
        return int(found["number"])
    if found["truth"] is not None:
        return str(found["truth"]) == "true"
    return _text(found, "v")


def inventory(slices: Iterable[Slice], rule: ClassRule) -> Inventory:
    """Return the devices of a class by node.

    As the scheduler does it: of each pool the slices of the highest generation count, and only once all of them are
    there, each device once. A device that is closed by a taint, shared, or not of one node is not offered. Nor is one
    that no claim could name.
    """
    offered: dict[str, list[NodeDevice]] = defaultdict(list)
    unnamed = 0
    for pool in current(slices):
        for part in pool:
            for published in part.devices:
                if part.node is None or published.shared or not rule.means(part.driver, published):
                    continue
                device = named(part, published)
                if device is None:
                    unnamed += 1
                elif not published.closed:
                    root = published.attributes.get(PCIE_ROOT)
                    offered[part.node].append(NodeDevice(device, root if isinstance(root, str) else ""))
    return Inventory({node: _distinct(found) for node, found in offered.items()}, unnamed)


def current(slices: Iterable[Slice]) -> list[list[Slice]]:
    """Return the slices of each pool that is complete at its highest generation and holds each device once."""
    pools: dict[tuple[str, str], list[Slice]] = defaultdict(list)
    for part in slices:
        pools[part.driver, part.pool].append(part)
    found = []
    for pool in pools.values():
        newest = max(part.generation for part in pool)
        parts = [part for part in pool if part.generation == newest]
        names = [device.name for part in parts for device in part.devices]
        complete = all(part.slices == len(parts) for part in parts)
        if complete and len(set(names)) == len(names):
            found.append(parts)
    return found


def nodes_of(slices: Iterable[Slice]) -> dict[str, str]:
    """Return the node of each device that any slice knows, by the device's key: allocated ones may be on the way out.

    Where generations differ the highest one is right.
    """
    ordered = sorted(slices, key=lambda part: part.generation)
    return {
        device_key(part.driver, part.pool, device.name): part.node
        for part in ordered
        if part.node is not None
        for device in part.devices
    }


def named(part: Slice, published: PublishedDevice) -> Device | None:
    """Return a device with the attribute that a claim can name it by: the driver's uuid, else the place on the bus."""
    for attribute in (f"{part.driver}/{UUID}", PCI_BUS_ID):
        value = published.attributes.get(attribute)
        if isinstance(value, str) and value:
            try:
                return Device(driver=part.driver, pool=part.pool, name=published.name, attribute=attribute, value=value)
            except ValidationError:
                # The server bounds all of them; what has got past it could not be written into a status.
                return None
    return None


def _distinct(found: Sequence[NodeDevice]) -> tuple[NodeDevice, ...]:
    """Leave out devices of a node that share the value by which they would be named: a claim could get the other."""
    values: dict[tuple[str, str], int] = defaultdict(int)
    for one in found:
        values[one.device.attribute, one.device.value] += 1
    return tuple(one for one in found if values[one.device.attribute, one.device.value] == 1)
