"""What learning brought in finished demos of a real target on one GPU.

    python -m benchmarks.demo --target real --run-dir runs/bench_real    # on the GPU; six minutes
    python -m benchmarks.real.learning runs/bench_real/0

Reads the report and recording of each run, its trainer's journal and status, and its server's log.
Rows trained per second are those of the live loop, server and trainer sharing the card. The way of
a version is measured from the start of its gate, which follows its last update at once, to the
server's log line of the swap; both processes run on one machine and share its clock. Of several
runs, rows are medians.

Writes ``learning.json``, ``learning_mps.json`` with ``--mps``, ``learning_own.json`` with
``--own-gpu`` or ``learning_auto.json`` with ``--auto``, and rows of ``rows/learning.json`` in
``benchmarks/results``.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
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


def swaps_in(server_log: str) -> dict[int, float]:
    """Unix time of each version's last swap."""
    return {
        int(version): datetime.strptime(at, "%Y-%m-%d %H:%M:%S,%f").timestamp()
        for at, version in SWAPPED.findall(server_log)
    }


def seconds_to_swap(events: list[dict[str, Any]], server_log: str) -> list[float]:
    """From the start of a version's gate to its swap, for each version whose swap the log shows."""
    swapped = swaps_in(server_log)
    found, began_s = [], 0.0
    for event in events:
        if event["event"] == "gate":
            began_s = event["unix_ms"] / 1000 - event["seconds"]
        elif event["event"] == "published" and event["version"] in swapped:
            found.append(swapped[event["version"]] - began_s)
    return found


def live_figures(recording: dict[str, Any]) -> dict[str, Any]:
    """What live requests saw, with the K that the policy chose: from when on they got
    ``GOOD_TOKENS`` tokens a step, and after how many requests of a phase the next version came, be
    it one that was trained before the shift."""
    answers, phases = recording["answers"], recording["phases"]
    good = next(
        (
            n
            for n in range(WINDOW, len(answers))
            if tokens_per_step(answers[n - WINDOW : n]) >= GOOD_TOKENS
        ),
        None,
    )
    first_swap: dict[str, int] = {}
    for phase in phases:
        swaps = [
            change["at_s"]
            for change in recording["changes"]
            if change["at_s"] >= phase["started_s"] and not change["rolled_back"]
        ]
        until_s = min(swaps, default=phase["ended_s"])
        first_swap[phase["name"]] = sum(
            a["phase"] == phase["name"] and a["finished_s"] < until_s for a in answers
        )
    return {
        "requests_to_good": good,
        "seconds_to_good": good and answers[good]["finished_s"] - phases[0]["started_s"],
        "requests_to_first_swap": first_swap,
    }


def window_figures(
    recording: dict[str, Any],
    report: dict[str, Any],
    events: Sequence[dict[str, Any]] = (),
    began_unix_s: float = 0.0,
) -> dict[str, Any]:
    """Live tokens per second of every ``LIVE_WINDOW`` requests of a phase, relative to the best
    replayed arm among plain, static and index, and to plain decoding alone.

    The arms were replayed later, without a trainer, in turns of a second or two that begin with as
    many clients as the traffic has and end with fewer, a fifth on average, so they were a little
    slower than they would be under the traffic. In the first phase there was no static drafter yet:
    the one that is replayed there is what the server has learnt by the end of that phase. What a
    user could have had instead is plain decoding.

    Args:
        events: of the trainer's journal, for its share of the time.
        began_unix_s: start of the recording's clock.

    Returns:
        Ratios ``by_phase``; the ``worst`` one, the worst after the first phase (``worst_later``),
        and the worst over plain decoding alone (``worst_over_plain``); and what a window was made
        of: tokens a step, draft tokens a step, steps of a request a second, the share of its time
        in which the trainer worked, by its own count, and swaps.
    """
    worked = _work_of(events, began_unix_s)
    windows = []
    for phase in report["phases"]:
        own = [a for a in recording["answers"] if a["phase"] == phase["name"]]
        best = max(phase[f"{arm}_tokens_per_s"] or 0.0 for arm in ("plain", "static", "index"))
        plain = phase["plain_tokens_per_s"]
        for start in range(0, len(own) - LIVE_WINDOW + 1, LIVE_WINDOW) if best else ():
            these = own[start : start + LIVE_WINDOW]
            speed = _tokens_per_s(these)
            made = _made_of(these, worked, recording["changes"])
            ratios = {"over_best": speed / best, "over_plain": plain and speed / plain}
            windows.append({"phase": phase["name"], "first_request": start, **ratios, **made})
    first = report["phases"][0]["name"]
    later = [w for w in windows if w["phase"] != first]
    over_plain = [w["over_plain"] for w in windows if w["over_plain"]]
    return {
        "by_phase": {
            phase["name"]: [w["over_best"] for w in windows if w["phase"] == phase["name"]]
            for phase in report["phases"]
        },
        "windows": windows,
        "worst": min((w["over_best"] for w in windows), default=None),
        "worst_later": min((w["over_best"] for w in later), default=None),
        "worst_over_plain": min(over_plain, default=None),
    }


_Work = list[tuple[float, float, float]]
"""From, until and seconds of the trainer's work between them, by the recording's clock."""


def _work_of(events: Sequence[dict[str, Any]], began_unix_s: float) -> _Work:
    """Updates that one event tells of lie between it and the event before it."""
    work, last_s = [], 0.0
    for event in events:
        at_s = event["unix_ms"] / 1000 - began_unix_s
        if event["event"] == "gate":
            work.append((at_s - event["seconds"], at_s, event["seconds"]))
        elif event["event"] == "update":
            from_s = max(last_s, at_s - max(event["seconds"], 1.0))
            work.append((from_s, at_s, min(event["seconds"], at_s - from_s)))
        last_s = at_s
    return work


def _made_of(
    answers: list[dict[str, Any]], work: _Work, changes: list[dict[str, Any]]
) -> dict[str, Any]:
    from_s, until_s = answers[0]["finished_s"], answers[-1]["finished_s"]
    spent = [answer["acceptance"] for answer in answers]
    steps = sum(s["num_steps"] for s in spent)
    worked_s = sum(
        seconds * max(0.0, min(until_s, end_s) - max(from_s, start_s)) / (end_s - start_s)
        for start_s, end_s, seconds in work
        if end_s > start_s
    )
    return {
        "seconds": until_s - from_s,
        "tokens_per_step": tokens_per_step(answers),
        "draft_tokens_per_step": sum(s["num_proposed"] for s in spent) / steps,
        "request_steps_per_s": steps / (until_s - from_s),
        "trainer_share": worked_s / (until_s - from_s) if work else None,
        "swaps": sum(from_s <= change["at_s"] < until_s for change in changes),
    }


def _tokens_per_s(answers: list[dict[str, Any]]) -> float:
    """Of answers in the order in which they finished, the first one's end being the start."""
    seconds = answers[-1]["finished_s"] - answers[0]["finished_s"]
    tokens = sum(int(a["num_tokens"]) for a in answers[1:])
    return float(tokens / seconds)


def tokens_per_step(answers: Sequence[Mapping[str, Any]]) -> float:
    """Of all steps of some recorded answers, each request counting as one."""
    spent = [answer["acceptance"] for answer in answers]
    return 1 + sum(s["num_accepted"] for s in spent) / sum(s["num_steps"] for s in spent)


def rows_of(
    figures: Sequence[dict[str, Any]],
    *,
    mps: bool = False,
    own_gpu: bool = False,
    auto: bool = False,
) -> list[Row]:
    """The claims, with their goals; medians of the runs."""
    report = figures[0]["report"]
    clients = f"{report['num_clients']} clients, temperature {report['temperature']:g}"
    if mps:
        clients += ", CUDA MPS"
    if auto:
        clients += ", trainer.duty=auto"
    if own_gpu:
        clients += ", trainer on a second card"
    if len(figures) > 1:
        clients += f", median of {len(figures)} seeds"
    shared = clients if own_gpu else f"shared card, {clients}"

    def median(of: Callable[[dict[str, Any]], float | None]) -> float | None:
        found = [value for one in figures if (value := of(one)) is not None]
        return statistics.median(found) if len(found) == len(figures) else None

    lost = sum(
        one["traces"][why]
        for one in figures
        for why in ("evicted_unread", "damaged", "quarantined")
    )
    wanted = None if auto else 1e5 if own_gpu else 4e4
    return [
        at_least(shared, "rows trained per second, live", median(_rows_per_s), wanted),
        Row(shared, "traces lost before they were read", lost, "none", not lost),
        at_least(
            clients,
            "tuned over static, tokens/s, shifted",
            median(lambda one: one["report"]["speedup_vs_static"]),
            1.15,
        ),
        at_least(
            clients,
            "tuned over plain, tokens/s, shifted",
            median(lambda one: one["report"]["speedup_vs_plain"]),
            1.35,
        ),
        Row(
            clients,
            "drafter alone, newest over frozen weights, tokens/s, shifted",
            median(lambda one: one["report"]["drafter_alone_speedup_vs_static"]),
            None,
            None,
        ),
        at_most(
            clients,
            f"requests from random weights to {GOOD_TOKENS} live tokens a step",
            median(lambda one: one["live"]["requests_to_good"]),
            2000,
        ),
        at_most(
            clients,
            f"seconds from random weights to {GOOD_TOKENS} live tokens a step",
            median(lambda one: one["live"]["seconds_to_good"]),
            60,
        ),
        at_most(
            clients,
            "requests from a shift to the next version, median",
            median(_requests_to_swap),
            200,
        ),
        at_least(
            clients,
            "tokens per step back on the first domain, over the first time",
            median(_kept),
            0.97,
        ),
        at_most(
            clients,
            "seconds from gate to swap, median",
            median(lambda one: one["seconds_to_swap"]),
            1.5,
        ),
        at_least(
            shared,
            f"worst window of {LIVE_WINDOW} live requests over the best of plain, static and index",
            median(lambda one: one["windows"]["worst"]),
            0.98,
        ),
        at_least(
            shared,
            "the same after the first domain, from when on there is a frozen drafter",
            median(lambda one: one["windows"]["worst_later"]),
            0.98,
        ),
        at_least(
            shared,
            f"worst window of {LIVE_WINDOW} live requests over plain decoding",
            median(lambda one: one["windows"]["worst_over_plain"]),
            0.98,
        ),
    ]


def _rows_per_s(figures: dict[str, Any]) -> float:
    return float(figures["loop"]["rows_per_s"])


def _requests_to_swap(figures: dict[str, Any]) -> float:
    later = [phase["name"] for phase in figures["report"]["phases"][1:]]
    return statistics.median(figures["live"]["requests_to_first_swap"][name] for name in later)


def _kept(figures: dict[str, Any]) -> float:
    first, last = figures["report"]["phases"][0], figures["report"]["phases"][-1]
    kept = last["live_tokens_per_step_last_quarter"] / first["live_tokens_per_step_last_quarter"]
    return float(kept)


_FILES = ("report.json", "recording.json", "trainer/log.jsonl", "trainer/status.json",
          "logs/server.log")  # fmt: skip


def figures_of(run: Path) -> dict[str, Any]:
    """All that one run shows.

    Raises:
        ValueError: it is no finished demo, or its trainer learned too little to say how fast.
    """
    if lacking := [name for name in _FILES if not (run / name).is_file()]:
        raise ValueError(f"{run} holds no {lacking[0]}; name the folder of a finished demo")
    lines = (run / "trainer" / "log.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    named = [event["event"] for event in events]
    if named.count("update") < 2 or not {"gate", "published"} <= set(named):
        raise ValueError(
            f"the trainer of {run} made too few updates, or published no version; a longer demo is "
            f"needed"
        )
    report = json.loads((run / "report.json").read_text())
    server_log = (run / "logs" / "server.log").read_text()
    lags = seconds_to_swap(events, server_log)
    recording = json.loads((run / "recording.json").read_text())
    return {
        "report": report,
        "loop": loop_figures(events),
        "live": live_figures(recording),
        "windows": window_figures(recording, report, events, _began_unix_s(recording, server_log)),
        "traces": json.loads((run / "trainer" / "status.json").read_text())["traces"],
        "seconds_to_swap": statistics.median(lags) if lags else None,
        "swaps_timed": len(lags),
    }


def _began_unix_s(recording: dict[str, Any], server_log: str) -> float:
    """Unix time at which the recording's clock was 0, by swaps that the server's log shows."""
    swapped = swaps_in(server_log)
    found = [
        swapped[change["version"]] - change["at_s"]
        for change in recording["changes"]
        if change["version"] in swapped
    ]
    return statistics.median(found) if found else 0.0


def main(
    runs: Annotated[list[Path], typer.Argument(help="folders of finished demos")],
    mps: Annotated[bool, typer.Option("--mps", help="they shared the GPU by CUDA MPS")] = False,
    own_gpu: Annotated[bool, typer.Option("--own-gpu", help="the trainer had its own")] = False,
    auto: Annotated[bool, typer.Option("--auto", help="with trainer.duty=auto")] = False,
    out: Annotated[Path | None, typer.Option(help="result file")] = None,
) -> None:
    """Read runs and write what they show."""
    if mps + own_gpu + auto > 1:
        raise typer.BadParameter("give one of --mps, --own-gpu and --auto")
    how = "mps" if mps else "own" if own_gpu else "auto" if auto else None
    try:
        figures = [figures_of(run) for run in runs]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="RUNS") from None
    name = "learning" if how is None else f"learning_{how}"
    about = {"mps": mps, "own_gpu": own_gpu, "auto": auto, "runs": figures}
    out = RESULTS / f"{name}.json" if out is None else out
    write_result(out, about)
    rows = rows_of(figures, mps=mps, own_gpu=own_gpu, auto=auto)
    flag = {"mps": " --mps", "own": " --own-gpu", "auto": " --auto"}.get(how or "", "")
    write_rows("learning", rows, f"python -m benchmarks.real.learning{flag}", out.parent)
    for row in rows:
        typer.echo(f"{row.measure}: {row.value} (goal: {row.goal}, holds: {row.holds})")


if __name__ == "__main__":
    typer.run(main)
