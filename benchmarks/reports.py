"""What reporting to Weights & Biases (offline) and TensorBoard costs a server and a trainer.

    python -m benchmarks.reports                              # two minutes
    python -m benchmarks.reports --demo runs/demo --publish   # also reads an offline demo back

Half a percent is less than what turns with and without differ by on a machine with any other work.
So processor time is counted, which such work changes little: of this process, which reports as
server and trainer do, and of the writer's process with all that it starts. The server is a living
one that decodes nothing meanwhile, and the trainer's part is given events as an eager trainer has
them, so that all that is spent beyond an idle minute is the reports'. Shares are of one core, at
the default intervals; writers run with niceness 10, so on a busy machine they take what is left.

``--demo`` names the folder of a demo that was run with ``--set wandb.mode=offline``: every figure
and table that the dashboard names is looked for in it.

Writes ``benchmarks/results/reports.json`` and, with ``--publish``, ``rows/reports.json``.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.harness.results import RESULTS, Out, Row, at_most, say, write_result, write_rows
from configs.load import load_settings
from configs.schema import Settings
from oracles.wandb_files import offline_runs
from reporting.dashboard import GOLDEN, figures_of
from reporting.reports import Reports, reports_of
from trainer.reporting import Reporter as TrainerReporter

SOURCE = "python -m benchmarks.reports"
WRITERS = {"wandb": "wandb.mode=offline", "tensorboard": "tensorboard.enabled=true"}
MOST_PERCENT = 0.5
GATES_PER_S = 1 / 20
"""Of a trainer whose gate is asked often; updates and status are reported every
``reports.every_s``."""
_RATE = 25.0
"""Records per second here: more than by default, so that their time shows."""
_WAIT_S = 120.0
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def processor_s(process: int) -> float:
    """Processor time of a process, its descendants, whatever their sessions, and those of them that
    have ended."""
    parents, times = dict[int, int](), dict[int, int]()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        pid = int(path.parent.name)
        parents[pid], times[pid] = int(fields[1]), sum(map(int, fields[11:15]))
    found = {process}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sum(times.get(pid, 0) for pid in found) * _TICK_S


class Meter:
    """Processor time of this process and of one writer's."""

    def __init__(self, reports: Reports) -> None:
        self._reports = reports
        (self._channel,) = reports._channels

    def written(self) -> int:
        """Records that the writer has answered."""
        counts = self._reports.counts()[self._channel.name]
        assert not counts["failed"] and not counts["dropped"], counts
        return counts["written"]

    def settle(self, wanted: int) -> None:
        """Wait until so many records are written, and none waits."""
        end_s = time.monotonic() + _WAIT_S
        while self.written() < wanted or self._channel._waiting:
            if time.monotonic() > end_s:
                raise RuntimeError(f"{self.written()} of {wanted} records were written")
            time.sleep(0.05)
        time.sleep(0.2)  # for the last one's answer, and what follows it

    def during(self, do: Callable[[], None]) -> dict[str, float]:
        """Processor time, in seconds, of both while something is done, and how long it took."""
        process = self._channel._process
        assert process is not None
        began = time.monotonic(), time.process_time(), processor_s(process.pid)
        do()
        ended = time.monotonic(), time.process_time(), processor_s(process.pid)
        names = ("seconds", "own_s", "writer_s")
        return {n: b - a for n, a, b in zip(names, began, ended, strict=True)}


def measured(
    meter: Meter, report: Callable[[int], None], num: int, idle_s: float
) -> dict[str, float]:
    """Milliseconds of processor time that one call of ``report`` takes, beyond those of an idle
    time of the same length."""
    report(0)  # the first one makes what later ones find
    meter.settle(1)
    idle = meter.during(lambda: time.sleep(idle_s))

    def all_of_them() -> None:
        before = meter.written()
        for number in range(1, num + 1):
            report(number)
            time.sleep(1 / _RATE)
        meter.settle(before + num)

    busy = meter.during(all_of_them)
    idle_share = {name: idle[name] / idle["seconds"] for name in ("own_s", "writer_s")}
    each = {
        name.replace("_s", "_ms"): 1000 * (busy[name] - busy["seconds"] * idle_share[name]) / num
        for name in idle_share
    }
    return each | {"writer_idle_percent": 100 * idle_share["writer_s"]}


def settings_for(run_dir: Path, writer: str) -> Settings:
    """The demo's, with one writer on."""
    return load_settings([Path("configs/demo.yaml")], [f"run_dir={run_dir}", WRITERS[writer]], {})


def of_server(run_dir: Path, writer: str, num: int, idle_s: float) -> dict[str, float]:
    """One report of a living server."""
    from serving.build import build_service
    from serving.reporting import Reporter

    settings = settings_for(run_dir, writer)
    service = build_service(settings)
    service.start()
    try:
        with reports_of(settings, "server") as reports:
            reporter = Reporter(service, reports)
            return measured(Meter(reports), lambda _: reporter.report(), num, idle_s)
    finally:
        service.stop()


def of_trainer(run_dir: Path, writer: str, num: int, idle_s: float) -> dict[str, dict[str, float]]:
    """One event of each kind of a trainer."""
    settings = settings_for(run_dir, writer)
    found = {}
    for kind, values in events().items():
        with reports_of(settings, "trainer") as reports:
            reporter = TrainerReporter(reports, run_dir / "weights", every_s=0.0)
            few = num if kind != "gate" else max(1, num // 4)
            found[kind] = measured(
                Meter(reports),
                lambda n, of=reporter, k=kind, v=values: of.hear(k, v | {"step": n}),
                few,
                idle_s,
            )
    return found


def events() -> dict[str, dict[str, Any]]:
    """What a trainer tells its journal, with all figures that there are."""
    domains = {
        name: {"candidate": 1.5, "incumbent": 1.4, "static": 1.3, "num_traces": 4}
        for name in ("code", "tales")
    }
    payback = {"spent_s": 9.0, "saved_s": 12.0, "saved_by_learning_s": 4.0, "ratio": 0.5}
    return {
        "update": {
            "step": 1, "updates": 1, "loss": 1.25, "rows": 900, "seconds": 0.5, "grad_norm": 0.7,
            "lr": 1e-4, "staleness": 0.5, "alpha": [0.7, 0.6, 0.5, 0.4, 0.3],
        },
        "status": {
            "state": "training", "step": 1, "skipped": 0, "version": 3, "drift": {"level": 0.2},
            "payback": payback,
        },
        "gate": {
            "step": 1, "parent": 2, "passed": True, "candidate": 2.5, "incumbent": 2.4,
            "gain_error": 0.02, "num_traces": 12, "kind": "passed", "domains": domains,
            "speeds": {"candidate": 1.5, "incumbent": 1.45},
        },
    }  # fmt: skip


def shares(one: Mapping[str, Any]) -> dict[str, float]:
    """Percent of a core that reports take at the default intervals, by who pays it."""
    every_s = Settings().reports.every_s
    server, trainer = one["server"], one["trainer"]
    rates = {"update": 1 / every_s, "status": 1 / every_s, "gate": GATES_PER_S}
    learning = {
        part: sum(rates[kind] * trainer[kind][part] for kind in rates) / 10
        for part in ("own_ms", "writer_ms")
    }
    return {
        "server_process": server["own_ms"] / every_s / 10,
        "server_writer": server["writer_ms"] / every_s / 10 + server["writer_idle_percent"],
        "trainer_process": learning["own_ms"],
        "trainer_writer": learning["writer_ms"] + trainer["status"]["writer_idle_percent"],
    }


def read_back(run_dir: Path) -> dict[str, Any]:
    """Which figures and tables of the dashboard an offline run holds."""
    runs = offline_runs(run_dir)
    names = {name for one in runs.values() for name in one.names()}
    figures, patterns, tables = figures_of(GOLDEN.read_text())
    wanted = {*figures, *tables, *patterns}
    held = {n for n in wanted if n in names or any(re.fullmatch(n, name) for name in names)}
    return {
        "roles": sorted(runs),
        "wanted": len(wanted),
        "found": len(held),
        "missing": sorted(wanted - held),
        "points": {role: len(one.rows) for role, one in runs.items()},
    }


def rows_of(found: Mapping[str, Any]) -> Iterator[Row]:
    for writer, one in found["writers"].items():
        for who in ("server", "trainer"):
            parts = one["percent"]
            what = f"{writer} at the default intervals, {who}"
            own = parts[f"{who}_process"]
            yield at_most(what, "in its own process, % of a core", own, MOST_PERCENT)
            both = own + parts[f"{who}_writer"]
            yield at_most(what, "with the writer's process, % of a core", both, MOST_PERCENT)
    if demo := found.get("demo"):
        what = f"offline run of the demo, {demo['wanted']} figures and tables of the dashboard"
        yield at_most(what, "not found", demo["wanted"] - demo["found"], 0)


def main(
    num: Annotated[int, typer.Option(min=1, help="records of each kind")] = 250,
    idle: Annotated[float, typer.Option(help="seconds without records, to compare with")] = 10.0,
    writers: Annotated[
        str, typer.Option(help="writers to measure; empty: keep figures")
    ] = ",".join(WRITERS),
    demo: Annotated[
        Path | None, typer.Option(help="folder of a demo that was run with wandb.mode=offline")
    ] = None,
    publish: Annotated[bool, typer.Option(help="write rows/reports.json, too")] = False,
    out: Out = RESULTS / "reports.json",
) -> None:
    """Count the processor time of reports."""
    found: dict[str, Any] = {"writers": {}}
    if not writers and out.exists():
        found["writers"] = json.loads(out.read_text())["writers"]
    for writer in filter(None, writers.split(",")):
        with tempfile.TemporaryDirectory(prefix="reports-") as name:
            one: dict[str, Any] = {
                "server": of_server(Path(name) / "server", writer, num, idle),
                "trainer": of_trainer(Path(name) / "trainer", writer, num, idle),
            }
        found["writers"][writer] = one | {"percent": shares(one)}
        say(f"{writer}: {found['writers'][writer]}")
    if demo is not None:
        found["demo"] = read_back(demo)
        say(f"demo: {found['demo']}")
    write_result(out, found)
    rows = list(rows_of(found))
    if publish:
        write_rows("reports", rows, SOURCE)
    if failures := _failures(rows):
        say("; ".join(f"{row.row}, {row.measure}: {row.value}" for row in failures))
        raise typer.Exit(code=1)


def _failures(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.holds is False]


if __name__ == "__main__":
    typer.run(main)
