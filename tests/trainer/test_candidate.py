"""On a GPU, candidates are judged and published beside the updates: what is published is what was
judged, and every outcome is told. Here on a CPU, where a trainer can be told to do the same."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from buffer.bundles import check_bundle
from buffer.folder_weights import FolderWeights
from tests.trainer.conftest import World
from tests.trainer.test_loop import events, weights
from tests.trainer.traffic import settings_for, write_traces
from trainer.build import build_trainer
from trainer.candidate import attend
from trainer.checkpoint import read_checkpoint
from trainer.loop import Trainer, run


def beside(world: World, run_dir: Path, **settings: Any) -> Trainer:
    """A trainer that judges and publishes beside its updates."""
    write_traces(run_dir, world.traces)
    trainer = build_trainer(settings_for(run_dir, world.target, **settings), threading.Event())
    trainer.publisher.candidate.beside = True
    return trainer


def copied(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@contextmanager
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Versions are written once the event is set."""
    may_write, real = threading.Event(), FolderWeights.publish

    def publish(self: FolderWeights, *given: Any) -> Any:
        assert may_write.wait(20)
        return real(self, *given)

    monkeypatch.setattr(FolderWeights, "publish", publish)
    yield may_write
    may_write.set()


def test_what_was_judged_is_published_while_updates_go_on(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = beside(world, tmp_path, gate_margin=0.01, publish_every_steps=1)
    trainer.take_in_traces()
    for _ in range(5):
        trainer.update()
    judged = copied(trainer.learner.average)

    with slow_disk(monkeypatch) as may_write:
        trainer.judge_candidate()
        for _ in range(3):
            trainer.update()
            attend(trainer)
            assert not trainer.candidate_is_due()
        assert trainer.published.version == 0
        assert not events(tmp_path, "published")
        may_write.set()
        trainer.end_candidate()

    assert not all(t.equal(judged[n]) for n, t in trainer.learner.average.state_dict().items())
    check_bundle(tmp_path / "weights" / "1")
    assert all(tensor.equal(judged[name]) for name, tensor in weights(tmp_path, 1).items())
    assert all(t.equal(judged[n]) for n, t in trainer.judge.incumbent.state_dict().items())
    assert trainer.published.version == 1
    (gate,) = events(tmp_path, "gate")
    (published,) = events(tmp_path, "published")
    assert (gate["step"], published["step"], published["parent"]) == (5, 5, 0)
    assert trainer.pace.steps_since_judged == 3  # they are in the next one
    assert trainer.candidate_is_due()


def test_the_next_candidate_is_compared_with_what_was_published(
    world: World, tmp_path: Path
) -> None:
    trainer = beside(world, tmp_path, gate_margin=0.01)
    trainer.take_in_traces()
    for _ in range(2):
        trainer.update()
        trainer.judge_candidate()
        trainer.update()
        trainer.end_candidate()

    first, second = events(tmp_path, "gate")
    assert second["incumbent"] == first["candidate"]
    assert (first["parent"], second["parent"]) == (0, 1)
    assert trainer.published.version == 2


def test_a_trainer_ends_once_its_last_updates_were_judged(world: World, tmp_path: Path) -> None:
    trainer = beside(world, tmp_path, gate_margin=0.01, max_steps=12, publish_every_steps=5)

    run(trainer)

    gates, published = events(tmp_path, "gate"), events(tmp_path, "published")
    assert gates[-1]["step"] == published[-1]["step"] == 12
    average = trainer.learner.average.state_dict()
    last = weights(tmp_path, published[-1]["version"])
    assert all(tensor.equal(average[name]) for name, tensor in last.items())
    assert events(tmp_path, "stopped")


def test_a_version_that_cannot_be_written_is_told_and_updates_go_on(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise OSError("no space left")

    trainer = beside(world, tmp_path, gate_margin=0.01)
    trainer.take_in_traces()
    trainer.update()
    with monkeypatch.context() as patch:
        patch.setattr(FolderWeights, "publish", full)
        trainer.judge_candidate()
        trainer.end_candidate()
    assert events(tmp_path, "publish_failed")[0]["text"] == "no space left; training continues"
    assert trainer.published.version == 0

    trainer.update()
    trainer.judge_candidate()
    trainer.end_candidate()
    assert trainer.published.version == 1


def test_a_candidate_equal_to_the_published_version_has_not_passed(
    world: World, tmp_path: Path
) -> None:
    trainer = beside(world, tmp_path, gate_margin=0.01)
    trainer.take_in_traces()
    trainer.learner.load_weights(trainer.judge.incumbent.state_dict())
    trainer.judge_candidate()
    trainer.update()
    trainer.end_candidate()

    (gate,) = events(tmp_path, "gate")
    assert (gate["passed"], gate["kind"]) == (False, "equal")
    assert FolderWeights(tmp_path / "weights").versions() == [0]
    assert trainer.pace.refused_in_row == 1


def test_what_ends_the_publishing_thread_ends_the_trainer(world: World, tmp_path: Path) -> None:
    trainer = beside(world, tmp_path, gate_margin=0.01)
    trainer.take_in_traces()
    trainer.update()
    trainer.publisher.store.take_over()  # by another trainer
    trainer.judge_candidate()

    with pytest.raises(ValueError, match=r"taken over|took over"):
        trainer.end_candidate()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_a_trainer_on_a_gpu_publishes_and_saves_beside_its_updates(
    world: World, tmp_path: Path
) -> None:
    write_traces(tmp_path, world.traces)
    steps = {"max_steps": 60, "publish_every_steps": 10, "checkpoint_every_s": 0.1}
    settings = settings_for(tmp_path, world.target, device="cuda", gate_margin=0.01, **steps)
    trainer = build_trainer(settings, threading.Event())
    assert trainer.publisher.candidate.beside

    run(trainer)

    published = events(tmp_path, "published")
    assert published[-1]["step"] == 60
    newest = weights(tmp_path, trainer.published.version)
    assert newest.keys()
    for name, tensor in trainer.judge.incumbent.state_dict().items():
        assert tensor.cpu().equal(newest[name]), name
    for version in FolderWeights(tmp_path / "weights").versions():
        check_bundle(tmp_path / "weights" / str(version))
    saved = read_checkpoint(trainer.saver.root)
    assert saved is not None
    assert saved.state["step"] == 60
    for name, tensor in trainer.learner.state_tensors().items():
        assert tensor.equal(saved.tensors[name]), name
