"""Small-file writes that survive a crash: the whole file is there, or none of it."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, content: bytes | bytearray | memoryview) -> None:
    """Write a temporary file, flush it to disk, and rename it to ``path``.

    Raises:
        OSError: the disk failed; the former content of ``path`` is intact.
    """
    aside = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        write_durably(aside, content)
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_durably(path: Path, content: bytes | bytearray | memoryview) -> None:
    """Write a file in place and flush it; a crash may leave only a part of it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries; without that, a power cut may lose a new file's name."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
