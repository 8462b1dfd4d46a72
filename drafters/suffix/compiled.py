"""The compiled search: where its code is kept, and when it is there.

Numba takes 10 seconds of a core to compile ``native`` and keeps the result, so a later start loads
it in a fraction of a second. Neither may hold up a server: ``now`` loads it in the background, and
where nothing is kept yet, another process compiles it first. Until it is there, the index finds no
match. ``wait`` is for programs that would rather wait.

The code is kept beside Triton's, in a folder that is named by the sources and versions it was
compiled from, and that others must not be able to write: its code is executed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from drafters.suffix import layout
from drafters.suffix.recent import Ring

log = logging.getLogger(__name__)

_SOURCES = (
    "native.py", "native_ahead.py", "native_ring.py", "native_memory.py", "layout.py",
)  # fmt: skip
_DONE = "compiled"
"""File that says that all functions were compiled."""
_MOST_S = 600.0
_OWNER = 0o700
"""Mode of the folder: what lies there is executed."""


class _Loading:
    """What this process has of the compiled search."""

    def __init__(self) -> None:
        self.native: ModuleType | None = None
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Load it in the background, once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._load, name="load-suffix", daemon=True)
            self._thread.start()

    def wait(self) -> ModuleType:
        """Load it here, unless that was done."""
        if self.native is None:
            with self._lock:
                if self.native is None:
                    self.native = _imported(folder())
        return self.native

    def _load(self) -> None:
        try:
            if not (folder() / _DONE).exists():
                _compile_elsewhere()
            self.wait()
        except Exception:
            log.exception("the suffix index finds no matches: its search could not be compiled")


_loading = _Loading()


def now() -> ModuleType | None:
    """The compiled functions; ``None`` as long as they are being loaded in the background, which
    the first call begins."""
    if _loading.native is None:
        _loading.begin()
    return _loading.native


def wait() -> ModuleType:
    """The compiled functions, as soon as they are there."""
    return _loading.wait()


@cache
def folder() -> Path:
    """Where compiled code is kept: ``NUMBA_CACHE_DIR``, or a folder of Triton's cache; a temporary
    one if that cannot be written."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    for package in ("numba", "llvmlite", "numpy"):
        digest.update(f"{package} {importlib.metadata.version(package)} ".encode())
    digest.update(f"{sys.version} {platform.platform()}".encode())
    named = os.environ.get("NUMBA_CACHE_DIR")
    triton = os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"
    found = (Path(named) if named else Path(triton) / "numba") / digest.hexdigest()[:16]
    try:
        found.mkdir(_OWNER, parents=True, exist_ok=True)
        _check_owner(found)
        with tempfile.TemporaryFile(dir=found):
            return found
    except OSError as error:
        log.warning("compiled code is not kept, so each start compiles it again: %s", error)
        return Path(tempfile.mkdtemp(prefix="slipstream-numba-"))


def _check_owner(where: Path) -> None:
    """
    Raises:
        PermissionError: somebody else may have put code there.
    """
    status = where.stat()
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
        raise PermissionError(f"others can write {where}, whose code would be executed")


def _compile_elsewhere() -> None:
    """Compile it in another process, so that this one's threads do not wait for each other."""
    command = [sys.executable, "-m", __name__]
    path = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(
        command, env=environment, capture_output=True, timeout=_MOST_S, check=False, text=True
    )
    if done.returncode:
        log.warning("compiling the suffix index failed: %s", done.stderr.strip()[-2000:])


def _imported(where: Path) -> ModuleType:
    """The module, with every function compiled or loaded."""
    import numba

    config: Any = numba.config
    former, config.CACHE_DIR = config.CACHE_DIR, str(where)
    try:
        from drafters.suffix import native
    finally:
        config.CACHE_DIR = former
    is_kept = _holds_code(where)
    try:
        _call_all(native)
    except Exception as error:  # whatever damaged bytes make of reading them
        if not is_kept:
            raise
        log.warning("compiled code kept in %s is damaged (%s); compiling it again", where, error)
        shutil.rmtree(where)
        where.mkdir(_OWNER)
        _compile_elsewhere()
        _call_all(native)
    if not (where / _DONE).exists():
        (where / _DONE).touch()
    return native


def _holds_code(where: Path) -> bool:
    return any(path.is_file() for path in where.rglob("*"))


def _call_all(native: ModuleType) -> None:
    """Call every function with the types of an index."""
    arena = np.full(1024, -1, np.int32)
    table = np.zeros((1, layout.NUM_COLUMNS), np.int64)
    table[0, [layout.ROOM, layout.SHIFT]] = 8, layout.shift_of(8)
    state = np.zeros(layout.NUM_ENTRIES, np.int64)
    state[[layout.SHORTEST, layout.LONGEST, layout.SECRET]] = 1, 2, 3
    tokens, spaces, heads, links = Ring.empty(8, 2)
    state[layout.RING_SHIFT] = layout.shift_of(heads.shape[1])
    rows, ones, out = np.zeros(1, np.int64), np.ones(1, np.int64), np.zeros(1, np.int64)
    values, kinds = np.zeros(25), np.zeros((7, 4), np.int64)
    native.extend(arena, table, rows, ones, tokens, 0, 0)
    native.link_finished(tokens, heads, links, state, 0, 0, 2)
    texts = (arena, table, rows, tokens, spaces, heads, links, state, values, kinds)
    native.look(*texts, out)
    native.draft(*texts, ones, out, np.zeros((1, 1), np.int64))


if __name__ == "__main__":
    wait()
