"""``server.json``: where the server of a run folder answers, for other programs.

Its owner holds a lock on the very file, so nobody must guess from a process id whether it lives:
ids are used again, and two containers that share a folder may have the same one. Only the owner
removes or renews it. A second server on the folder leaves it alone, and takes over once the owner
is gone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import threading
import uuid
from pathlib import Path
from typing import Any

from buffer.files import leads_to, open_regular
from buffer.small_json import MAX_BYTES, parse_small_json
from configs.logs import Lasting

log = logging.getLogger(__name__)

SERVER_FILE = "server.json"
RENEW_S = 5.0
"""Interval at which a file that is missing, or whose owner is gone, is written."""


class ServerFile:
    """One server's claim to ``server.json``. A disk that refuses costs the file, not the server."""

    def __init__(self, run_dir: Path, host: str, port: int, model: str) -> None:
        self.path = run_dir / SERVER_FILE
        self._record = {
            "pid": os.getpid(),
            "host": host,
            "port": port,
            "model": model,
            "instance": uuid.uuid4().hex,
        }
        self._held: int | None = None
        """The file that was written, locked; ``None``: there is none."""
        self._problem = Lasting()
        """Why there is none."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="server-file", daemon=True)

    def start(self) -> None:
        """Write the file unless a living server owns it, and renew it from then on."""
        self.keep()
        self._thread.start()

    def stop(self) -> None:
        """Remove the file if it is this server's own."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(RENEW_S)
        with contextlib.suppress(OSError):
            if self._is_there():
                self.path.unlink()
        self._let_go()

    def keep(self) -> None:
        """Write the file if it is missing or its server is dead."""
        try:
            if self._is_there():
                return
            self._let_go()
            owner = living_owner(self.path)
            if owner is None:
                self._write()
            problem = None if owner is None else _is_taken(self.path, owner)
        except OSError as error:
            problem = (
                f"{self.path} cannot be written ({error.strerror}): programs that look for the "
                f"server there do not find it; serving continues"
            )
        if self._problem.is_new(problem):
            log.warning("%s", problem)

    def _renew(self) -> None:
        while not self._stopping.wait(RENEW_S):
            self.keep()

    def _is_there(self) -> bool:
        """Nobody has deleted or replaced the file that this server wrote."""
        return self._held is not None and leads_to(self.path, self._held)

    def _write(self) -> None:
        """Write the file aside, lock it and rename it, so that it is never seen in part."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_name(f".{SERVER_FILE}.{self._record['instance']}")
        content = json.dumps(self._record).encode() + b"\n"
        descriptor = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            if os.write(descriptor, content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.replace(aside, self.path)
        except OSError:
            os.close(descriptor)
            aside.unlink(missing_ok=True)
            raise
        self._held = descriptor

    def _let_go(self) -> None:
        if self._held is not None:
            os.close(self._held)
            self._held = None


def living_owner(path: Path) -> dict[str, Any] | None:
    """Content of a ``server.json`` whose server lives; ``None`` if it is dead or there is no such
    file.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        descriptor = open_regular(path, follow=True)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        with open(descriptor, "rb", closefd=False) as file:
            record = parse_small_json(file.read(MAX_BYTES + 1))
        pid, is_ours = int(record["pid"]), "instance" in record
        is_locked = _is_locked(descriptor)
    except (ValueError, TypeError, KeyError):
        return None
    finally:
        os.close(descriptor)
    if is_locked is None or not is_ours:  # the process id is all there is to go by
        is_locked = _lives(pid)
    return dict(record) if is_locked else None


def remove_stale(path: Path) -> None:
    """Remove a ``server.json`` whose server is dead, if the disk allows it."""
    with contextlib.suppress(OSError):
        if living_owner(path) is None:
            path.unlink(missing_ok=True)


def _is_locked(descriptor: int) -> bool | None:
    """``None``: the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def _is_taken(path: Path, owner: dict[str, Any]) -> str:
    return (
        f"{path} names another server (process {owner['pid']}, {owner.get('host')}:"
        f"{owner.get('port')}), which is running: this one serves beside it, and writes the file "
        f"once the other has stopped"
    )
