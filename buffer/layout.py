"""Files of the embedded log.

    <root>/w<pid>-<boot ms>/000042.seg    segments of one writer process, oldest first
    <root>/w<pid>-<boot ms>/LOCK          held (flock) while that process lives; says the folder's
                                          name, which tells a copy
    <root>/w<pid>-<boot ms>/EVICTED.json  counts of what was evicted from this folder
    <root>/EVICT.lock                     held while a process evicts
    <root>/quarantine/                    records that could not be decoded
    <root>/DELETED.json                   tenants that were deleted, see ``deletions.py``
    <root>/groups/                        what groups of readers have committed, see
                                          ``segment_member.py``

Each writer appends to a folder of its own, so writers never wait for each other. Folders and files
are their owner's alone to read.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from buffer.files import (
    OWNER_FILE,
    NotRegularError,
    open_regular,
    read_regular,
    write_atomically,
)

LOCK = "LOCK"
TOMBSTONE = "EVICTED.json"
DELETIONS = "DELETED.json"
EVICT_LOCK = "EVICT.lock"
QUARANTINE = "quarantine"
GROUPS = "groups"
_WRITER = re.compile(r"w[0-9A-Za-z_.-]+")
_SEGMENT = re.compile(r"([0-9]{6,})\.seg")


@dataclass(frozen=True, slots=True)
class Tombstone:
    """What was evicted from one writer's folder, by any process."""

    segment: int
    """Newest segment evicted."""
    next_number: int
    """Records with lower numbers are gone."""
    records: int
    """Sound records evicted."""
    num_bytes: int


def writer_names(root: Path) -> list[str]:
    """Folder names of all writers, sorted; empty if the log does not exist yet."""
    try:
        entries = list(os.scandir(root))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(e.name for e in entries if _WRITER.fullmatch(e.name) and e.is_dir())


def segment_numbers(folder: Path) -> list[int]:
    """Numbers of the existing segments, ascending; empty if the folder is gone.

    Only regular files are segments: a folder, a pipe or a link with such a name would stop every
    reader, and no writer makes one.
    """
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(match[1]) for match in map(_SEGMENT.fullmatch, names) if match)


def segment_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.seg"


def open_segment(folder: Path, number: int, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a segment.

    Raises:
        FileNotFoundError: there is none; what is no regular file is no segment.
        OSError: the disk failed.
    """
    path = segment_path(folder, number)
    try:
        return open_regular(path, flags)
    except NotRegularError as error:
        raise FileNotFoundError(errno.ENOENT, error.strerror, str(path)) from None


# With flock, not with the filelock library that the other locks use: readers ask whether a lock is
# held, for which they take a shared lock on a file opened read-only. An exclusive lock would make
# two readers that ask at once look like a writer, and would create the file in a folder that is
# only being inspected.
def hold_lock(folder: Path) -> int:
    """Take the lock of a writer's folder, which ends with the process, and note the folder's name.

    Returns:
        A descriptor; closing it releases the lock.
    """
    descriptor = open_regular(folder / LOCK, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with contextlib.suppress(OSError):  # a full disk: nothing else tells a copy of it then
        os.pwrite(descriptor, os.fsencode(folder.name), 0)
    return descriptor


def is_live(folder: Path) -> bool:
    """True while the process that writes to ``folder`` is running."""
    try:
        descriptor = open_regular(folder / LOCK)
    except (FileNotFoundError, NotRegularError):
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def read_tombstone(folder: Path) -> Tombstone | None:
    """What was evicted from a writer's folder; ``None`` if nothing was, or if the file is damaged:
    then the gap in the record numbers counts as damage."""
    try:
        tombstone = Tombstone(**json.loads(read_regular(folder / TOMBSTONE)))
    except (FileNotFoundError, NotRegularError, ValueError, TypeError):
        return None
    is_sound = all(type(value) is int for value in asdict(tombstone).values())
    return tombstone if is_sound else None


def write_tombstone(folder: Path, tombstone: Tombstone) -> None:
    content = json.dumps(asdict(tombstone)).encode()
    write_atomically(folder / TOMBSTONE, content, OWNER_FILE)
