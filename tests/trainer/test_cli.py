"""``trainer launch`` as an operator meets it: real processes, exit codes, signals."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from buffer.folder_weights import FolderWeights
from oracles.forked import Forked
from oracles.support import REPOSITORY
from tests.trainer.conftest import World
from tests.trainer.traffic import write_traces
from trainer.checkpoint import read_checkpoint
from trainer.cli import app

SMALL = {
    "lr": "3e-3",
    "batch_tokens": 256,
    "max_sequence": 64,
    "min_traces": 8,
    "publish_every_steps": 4,
    "replay_ratio": 50,
    "nice": 3,
    "cpu_threads": 1,
}


def options(run_dir: Path, target: Path) -> list[str]:
    wanted = [f"target={target}", f"run_dir={run_dir}", "trainer.device=cpu"]
    wanted += [f"trainer.{name}={value}" for name, value in SMALL.items()]
    return [text for one in wanted for text in ("--set", one)]


Launch = Callable[[Path, Path], tuple[Forked, Path]]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Starts trainers and returns each with its log; none outlives the test."""
    children: list[Forked] = []

    def start(run_dir: Path, target: Path) -> tuple[Forked, Path]:
        environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'kernels'}"}
        command = ["-m", "trainer", "launch", *options(run_dir, target)]
        log = tmp_path / f"log-{len(children)}.txt"
        children.append(Forked(command, environment, REPOSITORY, log))
        return children[-1], log

    yield start
    for child in children:
        child.kill()
        child.wait()


def wait_for_version(run_dir: Path, version: int) -> None:
    deadline = time.monotonic() + 90
    while version not in FolderWeights(run_dir / "weights").versions():
        assert time.monotonic() < deadline, f"version {version} was not published in time"
        time.sleep(0.05)


def test_one_trainer_runs_alone_until_sigterm_ends_it_with_a_checkpoint(
    world: World, tmp_path: Path, launch: Launch
) -> None:
    write_traces(tmp_path, world.traces)
    trainer, log = launch(tmp_path, world.target)
    wait_for_version(tmp_path, 1)

    second, refusal = launch(tmp_path, world.target)
    assert second.wait(timeout=60) == 1
    assert refusal.read_text() == (
        f"another trainer (process {trainer.pid}) works in {tmp_path / 'trainer'}; not "
        f"starting. Stop it first, or choose another run_dir\n"
    )
    assert os.getpriority(os.PRIO_PROCESS, trainer.pid) == 3

    trainer.send_signal(signal.SIGTERM)

    assert trainer.wait(timeout=30) == 0
    said = [line.partition(": ")[2] for line in log.read_text().splitlines()]
    lines = [line for line in said if not line.startswith("audit: ")]
    assert len(said) == len(lines) + 1  # it reads traces
    took = [line for line in lines if re.search(r" in \d+\.\d\d s$", line)]
    assert len(took) == 4  # parts of its start
    lines = [line for line in lines if line not in took]
    assert lines[0] == f"starting: target {world.target}, run_dir {tmp_path}"
    assert lines[1] == "training begins from version 0"
    assert any(re.match(r"gate at step \d+: at least .*; parent version 0$", x) for x in lines)
    assert "published version 1, trained from 0" in lines
    saved = read_checkpoint(tmp_path / "trainer" / "checkpoints")
    status = json.loads((tmp_path / "trainer" / "status.json").read_text())
    last_line = (tmp_path / "trainer" / "log.jsonl").read_text().splitlines()[-1]
    assert status["state"] == "stopped"
    assert saved is not None and saved.state["step"] == status["step"] > 0
    assert json.loads(last_line)["event"] == "stopped"
    assert lines[-1] == f"stopped at step {status['step']}"


def test_a_trainer_that_dies_says_why_and_exits_with_1(
    world: World, tmp_path: Path, launch: Launch
) -> None:
    write_traces(tmp_path, world.traces)
    trainer, log = launch(tmp_path, world.target)
    deadline = time.monotonic() + 90
    while not log.exists() or "training begins" not in log.read_text():  # it has read its versions
        assert time.monotonic() < deadline
        time.sleep(0.02)
    denied = tmp_path / "weights" / "DENIED.json"
    denied.write_text("{")  # it must know which versions were rolled back

    assert trainer.wait(timeout=90) == 1
    text = log.read_text()
    assert "CRITICAL trainer.process: the trainer died: " in text
    assert str(denied) in text
    last_line = (tmp_path / "trainer" / "log.jsonl").read_text().splitlines()[-1]
    assert json.loads(last_line)["event"] == "failed"


@pytest.mark.parametrize("kind", ["suffix", "none"])
def test_a_run_without_a_trained_drafter_has_nothing_to_train(kind: str) -> None:
    result = CliRunner().invoke(app, ["launch", "--set", f"drafter.kind={kind}"])

    assert result.exit_code == 2
    assert f"drafter.kind is '{kind}': there is nothing to train" in result.stderr


def test_an_unknown_setting_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["launch", "--set", "trainer.learning_rate=1"])

    assert result.exit_code == 2
    assert "unknown key 'trainer.learning_rate'" in result.stderr


def test_print_config_shows_what_is_in_force() -> None:
    result = CliRunner().invoke(app, ["launch", "--set", "trainer.lr=0.5", "--print-config"])

    assert result.exit_code == 0
    assert "lr: 0.5" in result.stdout


def test_a_target_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    wanted = ["--set", f"target={tmp_path / 'none'}", "--set", f"run_dir={tmp_path}"]

    result = CliRunner().invoke(app, ["launch", "--set", "trainer.nice=0", *wanted])

    assert result.exit_code == 1
    assert f"target '{tmp_path / 'none'}' is neither a folder nor a GGUF file" in result.stderr


def test_a_vocabulary_is_what_the_traces_use_and_makes_a_smaller_drafter(
    world: World, tmp_path: Path
) -> None:
    write_traces(tmp_path, world.traces[:8])
    out = tmp_path / "ids.json"
    sets = [
        text for one in (f"target={world.target}", f"run_dir={tmp_path}") for text in ("--set", one)
    ]

    result = CliRunner().invoke(app, ["vocabulary", "--size", "40", "--out", str(out), *sets])

    assert result.exit_code == 0, result.output
    ids = json.loads(out.read_text())
    generated = [t for x in world.traces[:8] for t in x.token_ids[x.prompt_length :].tolist()]
    used = Counter(generated)
    assert len(ids) == 40 and ids == sorted(ids)
    assert min(used[x] for x in ids) >= max((n for x, n in used.items() if x not in ids), default=0)
    share = sum(used[x] for x in ids) / len(generated)
    assert f"40 of 96 tokens, {share:.2%} of the traffic" in result.output


@pytest.mark.parametrize(
    ("size", "message"), [("97", "size must be in 1..96"), ("40", "no generated")]
)
def test_a_vocabulary_that_cannot_be_made_is_an_error(
    world: World, tmp_path: Path, size: str, message: str
) -> None:
    sets = [
        text for one in (f"target={world.target}", f"run_dir={tmp_path}") for text in ("--set", one)
    ]
    out = str(tmp_path / "ids.json")

    result = CliRunner().invoke(app, ["vocabulary", "--size", size, "--out", out, *sets])

    assert result.exit_code != 0
    assert message in result.output
