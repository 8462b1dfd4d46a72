"""Verdicts as rewards, and how old the drafts may be that are learnt from."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from buffer.records import Round, Rounds, Trace
from configs.schema import DrafterSettings
from tests.trainer.conftest import World
from tests.trainer.test_loop import events, status
from tests.trainer.traffic import PROMPT, settings_for, train, write_traces
from trainer.build import build_trainer
from trainer.dataset import Expected, sample_of
from trainer.loop import Trainer


def with_rounds(trace: Trace, version: int = 0) -> Trace:
    """The trace with rounds of which the second token was rejected."""
    ids, rounds = trace.token_ids.tolist(), []
    for anchor in range(PROMPT, len(ids) - 3, 2):
        draft = (ids[anchor + 1], (ids[anchor + 2] + 1) % 96)
        rounds.append(
            Round(anchor, "eagle3", version, draft, (-1.0, -2.0), (-0.5, -3.0), 1, ids[anchor + 2],
                  2, 1.0, 1, 0.01)
        )  # fmt: skip
    return replace(trace, rounds=Rounds.of(rounds))


def built(tmp_path: Path, world: World, traces: list[Trace], **settings: object) -> Trainer:
    write_traces(tmp_path, traces)
    return build_trainer(settings_for(tmp_path, world.target, **settings), threading.Event())


def test_a_sample_has_the_outcomes_of_its_own_drafter(world: World) -> None:
    trace = with_rounds(world.traces[0])
    assert trace.features is not None
    layers, hidden = trace.features.layer_ids, trace.features.rows.shape[2]
    expected = Expected(world.fingerprint, layers, hidden, 96)

    asked = sample_of(trace, replace(expected, rewarded="eagle3"), 64)
    of_another = sample_of(trace, replace(expected, rewarded="mtp"), 64)

    (column,) = {len(x.outcome_T3) for x in (asked, of_another)}  # type: ignore[union-attr]
    assert column == trace.token_ids.size
    depths = asked.outcome_T3[:, 0].numpy()  # type: ignore[union-attr, index]
    assert depths[PROMPT : PROMPT + 4].tolist() == [0, 1, 0, 1]
    assert (of_another.outcome_T3[:, 0] == -1).all()  # type: ignore[union-attr, index]
    assert sample_of(trace, expected, 64).outcome_T3 is None  # type: ignore[union-attr]
    logq = asked.outcome_T3[:, 2].contiguous().view(torch.float32)  # type: ignore[union-attr, index]
    assert logq[PROMPT : PROMPT + 2].tolist() == [-1.0, -2.0]


@pytest.mark.parametrize("parts", [1, 2])
def test_rewards_change_what_is_learnt_only_if_they_weigh_something(
    world: World, tmp_path: Path, parts: int
) -> None:
    traces = [with_rounds(trace) for trace in world.traces]
    losses = {}
    for weight in (0.0, 0.2):
        run_dir = tmp_path / str(weight)
        write_traces(run_dir, traces)
        train(settings_for(run_dir, world.target, max_steps=3, reward_weight=weight, parts=parts))
        losses[weight] = status(run_dir)["loss"]
        assert np.isfinite(losses[weight])
        assert status(run_dir)["skipped"] == 0
    assert losses[0.0] != losses[0.2]


def test_a_kind_without_the_term_is_refused(world: World, tmp_path: Path) -> None:
    settings = settings_for(tmp_path, world.target, reward_weight=0.1)
    settings = settings.model_copy(update={"drafter": DrafterSettings(kind="dflash")})
    with pytest.raises(ValueError, match=r"reward_weight is 0\.1, but the loss of dflash has no"):
        build_trainer(settings, threading.Event())


def test_drafts_of_too_old_a_version_are_not_learnt_from(world: World, tmp_path: Path) -> None:
    traces = [with_rounds(trace, version=at % 3) for at, trace in enumerate(world.traces)]
    trainer = built(tmp_path, world, traces, max_staleness=1)
    trainer.published = replace(trainer.published, version=2)
    trainer.take_in_traces()
    trainer.take_in_traces()

    held = trainer.memory.samples()
    assert {x.version for x in held} == {1, 2}
    stale = trainer.memory.num_stale
    assert stale == trainer.memory.num_samples - len(held) > 0
    assert trainer.memory.fresh_rows == sum(x.num_loss_rows for x in held)
    assert sum(event["traces"] for event in events(tmp_path, "stale")) == stale
    trainer.update()
    trainer.settle()
    (update,) = events(tmp_path, "update")
    assert 0 < update["staleness"] <= update["staleness_max"] == 1

    trainer.published = replace(trainer.published, version=3)
    trainer.take_in_traces()
    assert {x.version for x in trainer.memory.samples()} == {2}
    trainer.finish()
    assert status(tmp_path)["traces"]["stale"] == trainer.memory.num_stale > stale


def test_without_a_bound_drafts_of_any_version_are_learnt_from(
    world: World, tmp_path: Path
) -> None:
    traces = [with_rounds(trace, version=at % 3) for at, trace in enumerate(world.traces)]
    trainer = built(tmp_path, world, traces)
    trainer.published = replace(trainer.published, version=50)
    trainer.take_in_traces()
    assert {x.version for x in trainer.memory.samples()} == {0, 1, 2}
    assert trainer.memory.num_stale == 0
