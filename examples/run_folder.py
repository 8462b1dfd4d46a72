"""The folder of a demo: its own, one demo at a time, without what an earlier one left in it."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from examples.services import BUFFER

MARKER = ".slipstream-demo"
OWN = ("traces", "weights", "trainer", "logs", "wandb", "tensorboard", BUFFER)
OWN_FILES = (
    "server.json", "step_times.json", "recording.json", "report.json", "report.html", "report.svg",
)  # fmt: skip


class DemoError(Exception):
    """The demo cannot continue; the text says why and what to do."""


@contextlib.contextmanager
def own_folder(run_dir: Path) -> Iterator[None]:
    """Lock the run folder and remove what an earlier demo left in it.

    Raises:
        DemoError: the folder does not carry a demo's marker, cannot be written, or another demo
            runs in it.
    """
    marker = run_dir / MARKER
    if run_dir.is_dir() and any(run_dir.iterdir()) and not marker.exists():
        raise DemoError(
            f"{run_dir} was not created by the demo (it holds no {MARKER}), so nothing in it was "
            f"touched. Move it away, or choose another folder with --run-dir."
        )
    with _opened(marker) as file:
        _lock(file, run_dir)
        for name in OWN:
            shutil.rmtree(run_dir / name, ignore_errors=True)
        for name in OWN_FILES:
            (run_dir / name).unlink(missing_ok=True)
        yield


def _opened(marker: Path) -> IO[str]:
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        return marker.open("a")
    except OSError as error:
        raise DemoError(
            f"{marker.parent} cannot be written ({error}). Choose another folder with --run-dir."
        ) from None


def _lock(file: IO[str], run_dir: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DemoError(
            f"another demo runs in {run_dir}. Wait for it, or choose another folder with --run-dir."
        ) from None
