"""A disk that takes no more costs a trainer its checkpoint: it says so, and leaves no half of one.

A limit on the size of files stands in for the disk: the system refuses the same writes.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.trainer.conftest import World
from tests.trainer.test_loop import build, events, status
from tests.trainer.traffic import settings_for, write_traces
from trainer.checkpoint import read_checkpoint, write_checkpoint
from trainer.loop import NotSavedError, run


@contextmanager
def no_file_above(num_bytes: int) -> Iterator[None]:
    """Python ignores the signal, so that a write beyond it is an OSError."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_nothing_of_a_checkpoint_that_could_not_be_written_stays(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"step": 1}, {"a": torch.zeros(10)})

    with no_file_above(1 << 16), pytest.raises(OSError, match="too large"):
        write_checkpoint(tmp_path, {"step": 2}, {"a": torch.zeros(1 << 16)})

    assert [path.name for path in tmp_path.iterdir()] == ["00000001"]


def test_a_trainer_whose_last_checkpoint_cannot_be_written_has_not_ended_well(
    world: World, tmp_path: Path
) -> None:
    write_traces(tmp_path, world.traces)
    trainer = build(settings_for(tmp_path, world.target, max_steps=2, checkpoint_every_s=1000))
    with (
        no_file_above(1 << 16),
        pytest.raises(NotSavedError, match=r"of step 2, could not be written \(.*too large"),
    ):
        run(trainer)

    assert not events(tmp_path, "stopped") and status(tmp_path)["state"] != "stopped"
    saved = read_checkpoint(tmp_path / "trainer" / "checkpoints")
    assert saved is not None and saved.state["step"] == 0

    again = build(settings_for(tmp_path, world.target, max_steps=2, checkpoint_every_s=1000))
    run(again)
    assert status(tmp_path)["state"] == "stopped"
