"""The weights store on Kafka; ``kafka_versions.py`` has what is stored, and why it is safe."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from kafka.errors import KafkaError

from buffer.bundles import (
    MAX_MANIFEST_BYTES,
    Bundle,
    BundleError,
    BundleInBuffer,
    ExpectedTensors,
    HostBuffer,
    prepare_bundle,
)
from buffer.kafka_link import KafkaLink, kafka_errors
from buffer.kafka_versions import PIECE_BYTES, Publication, State, VersionFiles, VersionLog, watch
from buffer.manifest import MANIFEST
from buffer.pieces import PiecedBundle
from buffer.records import Manifest
from buffer.sealed import Content, Sealed, digest_of
from buffer.version_rules import check_keep, check_may_publish, check_producer, versions_to_prune
from buffer.weights_store import WeightsStore


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
        self,
        manifest: Manifest,
        files: Mapping[str, Content | Sealed],
        epoch: int | None = None,
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
                "sha256": digest_of(content[MANIFEST]).sha256,
            }
        )
        ours = state.published.get(manifest.version)
        if ours is None or ours.nonce != nonce:
            self._remove(nonce, places)
            self._check(state, manifest.version, epoch)
        return manifest

    def read_manifest(self, version: int) -> Manifest:
        return self._bundle(version).manifest()

    def read(self, version: int, expected: ExpectedTensors | None = None) -> Bundle:
        return self._bundle(version).read(expected)

    def read_into(
        self, host: HostBuffer, version: int, expected: ExpectedTensors | None = None
    ) -> BundleInBuffer:
        return self._bundle(version).read_into(host, expected)

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
        check_may_publish(self.location, version, state.highest + 1, epoch, state.epoch)

    def _bundle(self, version: int) -> PiecedBundle:
        publication = self._state().published.get(version)
        if publication is None:
            raise BundleError(str(version), f"{self.location} has no version {version}")
        text = bytearray()
        for piece in self._pieces(version, publication, MANIFEST):
            text += piece
            if len(text) > MAX_MANIFEST_BYTES:
                break  # ``PiecedBundle.manifest`` says so
        else:
            if hashlib.sha256(text).hexdigest() != publication.sha256:
                raise self._damaged(version, f"{MANIFEST} is not what the trainer wrote")
        return PiecedBundle(
            version,
            self.location,
            bytes(text),
            lambda name, digest: (
                digest.num_bytes <= len(publication.files.get(name, ())) * PIECE_BYTES
            ),
            lambda name, _digest: self._pieces(version, publication, name),
        )

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

    def _damaged(self, version: int, problem: str) -> BundleError:
        return BundleError(str(version), f"{self.location}: {problem}")

    def _errors(self, what: str) -> contextlib.AbstractContextManager[None]:
        return kafka_errors(f"{self.location}: {what}")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
