"""A thousand times kill -9 of the trainer: does it resume where its checkpoint is?

    python -m benchmarks.faults.trainer_kills --kills 30          # a minute or two
    python -m benchmarks.faults.trainer_kills --publish           # 1,000 kills; some 40 minutes
    python -m benchmarks.faults.trainer_kills --kills 0 --cold 5  # starts of the command alone
    python -m benchmarks.faults.trainer_kills --url shm: --kills 30

A real trainer learns from traces of a tiny random target, which a process that stands for a server
writes to the log all the time. It judges, publishes and saves far more often than by default, and
its gate lets nearly every candidate pass, so that each kind of work is under way when it is killed:
updates, the judging of a candidate, its publication, a checkpoint, the start itself. Each life
begins as a fork of a process that has imported torch; ``--cold`` starts of the real command are
timed beside them.

Checked for each life:

- **It resumes**, within 10 s of its start.
- **Its state is the checkpoint's**, bit for bit: weights, average, moments, generators, counters.
- **No version was ever visible in part.** A process that stands for a server looks all the time and
  reads each version as soon as it is listed; all are read once more after each kill. No version
  changes, and none has a number below one that was seen before.
- **No trace was used twice.** What the trainer's memory took in is noted in its checkpoint, one bit
  for each trace and beside what removes duplicates. What was read after the checkpoint is read
  again, and counts once: the state that had used it died with the process.
- **Every trace is accounted for.** At last comes a life that is not killed, until nothing waits for
  it. Then each trace that was written has been used, waits in the log, or was evicted before a
  trainer could use it, and ``buffer stats`` counts as many of each.

Writes ``benchmarks/results/trainer_kills.json``, without kills ``trainer_starts.json``, and, with
``--publish``, ``rows/faults.json``.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml

from benchmarks.faults.trainer_lives import (
    LIMITS,
    PHASES,
    Account,
    Phase,
    Seen,
    Used,
    forked,
    group_counts,
    live,
    watch_versions,
    write_traces,
)
from benchmarks.harness.results import (
    RESULTS,
    Row,
    at_least,
    at_most,
    say,
    write_result,
    write_rows,
)
from buffer.backends import open_backend
from configs.schema import BufferSettings, Settings
from tests.trainer.traffic import fingerprint_of, make_traces, save_target, settings_for
from trainer.checkpoint import read_checkpoint

SOURCE = "python -m benchmarks.faults.trainer_kills"
STARTS = f"{SOURCE} --kills 0"
"""The part of it that measures starts of the command."""
NUM_KILLS = 1000
RESUME_S = 10.0
_STUCK_S = 120.0
"""A life that has not resumed, or reached its phase, after so long ends the benchmark."""


@dataclass(slots=True)
class Findings:
    """What became of the lives."""

    kills: Counter[str] = field(default_factory=Counter)
    """By what was under way."""
    resumed: list[dict[str, float]] = field(default_factory=list)
    """Seconds from the start of each process that found a checkpoint until it was ready: ``total``,
    its ``PARTS``, and ``processor``, the time that it had a core."""
    differences: list[str] = field(default_factory=list)
    last_step: int = 0
    loads: list[float] = field(default_factory=list)
    """Of the machine, over the last minute, at each kill."""


def kill_often(
    settings: Settings, folder: Path, num_kills: int, chance: random.Random
) -> tuple[Findings, Seen]:
    """Start the trainer, and kill it, so many times."""
    phase, found, seen = Phase(), Findings(), Seen()
    store = open_backend(settings.buffer.url, settings.run_dir).open_weights()
    begun = time.monotonic()
    for life in range(num_kills):
        told = folder / "told.json"
        told.unlink(missing_ok=True)
        phase.reset()
        began_s = time.monotonic()
        pid = forked(lambda: live(settings, phase, began_s, told, None))  # noqa: B023
        wanted = chance.choice(PHASES)
        try:
            _wait_for(wanted, phase, told, chance, pid)
            found.kills["+".join(phase.names)] += 1
        finally:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            raise RuntimeError(f"the trainer ended by itself, with status {status}")
        _take(found, told)
        found.loads.append(os.getloadavg()[0])
        seen.look(store, again=True)
        if (life + 1) % 50 == 0:
            say(f"{life + 1} kills, step {found.last_step}, {time.monotonic() - begun:.0f} s")
    return found, seen


def _take(found: Findings, told: Path) -> None:
    """What a life said of how it began; nothing, if it was killed before that."""
    with contextlib.suppress(FileNotFoundError):
        body = json.loads(told.read_bytes())
        found.last_step = max(found.last_step, body["step"])
        found.differences += body["problems"]
        if body["resumed"]:
            found.resumed.append(_lengths_of(body))


def _lengths_of(body: Mapping[str, Any]) -> dict[str, float]:
    return {"total": body["seconds"], **body["parts"]}


def _wait_for(wanted: str, phase: Phase, told: Path, chance: random.Random, pid: int) -> None:
    """Wait until a trainer does what it is to be killed at, and then a little."""
    end_s = time.monotonic() + _STUCK_S
    if wanted != "start":
        _until(told.exists, end_s, pid)
        time.sleep(chance.uniform(0, 1.0))
        # A state is not always reached, e.g. no candidate passes: then it dies at something else.
        with contextlib.suppress(TimeoutError):
            _until(lambda: wanted in phase.names, min(end_s, time.monotonic() + 5), pid)
        time.sleep(chance.choice((0.0, chance.uniform(0, 0.004), chance.uniform(0, 0.05))))
    else:
        time.sleep(chance.uniform(0, 0.5))


def _until(is_so: Callable[[], bool], end_s: float, pid: int) -> None:
    while not is_so():
        if time.monotonic() > end_s:
            raise TimeoutError
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            raise RuntimeError("the trainer ended by itself")
        time.sleep(0.0003)


def finish(settings: Settings, folder: Path) -> dict[str, Any]:
    """One more life that is not killed, until nothing waits for it."""
    told, until = folder / "told.json", folder / "end"
    told.unlink(missing_ok=True)
    written = int((folder / "written").read_text())
    began_s = time.monotonic()
    pid = forked(lambda: live(settings, Phase(), began_s, told, until))
    end_s = time.monotonic() + _STUCK_S
    while group_counts(settings).pending and time.monotonic() < end_s:
        time.sleep(0.5)
    until.touch()
    _, status = os.waitpid(pid, 0)
    saved = read_checkpoint(settings.run_dir / "trainer" / "checkpoints")
    assert saved is not None, "a trainer begins with a checkpoint"
    return {
        **asdict(Account.of(settings, written, saved)),
        "used_twice": Used.of(saved).twice,
        "exit_status": status,
        "last": json.loads(told.read_bytes()),
    }


def cold_starts(settings: Settings, folder: Path, num: int) -> list[dict[str, float]]:
    """Seconds from the start of the real command until its trainer has resumed: ``total``, and
    ``processor``, the time that it had a core."""
    config = folder / "settings.yaml"
    config.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    log = settings.run_dir / "trainer" / "log.jsonl"
    command = [sys.executable, "-m", "trainer", "launch", "--config", str(config)]
    found = []
    for _ in range(num):
        before = _num_resumed(log)
        began_s = time.monotonic()
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            while _num_resumed(log) == before:
                if process.poll() is not None or time.monotonic() - began_s > _STUCK_S:
                    raise RuntimeError(f"{' '.join(command)} did not resume")
                time.sleep(0.02)
            total = time.monotonic() - began_s
        finally:
            process.kill()
            _, _, usage = os.wait4(process.pid, 0)
            process.returncode = -signal.SIGKILL  # so that nobody waits for it again
        found.append({"total": total, "processor": usage.ru_utime + usage.ru_stime})
    return found


def _num_resumed(log: Path) -> int:
    return log.read_text(errors="replace").count('"event": "resumed"')


def trainer_settings(url: str, run_dir: Path, target: Path) -> Settings:
    """All kinds of work often, and a memory that the log always holds."""
    settings = settings_for(
        run_dir,
        target,
        lr=1e-4,
        gate_margin=0.5,
        gate_confidence=0.5,
        publish_every_steps=6,
        checkpoint_every_s=0.4,
        recent_traces=64,
        reservoir_traces=0,
        keep_versions=4,
        replay_ratio=4.0,
    )
    buffer = BufferSettings(url=url, segment_bytes=LIMITS.segment_bytes, max_bytes=LIMITS.max_bytes)
    return settings.model_copy(update={"buffer": buffer})


def measure(url: str, num_kills: int, num_cold: int, seed: int) -> dict[str, Any]:
    """All of it, in a folder of its own."""
    torch.set_num_threads(1)
    chance, begun = random.Random(seed), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="trainer-kills-") as name:
        folder = Path(name)
        model = save_target(folder / "target")
        traces = make_traces(model, fingerprint_of(folder / "target"), 64)
        settings = trainer_settings(url, folder / "run", folder / "target")
        settings.run_dir.mkdir()
        ended, versions, written = folder / "ended", folder / "versions.json", folder / "written"
        helpers = [
            forked(lambda: write_traces(settings, traces, written, ended)),
            forked(lambda: watch_versions(settings, versions, folder / "unwatched")),
        ]
        try:
            found, seen = kill_often(settings, folder, num_kills, chance)
            ended.touch()
            os.waitpid(helpers.pop(0), 0)
            last = finish(settings, folder)
            cold = cold_starts(settings, folder, num_cold)
            (folder / "unwatched").touch()
            os.waitpid(helpers.pop(), 0)
            watched = json.loads(versions.read_bytes())
        finally:
            for pid in helpers:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            shutil.rmtree(folder / "run", ignore_errors=True)
    resumed = sorted(
        [*found.resumed, _lengths_of(last["last"])], key=lambda lengths: lengths["total"]
    )
    return {
        "url": url,
        "kills": dict(sorted(found.kills.items())),
        "steps": max(found.last_step, last["last"]["step"]),
        "resumed": len(resumed),
        "resumed_s": {
            "median": {n: statistics.median(one[n] for one in resumed) for n in resumed[0]},
            "longest": resumed[-1],
        },
        "cold_s": cold,
        "state_differences": found.differences + last["last"]["problems"],
        "versions": {
            "watched": watched,
            "after_kills": seen.to_json(),
        },
        "traces": {name: value for name, value in last.items() if name != "last"},
        "seconds": time.monotonic() - begun,
        "load": statistics.fmean(found.loads or [os.getloadavg()[0]]),
        "seed": seed,
    }


def rows_of(found: Mapping[str, Any]) -> Iterator[Row]:
    kills, traces, versions = found["kills"], found["traces"], found["versions"]
    what = f"trainer, {found['url']} kill -9 at random points, load {found['load']:.0f} on average"
    wrong = [*versions["watched"]["problems"], *versions["after_kills"]["problems"]]
    yield at_least(what, "kills", sum(kills.values()), NUM_KILLS)
    longest = found["resumed_s"]["longest"]["total"]
    yield at_most(what, "longest resume, s, Python's imports apart", longest, RESUME_S)
    seen = f"wrong or partial versions seen, of {versions['watched']['versions']} read"
    yield at_most(what, seen, len(wrong), 0)
    differing = f"differences from the checkpoint after {found['resumed']} resumes"
    yield at_most(what, differing, len(found["state_differences"]), 0)
    yield at_most(what, f"traces used twice, of {traces['used']}", len(traces["used_twice"]), 0)
    sums = f"used {traces['used']} + waiting {traces['waiting']} + evicted {traces['evicted']}"
    yield at_most(what, f"traces that buffer stats counts otherwise: {traces['written']} written = "
                  f"{sums}", traces["differences"], 0)  # fmt: skip
    yield at_most(what, "traces waiting at the end", traces["waiting"], 0)
    yield Row(what, "traces evicted before a trainer could use them, and counted",
              traces["evicted"], None, None)  # fmt: skip


def starts_of(found: Mapping[str, Any]) -> Iterator[Row]:
    starts = found["cold_s"]
    what = f"trainer, {found['url']} started after kill -9, load {found['load']:.0f}"
    cold = f"longest of {len(starts)} starts of the command until it resumed, s"
    yield at_most(what, cold, max(one["total"] for one in starts), RESUME_S)
    had = max(one["processor"] for one in starts)
    yield Row(what, "most of that for which it had a core, s", had, None, None)


def main(
    kills: Annotated[int, typer.Option(min=0)] = NUM_KILLS,
    cold: Annotated[int, typer.Option(min=0, help="starts of the real command")] = 3,
    url: Annotated[str, typer.Option(help="buffer.url")] = "log:",
    seed: int = 0,
    publish: Annotated[bool, typer.Option(help="write rows/faults.json, too")] = False,
    out: Annotated[
        Path | None, typer.Option(help="result file, another one than the usual")
    ] = None,
    rows_dir: Annotated[Path, typer.Option(help="folder of rows/faults.json")] = RESULTS,
) -> None:
    """Kill the trainer, and see what becomes of it."""
    found = measure(url, kills, cold, seed)
    write_result(out or RESULTS / f"trainer_{'kills' if kills else 'starts'}.json", found)
    by_source = {SOURCE: list(rows_of(found)) if kills else []}
    by_source[STARTS] = list(starts_of(found)) if cold else []
    for source, rows in by_source.items():
        if publish and rows:
            write_rows("faults", rows, source, rows_dir)
    rows = [row for some in by_source.values() for row in some]
    for row in rows:
        say(f"{row.row}: {row.measure}: {row.value} (goal: {row.goal}, holds: {row.holds})")
    if not all(row.holds for row in rows if row.measure != "kills"):
        raise typer.Exit(code=1)


if __name__ == "__main__":
    typer.run(main)
