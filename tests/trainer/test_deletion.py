"""A trainer forgets a tenant that is deleted: what it holds, what waits for it, what it saves."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch

from buffer.backends import open_backend
from tests.trainer.conftest import World
from tests.trainer.traffic import settings_for, write_traces
from trainer.build import build_trainer
from trainer.checkpoint import read_checkpoint


def test_rows_are_overwritten_and_nothing_of_it_is_saved_or_read_again(
    world: World, tmp_path: Path
) -> None:
    mixed = [
        replace(trace, tenant="umbrella" if i % 2 else "acme")
        for i, trace in enumerate(world.traces[:40])
    ]
    write_traces(tmp_path, mixed)
    settings = settings_for(tmp_path, world.target)
    trainer = build_trainer(settings, threading.Event())
    trainer.take_in_traces()
    memory = trainer.memory
    held = [*memory.samples(), *memory.held_out]
    theirs = [one for one in held if one.owner is not None and one.owner.tenant == "umbrella"]
    assert len(held) == 40 and len(theirs) == 20
    slots = [page * 16 + i for one in theirs for page in one.pages for i in range(16)]
    columns = memory.store._columns
    assert columns is not None
    assert columns.rows_CmH[slots].float().abs().sum() > 0
    others = columns.rows_CmH.clone()

    trainer.update()
    open_backend("log:", tmp_path).delete("umbrella")
    write_traces(tmp_path, [replace(trace, epoch=2) for trace in mixed[:4]])  # were on their way
    deadline = time.monotonic() + 60
    while len(memory.samples()) + len(memory.held_out) > 22:
        assert time.monotonic() < deadline
        trainer.take_in_traces()
    left = [*memory.samples(), *memory.held_out]
    assert {one.owner.tenant for one in left if one.owner is not None} == {"acme"}
    reused = {page for one in left for page in one.pages}
    gone = [slot for slot in slots if slot // 16 not in reused]
    assert gone and not columns.rows_CmH[gone].float().any() and not columns.facts_C[gone].any()
    kept = [page * 16 + i for one in held for page in one.pages for i in range(16)]
    kept = [slot for slot in kept if slot not in set(slots)]
    assert torch.equal(columns.rows_CmH[kept], others[kept])
    # The two that were on their way are refused, or dropped if they were read before the deletion
    # was seen, for which a reader looks once a second.
    counts = trainer.intake.counts
    num_refused = counts.deleted + trainer.intake.num_deleted
    assert counts.read + num_refused == 44 and num_refused in (0, 2)
    trainer.update()  # goes on with what is left

    trainer.finish()
    names = {f"server/{one.epoch}/{one.seq}" for one in mixed if one.tenant == "umbrella"}
    saved = read_checkpoint(trainer.saver.root)
    assert saved is not None
    memory_json = json.dumps(saved.state["memory"])
    assert not any(f'"{name}"' in memory_json for name in names)
    again = build_trainer(settings, threading.Event())
    held = [*again.memory.samples(), *again.memory.held_out]
    assert {one.owner.tenant for one in held if one.owner is not None} == {"acme"}


def test_a_trainer_whose_traces_were_all_deleted_waits(world: World, tmp_path: Path) -> None:
    write_traces(tmp_path, world.traces[:20])
    trainer = build_trainer(settings_for(tmp_path, world.target), threading.Event())
    trainer.take_in_traces()
    trainer.update()
    open_backend("log:", tmp_path).delete("default")
    deadline = time.monotonic() + 60
    while trainer.memory.samples():
        assert time.monotonic() < deadline
        trainer.take_in_traces()
    assert trainer.waits_for() == "traces: none is held any more"
    trainer.judge_candidate()  # has nothing to judge by, and passes nothing
    assert trainer.published.version == 0
    store = trainer.memory.store
    assert store.num_free == store.num_pages - 1  # page 0 belongs to nobody
