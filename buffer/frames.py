"""The format of a record in a segment file, and the search for whole records among damaged ones.

A frame is a head of 32 bytes and the payload, little endian:

    magic 4 | crc32 4 | version 2 | zero 2 | payload length 4 | number 8 | unix ms 8 | payload

The checksum covers everything that follows it, head and payload, so any flipped bit is noticed: if
it is in the magic the frame is not found, elsewhere the checksum disagrees. ``number`` counts from
0 over all segments of a writer; a gap in it shows exactly how many records were lost.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

MAGIC = b"\xf5\xaa\xd7\xfe"
"""Four bytes that no request can produce: JSON here is ASCII, and every fourth byte of int32 token
ids is 0. A search after damage therefore cannot find a frame that a client forged."""
VERSION = 1
HEAD = struct.Struct("<4sIHHIQQ")
MAX_PAYLOAD_BYTES = (1 << 32) - 1
_CHECKED_FROM = 8  # the checksum covers the head from here on
_CHUNK = 1 << 20  # bytes searched at a time


@dataclass(frozen=True, slots=True)
class Frame:
    """One whole record found in a segment."""

    start: int
    """Offset of its first byte in the segment."""
    end: int
    """One past its last byte."""
    number: int
    """Running number within its writer."""
    unix_ms: int
    """When it was appended."""
    payload: bytes


def pack_head(payload: bytes, number: int, unix_ms: int) -> bytes:
    """Head of the frame that holds ``payload``."""
    head = HEAD.pack(MAGIC, 0, VERSION, 0, len(payload), number, unix_ms)
    crc = zlib.crc32(payload, zlib.crc32(head[_CHECKED_FROM:]))
    return HEAD.pack(MAGIC, crc, VERSION, 0, len(payload), number, unix_ms)


def read_frame(descriptor: int, start: int, size: int) -> Frame | None:
    """The frame at offset ``start`` of a file of ``size`` bytes; ``None`` unless it is whole,
    undamaged and of a known version."""
    end = claimed_end(descriptor, start)
    if end is None or end > size:
        return None
    block = os.pread(descriptor, end - start, start)
    if len(block) < end - start:  # truncated since the size was taken
        return None
    _, crc, version, _, _, number, unix_ms = HEAD.unpack_from(block)
    if zlib.crc32(memoryview(block)[_CHECKED_FROM:]) != crc or version != VERSION:
        return None
    return Frame(start, end, number, unix_ms, block[HEAD.size :])


def claimed_end(descriptor: int, start: int) -> int | None:
    """End of the frame at ``start`` according to its head; ``None`` if there is no head."""
    head = os.pread(descriptor, HEAD.size, start)
    if len(head) < HEAD.size or not head.startswith(MAGIC):
        return None
    length: int = HEAD.unpack(head)[4]
    return start + HEAD.size + length


def next_frame(descriptor: int, start: int, size: int) -> Frame | None:
    """The first sound frame at or after ``start``; anything before it is damaged or torn."""
    return read_frame(descriptor, start, size) or _search_frame(descriptor, start + 1, size)


def scan(descriptor: int, size: int) -> Iterator[Frame]:
    """All sound frames of a file, in order."""
    frame = next_frame(descriptor, 0, size)
    while frame is not None:
        yield frame
        frame = next_frame(descriptor, frame.end, size)


def _search_frame(descriptor: int, start: int, size: int) -> Frame | None:
    at = start
    while at < size:
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
