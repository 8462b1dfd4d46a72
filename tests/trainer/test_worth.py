"""A trainer learns where it pays: it counts what it costs, pauses, and wakes on drift."""

from __future__ import annotations

import copy
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from buffer.folder_weights import FolderWeights
from buffer.manifest import TENSORS
from buffer.records import Round, Rounds, Trace
from configs.burst import BurstSettings
from tests.trainer.conftest import World
from tests.trainer.test_gate import judge_with, judged, trained
from tests.trainer.test_learner import new_learner
from tests.trainer.test_loop import build, events, status
from tests.trainer.test_replay import samples_of
from tests.trainer.traffic import PROMPT, settings_for, train, write_traces
from trainer.learner import Learner
from trainer.loop import Trainer

LENGTH = 30
"""Rounds of each trace, by its tokens."""


def served(
    trace: Trace, *, version: int = 0, kept: float = 0.5, step_s: float = 0.01, seq: int = 0
) -> Trace:
    """The trace as a server recorded it that drafted one, two and four tokens in turn, and none in
    every fourth round. ``kept`` is the share of rounds that kept a token."""
    rounds = []
    for n in range(LENGTH):
        k = (0, 1, 2, 4)[n % 4]
        accepted = int(k > 0 and (n * 0.618 + seq * 0.31) % 1 < kept)
        kind = "eagle3" if k else "none"
        draft = (1,) * k
        seconds = step_s * (1 + 0.1 * k)
        p_logp = (-0.5,) * k
        rounds.append(
            Round(PROMPT + n, kind, version, draft, None, p_logp, accepted, 2, k, 1.0, 1, seconds)
        )
    return replace(trace, rounds=Rounds.of(rounds), seq=trace.seq + seq * 1000)


def several(world: World, count: int, first: int = 0, **served_as: Any) -> list[Trace]:
    """``count`` traces, the same texts again and again.

    Args:
        first: number of the first one; traces of other numbers are other traces.
    """
    texts = world.traces
    return [served(texts[n % len(texts)], seq=first + n, **served_as) for n in range(count)]


def feed(trainer: Trainer, run_dir: Path, traces: list[Trace]) -> None:
    """Have the trainer take in these traces."""
    write_traces(run_dir, traces)
    before = trainer.intake.counts.read
    end = time.monotonic() + 60
    while trainer.intake.counts.read < before + len(traces):
        assert time.monotonic() < end, "waited too long"
        trainer.take_in_traces()


def test_candidates_are_judged_by_speed_once_step_times_are_known(
    world: World, tmp_path: Path
) -> None:
    write_traces(tmp_path, several(world, 48))

    train(settings_for(tmp_path, world.target, max_steps=20, gate_confidence=0.5))

    gates = events(tmp_path, "gate")
    published = [gate for gate in gates if gate["passed"]]
    assert published and all(gate["speeds"] is not None for gate in gates)
    speeds = published[0]["speeds"]
    assert speeds["candidate"] >= 1.005 * speeds["incumbent"]
    # Plain steps take 0.01 s, and each draft token 0.001 s more.
    assert speeds["candidate"] <= published[0]["candidate"] * 1 / 1.1
    manifest = FolderWeights(tmp_path / "weights").read_manifest(1)
    assert manifest.gate["learning_s"] > 0
    assert status(tmp_path)["payback"]["spent_s"] >= manifest.gate["learning_s"]


def test_what_serving_saved_is_read_from_traces(world: World, tmp_path: Path) -> None:
    trainer = build(settings_for(tmp_path, world.target))

    feed(trainer, tmp_path, several(world, 16, kept=1.0))

    account = trainer.worth.payback
    # Of four rounds one is plain, and three keep a token: 7 tokens instead of 4 steps' worth.
    plain_s = 0.01 * sum(1 + (k > 0) for k in (0, 1, 2, 4)) / 4
    decode_s = 0.01 * sum(1 + 0.1 * k for k in (0, 1, 2, 4)) / 4
    assert account.saved_s / account.decode_s == pytest.approx(plain_s / decode_s - 1, rel=0.05)
    assert account.figures()["saved_by_learning_s"] is None, "no version was judged yet"


def test_a_trainer_that_does_not_earn_what_it_takes_pauses_and_wakes_on_drift(
    world: World, tmp_path: Path
) -> None:
    trainer = build(settings_for(tmp_path, world.target, payback_s=0.5, replay_ratio=999.0))
    feed(trainer, tmp_path, several(world, 48, kept=0.8))
    end = time.monotonic() + 60

    while trainer.worth.rests is None:
        assert time.monotonic() < end, "waited too long"
        trainer.update()
        trainer.take_in_traces()

    [paused] = events(tmp_path, "paused")
    assert "learning took" in paused["text"] and "trainer.payback_s = 0.5" in paused["text"]
    assert str(trainer.waits_for()).startswith("acceptance to fall: learning took")
    steps = trainer.learner.step
    trainer.wait()
    assert status(tmp_path)["paused"] == trainer.worth.rests
    assert trainer.learner.step == steps

    feed(trainer, tmp_path, several(world, 96, kept=0.1, first=100))

    assert trainer.waits_for() is None
    [drift, *_] = events(tmp_path, "drift")
    assert drift["woke"] is True


def test_a_trainer_that_waits_for_its_first_traces_spends_nothing_and_does_not_pause(
    world: World, tmp_path: Path
) -> None:
    trainer = build(settings_for(tmp_path, world.target, payback_s=1e-6))
    for _ in range(3):
        assert not trainer.take_turn()

    assert trainer.worth.payback.spent_s == 0.0
    assert trainer.worth.rests is None
    assert str(trainer.waits_for()).startswith("traces: 0 of")


def test_a_version_that_has_learnt_measures_drift_before_it_learns_more(
    world: World, tmp_path: Path
) -> None:
    write_traces(tmp_path, several(world, 48))
    train(settings_for(tmp_path, world.target, max_steps=20, gate_confidence=0.5))
    newest = max(FolderWeights(tmp_path / "weights").versions())
    assert newest > 0
    (tmp_path / "trainer" / "checkpoints").rename(tmp_path / "trainer" / "old")

    trainer = build(settings_for(tmp_path, world.target, learn="on_drift"))

    assert f"version {newest} has learnt" in str(trainer.waits_for())
    feed(trainer, tmp_path, several(world, 60, version=newest, kept=0.8, first=100))
    assert trainer.waits_for() is not None, "nothing has changed"
    feed(trainer, tmp_path, several(world, 90, version=newest, kept=0.1, first=200))
    assert trainer.waits_for() is None


def test_new_weights_learn_until_candidates_are_no_better(world: World, tmp_path: Path) -> None:
    trainer = build(settings_for(tmp_path, world.target, learn="on_drift", gate_margin=99.0))
    feed(trainer, tmp_path, several(world, 48))
    assert trainer.waits_for() is None

    for _ in range(3):
        trainer.update()
        trainer.judge_candidate()

    assert "3 candidates in a row were no better" in str(trainer.waits_for())


def test_learning_is_urgent_until_candidates_are_no_better_and_again_after_drift(
    world: World, tmp_path: Path
) -> None:
    burst = BurstSettings(serving_loss=0.2)
    settings = settings_for(tmp_path, world.target, gate_margin=99.0, duty="auto", burst=burst)
    trainer = build(settings)
    account = trainer.pace.duty.allowance
    assert account is not None and account.balance_s == account.largest_s == 15.0
    assert account.figures()["urgent"] == "nothing has been learnt yet"
    feed(trainer, tmp_path, several(world, 48, kept=0.8))
    for _ in range(3):
        assert account.urgent
        trainer.update()
        trainer.judge_candidate()
    assert not account.urgent

    feed(trainer, tmp_path, several(world, 96, kept=0.1, first=100))

    assert account.figures()["urgent"] == "acceptance has fallen"
    trainer.update()
    trainer.judge_candidate()
    assert account.urgent, "one refusal since then"
    trainer.finish()
    again = build(settings).pace.duty.allowance
    assert again is not None and again.balance_s == 0.0, "what it cost before is unknown"


def test_a_restart_remembers_what_learning_has_cost(world: World, tmp_path: Path) -> None:
    write_traces(tmp_path, several(world, 48))
    train(settings_for(tmp_path, world.target, max_steps=3))
    spent_s = status(tmp_path)["payback"]["spent_s"]

    trainer = build(settings_for(tmp_path, world.target, max_steps=3))

    assert trainer.worth.payback.spent_s == pytest.approx(spent_s, rel=0.2)
    assert spent_s > 0


# Bad candidates (issue 18, row 9)


def test_weights_that_were_rolled_back_are_never_published_again(
    world: World, tmp_path: Path
) -> None:
    write_traces(tmp_path, world.traces)
    trainer = build(settings_for(tmp_path, world.target, gate_margin=0.01))
    trainer.take_in_traces()
    trainer.update()
    trainer.judge_candidate()
    rolled_back = copy.deepcopy(trainer.learner.average.state_dict())
    store = FolderWeights(tmp_path / "weights")
    store.write_denied({1})
    trainer.update()
    trainer.judge_candidate()  # goes back to version 0
    assert trainer.published.version == 0
    trainer.learner.load_weights(rolled_back)

    trainer.pace.steps_since_judged = 1
    trainer.judge_candidate()

    assert store.versions() == [0, 1]
    last = events(tmp_path, "gate")[-1]
    assert (last["passed"], last["kind"]) == (False, "denied")
    assert "version 1 itself, which was rolled back" in last["reason"]


def test_after_a_roll_back_no_candidate_is_judged_for_a_while(world: World, tmp_path: Path) -> None:
    write_traces(tmp_path, world.traces)
    trainer = build(settings_for(tmp_path, world.target, gate_margin=0.01, cool_down_s=3600.0))
    trainer.take_in_traces()
    trainer.update()
    trainer.judge_candidate()
    FolderWeights(tmp_path / "weights").write_denied({1})
    trainer.update()
    trainer.judge_candidate()

    trainer.pace.steps_since_judged = 10_000
    assert not trainer.candidate_is_due()
    trainer.pace.cool(0.0)
    assert trainer.candidate_is_due()


def test_no_two_published_versions_are_equal(world: World, tmp_path: Path) -> None:
    write_traces(tmp_path, world.traces)
    loose = {"gate_margin": 0.01, "gate_confidence": 0.5, "publish_every_steps": 1}

    train(settings_for(tmp_path, world.target, lr=1e9, max_steps=12, keep_versions=99, **loose))

    store = FolderWeights(tmp_path / "weights")
    digests = [store.read_manifest(v).files[TENSORS] for v in store.versions()]
    assert len(set(digests)) == len(digests)


@pytest.fixture(scope="module")
def good(world: World) -> Learner:
    """Learner after 25 updates."""
    return trained(world, 25)


def over_trained(world: World) -> torch.nn.Module:
    """A drafter that has learnt two traces by heart."""
    learner = new_learner(world)
    held = learner.store.put(samples_of(world)[12:14])
    for _ in range(80):
        learner.update([piece for sample in held for piece in sample.pieces])
    return learner.model


@torch.no_grad()
def harmed(model: torch.nn.Module, harm: str) -> torch.nn.Module:
    bad: Any = copy.deepcopy(model)
    if harm == "nan":
        bad.fc.weight[0, 0] = float("nan")
    elif harm == "permuted":
        order = torch.randperm(bad.lm_head.weight.shape[0], generator=torch.manual_seed(0))
        bad.lm_head.weight.copy_(bad.lm_head.weight[order])
    else:  # its bytes read as another dtype
        for parameter in bad.parameters():
            parameter.copy_(parameter.half().view(torch.bfloat16))
    return bad


@pytest.mark.parametrize("harm", ["nan", "permuted", "other dtype", "over-trained"])
def test_a_bad_candidate_does_not_pass(world: World, good: Learner, harm: str) -> None:
    bad = over_trained(world) if harm == "over-trained" else harmed(good.model, harm)

    verdict = judged(judge_with(good), bad, samples_of(world)[:12]).verdict

    assert not verdict.passed
    # NaN drafts are no tokens: on greedy traces nothing of them is accepted.
    assert verdict.kind in (("not_finite", "worse") if harm == "nan" else ("worse",)), verdict


def test_stopping_while_paused_ends_the_trainer(world: World, tmp_path: Path) -> None:
    from trainer.build import build_trainer
    from trainer.loop import run

    stop = threading.Event()
    trainer = build_trainer(settings_for(tmp_path, world.target), stop)
    trainer.worth.rests = "a test"
    stop.set()
    run(trainer)
    assert status(tmp_path)["state"] == "stopped"
