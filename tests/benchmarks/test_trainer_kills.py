"""The benchmark that kills trainers, in small: it finds nothing wrong here, and something where
there is."""

from __future__ import annotations

import dataclasses
import json
import os
import threading

import pytest
import torch

from benchmarks.faults.trainer_lives import Seen, Used, differences
from buffer.folder_weights import FolderWeights
from buffer.manifest import TENSORS
from buffer.tensors import join_tensors
from oracles.forked import run_forked
from oracles.support import REPOSITORY
from tests.buffer.sample_bundle import MANIFEST, tensors
from tests.trainer.traffic import save_target, settings_for
from trainer.build import build_trainer
from trainer.checkpoint import Checkpoint, read_checkpoint


@pytest.mark.timeout(300)
def test_a_killed_trainer_resumes_where_its_checkpoint_is(tmp_path):
    out = tmp_path / "out.json"
    env = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'kernels'}"}
    command = ["-m", "benchmarks.faults.trainer_kills", "--out", str(out), "--url", "shm:"]
    done = run_forked([*command, "--kills", "2", "--cold", "0"], env, REPOSITORY, timeout=280)
    found = json.loads(out.read_text())
    # Not the exit code: it also says whether this machine was fast.
    assert sum(found["kills"].values()) == 2, done.stdout + done.stderr
    assert found["state_differences"] == []
    assert [one["problems"] for one in found["versions"].values()] == [[], []]
    assert found["traces"]["used_twice"] == []
    assert found["traces"]["used"] == found["traces"]["written"] > 0
    assert found["resumed"] >= 1


def test_a_state_that_is_not_the_checkpoints_is_noticed(tmp_path):
    save_target(tmp_path / "target")
    made = build_trainer(settings_for(tmp_path / "run", tmp_path / "target"), threading.Event())
    saved = read_checkpoint(tmp_path / "run" / "trainer" / "checkpoints")
    assert differences(made, saved) == []
    name, tensor = next(iter(saved.tensors.items()))
    last_bit = torch.nextafter(tensor, torch.tensor(9e9)) if tensor.is_floating_point() else tensor
    wrong = Checkpoint({**saved.state, "step": 7}, {**saved.tensors, name: last_bit})
    assert differences(made, wrong) == [name, "step"]
    assert differences(made, Checkpoint(saved.state, {})) == sorted(saved.tensors)


def test_versions_that_are_partial_or_changed_or_go_back_are_noticed(tmp_path):
    store, seen = FolderWeights(tmp_path / "weights"), Seen()

    def publish(version, fill):
        manifest = dataclasses.replace(MANIFEST, version=version)
        store.publish(manifest, {TENSORS: join_tensors(tensors(fill), {})})

    publish(3, 1.0)
    seen.look(store)
    assert seen.problems == []
    (tmp_path / "weights" / "HIGHEST").unlink()
    (tmp_path / "weights" / "3").rename(tmp_path / "weights" / ".tmp-gone")
    publish(2, 1.0)
    seen.look(store)
    assert seen.problems.pop() == "version 2 came after 3"
    publish(3, 2.0)
    seen.look(store, again=True)
    assert seen.problems.pop() == "version 3 has changed"
    (tmp_path / "weights" / "3" / TENSORS).write_bytes(b"half")
    seen.look(store, again=True)
    assert "drafter.safetensors has 4 bytes" in seen.problems.pop()


def test_a_trace_that_is_used_twice_is_counted_also_after_a_restart():
    used = Used()
    for seq in (0, 1, 5):
        used.take(f"server/7/{seq}")
    assert used.twice == []
    state = json.loads(json.dumps({"benchmark_used": used.to_json()}))
    again = Used.of(Checkpoint(state, {}))
    again.take("server/7/5")
    again.take("other/7/5")
    assert again.twice == ["server/7/5"]
