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
import hashlib
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock

from buffer.files import OWNER_FILE, NotRegularError, is_folder, open_regular
from buffer.frames import claimed_frame
from buffer.small_json import is_foreign, is_whole, make_way, read_small_json, write_small_json

LOCK = "LOCK"
TOMBSTONE = "EVICTED.json"
DELETIONS = "DELETED.json"
EVICT_LOCK = "EVICT.lock"
QUARANTINE = "quarantine"
GROUPS = "groups"
log = logging.getLogger(__name__)

_SAID: set[tuple[Path, str]] = set()
_MOST_SAID = 4096
_MOST_FOREIGN = 64
"""Segments looked at to find the one that is being written."""
_LONGEST = 200
"""Bytes of a writer's name that leave room for an ending; a file's name has 255 at most."""
WRITER_NAME = re.compile(r"w[0-9A-Za-z_.-]+")
GROUP_NAME = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,128}")
_OF_GROUP = re.compile(
    r"w[0-9A-Za-z_.~-]+\.(json|lock)|[0-9]+-[0-9]+-[0-9]+\.member|claims(\.size)?"
)
SEGMENT_NAME = re.compile(r"([0-9]{6}|[1-9][0-9]{6,8})\.seg")


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
    return sorted(e.name for e in entries if WRITER_NAME.fullmatch(e.name) and is_folder(e))


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
    return sorted(int(match[1]) for match in map(SEGMENT_NAME.fullmatch, names) if match)


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


def first_number(folder: Path, segment: int) -> int | None:
    """Number of a segment's first record by its head; ``None`` if it has none, or is gone."""
    try:
        descriptor = open_segment(folder, segment)
    except OSError:
        return None
    try:
        head = claimed_frame(descriptor, 0)
    finally:
        os.close(descriptor)
    return None if head is None else head.number


def first_open(folder: Path, numbers: Sequence[int]) -> int:
    """The lowest segment that a living writer may be appending to: the last one that begins with a
    later record than the one before. What follows it was put there by somebody else, or was begun
    just now.

    Args:
        numbers: its segments, ascending; at least one.
    """
    for index in range(len(numbers) - 1, max(0, len(numbers) - _MOST_FOREIGN), -1):
        first = first_number(folder, numbers[index])
        before = first_number(folder, numbers[index - 1])
        if first is not None and (before is None or first > before):
            return numbers[index]
    return numbers[0] if len(numbers) <= _MOST_FOREIGN else numbers[-1]


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
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        if not is_foreign(error):
            raise
        # Somebody has put it there: nobody can tell, and a reader loses nothing by waiting.
        said_once(folder / LOCK, f"{error.strerror}; its writer is taken to be running")
        return True
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
    path = folder / TOMBSTONE
    try:
        tombstone = Tombstone(**read_small_json(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError) as error:
        said_once(path, str(error) if isinstance(error, ValueError) else "it is no such counts")
        return None
    counts = (tombstone.next_number, tombstone.records, tombstone.num_bytes)
    if not is_whole(tombstone.segment, least=-1) or not all(map(is_whole, counts)):
        said_once(path, "a count is no whole number of 63 bits")
        return None
    if _is_ahead(folder, tombstone):
        said_once(path, "it counts records as evicted that are still there")
        return None
    return tombstone


def _is_ahead(folder: Path, tombstone: Tombstone) -> bool:
    """Whether a record that is said to be gone is still there, behind the newest segment that is.

    Only heads are looked at; one that is damaged says nothing.
    """
    numbers = segment_numbers(folder)  # after the tombstone was read: eviction is ahead of it
    if numbers and tombstone.segment > numbers[-1]:
        return True
    later = next((number for number in numbers if number > tombstone.segment), None)
    if later is None:
        return False
    first = first_number(folder, later)
    return first is not None and first < tombstone.next_number


def write_tombstone(folder: Path, tombstone: Tombstone) -> None:
    write_small_json(folder / TOMBSTONE, asdict(tombstone))


def eviction_lock(root: Path, timeout_s: float) -> FileLock:
    """The lock of whoever evicts or deletes; what lies in its place and is no file is renamed.

    Raises:
        OSError: the disk failed.
    """
    path = root / EVICT_LOCK
    make_way(path)
    return FileLock(path, timeout=timeout_s, mode=OWNER_FILE, fallback_to_soft=False)


def quarantined(root: Path) -> list[Path]:
    """Files of the records that were put aside, sorted; what is no regular file is none."""
    try:
        with os.scandir(root / QUARANTINE) as entries:
            names = [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [root / QUARANTINE / name for name in sorted(names) if name.endswith(".bin")]


def stored_bytes(status: os.stat_result) -> int:
    """What a closed file takes on the disk; one of holes takes nothing."""
    return min(status.st_size, status.st_blocks * 512)


def said_once(path: Path, problem: str) -> None:
    """Warn that a file of the log cannot be used, once for each file and problem."""
    if len(_SAID) < _MOST_SAID and (path, problem) not in _SAID:
        _SAID.add((path, problem))
        log.warning("%s cannot be used (%s); it is passed over", path, problem)


def group_names(root: Path) -> list[str]:
    """Names of the groups that have read a log, sorted. A folder is a group's if its name can be
    one and it holds a file that members make."""
    try:
        names = [path.name for path in (root / GROUPS).iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name for name in names if GROUP_NAME.fullmatch(name) and _is_group(root, name))


def _is_group(root: Path, name: str) -> bool:
    try:
        with os.scandir(root / GROUPS / name) as entries:
            return any(_OF_GROUP.fullmatch(entry.name) for entry in entries)
    except OSError:  # no folder, or one that its owner lets nobody look into
        return False


def file_of(folder: Path, writer: str, ending: str) -> Path:
    """Path of a group's file about a writer; the middle of a very long name becomes a digest."""
    name = writer
    if len(os.fsencode(writer)) > _LONGEST:
        digest = hashlib.sha256(os.fsencode(writer)).hexdigest()
        name = f"{writer[:100]}~{digest[:32]}"
    return folder / f"{name}{ending}"
