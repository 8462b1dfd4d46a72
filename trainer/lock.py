"""Only one trainer runs in a run folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def only_trainer(folder: Path) -> Iterator[None]:
    """Hold ``folder/lock``; the system releases it when the process ends, however it ends.

    Raises:
        ValueError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock"
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read(32).decode(errors="replace").strip() or "unknown"
            raise ValueError(
                f"another trainer (process {owner}) works in {folder}; not starting. Stop it "
                f"first, or choose another run_dir"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n".encode())
        file.flush()
        yield
