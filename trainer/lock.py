"""Only one trainer runs in a run folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from buffer.files import OWNER_FOLDER


@contextlib.contextmanager
def only_trainer(folder: Path) -> Iterator[None]:
    """Hold ``folder/lock``; the system releases it when the process ends, however it ends.

    Raises:
        ValueError: another process holds it.
    """
    folder.mkdir(mode=OWNER_FOLDER, parents=True, exist_ok=True)
    path = folder / "lock"
    # No fallback to a lock that is a mere file: a killed trainer would leave it behind.
    try:
        holding = FileLock(path, timeout=0, fallback_to_soft=False).acquire()
    except Timeout:
        owner = path.read_text(errors="replace")[:32].strip() or "unknown"
        raise ValueError(
            f"another trainer (process {owner}) works in {folder}; not starting. Stop it first, or "
            f"choose another run_dir"
        ) from None
    with holding:
        path.write_text(f"{os.getpid()}\n")
        yield
