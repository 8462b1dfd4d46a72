"""A trainer's life through its commands, as a user gives them: start, look, kill, resume, stop.

    python -m benchmarks.jobs                       # one or two minutes on two cores
    python -m benchmarks.jobs --publish

A process that stands for a server writes traces of a tiny random target. Around one run folder the
real commands are given, each in a process of its own, the wrong ones too, and their exit codes and
words are compared with what the documentation promises. Manifests and scripts of ``--dry-run`` are
looked at in ``tests/trainer/test_places.py``, with schemas and Slurm's own ``sbatch``.

Writes ``benchmarks/results/jobs.json`` and, with ``--publish``, ``rows/jobs.json``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml

from benchmarks.faults.trainer_kills import trainer_settings
from benchmarks.faults.trainer_lives import forked, write_traces
from benchmarks.harness.results import RESULTS, Out, Row, at_most, say, write_result, write_rows
from tests.trainer.traffic import fingerprint_of, make_traces, save_target

SOURCE = "python -m benchmarks.jobs"
_WAIT_S = 180.0


@dataclass(frozen=True, slots=True)
class Case:
    """One command."""

    what: str
    command: str
    code: int
    wanted_code: int
    lacks: tuple[str, ...]
    """Words that were promised and did not come."""
    seconds: float

    @property
    def is_right(self) -> bool:
        return self.code == self.wanted_code and not self.lacks


def asked(what: str, words: tuple[str, ...], wanted_code: int, *promised: str) -> Case:
    """Give a command, and compare what it says."""
    began_s = time.monotonic()
    ran = subprocess.run(
        [sys.executable, "-m", "trainer", *words], capture_output=True, text=True, timeout=_WAIT_S
    )
    said = ran.stdout + ran.stderr
    lacks = tuple(one for one in promised if one not in said)
    case = Case(
        what, " ".join(words), ran.returncode, wanted_code, lacks, time.monotonic() - began_s
    )
    say(f"{what}: {'right' if case.is_right else f'WRONG: {case}, {said[-500:]}'}")
    return case


def status_of(run: Path) -> dict[str, Any]:
    """What ``trainer status --json`` says."""
    ran = subprocess.run(
        [sys.executable, "-m", "trainer", "status", str(run), "--json"], capture_output=True
    )
    found: dict[str, Any] = json.loads(ran.stdout) if ran.stdout else {"life": "none"}
    return found


class Started:
    """``trainer launch`` in the background, until it trains."""

    def __init__(self, run: Path, settings: Path, log: Path) -> None:
        began_s = time.monotonic()
        command = [sys.executable, "-m", "trainer", "launch", "--config", str(settings)]
        with log.open("wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out)
        while True:
            found = status_of(run)
            if found["life"] == "runs" and found["status"]["state"] == "training":
                break
            if self.process.poll() is not None or time.monotonic() - began_s > _WAIT_S:
                raise RuntimeError(f"it does not train: {found}, {log.read_text()[-2000:]}")
            time.sleep(0.2)
        self.seconds = time.monotonic() - began_s

    def until_step(self, run: Path, step: int) -> None:
        """Wait until it has learnt so much."""
        end_s = time.monotonic() + _WAIT_S
        while status_of(run)["status"]["step"] < step:
            if time.monotonic() > end_s:
                raise RuntimeError(f"it does not reach step {step}")
            time.sleep(0.2)


def wrong_usage(folder: Path) -> Iterator[Case]:
    """What is refused before anything is started."""
    none, empty = folder / "none", folder / "empty"
    empty.mkdir()
    yield asked("an unknown place", ("launch", "--on", "slum"), 2, "'slum' is not one of")
    yield asked("an unknown option", ("launch", "--slurm"), 2, "no such option: --slurm")
    yield asked(
        "an unknown setting",
        ("launch", "--set", "launch.slurm.partitoin=gpu", "--on", "slurm", "--dry-run"),
        2,
        "launch.slurm.partitoin",
        "did you mean",
    )
    yield asked(
        "hosts without a meeting place",
        ("launch", "--on", "torchrun", "--set", "launch.nodes=2"),
        2,
        "set launch.endpoint",
    )
    yield asked(
        "Kubernetes without an image",
        ("launch", "--on", "kubernetes", "--dry-run"),
        2,
        "launch.kubernetes.image must name",
    )
    yield asked(
        "a job for an unknown loss",
        ("launch", "--on", "slurm", "--dry-run", "--set", "trainer.loss=mse"),
        2,
        "trainer.loss 'mse' is unknown",
    )
    yield asked(
        "a job for a GPU that it does not get",
        ("launch", "--on", "slurm", "--dry-run", "--config", "two_gpu"),
        2,
        "trainer.device is 'cuda:1'",
    )
    yield asked("the status of no run", ("status", str(none)), 2, "no such run")
    yield asked("the logs of a run without trainer", ("logs", str(empty)), 2, "no trainer")
    yield asked("to stop a run without trainer", ("stop", str(empty)), 2, "no trainer")


def lives(folder: Path, run: Path, settings: Path) -> Iterator[Case | dict[str, Any]]:
    """A trainer that is watched, killed, started again and stopped."""
    words = ("launch", "--config", str(settings))
    first = Started(run, settings, folder / "first.log")
    yield {"until_it_trains_s": first.seconds}
    first.until_step(run, 20)
    yield asked("the status of a living one", ("status", str(run)), 0, "training", "rows/s")
    yield asked("a second one", words, 1, "another trainer", str(first.process.pid), "not starting")
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    yield asked("the status of a killed one", ("status", str(run)), 1, "ended without a word")
    yield asked("to stop a killed one", ("stop", str(run)), 1, "no trainer runs")
    second = Started(run, settings, folder / "second.log")
    yield {"until_it_trains_again_s": second.seconds}
    yield asked("to stop it", ("stop", str(run)), 0, "stopped at step")
    yield Case(
        "the exit code of one that was stopped", "", second.process.wait(_WAIT_S), 0, (), 0.0
    )
    yield asked("the status of a stopped one", ("status", str(run)), 1, "not running: stopped")
    logs = ("logs", str(run))
    yield asked("its logs", logs, 0, "training begins", "resumed", "checkpoint", "stopped at step")


def measure() -> dict[str, Any]:
    """All commands, in a folder of its own."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="jobs-") as name:
        folder = Path(name)
        run, target, ended = folder / "run", folder / "target", folder / "ended"
        traces = make_traces(save_target(target), fingerprint_of(target), 64)
        settings = trainer_settings("log:", run, target)
        run.mkdir()
        file = folder / "settings.yaml"
        file.write_text(yaml.safe_dump(settings.model_dump(mode="json", exclude_defaults=True)))
        writer = forked(lambda: write_traces(settings, traces, folder / "written", ended))
        try:
            found = [*wrong_usage(folder), *lives(folder, run, file)]
        finally:
            ended.touch()
            os.waitpid(writer, 0)
    cases = [one for one in found if isinstance(one, Case)]
    figures = {k: v for one in found if isinstance(one, dict) for k, v in one.items()}
    return {
        "cases": [asdict(one) | {"is_right": one.is_right} for one in cases],
        **figures,
        "load": os.getloadavg()[0],
    }


def rows_of(found: dict[str, Any]) -> Iterator[Row]:
    cases = found["cases"]
    what = f"trainer's commands as a user gives them, {len(cases)} of them"
    yield at_most(what, "wrong exit codes or words", sum(not one["is_right"] for one in cases), 0)
    what = f"trainer, kill -9, load {found['load']:.0f} on {os.cpu_count()} cores"
    seconds = found["until_it_trains_again_s"]
    yield Row(
        what, "trainer launch until it trains again, imports included, s", seconds, None, None
    )


def main(
    publish: Annotated[bool, typer.Option(help="write rows/jobs.json, too")] = False,
    out: Out = RESULTS / "jobs.json",
) -> None:
    """Give the commands, and compare what they say."""
    found = measure()
    write_result(out, found)
    rows = list(rows_of(found))
    if publish:
        write_rows("jobs", rows, SOURCE)
    for row in rows:
        say(f"{row.row}: {row.measure}: {row.value} (goal: {row.goal}, holds: {row.holds})")
    if any(row.holds is False for row in rows):
        raise typer.Exit(code=1)


if __name__ == "__main__":
    typer.run(main)
