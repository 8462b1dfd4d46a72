"""Where the embedded log keeps its files.

    <root>/w<pid>-<boot ms>/000042.seg    segments of one writer process, oldest first
    <root>/w<pid>-<boot ms>/LOCK          held (flock) while that process lives
    <root>/w<pid>-<boot ms>/EVICTED.json  what has left this folder, counted
    <root>/quarantine/                    records that could not be decoded

Writers share nothing but the folder, so they never wait for each other.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from buffer.files import write_atomically

LOCK = "LOCK"
TOMBSTONE = "EVICTED.json"
QUARANTINE = "quarantine"
_WRITER = re.compile(r"w[0-9A-Za-z_.-]+")
_SEGMENT = re.compile(r"([0-9]{6,})\.seg")


@dataclass(frozen=True, slots=True)
class Tombstone:
    """What was evicted from one writer's folder, over all processes that evicted."""

    segment: int
    """Newest segment that left."""
    next_number: int
    """Records numbered below it are gone."""
    records: int
    """Sound records that left."""
    num_bytes: int


def writer_names(root: Path) -> list[str]:
    """Folders of all writers, oldest name first; empty if the log does not exist yet."""
    try:
        entries = list(os.scandir(root))
    except FileNotFoundError:
        return []
    return sorted(e.name for e in entries if _WRITER.fullmatch(e.name) and e.is_dir())


def segment_numbers(folder: Path) -> list[int]:
    """Numbers of the segments that are there, ascending; empty if the folder left."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted(int(match[1]) for match in map(_SEGMENT.fullmatch, names) if match)


def segment_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.seg"


def is_live(folder: Path) -> bool:
    """Whether the process that writes here still runs; the system frees its lock when it dies."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def read_tombstone(folder: Path) -> Tombstone | None:
    """What was evicted from a writer's folder; ``None``: nothing so far."""
    try:
        return Tombstone(**json.loads((folder / TOMBSTONE).read_bytes()))
    except FileNotFoundError:
        return None


def write_tombstone(folder: Path, tombstone: Tombstone) -> None:
    write_atomically(folder / TOMBSTONE, json.dumps(asdict(tombstone)).encode())
