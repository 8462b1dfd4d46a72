"""Versions in an object store, ``s3://bucket/prefix`` or ``fsspec:`` before any URL of fsspec.

    <url>/state/<number>         which versions there are, see ``object_state.py``
    <url>/content/<token>/<file> the files of one version, of one upload

Files are uploaded first, under a token of their own. One change of the state then makes the version
visible, provided that nobody published it or took over meanwhile.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import secrets
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from buffer.apart import WeightsApart
from buffer.bundles import (
    MAX_MANIFEST_BYTES,
    Bundle,
    BundleError,
    BundleInBuffer,
    ExpectedTensors,
    HostBuffer,
    prepare_bundle,
)
from buffer.interface import ServiceAwayError
from buffer.manifest import MANIFEST
from buffer.object_state import Mark, State, StateLog, Stored
from buffer.objects import Objects
from buffer.pieces import PiecedBundle
from buffer.records import FileDigest, Manifest
from buffer.sealed import Content, Sealed, digest_of, plain
from buffer.version_rules import check_keep, check_may_publish, check_producer, versions_to_prune
from buffer.weights_store import WeightsStore

log = logging.getLogger(__name__)

IN_USE_STALE_S = 24 * 3600.0
"""Seconds after which a mark that was not renewed is assumed to be a dead server's."""
_UPLOAD_STALE_S = 3600.0
"""Seconds after which an upload that is of no version is assumed to be a dead publisher's."""


class ObjectStore(WeightsApart):
    """Versions at one URL of fsspec, traces elsewhere."""

    def __init__(self, url: str, run_dir: Path) -> None:
        super().__init__(url, run_dir)
        scheme = url.partition(":")[0]
        place = self._place if scheme == "fsspec" else f"{scheme}:{self._place}"
        protocol, separator, path = place.partition("://")
        if not protocol or not separator or not path.strip("/"):
            example = "fsspec:gs://bucket/run" if scheme == "fsspec" else f"{scheme}://bucket/run"
            raise ValueError(f"buffer.url must name a place in a store, as in '{example}'")
        if ":" in path.partition("@")[0] and "@" in path:
            raise ValueError(
                f"buffer.url begins with '{scheme}:' and holds a password; give it to fsspec in "
                f"the environment"
            )
        self._url = place
        self._objects = Objects(place)

    def open_weights(self, line: str = "") -> ObjectWeights:
        objects = Objects(f"{self._url.rstrip('/')}/{line}") if line else self._objects
        return ObjectWeights(objects)


class ObjectWeights(WeightsStore):
    """Versions below one URL. May be used by several threads."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._log = StateLog(objects)

    @property
    def location(self) -> str:
        return self._objects.location

    def versions(self) -> list[int]:
        return sorted(self._log.newest().published)

    def next_version(self) -> int:
        return self._log.newest().highest + 1

    def take_over(self) -> int:
        if not self._objects.refuses_a_second():
            log.warning(
                "%s does not refuse to create a name twice: let one trainer alone publish there",
                self.location,
            )
        epochs: list[int] = []

        def take(state: State) -> State:
            epochs.append(state.epoch + 1)
            return replace(state, epoch=epochs[-1])

        self._log.change(take)
        return epochs[-1]

    def publish(
        self,
        manifest: Manifest,
        files: Mapping[str, Content | Sealed],
        epoch: int | None = None,
    ) -> Manifest:
        manifest, content = prepare_bundle(manifest, files)
        self._check(self._log.newest(from_list=True), manifest.version, epoch)
        token = f"{int(time.time()):012d}-{secrets.token_hex(8)}"
        for name, data in content.items():
            self._objects.write(f"content/{token}/{name}", plain(data))
        stored = Stored(token, manifest.parent, digest_of(content[MANIFEST]).sha256)

        def show(state: State) -> State:
            self._check(state, manifest.version, epoch)
            published = {**state.published, manifest.version: stored}
            return replace(state, highest=manifest.version, published=published)

        try:
            state = self._log.change(show)
        except ValueError:
            self._forget(token)
            raise
        self._forget_dead_uploads(state)
        return manifest

    def read_manifest(self, version: int) -> Manifest:
        return self._bundle(version).manifest()

    def read(self, version: int, expected: ExpectedTensors | None = None) -> Bundle:
        return self._bundle(version).read(expected)

    def read_into(
        self, host: HostBuffer, version: int, expected: ExpectedTensors | None = None
    ) -> BundleInBuffer:
        return self._bundle(version).read_into(host, expected)

    def change_mark(self, version: int) -> str | None:
        """The token under which the version was uploaded: a stored version never changes."""
        stored = self._log.newest().published.get(version)
        return None if stored is None else stored.token

    def read_denied(self) -> set[int]:
        return set(self._log.newest().denied)

    def write_denied(self, denied: Collection[int]) -> None:
        self._log.change(lambda state: replace(state, denied=tuple(sorted(denied))))

    def mark_in_use(self, producer: str, in_use: Collection[int]) -> None:
        check_producer(producer)
        mark = Mark(tuple(sorted(in_use)), time.time())
        self._log.change(lambda state: replace(state, in_use={**state.in_use, producer: mark}))

    def unmark_in_use(self, producer: str) -> None:
        def without(state: State) -> State | None:
            others = {who: mark for who, mark in state.in_use.items() if who != producer}
            return None if others == state.in_use else replace(state, in_use=others)

        self._log.change(without)

    def prune(self, keep: int, in_use: Collection[int] = ()) -> list[int]:
        check_keep(keep)
        removed: dict[int, Stored] = {}

        def without(state: State) -> State | None:
            fresh_s = time.time() - IN_USE_STALE_S
            marks = {who: mark for who, mark in state.in_use.items() if mark.unix_s >= fresh_s}
            used = set(in_use).union(*(mark.versions for mark in marks.values()))
            present = state.published
            chosen = versions_to_prune(sorted(present), keep, used, lambda v: present[v].parent)
            removed.clear()
            removed.update({version: present[version] for version in chosen})
            kept = {version: one for version, one in present.items() if version not in removed}
            return replace(state, published=kept, in_use=marks) if removed else None

        self._log.change(without)
        for stored in removed.values():
            self._forget(stored.token)
        return sorted(removed)

    def _check(self, state: State, version: int, epoch: int | None) -> None:
        check_may_publish(self.location, version, state.highest + 1, epoch, state.epoch)

    def _forget(self, token: str) -> None:
        """Remove an upload; if that fails, only space is lost."""
        with contextlib.suppress(ServiceAwayError):
            self._objects.remove(f"content/{token}")

    def _forget_dead_uploads(self, state: State) -> None:
        """Remove what publishers had uploaded before they were killed."""
        used = {stored.token for stored in state.published.values()}
        begun_s = time.time() - _UPLOAD_STALE_S
        with contextlib.suppress(ServiceAwayError):
            for token in self._objects.names("content"):
                started = token.partition("-")[0]
                if token not in used and started.isdigit() and int(started) < begun_s:
                    self._forget(token)

    def _bundle(self, version: int) -> PiecedBundle:
        stored = self._log.newest().published.get(version)
        if stored is None:
            raise self._damaged(version, f"there is no version {version}")
        name = f"content/{stored.token}/{MANIFEST}"
        text = self._objects.read(name, MAX_MANIFEST_BYTES + 1)
        if text is None:
            raise self._damaged(version, f"{MANIFEST} is gone")
        is_whole = len(text) <= MAX_MANIFEST_BYTES  # ``PiecedBundle.manifest`` says so if not
        if is_whole and hashlib.sha256(text).hexdigest() != stored.sha256:
            raise self._damaged(version, f"{MANIFEST} is not what the trainer wrote")
        return PiecedBundle(
            version,
            self.location,
            text,
            lambda name, digest: self._has(stored, name, digest),
            lambda name, digest: self._pieces(version, stored, name, digest),
        )

    def _has(self, stored: Stored, name: str, digest: FileDigest) -> bool:
        size = self._objects.size(f"content/{stored.token}/{name}")
        return size is not None and size >= digest.num_bytes

    def _pieces(
        self, version: int, stored: Stored, name: str, digest: FileDigest
    ) -> Iterator[bytes]:
        """Content of a file, as far as it is there.

        Raises:
            BundleError: it is longer than its manifest claims.
        """
        path = f"content/{stored.token}/{name}"
        size = self._objects.size(path) or 0
        if size > digest.num_bytes:
            raise self._damaged(version, f"{name} has over {digest.num_bytes} bytes")
        return self._objects.pieces(path, size)

    def _damaged(self, version: int, problem: str) -> BundleError:
        return BundleError(str(version), f"{self.location}: {problem}")
