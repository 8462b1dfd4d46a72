"""A target from a GGUF file: converted once into a folder like any other, and kept.

A folder of the cache is named after the content of its file, so a file that moves is not converted
again and one that changes is. It appears by a rename, complete. Server and trainer may start at the
same moment: one of them converts, and the other waits for it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from buffer.fingerprint import file_fingerprint

log = logging.getLogger(__name__)

RECIPE = 1
"""Part of a folder's name. Raise it when the same file is to be converted in another way."""
RECORD = "converted.json"
"""File of a cache folder with the digests of the others."""
_MAGIC = b"GGUF"


def default_cache() -> Path:
    """``slipstream/targets`` in the user's cache folder, which XDG_CACHE_HOME may move."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "slipstream" / "targets"


def converted_folder(file: Path, cache: Path | None = None) -> Path:
    """Folder with the target of a GGUF file; converts the file if the cache has no sound one.

    Args:
        cache: ``None``: ``default_cache()``.

    Raises:
        ValueError: the file is missing, not a GGUF, damaged or of an unknown architecture, a
            package for reading it is missing, or the cache cannot be written.
    """
    content = _content_of(file)
    cache = (default_cache() if cache is None else cache).expanduser()
    folder = cache / f"gguf-{content[:32]}-{RECIPE}"
    if _problem(folder) is not None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with _sole_owner(folder):
                _convert_if_needed(file, content, folder)
        except OSError as error:
            raise ValueError(
                f"cannot keep the target converted from {file} in {cache} ({error}); make room "
                f"there, or name another folder with target_cache"
            ) from error
    return folder


def check_magic(file: Path) -> None:
    """
    Raises:
        ValueError: a file is not there, or does not begin as a GGUF file does.
    """
    if not file.is_file():
        raise ValueError(f"target {str(file)!r} does not exist")
    with file.open("rb") as opened:
        start = opened.read(len(_MAGIC))
    if start != _MAGIC:
        raise ValueError(
            f"target {str(file)!r} is not a GGUF file: it begins with {start!r} instead of "
            f"{_MAGIC!r}; name a GGUF file, a folder with safetensors or a Hugging Face id"
        )


def _content_of(file: Path) -> str:
    """sha256 of a GGUF file, in hex."""
    check_magic(file)
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextmanager
def _sole_owner(folder: Path) -> Iterator[None]:
    """Keep other processes from writing the folder. The end of a process releases it too."""
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("another process is converting the target into %s; waiting for it", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _convert_if_needed(file: Path, content: str, folder: Path) -> None:
    """Make the folder anew, unless another process did while this one waited for the lock."""
    problem = _problem(folder)
    if problem is None:
        return
    if folder.exists():
        log.warning("%s is damaged (%s); converting %s again", folder, problem, file)
    from targets.gguf_convert import convert

    started_s = time.perf_counter()
    log.info("converting %s (%d MB), once, into %s", file, file.stat().st_size // 10**6, folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir()
    try:
        convert(file, partial)
        _record(partial, file, content)
        _put_in_place(partial, folder)
    except BaseException:  # on a full disk, what was written would keep it full
        shutil.rmtree(partial, ignore_errors=True)
        raise
    log.info("converted %s in %.1f s", file, time.perf_counter() - started_s)


def _put_in_place(partial: Path, folder: Path) -> None:
    """Rename ``partial`` to ``folder``; a damaged one in its place is removed."""
    damaged = folder.with_name(f".{folder.name}.damaged")
    shutil.rmtree(damaged, ignore_errors=True)
    if folder.exists():
        folder.rename(damaged)
    partial.rename(folder)
    shutil.rmtree(damaged, ignore_errors=True)


def _record(folder: Path, file: Path, content: str) -> None:
    """Write what the folder was made from and the digest of each of its files."""
    digests = {path.name: file_fingerprint(path) for path in sorted(folder.iterdir())}
    made_from = {"file": file.name, "sha256": content, "recipe": RECIPE}
    (folder / RECORD).write_text(json.dumps({"made_from": made_from, "files": digests}, indent=1))


def _problem(folder: Path) -> str | None:
    """Why a folder of the cache cannot be used; ``None`` if it can."""
    try:
        record: Any = json.loads((folder / RECORD).read_text())
        wanted: dict[str, str] = record["files"]
        names = {path.name for path in folder.iterdir()} - {RECORD}
        if names != wanted.keys():
            return f"{sorted(names ^ wanted.keys())} missing or unexpected"
        unlike = [name for name in wanted if file_fingerprint(folder / name) != wanted[name]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{unlike} changed since they were written" if unlike else None
