"""A bundle: one published version of a drafter, its manifest and its files.

On disk it is a folder with ``manifest.json`` and the files that the manifest names,
``drafter.safetensors`` and perhaps more. Nothing read is trusted: names, sizes, digests, headers
and numbers are checked before any tensor is created.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from buffer.manifest import (
    MANIFEST,
    TENSORS,
    ManifestError,
    decode_manifest,
    encode_manifest,
    manifest_problem,
)
from buffer.records import FileDigest, Manifest
from buffer.sealed import CHUNK_BYTES, Content, Digesting, Sealed, digest_of, sha256_of
from buffer.tensors import (
    MAX_BUNDLE_HEADER_BYTES,
    FiniteScan,
    TensorFileError,
    TensorInfo,
    check_safetensors,
    non_finite_tensors,
)

MAX_MANIFEST_BYTES = 1 << 20

ExpectedTensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name -> (dtype tag of safetensors, shape)."""


class BundleError(ValueError):
    """A published bundle that must not be used; the message says why and what to do."""

    def __init__(self, version: str, problem: str, *, advice: str = "Restore the file") -> None:
        """
        Args:
            advice: what helps, if nobody wants to wait.
        """
        super().__init__(
            f"snapshot {version} is damaged: {problem}; not swapping. {advice}, or wait: "
            f"the next published version supersedes it."
        )
        self.problem = problem
        """What is wrong, without the advice."""
        self.reason = "damaged"
        """Under which it is counted."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """A checked bundle in memory."""

    manifest: Manifest
    files: dict[str, bytes]
    """Content of every file but the manifest: the same bytes whose digests were checked."""


class HostBuffer:
    """Host memory into which files are read one after another, by one reader at a time.

    It is reused because freeing memory stalls the other threads of a process: a ``bytes`` object
    of 0.8 GB holds the interpreter lock while it is returned to the system.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        """
        Args:
            max_bytes: longest file that will be read; ``None``: any.
        """
        self.max_bytes = max_bytes
        self._bytes: NDArray[np.uint8] = np.empty(0, np.uint8)

    def take(self, num_bytes: int) -> NDArray[np.uint8]:
        """Uninitialised memory of ``num_bytes``; invalidates what was taken before."""
        if self._bytes.size < num_bytes:
            # With room for the longest header, so that the next version needs no larger buffer.
            self._bytes = np.empty(num_bytes + MAX_BUNDLE_HEADER_BYTES, np.uint8)
        return self._bytes[:num_bytes]


@dataclass(frozen=True, slots=True)
class BundleInBuffer:
    """A checked bundle whose tensors are kept in a ``HostBuffer`` and whose other files are not."""

    manifest: Manifest
    content: NDArray[np.uint8]
    """``drafter.safetensors``: the same bytes that were checked, until the buffer is reused."""
    tensors: dict[str, TensorInfo]
    """Location of each tensor in ``content``."""


def read_manifest(path: Path) -> Manifest:
    """The manifest of the bundle in folder ``path``, checked; no other file is opened.

    Raises:
        BundleError: it is missing, unreadable, of a newer schema, or inconsistent.
    """
    if path.is_symlink() or not path.is_dir():
        raise BundleError(path.name, f"{path} is not a folder, or a link to one")
    text = _read_file(path, MANIFEST, MAX_MANIFEST_BYTES)
    return checked_manifest(text, path.name, str(path / MANIFEST))


def checked_manifest(text: bytes, version: str, what: str) -> Manifest:
    """Decode ``manifest.json`` and check it.

    Args:
        version: the version that it must describe.
        what: names the file in errors.

    Raises:
        BundleError: it is unreadable, of a newer schema, or inconsistent.
    """
    try:
        manifest = decode_manifest(text)
        problem = manifest_problem(manifest, version)
    except (ManifestError, RecursionError) as error:
        raise BundleError(version, f"{what} is unreadable: {error}") from None
    if problem is not None:
        raise BundleError(version, f"{what}: {problem}")
    return manifest


def read_bundle(path: Path, expected: ExpectedTensors | None = None) -> Bundle:
    """Read the bundle in folder ``path`` into memory, and check all of it there.

    Args:
        path: the bundle's folder.
        expected: tensors that ``drafter.safetensors`` must hold, and no others.

    Raises:
        BundleError: names the file and what was found.
    """
    manifest = _manifest_of_all(path)
    files = {name: _read_checked(path, name, digest) for name, digest in manifest.files.items()}
    problem = files_problem(files, expected)
    if problem is not None:
        raise BundleError(path.name, f"{path}: {problem}")
    return Bundle(manifest, files)


def read_bundle_into(
    buffer: HostBuffer, path: Path, expected: ExpectedTensors | None = None
) -> BundleInBuffer:
    """``read_bundle`` for use beside threads that cannot wait: it reuses memory, and holds the
    interpreter lock only for the bookkeeping of one chunk at a time.

    Args:
        buffer: grows to the size of the bundle's largest file; nobody else may use it meanwhile.

    Raises:
        BundleError: as ``read_bundle``.
    """
    manifest = _manifest_of_all(path)
    others = [name for name in manifest.files if name != TENSORS]
    for name in (*others, TENSORS):  # all use the same memory; the tensors come last and stay in it
        arriving = _read_checked_into(buffer, path, name, manifest.files[name])
        try:
            tensors = arriving.sound_tensors(expected)
        except TensorFileError as error:
            raise BundleError(path.name, f"{path}: {error}") from None
    return BundleInBuffer(manifest, arriving.content, tensors)


def check_bundle(path: Path, expected: ExpectedTensors | None = None) -> Manifest:
    """Check a bundle as ``read_bundle`` does, and return its manifest alone.

    Raises:
        BundleError: as ``read_bundle``.
    """
    return read_bundle(path, expected).manifest


def prepare_bundle(
    manifest: Manifest, files: Mapping[str, Content | Sealed]
) -> tuple[Manifest, dict[str, Content | Sealed]]:
    """Check a bundle before it is published, as every reader will check it.

    Args:
        manifest: everything but ``files``.
        files: name -> content; ``drafter.safetensors`` must be among them. What is sealed has been
            digested, and its values looked at.

    Returns:
        The manifest with all digests, and all files of the bundle including ``manifest.json``.

    Raises:
        ValueError: a reader would refuse it.
    """
    digests = {name: digest_of(content) for name, content in files.items()}
    manifest = replace(manifest, files=digests)
    text = encode_manifest(manifest)
    problem = manifest_problem(manifest, str(manifest.version)) or files_problem(files)
    if problem is not None:
        raise ValueError(f"version {manifest.version} cannot be published: {problem}")
    return manifest, {**files, MANIFEST: text}


def files_problem(
    files: Mapping[str, Content | Sealed], expected: ExpectedTensors | None = None
) -> str | None:
    """What is wrong with the content of a bundle's files; ``None`` if nothing is."""
    for name, content in files.items():
        try:
            sound_tensors(name, content, expected)
        except TensorFileError as error:
            return str(error)
    return None


def sound_tensors(
    name: str, content: Content | Sealed, expected: ExpectedTensors | None
) -> dict[str, TensorInfo]:
    """Tensors in one file of a bundle, with every value checked; a JSON file has none.

    Raises:
        TensorFileError: names the file and what was found.
    """
    if not name.endswith(".safetensors"):
        return {}
    tensors = _tensors_of(name, content, expected)
    if isinstance(content, Sealed):
        _check_finite(name, content.non_finite)
    else:
        _check_finite(name, non_finite_tensors(content, tensors))
    return tensors


class Arriving:
    """One file of a bundle that is being read, chunk by chunk: digested and looked at meanwhile.

    What it finds is told afterwards, a wrong digest first.
    """

    def __init__(self, name: str, content: NDArray[np.uint8], piece_bytes: int | None) -> None:
        """
        Args:
            content: memory for the whole file.
            piece_bytes: how it is digested, see ``FileDigest``.
        """
        self.name = name
        self.content = content
        self.num_bytes = 0
        """Bytes that have arrived."""
        self._digesting = Digesting(len(content), piece_bytes)
        self._tensors: dict[str, TensorInfo] | None = None
        self._scan: FiniteScan | None = None
        self._problem: TensorFileError | None = None

    def __enter__(self) -> Arriving:
        return self

    def __exit__(self, *_: object) -> None:
        self._digesting.end()

    @property
    def left(self) -> NDArray[np.uint8]:
        """Memory for the next chunk; empty once the file is there."""
        return self.content[self.num_bytes : self.num_bytes + CHUNK_BYTES]

    def advance(self, num_bytes: int) -> None:
        """So many further bytes are in ``content`` now."""
        start, self.num_bytes = self.num_bytes, self.num_bytes + num_bytes
        self._digesting.update(self.content[start : self.num_bytes].data)
        if self._scan is None and self._problem is None:
            self._scan = self._read_header()
        if self._scan is not None:
            self._scan.advance(self.num_bytes)

    @property
    def sha256(self) -> str:
        """Of what has arrived, once the block has ended."""
        return self._digesting.sha256

    def sound_tensors(self, expected: ExpectedTensors | None) -> dict[str, TensorInfo]:
        """As the function ``sound_tensors``, once the whole file is there."""
        if self._scan is None or self._tensors is None:  # JSON, or an unreadable header
            return sound_tensors(self.name, self.content.data, expected)
        _tensors_of(self.name, self.content.data, expected)
        _check_finite(self.name, self._scan.broken)
        return self._tensors

    def _read_header(self) -> FiniteScan | None:
        """Where the tensors lie, once the header has arrived."""
        is_whole = self.num_bytes >= min(len(self.content), 8 + MAX_BUNDLE_HEADER_BYTES)
        if not is_whole or not self.name.endswith(".safetensors"):
            return None
        try:
            self._tensors = check_safetensors(self.content.data)
        except TensorFileError as error:
            self._problem = error
            return None
        return FiniteScan(self.content.data, self._tensors)


def _tensors_of(
    name: str, content: Content | Sealed, expected: ExpectedTensors | None
) -> dict[str, TensorInfo]:
    wanted = expected if name == TENSORS else None
    try:
        if isinstance(content, Sealed):
            return check_safetensors(content.parts[0], wanted, num_bytes=len(content))
        return check_safetensors(content, wanted)
    except TensorFileError as error:
        raise TensorFileError(f"{name}: {error}") from None


def _check_finite(name: str, broken: Sequence[str]) -> None:
    if broken:
        raise TensorFileError(f"{name}: tensors {list(broken[:8])} hold NaN or infinity")


def _manifest_of_all(path: Path) -> Manifest:
    """The manifest of a folder that must hold the files it names, and no others.

    Files that begin with a dot are passed over and never read: file managers, editors and network
    file systems leave them (``.DS_Store``, ``.nfs...``), and no bundle has one.
    """
    manifest = read_manifest(path)
    found = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")}
    unexpected = sorted(found - {*manifest.files, MANIFEST})
    if unexpected:
        raise BundleError(
            path.name,
            f"{path} holds {unexpected[:8]}, which the manifest lacks",
            advice="Remove it" if len(unexpected) == 1 else "Remove them",
        )
    return manifest


@contextlib.contextmanager
def _opened(path: Path, name: str, max_bytes: int) -> Iterator[tuple[BufferedReader, int]]:
    """Open a plain file of a bundle without following links, and yield it with its size."""
    try:
        descriptor = os.open(path / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        found = "is a link" if error.errno == errno.ELOOP else f"cannot be read: {error.strerror}"
        raise BundleError(path.name, f"{path / name} {found}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BundleError(path.name, f"{path / name} is not a plain file")
        if status.st_size > max_bytes:
            raise BundleError(
                path.name,
                f"{path / name} has {status.st_size} bytes, at most {max_bytes} were expected",
            )
        with open(descriptor, "rb", closefd=False) as file:
            yield file, status.st_size
    finally:
        os.close(descriptor)


def _read_file(path: Path, name: str, max_bytes: int) -> bytes:
    """Content of a plain file of a bundle; one byte more if it has grown since it was opened."""
    with _opened(path, name, max_bytes) as (file, num_bytes):
        # Not the size that the manifest claims: there may not be enough memory for it.
        return file.read(num_bytes + 1)


def _read_checked(path: Path, name: str, digest: FileDigest) -> bytes:
    content = _read_file(path, name, digest.num_bytes)
    check_size(path.name, str(path / name), len(content), digest)
    check_sha256(path.name, str(path / name), sha256_of(content, digest.piece_bytes), digest)
    return content


def _read_checked_into(buffer: HostBuffer, path: Path, name: str, digest: FileDigest) -> Arriving:
    """Like ``_read_checked``, chunk by chunk into ``buffer``."""
    with _opened(path, name, digest.num_bytes) as (file, num_bytes):
        # Before memory is taken: a manifest may claim more than there is.
        check_size(path.name, str(path / name), num_bytes, digest)
        check_fits(path.name, str(path / name), digest, buffer)
        with Arriving(name, buffer.take(digest.num_bytes), digest.piece_bytes) as arriving:
            while num_read := file.readinto(arriving.left.data):
                arriving.advance(num_read)
            grown = len(file.read(1))
    check_size(path.name, str(path / name), arriving.num_bytes + grown, digest)
    check_sha256(path.name, str(path / name), arriving.sha256, digest)
    return arriving


def check_size(version: str, what: str, num_bytes: int, digest: FileDigest) -> None:
    """Compare a file's size with what its manifest says.

    Args:
        what: names the file in the error.

    Raises:
        BundleError: they differ.
    """
    if num_bytes != digest.num_bytes:
        raise BundleError(
            version, f"{what} has {num_bytes} bytes, the trainer wrote {digest.num_bytes}"
        )


def check_fits(version: str, what: str, digest: FileDigest, host: HostBuffer) -> None:
    """Refuse a file that nothing needs so much memory for: a sparse file of a terabyte costs its
    publisher nothing.

    Args:
        what: names the file in the error.

    Raises:
        BundleError: it is longer than ``host`` may become.
    """
    if host.max_bytes is not None and digest.num_bytes > host.max_bytes:
        raise BundleError(
            version,
            f"{what} has {digest.num_bytes} bytes, at most {host.max_bytes} make sense for the "
            f"weights in use",
        )


def check_sha256(version: str, what: str, found: str, digest: FileDigest) -> None:
    """Compare a file's digest with what its manifest says.

    Args:
        what: names the file in the error.

    Raises:
        BundleError: they differ.
    """
    if found != digest.sha256:
        raise BundleError(
            version, f"{what} has sha256 {found[:12]}, the trainer wrote {digest.sha256[:12]}"
        )
