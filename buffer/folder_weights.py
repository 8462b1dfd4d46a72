"""The weights store on disk: one folder per version, written whole or not at all.

    <root>/<version>/              a bundle, see ``bundles.py``
    <root>/HIGHEST                 highest version ever published; versions are never reused
    <root>/EPOCH                   how often a trainer has taken over
    <root>/DENIED.json             versions that a server rolled back from
    <root>/IN_USE-<producer>.json  versions that a server uses or may roll back to
    <root>/.lock                   held while a process publishes or prunes

A version is written to a temporary folder, flushed and renamed, so a visible version is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from filelock import FileLock

from buffer.bundles import (
    Bundle,
    BundleError,
    BundleInBuffer,
    ExpectedTensors,
    HostBuffer,
    prepare_bundle,
    read_bundle,
    read_bundle_into,
    read_manifest,
)
from buffer.files import (
    NotRegularError,
    is_folder,
    read_regular,
    sync_folder,
    write_atomically,
    write_parts,
)
from buffer.manifest import VERSION_NAME
from buffer.records import Manifest
from buffer.sealed import Content, Sealed, parts_of
from buffer.small_json import is_whole, read_small_json
from buffer.version_rules import check_keep, check_may_publish, check_producer, versions_to_prune
from buffer.weights_store import StoreDamagedError, WeightsStore

DENIED = "DENIED.json"
HIGHEST = "HIGHEST"
EPOCH = "EPOCH"
_NUMBERS = {
    HIGHEST: "the highest version ever published",
    EPOCH: "how often a trainer has taken over",
}
_MOST_DIGITS = 64
IN_USE_STALE_S = 24 * 3600.0
"""Seconds after which a mark that was not renewed is assumed to be a dead server's."""


def versions_of(stored: object) -> set[int]:
    """Versions in a list of them.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(stored, list) or not all(map(is_whole, stored)):
        raise ValueError("it is no list of versions")
    return set(stored)


def lines_in(root: Path) -> list[str]:
    """Names of the folders under the root of a store that are stores of their own: the version
    lines of further drafters."""
    try:
        folders = [path for path in root.iterdir() if path.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    names = sorted(p.name for p in folders if not VERSION_NAME.fullmatch(p.name))
    return [name for name in names if name[0] != "." and FolderWeights(root / name).versions()]


class FolderWeights(WeightsStore):
    """Versions in folders under one root, which ``publish`` creates if it is missing."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def location(self) -> str:
        return str(self.root)

    def path(self, version: int) -> Path:
        """Folder of a version, whether or not it exists."""
        return self.root / str(version)

    def versions(self) -> list[int]:
        try:
            entries = list(os.scandir(self.root))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(
            int(e.name) for e in entries if VERSION_NAME.fullmatch(e.name) and is_folder(e)
        )

    def next_version(self) -> int:
        return max([self._read_number(HIGHEST, default=-1), *self.versions()]) + 1

    def take_over(self) -> int:
        self.root.mkdir(parents=True, exist_ok=True)
        with self._locked():
            epoch = self._read_number(EPOCH, default=0) + 1
            write_atomically(self.root / EPOCH, f"{epoch}\n".encode())
        return epoch

    def publish(
        self,
        manifest: Manifest,
        files: Mapping[str, Content | Sealed],
        epoch: int | None = None,
    ) -> Manifest:
        manifest, content = prepare_bundle(manifest, files)
        self.root.mkdir(parents=True, exist_ok=True)
        with self._locked():
            newest = self._read_number(EPOCH, default=0)
            check_may_publish(self.location, manifest.version, self.next_version(), epoch, newest)
            self._write(manifest.version, content)
        return manifest

    def read_manifest(self, version: int) -> Manifest:
        return read_manifest(self.path(version))

    def read(self, version: int, expected: ExpectedTensors | None = None) -> Bundle:
        return read_bundle(self.path(version), expected)

    def read_into(
        self, host: HostBuffer, version: int, expected: ExpectedTensors | None = None
    ) -> BundleInBuffer:
        return read_bundle_into(host, self.path(version), expected)

    def change_mark(self, version: int) -> tuple[int, int]:
        """Newest modification time of the version's files in nanoseconds, and their total size."""
        path = self.path(version)
        stats = [file.lstat() for file in path.iterdir()] if path.is_dir() else []
        return max((s.st_mtime_ns for s in stats), default=0), sum(s.st_size for s in stats)

    def read_denied(self) -> set[int]:
        path = self.root / DENIED
        try:
            return versions_of(read_small_json(path))
        except (FileNotFoundError, NotADirectoryError):
            return set()
        except (ValueError, TypeError):
            raise StoreDamagedError(
                f"{path} must be a list of the versions that were rolled back; write [] to forget "
                f"them"
            ) from None

    def write_denied(self, denied: Collection[int]) -> None:
        write_atomically(self.root / DENIED, json.dumps(sorted(denied)).encode())

    def mark_in_use(self, producer: str, in_use: Collection[int]) -> None:
        check_producer(producer)
        self.root.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"producer": producer, "versions": sorted(in_use)})
        # Not flushed: a power cut ends the server, too, and a flush waits for all that a trainer on
        # the same disk is writing, which delays the version that is marked.
        write_atomically(self._mark_path(producer), text.encode(), is_durable=False)

    def unmark_in_use(self, producer: str) -> None:
        self._mark_path(producer).unlink(missing_ok=True)

    def marked_in_use(self, now_s: float | None = None) -> set[int] | None:
        """Versions that living servers marked; ``None`` if a mark is unreadable.

        Args:
            now_s: unix time, seconds; ``None`` is now.
        """
        fresh_s = (time.time() if now_s is None else now_s) - IN_USE_STALE_S
        marked: set[int] = set()
        for path in self.root.glob("IN_USE-*.json"):
            try:
                if path.lstat().st_mtime >= fresh_s:
                    marked |= versions_of(read_small_json(path)["versions"])
            except FileNotFoundError:
                continue  # its server has just stopped
            except (ValueError, TypeError, KeyError):
                return None
        return marked

    def prune(self, keep: int, in_use: Collection[int] = ()) -> list[int]:
        """Remove old versions, and return them; if a mark is unreadable, none are removed."""
        check_keep(keep)
        marked = self.marked_in_use()
        if marked is None:
            return []
        used = marked | set(in_use)
        removed = versions_to_prune(self.versions(), keep, used, self._parent_of)
        with self._locked() if removed else contextlib.nullcontext():
            for version in removed:
                self._remove(version)
        return removed

    def _mark_path(self, producer: str) -> Path:
        return self.root / f"IN_USE-{producer}.json"

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the store's lock, and delete what a killed publisher left behind."""
        with FileLock(self.root / ".lock", fallback_to_soft=False):
            for leftover in filter(Path.is_dir, self.root.glob(".tmp-*")):
                shutil.rmtree(leftover, ignore_errors=True)
            yield

    def _write(self, version: int, files: Mapping[str, Content | Sealed]) -> None:
        """Write a version aside, take its number, and make it visible. A full disk is met before
        the number is taken."""
        aside = self.root / f".tmp-{version}"
        try:
            aside.mkdir()
            for name, content in files.items():
                write_parts(aside / name, parts_of(content), is_durable=True)
            sync_folder(aside)
            highest = max(version, self._read_number(HIGHEST, default=-1))
            write_atomically(self.root / HIGHEST, f"{highest}\n".encode())
            aside.rename(self.path(version))
        except OSError:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        sync_folder(self.root)

    def _read_number(self, name: str, default: int) -> int:
        path = self.root / name
        try:
            text = read_regular(path, _MOST_DIGITS).decode(errors="replace").strip()
        except FileNotFoundError:
            return default
        except NotRegularError as error:
            raise StoreDamagedError(
                f"{path} must be a file with {_NUMBERS[name]}, but {error.strerror}; nothing is "
                f"published. Remove it, and write that number into a file of this name"
            ) from None
        if not VERSION_NAME.fullmatch(text):
            raise StoreDamagedError(
                f"{path} must hold {_NUMBERS[name]}, got {text[:40]!r}; nothing is published. "
                f"Write that number into it"
            )
        return int(text)

    def _parent_of(self, version: int) -> int | None:
        try:
            return self.read_manifest(version).parent
        except BundleError:  # a damaged bundle has no parent to protect
            return None

    def _remove(self, version: int) -> None:
        """Hide a version in one step, then delete it."""
        aside = self.root / f".tmp-removed-{version}"
        with contextlib.suppress(FileNotFoundError):
            self.path(version).rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
