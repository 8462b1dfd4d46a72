"""Which folders of a log hold records of their own.

People copy folders of writers, and link them from other disks. A link to a folder beside it is the
same folder. A copy is told from its original by its ``LOCK``, which names the writer that made it:
as long as the original is there, readers pass over its copies and nobody counts them. They take
room and hold prompts, so they are evicted and searched by deletions like any others.
"""

from __future__ import annotations

import os
from pathlib import Path

from buffer.files import NotRegularError, read_regular
from buffer.layout import LOCK, writer_names

_MOST_NAME = 255


def writer_folders(root: Path) -> list[str]:
    """Names of all folders of writers, each folder once, sorted; empty if there is no log yet."""
    names = writer_names(root)
    links = [name for name in names if (root / name).is_symlink()]
    if not links:
        return names
    seen = {_place(root / name) for name in names if name not in links}
    found = set(names) - set(links)
    for name in links:
        place = _place(root / name)
        if place is not None and place not in seen:
            seen.add(place)
            found.add(name)
    return sorted(found)


def distinct_writers(root: Path) -> list[str]:
    """Names of the folders that hold records of their own: ``writer_folders`` without copies."""
    names = writer_folders(root)
    made_by: dict[str, list[str]] = {}
    for name in names:
        made_by.setdefault(_maker(root, name), []).append(name)
    if len(made_by) == len(names):
        return names
    return sorted(maker if maker in same else same[0] for maker, same in made_by.items())


_MAKERS: dict[tuple[Path, str, int], str] = {}
"""What was read: root, name and inode of a folder -> the writer that made it."""
_MOST_MAKERS = 10_000


def _maker(root: Path, name: str) -> str:
    """Name of the writer that made a folder; its own where the folder does not say."""
    place = _place(root / name)
    if place is None:
        return name
    key = root, name, place[1]
    found = _MAKERS.get(key)
    if found is None:
        found = _read_maker(root / name)
        if found is None:  # its writer is just making it, or it is of an older version
            return name
        if len(_MAKERS) >= _MOST_MAKERS:
            _MAKERS.clear()
        _MAKERS[key] = found
    return found


def _read_maker(folder: Path) -> str | None:
    try:
        content = read_regular(folder / LOCK, _MOST_NAME)
    except (FileNotFoundError, NotADirectoryError, NotRegularError):
        return None
    return os.fsdecode(content) or None


def _place(path: Path) -> tuple[int, int] | None:
    """Device and inode of what a path leads to; ``None`` if it leads nowhere."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino
