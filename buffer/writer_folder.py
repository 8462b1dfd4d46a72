"""The folder of one writer of the embedded log, and its open segment.

Somebody may delete either while the writer runs, or the disk may refuse the folder at first. What
is written to a deleted file is lost without an error, so both are compared with what their paths
lead to.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from buffer.files import OWNER_FILE, OWNER_FOLDER, leads_to, open_regular, sync_folder
from buffer.frames import scan
from buffer.layout import LOCK, hold_lock, segment_path


class WriterFolder:
    """A folder that only its owner may read, with a lock that tells readers its writer is alive."""

    def __init__(self, root: Path, clock: Callable[[], float]) -> None:
        """
        Args:
            root: folder of the log.
            clock: unix time, seconds.
        """
        self._root = root
        self._clock = clock
        self._lock: int | None = None
        self.path = root / self._name(0)

    @property
    def is_there(self) -> bool:
        """It was made, and nobody has deleted or replaced it since."""
        return self._lock is not None and leads_to(self.path / LOCK, self._lock)

    @property
    def was_deleted(self) -> bool:
        """It was made and is not there any more."""
        return self._lock is not None and not self.is_there

    def make(self) -> None:
        """Make it, under a name that no other writer has had.

        Raises:
            OSError: the disk failed.
        """
        self.release()
        self._root.mkdir(mode=OWNER_FOLDER, parents=True, exist_ok=True)
        later_ms = 0
        while True:  # a second writer of this process within a millisecond takes the next name
            self.path = self._root / self._name(later_ms)
            try:
                self.path.mkdir(mode=OWNER_FOLDER)
                break
            except FileExistsError:
                later_ms += 1
        try:
            sync_folder(self._root)
            self._lock = hold_lock(self.path)
        except OSError:
            shutil.rmtree(self.path, ignore_errors=True)
            raise

    def release(self) -> None:
        """Let readers know that nobody writes here any more."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _name(self, later_ms: int) -> str:
        return f"w{os.getpid()}-{int(self._clock() * 1000) + later_ms}"


@dataclass(slots=True)
class OpenSegment:
    """A segment that is being written."""

    path: Path
    descriptor: int
    number: int
    first: int
    """Number of its first record among all that the writer appended."""
    begun_s: float
    """Unix time."""
    size: int = 0
    """Bytes of its complete records."""

    @classmethod
    def begin(cls, folder: Path, number: int, first: int, now_s: float) -> OpenSegment:
        """Create the file.

        Raises:
            OSError: the disk failed.
        """
        path = segment_path(folder, number)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        return cls(path, os.open(path, flags, OWNER_FILE), number, first, now_s)

    def num_left(self) -> int | None:
        """Records that are left of a file that somebody has deleted, replaced or cut off; ``None``:
        nobody has."""
        if not leads_to(self.path, self.descriptor):
            return 0
        num_bytes = os.fstat(self.descriptor).st_size
        return None if num_bytes >= self.size else _num_records(self.path, num_bytes)


def _num_records(path: Path, num_bytes: int) -> int:
    """Whole records in the first bytes of a segment; 0 if it cannot be read."""
    try:
        descriptor = open_regular(path)
    except OSError:
        return 0
    try:
        return sum(1 for _ in scan(descriptor, num_bytes))
    except OSError:
        return 0
    finally:
        os.close(descriptor)
