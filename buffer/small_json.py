"""Small JSON that anybody may have written: state files beside the traces, messages of others.

What is read is capped in bytes, depth and size of numbers, so nothing is allocated in proportion to
what a file claims, and nothing but a regular file is opened: a named pipe would wait for ever.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import logging
import math
import os
import re
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from buffer.files import (
    OWNER_FILE,
    OWNER_FOLDER,
    NotRegularError,
    kind_of,
    read_regular,
    write_atomically,
)

log = logging.getLogger(__name__)

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_WHOLE = (1 << 63) - 1
"""Largest number without a fraction, as in most databases: an offset or a time never exceeds it."""

_FOREIGN = (
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EISDIR,
    errno.ENXIO,
    errno.ENODEV,
)
"""Errors that say what lies at a path, not that the disk fails."""
_BRACKETS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|([\[{])|([\]}])', re.DOTALL)


class SmallJsonError(ValueError):
    """What was read is no JSON of the kind that is read here."""


def is_foreign(error: OSError) -> bool:
    """Whether the error says that something lies at a path that does not belong there, rather than
    that the disk fails."""
    return isinstance(error, NotRegularError) or error.errno in _FOREIGN


def read_small_json(path: Path, max_bytes: int = MAX_BYTES, *, follow: bool = False) -> Any:
    """The content of a small file.

    Args:
        path: of the file.
        max_bytes: a longer file is refused after so many bytes.
        follow: whether a link may lead to the file.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no file.
        SmallJsonError: something else lies there, which the message names without the path.
        OSError: the disk failed.
    """
    try:
        text = read_regular(path, max_bytes + 1, follow=follow)
    except OSError as error:
        if not is_foreign(error):
            raise
        problem = error.strerror or type(error).__name__
    else:
        return parse_small_json(text, max_bytes)
    raise SmallJsonError(problem)


def parse_small_json(
    text: bytes | bytearray | memoryview,
    max_bytes: int = MAX_BYTES,
    max_depth: int = MAX_DEPTH,
    max_whole: int = MAX_WHOLE,
) -> Any:
    """Parse untrusted JSON. Refused are: too many bytes, deep nesting, a key that is given twice,
    NaN, infinities, and whole numbers beyond ``max_whole``.

    Raises:
        SmallJsonError: says what is wrong, and repeats nothing of the text.
    """
    if len(text) > max_bytes:
        raise SmallJsonError(f"it has over {max_bytes} bytes")
    content = bytes(text)
    depth = 0
    for match in _BRACKETS.finditer(content):
        depth += (match[1] is not None) - (match[2] is not None)
        if depth > max_depth:
            raise SmallJsonError(f"it is nested over {max_depth} levels deep")
    problem = "it is not JSON"
    try:
        return _decoder(max_whole).decode(content.decode("utf-8"))
    except SmallJsonError as error:
        problem = str(error)
    except json.JSONDecodeError as error:
        problem = f"it is not JSON: {error.msg} at character {error.pos}"
    except ValueError:  # bytes that are no UTF-8, or a number of thousands of digits
        pass
    raise SmallJsonError(problem)  # out here: what it replaces may quote the text


def is_whole(value: Any, least: int = 0, most: int = MAX_WHOLE) -> TypeGuard[int]:
    """Whether a value is a whole number in a range; ``true`` is none."""
    return type(value) is int and least <= value <= most


def write_small_json(path: Path, value: Any) -> None:
    """Store a value for its owner's eyes, whole or not at all. A folder that lies there is renamed.

    Raises:
        OSError: the disk failed; what was there before is intact.
    """
    make_way(path)
    write_atomically(path, json.dumps(value).encode(), OWNER_FILE)


def make_way(path: Path) -> None:
    """Rename what lies where one of our files belongs and is no regular file, and say so. Several
    processes may do so at once: none ever renames a file that another has just made.

    Raises:
        OSError: the disk failed.
    """
    _rename_unless(path, _is_file)


def make_folder(path: Path) -> None:
    """Make a folder of the log in one that exists, unless it is there. What is no folder in its
    place is renamed, see ``make_way``.

    Raises:
        OSError: the disk failed.
    """
    try:
        path.mkdir(mode=OWNER_FOLDER, exist_ok=True)
    except FileExistsError:
        _rename_unless(path, Path.is_dir)
        path.mkdir(mode=OWNER_FOLDER, exist_ok=True)


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:  # another process has just renamed what was there
        return True


def _rename_unless(path: Path, is_ours: Callable[[Path], bool]) -> None:
    if not os.path.lexists(path) or is_ours(path):
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        # Others may have renamed it, and made what belongs here, meanwhile.
        if not os.path.lexists(path) or is_ours(path):
            return
        found = kind_of(path.lstat().st_mode) or "a file"
        aside = path.with_name(f".foreign-{time.time_ns()}")
        path.rename(aside)
    finally:
        os.close(folder)
    log.warning(
        "%s was %s in the way of what belongs there; it is now called %s", path, found, aside.name
    )


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise SmallJsonError("it has a number that no float holds")
    return value


def _no_constant(name: str) -> None:
    raise SmallJsonError(f"it has {name}, which JSON does not know")


def _without_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise SmallJsonError("it gives a key twice")
    return found


@functools.cache
def _decoder(max_whole: int) -> json.JSONDecoder:
    def whole(digits: str) -> int:
        value = int(digits) if len(digits) <= 20 else max_whole + 1
        if abs(value) > max_whole:
            raise SmallJsonError(f"it has a number beyond {max_whole}")
        return value

    return json.JSONDecoder(
        object_pairs_hook=_without_repeats,
        parse_int=whole,
        parse_float=_finite,
        parse_constant=_no_constant,
    )
