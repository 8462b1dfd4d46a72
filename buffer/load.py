"""The load of a server, for a trainer on the same host: how fast it decodes, step by step.

    /dev/shm/slipstream.load-<device>-<inode>    of the run folder with these numbers

The server overwrites a few numbers in place after each pass, which takes half a microsecond and
never waits: the file is in memory, not on a disk, whose pages may be locked while they are written.
A trainer in another container or on another host does not find it and is told of no load.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
import stat
import struct
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from buffer.files import open_regular

log = logging.getLogger(__name__)

MEMORY = Path("/dev/shm")
PREFIX = "slipstream.load-"
ALIVE_S = 10.0
"""A server with requests whose last pass is older has stopped or was killed."""
LOOK_S = 1.0
"""After so long without a pass, and as often, it is looked whether another server has begun."""
_LEFT_S = 60.0
"""A file that nobody holds was left behind by a server that was killed, if it is older."""
_MAGIC = 0x534C_4F41_4400_0001
_VALUES = struct.Struct("<QQQdQd64pQ")
"""Magic number, passes, tokens, seconds, running requests, monotonic time, device, passes again."""
_TRIES = 8


@dataclass(frozen=True, slots=True)
class Load:
    """Counts of a server since it started."""

    passes: int = 0
    tokens: int = 0
    """Committed."""
    busy_s: float = 0.0
    """Time in which requests ran."""
    running: int = 0
    """Requests that run now."""
    at_s: float = 0.0
    """``time.monotonic`` of the last pass; all processes of a host share that clock."""
    device: str = ""
    """On which it decodes; see ``targets.device.hardware_of``."""

    def is_busy(self, now_s: float) -> bool:
        """Requests are decoding."""
        return self.running > 0 and now_s - self.at_s < ALIVE_S


def path_of(run_dir: Path, memory: Path = MEMORY) -> Path:
    """Where the load of a run's server is.

    Raises:
        OSError: there is no such run folder.
    """
    found = os.stat(run_dir)
    return memory / f"{PREFIX}{found.st_dev:x}-{found.st_ino:x}"


class LoadWriter:
    """The server's end. For one thread, but for ``close``."""

    def __init__(self, memory: mmap.mmap | None, device: str) -> None:
        """
        Args:
            memory: what readers have mapped; ``None``: nothing is published.
        """
        self._memory = memory
        self._device = device.encode()
        self._leave: Callable[[], object] | None = None
        self._passes = 0
        self._busy_s = 0.0
        self._was_running = False
        self._last_s = time.monotonic()

    def passed(self, tokens: int, running: int) -> None:
        """A pass is over.

        Args:
            tokens: committed since the start.
            running: requests that are left.
        """
        memory = self._memory
        if memory is None:
            return
        now_s = time.monotonic()
        if self._was_running:
            self._busy_s += now_s - self._last_s
        self._last_s, self._was_running = now_s, running > 0
        self._passes += 1
        _VALUES.pack_into(
            memory, 0,
            _MAGIC, self._passes, tokens, self._busy_s, running, now_s, self._device, self._passes,
        )  # fmt: skip

    def close(self) -> None:
        """The server ends; the file is removed."""
        self._memory = None
        if self._leave is not None:
            self._leave()


def open_writer(run_dir: Path, device: str, memory: Path = MEMORY) -> LoadWriter:
    """Publish the load of a run's server; one that does nothing if that cannot be, or if another
    server of the run does so already.

    Args:
        device: on which it decodes, at most 63 bytes.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        path = path_of(run_dir, memory)
        descriptor = open_regular(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        log.info("the load is not published (%s); a trainer beside this server is not held", error)
        return LoadWriter(None, device)
    try:
        if not _is_own(descriptor):
            raise PermissionError(f"{path} belongs to somebody else")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with this process
        os.ftruncate(descriptor, _VALUES.size)
        os.pwrite(descriptor, bytes(_VALUES.size), 0)
        mapped = mmap.mmap(descriptor, _VALUES.size)
    except OSError as error:
        os.close(descriptor)
        log.info("the load is not published (%s); a trainer beside this server is not held", error)
        return LoadWriter(None, device)
    _remove_left(memory, path)
    writer = LoadWriter(mapped, device)
    writer._leave = weakref.finalize(writer, _leave, os.getpid(), path, descriptor)
    return writer


def _leave(process: int, path: Path, descriptor: int) -> None:
    """Remove the file, in the process that made it; one forked from it shares the descriptor."""
    if os.getpid() == process:
        with contextlib.suppress(OSError):
            path.unlink()
    with contextlib.suppress(OSError):
        os.close(descriptor)


def _remove_left(memory: Path, own: Path) -> None:
    """Remove what servers of other runs left behind: a run that is not served again keeps its file
    for ever."""
    for path in memory.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # it is held, or gone
            if path != own:
                _remove_if_left(path)


def _remove_if_left(path: Path) -> None:
    descriptor = open_regular(path)
    try:
        if _is_own(descriptor) and time.time() - os.fstat(descriptor).st_mtime > _LEFT_S:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    finally:
        os.close(descriptor)


class LoadReader:
    """The trainer's end."""

    def __init__(self, run_dir: Path, memory: Path = MEMORY) -> None:
        self._run_dir, self._place = run_dir, memory
        self._memory: mmap.mmap | None = None
        self._looked_s = -LOOK_S

    def read(self) -> Load | None:
        """The server's load now; ``None``: no server of the run publishes one on this host."""
        now_s = time.monotonic()
        load = None if self._memory is None else _read(self._memory)
        is_quiet = load is None or now_s - load.at_s >= LOOK_S
        if is_quiet and now_s - self._looked_s >= LOOK_S:
            self._looked_s = now_s
            self._memory = self._mapped()
            load = None if self._memory is None else _read(self._memory)
        return load

    def _mapped(self) -> mmap.mmap | None:
        try:
            descriptor = open_regular(path_of(self._run_dir, self._place))
        except OSError:
            return None
        try:
            if not _is_own(descriptor) or os.fstat(descriptor).st_size != _VALUES.size:
                return None
            return mmap.mmap(descriptor, _VALUES.size, prot=mmap.PROT_READ)
        except (OSError, ValueError):
            return None
        finally:
            os.close(descriptor)


def _read(memory: mmap.mmap) -> Load | None:
    """What is there, if it is whole: the same at both ends, and twice in a row."""
    before = b""
    for _ in range(_TRIES):
        content = memory[:]
        if content == before:
            magic, passes, tokens, busy_s, running, at_s, device, again = _VALUES.unpack(content)
            if magic == _MAGIC and passes == again:
                return Load(passes, tokens, busy_s, running, at_s, device.decode(errors="replace"))
        before = content
    return None


def _is_own(descriptor: int) -> bool:
    found = os.fstat(descriptor)
    return found.st_uid == os.geteuid() and stat.S_ISREG(found.st_mode)
