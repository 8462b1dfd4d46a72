"""What learning brought in a finished demo of a real target on one GPU.

    python -m benchmarks.demo --target real --run-dir runs/bench_real    # on the GPU; six minutes
    python -m benchmarks.real.learning runs/bench_real/0

Reads the run's report and recording, the trainer's journal and status, and the server's log. Rows
trained per second are those of the live loop, server and trainer sharing the card. The way of a
version is measured from the start of its gate, which follows its last update at once, to the
server's log line of the swap; both processes run on one machine and share its clock.

Writes ``benchmarks/results/learning.json`` and ``benchmarks/results/rows/learning.json``.
"""

from __future__ import annotations

import json
import re
import statistics
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.harness.results import RESULTS, Row, at_least, at_most, write_result, write_rows

GOOD_TOKENS = 1.8
WINDOW = 128
"""Requests over which live tokens a step are averaged."""
LIVE_WINDOW = 500
"""Requests over which live speed is held against the other arms."""
SWAPPED = re.compile(r"^(\S+ \S+) INFO serving\.swap\.in_force: swapped to version (\d+)$", re.M)


def loop_figures(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Updates, gates and versions of the live loop."""
    updates = [e for e in events if e["event"] == "update"]
    gates = [e for e in events if e["event"] == "gate"]
    seconds = (updates[-1]["unix_ms"] - updates[0]["unix_ms"]) / 1000
    return {
        "updates": sum(e["updates"] for e in updates),
        "rows_per_s": sum(e["rows"] for e in updates[1:]) / seconds,
        "gate_s": statistics.median(e["seconds"] for e in gates),
        "gates": len(gates),
        "gates_passed": sum(e["passed"] for e in gates),
        "first_version_s": (_first(events, "published") - _first(events, "started")) / 1000,
        "overlap_by_position": updates[-1]["alpha"],
    }


def _first(events: list[dict[str, Any]], name: str) -> int:
    return next(int(e["unix_ms"]) for e in events if e["event"] == name)


def seconds_to_swap(events: list[dict[str, Any]], server_log: str) -> list[float]:
    """From the start of a version's gate to its swap, for each version whose swap the log shows."""
    swapped = {
        int(version): datetime.strptime(at, "%Y-%m-%d %H:%M:%S,%f").timestamp()
        for at, version in SWAPPED.findall(server_log)
    }
    found, began_s = [], 0.0
    for event in events:
        if event["event"] == "gate":
            began_s = event["unix_ms"] / 1000 - event["seconds"]
        elif event["event"] == "published" and event["version"] in swapped:
            found.append(swapped[event["version"]] - began_s)
    return found


def live_figures(recording: dict[str, Any]) -> dict[str, Any]:
    """What live requests saw, with the K that the policy chose: from when on they got
    ``GOOD_TOKENS`` tokens a step, and after how many requests of a phase a version came."""
    answers, phases = recording["answers"], recording["phases"]
    good = next(
        (
            n
            for n in range(WINDOW, len(answers))
            if _tokens_per_step(answers[n - WINDOW : n]) >= GOOD_TOKENS
        ),
        None,
    )
    first_swap: dict[str, int] = {}
    for phase in phases:
        swaps = [c["at_s"] for c in recording["changes"] if c["at_s"] >= phase["started_s"]]
        until_s = min(swaps, default=phase["ended_s"])
        first_swap[phase["name"]] = sum(
            a["phase"] == phase["name"] and a["finished_s"] < until_s for a in answers
        )
    return {
        "requests_to_good": good,
        "seconds_to_good": good and answers[good]["finished_s"] - phases[0]["started_s"],
        "requests_to_first_swap": first_swap,
    }


def window_figures(recording: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """Live tokens per second of every ``LIVE_WINDOW`` requests of a phase, relative to the best
    replayed arm among plain, static and index. The trainer shares the card in the traffic and not
    in the replay, whose turns also end with fewer clients than they began with."""
    found: dict[str, list[float]] = {}
    for phase in report["phases"]:
        own = [a for a in recording["answers"] if a["phase"] == phase["name"]]
        best = max(phase[f"{arm}_tokens_per_s"] or 0.0 for arm in ("plain", "static", "index"))
        starts = range(0, len(own) - LIVE_WINDOW + 1, LIVE_WINDOW)
        windows = [own[start : start + LIVE_WINDOW] for start in starts]
        found[phase["name"]] = [_tokens_per_s(window) / best for window in windows if best]
    every = [ratio for ratios in found.values() for ratio in ratios]
    return {"by_phase": found, "worst": min(every, default=None)}


def _tokens_per_s(answers: list[dict[str, Any]]) -> float:
    """Of answers in the order in which they finished, the first one's end being the start."""
    seconds = answers[-1]["finished_s"] - answers[0]["finished_s"]
    tokens = sum(int(a["num_tokens"]) for a in answers[1:])
    return float(tokens / seconds)


def _tokens_per_step(answers: list[dict[str, Any]]) -> float:
    spent = [answer["acceptance"] for answer in answers]
    return 1 + sum(s["num_accepted"] for s in spent) / sum(s["num_steps"] for s in spent)


def rows_of(figures: dict[str, Any]) -> list[Row]:
    """The claims, with their goals."""
    report, loop, traces = figures["report"], figures["loop"], figures["traces"]
    clients = f"{report['num_clients']} clients, temperature {report['temperature']:g}"
    first, last = report["phases"][0], report["phases"][-1]
    kept = last["live_tokens_per_step_last_quarter"] / first["live_tokens_per_step_last_quarter"]
    live = figures["live"]
    later = [phase["name"] for phase in report["phases"][1:]]
    to_swap = statistics.median(live["requests_to_first_swap"][name] for name in later)
    shared = f"shared card, {clients}"
    lost = traces["evicted_unread"] + traces["damaged"] + traces["quarantined"]
    return [
        at_least(shared, "rows trained per second, live", loop["rows_per_s"], 4e4),
        Row(shared, "traces lost before they were read", lost, "none", not lost),
        at_least(
            clients, "tuned over static, tokens/s, shifted", report["speedup_vs_static"], 1.15
        ),
        at_least(clients, "tuned over plain, tokens/s, shifted", report["speedup_vs_plain"], 1.35),
        Row(
            clients,
            "drafter alone, newest over frozen weights, tokens/s, shifted",
            report["drafter_alone_speedup_vs_static"],
            None,
            None,
        ),
        at_most(
            clients,
            f"requests from random weights to {GOOD_TOKENS} live tokens a step",
            live["requests_to_good"],
            2000,
        ),
        at_most(
            clients,
            f"seconds from random weights to {GOOD_TOKENS} live tokens a step",
            live["seconds_to_good"],
            60,
        ),
        at_most(clients, "requests from a shift to the next version, median", to_swap, 200),
        at_least(
            clients, "tokens per step back on the first domain, over the first time", kept, 0.97
        ),
        at_most(clients, "seconds from gate to swap, median", figures["seconds_to_swap"], 1.5),
        at_least(
            shared,
            f"worst window of {LIVE_WINDOW} live requests over the best of plain, static and index",
            figures["windows"]["worst"],
            0.98,
        ),
    ]


def main(
    run: Annotated[Path, typer.Argument(help="folder of a finished demo")],
    out: Annotated[Path, typer.Option(help="result file")] = RESULTS / "learning.json",
) -> None:
    """Read a run and write what it shows."""
    lines = (run / "trainer" / "log.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    report = json.loads((run / "report.json").read_text())
    lags = seconds_to_swap(events, (run / "logs" / "server.log").read_text())
    recording = json.loads((run / "recording.json").read_text())
    figures = {
        "report": report,
        "loop": loop_figures(events),
        "live": live_figures(recording),
        "windows": window_figures(recording, report),
        "traces": json.loads((run / "trainer" / "status.json").read_text())["traces"],
        "seconds_to_swap": statistics.median(lags) if lags else None,
        "swaps_timed": len(lags),
    }
    write_result(out, figures)
    write_rows("learning", rows_of(figures), "python -m benchmarks.real.learning")
    for row in rows_of(figures):
        typer.echo(f"{row.measure}: {row.value} (goal: {row.goal}, holds: {row.holds})")


if __name__ == "__main__":
    typer.run(main)
