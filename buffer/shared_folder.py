"""A folder in the memory of this host, where the newest version lies beside the one on the disk.

    /dev/shm/slipstream-<name>/           of one weights store, which has the name in ``SHM_NAME``
    /dev/shm/slipstream-<name>/<version>/ a bundle, written aside and renamed
    /dev/shm/slipstream-<name>/.spare/    the one before, whose memory the next one takes over
    /dev/shm/slipstream-<name>/.users     every process that uses the folder holds a lock on it
    /dev/shm/slipstream-<name>/.watchers  every server that waits for versions holds a lock on it

The system frees such memory only when somebody removes the files. A killed process cannot, but its
lock ends with it: whoever leaves last removes the folder, and whoever begins to use one removes
those that nobody holds any more.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import logging
import os
import secrets
import select
import shutil
import stat
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path

from buffer.files import (
    OWNER_FILE,
    OWNER_FOLDER,
    leads_to,
    open_regular,
    overwrite_parts,
    read_regular,
    write_parts,
)
from buffer.manifest import TENSORS, VERSION_NAME
from buffer.mapped_files import MappedFiles
from buffer.reader_locks import is_read, read_lock, wait_for_readers
from buffer.sealed import Content, Sealed, parts_of
from configs.logs import Lasting

log = logging.getLogger(__name__)

MEMORY = Path("/dev/shm")
PREFIX = "slipstream-"
NAME_FILE = "SHM_NAME"
"""In the weights store; a new store in the same place has another name."""
_USERS, _WATCHERS, _ROOT, _SPARE = ".users", ".watchers", ".root", ".spare"
_NUM_NAME = 16
_IN_MOVED_TO, _IN_NONBLOCK, _IN_CLOEXEC = 0x80, 0o4000, 0o2000000
_LISTEN_MS = 500
"""Longest wait for a notice before looking whether it is over."""


class SharedFolder:
    """The folder of one weights store. May be used by several threads."""

    def __init__(self, root: Path, memory: Path = MEMORY) -> None:
        """
        Args:
            root: folder of the weights store.
            memory: folder of a file system in memory.
        """
        self._root = root
        self._memory = memory
        self._lock = threading.Lock()
        self._leave: weakref.finalize[[int, Path, int, Path], SharedFolder] | None = None
        self._held: Path | None = None
        self._prepared: tuple[str, Sealed] | None = None
        """Name and content of a file that lies in the folder ``_aside``."""
        self._mapped = MappedFiles()
        self._lent: memoryview | None = None
        """Memory of a file that lies in the folder ``_aside``."""
        self._problem = Lasting()

    def path(self) -> Path | None:
        """The folder, if there is one that this user alone can have written to."""
        name = self._name()
        path = None if name is None else self._memory / f"{PREFIX}{name}"
        return path if path is not None and _is_own(path) else None

    def versions(self) -> list[int]:
        """Versions in memory, ascending."""
        path = self.path()
        return [] if path is None else versions_in(path)

    def folder(self, version: int) -> Path | None:
        """The folder of a version; ``None`` if it is not in memory."""
        path = self.path()
        found = None if path is None else path / str(version)
        return found if found is not None and found.is_dir() else None

    def hold(self) -> Path | None:
        """Make the folder if it is missing, and keep it as long as this object and its process
        live.

        Returns:
            The folder; ``None`` if memory cannot be used, which is logged once.
        """
        with self._lock:
            if self._held is not None and _is_own(self._held) and self._held == self.path():
                return self._held
            try:
                path, users = self._taken()
            except OSError as error:
                self._note(error)
                return None
            if self._leave is not None:
                self._leave()
            self._held = path
            self._leave = weakref.finalize(self, _left_by, os.getpid(), path, users, self._root)
            remove_abandoned(self._memory)
            return path

    def lend(self, name: str, num_bytes: int) -> memoryview | None:
        """Memory of one file of the version that ``put`` will get next; ``None`` if it cannot be
        had. One publisher at a time."""
        self._lent, aside = None, self._begun(name)
        if aside is not None:
            try:
                self._lent = self._mapped.of(aside / name, num_bytes)
            except OSError:  # ``put`` says so, if it lasts
                shutil.rmtree(aside, ignore_errors=True)
        return self._lent

    def prepare(self, name: str, content: Sealed) -> None:
        """Write one file of the version that ``put`` will get next, unless it was made in the
        memory of ``lend``. One publisher at a time."""
        lent, self._lent = self._lent, None
        if lent is None or content.place is not lent:
            aside = self._begun(name)
            if aside is None:
                return
            try:
                overwrite_parts(aside / name, content.parts, OWNER_FILE)
            except OSError:  # ``put`` says so, if it lasts
                shutil.rmtree(aside, ignore_errors=True)
                return
        self._prepared = name, content

    def _begun(self, name: str) -> Path | None:
        """The folder of the next version, with a file in it to be overwritten, if there is one;
        ``None`` if memory cannot be used."""
        self._prepared = None
        path = self.hold()
        if path is None:
            return None
        self.clear_leftovers()
        aside = path / _aside()
        try:
            self._take_spare(path, aside, name)
        except OSError:  # ``put`` says so, if it lasts
            shutil.rmtree(aside, ignore_errors=True)
            return None
        return aside

    def put(self, version: int, files: Mapping[str, Content | Sealed]) -> bool:
        """Show a version, whole or not at all, and remove the others. One publisher at a time.

        Returns:
            Whether it is there; if memory is full or cannot be used, it is not, and that is logged
            once.
        """
        path = self.hold()
        if path is None:
            return False
        aside, prepared = path / _aside(), self._prepared
        self._prepared = None
        is_there = prepared is not None and files.get(prepared[0]) is prepared[1]
        if not is_there or not aside.is_dir():
            prepared = None
            self.clear_leftovers()
        try:
            if prepared is None:
                self._take_spare(path, aside, TENSORS)
            for name, content in files.items():
                if prepared is not None and name == prepared[0]:
                    continue
                overwrite_parts(aside / name, parts_of(content), OWNER_FILE)
            aside.rename(path / str(version))
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            self._note(error)
            return False
        self._problem.is_new(None)
        for other in versions_in(path):
            if other != version:
                self._spare(path, other)
        return True

    def _take_spare(self, path: Path, aside: Path, name: str) -> None:
        """Make the folder for the next version, with a file in it to be overwritten, if there is
        one."""
        aside.mkdir(mode=OWNER_FOLDER)
        with contextlib.suppress(FileNotFoundError):
            (path / _SPARE / name).rename(aside / name)
        shutil.rmtree(path / _SPARE, ignore_errors=True)

    def _spare(self, path: Path, version: int) -> None:
        """Hide a version, and keep its memory for the next one. Who reads it will find it damaged
        when that is written, and takes what it wants from the disk."""
        shutil.rmtree(path / _SPARE, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            (path / str(version)).rename(path / _SPARE)

    def wait_for_readers(self, version: int) -> None:
        """Wait a moment while servers of this host read a version."""
        path = self.path()
        if path is not None and is_read(path / _WATCHERS):
            wait_for_readers(path / str(version))

    def remove(self, version: int) -> None:
        """Hide a version in one step, then delete it; who is reading it reads it to its end."""
        path = self.path()
        if path is not None:
            aside = path / f".tmp-removed-{version}"
            with contextlib.suppress(FileNotFoundError):
                (path / str(version)).rename(aside)
            shutil.rmtree(aside, ignore_errors=True)

    def clear_leftovers(self) -> None:
        """Delete what a killed publisher had begun. One publisher at a time."""
        path = self.path()
        for leftover in () if path is None else path.glob(".tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def watch(self, notify: Callable[[], None]) -> Callable[[], None]:
        """Call ``notify`` on a thread soon after a version appeared; returns what ends it."""
        path = self.hold()
        if path is None:
            return lambda: None
        with contextlib.suppress(OSError):
            os.close(open_regular(path / _WATCHERS, os.O_RDWR | os.O_CREAT, OWNER_FILE))
        ended = threading.Event()
        thread = threading.Thread(
            target=self._listen, args=(path, notify, ended), name="versions", daemon=True
        )
        thread.start()

        def end() -> None:
            ended.set()
            thread.join(2 * _LISTEN_MS / 1000)

        return end

    def _listen(self, path: Path, notify: Callable[[], None], ended: threading.Event) -> None:
        """Call ``notify`` whenever something in the folder got a new name. A method, so that the
        folder is held as long as somebody listens."""
        libc = ctypes.CDLL(None, use_errno=True)
        heard = libc.inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC)
        if heard < 0:
            return
        try:
            if libc.inotify_add_watch(heard, os.fsencode(path), _IN_MOVED_TO) < 0:
                return
            notify()  # for what came before
            waiting = select.poll()
            waiting.register(heard, select.POLLIN)
            with read_lock(path / _WATCHERS):
                while not ended.is_set():
                    if waiting.poll(_LISTEN_MS):
                        os.read(heard, 1 << 16)
                        notify()
        finally:
            os.close(heard)

    def _name(self) -> str | None:
        try:
            text = read_regular(self._root / NAME_FILE, 2 * _NUM_NAME).decode("ascii").strip()
        except (OSError, ValueError):
            return None
        return text if len(text) == _NUM_NAME and text.isalnum() else None

    def _taken(self) -> tuple[Path, int]:
        """The folder, and a descriptor with a shared lock on its users.

        Raises:
            OSError: it cannot be made, or is not this user's alone.
        """
        while True:
            path = self._memory / f"{PREFIX}{self._named()}"
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode=OWNER_FOLDER)
            if not _is_own(path):
                raise PermissionError(f"{path} is not a folder of this user alone")
            try:
                users = open_regular(path / _USERS, os.O_RDWR | os.O_CREAT, OWNER_FILE)
            except FileNotFoundError:
                continue  # whoever left last has just removed the folder
            fcntl.flock(users, fcntl.LOCK_SH)
            if leads_to(path / _USERS, users):
                root = os.fsencode(self._root.absolute())
                write_parts(path / _ROOT, [root], OWNER_FILE, is_durable=False)
                return path, users
            os.close(users)

    def _named(self) -> str:
        """The name of the store's folder, drawn by whoever needs it first."""
        name = self._name()
        if name is None:
            self._root.mkdir(parents=True, exist_ok=True)
            drawn = self._root / f".tmp-{NAME_FILE}-{secrets.token_hex(4)}"
            drawn.write_text(secrets.token_hex(_NUM_NAME // 2))
            try:
                os.link(drawn, self._root / NAME_FILE)
            except FileExistsError:
                pass
            finally:
                drawn.unlink()
            name = self._name()
        if name is None:
            raise OSError(f"{self._root / NAME_FILE} is unreadable")
        return name

    def _note(self, error: OSError) -> None:
        if self._problem.is_new(str(error)):
            log.warning(
                "versions cannot be passed on in memory (%s); they take the way over the disk",
                error,
            )


def versions_in(path: Path) -> list[int]:
    """Versions in a folder, ascending."""
    try:
        return sorted(int(name) for name in os.listdir(path) if VERSION_NAME.fullmatch(name))
    except OSError:
        return []


def remove_abandoned(memory: Path = MEMORY) -> list[Path]:
    """Remove this user's folders that no living process uses.

    A version that its killed publisher had not stored on the disk stays, as long as its store is
    there: the next trainer of that store puts it there.

    Returns:
        The folders that were removed.
    """
    removed = []
    for path in memory.glob(f"{PREFIX}*"):
        if not _is_own(path):
            continue
        try:
            users = open_regular(path / _USERS, os.O_RDWR)
        except OSError:
            continue  # it is just being made
        root = Path(os.fsdecode(_read(path / _ROOT)))
        if _left(path, users, root):
            removed.append(path)
    return removed


def _left_by(process: int, path: Path, users: int, root: Path) -> None:
    """``_left`` in the process that took the folder; one forked from it shares its lock."""
    if os.getpid() == process:
        _left(path, users, root)


def _left(path: Path, users: int, root: Path) -> bool:
    """Close a descriptor of a folder's users; whoever is the last removes the folder.

    Returns:
        Whether it did.
    """
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not leads_to(path / _USERS, users) or _is_needed(path, root):
            return False
        shutil.rmtree(path, ignore_errors=True)
        return True
    except OSError:  # others use it
        return False
    finally:
        os.close(users)


def _is_needed(path: Path, root: Path) -> bool:
    """A version is in memory alone, and its store can still take it."""
    name = path.name.removeprefix(PREFIX).encode()
    is_there = _read(root / NAME_FILE).strip() == name
    return is_there and any(not (root / str(one)).is_dir() for one in versions_in(path))


def _is_own(path: Path) -> bool:
    """A folder, no link, that belongs to this user and that nobody else can open."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    is_private = not stat.S_IMODE(status.st_mode) & 0o077
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and is_private


def _read(path: Path) -> bytes:
    """A small file; empty if it cannot be read."""
    try:
        return read_regular(path, 4096)
    except OSError:
        return b""


def _aside() -> str:
    """Name of the folder in which this process writes a version."""
    return f".tmp-next-{os.getpid()}"
