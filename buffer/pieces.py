"""Bundles whose files a service stores in pieces, checked as those in folders are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from buffer.bundles import (
    MAX_MANIFEST_BYTES,
    Arriving,
    Bundle,
    BundleError,
    BundleInBuffer,
    ExpectedTensors,
    HostBuffer,
    check_fits,
    check_sha256,
    check_size,
    checked_manifest,
    files_problem,
)
from buffer.manifest import MANIFEST, TENSORS
from buffer.records import FileDigest, Manifest
from buffer.sealed import sha256_of
from buffer.tensors import TensorFileError


@dataclass(frozen=True, slots=True)
class PiecedBundle:
    """One stored version. Everything here raises ``BundleError`` for what it finds damaged."""

    version: int
    location: str
    """Of the store, for messages."""
    manifest_text: bytes
    may_hold: Callable[[str, FileDigest], bool]
    """Whether a file can be as long as its manifest claims. Asked before memory is taken."""
    pieces: Callable[[str, FileDigest], Iterator[bytes]]
    """Content of a file, as far as it is there."""

    def manifest(self) -> Manifest:
        """The manifest alone, checked."""
        what = self._what(MANIFEST)
        if len(self.manifest_text) > MAX_MANIFEST_BYTES:
            raise BundleError(str(self.version), f"{what} has over {MAX_MANIFEST_BYTES} bytes")
        return checked_manifest(self.manifest_text, str(self.version), what)

    def read(self, expected: ExpectedTensors | None) -> Bundle:
        """See ``WeightsStore.read``."""
        manifest, files = self.manifest(), {}
        for name, digest in manifest.files.items():
            content, what = b"".join(self._bounded(name, digest)), self._what(name)
            check_size(str(self.version), what, len(content), digest)
            check_sha256(str(self.version), what, sha256_of(content, digest.piece_bytes), digest)
            files[name] = content
        problem = files_problem(files, expected)
        if problem is not None:
            raise self._damaged(problem)
        return Bundle(manifest, files)

    def read_into(self, host: HostBuffer, expected: ExpectedTensors | None) -> BundleInBuffer:
        """See ``WeightsStore.read_into``."""
        manifest = self.manifest()
        others = [name for name in manifest.files if name != TENSORS]
        for name in (*others, TENSORS):  # all use the same memory; the tensors come last
            digest, what = manifest.files[name], self._what(name)
            if not self.may_hold(name, digest):
                raise BundleError(
                    str(self.version), f"{what} has less than {digest.num_bytes} bytes"
                )
            check_fits(str(self.version), what, digest, host)
            with Arriving(name, host.take(digest.num_bytes), digest.piece_bytes) as arriving:
                for piece in self._bounded(name, digest):
                    at = arriving.num_bytes
                    arriving.content[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
                    arriving.advance(len(piece))
                    del piece  # while the next one is awaited
            check_size(str(self.version), what, arriving.num_bytes, digest)
            check_sha256(str(self.version), what, arriving.sha256, digest)
            try:
                tensors = arriving.sound_tensors(expected)
            except TensorFileError as error:
                raise self._damaged(str(error)) from None
        return BundleInBuffer(manifest, arriving.content, tensors)

    def _bounded(self, name: str, digest: FileDigest) -> Iterator[bytes]:
        """Pieces of a file, which must not be longer than its manifest claims."""
        left = digest.num_bytes
        for piece in self.pieces(name, digest):
            left -= len(piece)
            if left < 0:
                raise BundleError(
                    str(self.version), f"{self._what(name)} has over {digest.num_bytes} bytes"
                )
            yield piece
            del piece

    def _what(self, name: str) -> str:
        return f"{self.location}: {name} of version {self.version}"

    def _damaged(self, problem: str) -> BundleError:
        return BundleError(str(self.version), f"{self.location}: {problem}")
