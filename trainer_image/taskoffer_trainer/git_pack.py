"""Opens a pack that a stranger has sent: whole, of a size that memory can take, every object named by its content."""

from __future__ import annotations

import mmap
import zlib
from pathlib import Path

from dulwich.errors import ApplyDeltaError, ChecksumMismatch, FileFormatException
from dulwich.object_format import DEFAULT_OBJECT_FORMAT
from dulwich.pack import MemoryPackIndex, Pack, PackData, UnresolvedDeltas

from taskoffer_trainer.interrupt import Interrupt

__all__ = ["BROKEN", "MAX_UNPACKED", "PackError", "is_whole", "open_pack"]

MAX_UNPACKED = 2 << 30
"""Bytes of all objects of a pack together. They are put together in memory, and a delta of a few bytes can stand for
as many as its author likes; a trainer is code, whose repositories have a hundredth of it."""
BROKEN = (
    AssertionError,
    LookupError,
    ValueError,
    zlib.error,
    ApplyDeltaError,
    FileFormatException,
    UnresolvedDeltas,
)
"""What dulwich raises for a pack or an object that is not as git writes it."""
_OFFSET_DELTA, _NAMED_DELTA = 6, 7
_BLOCK = 1 << 16


class PackError(Exception):
    """A pack that cannot be used, with the reason in CamelCase."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def is_whole(path: Path) -> bool:
    """Tell whether a pack is as it was sent, by the checksum at its end."""
    try:
        with PackData(path, object_format=DEFAULT_OBJECT_FORMAT) as data:
            data.check()
    except (*BROKEN, ChecksumMismatch):
        return False
    return True


def open_pack(path: Path, interrupt: Interrupt) -> Pack:
    """Open a pack and give every object in it the name that its content has (git's SHA-1).

    Raises:
        PackError: when it is not as git writes it, or unpacks to more than :data:`MAX_UNPACKED`.
    """
    data = None
    try:
        _check_sizes(path, interrupt)
        data = PackData(path, object_format=DEFAULT_OBJECT_FORMAT)
        entries = data.sorted_entries(progress=lambda _number, _of: interrupt.check())
        index = MemoryPackIndex([*entries], DEFAULT_OBJECT_FORMAT, data.get_stored_checksum())
        return Pack.from_objects(data, index)
    except BaseException as error:
        if data is not None:
            data.close()
        if isinstance(error, BROKEN):
            raise PackError("PackBroken", f"the server sent a pack that cannot be read: {error}") from error
        raise


def _check_sizes(path: Path, interrupt: Interrupt) -> None:
    """Add up what the objects unpack to, from their headers (gitformat-pack), with none of them in memory."""
    total = 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        place = 12
        for _number in range(int.from_bytes(data[8:12])):
            interrupt.check()
            kind = data[place] >> 4 & 7
            size, place = _size(data, place)
            if kind == _OFFSET_DELTA:
                while data[place] & 0x80:
                    place += 1
                place += 1
            elif kind == _NAMED_DELTA:
                place += 20
            total = _added(total, size)
            head, place = _inflated(data, place, size)
            if kind in (_OFFSET_DELTA, _NAMED_DELTA):
                # A delta begins with the size of what it is made from, and of what it makes.
                _, after = _number_at(head, 0)
                total = _added(total, _number_at(head, after)[0])


def _added(total: int, size: int) -> int:
    if total + size > MAX_UNPACKED:
        raise PackError("TooLarge", f"it unpacks to more than {MAX_UNPACKED} bytes; a trainer is code")
    return total + size


def _size(data: mmap.mmap, place: int) -> tuple[int, int]:
    """Return the size in an object's header, and where the header ends."""
    size, shift = data[place] & 15, 4
    while data[place] & 0x80:
        place += 1
        size |= (data[place] & 0x7F) << shift
        shift += 7
    return size, place + 1


def _number_at(data: bytes, place: int) -> tuple[int, int]:
    number, shift = 0, 0
    while True:
        number |= (data[place] & 0x7F) << shift
        shift += 7
        place += 1
        if not data[place - 1] & 0x80:
            return number, place


def _inflated(data: mmap.mmap, place: int, size: int) -> tuple[bytes, int]:
    """Return the first bytes of what a zlib stream unpacks to, and where it ends; it must have this size."""
    stream, head, came = zlib.decompressobj(), b"", 0
    while not stream.eof:
        block = data[place : place + _BLOCK]
        piece = stream.decompress(block, _BLOCK)
        used = len(block) - len(stream.unused_data or stream.unconsumed_tail)
        place, came, head = place + used, came + len(piece), head or piece[:40]
        if came > size or not (used or piece):
            raise ValueError("an object is longer or shorter than its header says")
    return head, place
