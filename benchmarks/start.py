r"""Seconds from starting a server to /ready, for a first and a second start, with processor time.

python -m benchmarks.start                                   # the bundled target on this CPU
python -m benchmarks.start --config real --config one_gpu --linger-s 20 --goals 25 12 \
    --row "SmolLM2-135M on a card" --out benchmarks/results/start_gpu.json

The first start of a trial finds an empty run folder, an empty cache of compiled kernels and, of the
target, what setting it up has left: a GGUF file is converted before, as ``make real`` does, and the
JSON says how long that took. ``--bare`` leaves the conversion to the first start. The second start
finds what the first has left. Python's compiled modules are there for both, as
after any start of this installation. Processor time (user and system, of the server and of what it
started) says what a start costs also where the machine is busy with other work. Where the seconds
went is read from the server's log; parts of "made all programs" are called "programs, ...".
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.harness.results import Row, at_most, write_result, write_rows
from configs.load import load_settings
from targets.find import GGUF

_PHASE = re.compile(r"(?P<what>[a-z][^:]*?) in (?P<seconds>[0-9.]+) s$")
_PROGRAMS = re.compile(
    r"(?P<num>\d+) programs are ready after [0-9.]+ s, (?P<left>\d+) are left for later"
)
_WITHIN = ("programs, ", "beside, ")
"""These begin the name of a part of another part, or of what went on beside others."""
_SET_UP = """
import sys
from pathlib import Path
from targets.files import read_target
read_target(sys.argv[1], Path(sys.argv[2]))
"""
_POLL_S = 0.02
_GIVE_UP_S = 600.0


def main(
    config: Annotated[list[str] | None, typer.Option(help="settings files or names")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="a.b=c")] = None,
    trials: Annotated[int, typer.Option(min=1, help="first and second starts")] = 1,
    linger_s: Annotated[float, typer.Option(min=0, help="seconds that it runs once ready")] = 0,
    bare: Annotated[bool, typer.Option(help="do not convert a GGUF file beforehand")] = False,
    row: Annotated[
        str | None, typer.Option(help="publish the medians as rows of this name")
    ] = None,
    goals: Annotated[tuple[float, float], typer.Option(help="s, first and second start")] = (6, 6),
    out: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
) -> None:
    """Print one line of JSON for each start, and a summary."""
    starts, set_up_s = [], []
    for trial in range(trials):
        with tempfile.TemporaryDirectory() as folder:
            if not bare:
                set_up_s.append(set_up(Path(folder), config or ["demo"], set_ or []))
            for which in ("first", "second"):
                found = {"start": which, "trial": trial} | one_start(
                    Path(folder), config or ["demo"], set_ or [], linger_s
                )
                starts.append(found)
                print(json.dumps(found), flush=True)
    summary = {
        which: {
            name: statistics.median(s[name] for s in starts if s["start"] == which)
            for name in ("ready_s", "processor_s")
        }
        for which in ("first", "second")
    }
    print(json.dumps(summary), flush=True)
    if out is not None:
        write_result(
            out,
            {"cores": os.cpu_count(), "set_up_s": set_up_s, "median": summary, "starts": starts},
        )
    if row is not None:
        command = ["python -m benchmarks.start", *(f"--config {c}" for c in config or [])]
        source = " ".join([*command, *(["--bare"] if bare else [])])
        write_rows("start", _rows(row, summary, goals), source)


def _rows(row: str, summary: dict[str, Any], goals: tuple[float, float]) -> list[Row]:
    times = [
        at_most(f"{row}, {which} start", "seconds to ready", summary[which]["ready_s"], goal)
        for which, goal in zip(("first", "second"), goals, strict=True)
    ]
    cores = [
        Row(
            f"{row}, {which} start",
            "processor seconds until ready",
            found["processor_s"],
            None,
            None,
        )
        for which, found in summary.items()
    ]
    return [*times, *cores]


def set_up(home: Path, configs: list[str], chosen: list[str]) -> float:
    """Convert the target of some settings if it is a GGUF file, in a process of its own; seconds
    that took.

    Args:
        home, configs, chosen: see ``one_start``.
    """
    target = load_settings([*map(Path, configs)], chosen, {}).target
    if not target.endswith(GGUF):
        return 0.0
    started_s = time.perf_counter()
    subprocess.run([sys.executable, "-c", _SET_UP, target, str(_cache(home))], check=True)
    took_s = round(time.perf_counter() - started_s, 2)
    print(json.dumps({"set_up_s": took_s}), flush=True)
    return took_s


def _cache(home: Path) -> Path:
    return home / "targets"


def one_start(
    home: Path, configs: list[str], chosen: list[str], linger_s: float = 0.0
) -> dict[str, Any]:
    """Start a server, wait until it is ready, and stop it.

    Args:
        home: folder for the run and the caches.
        configs: settings files or names, in order.
        chosen: single settings, as ``a.b=c``.
        linger_s: it runs for so long once it is ready, and makes the programs that it has left for
            later.

    Raises:
        RuntimeError: it ended before it was ready, or is not ready after ten minutes.
    """
    port = _free_port()
    settings = [*chosen, f"run_dir={home / 'run'}", f"server.port={port}"]
    command = [sys.executable, "-m", "serving", "launch"]
    command += [part for config in configs for part in ("--config", config)]
    command += [part for setting in settings for part in ("--set", setting)]
    env = os.environ | {
        "TRITON_CACHE_DIR": str(home / "kernels"),
        "SLIPSTREAM_TARGET_CACHE": str(_cache(home)),
        "CUDA_CACHE_PATH": str(home / "driver"),  # what the driver compiles, if anything
    }
    log = home / "log.txt"
    with log.open("wb") as opened:
        started_s = time.perf_counter()
        server = subprocess.Popen(command, stdout=opened, stderr=opened, env=env)
        try:
            ready_s = _until_ready(server, port, started_s, log)
            processor_s = _processor_s(server.pid)
            time.sleep(linger_s)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(60)
    said, _, said_later = log.read_text().partition("ready: serving")
    phases_s = _phases(said)
    named_s = sum(took_s for what, took_s in phases_s.items() if not what.startswith(_WITHIN))
    programs = _PROGRAMS.search(said)
    return {
        "ready_s": round(ready_s, 2),
        "processor_s": None if processor_s is None else round(processor_s, 2),
        "phases_s": phases_s | {"all else": round(ready_s - named_s, 2)},
        "programs": {name: int(num) for name, num in programs.groupdict().items()}
        if programs
        else None,
        "made_later": [line for line in said_later.splitlines() if " more programs in " in line],
        "warnings": [
            line
            for line in (said + said_later).splitlines()
            if " WARNING " in line and ": draining: " not in line
        ],
    }


def _until_ready(server: subprocess.Popen[bytes], port: int, started_s: float, log: Path) -> float:
    while True:
        passed_s = time.perf_counter() - started_s
        if server.poll() is not None or passed_s > _GIVE_UP_S:
            said = log.read_text()
            said = said if len(said) < 8000 else f"{said[:4000]}\n...\n{said[-4000:]}"
            raise RuntimeError(f"no server after {passed_s:.0f} s:\n{said}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5):
                return time.perf_counter() - started_s
        except (urllib.error.URLError, OSError):
            time.sleep(_POLL_S)


def _processor_s(pid: int) -> float | None:
    """User and system seconds of a process and of all that it has started so far; ``None`` where
    the system does not tell."""
    try:
        pids = {pid, *map(int, _children(pid))}
        fields = [Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split() for one in pids]
    except OSError:
        return None
    ticks = sum(int(number) for found in fields for number in found[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


def _children(pid: int) -> list[str]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [child for task in tasks for child in task.read_text().split()]


def _phases(text: str) -> dict[str, float]:
    """Seconds of each part of start-up until it was ready, as the server's log says."""
    found = {}
    for line in text.splitlines():
        if matched := _PHASE.search(line):
            found[matched["what"].rpartition("  ")[2].strip()] = float(matched["seconds"])
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    typer.run(main)
