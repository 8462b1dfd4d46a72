"""A trainer whose traces and weights are in Redis learns, commits, resumes and gives way as one
with files."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from buffer.backends import open_backend
from buffer.codec import encode_trace
from buffer.counts import GroupCounts
from buffer.interface import TraceLimits
from buffer.records import Trace
from buffer.weights_store import SupersededError
from configs.schema import BufferSettings, Settings
from oracles.redis_servers import RedisServer, valkey_binary
from tests.trainer.conftest import World
from tests.trainer.traffic import settings_for
from trainer.build import build_trainer
from trainer.loop import Trainer, run

LIMITS = TraceLimits(segment_bytes=1 << 20, max_bytes=1 << 28, ttl_s=1e6, sync_interval_s=0.0)


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    server = RedisServer(valkey_binary())
    yield server
    server.close()


@pytest.fixture
def url(server: RedisServer, tmp_path: Path) -> str:
    return f"{server.url}?run={tmp_path.name}&member_timeout_s=2&timeout_s=2"


def write(url: str, run_dir: Path, traces: list[Trace]) -> None:
    with open_backend(url, run_dir).open_trace_writer(LIMITS) as writer:
        for trace in traces:
            writer.append(encode_trace(trace))


def build(url: str, run_dir: Path, world: World, **trainer: Any) -> Trainer:
    settings: Settings = settings_for(run_dir, world.target, **trainer)
    settings = settings.model_copy(update={"buffer": BufferSettings(url=url)})
    return build_trainer(settings, threading.Event())


def group(url: str, run_dir: Path) -> GroupCounts:
    (found,) = open_backend(url, run_dir).stats().groups
    return found


def test_a_trainer_learns_commits_and_resumes(world: World, tmp_path: Path, url: str) -> None:
    first, later = world.traces[:40], world.traces[40:60]
    write(url, tmp_path, first)
    trainer = build(url, tmp_path, world, max_steps=12)
    run(trainer)
    taken = trainer.intake.counts.read
    found = group(url, tmp_path)
    assert found.committed == taken > 0
    assert found.committed + found.pending == len(first)
    store = open_backend(url, tmp_path).open_weights()
    assert trainer.published.version in store.versions()
    assert not (tmp_path / "weights").exists()
    assert not (tmp_path / "traces").exists()

    write(url, tmp_path, [replace(trace, epoch=2) for trace in later])
    again = build(url, tmp_path, world, max_steps=24)
    assert again.learner.step == 12
    assert len(again.memory.samples()) == len(trainer.memory.samples())
    run(again)
    assert again.learner.step == 24
    found = group(url, tmp_path)
    assert found.committed == taken + again.intake.counts.read
    assert found.committed + found.pending == len(first) + len(later)
    assert found.lost == 0


def test_what_a_trainer_had_not_saved_goes_to_the_next(
    world: World, tmp_path: Path, url: str
) -> None:
    write(url, tmp_path, world.traces[:30])
    trainer = build(url, tmp_path / "one", world)
    trainer.take_in_traces()
    assert trainer.intake.counts.read == 30
    trainer.intake.close()  # as the end of its process would, sooner or later

    other = build(url, tmp_path / "two", world, max_steps=5)
    run(other)
    assert other.intake.counts.read == 30
    assert (group(url, tmp_path).committed, group(url, tmp_path).pending) == (30, 0)


def test_of_two_trainers_of_one_run_the_newer_publishes(
    world: World, tmp_path: Path, url: str
) -> None:
    write(url, tmp_path, world.traces[:40])
    older = build(url, tmp_path / "one", world, max_steps=12)
    newer = build(url, tmp_path / "two", world, max_steps=12)
    with pytest.raises(SupersededError, match="another trainer took over"):
        run(older)
    run(newer)
    store = open_backend(url, tmp_path).open_weights()
    versions = store.versions()
    assert versions == [0, *range(1, newer.published.version + 1)]
    assert len(versions) > 1


def test_a_trainer_rides_out_a_restart_of_the_server(
    world: World, tmp_path: Path, url: str, server: RedisServer
) -> None:
    write(url, tmp_path, world.traces[:40])
    trainer = build(url, tmp_path, world, max_steps=12)
    trainer.intake.start()
    while trainer.waits_for() is not None:
        trainer.take_in_traces()
    server.kill()
    try:
        for _ in range(3):
            trainer.update()
            trainer.take_in_traces()
        trainer.checkpoint()
        trainer.report_checkpoint(wait=True)
        trainer.judge_candidate()
    finally:
        server.start()
    run(trainer)
    events = [
        json.loads(line)["event"]
        for line in (tmp_path / "trainer" / "log.jsonl").read_text().splitlines()
    ]
    assert "commit_failed" in events
    assert "buffer_away" in events
    assert events[-1] == "stopped"
    assert trainer.learner.step == 12
    found = group(url, tmp_path)
    assert found.committed == trainer.intake.counts.read == 40
