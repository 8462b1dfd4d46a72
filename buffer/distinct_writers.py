"""Which folders of a log hold records of their own.

People copy folders of writers, and link them from other disks. A link to a folder beside it is the
same folder. A copy is told from its original by its ``LOCK``, which names the writer that made it:
as long as the original is there, readers pass over its copies and nobody counts them. They take
room and hold prompts, so they are evicted and searched by deletions like any others.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from buffer.files import read_regular
from buffer.layout import LOCK, writer_names
from buffer.small_json import is_foreign

_MOST_NAME = 255


@dataclass(frozen=True, slots=True)
class _Folder:
    """What a name in a log leads to."""

    place: tuple[int, int]
    """Device and inode."""
    is_link: bool
    maker: str
    """Name of the writer that made it; its own where it does not say."""


_KNOWN: dict[Path, dict[str, _Folder]] = {}
"""Log -> name -> what was found there: readers ask at every read, and names are not used twice."""
_MOST_LOGS = 64


def writer_folders(root: Path) -> list[str]:
    """Names of all folders of writers, each folder once, sorted; empty if there is no log yet."""
    return _each_once(_folders(root))


def distinct_writers(root: Path) -> list[str]:
    """Names of the folders that hold records of their own: ``writer_folders`` without copies."""
    folders = _folders(root)
    names = _each_once(folders)
    made_by: dict[str, list[str]] = {}
    for name in names:
        made_by.setdefault(folders[name].maker, []).append(name)
    if len(made_by) == len(names):
        return names
    return sorted(maker if maker in same else same[0] for maker, same in made_by.items())


def _each_once(folders: dict[str, _Folder]) -> list[str]:
    """Of several names that lead to one folder, its own or, if that is elsewhere, the first."""
    if not any(one.is_link for one in folders.values()):
        return list(folders)
    found: dict[tuple[int, int], str] = {}
    for name in sorted(folders, key=lambda name: folders[name].is_link):
        found.setdefault(folders[name].place, name)
    return sorted(found.values())


def _folders(root: Path) -> dict[str, _Folder]:
    """What is in a log, in the order of names."""
    before = _KNOWN.get(root, {})
    found, lasting = dict[str, _Folder](), dict[str, _Folder]()
    for name in writer_names(root):
        folder = before.get(name) or _look_at(root / name)
        if folder is None:
            continue
        found[name] = folder
        if name in before or (root / name / LOCK).exists():  # its writer has just been making it
            lasting[name] = folder
    if root not in _KNOWN and len(_KNOWN) >= _MOST_LOGS:
        _KNOWN.clear()
    _KNOWN[root] = lasting
    return found


def _look_at(path: Path) -> _Folder | None:
    try:
        status, is_link = path.stat(), path.is_symlink()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        maker = os.fsdecode(read_regular(path / LOCK, _MOST_NAME))
    except (FileNotFoundError, NotADirectoryError):
        maker = ""  # it is being made
    except OSError as error:
        if not is_foreign(error):
            raise
        maker = ""
    return _Folder((status.st_dev, status.st_ino), is_link, maker or path.name)
