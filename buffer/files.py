"""Small files: writes that survive a crash, and opening nothing that would stop the process."""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Iterable
from pathlib import Path

OWNER_FOLDER, OWNER_FILE = 0o700, 0o600
"""Permissions of what holds prompts and completions: its owner alone may read it."""
_ANYONE = 0o666  # less the process's umask


def forbid_core_dumps() -> None:
    """From now on a crash of this process leaves no image of its memory on a disk."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


Writable = bytes | bytearray | memoryview


class NotRegularError(OSError):
    """Something else than a regular file lies where one belongs."""


_KINDS = (
    (stat.S_ISLNK, "a link"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISCHR, "a device"),
)


def kind_of(mode: int) -> str | None:
    """What lies at a path, by its ``st_mode``: "a named pipe"; ``None`` for a regular file."""
    return next((name for is_kind, name in _KINDS if is_kind(mode)), None)


def open_regular(
    path: Path, flags: int = os.O_RDONLY, mode: int = OWNER_FILE, *, follow: bool = False
) -> int:
    """Open a regular file, and nothing else: a named pipe would wait for its other end, and a
    device may have no end.

    Args:
        flags: of ``os.open``.
        mode: permissions of the file if it is new.
        follow: whether a link may lead to the file.

    Returns:
        A descriptor.

    Raises:
        NotRegularError: it is something else, which the message names with the path.
        OSError: it cannot be opened.
    """
    flags |= os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags, mode)
    except OSError as error:
        # A link; or a pipe that nobody reads, or a socket; or a folder that is to be written.
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            found = kind_of(os.stat(path, follow_symlinks=follow).st_mode)
            if found is not None:
                raise _not_regular(path, found) from None
        raise
    found = kind_of(os.fstat(descriptor).st_mode)
    if found is not None:
        os.close(descriptor)
        raise _not_regular(path, found)
    return descriptor


def read_regular(path: Path, max_bytes: int = -1, *, follow: bool = False) -> bytes:
    """The first bytes of a regular file, all of them by default; see ``open_regular``."""
    with open(open_regular(path, follow=follow), "rb") as file:
        return file.read(max_bytes)


def _not_regular(path: Path, found: str) -> NotRegularError:
    return NotRegularError(errno.EINVAL, f"it is {found}, not a regular file", str(path))


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or leads to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def why_unwritable(folder: Path) -> str | None:
    """Why nothing can be written to a folder, which is made if it is missing; ``None``: it can.

    Writes one block to the disk and removes it again.
    """
    probe = folder / f".tmp-probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            write_durably(probe, bytes(4096))
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        return error.strerror or str(error)
    return None


def leads_to(path: Path, descriptor: int) -> bool:
    """Whether a path is that of an open file: nobody has deleted or replaced it."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except (FileNotFoundError, NotADirectoryError):
        return False


def write_atomically(
    path: Path,
    content: Writable,
    mode: int = _ANYONE,
    *,
    is_durable: bool = True,
) -> None:
    """Write a temporary file, flush it to disk, and rename it to ``path``.

    Args:
        mode: permissions of the file.
        is_durable: ``False``: flush nothing. A power cut may then undo it, or leave the file empty.

    Raises:
        OSError: the disk failed; the former content of ``path`` is intact.
    """
    aside = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        _write(aside, [content], mode, is_durable)
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    if is_durable:
        sync_folder(path.parent)


def write_durably(path: Path, content: Writable, mode: int = _ANYONE) -> None:
    """Write a file in place and flush it; a crash may leave only a part of it.

    Args:
        mode: permissions of the file if it is new.

    Raises:
        NotRegularError: a link, a pipe or another thing lies there.
        OSError: the disk failed.
    """
    _write(path, [content], mode, True)


def write_parts(
    path: Path, parts: Iterable[Writable], mode: int = _ANYONE, *, is_durable: bool
) -> None:
    """``write_durably`` for a file that is in pieces; without ``is_durable`` nothing is flushed."""
    _write(path, parts, mode, is_durable)


def _write(path: Path, parts: Iterable[Writable], mode: int, is_durable: bool) -> None:
    with open(path, "wb", opener=lambda _, flags: open_regular(path, flags, mode)) as file:
        for part in parts:
            file.write(part)
        file.flush()
        if is_durable:
            os.fsync(file.fileno())


def overwrite_parts(path: Path, parts: Iterable[Writable], mode: int) -> None:
    """Write a file over its former content, which keeps its memory on a file system in memory: new
    pages take as long again as filling them. Flushes nothing.

    Raises:
        NotRegularError: a link, a pipe or another thing lies there.
        OSError: the disk failed.
    """
    with open(open_regular(path, os.O_WRONLY | os.O_CREAT, mode), "wb", buffering=0) as file:
        for part in parts:
            left = memoryview(part).cast("B")
            while len(left):
                left = left[file.write(left) :]
        file.truncate()


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries; without that, a power cut may lose a new file's name."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
