"""One trainer learns two drafters from the same traces, in turn, each in a line of its own."""

from __future__ import annotations

import dataclasses
import json
import threading
from types import SimpleNamespace

import pytest
import torch

from buffer.folder_weights import FolderWeights
from buffer.records import Round, Rounds
from configs.drafters import BesideSettings
from tests.trainer.test_several_processes import exit_code_of, with_worker
from tests.trainer.traffic import (
    HIDDEN,
    LAYER_IDS,
    LAYERS,
    VOCAB,
    fingerprint_of,
    make_traces,
    save_target,
    settings_for,
    write_traces,
)
from trainer.build import build_trainers
from trainer.dataset import Expected, Refusal, sample_of
from trainer.group import Group
from trainer.loop import run
from trainer.watch import status_of

TAPS = (*LAYER_IDS, LAYERS)
"""Layers that a server with both drafters captures."""


@pytest.fixture(scope="module")
def traffic(tmp_path_factory):
    target = tmp_path_factory.mktemp("target")
    model = save_target(target)
    return target, make_traces(model, fingerprint_of(target), 48, layer_ids=TAPS)


def both(run_dir, target, **trainer):
    settings = settings_for(run_dir, target, gate_confidence=0.5, **trainer)
    drafter = settings.drafter.model_copy(update={"beside": (BesideSettings(kind="mtp"),)})
    return settings.model_copy(update={"drafter": drafter})


def events(folder, name):
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == name]


def test_both_learn_from_the_same_traces_and_resume(traffic, tmp_path):
    target, traces = traffic
    write_traces(tmp_path, traces)

    run(*build_trainers(both(tmp_path, target, max_steps=12), threading.Event()))

    folders = {"eagle3": tmp_path / "trainer", "mtp": tmp_path / "trainer" / "mtp"}
    lines = {"eagle3": tmp_path / "weights", "mtp": tmp_path / "weights" / "mtp"}
    for kind, folder in folders.items():
        updates = events(folder, "update")
        assert sum(one["updates"] for one in updates) == 12
        assert updates[-1]["loss"] < updates[0]["loss"]
        status = json.loads((folder / "status.json").read_text())
        assert status["traces"]["read"] == 48 and not status["traces"]["refused"]
        store = FolderWeights(lines[kind])
        newest = store.read(max(store.versions())).manifest
        assert newest.version >= 1 and newest.kind == kind
    shown = status_of(tmp_path)
    assert set(shown.beside) == {"mtp"}
    assert any(line.startswith("mtp        version") for line in shown.to_lines())

    again = build_trainers(both(tmp_path, target, max_steps=14), threading.Event())
    assert [trainer.learner.step for trainer in again] == [12, 12]
    run(*again)
    assert [trainer.learner.step for trainer in again] == [14, 14]


def test_one_that_waits_does_not_keep_the_other_from_learning(traffic, tmp_path):
    target, traces = traffic
    write_traces(tmp_path, traces)
    first, second = build_trainers(both(tmp_path, target, max_steps=4), threading.Event())
    first.memory.settings = first.memory.settings.model_copy(update={"min_traces": 10_000})
    stop = first.stop

    def end_once_the_second_is_done():
        while not second.is_done():
            assert not stop.wait(0.01)
        stop.set()

    watcher = threading.Thread(target=end_once_the_second_is_done)
    watcher.start()
    run(first, second)
    watcher.join()

    assert (first.learner.step, second.learner.step) == (0, 4)


def test_a_drafter_trains_on_its_own_layers_of_a_trace(traffic):
    _, traces = traffic
    fingerprint = traces[0].target_fingerprint
    expected = Expected(fingerprint, (LAYERS,), HIDDEN, VOCAB, counted="mtp", is_alone=False)

    sample = sample_of(traces[0], expected, 64)

    whole = torch.from_numpy(traces[0].features.rows).view(torch.bfloat16)
    assert sample.rows.equal(whole[:, [TAPS.index(LAYERS), len(TAPS)]])
    missing = dataclasses.replace(expected, layer_ids=(LAYERS, 0))
    assert isinstance(sample_of(traces[0], missing, 64), Refusal)


def test_the_version_of_a_sample_is_that_of_the_drafter_in_training(traffic):
    _, traces = traffic
    rounds = Rounds.of(
        Round(at, kind, version, (1,), None, (-0.5,), 0, 2, 1, 1.0, 1, 0.01)
        for at, (kind, version) in enumerate((("eagle3", 9), ("mtp", 4), ("none", 9)), start=6)
    )
    trace = dataclasses.replace(traces[0], rounds=rounds)
    fingerprint = traces[0].target_fingerprint

    def version(kind, is_alone):
        expected = Expected(fingerprint, LAYER_IDS, HIDDEN, VOCAB, counted=kind, is_alone=is_alone)
        return sample_of(trace, expected, 64).version

    assert version("eagle3", False) == 9
    assert version("mtp", False) == 4
    assert version("mtp", True) == 9
    assert version("dflash", False) is None


def test_two_processes_train_both_drafters_as_one_does(traffic, tmp_path):
    target, traces = traffic
    for name in ("one", "two"):
        write_traces(tmp_path / name, traces)
    trainer = {"max_steps": 5, "parts": 2}
    alone = build_trainers(both(tmp_path / "one", target, **trainer), threading.Event())
    run(*alone)

    log = tmp_path / "worker"
    world = SimpleNamespace(target=target, fingerprint=fingerprint_of(target))
    with with_worker(world, log, **trainer) as (group, worker):
        settings = both(tmp_path / "two", target, **trainer)
        shared = build_trainers(settings, threading.Event(), group=group)
        run(*shared)
        assert exit_code_of(worker) == 0, log.read_text()

    for one, two in zip(alone, shared, strict=True):
        assert one.learner.step == two.learner.step == 5
        expected = one.learner.model.state_dict()
        for name, value in two.learner.model.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_deepspeed_for_two_drafters_is_refused(traffic, tmp_path):
    target, _ = traffic
    settings = both(tmp_path, target, deepspeed={"stage": 2})
    with pytest.raises(ValueError, match=r"DeepSpeed divides one drafter, and 2 are to learn"):
        build_trainers(settings, threading.Event(), group=Group(0, 2))
