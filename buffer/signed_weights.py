"""A weights store that takes signed versions only, whatever backend holds them."""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import replace
from pathlib import Path

from buffer.bundles import (
    Bundle,
    BundleError,
    BundleInBuffer,
    ExpectedTensors,
    HostBuffer,
)
from buffer.interface import Backend
from buffer.records import Manifest
from buffer.sealed import Content, Sealed, digest_of
from buffer.signatures import PublicKeys, SigningKey, read_public_keys, read_signing_key
from buffer.weights_store import WeightsStore


class SignatureError(BundleError):
    """A version that nobody whom this process trusts has signed."""

    def __init__(self, version: str, problem: str, reason: str) -> None:
        ValueError.__init__(
            self,
            f"snapshot {version} is refused: {problem}; not swapping. Find out who published it: "
            f"whoever has the private key signs every version",
        )
        self.problem = problem
        self.reason = reason


class SignedWeights(WeightsStore):
    """Versions of another store that bear a valid signature; it publishes no others."""

    def __init__(self, store: WeightsStore, public: PublicKeys, signing: SigningKey | None) -> None:
        """
        Args:
            signing: ``None``: this process does not publish.
        """
        self._store = store
        self._public = public
        self._signing = signing

    @property
    def location(self) -> str:
        return self._store.location

    def versions(self) -> list[int]:
        return self._store.versions()

    def next_version(self) -> int:
        return self._store.next_version()

    def take_over(self) -> int:
        return self._store.take_over()

    def lend(self, num_bytes: int) -> memoryview | None:
        return self._store.lend(num_bytes)

    def prepare(self, content: Sealed) -> None:
        self._store.prepare(content)

    def publish(
        self,
        manifest: Manifest,
        files: Mapping[str, Content | Sealed],
        epoch: int | None = None,
    ) -> Manifest:
        """As ``WeightsStore.publish``; the version is signed.

        Raises:
            PermissionError: this process has no private key; nothing was published.
        """
        if self._signing is None:
            raise PermissionError(
                errno.EPERM, "only signed versions are taken, and this process has no private key"
            )
        digests = {name: digest_of(content) for name, content in files.items()}
        signed = self._signing.signed(replace(manifest, files=digests))
        return self._store.publish(signed, files, epoch)

    def read_manifest(self, version: int) -> Manifest:
        manifest = self._store.read_manifest(version)
        problem = self._public.problem(manifest)
        if problem is not None:
            reason = "unsigned" if manifest.signature is None else "signature"
            raise SignatureError(str(version), f"{self.location}: {problem}", reason)
        return manifest

    def read(self, version: int, expected: ExpectedTensors | None = None) -> Bundle:
        manifest = self.read_manifest(version)  # before anything else is looked at
        bundle = self._store.read(version, expected)
        self._check_same(manifest, bundle.manifest)
        return bundle

    def read_into(
        self, host: HostBuffer, version: int, expected: ExpectedTensors | None = None
    ) -> BundleInBuffer:
        manifest = self.read_manifest(version)
        bundle = self._store.read_into(host, version, expected)
        self._check_same(manifest, bundle.manifest)
        return bundle

    def change_mark(self, version: int) -> Hashable:
        return self._store.change_mark(version)

    def watch(self, notify: Callable[[], None]) -> Callable[[], None]:
        return self._store.watch(notify)

    def read_denied(self) -> set[int]:
        return self._store.read_denied()

    def write_denied(self, denied: Collection[int]) -> None:
        self._store.write_denied(denied)

    def mark_in_use(self, producer: str, in_use: Collection[int]) -> None:
        self._store.mark_in_use(producer, in_use)

    def unmark_in_use(self, producer: str) -> None:
        self._store.unmark_in_use(producer)

    def prune(self, keep: int, in_use: Collection[int] = ()) -> list[int]:
        return self._store.prune(keep, in_use)

    def _check_same(self, verified: Manifest, found: Manifest) -> None:
        if found != verified:
            raise SignatureError(
                str(verified.version), f"{self.location}: it changed while it was read", "signature"
            )


def check_keys(public_key: Path | None, signing_key: Path | None = None) -> None:
    """Refuse key files that ``open_weights`` would refuse.

    Raises:
        KeyFileError: as there.
    """
    public = None if public_key is None else read_public_keys(public_key)
    if signing_key is not None:
        signing = read_signing_key(signing_key)
        if public is not None and public_key is not None:
            signing.check_accepted_by(public, signing_key, public_key)


def open_weights(
    backend: Backend, public_key: Path | None, signing_key: Path | None = None, line: str = ""
) -> WeightsStore:
    """The weights of a buffer; if there is a key, only versions that are signed.

    Args:
        line: see ``Backend.open_weights``.
        public_key: PEM file, see ``swap.public_key``.
        signing_key: PEM file, see ``trainer.signing_key``; without ``public_key``, what it signs is
            what is taken.

    Raises:
        KeyFileError: a key file cannot be used, or what the private key signs would be refused.
    """
    check_keys(public_key, signing_key)
    store = backend.open_weights(line)
    signing = None if signing_key is None else read_signing_key(signing_key)
    public = None if public_key is None else read_public_keys(public_key)
    if public is None and signing is not None:
        public = signing.public
    return store if public is None else SignedWeights(store, public, signing)
