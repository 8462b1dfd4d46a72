"""Versions of the drafter in the memory of one process."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress

import numpy as np

from buffer.bundles import (
    Bundle,
    BundleError,
    BundleInBuffer,
    ExpectedTensors,
    HostBuffer,
    check_fits,
    files_problem,
    prepare_bundle,
    sound_tensors,
)
from buffer.manifest import TENSORS
from buffer.memory_held import Held
from buffer.records import Manifest
from buffer.sealed import Content, Sealed, plain
from buffer.version_rules import check_keep, check_may_publish, check_producer, versions_to_prune
from buffer.weights_store import WeightsStore


class MemoryWeights(WeightsStore):
    """Versions of one buffer. Only ``unmark_in_use`` removes a server's mark: a server that dies
    without calling it takes the store with it."""

    def __init__(self, held: Held, location: str) -> None:
        self._held = held
        self._location = location

    @property
    def location(self) -> str:
        return self._location

    def versions(self) -> list[int]:
        with self._held.lock:
            return sorted(self._held.bundles)

    def next_version(self) -> int:
        return self._held.highest + 1

    def take_over(self) -> int:
        with self._held.lock:
            self._held.epoch += 1
            return self._held.epoch

    def publish(
        self,
        manifest: Manifest,
        files: Mapping[str, Content | Sealed],
        epoch: int | None = None,
    ) -> Manifest:
        manifest, _ = prepare_bundle(manifest, files)
        with self._held.lock:
            check_may_publish(
                self._location, manifest.version, self.next_version(), epoch, self._held.epoch
            )
            self._held.highest = manifest.version
            whole = {name: bytes(plain(content)) for name, content in files.items()}
            self._held.bundles[manifest.version] = Bundle(manifest, whole)
            watchers = list(self._held.watchers)
        for notify in watchers:
            notify()
        return manifest

    def watch(self, notify: Callable[[], None]) -> Callable[[], None]:
        self._held.watchers.append(notify)
        return lambda: self._held.watchers.remove(notify)

    def read_manifest(self, version: int) -> Manifest:
        return self._bundle(version).manifest

    def read(self, version: int, expected: ExpectedTensors | None = None) -> Bundle:
        bundle = self._bundle(version)
        problem = files_problem(bundle.files, expected)
        if problem is not None:
            raise BundleError(str(version), f"{self._location}: {problem}")
        return Bundle(bundle.manifest, dict(bundle.files))

    def read_into(
        self, host: HostBuffer, version: int, expected: ExpectedTensors | None = None
    ) -> BundleInBuffer:
        bundle = self.read(version, expected)
        source = np.frombuffer(bundle.files[TENSORS], np.uint8)
        check_fits(str(version), self._location, bundle.manifest.files[TENSORS], host)
        content = host.take(source.size)
        content[:] = source
        return BundleInBuffer(
            bundle.manifest, content, sound_tensors(TENSORS, content.data, expected)
        )

    def change_mark(self, version: int) -> int:
        """0: a stored version never changes."""
        return 0

    def read_denied(self) -> set[int]:
        return set(self._held.denied)

    def write_denied(self, denied: Collection[int]) -> None:
        self._held.denied = set(denied)

    def mark_in_use(self, producer: str, in_use: Collection[int]) -> None:
        check_producer(producer)
        with self._held.lock:
            self._held.marks[producer] = set(in_use)

    def unmark_in_use(self, producer: str) -> None:
        with self._held.lock, suppress(KeyError):
            del self._held.marks[producer]

    def prune(self, keep: int, in_use: Collection[int] = ()) -> list[int]:
        check_keep(keep)
        with self._held.lock:
            used = set(in_use).union(*self._held.marks.values())
            removed = versions_to_prune(self.versions(), keep, used, self._parent_of)
            for version in removed:
                del self._held.bundles[version]
        return removed

    def _parent_of(self, version: int) -> int | None:
        return self._bundle(version).manifest.parent

    def _bundle(self, version: int) -> Bundle:
        with self._held.lock:
            bundle = self._held.bundles.get(version)
        if bundle is None:
            raise BundleError(str(version), f"{self._location} has no version {version}")
        return bundle
