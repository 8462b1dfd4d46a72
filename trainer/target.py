"""Follows the target of the run when its weights are replaced in a running server.

The server writes which weights are in force into the run folder. A trainer that sees others there
than it learns for drops what it holds, because rows and teacher are of the former weights, takes
the new lm_head and embedding, and goes on with the drafter it has.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from buffer.run_target import NAME, RunTarget, read_run_target
from targets.head import TargetHead, load_target_head
from trainer.run_target import place_of
from trainer.update import batch_dtype

if TYPE_CHECKING:
    from trainer.loop import Trainer

log = logging.getLogger(__name__)


class TargetWatch:
    """Notices that the run's target has other weights than a trainer learns for.

    Called from the trainer's thread and the one that reads traces.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / NAME
        self._seen: tuple[Hashable, RunTarget | None] = (None, None)
        """State of the file when it was last read, and what was in it."""
        self._given_up: Hashable = None
        """State of the file whose target cannot be followed."""

    def moved(self, fingerprint: str) -> RunTarget | None:
        """The run's target, if its weights are others than those with this fingerprint and followed
        them; cheap as long as nothing changes."""
        now = self._now()
        if now is None or self._seen[0] == self._given_up or now.fingerprint == fingerprint:
            return None
        return now if fingerprint in now.former else None

    def give_up(self) -> None:
        """It cannot be followed: forget it until a server writes it again."""
        self._given_up = self._seen[0]

    def _now(self) -> RunTarget | None:
        try:
            state = self._path.stat()
        except OSError:
            return None
        mark = state.st_mtime_ns, state.st_size, state.st_ino
        seen_mark, seen = self._seen
        if mark == seen_mark:
            return seen
        try:
            found = read_run_target(self._path.parent)
        except (OSError, ValueError) as error:
            log.warning("%s; the trainer goes on with the weights it has", error)
            found = None
        self._seen = mark, found
        return found


def follow(trainer: Trainer, target: RunTarget) -> None:
    """Learn for the weights that the target has now, in all processes. If they cannot be read, the
    trainer goes on with what it has, and the journal says that and why.

    Raises:
        GroupError: another process of the trainer is gone.
    """
    learner, former = trainer.learner, trainer.intake.expected.target_fingerprint
    try:
        copy = _read_head(target, learner.head)
    except (OSError, ValueError) as error:
        trainer.intake.watch.give_up()
        trainer.journal.event(
            "target_not_followed",
            fingerprint=target.fingerprint,
            folder=target.folder,
            text=f"{error}. Traces of these weights are refused and counted",
        )
        return
    trainer.end_candidate()
    trainer.settle()  # updates under way still belong to the former weights
    copy()
    learner.follow_target()
    trainer.intake.follow(target.fingerprint)
    num_traces = trainer.memory.clear()
    trainer.published = replace(trainer.published, target_fingerprint=target.fingerprint)
    trainer.pace.begin()
    trainer.worth.hurry("the target has other weights")
    trainer.journal.event(
        "target_changed",
        step=learner.step,
        version=trainer.published.version,
        fingerprint=target.fingerprint,
        former=former,
        folder=target.folder,
        traces=num_traces,
    )
    trainer.worth.replace_target()


def _read_head(target: RunTarget, head: TargetHead) -> Callable[[], None]:
    """Read embedding and lm_head; returns what copies them over those of ``head``, in place:
    captured updates read them there.

    Raises:
        ValueError, OSError: they cannot be read, or are of another shape.
    """
    ours = head.lm_head.weight_VH
    found = load_target_head(place_of(target).folder, ours.device, batch_dtype(ours.device))
    pairs: list[tuple[Tensor, Tensor]] = [
        (head.embed_VH, found.embed_VH), (ours, found.lm_head.weight_VH),
    ]  # fmt: skip
    for before, after in pairs:
        if before.shape != after.shape:
            raise ValueError(
                f"embedding or lm_head in {target.folder} is {tuple(after.shape)}, the target's "
                f"is {tuple(before.shape)}"
            )

    def copy() -> None:
        for before, after in pairs:
            before.copy_(after)

    return copy
