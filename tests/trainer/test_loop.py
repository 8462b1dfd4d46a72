"""A trainer learns from what was served, publishes only what is sound, and survives kill -9."""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load

from buffer.bundles import check_bundle, read_bundle, read_manifest
from buffer.folder_weights import FolderWeights
from buffer.manifest import TENSORS
from configs.schema import DrafterSettings, Settings
from oracles.forked import context
from tests.trainer.conftest import World
from tests.trainer.traffic import (
    PROMPT,
    fingerprint_of,
    save_target,
    settings_for,
    train,
    with_rows,
    write_traces,
)
from trainer import publish
from trainer.build import build_trainer
from trainer.checkpoint import CheckpointError, read_checkpoint
from trainer.loop import QUIET_S, Trainer
from trainer.packing import pack
from trainer.replay import keys_in


def build(settings: Settings) -> Trainer:
    return build_trainer(settings, threading.Event())


def events(run_dir: Path, *names: str) -> list[dict[str, Any]]:
    lines = (run_dir / "trainer" / "log.jsonl").read_text().splitlines()
    parsed = [json.loads(line) for line in lines]
    return [event for event in parsed if event["event"] in names]


def status(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "trainer" / "status.json").read_text())
    return found


def weights(run_dir: Path, version: int) -> dict[str, torch.Tensor]:
    return load(read_bundle(run_dir / "weights" / str(version)).files[TENSORS])


def test_learning_raises_tokens_per_step_version_by_version(world: World, tmp_path: Path) -> None:
    write_traces(tmp_path, world.traces)

    # By the estimate alone: six held-out traces are too few to be sure of a gain.
    train(settings_for(tmp_path, world.target, max_steps=50, gate_confidence=0.5))

    updates, gates = events(tmp_path, "update"), events(tmp_path, "gate")
    published = events(tmp_path, "published")
    assert updates[-1]["step"] == sum(u["updates"] for u in updates) == 50
    assert sum(u["rows"] for u in updates) == status(tmp_path)["trained_rows"]
    assert updates[-1]["loss"] < 0.7 * updates[0]["loss"]
    assert gates[-1]["candidate"] > gates[0]["incumbent"] + 0.15
    assert FolderWeights(tmp_path / "weights").versions() == list(range(len(published) + 1))
    for before, after in itertools.pairwise(FolderWeights(tmp_path / "weights").versions()):
        manifest = check_bundle(tmp_path / "weights" / str(after))
        assert manifest.parent == before
        # The verdict rests on an estimate of its own, not on the tokens per step that are noted.
        judged = re.search(r"candidate ([\d.]+), incumbent ([\d.]+)", manifest.gate["reason"])
        assert judged is not None
        candidate, incumbent = map(float, judged.groups())
        assert candidate >= 1.005 * incumbent - 1e-4  # they are rounded
        assert manifest.gate["candidate"] > manifest.gate["incumbent"]
        assert len(manifest.policy["acceptance"]) == 4
        assert manifest.policy["parent"] == before
        assert len(manifest.policy["parent_acceptance"]) == 4
    assert published[-1]["version"] >= 2
    assert status(tmp_path)["state"] == "stopped"
    time_of = status(tmp_path)["time"]
    assert sum(time_of.values()) == pytest.approx(1)
    assert all(time_of[part] > 0 for part in ("updates", "taking_in", "judging", "publishing"))
    assert updates[-1]["staleness"] == updates[-1]["version"]  # all rows are of version 0


def test_version_0_is_the_initial_weights(world: World, tmp_path: Path) -> None:
    trainer = build(settings_for(tmp_path, world.target))

    manifest = read_manifest(tmp_path / "weights" / "0")
    assert (manifest.version, manifest.parent) == (0, None)
    assert manifest.target_fingerprint == world.fingerprint
    head = world.model.get_output_embeddings().weight
    assert weights(tmp_path, 0)["lm_head.weight"].equal(head)
    assert trainer.learner.model.lm_head.weight.equal(head)


def test_training_goes_on_from_a_given_bundle(world: World, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write_traces(first, world.traces)
    train(settings_for(first, world.target, max_steps=20))
    newest = max(FolderWeights(first / "weights").versions())
    settings = settings_for(second, world.target)
    path = first / "weights" / str(newest)

    build(settings.model_copy(update={"drafter": DrafterSettings(kind="eagle3", path=path)}))

    assert FolderWeights(second / "weights").versions() == [0]
    assert read_bundle(second / "weights" / "0").files == read_bundle(path).files


def test_traces_with_nan_or_of_another_target_teach_nothing(world: World, tmp_path: Path) -> None:
    nan_bits = np.full_like(world.traces[0].features.rows, 0x7FC0)  # type: ignore[union-attr]
    bad = [replace(with_rows(world.traces[0], nan_bits), seq=1000 + i) for i in range(5)]
    foreign = [replace(t, seq=t.seq + 2000, target_fingerprint="f" * 64) for t in world.traces[:7]]
    write_traces(tmp_path, [*bad, *foreign, *world.traces])

    train(settings_for(tmp_path, world.target, max_steps=6))

    seen = status(tmp_path)["traces"]
    assert seen["quarantined"] == 5
    assert seen["refused"] == {"target": 7}
    assert seen["taken_in"] + seen["held_out"] == len(world.traces)
    assert seen["read"] == 7 + len(world.traces)
    refusals = events(tmp_path, "refused")
    assert [r["trace"] for r in refusals] == [f"server/1/{t.seq}" for t in foreign]
    assert status(tmp_path)["skipped"] == 0


def test_a_nan_gradient_never_reaches_a_bundle(world: World, tmp_path: Path) -> None:
    write_traces(tmp_path, world.traces)
    trainer = build(settings_for(tmp_path, world.target, publish_every_steps=3, replay_ratio=99.0))
    trainer.take_in_traces()
    luck = random.Random(0)

    def spoil(slope: torch.Tensor) -> torch.Tensor:
        return slope * float("nan") if luck.random() < 0.4 else slope

    trainer.learner.model.fc.weight.register_hook(spoil)
    for _ in range(40):
        trainer.update()
        if trainer.candidate_is_due():
            trainer.judge_candidate()
        trainer.checkpoint()

    assert trainer.learner.num_skipped >= 8
    assert all(torch.isfinite(t).all() for t in trainer.learner.model.state_dict().values())
    assert max(FolderWeights(tmp_path / "weights").versions()) >= 1
    for version in FolderWeights(tmp_path / "weights").versions():
        check_bundle(tmp_path / "weights" / str(version))


def test_what_is_published_is_the_average_that_was_judged(world: World, tmp_path: Path) -> None:
    write_traces(tmp_path, world.traces)
    trainer = build(settings_for(tmp_path, world.target, gate_margin=0.01))
    trainer.take_in_traces()
    for _ in range(5):
        trainer.update()

    trainer.judge_candidate()

    average = trainer.learner.average.state_dict()
    assert trainer.published.version == 1
    assert all(tensor.equal(average[name]) for name, tensor in weights(tmp_path, 1).items())
    assert all(t.equal(average[n]) for n, t in trainer.judge.incumbent.state_dict().items())


def test_after_a_roll_back_learning_goes_on_from_the_version_before(
    world: World, tmp_path: Path
) -> None:
    write_traces(tmp_path, world.traces)
    trainer = build(settings_for(tmp_path, world.target, gate_margin=0.01))
    trainer.take_in_traces()
    for _ in range(3):
        trainer.update()
        trainer.judge_candidate()
    assert trainer.published.version == 3
    FolderWeights(tmp_path / "weights").write_denied({3})

    trainer.update()
    trainer.judge_candidate()

    assert trainer.published.version == 2
    before = weights(tmp_path, 2)
    assert all(t.equal(before[n]) for n, t in trainer.learner.model.state_dict().items())
    assert all(t.equal(before[n]) for n, t in trainer.judge.incumbent.state_dict().items())
    trainer.update()
    trainer.judge_candidate()
    assert (trainer.published.version, trainer.published.parent) == (4, 2)
    assert events(tmp_path, "rolled_back")[0]["rejected"] == 3


def test_a_damaged_newest_version_is_passed_over(world: World, tmp_path: Path) -> None:
    write_traces(tmp_path, world.traces)
    train(settings_for(tmp_path, world.target, gate_margin=0.01, gate_share=0.0, max_steps=20))
    assert FolderWeights(tmp_path / "weights").versions() == [0, 1, 2]
    file = tmp_path / "weights" / "2" / TENSORS
    file.write_bytes(file.read_bytes()[:-1])

    trainer = build(settings_for(tmp_path, world.target))

    assert trainer.published.version == 1


def test_weights_that_went_wrong_are_restored_and_the_rate_is_halved(
    world: World, tmp_path: Path
) -> None:
    write_traces(tmp_path, world.traces)
    trainer = build(settings_for(tmp_path, world.target))
    trainer.take_in_traces()
    for _ in range(4):
        trainer.update()
    trainer.checkpoint()
    good = {n: t.clone() for n, t in trainer.learner.model.state_dict().items()}

    def ruin() -> None:
        with torch.no_grad():
            trainer.learner.model.norm.weight.fill_(float("nan"))
        for _ in range(3):
            trainer.update()

    ruin()
    state = trainer.learner.model.state_dict()
    assert all(state[name].equal(good[name]) for name in good)
    assert trainer.learner.lr_scale == 0.5
    ruin()  # the checkpoint did not help: go back to what was published
    assert trainer.learner.model.fc.weight.equal(weights(tmp_path, 0)["fc.weight"])
    assert [e["source"] for e in events(tmp_path, "restored")] == ["checkpoint", "version 0"]
    assert [e["lr_scale"] for e in events(tmp_path, "restored")] == [0.5, 0.25]
    why = "3 updates in a row were not finite, nor is model.norm.weight (1 in all)"
    assert all(e["text"].startswith(why) for e in events(tmp_path, "restored"))
    assert trainer.learner.step == 10  # never goes back


def test_an_absurd_learning_rate_publishes_nothing(world: World, tmp_path: Path) -> None:
    write_traces(tmp_path, world.traces)

    train(settings_for(tmp_path, world.target, lr=1e30, max_steps=14, publish_every_steps=1))

    assert FolderWeights(tmp_path / "weights").versions() == [0]
    assert status(tmp_path)["skipped"] >= 3
    assert events(tmp_path, "restored")


def test_finite_weights_that_lost_everything_are_given_up_at_the_gate(
    world: World, tmp_path: Path
) -> None:
    """A checkpoint may hold weights of a far too high rate: finite, and of no use."""
    write_traces(tmp_path, world.traces)
    train(settings_for(tmp_path, world.target, max_steps=50, gate_confidence=0.5))
    trainer = build(settings_for(tmp_path, world.target))
    trainer.take_in_traces()
    published = trainer.published.version
    assert published > 0
    with torch.no_grad():
        for one in (trainer.learner.model, trainer.learner.average):
            for weight in one.parameters():
                weight.copy_(torch.randn_like(weight) * 1e3)
    trainer.judge_candidate()

    *_, gate = events(tmp_path, "gate")
    assert gate["candidate"] < 1.05 < 1.3 < gate["incumbent"]
    [restored] = events(tmp_path, "restored")
    assert restored["source"] == f"version {published}"
    assert restored["text"] == "the candidate is far behind the incumbent; learning rate halved"
    state = trainer.learner.model.state_dict()
    assert all(t.equal(state[n]) for n, t in trainer.judge.incumbent.state_dict().items())
    assert (trainer.learner.lr_scale, trainer.pace.refused_in_row) == (0.5, 0)
    trainer.update()
    trainer.judge_candidate()  # the incumbent's own weights, and one update
    assert len(events(tmp_path, "restored")) == 1
    assert not trainer.restored


@pytest.mark.parametrize(("factor", "wanted"), [(1, 0.25), (0.5, 1.0)])
def test_a_learning_rate_that_was_halved_is_whole_again_when_it_is_another(
    world: World, tmp_path: Path, factor: float, wanted: float
) -> None:
    write_traces(tmp_path, world.traces)
    settings = settings_for(tmp_path, world.target)
    trainer = build(settings)
    trainer.take_in_traces()
    trainer.update()
    trainer.learner.lr_scale = 0.25
    trainer.finish()

    lr = settings.trainer.lr * factor
    again = build(settings_for(tmp_path, world.target, lr=lr))

    assert again.learner.lr_scale == wanted
    told = [event["text"] for event in events(tmp_path, "rate_reset")]
    assert told == ([] if factor == 1 else [
        f"trainer.lr is {lr:g}, where it was {settings.trainer.lr:g} and had been scaled by 0.25: "
        f"the whole of it is taken"
    ])  # fmt: skip


@pytest.mark.parametrize("margin", [0.5, 1.0, 1.005])
def test_weights_that_are_published_already_are_no_new_version(
    world: World, tmp_path: Path, margin: float
) -> None:
    write_traces(tmp_path, world.traces)
    trainer = build(settings_for(tmp_path, world.target, gate_margin=margin, gate_confidence=0.5))
    trainer.take_in_traces()
    trainer.learner.load_weights(trainer.judge.incumbent.state_dict())

    trainer.judge_candidate()

    assert FolderWeights(tmp_path / "weights").versions() == [0]
    [gate] = events(tmp_path, "gate")
    assert not gate["passed"]
    wanted = "the weights of version 0 itself" if margin < 1 else "no better than the incumbent"
    assert wanted in gate["reason"]


@pytest.mark.parametrize("margin", [0.01, 1.0])
def test_a_learning_rate_that_blows_up_never_publishes_a_version_again(
    world: World, tmp_path: Path, margin: float
) -> None:
    write_traces(tmp_path, world.traces)
    loose = {"gate_margin": margin, "gate_confidence": 0.5, "publish_every_steps": 1}

    train(settings_for(tmp_path, world.target, lr=1e9, max_steps=12, keep_versions=99, **loose))

    store = FolderWeights(tmp_path / "weights")
    digests = [store.read_manifest(v).files[TENSORS] for v in store.versions()]
    assert all(before != after for before, after in itertools.pairwise(digests))
    assert events(tmp_path, "restored")


def test_drafters_are_compared_in_the_dtype_in_which_they_are_published(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build(settings_for(tmp_path, world.target))
    model, trainable = trainer.learner.average, trainer.learner.trainable
    with torch.no_grad():
        model.fc.weight.mul_(1 + 1e-6)
    assert not publish.is_same(trainable, model, trainer.judge.incumbent)
    monkeypatch.setattr(publish, "LARGEST_FLOAT32_BYTES", 0)
    assert publish.is_same(trainable, model, trainer.judge.incumbent)
    with torch.no_grad():
        model.fc.weight.mul_(1.1)
    assert not publish.is_same(trainable, model, trainer.judge.incumbent)


def test_a_store_that_was_deleted_does_not_begin_again_at_0(world: World, tmp_path: Path) -> None:
    write_traces(tmp_path, world.traces)
    trainer = build(settings_for(tmp_path, world.target, gate_margin=0.01))
    trainer.take_in_traces()
    for version in (1, 2):
        trainer.update()
        trainer.judge_candidate()
        assert trainer.published.version == version
    shutil.rmtree(tmp_path / "weights")

    trainer.update()
    trainer.judge_candidate()

    assert FolderWeights(tmp_path / "weights").versions() == [3]

    trainer.finish()
    trainer.intake.close()
    shutil.rmtree(tmp_path / "weights")
    again = build(settings_for(tmp_path, world.target, gate_margin=0.01))
    again.update()
    again.judge_candidate()

    assert FolderWeights(tmp_path / "weights").versions() == [0, 4], "also not after a restart"


def test_version_0_stays_whatever_is_published_after_it(world: World, tmp_path: Path) -> None:
    write_traces(tmp_path, world.traces)
    trainer = build(settings_for(tmp_path, world.target, gate_margin=0.01, keep_versions=2))
    trainer.take_in_traces()
    for _ in range(4):
        trainer.update()
        trainer.judge_candidate()
    assert FolderWeights(tmp_path / "weights").versions() == [0, 3, 4]


def test_without_a_sound_checkpoint_broken_weights_are_those_of_the_version_again(
    world: World, tmp_path: Path
) -> None:
    write_traces(tmp_path, world.traces)
    trainer = build(settings_for(tmp_path, world.target))
    trainer.take_in_traces()
    for file in (tmp_path / "trainer" / "checkpoints").glob("*/state.safetensors"):
        file.write_bytes(b"")
    with torch.no_grad():
        trainer.learner.model.norm.weight.fill_(float("nan"))
    for _ in range(3):
        trainer.update()

    assert trainer.learner.model.fc.weight.equal(weights(tmp_path, 0)["fc.weight"])
    assert "cannot be used" in events(tmp_path, "checkpoint_unreadable")[0]["text"]


def test_a_trainer_goes_on_from_the_older_checkpoint_if_the_newest_is_damaged(
    world: World, tmp_path: Path
) -> None:
    write_traces(tmp_path, world.traces)
    settings = settings_for(tmp_path, world.target)
    trainer = build(settings)
    trainer.take_in_traces()
    for _ in range(2):
        trainer.update()
        trainer.checkpoint()
    trainer.report_checkpoint(wait=True)
    newest = tmp_path / "trainer" / "checkpoints" / "00000003" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-5])

    again = build(settings)

    assert again.learner.step == 1
    assert events(tmp_path, "resumed")[-1]["step"] == 1


@pytest.mark.parametrize("is_committed", [True, False])
def test_what_a_damaged_checkpoint_alone_had_learnt_is_trained_on_again(
    world: World, tmp_path: Path, is_committed: bool
) -> None:
    first, later = world.traces[:12], world.traces[12:]
    settings = settings_for(tmp_path, world.target)
    trainer = build(settings)
    write_traces(tmp_path, first)
    trainer.take_in_traces()
    trainer.update()
    trainer.checkpoint()
    trainer.report_checkpoint(wait=True)
    write_traces(tmp_path, later)
    trainer.take_in_traces()
    trainer.update()
    trainer.checkpoint()
    if is_committed:
        trainer.report_checkpoint(wait=True)
    else:
        trainer.saver.outcome(wait=True)  # killed between checkpoint and commit
    held = {sample.key for sample in trainer.memory.samples()}
    trainer.intake.close()
    newest = tmp_path / "trainer" / "checkpoints" / "00000003" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-5])

    again = build(settings)
    [resumed] = events(tmp_path, "resumed")
    assert (resumed["step"], resumed["traces_again"]) == (1, len(later))
    assert {sample.key for sample in again.memory.samples()} == held
    assert again.memory.num_samples == trainer.memory.num_samples
    again.take_in_traces()  # nothing twice, committed or not
    assert again.memory.num_samples == trainer.memory.num_samples


@pytest.mark.parametrize(
    "draws", [{}, {"draw": "surprise", "max_tenant_share": 0.4}], ids=["default", "chosen"]
)
def test_a_resumed_trainer_is_the_one_that_was_never_stopped(
    world: World, tmp_path: Path, draws: dict[str, Any]
) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for run_dir in (whole, halves):
        write_traces(run_dir, [replace(x, tenant=f"tenant-{x.seq % 4}") for x in world.traces])
    values = {"publish_every_steps": 100, **draws}
    train(settings_for(whole, world.target, max_steps=14, **values))

    train(settings_for(halves, world.target, max_steps=7, **values))
    train(settings_for(halves, world.target, max_steps=14, **values))

    ends = [read_checkpoint(run_dir / "trainer" / "checkpoints") for run_dir in (whole, halves)]
    assert ends[0] is not None and ends[1] is not None
    assert ends[1].state["memory"] == ends[0].state["memory"]
    for end in ends:
        assert end.state["locations"].keys() == keys_in(end.state["memory"])
    assert events(halves, "resumed")[0]["traces_gone"] == 0
    for name, tensor in ends[0].tensors.items():
        assert tensor.equal(ends[1].tensors[name]), name


def test_a_trainer_of_another_target_does_not_start(world: World, tmp_path: Path) -> None:
    build(settings_for(tmp_path, world.target))
    other = tmp_path / "target"
    save_target(other, seed=5)

    with pytest.raises(ValueError, match=r"was made for target .* but the target in settings is"):
        build(settings_for(tmp_path, other))


def test_a_checkpoint_of_another_target_is_an_error(world: World, tmp_path: Path) -> None:
    settings = settings_for(tmp_path, world.target)
    build(settings)
    other = tmp_path / "target"
    save_target(other, seed=5)
    manifest = replace(
        read_manifest(tmp_path / "weights" / "0"),
        version=1,
        target_fingerprint=fingerprint_of(other),
    )
    FolderWeights(tmp_path / "weights").publish(
        manifest, read_bundle(tmp_path / "weights" / "0").files
    )

    with pytest.raises(CheckpointError, match=r"its target_fingerprint is .*; not training"):
        build(settings_for(tmp_path, other))


def test_a_damaged_checkpoint_is_never_a_fresh_start(world: World, tmp_path: Path) -> None:
    settings = settings_for(tmp_path, world.target)
    build(settings)
    newest = tmp_path / "trainer" / "checkpoints" / "00000001" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-5])

    with pytest.raises(CheckpointError, match="different sha256"):
        build(settings)


def test_a_trainer_says_what_it_waits_for_and_takes_in_what_comes_later(
    world: World, tmp_path: Path
) -> None:
    trainer = build(settings_for(tmp_path, world.target, min_traces=30))
    trainer.wait()
    assert status(tmp_path)["state"] == "waiting for traces: 0 of trainer.min_traces=30"

    write_traces(tmp_path, world.traces)
    trainer.take_in_traces()
    trainer.take_in_traces()

    assert trainer.waits_for() is None


def test_with_a_duty_of_a_quarter_the_trainer_rests_three_quarters_of_the_time(
    world: World, tmp_path: Path
) -> None:
    write_traces(tmp_path, world.traces)
    trainer = build(settings_for(tmp_path, world.target, duty=0.25, publish_every_steps=500))
    while not trainer.memory.num_samples:
        trainer.take_in_traces()
    trainer.update()  # what the first one warms up is not measured
    trainer.settle()

    started = time.monotonic()
    for _ in range(8):
        trainer.update()
    elapsed_s = time.monotonic() - started
    trainer.settle()

    updates = events(tmp_path, "update")
    busy_s = sum(u["seconds"] for u in updates if u["step"] > 1)
    assert updates[-1]["step"] == 9
    assert 0.05 * elapsed_s < busy_s < 0.25 * elapsed_s


def test_a_rest_ends_at_once_when_the_trainer_is_told_to_stop(world: World, tmp_path: Path) -> None:
    write_traces(tmp_path, world.traces)
    trainer = build(settings_for(tmp_path, world.target, duty=0.0001, publish_every_steps=500))
    while not trainer.memory.num_samples:
        trainer.take_in_traces()
    threading.Timer(1.0, trainer.stop.set).start()

    started = time.monotonic()
    trainer.update()

    assert time.monotonic() - started < 20.0


def test_what_was_learnt_is_judged_when_traffic_pauses(world: World, tmp_path: Path) -> None:
    write_traces(tmp_path, world.traces)
    settings = settings_for(
        tmp_path, world.target, publish_every_steps=500, gate_share=0.0, replay_ratio=1.0
    )
    trainer = build(settings)
    trainer.take_in_traces()
    trainer.take_in_traces()
    while trainer.waits_for() is None:
        trainer.update()
    trainer.intake.last_trace_s = time.monotonic()
    assert not trainer.candidate_is_due()

    trainer.intake.last_trace_s -= QUIET_S

    assert trainer.candidate_is_due()
    trainer.judge_candidate()
    assert not trainer.candidate_is_due()


@pytest.mark.parametrize("init", ["random", "target"])
def test_a_drafter_of_few_tokens_learns_and_publishes_these(
    world: World, tmp_path: Path, init: str
) -> None:
    write_traces(tmp_path, world.traces)
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(list(range(0, 96, 2))))
    settings = settings_for(tmp_path, world.target, max_steps=25)
    drafter = DrafterSettings.model_validate(
        {"kind": "eagle3", "init": init, "draft_vocab": str(ids)}
    )

    train(settings.model_copy(update={"drafter": drafter}))

    newest = max(FolderWeights(tmp_path / "weights").versions())
    assert newest >= 1
    assert weights(tmp_path, newest)["lm_head.weight"].shape[0] == 48
    assert weights(tmp_path, newest)["d2t"].equal(torch.arange(48))
    assert weights(tmp_path, newest)["fc.weight"].equal(weights(tmp_path, 0)["fc.weight"]) is False


def test_an_emphasis_on_rejected_drafts_reaches_the_batch(world: World, tmp_path: Path) -> None:
    write_traces(tmp_path, world.traces)
    trainer = build(settings_for(tmp_path, world.target, rejected_weight=3.0))
    trainer.take_in_traces()

    pieces = [piece for _, piece in trainer.memory.draw(trainer.random)]
    batch = trainer.memory.store.batch(pack(pieces, None), torch.float32)

    heavy = batch.positions_T[batch.row_R[batch.weight_R == 3.0]]
    assert heavy.tolist() == [PROMPT] * len(pieces)
    assert (batch.weight_R == 1.0).sum() == len(batch.row_R) - len(pieces)


# --- real processes ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes() -> Any:
    """Children that have torch imported already."""
    return context()


def test_kill_9_at_any_time_loses_nothing(world: World, tmp_path: Path, processes: Any) -> None:
    write_traces(tmp_path, world.traces[:40])
    settings = settings_for(
        tmp_path,
        world.target,
        publish_every_steps=2,
        checkpoint_every_s=0.05,
        replay_ratio=60.0,
        gate_margin=0.01,  # every candidate passes
    )
    luck = random.Random(3)
    steps = [0]
    published: list[int] = []
    for round_number in range(8):
        child = processes.Process(target=train, args=(settings,), daemon=True)
        child.start()
        wait_for_step(tmp_path, steps[-1] + 3)
        time.sleep(luck.uniform(0.0, 0.3))
        if round_number == 4:
            write_traces(tmp_path, world.traces[40:])
        child.kill()
        child.join()

        saved = read_checkpoint(tmp_path / "trainer" / "checkpoints")
        assert saved is not None
        steps.append(saved.state["step"])
        for version in FolderWeights(tmp_path / "weights").versions():
            check_bundle(tmp_path / "weights" / str(version))
        published.append(max(FolderWeights(tmp_path / "weights").versions()))

    assert steps == sorted(steps) and steps[-1] > 0
    assert published == sorted(published) and published[-1] > 0
    train(settings.model_copy(update={"trainer": last_steps(settings, steps[-1] + 3)}))
    memory = read_checkpoint(tmp_path / "trainer" / "checkpoints").state["memory"]  # type: ignore[union-attr]
    held = [*memory["recent"], *memory["held_out"], *memory["held_out_older"]]
    assert sorted(held) == sorted(f"server/1/{t.seq}" for t in world.traces)
    assert memory["num_samples"] == len(memory["recent"])


def last_steps(settings: Settings, max_steps: int) -> Any:
    return settings.trainer.model_copy(update={"max_steps": max_steps})


def wait_for_step(run_dir: Path, step: int) -> None:
    """Until the log tells of an update of at least this number since the last resumption."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        log = run_dir / "trainer" / "log.jsonl"
        if log.exists():
            tail = log.read_text().split('"event": "resumed"')[-1].splitlines()
            found = [line for line in tail if '"event": "update"' in line and line.endswith("}")]
            if any(json.loads(line)["step"] >= step for line in found):
                return
        time.sleep(0.01)
    raise AssertionError(f"no update {step} within 60 s")
