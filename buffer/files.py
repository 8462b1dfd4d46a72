"""Small-file writes that survive a crash: the whole file is there, or none of it."""

from __future__ import annotations

import os
import resource
from pathlib import Path

OWNER_FOLDER, OWNER_FILE = 0o700, 0o600
"""Permissions of what holds prompts and completions: its owner alone may read it."""
_ANYONE = 0o666  # less the process's umask


def forbid_core_dumps() -> None:
    """From now on a crash of this process leaves no image of its memory on a disk."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


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
    path: Path, content: bytes | bytearray | memoryview, mode: int = _ANYONE
) -> None:
    """Write a temporary file, flush it to disk, and rename it to ``path``.

    Args:
        mode: permissions of the file.

    Raises:
        OSError: the disk failed; the former content of ``path`` is intact.
    """
    aside = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        write_durably(aside, content, mode)
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_durably(path: Path, content: bytes | bytearray | memoryview, mode: int = _ANYONE) -> None:
    """Write a file in place and flush it; a crash may leave only a part of it.

    Args:
        mode: permissions of the file if it is new.
    """
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries; without that, a power cut may lose a new file's name."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
