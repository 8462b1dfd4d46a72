"""A trainer follows the weights of its target, and never takes rows of one for those of another."""

from __future__ import annotations

import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from buffer.folder_weights import FolderWeights
from buffer.records import Trace
from buffer.run_target import NAME, RunTarget, former_of, read_run_target, write_run_target
from configs.schema import Settings
from targets.head import load_target_head
from tests.trainer.conftest import World
from tests.trainer.test_loop import events, status
from tests.trainer.traffic import (
    fingerprint_of,
    make_traces,
    save_target,
    settings_for,
    write_traces,
)
from trainer.build import build_trainer
from trainer.checkpoint import read_checkpoint
from trainer.loop import Trainer, run


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The same target with other weights, and traces of it."""
    folder = tmp_path_factory.mktemp("other")
    model = save_target(folder, seed=1)
    fingerprint = fingerprint_of(folder)
    traces = make_traces(model, fingerprint, 40, first_seq=500)
    return World(folder, model, fingerprint, traces)


def build(settings: Settings) -> Trainer:
    return build_trainer(settings, threading.Event())


def replaced(run_dir: Path, before: World, after: World) -> None:
    """What a server writes once it has taken the new weights."""
    known = read_run_target(run_dir) or RunTarget(before.fingerprint, str(before.target), ())
    write_run_target(run_dir, known.followed_by(after.fingerprint, str(after.target)))


def late(world: World, first: int) -> list[Trace]:
    """More traces of the same target."""
    return [replace(trace, seq=first + at) for at, trace in enumerate(world.traces[:5])]


def test_a_trainer_learns_for_the_weights_that_the_server_has_now(
    world: World, other: World, tmp_path: Path
) -> None:
    write_traces(tmp_path, world.traces)
    settings = settings_for(tmp_path, world.target, gate_margin=1e-9, gate_confidence=0.5)
    trainer = build(settings)
    trainer.take_in_traces()
    trainer.take_in_traces()
    trainer.update()
    num_held = len(trainer.memory.samples()) + trainer.memory.num_held_out
    assert num_held == len(world.traces)
    learnt = {n: t.clone() for n, t in trainer.learner.model.state_dict().items()}
    where = trainer.learner.head.lm_head.weight_VH.data_ptr()

    replaced(tmp_path, world, other)
    write_traces(tmp_path, [*late(world, 900), *other.traces])
    trainer.take_in_traces()
    assert trainer.memory.samples() and trainer.waits_for() is None

    head, fresh = trainer.learner.head, load_target_head_of(other)
    assert head.lm_head.weight_VH.equal(fresh.lm_head.weight_VH)
    assert head.embed_VH.equal(fresh.embed_VH)
    assert head.lm_head.weight_VH.data_ptr() == where
    assert trainer.judge.head is trainer.learner.head
    for name, tensor in trainer.learner.model.state_dict().items():
        assert tensor.equal(learnt[name])  # the drafter goes on from where it was
    (event,) = events(tmp_path, "target_changed")
    assert (event["fingerprint"], event["former"]) == (other.fingerprint, world.fingerprint)
    assert event["traces"] == num_held
    assert trainer.intake.num_refused == {"target": 5}
    held = {x.key for x in (*trainer.memory.samples(), *trainer.memory.held_out)}
    assert held <= {f"server/1/{t.seq}" for t in other.traces}

    for _ in range(12):
        trainer.update()
    trainer.judge_candidate()
    manifest = FolderWeights(tmp_path / "weights").read_manifest(1)
    assert manifest.target_fingerprint == other.fingerprint
    assert manifest.parent == 0
    trainer.stop.set()
    trainer.finish()
    saved = read_checkpoint(tmp_path / "trainer" / "checkpoints")
    assert saved is not None
    assert saved.state["target_fingerprint"] == other.fingerprint


def load_target_head_of(world: World) -> Any:
    import torch

    return load_target_head(world.target, torch.device("cpu"), torch.float32)


def test_what_was_read_ahead_of_the_former_weights_teaches_nothing(
    world: World, other: World, tmp_path: Path
) -> None:
    """The thread that reads has batches ready when the weights change."""
    write_traces(tmp_path, world.traces)
    trainer = build(settings_for(tmp_path, world.target))
    trainer.intake.start()
    first = trainer.intake.read()  # by then more may have been read ahead
    replaced(tmp_path, world, other)
    write_traces(tmp_path, other.traces)

    taken: list[str] = []
    while len(taken) < len(other.traces):
        if (moved := trainer.intake.moved_target()) is not None:
            trainer.intake.follow(moved.fingerprint)
        taken += [sample.key for sample in trainer.intake.read()]

    assert sorted(taken) == sorted(f"server/1/{t.seq}" for t in other.traces)
    refused = trainer.intake.num_refused["target"]
    assert refused == len(world.traces) - len(first)
    trainer.intake.close()


def test_a_paused_trainer_learns_for_other_weights_unless_it_can_tell_that_drafts_are_as_good(
    world: World, other: World, tmp_path: Path
) -> None:
    trainer = build(settings_for(tmp_path, world.target, learn="on_drift"))
    for rounds, goes_on in ((1000, False), (0, True)):
        trainer.worth.rests = "as this test wants it"
        if rounds:
            trainer.worth.drift.observe("", 0, rounds, rounds // 2)
        else:
            trainer.worth.drift.domains.clear()
        pair = (world, other) if rounds else (other, world)
        replaced(tmp_path, *pair)
        trainer.take_in_traces()

        assert trainer.intake.expected.target_fingerprint == pair[1].fingerprint
        assert (trainer.worth.rests is None) == goes_on
        assert len(events(tmp_path, "woke")) == goes_on


@pytest.mark.parametrize("how", ["gone", "other weights"])
def test_weights_that_cannot_be_read_are_not_followed_and_it_says_so(
    world: World, other: World, tmp_path: Path, how: str
) -> None:
    write_traces(tmp_path, world.traces)
    trainer = build(settings_for(tmp_path, world.target))
    folder = tmp_path / "new"
    if how != "gone":
        shutil.copytree(world.target, folder)
    replaced(tmp_path, world, replace(other, target=folder))
    write_traces(tmp_path, other.traces)
    while trainer.intake.counts.read < len(world.traces) + len(other.traces):
        trainer.take_in_traces()

    (event,) = events(tmp_path, "target_not_followed")
    assert (
        "not to be found" in event["text"] if how == "gone" else "is there by now" in event["text"]
    )
    assert trainer.intake.num_refused == {"target": len(other.traces)}
    assert trainer.intake.expected.target_fingerprint == world.fingerprint
    trainer.update()  # it goes on with what it has
    assert trainer.learner.step == 1

    if folder.is_dir():
        shutil.rmtree(folder)
    shutil.copytree(other.target, folder)
    replaced(tmp_path, world, replace(other, target=folder))  # the server is sent them again
    trainer.take_in_traces()
    assert trainer.intake.expected.target_fingerprint == other.fingerprint


def test_a_trainer_that_starts_again_goes_on_for_the_weights_in_force(
    world: World, other: World, tmp_path: Path
) -> None:
    """Its settings still name the folder that the run began with."""
    write_traces(tmp_path, world.traces)
    settings = settings_for(tmp_path, world.target, max_steps=6)
    run(build(settings))
    assert status(tmp_path)["step"] == 6
    replaced(tmp_path, world, other)
    write_traces(tmp_path, other.traces)

    again = build(settings_for(tmp_path, world.target, max_steps=10))

    assert again.intake.expected.target_fingerprint == other.fingerprint
    assert again.learner.head.lm_head.weight_VH.equal(other.model.lm_head.weight)
    assert again.learner.step == 6
    assert again.memory.samples() == ()
    assert again.published.target_fingerprint == other.fingerprint
    run(again)
    assert status(tmp_path)["step"] == 10
    assert status(tmp_path)["traces"]["held"] > 0


def test_a_target_that_the_run_never_had_is_still_refused(
    world: World, other: World, tmp_path: Path
) -> None:
    build(settings_for(tmp_path, world.target))
    with pytest.raises(ValueError, match=f"made for target {world.fingerprint[:12]}"):
        build(settings_for(tmp_path, other.target))


def test_a_damaged_note_is_named_and_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text('{"schema": "slipstream.target/1", "fingerprint": 7}')
    with pytest.raises(ValueError, match=f"{NAME} is damaged"):
        read_run_target(tmp_path)
    assert former_of(tmp_path, "a") == ()


def test_the_note_remembers_every_weights_once() -> None:
    target = RunTarget("a", "/a", ())
    for name in ("b", "c", "a", "b"):
        target = target.followed_by(name, f"/{name}")
    assert target == RunTarget("b", "/b", ("c", "a"))
    assert target.knows("c") and not target.knows("d")
