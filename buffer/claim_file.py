"""Claims of one group of the embedded log, in a file that all its members append to.

    <root>/groups/<group>/claims         one message a line, see ``claims.py``
    <root>/groups/<group>/claims.size    bytes that it had at the last commit: if it is shorter,
                                         somebody has cut it off

Whoever holds its lock (flock) reads what others have appended, decides, and appends. It is written
anew, without what is over, when it has become long.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from buffer.claims import Claims, SharedClaims
from buffer.files import OWNER_FILE, leads_to, open_regular, write_atomically
from buffer.seen import END
from buffer.small_json import (
    is_whole,
    make_way,
    parse_small_json,
    read_small_json,
    write_small_json,
)

log = logging.getLogger(__name__)

CLAIMS = "claims"
SIZE = "claims.size"
_LEAST_BYTES = 1 << 20  # a shorter file is not worth writing anew
_READ_BYTES = 1 << 20
_MAX_LINE_BYTES = 1 << 26  # over what 1,000 claims of the longest names take


def cut_off(folder: Path) -> str | None:
    """What is wrong with the file of claims of a group if somebody has emptied it, cut it off or
    removed it; ``None`` if nobody has.

    Args:
        folder: of the group.

    Raises:
        OSError: the disk failed.
    """
    size = known = 0
    for _ in range(2):  # it may be written anew between the two looks
        known = _known_size(folder)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            size = (folder / CLAIMS).lstat().st_size
        if size >= known:
            return None
    return f"it has {size} bytes and had {known}: the group has forgotten what it had learnt"


def _known_size(folder: Path) -> int:
    """Bytes that the file of claims has at least; 0 where nobody has noted it."""
    try:
        known = read_small_json(folder / SIZE)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return 0
    return known if is_whole(known) else 0


class _ForeignError(OSError):
    """No member has written what is there."""


class ClaimFile(SharedClaims):
    """One member's end of the file."""

    def __init__(self, folder: Path, member: str) -> None:
        """
        Args:
            folder: of the group; it exists once something is claimed.
            member: name of this member.
        """
        super().__init__(member)
        self._path = folder / CLAIMS
        self._descriptor: int | None = None
        self._end = 0
        """Bytes of the file that are known."""
        self._most_bytes = _LEAST_BYTES
        """Size above which it is written anew."""

    @contextlib.contextmanager
    def latest(self) -> Iterator[None]:
        while True:
            is_new = self._descriptor is None
            if self._descriptor is None:
                make_way(self._path)
                flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
                self._descriptor = open_regular(self._path, flags, OWNER_FILE)
                self.claims, self._end, self._most_bytes = Claims(), 0, _LEAST_BYTES
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            if leads_to(self._path, self._descriptor):
                if self._restore_if_cut():
                    continue  # the new file is not locked yet
                if self._follow_or_move_aside():
                    break
            self.close()  # written anew, deleted or moved aside
        try:
            if is_new:
                self._warn_if_cut()
            yield
        finally:
            if self._descriptor is not None:
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def append(self, messages: Sequence[list[Any]], *, is_durable: bool) -> None:
        assert self._descriptor is not None, "only while it is locked"
        content = memoryview(_lines(messages))
        try:
            written = 0
            while written < len(content):
                written += os.write(self._descriptor, content[written:])
            if is_durable:
                os.fdatasync(self._descriptor)
        except OSError:
            os.ftruncate(self._descriptor, self._end)
            raise
        self._follow()
        if is_durable:
            self._note_size(self._end)
        if self._end > self._most_bytes:
            with contextlib.suppress(OSError):  # it is only longer than it need be
                self._write_anew()

    def close(self) -> None:
        """Give the descriptor back."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _restore_if_cut(self) -> bool:
        """Write down what this member knows if somebody has cut off what it had read, and return
        whether that was so. What it appended would be before the place from which it reads on."""
        assert self._descriptor is not None
        if os.fstat(self._descriptor).st_size >= self._end:
            return False
        self._end = 0
        with contextlib.suppress(_ForeignError):
            self._follow()  # what others have appended since
        self._write_anew()
        log.warning(
            "%s was cut off by somebody; it is written again from what this process knows",
            self._path,
        )
        return True

    def _warn_if_cut(self) -> None:
        """Say so if the file that was just opened is shorter than it was, once."""
        known = _known_size(self._path.parent)
        if self._end >= known:
            return
        log.warning(
            "%s has %d bytes and had %d: somebody has cut it off, emptied or removed it, and "
            "traces that the group has learnt may be learnt again if they are sent again",
            *(self._path, self._end, known),
        )
        self._note_size(self._end)

    def _note_size(self, num_bytes: int) -> None:
        """Note what the file has at least."""
        with contextlib.suppress(OSError):  # then it is not noticed if somebody cuts it off
            write_small_json(self._path.with_name(SIZE), num_bytes)

    def _follow_or_move_aside(self) -> bool:
        """Whether this is a file of claims; what is none is renamed, for nobody could claim."""
        try:
            self._follow()
        except _ForeignError as error:
            aside = self._path.with_name(f".foreign-{time.time_ns()}")
            self._path.rename(aside)
            log.warning(
                "%s is no file of claims (%s); it is now called %s, and traces that were learnt "
                "before may be learnt again if they are sent again",
                self._path,
                error.strerror,
                aside.name,
            )
            return False
        return True

    def _follow(self) -> None:
        """Take what was appended; a line that somebody was killed in is cut off.

        Raises:
            OSError: the disk failed, or no member has written what is there.
        """
        assert self._descriptor is not None
        rest = b""
        while found := os.pread(self._descriptor, _READ_BYTES, self._end + len(rest)):
            *lines, rest = (rest + found).split(b"\n")
            if len(rest) > _MAX_LINE_BYTES:
                problem = f"a line is over {_MAX_LINE_BYTES} bytes, so no member wrote it"
                raise _ForeignError(errno.EBADMSG, problem, str(self._path))
            for line in lines:
                self._take(line)
                self._end += len(line) + 1
        if rest:
            os.ftruncate(self._descriptor, self._end)

    def _take(self, line: bytes) -> None:
        try:
            self.claims.take(parse_small_json(line, _MAX_LINE_BYTES, max_whole=END))
        except (TypeError, ValueError) as error:
            log.warning("a line of %s is passed over: %s", self._path, error)

    def _write_anew(self) -> None:
        """Replace the file by a shorter one that says the same."""
        content = _lines(self.claims.messages())
        self._most_bytes = max(_LEAST_BYTES, 2 * len(content))
        self._note_size(0)  # a crash must not leave a size that the new file never had
        write_atomically(self._path, content, OWNER_FILE)
        self.close()
        self._descriptor = open_regular(self._path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        self._end = len(content)
        self._note_size(self._end)


def _lines(messages: Any) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in messages)
