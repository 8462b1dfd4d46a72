"""The weights store on Kafka; ``kafka_versions.py`` has what is stored, and why it is safe."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
from kafka.errors import KafkaError

from buffer.bundles import (
    MAX_MANIFEST_BYTES,
    Bundle,
    BundleError,
    BundleInBuffer,
    ExpectedTensors,
    HostBuffer,
    files_problem,
    prepare_bundle,
    sound_tensors,
)
from buffer.interface import SupersededError, WeightsStore
from buffer.kafka_link import KafkaLink, kafka_errors
from buffer.kafka_versions import PIECE_BYTES, Publication, State, VersionFiles, VersionLog, watch
from buffer.manifest import MANIFEST, TENSORS, ManifestError, decode_manifest, manifest_problem
from buffer.records import FileDigest, Manifest
from buffer.tensors import TensorFileError
from buffer.version_rules import check_keep, check_producer, check_unused, versions_to_prune


class KafkaWeights(WeightsStore):
    """Versions of the drafter under one prefix. May be used by several threads."""

    def __init__(self, link: KafkaLink) -> None:
        self._link = link
        self._log = VersionLog(link)
        self._files = VersionFiles(link)
        self._lock = threading.RLock()

    @property
    def location(self) -> str:
        return self._link.address.location

    def versions(self) -> list[int]:
        return sorted(self._state().published)

    def next_version(self) -> int:
        return self._state().highest + 1

    def take_over(self) -> int:
        while True:
            epoch, nonce = self._state().epoch + 1, secrets.token_hex(8)
            state = self._append({"kind": "take_over", "epoch": epoch, "nonce": nonce})
            if nonce in state.owners:  # else somebody was faster
                return epoch

    def publish(
        self, manifest: Manifest, files: Mapping[str, bytes], epoch: int | None = None
    ) -> Manifest:
        manifest, content = prepare_bundle(manifest, files)
        self._check(self._state(), manifest.version, epoch)
        nonce = secrets.token_hex(8)
        with self._lock, self._errors("nothing was published"):
            places = self._files.write(nonce, content)
        state = self._append(
            {
                "kind": "publish",
                "version": manifest.version,
                "epoch": epoch,
                "nonce": nonce,
                "parent": manifest.parent,
                "files": places,
                "sha256": hashlib.sha256(content[MANIFEST]).hexdigest(),
            }
        )
        ours = state.published.get(manifest.version)
        if ours is None or ours.nonce != nonce:
            self._remove(nonce, places)
            self._check(state, manifest.version, epoch)
        return manifest

    def read_manifest(self, version: int) -> Manifest:
        return self._manifest(version, self._publication(version))

    def read(self, version: int, expected: ExpectedTensors | None = None) -> Bundle:
        publication = self._publication(version)
        manifest = self._manifest(version, publication)
        files = {
            name: self._content(version, publication, name, digest)
            for name, digest in manifest.files.items()
        }
        problem = files_problem(files, expected)
        if problem is not None:
            raise self._damaged(version, problem)
        return Bundle(manifest, files)

    def read_into(
        self, host: HostBuffer, version: int, expected: ExpectedTensors | None = None
    ) -> BundleInBuffer:
        publication = self._publication(version)
        manifest = self._manifest(version, publication)
        others = [name for name in manifest.files if name != TENSORS]
        for name in (*others, TENSORS):  # all use the same memory; the tensors come last
            digest = manifest.files[name]
            if digest.num_bytes > len(publication.files.get(name, ())) * PIECE_BYTES:
                raise self._damaged(version, f"{name} has less than {digest.num_bytes} bytes")
            content = host.take(digest.num_bytes)
            num_bytes, sha256 = 0, hashlib.sha256()
            for piece in self._pieces(version, publication, name):
                if num_bytes + len(piece) > digest.num_bytes:
                    raise self._damaged(version, f"{name} is longer than {digest.num_bytes} bytes")
                content[num_bytes : num_bytes + len(piece)] = np.frombuffer(piece, np.uint8)
                sha256.update(piece)
                num_bytes += len(piece)
            self._check_digest(version, name, digest, num_bytes, sha256.hexdigest())
            try:
                tensors = sound_tensors(name, content.data, expected)
            except TensorFileError as error:
                raise self._damaged(version, str(error)) from None
        return BundleInBuffer(manifest, content, tensors)

    def change_mark(self, version: int) -> int | None:
        """Offset of the message that published it: a stored version never changes."""
        publication = self._state().published.get(version)
        return None if publication is None else publication.offset

    def watch(self, notify: Callable[[], None]) -> Callable[[], None]:
        stopping = threading.Event()
        threading.Thread(
            target=watch, args=(self._link, notify, stopping), name="weights-watch", daemon=True
        ).start()
        return stopping.set

    def read_denied(self) -> set[int]:
        return set(self._state().denied)

    def write_denied(self, denied: Collection[int]) -> None:
        self._append({"kind": "denied", "versions": sorted(denied)})

    def mark_in_use(self, producer: str, in_use: Collection[int]) -> None:
        check_producer(producer)
        self._append_use(producer, sorted(in_use))

    def unmark_in_use(self, producer: str) -> None:
        if producer in self._state().marks:
            self._append_use(producer, [])

    def prune(self, keep: int, in_use: Collection[int] = ()) -> list[int]:
        check_keep(keep)
        state, now_ms = self._state(), _now_ms()
        before = dict(state.published)
        used = state.in_use(now_ms) | set(in_use)
        chosen = versions_to_prune(sorted(before), keep, used, lambda one: before[one].parent)
        if not chosen:
            return []
        state = self._append({"kind": "prune", "versions": chosen, "at": now_ms})
        removed = [version for version in chosen if version not in state.published]
        for version in removed:
            self._remove(before[version].nonce, before[version].files)
        with self._lock, contextlib.suppress(KafkaError, OSError):  # only space is lost
            self._log.shorten()
        return removed

    def _append_use(self, producer: str, versions: list[int]) -> None:
        self._append({"kind": "use", "producer": producer, "versions": versions, "at": _now_ms()})

    def _state(self) -> State:
        """The state of now.

        Raises:
            OSError: the brokers do not answer.
        """
        with self._lock, self._errors("the weights cannot be read"):
            return self._log.follow()

    def _append(self, message: dict[str, Any]) -> State:
        """Append a message, and return the state that it led to.

        Raises:
            OSError: it may or may not have been stored.
        """
        with self._lock, self._errors("it is unknown whether the change was stored"):
            return self._log.append(message)

    def _remove(self, nonce: str, places: Mapping[str, list[int]]) -> None:
        with self._lock, contextlib.suppress(KafkaError, OSError):  # only space is lost
            self._files.remove(nonce, places)

    def _check(self, state: State, version: int, epoch: int | None) -> None:
        """Refuse what the log would refuse."""
        if epoch is not None and state.epoch > epoch:
            raise SupersededError(self.location, epoch, state.epoch)
        check_unused(version, state.highest + 1)

    def _publication(self, version: int) -> Publication:
        publication = self._state().published.get(version)
        if publication is None:
            raise BundleError(str(version), f"{self.location} has no version {version}")
        return publication

    def _manifest(self, version: int, publication: Publication) -> Manifest:
        text = bytearray()
        for piece in self._pieces(version, publication, MANIFEST):
            text += piece
            if len(text) > MAX_MANIFEST_BYTES:
                raise self._damaged(version, f"{MANIFEST} is over {MAX_MANIFEST_BYTES} bytes")
        if hashlib.sha256(text).hexdigest() != publication.sha256:
            raise self._damaged(version, f"{MANIFEST} is not what the trainer wrote")
        try:
            manifest = decode_manifest(bytes(text))
            problem = manifest_problem(manifest, str(version))
        except (ManifestError, RecursionError) as error:
            raise self._damaged(version, f"{MANIFEST} is unreadable: {error}") from None
        if problem is not None:
            raise self._damaged(version, f"{MANIFEST}: {problem}")
        return manifest

    def _content(
        self, version: int, publication: Publication, name: str, digest: FileDigest
    ) -> bytes:
        content = b"".join(self._pieces(version, publication, name))
        sha256 = hashlib.sha256(content).hexdigest()
        self._check_digest(version, name, digest, len(content), sha256)
        return content

    def _pieces(self, version: int, publication: Publication, name: str) -> Iterator[bytes]:
        """Content of one file.

        Raises:
            BundleError: a piece is gone, or the brokers do not answer.
        """
        if name not in publication.files:
            raise self._damaged(version, f"{name} was not stored")
        try:
            with self._lock:
                yield from self._files.read(publication.nonce, name, publication.files[name])
        except (KafkaError, OSError) as error:
            raise self._damaged(version, f"{name} cannot be read: {error}") from None

    def _check_digest(
        self, version: int, name: str, digest: FileDigest, num_bytes: int, sha256: str
    ) -> None:
        if (num_bytes, sha256) != (digest.num_bytes, digest.sha256):
            raise self._damaged(
                version,
                f"{name} has {num_bytes} bytes and sha256 {sha256[:12]}, the trainer wrote "
                f"{digest.num_bytes} and {digest.sha256[:12]}",
            )

    def _damaged(self, version: int, problem: str) -> BundleError:
        return BundleError(str(version), f"{self.location}: {problem}")

    def _errors(self, what: str) -> contextlib.AbstractContextManager[None]:
        return kafka_errors(f"{self.location}: {what}")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
