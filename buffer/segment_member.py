"""Members of a group share the embedded log: each writer's records go to one of them at a time.

    <root>/groups/<group>/<writer>.json    how far the group has committed this writer's records
    <root>/groups/<group>/<writer>.lock    held (flock) by the member that reads this writer
    <root>/groups/<group>/<member>.member  held (flock) while that member lives
    <root>/groups/<group>/claims           which traces were learnt, see ``claim_file.py``; with
                                           ``claims.size`` beside it

Locks end with their process, so a killed member's writers are free at once, and whoever takes one
continues from what was committed. A member that reads more than its share of the writers lets go of
one when all it has read of it is committed.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import math
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from buffer.claim_file import ClaimFile
from buffer.claims import Place
from buffer.committed import read_committed, sound_committed, why_impossible, write_committed
from buffer.counts import ReaderCounts
from buffer.distinct_writers import distinct_writers
from buffer.files import OWNER_FILE, OWNER_FOLDER, leads_to, open_regular
from buffer.interface import (
    MAX_READ_BYTES,
    Location,
    Offsets,
    Record,
    RecordReader,
    ServiceAwayError,
)
from buffer.layout import GROUPS, file_of, said_once, segment_path
from buffer.seen import Identity
from buffer.segment_reader import Position, SegmentReader, position_of
from buffer.small_json import is_foreign, make_folder, make_way
from buffer.version_rules import check_group

log = logging.getLogger(__name__)

_LOOK_S = 0.1
"""Seconds between two looks for writers and members."""
_NUMBERS = itertools.count()


class SegmentMember(RecordReader):
    """One member of a group of readers of the embedded log."""

    def __init__(self, root: Path, group: str, offsets: Offsets | None = None) -> None:
        """
        Raises:
            ValueError: ``group`` is no plain name, or ``offsets`` are not what ``offsets()``
                returns.
        """
        check_group(group)
        self._root = root
        self._folder = root / GROUPS / group
        self._resumed = {name: position_of(name, at) for name, at in (offsets or {}).items()}
        self._reader = SegmentReader(root)
        self._owned: dict[str, int] = {}
        """Writer -> descriptor of its lock."""
        self._leaving: set[str] = set()
        """Owned writers that are not read any more, until all that was read is committed."""
        self._member = f"{os.getpid()}-{time.time_ns()}-{next(_NUMBERS)}"
        self._claims = ClaimFile(self._folder, self._member)
        self._presence: int | None = None
        self._looked_s = -math.inf
        self._lock = threading.Lock()
        """Guards all of the above."""

    @property
    def counts(self) -> ReaderCounts:
        return self._reader.counts

    def offsets(self) -> dict[str, Any]:
        with self._lock:
            return {name: asdict(self._reader.position(name)) for name in self._owned}

    def read(self, max_records: int, max_bytes: int = MAX_READ_BYTES) -> list[Record]:
        with self._lock:
            if time.monotonic() - self._looked_s >= _LOOK_S:
                self._look()
            names = sorted(self._owned.keys() - self._leaving)
            records = self._reader.read_from(names, max_records, max_bytes)
            if not records:
                self._looked_s = -math.inf
            return records

    def commit(self, offsets: Offsets) -> None:
        with self._lock:
            places = {
                name: position_of(name, offsets[name])
                for name in self._owned.keys() & offsets.keys()
            }
            ends: dict[str, Place] = {
                name: (place.segment, place.offset) for name, place in places.items()
            }
            # Folders that were removed after their records were read: those were saved, too.
            vanished = self._claims.claims.writers_of(self._member)
            ends |= dict.fromkeys(vanished - self._owned.keys() - offsets.keys())
            if ends:
                self._claims.settle(ends)
            for name, position in places.items():
                self._commit(name, position)
            for name in list(self._leaving):
                if self._reader.position(name) == read_committed(self._folder, name):
                    self._let_go(name)

    def claim(self, found: Sequence[tuple[Record, Identity]]) -> list[bool]:
        with self._lock:
            try:
                return self._claims.claim(found, self._is_gone)
            except OSError as error:  # a full disk ends no trainer
                raise ServiceAwayError(error.errno, f"nothing is claimed: {error}") from None

    def _is_gone(self, location: Location, member: str) -> bool:
        """Whether a record was evicted, and the member that had it is dead."""
        writer, where = location
        path = self._folder / f"{member}.member"
        try:
            if segment_path(self._root / writer, int(where.partition("-")[0])).exists():
                return False
            descriptor = _locked(path, create=False)
            if descriptor is None:
                return not path.exists()
        except (OSError, ValueError) as error:  # no file can have such a name
            if isinstance(error, OSError) and not is_foreign(error):
                raise
            return True
        os.close(descriptor)
        return True

    def close(self) -> None:
        with self._lock:
            self._claims.close()
            for name in list(self._owned):
                self._let_go(name)
            if self._presence is not None:
                os.close(self._presence)
                self._presence = None

    def _look(self) -> None:
        """Take free writers up to this member's share, and mark those beyond it to be left."""
        if self._presence is None:
            # One by one: ``parents`` would let everybody look into those in between.
            self._root.mkdir(mode=OWNER_FOLDER, parents=True, exist_ok=True)
            for folder in (self._root / GROUPS, self._folder):
                make_folder(folder)
            self._presence = _locked(self._folder / f"{self._member}.member")
        self._looked_s = time.monotonic()
        names = distinct_writers(self._root)
        for gone in self._owned.keys() - set(names):
            self._let_go(gone)
        open_names = [name for name in names if not self._is_done(name)]
        share = math.ceil(len(open_names) / self._num_members())
        for name in open_names:
            if name not in self._owned and len(self._owned) < share:
                self._take(name)
        held = [name for name in open_names if name in self._owned]
        self._leaving = set(held[share:])

    def _is_done(self, name: str) -> bool:
        """Nothing of this writer is left to read or to commit; it needs no member any more."""
        if not self._reader.has_finished(name):
            return False
        position = self._reader.position(name)
        if name in self._owned and position == read_committed(self._folder, name):
            self._let_go(name, forget=False)
        return name not in self._owned

    def _take(self, name: str) -> None:
        path = file_of(self._folder, name, ".lock")
        make_way(path)
        lock = _locked(path)
        if lock is None:
            return
        self._owned[name] = lock
        position, problem = sound_committed(self._root, self._folder, name)
        if problem is not None:
            log.warning(
                "%s is not what this group has committed (%s): the group reads %s from its first "
                "record again, and what it had committed may be read twice",
                file_of(self._folder, name, ".json"),
                problem,
                name,
            )
            write_committed(self._folder, name, position)
        self._reader.move_to(name, position)
        resumed = self._resumed.pop(name, position)
        is_ahead = resumed.number > position.number
        if is_ahead and why_impossible(self._root / name, resumed) is None:
            self._reader.move_to(name, resumed)
            place = resumed.segment, resumed.offset
            self._claims.settle({name: place}, are_learnt=True)
            self._commit(name, resumed)

    def _commit(self, name: str, position: Position) -> None:
        before = read_committed(self._folder, name)
        if (position.number, position.segment) > (before.number, before.segment) or (
            position.segment == before.segment and position.offset > before.offset
        ):
            write_committed(self._folder, name, position)

    def _let_go(self, name: str, forget: bool = True) -> None:
        if forget:
            self._reader.forget(name)
        self._leaving.discard(name)
        os.close(self._owned.pop(name))

    def _num_members(self) -> int:
        """Living members; files of dead ones are removed."""
        num_members = 1  # whatever happens to its file, this one lives
        for path in self._folder.glob("*.member"):
            descriptor = _locked(path, create=False)
            if descriptor is None:
                is_member = path.is_file() and not path.is_symlink()
                num_members += is_member and not leads_to(path, self._presence or -1)
            else:
                path.unlink(missing_ok=True)
                os.close(descriptor)
        return num_members


def _locked(path: Path, create: bool = True) -> int | None:
    """A descriptor of a file that this process has locked; ``None`` if somebody else holds it."""
    try:
        descriptor = open_regular(path, os.O_RDWR | (os.O_CREAT if create else 0), OWNER_FILE)
    except OSError as error:
        if create and not is_foreign(error):
            raise
        if not isinstance(error, FileNotFoundError):
            said_once(path, error.strerror or type(error).__name__)
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
