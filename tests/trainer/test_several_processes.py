"""Updates shared by processes are those of one process; a process that dies ends all, in words."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from buffer.run_target import RunTarget, write_run_target
from configs.schema import Settings
from drafters.trainable import trainable
from oracles.support import REPOSITORY
from targets.head import load_target_head
from tests.trainer.conftest import World
from tests.trainer.test_replay import samples_of
from tests.trainer.traffic import (
    fingerprint_of,
    make_traces,
    save_target,
    settings_for,
    train,
    write_traces,
)
from trainer.build import build_trainer
from trainer.checkpoint import read_checkpoint
from trainer.group import Group, joined
from trainer.learner import Learner
from trainer.links import GroupError
from trainer.lock import owner_of
from trainer.packing import HeldPiece
from trainer.processes import environment_of
from trainer.rows import RowStore
from trainer.team import work

CPU = torch.device("cpu")
ENVIRONMENT = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def options_of(world: World, run_dir: Path, **trainer: object) -> list[str]:
    wanted = {
        "target": world.target,
        "run_dir": run_dir,
        "trainer.device": "cpu",
        **{f"trainer.{name.replace('__', '.')}": value for name, value in trainer.items()},
    }
    return [text for key, value in wanted.items() for text in ("--set", f"{key}={value}")]


@contextmanager
def with_worker(world: World, log: Path, **trainer: object) -> Iterator[tuple[Group, int]]:
    """This process as the first of two; yields the pid of the other, a worker forked from it."""
    own = {"GLOO_SOCKET_IFNAME": "lo", **environment_of(0, 2, free_port())}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        for name, value in own.items():
            patch.setenv(name, value)
        pid = os.fork()
        if pid == 0:
            be_worker(world, log, settings_for(world.target, world.target, **trainer))
        try:
            with joined("cpu") as group:
                yield group, pid
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def be_worker(world: World, log: Path, settings: Settings) -> None:
    """What ``trainer launch`` runs in a worker; never returns."""
    code = 1
    try:
        os.environ["RANK"] = os.environ["LOCAL_RANK"] = "1"
        with joined("cpu") as group:
            head = load_target_head(world.target, CPU, torch.float32)
            work(group, settings.trainer, head, CPU, fingerprint=world.fingerprint)
            if settings.trainer.deepspeed.stage:  # it would ask for a GPU that is not seen
                assert os.environ["LOCAL_RANK"] == "0"
            code = 0
    except GroupError as error:
        log.write_text(str(error))
        code = 3
    except BaseException:
        log.write_text(traceback.format_exc())
    finally:
        os._exit(code)


def exit_code_of(pid: int) -> int:
    """Wait for a child; minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def learner_of(world: World, group: Group | None = None, **trainer: object) -> Learner:
    head = load_target_head(world.target, CPU, torch.float32)
    learns = trainable("eagle3")
    model = learns.new_model(head.config, head.lm_head.weight_VH, None, seed=0)
    settings = settings_for(world.target, world.target, **trainer)
    return Learner(learns, model, head, settings.trainer, RowStore(CPU, 1 << 22), group=group)


def batches_of(world: World, learner: Learner, count: int) -> list[list[HeldPiece]]:
    """Different batches of five traces each."""
    held = learner.store.put(samples_of(world))
    pieces = [piece for sample in held for piece in sample.pieces]
    return [[pieces[(5 * n + k) % len(pieces)] for k in range(5)] for n in range(count)]


def losses_of(learner: Learner, batches: list[list[HeldPiece]]) -> list[float]:
    return [report.loss for batch in batches for report in learner.update(batch)]


SETTINGS = {"lr": 3e-3, "ttt_steps": 4, "parts": 2}


def in_two(
    world: World, log: Path, batches: int, state: Mapping[str, Tensor] | None = None, **more: object
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of two processes, and the state that they end with.

    Args:
        state: of step 5, to begin with.
    """
    with with_worker(world, log, **SETTINGS, **more) as (group, worker):
        first = learner_of(world, group, **SETTINGS, **more)
        if state is not None:
            first.load_state_tensors(state)
            first.step = 5
        losses = losses_of(first, batches_of(world, first, batches))
        after = first.state_tensors()
        first.end()
        assert exit_code_of(worker) == 0, log.read_text()
    return losses, after


def test_two_processes_learn_what_one_learns(world: World, tmp_path: Path) -> None:
    alone = learner_of(world, **SETTINGS)
    expected = losses_of(alone, batches_of(world, alone, 30))

    losses, state = in_two(world, tmp_path / "worker", 30)

    assert len(losses) == 30 and losses[-1] < 0.9 * losses[0]
    assert losses == pytest.approx(expected, abs=1e-4)
    for name, tensor in alone.state_tensors().items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=2e-3, msg=name)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_learns_what_one_process_learns_and_each_resumes_from_the_other(
    world: World, tmp_path: Path, stage: int
) -> None:
    alone = learner_of(world, **SETTINGS)
    losses_of(alone, batches_of(world, alone, 5))
    before = alone.state_tensors()
    batches = batches_of(world, alone, 20)
    expected = losses_of(alone, batches)

    # Processes that DeepSpeed was imported into are not forked from this one.
    code = f"""
import sys, torch
from pathlib import Path
from tests.trainer import test_several_processes as t
world, before = torch.load({str(tmp_path / "given")!r}, weights_only=False)
found = t.in_two(world, Path({str(tmp_path / "log")!r}), 20, before, deepspeed={{"stage": {stage}}})
torch.save(found, {str(tmp_path / "found")!r})
"""
    given = World(world.target, None, world.fingerprint, world.traces)
    torch.save((given, before), tmp_path / "given")
    subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, cwd=REPOSITORY, check=True, timeout=500
    )
    losses, state = torch.load(tmp_path / "found", weights_only=False)

    assert losses == pytest.approx(expected, abs=1e-4)
    for name, tensor in alone.state_tensors().items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=2e-3, msg=name)
    again = learner_of(world, **SETTINGS)
    again.load_state_tensors(state)
    again.step = alone.step
    resumed = losses_of(again, batches_of(world, again, 5))
    assert resumed == pytest.approx(losses_of(alone, batches[:5]), abs=2e-4)


def losses_across_an_update(
    world: World, other: World, run_dir: Path, group: Group | None = None
) -> list[float]:
    """Losses of a trainer whose target is replaced after its third update."""
    write_traces(run_dir, world.traces)
    settings = settings_for(run_dir, world.target, **SETTINGS, batch_tokens=256)
    trainer = build_trainer(settings, threading.Event(), group=group)
    losses = []
    for at in range(10):
        if at == 3:
            run_target = RunTarget(world.fingerprint, str(world.target), ())
            now = run_target.followed_by(other.fingerprint, str(other.target))
            write_run_target(run_dir, now)
            write_traces(run_dir, other.traces)
        trainer.take_in_traces()
        trainer.take_in_traces()
        pieces = [piece for _, piece in trainer.memory.draw(trainer.random)]
        losses += [report.loss for report in trainer.learner.update(pieces)]
    assert trainer.intake.expected.target_fingerprint == other.fingerprint
    trainer.learner.end()
    return losses


def test_all_processes_follow_a_target_that_is_replaced(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    model = save_target(folder, seed=1)
    fingerprint = fingerprint_of(folder)
    other = World(folder, model, fingerprint, make_traces(model, fingerprint, 40, first_seq=500))
    expected = losses_across_an_update(world, other, tmp_path / "alone")

    with with_worker(world, tmp_path / "worker", **SETTINGS) as (group, worker):
        losses = losses_across_an_update(world, other, tmp_path / "two", group)
        assert exit_code_of(worker) == 0, (tmp_path / "worker").read_text()

    assert losses == pytest.approx(expected, abs=1e-4)


def test_a_process_with_another_target_is_refused(world: World, tmp_path: Path) -> None:
    log, other = tmp_path / "worker", replace(world, fingerprint="0" * 64)
    write_traces(tmp_path, world.traces)
    settings = settings_for(tmp_path, world.target, **SETTINGS)
    refused = pytest.raises(GroupError, match="other weights of the target")
    with refused, with_worker(other, log, **SETTINGS) as (group, worker):
        build_trainer(settings, threading.Event(), group=group).learner.end()
        assert exit_code_of(worker) == 1
        group.add_up(torch.zeros(1))


def test_a_dead_process_ends_the_other_in_words(world: World, tmp_path: Path) -> None:
    with with_worker(world, tmp_path / "worker", **SETTINGS) as (group, worker):
        first = learner_of(world, group, **SETTINGS)
        batch, *rest = batches_of(world, first, 40)
        first.update(batch)
        os.kill(worker, signal.SIGKILL)
        assert exit_code_of(worker) == -signal.SIGKILL

        with pytest.raises(GroupError, match=rf"process 1 \(pid {worker} on .*is gone"):
            losses_of(first, rest)


def test_a_killed_process_ends_the_trainer_and_nothing_is_lost(
    world: World, tmp_path: Path
) -> None:
    """The command itself: two processes, then kill -9 of the second, then one process that goes
    on."""
    write_traces(tmp_path, world.traces)
    values = {"lr": 3e-3, "batch_tokens": 256, "max_sequence": 64, "min_traces": 8, "nice": 0}
    values |= {"checkpoint_every_s": 0.1, "publish_every_steps": 4, "replay_ratio": 1000}
    options = options_of(world, tmp_path, **values)
    log = tmp_path / "log.txt"
    command = [sys.executable, "-m", "trainer", "launch", "--processes", "2", *options]
    with log.open("wb") as out:
        both = subprocess.Popen(command, env=ENVIRONMENT, cwd=REPOSITORY, stderr=out)
    try:
        wait_until(lambda: list((tmp_path / "weights").glob("1")), log)
        wait_until(lambda: checkpoint_step(tmp_path) > 0, log)
        found = re.search(r"worker 1 of 2 is ready: process (\d+)", log.read_text())
        assert found is not None
        os.kill(int(found[1]), signal.SIGKILL)
        assert both.wait(timeout=90) == 1
    finally:
        both.kill()
        both.wait()
    said = log.read_text()
    assert f"process 1 of 2 of the trainer (pid {found[1]}) was killed by signal 9" in said
    assert "Nothing acknowledged is lost" in said
    assert owner_of(tmp_path / "trainer") is None

    step = checkpoint_step(tmp_path)
    train(settings_for(tmp_path, world.target, **values | {"max_steps": step + 3}))

    events = [json.loads(x) for x in (tmp_path / "trainer" / "log.jsonl").read_text().splitlines()]
    (resumed,) = (one for one in events if one["event"] == "resumed")
    assert (resumed["step"], resumed["traces_gone"]) == (step, 0)
    status = json.loads((tmp_path / "trainer" / "status.json").read_text())
    assert status["step"] == step + 3
    traces = status["traces"]
    assert traces["taken_in"] + traces["held_out"] == len(world.traces)


def wait_until(is_true: Callable[[], object], log: Path) -> None:
    deadline = time.monotonic() + 90
    while not is_true():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def checkpoint_step(run: Path) -> int:
    saved = read_checkpoint(run / "trainer" / "checkpoints")
    return 0 if saved is None else int(saved.state["step"])
