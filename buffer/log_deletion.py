"""Deletion of a tenant's records from the embedded log, in place.

Each record's head gets a flag and its payload is overwritten with zeros (see ``frames.py``); bytes
that belong to no sound record are overwritten, too, because nobody can tell whose they were. Sizes,
positions and numbers stay, so readers and the writer of the segment go on undisturbed. What a crash
interrupts, the next deletion finishes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

from buffer.deletions import Deleted, Deletions, Ends, digest_of, may_be_of, now_ms, owner_of
from buffer.distinct_writers import writer_folders
from buffer.files import read_regular
from buffer.frames import HEAD, next_data, pack_deleted_head, scan
from buffer.interface import MAX_UNREADABLE_BYTES, Payload
from buffer.layout import (
    DELETIONS,
    eviction_lock,
    first_open,
    is_live,
    open_segment,
    quarantined,
    segment_numbers,
)
from buffer.small_json import read_small_json, write_small_json

_MOST_BYTES = 64 << 20
"""Of the list of deletions: a million tenants."""
_WAIT_S = 60.0
"""Longest wait for another process that evicts or deletes, seconds."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_ZEROS = bytes(1 << 20)

Opened = Callable[[Payload], Payload]


def read_deletions(root: Path) -> Deletions:
    """The list of a log; empty if there is none.

    Raises:
        OSError: the disk failed.
        ValueError: the list is damaged.
    """
    path = root / DELETIONS
    try:
        return Deletions.from_json(read_small_json(path, _MOST_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        return Deletions()
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}): nobody knows who was deleted. Remove it, and delete the "
            f"tenants again"
        ) from None


def delete_from_log(
    root: Path, tenant: str, opened: Opened, until_ms: int | None = None
) -> Deleted:
    """Delete all records of a tenant from a log, quarantine included.

    Args:
        opened: what a stored payload says, where payloads are encrypted.
        until_ms: as ``Backend.delete`` takes it.

    On a full disk the tenant cannot be listed, but its records are overwritten in place.

    Raises:
        OSError: the disk failed or is full, or others kept the log locked for a minute; try again.
            The message says what was done.
        ValueError: the list of deletions is damaged.
    """
    if not root.is_dir():
        return Deleted()
    # Evictors do not wait for the lock, so a writer never does.
    with eviction_lock(root, _WAIT_S):
        before, digest = read_deletions(root), digest_of(tenant)
        # At once, for what arrives meanwhile; until when it holds, the records will tell.
        at_once = before.with_tenant(digest, now_ms() if until_ms is None else until_ms)
        try:
            _write_list(root, at_once)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
        records = num_bytes = 0
        ends = Ends()

        def is_theirs(payload: Payload) -> bool:
            owner = owner_of(opened(payload))
            return owner is not None and ends.see(owner, tenant)

        for folder in (root / name for name in writer_folders(root)):
            for number in segment_numbers(folder):
                found, size = blank_records(folder, number, is_theirs)
                records, num_bytes = records + found, num_bytes + size
        aside = _delete_from_quarantine(root, tenant, opened)  # which makes room
        listed = before.with_tenant(digest, ends.until_ms(until_ms))
        try:
            _write_list(root, listed)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}. {records} records and {aside} that were put aside are deleted, "
                f"but the tenant is not listed: what is still on its way will be kept. Make room, "
                f"and repeat the deletion",
                error.filename,
            ) from error
        return Deleted(records, num_bytes, aside, until_ms=listed.until_ms[digest])


def undelete_in_log(root: Path, digest: str) -> bool:
    """Take a deletion off the list; whether it was there.

    Raises:
        OSError, ValueError: as ``delete_from_log``.
    """
    if not root.is_dir():
        return False
    with eviction_lock(root, _WAIT_S):
        listed = read_deletions(root)
        if digest not in listed.until_ms:
            return False
        _write_list(root, listed.without(digest))
        return True


def _write_list(root: Path, listed: Deletions) -> None:
    """
    Raises:
        OSError: the disk failed; it names the list.
    """
    path = root / DELETIONS
    try:
        write_small_json(path, dict(listed.until_ms))
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def blank_records(
    folder: Path, number: int, is_unwanted: Callable[[Payload], bool]
) -> tuple[int, int]:
    """Overwrite records of one segment with zeros. Nobody may evict meanwhile.

    Args:
        folder: of a writer.
        number: of the segment.

    Returns:
        Records deleted, and the bytes of their payload.

    Raises:
        OSError: the disk failed.
    """
    # A writer appends to its last segment as long as it lives: what follows the last sound record
    # there may be on its way. Looked at before the file is.
    numbers = segment_numbers(folder)
    is_written = bool(numbers) and is_live(folder) and number >= first_open(folder, numbers)
    descriptor = open_segment(folder, number, os.O_RDWR)
    try:
        size = os.fstat(descriptor).st_size
        records = num_bytes = end = 0
        for frame in scan(descriptor, size):
            _blank(descriptor, end + HEAD.size, frame.start)  # empty unless something is damaged
            is_theirs = not frame.is_deleted and is_unwanted(frame.payload)
            if is_theirs:
                os.pwrite(descriptor, pack_deleted_head(frame), frame.start)
                records, num_bytes = records + 1, num_bytes + len(frame.payload)
            if frame.is_deleted or is_theirs:
                _blank(descriptor, frame.start + HEAD.size, frame.end)
            end = frame.end
        if not is_written:
            _blank(descriptor, end + HEAD.size, size)
        os.fdatasync(descriptor)
        return records, num_bytes
    finally:
        os.close(descriptor)


def _blank(descriptor: int, start: int, stop: int) -> None:
    """Overwrite some bytes with zeros, unless they are."""
    at = start
    while at < stop and (at := next_data(descriptor, at, stop)) < stop:
        zeros = _ZEROS[: min(len(_ZEROS), stop - at)]
        if os.pread(descriptor, len(zeros), at) != zeros:
            os.pwrite(descriptor, zeros, at)
        at += len(zeros)


def _delete_from_quarantine(root: Path, tenant: str, opened: Opened) -> int:
    theirs = 0
    for path in quarantined(root):
        content = read_regular(path, MAX_UNREADABLE_BYTES)
        try:
            is_theirs = may_be_of(tenant, opened(content))
        except ValueError:  # longer than any that is put aside, or sealed with another key
            is_theirs = True
        if is_theirs:
            path.unlink(missing_ok=True)
            theirs += 1
    return theirs
