"""How far a group of readers has committed each writer of the embedded log.

    <root>/groups/<group>/<writer>.json

A position is believed only if the writer's segments bear it out: the file is small JSON of small
numbers, and the position lies between two records that have those numbers. Otherwise whoever reads
the writer next begins with its first record. Records may then be read again, which a trainer
notices, but none is skipped.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

from buffer.frames import HEAD, claimed_frame
from buffer.layout import file_of, open_segment, read_tombstone, segment_numbers
from buffer.segment_reader import Position, position_of
from buffer.small_json import read_small_json, write_small_json


def read_committed(folder: Path, writer: str) -> Position:
    """What a group has stored, as it is there; the beginning if it is unreadable.

    Raises:
        OSError: the disk failed.
    """
    try:
        return position_of(writer, read_small_json(file_of(folder, writer, ".json")))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return Position()


def write_committed(folder: Path, writer: str, position: Position) -> None:
    """
    Raises:
        OSError: the disk failed.
    """
    write_small_json(file_of(folder, writer, ".json"), asdict(position))


def sound_committed(root: Path, folder: Path, writer: str) -> tuple[Position, str | None]:
    """What a group has committed, checked against the writer's segments.

    Returns:
        The position, and why what is stored cannot be it; the position is then the beginning.

    Raises:
        OSError: the disk failed.
    """
    try:
        position = position_of(writer, read_small_json(file_of(folder, writer, ".json")))
    except (FileNotFoundError, NotADirectoryError):
        return Position(), None
    except ValueError as error:
        return Position(), str(error)
    problem = why_impossible(root / writer, position)
    return (position, None) if problem is None else (Position(), problem)


def why_impossible(folder: Path, position: Position, *, may_be_next: bool = False) -> str | None:
    """Why no reader of a writer's folder can have come to a position; ``None``: one can.

    Args:
        may_be_next: it may also be the beginning of the segment that follows the last one.

    Raises:
        OSError: the disk failed.
    """
    if position == Position():
        return None
    if position.lost + position.deleted > position.number:
        return "more records are lost and deleted than there were"
    numbers = segment_numbers(folder)  # before the tombstone: what is gone since is counted there
    try:
        descriptor = open_segment(folder, position.segment)
    except FileNotFoundError:
        if may_be_next and position.offset == 0 and position.segment > max(numbers, default=-1):
            is_next = not numbers or position.segment == numbers[-1] + 1
            is_behind = position.number >= _least_behind(folder, numbers, position.segment)
            return None if is_next and is_behind else "it is behind what was written"
        return _why_not_evicted(folder, position)
    try:
        size = os.fstat(descriptor).st_size
        if position.offset > size:
            return f"segment {position.segment} ends before byte {position.offset}"
        least, most = _numbers_at(descriptor, position.offset, size)
    finally:
        os.close(descriptor)
    if position.offset == 0:  # records at the end of the segment before may be damaged
        least = _least_behind(folder, numbers, position.segment)
    if most is not None and not least <= position.number <= most:
        return f"the record there is not number {position.number}"
    return None


def _why_not_evicted(folder: Path, position: Position) -> str | None:
    tombstone = read_tombstone(folder)
    if tombstone is None or tombstone.segment < position.segment:
        return f"segment {position.segment} never was"
    if position.number > tombstone.next_number:
        return f"number {position.number} was never reached there"
    return None


def _numbers_at(descriptor: int, offset: int, size: int) -> tuple[int, int | None]:
    """The least and the greatest number that the next record may have for a reader that has come
    to this offset, as the heads before it say; ``None`` where nobody can tell.

    An offset between two records allows for none.
    """
    at, number = 0, 0
    while at < offset:
        head = claimed_frame(descriptor, at)
        if head is None or head.end > size or head.number < number:
            # Damage. Whatever follows it has 32 bytes for each record at least.
            return number, number + (offset - at) // HEAD.size + 1 if number else None
        at, number = head.end, head.number + 1
    if at > offset:
        return 1, 0
    if at > 0:
        return number, number
    head = claimed_frame(descriptor, at)
    return 0, None if head is None else head.number


def _least_behind(folder: Path, numbers: list[int], segment: int) -> int:
    """The least number of a reader that has come to the end of what precedes a segment."""
    tombstone = read_tombstone(folder)
    least = 0 if tombstone is None or tombstone.segment >= segment else tombstone.next_number
    before = [number for number in numbers if number < segment]
    if not before:
        return least
    try:
        descriptor = open_segment(folder, before[-1])
    except FileNotFoundError:
        return least
    try:
        size = os.fstat(descriptor).st_size
        return max(least, _numbers_at(descriptor, size, size)[0])
    finally:
        os.close(descriptor)
