"""What lies in a log's folder and is not the log's, for ``buffer inspect``.

Readers and writers pass over all of it; somebody should know that it is there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from buffer.claim_file import CLAIMS, cut_off
from buffer.committed import sound_committed
from buffer.files import kind_of
from buffer.interface import Report
from buffer.layout import (
    EVICT_LOCK,
    GROUP_NAME,
    GROUPS,
    LOCK,
    QUARANTINE,
    SEGMENT_NAME,
    TOMBSTONE,
    WRITER_NAME,
    group_names,
    read_tombstone,
    writer_names,
)

MOST = 1000
"""Lines at most."""


@dataclass(frozen=True, slots=True)
class ForeignReport(Report):
    """Something that no log makes."""

    path: str
    problem: str

    @property
    def is_damaged(self) -> bool:
        return True

    def to_line(self) -> str:
        return f"FOREIGN: {self.path}: {self.problem}; it is passed over"

    def to_json(self) -> dict[str, Any]:
        return {"kind": "foreign", **asdict(self)}


def foreign_reports(root: Path) -> list[ForeignReport]:
    """What lies where files of a log belong and cannot be one of them; ``MOST`` at most."""
    found: list[ForeignReport] = []
    for path, problem in _found(root):
        found.append(ForeignReport(str(path), problem))
        if len(found) == MOST:
            break
    return found


def _found(root: Path) -> Iterator[tuple[Path, str]]:
    for entry in _entries(root):
        path, kind = Path(entry), _kind(entry)
        if WRITER_NAME.fullmatch(entry.name) and not path.is_dir():
            yield path, f"it is {kind or 'a file'}, not a writer's folder"
        elif entry.name in (QUARANTINE, GROUPS) and kind != "a folder":
            yield path, f"it is {kind or 'a file'}, not a folder"
        elif entry.name == EVICT_LOCK and kind is not None:
            yield path, f"it is {kind}, not a file"
    for name in writer_names(root):
        yield from _of_writer(root / name)
    for entry in _entries(root / QUARANTINE):
        if (kind := _kind(entry)) is not None:
            yield Path(entry), f"it is {kind}, not a record that was put aside"
    groups = group_names(root)
    for group in _entries(root / GROUPS):
        if group.name in groups:
            yield from _of_group(root, Path(group))
        elif _kind(group) != "a folder":
            yield Path(group), "it is not a folder of a group"
        elif not GROUP_NAME.fullmatch(group.name):
            yield Path(group), "no group has such a name"
        elif _entries(Path(group)):  # an empty one may be of a group that has just begun
            yield Path(group), "it holds no file of a group"


def _of_writer(folder: Path) -> Iterator[tuple[Path, str]]:
    for entry in _entries(folder):
        kind = _kind(entry)
        is_segment = entry.name.endswith(".seg")
        if is_segment and not SEGMENT_NAME.fullmatch(entry.name):
            yield Path(entry), "no segment has such a name"
        elif kind is not None and (is_segment or entry.name in (LOCK, TOMBSTONE)):
            yield Path(entry), f"it is {kind}, not a file"
        elif entry.name == TOMBSTONE and read_tombstone(folder) is None:
            yield Path(entry), "its counts of evictions cannot be true"


def _of_group(root: Path, folder: Path) -> Iterator[tuple[Path, str]]:
    if (cut := cut_off(folder)) is not None:
        yield folder / CLAIMS, cut
    for entry in _entries(folder):
        if (kind := _kind(entry)) is not None:
            yield Path(entry), f"it is {kind}, not a file of a group"
        elif entry.name.endswith(".json"):
            _, problem = sound_committed(root, folder, entry.name.removesuffix(".json"))
            if problem is not None:
                yield Path(entry), f"the group has not committed that: {problem}"


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:  # none, or what the line about the folder itself says
        return []


def _kind(entry: os.DirEntry[str]) -> str | None:
    try:
        return kind_of(entry.stat(follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return None
