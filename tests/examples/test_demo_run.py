"""A short demo on a tiny random target, with a real server, trainer and clients."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from examples.arms import ALL_ARMS
from examples.processes import ChildDiedError, check_alive, start, stop, tail
from examples.report import checks, verdict
from examples.run_folder import MARKER
from oracles.forked import Forked
from oracles.support import REPOSITORY
from tests.serving.http.live import environment

SHORT = """
import signal, sys
from pathlib import Path
from rich.console import Console
from examples.clients import Sampling
from examples.demo import carry_out
from examples.plan import DemoSettings
from examples.texts import Kept, Phase

# A shell starts background processes with SIGINT ignored; a terminal does not.
signal.signal(signal.SIGINT, signal.default_int_handler)
target, run_dir, seconds = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
num_requests = int(sys.argv[4])
names = {"python": "python", "c": "c", "python-again": "python"}
sys.exit(carry_out(DemoSettings(
    run_dir=run_dir,
    overrides=(
        f"target={target}", "drafter.path=null", "trainer.min_traces=4", "trainer.warmup_steps=0",
        "trainer.publish_every_steps=1", "trainer.gate_margin=0.5", "trainer.batch_tokens=256",
        "trainer.held_out_every=2", "trainer.replay_ratio=50", "engine.max_model_len=512",
        *sys.argv[5:],
    ),
    phases=tuple(
        Phase(name, domain, name == "c", seconds * (20 if name == "c" else 1), enough_requests=4)
        for name, domain in names.items()
    ),
    settle_s=1.0,
    num_clients=2, sampling=Sampling(0.7, max_tokens=16), max_requests=num_requests,
    kept=Kept(2, 1), replay_block=1, replay_s=1.0,
), Console(width=140)))
"""


FEW = 300
"""Requests of a demo that never comes to its end; gathering thousands takes seconds."""


def begin_demo(
    target: Path, run_dir: Path, seconds: float, num_requests: int, *sets: str
) -> Forked:
    numbers = str(seconds), str(num_requests)
    command = ["-c", SHORT, str(target), str(run_dir), *numbers, *sets]
    return Forked(command, environment(), REPOSITORY, output_of(run_dir))


def output_of(run_dir: Path) -> Path:
    return run_dir.with_name("output.txt")


def processes_of(run_dir: Path) -> list[str]:
    """Command lines of other processes that name the run folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(run_dir) in command and int(path.parent.name) != os.getpid():
            found.append(command)
    return found


@pytest.mark.timeout(300)
def test_a_short_demo_runs_to_its_report_and_leaves_nothing_running(
    tiny_target_dir: Path, tmp_path: Path
):
    demo = begin_demo(tiny_target_dir, tmp_path / "demo", seconds=5, num_requests=1000)
    code, output = demo.wait(280), output_of(tmp_path / "demo").read_text()

    assert code == 0, output
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert [phase["name"] for phase in report["phases"]] == ["python", "c", "python-again"]
    assert report["failed_requests"] == report["mismatched_outputs"] == 0
    assert report["swaps"] >= 1
    assert all(phase["requests"] > 0 for phase in report["phases"])
    assert report["newest_version"] > 0
    assert "report.html" in output
    speeds = {f"{arm}_tokens_per_s" for arm in ALL_ARMS}
    assert all(phase[speed] > 0 for phase in report["phases"] for speed in speeds)
    assert report["learning_seconds"] > 0 and report["learning_updates"] > 0
    # Which of them hold is a matter of speed; that each is told as it is, is not.
    for check in checks(report):
        told = [
            line.split()[-1] for line in output.splitlines() if line.strip().startswith(check.name)
        ]
        assert told == [verdict(check)], check
    assert (tmp_path / "demo" / "report.html").stat().st_size > 10_000
    assert processes_of(tmp_path / "demo") == []


@pytest.mark.timeout(300)
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_interrupt_ends_both_children_and_says_so(tiny_target_dir: Path, tmp_path: Path):
    run_dir = tmp_path / "demo"
    demo = begin_demo(tiny_target_dir, run_dir, 60, FEW, "engine.max_batch=2")
    deadline_s = time.monotonic() + 200
    while not any("trainer launch" in command for command in processes_of(run_dir)):
        assert time.monotonic() < deadline_s and demo.poll() is None, "no trainer came"
        time.sleep(0.2)
    time.sleep(1.0)

    demo.send_signal(signal.SIGINT)
    code, output = demo.wait(60), output_of(run_dir).read_text()

    assert code == 130
    assert "server and trainer are stopped" in output
    assert processes_of(run_dir) == []
    assert not (run_dir / "report.json").exists()
    assert (run_dir / MARKER).exists()


@pytest.mark.timeout(300)
def test_dead_child_ends_the_demo_with_its_reason(tiny_target_dir: Path, tmp_path: Path):
    demo = begin_demo(tiny_target_dir, tmp_path / "demo", 60, FEW, "drafter.path=/nowhere")
    code, output = demo.wait(280), output_of(tmp_path / "demo").read_text()

    assert code == 1
    assert re.search(r"the (server|trainer) \(process \d+\) ended with exit code 1", output)
    assert "/nowhere is not a folder" in output.replace("\n", "")
    assert processes_of(tmp_path / "demo") == []


@pytest.mark.timeout(300)
def test_a_trainer_that_is_killed_is_named_with_its_last_lines(
    tiny_target_dir: Path, tmp_path: Path
):
    overrides = ("--set", f"target={tiny_target_dir}", "--set", f"run_dir={tmp_path}")
    command = ["-m", "trainer", "launch", *overrides, "--set", "trainer.device=cpu"]
    trainer = start("trainer", command, tmp_path / "logs" / "trainer.log")
    try:
        deadline_s = time.monotonic() + 250
        while "training begins" not in trainer.log.read_text():
            assert time.monotonic() < deadline_s, tail(trainer.log)
            check_alive([trainer])
            time.sleep(0.2)

        trainer.process.kill()
        trainer.process.wait()

        with pytest.raises(ChildDiedError) as caught:
            check_alive([trainer])
    finally:
        stop([trainer])
    assert f"the trainer (process {trainer.process.pid}) was killed by SIGKILL" in str(caught.value)
    assert "training begins from version 0" in str(caught.value)
