"""Writes checkpoints in a thread, so that updates do not wait for hashing and for the disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.checkpoint import write_checkpoint
from trainer.host import HostCopies


@dataclass(frozen=True, slots=True)
class Saved:
    """Outcome of a checkpoint."""

    step: int
    offsets: dict[str, Any]
    """Of the intake: what was read before them is in the checkpoint."""
    name: str
    """Of its folder; empty if it could not be written."""
    num_bytes: int
    """What it takes on the disk; 0 if it could not be written."""
    seconds: float
    error: OSError | None


class Saver:
    """At most one checkpoint is on its way."""

    def __init__(self, root: Path, keep: int) -> None:
        """
        Args:
            root: folder of the trainer's checkpoints.
            keep: how many stay.
        """
        self.root = root
        self._keep = keep
        self.memory = HostCopies()
        """Of the tensors of the checkpoint on its way."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._job: Future[Saved] | None = None
        self._started_s = time.monotonic()
        """Monotonic time at which the last checkpoint was begun."""
        self.problem: OSError | None = None
        """Why the last checkpoint that was asked for could not be written."""

    @property
    def age_s(self) -> float:
        """Seconds since the last checkpoint was begun."""
        return time.monotonic() - self._started_s

    @property
    def is_busy(self) -> bool:
        """A checkpoint is being written, or its outcome was not asked for yet."""
        return self._job is not None

    def start(self, state: Mapping[str, Any], tensors: Callable[[], Mapping[str, Tensor]]) -> None:
        """Begin to write a checkpoint of this state, which nobody changes any more.

        Args:
            tensors: waits for them; asked on the thread that writes.
        """
        assert self._job is None, "the last checkpoint was not asked for yet"
        self._started_s = time.monotonic()
        self._job = self._pool.submit(_save, self.root, state, tensors, self._keep)

    def outcome(self, wait: bool) -> Saved | None:
        """Outcome of the checkpoint on its way, once; ``None`` while there is none."""
        if self._job is None or not (wait or self._job.done()):
            return None
        saved, self._job = self._job.result(), None
        self.problem = saved.error
        return saved


def _save(
    root: Path,
    state: Mapping[str, Any],
    tensors: Callable[[], Mapping[str, Tensor]],
    keep: int,
) -> Saved:
    started = time.monotonic()
    step, offsets = state["step"], state["offsets"]
    try:
        path = write_checkpoint(root, state, tensors(), keep)
        num_bytes = sum(file.stat().st_size for file in path.iterdir())
    except OSError as problem:
        return Saved(step, offsets, "", 0, time.monotonic() - started, problem)
    return Saved(step, offsets, path.name, num_bytes, time.monotonic() - started, None)
