"""The embedded log, ``log:``: traces and weights in local folders, with no service to run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from buffer.counts import BufferStats
from buffer.deletions import Deleted, Deletions
from buffer.eviction import Evictor
from buffer.files import OWNER_FILE, write_atomically
from buffer.folder_weights import FolderWeights, lines_in
from buffer.foreign import foreign_reports
from buffer.interface import (
    MAX_UNREADABLE_BYTES,
    Backend,
    Location,
    Offsets,
    Payload,
    RecordReader,
    Report,
    TraceLimits,
    Unreadable,
)
from buffer.layout import QUARANTINE, file_of, quarantined, stored_bytes
from buffer.log_deletion import delete_from_log, read_deletions, undelete_in_log
from buffer.sealing import OpeningReader, Sealer, SealingWriter, check_key, note_key, read_key
from buffer.segment_fetch import records_at
from buffer.segment_member import SegmentMember
from buffer.segment_reader import SegmentReader
from buffer.segment_report import check_segments, report_size
from buffer.segment_stats import log_stats
from buffer.segment_writer import SegmentWriter
from buffer.small_json import make_folder
from configs.urls import shown_url


class EmbeddedLog(Backend):
    """Segment files in ``run_dir/traces`` (``log:``) or in another folder (``log:/some/folder``),
    and weights in ``run_dir/weights``. ``file:`` is the same under the name of what it is.

    ``log:?key_file=PATH`` or ``log:?key_env=NAME`` encrypts records, see ``sealing.py``."""

    def __init__(
        self, url: str, run_dir: Path, *, max_unreadable_bytes: int = MAX_UNREADABLE_BYTES
    ) -> None:
        self._root, key = log_root(url, run_dir)
        self._sealer = None if key is None else Sealer(read_key(*key))
        self._weights = run_dir / "weights"
        self._max_unreadable_bytes = max_unreadable_bytes
        self._evictor: Evictor | None = None

    def open_trace_writer(self, limits: TraceLimits) -> SegmentWriter | SealingWriter:
        check_key(self._root, self._sealer)
        if self._sealer is None:
            return SegmentWriter(self._root, limits)
        note_key(self._root, self._sealer)
        return SealingWriter(SegmentWriter(self._root, limits), self._sealer)

    def open_record_reader(
        self, offsets: Offsets | None = None, group: str | None = None
    ) -> RecordReader:
        check_key(self._root, self._sealer)
        found: RecordReader
        if group is None:
            found = SegmentReader(self._root, offsets)
        else:
            found = SegmentMember(self._root, group, offsets)
        return found if self._sealer is None else OpeningReader(found, self._sealer)

    def fetch(self, locations: Collection[Location]) -> dict[Location, Payload]:
        check_key(self._root, self._sealer)
        opened = bytes_of(self._sealer)
        found = records_at(self._root, locations)
        return {location: opened(stored) for location, stored in found.items()}

    def keep_unreadable(self, name: str, payload: Payload) -> None:
        folder = self._root / QUARANTINE
        if self._sealer is not None:
            payload = self._sealer.seal(payload)
        with contextlib.suppress(OSError):  # a full disk costs the evidence, not the trainer
            make_folder(folder)
            used = sum(stored_bytes(path.lstat()) for path in quarantined(self._root))
            if used + len(payload) <= self._max_unreadable_bytes:
                write_atomically(file_of(folder, name, ".bin"), payload, OWNER_FILE)

    def unreadable(self) -> list[Unreadable]:
        return [Unreadable(one.stem, one.lstat().st_size) for one in quarantined(self._root)]

    def open_weights(self, line: str = "") -> FolderWeights:
        return FolderWeights(self._weights / line)

    def version_lines(self) -> list[str]:
        return lines_in(self._weights)

    def delete(self, tenant: str, *, until_ms: int | None = None) -> Deleted:
        check_key(self._root, self._sealer)
        return delete_from_log(self._root, tenant, bytes_of(self._sealer), until_ms)

    def undelete(self, digest: str) -> bool:
        return undelete_in_log(self._root, digest)

    def deletions(self) -> Deletions:
        return read_deletions(self._root)

    def expire(self, limits: TraceLimits) -> None:
        if self._root.is_dir():
            if self._evictor is None:
                self._evictor = Evictor(self._root, limits, own=self._root)
            self._evictor.evict(time.time(), own_open=None)

    def stats(self) -> BufferStats:
        check_key(self._root, self._sealer)
        return log_stats(self._root)

    def reports(self, limits: TraceLimits) -> Iterable[Report]:
        segments = check_segments(self._root)
        size = [report_size(self._root, limits)] if segments else []
        return [*segments, *size, *foreign_reports(self._root)]


def check_path(url: str, path: str, what: str) -> None:
    """Whether a URL names an absolute path on this host.

    Args:
        path: what follows its scheme.
        what: what the path is of, for messages.

    Raises:
        ValueError: it does not; the message shows no more of it than ``shown_url``.
    """
    scheme = url.partition(":")[0]
    if not path.startswith("/"):
        raise ValueError(
            f"buffer.url {shown_url(url)!r} must name an absolute {what}, as in "
            f"'{scheme}:/some/{what}'"
        )
    if path.startswith("//") and not path.startswith("///"):
        raise ValueError(
            f"buffer.url {shown_url(url)!r} names a host, but its {what} is on this one: "
            f"'{scheme}:/some/{what}'"
        )
    if any(letter in path for letter in "#\0\n"):
        raise ValueError(
            f"buffer.url {shown_url(url)!r}: the path of its {what} has a '#', or a letter that "
            f"ends a line"
        )


def bytes_of(sealer: Sealer | None) -> Callable[[Payload], Payload]:
    """What a stored payload says."""
    return (lambda payload: payload) if sealer is None else sealer.open


def log_root(url: str, run_dir: Path) -> tuple[Path, tuple[str, str] | None]:
    """Folder of the segment files that a ``log:`` or ``file:`` URL names, and where its key is.

    Raises:
        ValueError: the folder is not absolute, or an option is unknown.
    """
    place, mark, query = url.partition("?")
    path = place.partition(":")[2]
    option, equals, value = query.partition("=")
    if mark and (option not in ("key_file", "key_env") or not equals or not value):
        raise ValueError(
            f"buffer.url {shown_url(url)!r}: behind the '?' there may be key_file=PATH or "
            f"key_env=NAME"
        )
    key = (option, value) if mark else None
    if not path:
        return run_dir / "traces", key
    check_path(url, path, "folder")
    return Path(path), key
