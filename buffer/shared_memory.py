"""Versions through the memory of one host, ``shm:`` or ``shm:?traces=URL``.

A version is shown in memory first, so that servers load it before the disk is written, and is
published once it is on the disk, too: memory is the faster way, and the disk the one that always
works. Whoever cannot use the memory, in another container or on another host, takes the version
from the disk. Only the newest version is in memory, see ``shared_folder.py``.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TypeVar

from buffer.apart import WeightsApart
from buffer.bundles import (
    MAX_MANIFEST_BYTES,
    Bundle,
    BundleError,
    BundleInBuffer,
    ExpectedTensors,
    HostBuffer,
    read_bundle,
    read_bundle_into,
    read_manifest,
)
from buffer.files import read_regular, write_atomically
from buffer.folder_weights import HIGHEST, FolderWeights, lines_in
from buffer.manifest import MANIFEST, TENSORS
from buffer.reader_locks import read_lock
from buffer.records import Manifest
from buffer.sealed import Content, Sealed
from buffer.shared_folder import MEMORY, SharedFolder
from configs.urls import shown_url

log = logging.getLogger(__name__)
_Found = TypeVar("_Found")


class SharedMemory(WeightsApart):
    """The newest version in ``/dev/shm``, all versions in ``run_dir/weights``, traces elsewhere."""

    def __init__(self, url: str, run_dir: Path) -> None:
        super().__init__(url, run_dir)
        if self._place:
            raise ValueError(
                f"buffer.url {shown_url(url)!r} names a place, but the store is found by run_dir; "
                f"'shm:' is enough"
            )

    def open_weights(self, line: str = "") -> SharedWeights:
        return SharedWeights(self._run_dir / "weights" / line)

    def version_lines(self) -> list[str]:
        return lines_in(self._run_dir / "weights")


class SharedWeights(FolderWeights):
    """Versions on the disk, the newest of them in memory as well."""

    def __init__(self, root: Path, memory: Path = MEMORY) -> None:
        super().__init__(root)
        self._shared = SharedFolder(root, memory)

    def versions(self) -> list[int]:
        return sorted({*super().versions(), *self._shared.versions()})

    def take_over(self) -> int:
        epoch = super().take_over()
        with self._locked():
            self._shared.clear_leftovers()
            self._store_missing()
        return epoch

    def lend(self, num_bytes: int) -> memoryview | None:
        return self._shared.lend(TENSORS, num_bytes)

    def prepare(self, content: Sealed) -> None:
        self._shared.prepare(TENSORS, content)

    def read_manifest(self, version: int) -> Manifest:
        return self._from_either(version, read_manifest)

    def read(self, version: int, expected: ExpectedTensors | None = None) -> Bundle:
        return self._from_either(version, lambda path: read_bundle(path, expected))

    def read_into(
        self, host: HostBuffer, version: int, expected: ExpectedTensors | None = None
    ) -> BundleInBuffer:
        def read(path: Path) -> BundleInBuffer:
            with read_lock(path):
                return read_bundle_into(host, path, expected)

        return self._from_either(version, read)

    def change_mark(self, version: int) -> tuple[int, int]:
        """As ``FolderWeights.change_mark``; from memory only until the disk has the version."""
        on_disk, folder = super().change_mark(version), self._shared.folder(version)
        if on_disk != (0, 0) or folder is None:
            return on_disk
        return folder.stat().st_mtime_ns, 0

    def watch(self, notify: Callable[[], None]) -> Callable[[], None]:
        return self._shared.watch(notify)

    def mark_in_use(self, producer: str, in_use: Collection[int]) -> None:
        super().mark_in_use(producer, in_use)
        self._shared.hold()

    def _write(self, version: int, files: Mapping[str, Content | Sealed]) -> None:
        """Show a version in memory, then write it to the disk; if that fails, withdraw it."""
        self._store_missing()
        num_bytes = sum(map(len, files.values()))
        status = os.statvfs(self.root)
        if status.f_bavail * status.f_frsize < num_bytes:  # before anybody sees the version
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.root))
        # Its number is taken first, so that not even a power cut brings it back.
        write_atomically(self.root / HIGHEST, f"{version}\n".encode())
        is_shown = self._shared.put(version, files)
        if is_shown:
            # Writing 0.8 GB to a disk takes a core for a second or two, and a server needs it now.
            self._shared.wait_for_readers(version)
        try:
            super()._write(version, files)
        except OSError:
            if is_shown:
                self._shared.remove(version)
            raise

    def _remove(self, version: int) -> None:
        self._shared.remove(version)
        super()._remove(version)

    def _from_either(self, version: int, read: Callable[[Path], _Found]) -> _Found:
        """From memory; from the disk if it is not there any more, or damaged."""
        folder = self._shared.folder(version)
        if folder is not None:
            try:
                return read(folder)
            except BundleError as error:
                if folder.is_dir():
                    log.warning("%s Reading it from the disk.", error)
        return read(self.path(version))

    def _store_missing(self) -> None:
        """Write to the disk what a publisher showed in memory before it was killed."""
        for version in set(self._shared.versions()) - set(super().versions()):
            folder = self._shared.folder(version)
            if folder is None:
                continue
            try:
                files = read_bundle(folder).files
                text = read_regular(folder / MANIFEST, MAX_MANIFEST_BYTES)
            except (BundleError, OSError) as error:
                log.warning("%s It is removed.", error)
                self._shared.remove(version)
                continue
            super()._write(version, {**files, MANIFEST: text})
