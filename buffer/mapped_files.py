"""Files of a file system in memory, written through a mapping: what is made there need not be
copied there."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from buffer.files import OWNER_FILE, open_regular

_MOST_MAPPED = 2
"""The version that servers read, and the one that comes next."""
_BLOCK_BYTES = 512
"""Unit of ``st_blocks``."""


class MappedFiles:
    """The files that were written last, which stay mapped: mapping new pages takes longer than
    filling them, 0.4 s for 0.8 GB, and the memory of these files is used again and again."""

    def __init__(self) -> None:
        self._mapped: dict[tuple[int, int], mmap.mmap] = {}
        """By device and inode, the one used last at the end."""

    def of(self, path: Path, num_bytes: int) -> memoryview:
        """The bytes of a file, which is made if it is missing, and gets this size.

        All of its memory is taken beforehand: a process that writes to a page that cannot be had
        is ended by the system.

        Raises:
            NotRegularError: a link, a pipe or another thing lies there.
            OSError: memory is full, or the file cannot be made.
        """
        descriptor = open_regular(path, os.O_RDWR | os.O_CREAT, OWNER_FILE)
        try:
            os.ftruncate(descriptor, num_bytes)
            status = os.fstat(descriptor)
            if status.st_blocks * _BLOCK_BYTES < num_bytes:
                os.posix_fallocate(descriptor, 0, num_bytes)
            key = status.st_dev, status.st_ino
            mapped = self._mapped.pop(key, None)
            if mapped is None or len(mapped) < num_bytes:
                mapped = mmap.mmap(descriptor, num_bytes)
            self._mapped[key] = mapped
        finally:
            os.close(descriptor)
        while len(self._mapped) > _MOST_MAPPED:
            del self._mapped[next(iter(self._mapped))]
        return memoryview(mapped)[:num_bytes]
