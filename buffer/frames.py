"""The format of a record in a segment file, and the search for whole records among damaged ones.

A frame is a head of 32 bytes and the payload, little endian:

    magic 4 | checksum 4 | version 2 | flags 2 | payload length 4 | number 8 | unix ms 8 | payload

The checksum covers everything that follows it, head and payload: damage to the magic hides the
frame, any other disagrees with the checksum, but for one case in 2**32. It is the lower half of
XXH3, which takes 0.05 ms for a megabyte where CRC-32 takes 0.15 ms at best. ``number`` counts from
0 over all segments of a writer; a gap in it tells exactly how many records were lost.

A record that was deleted keeps its place: its head gets a flag, and a checksum of the head alone;
then its payload is overwritten with zeros. Positions of readers stay right, and whoever is in the
middle of reading it finds the new head on a second look.

Frames of version 1, which had a CRC-32, are still found, so that what an older server wrote is told
from damage.
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64, xxh3_64_intdigest

from buffer.blocks import Blocks
from buffer.interface import Payload

MAGIC = b"\xf5\xaa\xd7\xfe"
"""Four bytes that no request can produce: JSON here is ASCII, and every fourth byte of int32 token
ids is 0. A search after damage therefore cannot find a frame that a client forged."""
VERSION = 2
HEAD = struct.Struct("<4sIHHIQQ")
MAX_PAYLOAD_BYTES = (1 << 32) - 1
_CHECKED_FROM = 8  # the checksum covers the head from here on
_CHUNK = 1 << 20  # bytes searched at a time
_CRC_VERSION = 1
_ZEROS = memoryview(bytes(_CHUNK))
_TRUSTED_BYTES = 16 << 20
"""Of a longer frame the checksum is found to be right before memory for it is taken: a head that
claims gigabytes may be anybody's, and one in a sparse file costs its maker nothing."""
_DELETED = 1
"""Flag of a record that was deleted."""


Allocate = Callable[[int], NDArray[np.uint8]]
"""Returns so many bytes of memory, uninitialised."""


def _new_memory(num_bytes: int) -> NDArray[np.uint8]:
    return np.empty(num_bytes, np.uint8)


class Frame(NamedTuple):
    """One whole record found in a segment. A tuple is made in a third of a dataclass's time."""

    start: int
    """Offset of its first byte in the segment."""
    end: int
    """One past its last byte."""
    number: int
    """Running number within its writer."""
    unix_ms: int
    """When it was appended."""
    payload: memoryview
    """Writable; nobody else sees it. Empty if the record was deleted."""
    is_deleted: bool = False


def pack_head(payload: Payload, number: int, unix_ms: int) -> bytes:
    """Head of the frame that holds ``payload``."""
    head = HEAD.pack(MAGIC, 0, VERSION, 0, len(payload), number, unix_ms)
    checksum = _checksum(head[_CHECKED_FROM:], payload)
    return HEAD.pack(MAGIC, checksum, VERSION, 0, len(payload), number, unix_ms)


def pack_deleted_head(frame: Frame) -> bytes:
    """Head that replaces the one of ``frame``, to be written before its payload is overwritten."""
    length = frame.end - frame.start - HEAD.size
    rest = (VERSION, _DELETED, length, frame.number, frame.unix_ms)
    head = HEAD.pack(MAGIC, 0, *rest)
    return HEAD.pack(MAGIC, _checksum(head[_CHECKED_FROM:], b""), *rest)


def _checksum(head: Payload, payload: Payload) -> int:
    """Of the head from its version on, and of the payload."""
    seed: int = xxh3_64_intdigest(head)
    whole: int = xxh3_64_intdigest(payload, seed)
    return whole & 0xFFFF_FFFF


def read_frame(
    descriptor: int,
    start: int,
    size: int,
    allocate: Allocate = _new_memory,
    end: int | None = None,
) -> Frame | None:
    """The frame at offset ``start`` of a file of ``size`` bytes; ``None`` unless it is whole,
    undamaged and of a known version.

    It is read into memory of its own. Mapping the file would save that copy; but a mapping ends the
    process when the disk fails or the file is cut, and keeps an evicted segment on the disk for as
    long as one of its traces is held.

    Args:
        end: where it ends, from an index of frames that were sound: then its head is not read
            first, to learn that. ``None`` also if the head says something else.
    """
    if end is None:
        begin = os.pread(descriptor, HEAD.size, start)
        if len(begin) < HEAD.size or not begin.startswith(MAGIC):
            return None
        end = start + HEAD.size + HEAD.unpack(begin)[4]
        if end > size:
            return None
        if end - start > _TRUSTED_BYTES and not _is_sound(descriptor, start, end):
            return None
    block = allocate(end - start).data
    if os.preadv(descriptor, [block], start) < end - start:  # truncated since the size was taken
        return None
    magic, checksum, version, flags, length, number, unix_ms = HEAD.unpack_from(block)
    if magic != MAGIC or length != end - start - HEAD.size:
        return None
    head, payload = block[_CHECKED_FROM : HEAD.size], block[HEAD.size :]
    if version == VERSION and flags == 0:  # first, for it is nearly always so
        if checksum == xxh3_64_intdigest(payload, xxh3_64_intdigest(head)) & 0xFFFF_FFFF:
            return Frame(start, end, number, unix_ms, payload)
    elif version == VERSION:
        is_deleted = flags == _DELETED
        payload = payload[:0] if is_deleted else payload
        if checksum == _checksum(head, payload):
            return Frame(start, end, number, unix_ms, payload, is_deleted)
        if is_deleted:
            return None
    elif version == _CRC_VERSION and checksum == zlib.crc32(payload, zlib.crc32(head)):
        return Frame(start, end, number, unix_ms, payload)
    if _is_deleted(descriptor, start):  # while it was read
        return read_frame(descriptor, start, size, allocate)
    return None


def _is_sound(descriptor: int, start: int, end: int) -> bool:
    """Whether the checksum of a frame is right, found out in little memory. One that is being
    deleted meanwhile counts as sound: whoever reads it notices."""
    head = os.pread(descriptor, HEAD.size, start)
    _, checksum, version, flags, *_ = HEAD.unpack(head)
    if version == VERSION and flags == _DELETED:
        return True
    if version not in (VERSION, _CRC_VERSION):
        return False
    checked = head[_CHECKED_FROM:]
    xxh3, crc = xxh3_64(seed=xxh3_64_intdigest(checked)), zlib.crc32(checked)
    at, data, chunk = start + HEAD.size, start, memoryview(bytearray(_CHUNK))
    while at < end:
        data = next_data(descriptor, at, end) if data <= at else data
        if at < data:  # a hole, which is not read: that would fill the system's cache with zeros
            part = _ZEROS[: min(_CHUNK, data - at, end - at)]
        else:
            part = chunk[: min(_CHUNK, end - at)]
            if os.preadv(descriptor, [part], at) < len(part):
                return False
        at += len(part)
        if version == VERSION:
            xxh3.update(part)
        else:
            crc = zlib.crc32(part, crc)
    found = xxh3.intdigest() & 0xFFFF_FFFF if version == VERSION else crc
    return bool(found == checksum) or _is_deleted(descriptor, start)


def _is_deleted(descriptor: int, start: int) -> bool:
    head = os.pread(descriptor, HEAD.size, start)
    return len(head) == HEAD.size and HEAD.unpack(head)[2:4] == (VERSION, _DELETED)


@dataclass(frozen=True, slots=True)
class Claimed:
    """What a head says of its frame, whether or not that is true."""

    end: int
    number: int


def claimed_frame(descriptor: int, start: int) -> Claimed | None:
    """What the head at ``start`` says; ``None`` if there is no head."""
    head = os.pread(descriptor, HEAD.size, start)
    if len(head) < HEAD.size or not head.startswith(MAGIC):
        return None
    *_, length, number, _ = HEAD.unpack(head)
    return Claimed(start + HEAD.size + length, number)


def claimed_end(descriptor: int, start: int) -> int | None:
    """End of the frame at ``start`` according to its head; ``None`` if there is no head."""
    claimed = claimed_frame(descriptor, start)
    return None if claimed is None else claimed.end


def next_frame(
    descriptor: int, start: int, size: int, allocate: Allocate = _new_memory
) -> Frame | None:
    """The first sound frame at or after ``start``; anything before it is damaged or torn."""
    frame = read_frame(descriptor, start, size, allocate)
    return frame or _search_frame(descriptor, start + 1, size)


def scan(descriptor: int, size: int) -> Iterator[Frame]:
    """All sound frames of a file, in order."""
    allocate = Blocks().take  # whoever scans looks at one frame after another
    frame = next_frame(descriptor, 0, size, allocate)
    while frame is not None:
        yield frame
        frame = next_frame(descriptor, frame.end, size, allocate)


def _search_frame(descriptor: int, start: int, size: int) -> Frame | None:
    at = start
    while at < size:
        at = next_data(descriptor, at, size)
        chunk = os.pread(descriptor, _CHUNK, at)
        hit = chunk.find(MAGIC)
        if hit < 0:
            at += max(1, len(chunk) - len(MAGIC) + 1)  # a magic may straddle two chunks
            continue
        frame = read_frame(descriptor, at + hit, size)
        if frame is not None:
            return frame
        at += hit + 1
    return None


def next_data(descriptor: int, at: int, size: int) -> int:
    """Where the next stored bytes are: a hole of gigabytes costs no time. It is all zeros, which a
    magic has none of, so no frame begins in one."""
    try:
        return os.lseek(descriptor, at, os.SEEK_DATA)
    except OSError as error:
        # No more data; or a file system that does not know of holes.
        return size if error.errno == errno.ENXIO else at
