"""The store of published drafters: ``weights/<version>/``, written whole or not at all.

A bundle is a folder with ``manifest.json`` and the files it names (``drafter.safetensors`` and
perhaps more). Publishing writes aside, flushes, and renames, so a bundle that is visible is whole.
Reading trusts nothing: names, sizes, digests, headers and numbers are checked before any tensor is
made. Versions are never used twice, also when the bundle was pruned: ``HIGHEST`` remembers them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import stat
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from buffer.files import sync_folder, write_atomically, write_durably
from buffer.records import FileDigest, Manifest
from buffer.tensors import (
    MAX_BUNDLE_HEADER_BYTES,
    TensorFileError,
    TensorInfo,
    check_safetensors,
    non_finite_tensors,
    parse_json,
)

SCHEMA = "slipstream.bundle"
SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
TENSORS = "drafter.safetensors"
DENIED = "DENIED.json"
"""Versions that a server rolled back from."""
MAX_MANIFEST_BYTES = 1 << 20
IN_USE_STALE_S = 24 * 3600.0
"""A server that did not renew its mark for so long is taken for gone."""

ExpectedTensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name -> (dtype tag of safetensors, shape)."""

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\.(safetensors|json)")
_VERSION_NAME = re.compile(r"0|[1-9][0-9]{0,17}")
_PRODUCER = re.compile(r"[A-Za-z0-9._-]{1,128}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHUNK_BYTES = 4 << 20
"""Read and hashed in one go, without the interpreter's lock."""


class BundleError(ValueError):
    """A published bundle that must not be used; the text says why and what to do."""

    def __init__(self, version: str, problem: str) -> None:
        super().__init__(
            f"snapshot {version} is damaged: {problem}; not swapping. Restore the file, or wait: "
            f"the next published version supersedes it."
        )
        self.problem = problem
        """What is wrong, without the advice."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """A checked bundle in memory."""

    manifest: Manifest
    files: dict[str, bytes]
    """Content of every file but the manifest: the very bytes whose digests were checked."""


class HostBuffer:
    """Memory that file after file is read into, for one reader at a time.

    Made once, because new memory costs the other threads of a process: bytes of 0.8 GB hold the
    interpreter's lock while they are given back to the system.
    """

    def __init__(self) -> None:
        self._bytes: NDArray[np.uint8] = np.empty(0, np.uint8)

    def take(self, num_bytes: int) -> NDArray[np.uint8]:
        """Room for so many bytes, and whatever they were; ends the use of what was taken before."""
        if self._bytes.size < num_bytes:
            # With a header as long as any, so that the next version never needs a larger one.
            self._bytes = np.empty(num_bytes + MAX_BUNDLE_HEADER_BYTES, np.uint8)
        return self._bytes[:num_bytes]


@dataclass(frozen=True, slots=True)
class BundleInBuffer:
    """A checked bundle of which only the tensors were kept, in a ``HostBuffer``."""

    manifest: Manifest
    content: NDArray[np.uint8]
    """Of ``drafter.safetensors``: the very bytes that were checked, until the buffer is used again.
    """
    tensors: dict[str, TensorInfo]
    """Where each tensor lies in ``content``."""


def publish(root: Path, manifest: Manifest, tensors_bytes: Mapping[str, bytes]) -> Manifest:
    """Make a new version visible, whole, or leave no trace of it.

    Args:
        root: the store, made if missing.
        manifest: all but ``files``, which is filled in here.
        tensors_bytes: file name -> content; ``drafter.safetensors`` must be among them.

    Returns:
        The manifest as published.

    Raises:
        ValueError: the version, or a higher one, was published before; the manifest or a file
            would not pass ``check_bundle``.
        OSError: of the disk; nothing is visible then.
    """
    digests = {name: _digest(content) for name, content in tensors_bytes.items()}
    manifest = replace(manifest, files=digests)
    text = _manifest_text(manifest)
    problem = _manifest_problem(manifest, str(manifest.version)) or _files_problem(tensors_bytes)
    if problem is not None:
        raise ValueError(f"version {manifest.version} cannot be published: {problem}")
    root.mkdir(parents=True, exist_ok=True)
    with _only_publisher(root):
        _claim_version(root, manifest.version)
        _write_bundle(root, manifest.version, {**tensors_bytes, MANIFEST: text})
    return manifest


def versions(root: Path) -> list[int]:
    """Versions on disk, ascending. Only listed, not checked."""
    try:
        entries = list(os.scandir(root))
    except FileNotFoundError:
        return []
    return sorted(int(e.name) for e in entries if _VERSION_NAME.fullmatch(e.name) and e.is_dir())


def next_version(root: Path) -> int:
    """The lowest version that may still be published; 0 in a new store.

    Raises:
        ValueError: ``HIGHEST`` is damaged, so that a version might be used twice.
    """
    highest = _read_highest(root)
    return max([-1 if highest is None else highest, *versions(root)]) + 1


def read_manifest(path: Path) -> Manifest:
    """The manifest of the bundle folder ``path``, checked by itself; no other file is opened.

    Raises:
        BundleError: it is missing, unreadable, of a newer schema, or contradicts itself.
    """
    if path.is_symlink() or not path.is_dir():
        raise BundleError(path.name, f"{path} is not a folder, or a link to one")
    text = _read_file(path, MANIFEST, MAX_MANIFEST_BYTES)
    try:
        manifest = _manifest_of(parse_json(text))
        problem = _manifest_problem(manifest, path.name)
    except (TensorFileError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(path.name, f"{path / MANIFEST} is unreadable: {error}") from None
    if problem is not None:
        raise BundleError(path.name, f"{path / MANIFEST}: {problem}")
    return manifest


def read_bundle(path: Path, expected: ExpectedTensors | None = None) -> Bundle:
    """Read a bundle into memory and check all of it, so that what is used is what was checked.

    Args:
        path: the bundle's folder.
        expected: tensors that ``drafter.safetensors`` must hold, and no others.

    Raises:
        BundleError: names the file and what was found.
    """
    manifest = _manifest_of_all(path)
    files = {name: _read_checked(path, name, digest) for name, digest in manifest.files.items()}
    problem = _files_problem(files, expected)
    if problem is not None:
        raise BundleError(path.name, f"{path}: {problem}")
    return Bundle(manifest, files)


def read_bundle_into(
    buffer: HostBuffer, path: Path, expected: ExpectedTensors | None = None
) -> BundleInBuffer:
    """``read_bundle`` beside threads that cannot wait: without new memory, and holding the
    interpreter's lock for a chunk's bookkeeping at most.

    Args:
        buffer: grows to the bundle's largest file; nobody else may use it meanwhile.

    Raises:
        BundleError: as ``read_bundle``.
    """
    manifest = _manifest_of_all(path)
    others = [name for name in manifest.files if name != TENSORS]
    for name in (*others, TENSORS):  # one after another in the same place; the tensors stay
        content = _read_checked_into(buffer, path, name, manifest.files[name])
        try:
            tensors = _sound_tensors(name, content.data, expected)
        except TensorFileError as error:
            raise BundleError(path.name, f"{path}: {error}") from None
    return BundleInBuffer(manifest, content, tensors)


def check_bundle(path: Path, expected: ExpectedTensors | None = None) -> Manifest:
    """``read_bundle`` for those who only want to know that it is sound.

    Raises:
        BundleError: as ``read_bundle``.
    """
    return read_bundle(path, expected).manifest


def read_denied(root: Path) -> set[int]:
    """Versions that a server of this run rolled back from: nobody starts with them.

    Raises:
        ValueError: the file is no list of versions.
    """
    try:
        return {int(version) for version in json.loads((root / DENIED).read_bytes())}
    except FileNotFoundError:
        return set()
    except (ValueError, TypeError):
        raise ValueError(
            f"{root / DENIED} must be a list of the versions that were rolled back; write [] to "
            f"forget them"
        ) from None


def write_denied(root: Path, denied: Collection[int]) -> None:
    """Remember what ``read_denied`` returns."""
    write_atomically(root / DENIED, json.dumps(sorted(denied)).encode())


def newest_sound(root: Path) -> tuple[Bundle, list[str]]:
    """The newest version that is whole and was not rolled back, and why newer ones are not.

    Raises:
        ValueError: none is left.
    """
    denied = read_denied(root)
    problems = []
    for version in sorted(versions(root), reverse=True):
        if version in denied:
            problems.append(f"version {version} was rolled back.")
            continue
        try:
            return read_bundle(root / str(version)), problems
        except BundleError as error:
            problems.append(str(error))
    raise ValueError(f"no version in {root} can be used: {' '.join(problems) or 'it is empty'}")


def mark_in_use(root: Path, producer: str, in_use: Collection[int]) -> None:
    """Tell ``prune`` which versions a server uses or may roll back to.

    Call it before reading a version, and again at least hourly: a mark that is not renewed for
    ``IN_USE_STALE_S`` is taken for that of a dead server.

    Raises:
        ValueError: ``producer`` cannot be part of a file name.
    """
    if not _PRODUCER.fullmatch(producer):
        raise ValueError(f"producer must match {_PRODUCER.pattern}, got {producer!r}")
    root.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"producer": producer, "versions": sorted(in_use)})
    write_atomically(root / f"IN_USE-{producer}.json", text.encode())


def unmark_in_use(root: Path, producer: str) -> None:
    """Take a server's mark away, at its end."""
    (root / f"IN_USE-{producer}.json").unlink(missing_ok=True)


def marked_in_use(root: Path, now_s: float | None = None) -> set[int] | None:
    """Versions that living servers use; ``None`` if a mark cannot be read, so nobody knows.

    Args:
        root: the store.
        now_s: unix time, seconds; ``None`` is now.
    """
    fresh_s = (time.time() if now_s is None else now_s) - IN_USE_STALE_S
    marked: set[int] = set()
    for path in root.glob("IN_USE-*.json"):
        try:
            if path.stat().st_mtime >= fresh_s:
                marked |= {int(version) for version in parse_json(path.read_bytes())["versions"]}
        except FileNotFoundError:
            continue  # its server just ended
        except (ValueError, TypeError, KeyError):
            return None
    return marked


def prune(root: Path, keep: int, in_use: Collection[int] = ()) -> list[int]:
    """Remove old versions.

    Kept are the newest ``keep``, those ``in_use``, those that servers marked, and the parents of
    both. If a mark is unreadable nothing is removed.

    Returns:
        The versions removed.

    Raises:
        ValueError: ``keep`` is below 1.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}: the newest version always stays")
    marked = marked_in_use(root)
    if marked is None:
        return []
    present = versions(root)
    used = marked | set(in_use)
    kept = {*present[-keep:], *used, *_parents(root, used & set(present))}
    removed = [version for version in present if version not in kept]
    with _only_publisher(root) if removed else contextlib.nullcontext():
        for version in removed:
            _remove(root, version)
    return removed


def _write_bundle(root: Path, version: int, files: Mapping[str, bytes]) -> None:
    aside = root / f".tmp-{version}"
    try:
        aside.mkdir()
        for name, content in files.items():
            write_durably(aside / name, content)
        sync_folder(aside)
        aside.rename(root / str(version))
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    sync_folder(root)


def _manifest_text(manifest: Manifest) -> bytes:
    body = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **asdict(manifest)}
    return json.dumps(body, indent=1, allow_nan=False).encode()


def _manifest_of(body: Any) -> Manifest:
    schema, version = body.get("schema"), body.get("schema_version")
    if schema != SCHEMA:
        raise TypeError(f"schema is {schema!r}, expected {SCHEMA!r}")
    if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
        raise TypeError(f"schema_version is {version!r}, this reader knows 1 to {SCHEMA_VERSION}")
    known = {name: body[name] for name in Manifest.__dataclass_fields__ if name != "files"}
    files = {
        name: FileDigest(entry["sha256"], entry["num_bytes"])
        for name, entry in body["files"].items()
    }
    return Manifest(**known, files=files)


def _manifest_problem(manifest: Manifest, folder: str) -> str | None:
    """What is wrong with a manifest, or ``None``."""
    version, parent = manifest.version, manifest.parent
    if type(version) is not int or not _VERSION_NAME.fullmatch(str(version)):
        return f"version must be an integer >= 0, got {version!r}"
    if str(version) != folder:
        return f"it is of version {version}, but lies in folder {folder!r}"
    if parent is not None and (type(parent) is not int or not 0 <= parent < version):
        return f"parent must be a version below {version} or null, got {parent!r}"
    for name in ("kind", "target_fingerprint"):
        if not isinstance(getattr(manifest, name), str):
            return f"{name} must be a text, got {getattr(manifest, name)!r}"
    if type(manifest.created_unix_ms) is not int:
        return f"created_unix_ms must be an integer, got {manifest.created_unix_ms!r}"
    for name in ("drafter_config", "gate", "policy"):
        value = getattr(manifest, name)
        if not isinstance(value, dict) or not _is_finite(value):
            return f"{name} must be an object of finite numbers"
    if TENSORS not in manifest.files:
        return f"files must name {TENSORS}"
    return next(filter(None, map(_entry_problem, manifest.files.items())), None)


def _entry_problem(entry: tuple[str, FileDigest]) -> str | None:
    name, digest = entry
    if not _FILE_NAME.fullmatch(name) or name == MANIFEST:
        return f"file name {name!r} is not a plain name ending in .safetensors or .json"
    if not isinstance(digest.sha256, str) or not _SHA256.fullmatch(digest.sha256):
        return f"sha256 of {name} must be 64 hex digits, got {digest.sha256!r}"
    if type(digest.num_bytes) is not int or digest.num_bytes < 0:
        return f"num_bytes of {name} must be an integer >= 0, got {digest.num_bytes!r}"
    return None


def _is_finite(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _manifest_of_all(path: Path) -> Manifest:
    """The manifest of a folder that holds no file which the manifest does not name."""
    manifest = read_manifest(path)
    unexpected = sorted({entry.name for entry in path.iterdir()} - {*manifest.files, MANIFEST})
    if unexpected:
        raise BundleError(path.name, f"{path} holds {unexpected[:8]}, which the manifest lacks")
    return manifest


def _files_problem(
    files: Mapping[str, bytes], expected: ExpectedTensors | None = None
) -> str | None:
    """What is wrong with the content of a bundle's files, or ``None``."""
    for name, content in files.items():
        try:
            _sound_tensors(name, content, expected)
        except TensorFileError as error:
            return str(error)
    return None


def _sound_tensors(
    name: str, content: bytes | memoryview, expected: ExpectedTensors | None
) -> dict[str, TensorInfo]:
    """Tensors of one file of a bundle, checked to the last number; a JSON file has none.

    Raises:
        TensorFileError: names the file and what was found.
    """
    if not name.endswith(".safetensors"):
        return {}
    try:
        tensors = check_safetensors(content, expected if name == TENSORS else None)
    except TensorFileError as error:
        raise TensorFileError(f"{name}: {error}") from None
    broken = non_finite_tensors(content, tensors)
    if broken:
        raise TensorFileError(f"{name}: tensors {broken[:8]} hold NaN or infinity")
    return tensors


@contextlib.contextmanager
def _opened(path: Path, name: str, max_bytes: int) -> Iterator[tuple[BufferedReader, int]]:
    """A plain file of a bundle, links not followed, and its size, which was expected."""
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
    """Content of a plain file of a bundle; a byte too many if it grew since it was opened."""
    with _opened(path, name, max_bytes) as (file, num_bytes):
        # Not so many as a manifest claims, for which there may be no memory.
        return file.read(num_bytes + 1)


def _read_checked(path: Path, name: str, digest: FileDigest) -> bytes:
    content = _read_file(path, name, digest.num_bytes)
    _check_size(path, name, len(content), digest)
    _check_sha256(path, name, _digest(content).sha256, digest)
    return content


def _read_checked_into(
    buffer: HostBuffer, path: Path, name: str, digest: FileDigest
) -> NDArray[np.uint8]:
    """``_read_checked``, chunk by chunk into a buffer."""
    with _opened(path, name, digest.num_bytes) as (file, num_bytes):
        # Before there is room for it: a manifest may claim what no memory holds.
        _check_size(path, name, num_bytes, digest)
        content = buffer.take(digest.num_bytes)
        num_bytes, sha256 = 0, hashlib.sha256()
        while num_read := file.readinto(content[num_bytes : num_bytes + _CHUNK_BYTES].data):
            sha256.update(content[num_bytes : num_bytes + num_read].data)
            num_bytes += num_read
        grown = len(file.read(1))
    _check_size(path, name, num_bytes + grown, digest)
    _check_sha256(path, name, sha256.hexdigest(), digest)
    return content


def _check_size(path: Path, name: str, num_bytes: int, digest: FileDigest) -> None:
    if num_bytes != digest.num_bytes:
        raise BundleError(
            path.name, f"{path / name} has {num_bytes} bytes, the trainer wrote {digest.num_bytes}"
        )


def _check_sha256(path: Path, name: str, found: str, digest: FileDigest) -> None:
    if found != digest.sha256:
        raise BundleError(
            path.name,
            f"{path / name} has sha256 {found[:12]}, the trainer wrote {digest.sha256[:12]}",
        )


def _digest(content: bytes) -> FileDigest:
    return FileDigest(hashlib.sha256(content).hexdigest(), len(content))


@contextlib.contextmanager
def _only_publisher(root: Path) -> Iterator[None]:
    """Hold the store's lock; whatever a publisher left aside before was killed, and goes."""
    descriptor = os.open(root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        for leftover in filter(Path.is_dir, root.glob(".tmp-*")):
            shutil.rmtree(leftover, ignore_errors=True)
        yield
    finally:
        os.close(descriptor)


def _claim_version(root: Path, version: int) -> None:
    """Make sure that ``version`` was never used, and that it never will be again."""
    lowest = next_version(root)
    if version < lowest:
        raise ValueError(
            f"version {version} cannot be published: {lowest - 1} was published before, and "
            f"versions are never reused. Publish as version {lowest} or higher"
        )
    write_atomically(root / "HIGHEST", f"{version}\n".encode())


def _read_highest(root: Path) -> int | None:
    try:
        text = (root / "HIGHEST").read_text(errors="replace").strip()
    except FileNotFoundError:
        return None
    if not _VERSION_NAME.fullmatch(text):
        raise ValueError(
            f"{root / 'HIGHEST'} must hold the highest version ever published, got {text[:40]!r}; "
            f"nothing is published. Write that number into it"
        )
    return int(text)


def _parents(root: Path, used: Collection[int]) -> set[int]:
    parents = set()
    for version in used:
        with contextlib.suppress(BundleError):  # a damaged bundle has no parent to protect
            parents.add(read_manifest(root / str(version)).parent)
    return {parent for parent in parents if parent is not None}


def _remove(root: Path, version: int) -> None:
    """Take a version out of sight in one step, then delete it."""
    aside = root / f".tmp-removed-{version}"
    with contextlib.suppress(FileNotFoundError):
        (root / str(version)).rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
