"""One folder of a disk spool, as its sender sees it: what is left in it, and what was sent of it.

    <root>/w<pid>-<boot ms>/      segments of one process, see ``layout.py``
    <root>/<folder>/SENT.json     position after the last record that is stored elsewhere
    <root>/<folder>/SENDER        held (flock) by the process that sends what a dead one has left

``SENT.json`` may lag behind by what the next process sends once more: readers of the buffer
recognise it by producer, epoch and sequence number.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

from filelock import Timeout

from buffer.committed import why_impossible
from buffer.files import open_regular
from buffer.interface import Payload
from buffer.layout import (
    eviction_lock,
    is_live,
    said_once,
    segment_numbers,
    segment_path,
    writer_names,
)
from buffer.log_deletion import blank_records
from buffer.segment_reader import Position, SegmentReader, position_of
from buffer.small_json import make_way, read_small_json, write_small_json

SENT = "SENT.json"
SENDER = "SENDER"
_WAIT_S = 10.0


class SpoolFolder:
    """Reads the records of one folder once, in order."""

    def __init__(self, root: Path, name: str, lock: int | None = None) -> None:
        """
        Args:
            name: of the folder.
            lock: descriptor of its ``SENDER``, held; ``None``: this process itself writes to it.
        """
        self.name = name
        self._root = root
        self._lock = lock
        self._reader = SegmentReader(root)
        self._sent = self._stored_sent = _sent_position(root / name)
        self._last = self._sent
        """Behind the last record that was handed on; deleted ones may follow."""
        self._reader.move_to(name, self._sent)
        self.is_read = False
        """All of it was read, and nobody writes to it any more."""

    @property
    def is_own(self) -> bool:
        """This process itself writes to it."""
        return self._lock is None

    @property
    def position(self) -> Position:
        """Behind the last record that was read."""
        return self._reader.position(self.name)

    @property
    def is_sent(self) -> bool:
        """All that was read of it is stored elsewhere."""
        return self._sent.number >= self._last.number

    @property
    def num_lost(self) -> int:
        """Records that were evicted before they were read, damaged, or torn by a dying process."""
        counts = self._reader.counts
        return counts.damaged + counts.evicted_unread + counts.torn

    @property
    def num_unsent(self) -> int:
        """Records that could not be sent, because they were lost or deleted."""
        return self.num_lost + self.num_deleted

    def next_record(self) -> Payload | None:
        """The next record; ``None`` if there is none at present."""
        records = self._reader.read_from([self.name], max_records=1, max_bytes=1)
        if records:
            self._last = self.position
            return records[0].payload
        self.is_read = not self.is_own
        return None

    def notice_evicted(self) -> None:
        """Count what was evicted since the last look."""
        self._reader.notice_evicted(self.name)

    def pass_over(self, position: Position) -> None:
        """The records up to there were handed on without being read."""
        self._last = replace(position, lost=self.position.lost, deleted=self.position.deleted)
        self._reader.move_to(self.name, self._last)

    def sent(self, position: Position) -> None:
        """The records up to there are stored elsewhere."""
        self._sent = position

    def save(self) -> None:
        """Remember what was sent, and delete the segments of which nothing is needed any more.

        Raises:
            OSError: the disk failed.
        """
        if self._sent == self._stored_sent or not (self._root / self.name).is_dir():
            return
        write_small_json(self._root / self.name / SENT, asdict(self._sent))
        self._stored_sent = self._sent

    def sent_segments(self) -> list[int]:
        """Segments before the first record that is needed after a restart."""
        numbers = segment_numbers(self._root / self.name)
        return [number for number in numbers if number < self._stored_sent.segment]

    def delete_sent(self) -> None:
        """Delete segments of a dead process that are sent; not while somebody evicts."""
        numbers = self.sent_segments()
        if numbers:
            with _no_eviction(self._root) as is_quiet:
                for number in numbers if is_quiet else ():
                    segment_path(self._root / self.name, number).unlink(missing_ok=True)

    def delete(self) -> bool:
        """Delete the folder of which everything is sent; False while somebody evicts."""
        with _no_eviction(self._root) as is_quiet:
            if is_quiet:
                shutil.rmtree(self._root / self.name, ignore_errors=True)
        if is_quiet:
            self.release()
        return is_quiet

    @property
    def num_deleted(self) -> int:
        """Records that ``blank`` had overwritten when their turn came."""
        return self._reader.counts.deleted

    def blank(self, is_unwanted: Callable[[Payload], bool]) -> int:
        """Overwrite records, sent or not. Waits while somebody evicts, which takes moments.

        Returns:
            How many they were.

        Raises:
            OSError: the disk failed.
        """
        folder = self._root / self.name
        with eviction_lock(self._root, _WAIT_S):
            return sum(blank_records(folder, n, is_unwanted)[0] for n in segment_numbers(folder))

    def release(self) -> None:
        """Let another process send the rest."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def left_behind(root: Path, known: set[str]) -> Iterator[SpoolFolder]:
    """Folders of dead processes, each now this process's to send.

    Args:
        known: names of the folders that it has already.
    """
    for name in writer_names(root):
        if name not in known and not is_live(root / name):
            lock = _locked(root / name)
            if lock is not None:
                yield SpoolFolder(root, name, lock)


def _locked(folder: Path) -> int | None:
    try:
        make_way(folder / SENDER)
        descriptor = open_regular(folder / SENDER, os.O_RDWR | os.O_CREAT)
    except OSError:  # its sender has just deleted it, or the disk fails
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    if not (folder / SENDER).exists():
        os.close(descriptor)
        return None
    return descriptor


def _sent_position(folder: Path) -> Position:
    path = folder / SENT
    try:
        position = position_of(folder.name, read_small_json(path))
        problem = why_impossible(folder, position, may_be_next=True)
    except FileNotFoundError:
        return Position()
    except (OSError, ValueError) as error:
        problem = str(error)
    if problem is None:
        return position
    said_once(path, f"{problem}; all records of this spool are sent again")  # and recognised
    return Position()


@contextlib.contextmanager
def _no_eviction(root: Path) -> Iterator[bool]:
    """Whether nobody evicts within the ``with`` block."""
    try:
        with eviction_lock(root, 0):
            yield True
    except Timeout:
        yield False
