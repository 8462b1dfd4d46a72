"""A stream of requests against the static drafter, window by window, from finished demos.

    python -m examples.demo --requests 20000 --order both --run-dir runs/stream       # on a GPU
    python -m examples.demo --requests 6000 --order mixed --seed 7 --run-dir runs/scratch
    python -m benchmarks.real.stream runs/stream --scratch runs/scratch --publish

``static`` is what a team deploys the day before: the weights at the end of the first phase, frozen.
How well it does on a domain comes from the demo's replay of held-out prompts, under as many
clients. What it would have done for a window of live requests is that, mixed like the window:
every answer's tokens over the tokens per step of its domain make the steps that static would have
taken for it. The server chooses K for both, so a figure is what drafts came to and not what a
drafter could.

Of the stream come tokens per step after each shift, over all that follows the first phase (a warm
start, since static is then the newest), and back on the first domain; and tokens per second of
windows against the better of static and plain, which are replayed without a trainer on the card.
Of ``--scratch``, traffic of all domains at once from random weights, comes after how many requests
static is passed for good; the same against the last weights of the stream, which have learnt from
all of it.

Writes ``benchmarks/results/stream.json`` with a point for every ``CURVE`` requests and, with
``--publish``, ``rows/jobs.json``. Of several streams, rows are medians.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.harness.demos import recording_of
from benchmarks.harness.results import (
    RESULTS,
    Out,
    Row,
    at_least,
    at_most,
    write_result,
    write_rows,
)
from benchmarks.real.learning import tokens_per_step

SOURCE = "python -m benchmarks.real.stream"
WINDOW = 500
"""Requests over which speed and tokens per step are held against those of static."""
SHIFT_WINDOW = 100
"""The same where a shift is looked at."""
CURVE = 100
"""Requests of a point of the curves."""

Answers = Sequence[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Arm:
    """What an arm did on held-out prompts, by domain."""

    per_step: Mapping[str, float]
    """Tokens per step."""
    per_s: Mapping[str, float]
    """Tokens per second of the server."""


def arm_of(recording: Mapping[str, Any], arm: str) -> Arm:
    """An arm of the replay.

    Raises:
        ValueError: the demo has not replayed it.
    """
    per_step, per_s = dict[str, float](), dict[str, float]()
    replays = [one for one in recording["replays"] if one["arm"] == arm]
    for domain in {one["domain"] for one in replays}:
        own = [one for one in replays if one["domain"] == domain]
        per_step[domain] = tokens_per_step(own)
        per_s[domain] = sum(len(one["token_ids"]) for one in own) / sum(o["share_s"] for o in own)
    if not replays:
        raise ValueError(f"this demo has not replayed the arm {arm!r}")
    return Arm(per_step, per_s)


def _tokens(answers: Answers) -> int:
    """Tokens that steps of decoding emitted."""
    spent = [one["acceptance"] for one in answers]
    return sum(one["num_steps"] + one["num_accepted"] for one in spent)


def over(answers: Answers, arm: Arm) -> float:
    """Tokens per step of a window over those of an arm on the same mix of domains."""
    wanted = sum(_tokens([one]) / arm.per_step[one["domain"]] for one in answers)
    return wanted / sum(one["acceptance"]["num_steps"] for one in answers)


def speed_over(answers: Answers, arms: Sequence[Arm]) -> float:
    """Tokens per second of a window over those of the best arm on the same mix. The end of the
    first answer is the start of the window."""
    seconds = answers[-1]["finished_s"] - answers[0]["finished_s"]
    best = min(sum(a["num_tokens"] / arm.per_s[a["domain"]] for a in answers[1:]) for arm in arms)
    return float(best / seconds)


def rolling(answers: Answers, size: int, arm: Arm | None) -> list[float]:
    """``over`` of every window of so many answers, by the answers before it; without an arm, tokens
    per step."""
    wanted = [_tokens([a]) / (arm.per_step[a["domain"]] if arm else 1.0) for a in answers]
    steps = [one["acceptance"]["num_steps"] for one in answers]
    above, below = (np.cumsum([0.0, *values]) for values in (wanted, steps))
    found: list[float] = ((above[size:] - above[:-size]) / (below[size:] - below[:-size])).tolist()
    return found


def passed_for_good(ratios: Sequence[float]) -> int | None:
    """Answers before the window from which on none is below 1; ``None``: the last one is."""
    last_below = max((n for n, ratio in enumerate(ratios) if ratio < 1), default=-1)
    return last_below + 1 if last_below + 1 < len(ratios) else None


def requests_below(answers: Answers, arm: Arm) -> int | None:
    """Answers of a phase before the first window that is not below the arm; ``None``: all are."""
    ratios = rolling(answers, SHIFT_WINDOW, arm)
    return next((n for n, ratio in enumerate(ratios) if ratio >= 1), None)


def stream_figures(recording: Mapping[str, Any]) -> dict[str, Any]:
    """All that a stream shows."""
    static, plain = arm_of(recording, "static"), arm_of(recording, "plain")
    phases = [span["name"] for span in recording["phases"]]
    by_phase = {n: [a for a in recording["answers"] if a["phase"] == n] for n in phases}
    first, *others = by_phase.values()
    warm = [answer for answers in others for answer in answers]
    windows = {
        name: [
            speed_over(answers[n : n + WINDOW], (static, plain))
            for n in range(0, len(answers) - WINDOW + 1, WINDOW)
        ]
        for name, answers in by_phase.items()
    }
    below = {name: requests_below(by_phase[name], static) for name in phases[1:]}
    peak = max(rolling(first, WINDOW, None), default=None)
    again = tokens_per_step(others[-1])
    return {
        "requests": len(recording["answers"]),
        "failed_requests": recording["failed_requests"],
        "clients": recording["num_clients"],
        "temperature": recording["temperature"],
        "swaps": recording["swaps"],
        "static_per_step": static.per_step,
        "requests_below_static": below,
        "mean_over_static": over(warm, static),
        "mean_over_static_by_phase": {n: over(a, static) for n, a in by_phase.items()},
        "speed_over_best": windows,
        "peak_of_first": peak,
        "again": again,
        "again_over_peak": None if peak is None else again / peak,
        "curve": curve(recording["answers"], static),
    }


def curve(answers: Answers, arm: Arm) -> list[dict[str, Any]]:
    """A point for every ``CURVE`` answers."""
    parts = [answers[n : n + CURVE] for n in range(0, len(answers), CURVE)]
    return [
        {
            "requests": n * CURVE,
            "phase": part[0]["phase"],
            "at_s": part[0]["finished_s"],
            "version": part[0]["version"],
            "tokens_per_step": tokens_per_step(part),
            "over_static": over(part, arm),
        }
        for n, part in enumerate(parts)
    ]


def scratch_figures(scratch: Mapping[str, Any], stream: Mapping[str, Any]) -> dict[str, Any]:
    """Traffic from random weights, against arms of a stream."""
    answers, found = scratch["answers"], dict[str, Any]()
    for name in ("static", "tuned"):
        ratios = rolling(answers, WINDOW, arm_of(stream, name))
        found[f"passed_{name}"] = passed_for_good(ratios)
        found[f"first_over_{name}"] = next((n for n, r in enumerate(ratios) if r >= 1), None)
        found[f"last_over_{name}"] = ratios[-1] if ratios else None
    return {"requests": len(answers), **found, "curve": curve(answers, arm_of(stream, "static"))}


def rows_of(figures: Mapping[str, Any]) -> list[Row]:
    """The claims, with their goals; medians of the streams."""
    streams = figures["streams"]
    some = streams[0]
    what = f"stream of {some['requests']:,} requests, {some['clients']} clients, temperature "
    what += f"{some['temperature']:g}"
    if len(streams) > 1:
        what += f", median of {len(streams)} seeds"

    def median(of: Callable[[dict[str, Any]], float | None]) -> float | None:
        found = [value for one in streams if (value := of(one)) is not None]
        return statistics.median(found) if len(found) == len(streams) else None

    def slowest(one: dict[str, Any]) -> float | None:
        return _none_if_any(list(one["requests_below_static"].values()), max)

    def worst(one: dict[str, Any], phases: slice) -> float | None:
        ratios = [r for found in list(one["speed_over_best"].values())[phases] for r in found]
        return min(ratios, default=None)

    rows = list(scratch_rows(figures.get("scratch")))
    below = median(slowest)
    measure = "requests under static after a shift, the slowest of its shifts"
    if below is None:
        rows.append(Row(f"2. {what}", measure, "a phase ended under it", "at most 200", False))
    else:
        rows.append(at_most(f"2. {what}", measure, below, 200))
    speed = f"tokens/s of {WINDOW} requests over the better of static and plain, worst window"
    return [
        *rows,
        at_least(
            f"3. {what}",
            "tokens per step after the first phase over static's",
            median(lambda one: one["mean_over_static"]),
            1.2,
        ),
        at_least(f"4. {what}", speed, median(lambda one: worst(one, slice(None))), 0.98),
        Row(
            f"4. {what}",
            f"{speed}, after the first phase",
            median(lambda one: worst(one, slice(1, None))),
            None,
            None,
        ),
        at_least(
            f"5. {what}",
            f"tokens per step back on the first domain over its best {WINDOW} requests before",
            median(lambda one: one["again_over_peak"]),
            0.97,
        ),
    ]


def scratch_rows(scratch: Mapping[str, Any] | None) -> list[Row]:
    """After how many requests from random weights static is passed."""
    if scratch is None:
        return []
    what = f"1. all domains at once from random weights, {scratch['requests']:,} requests"
    names = {"static": "static", "tuned": "the stream's last weights with the index"}
    rows = []
    for key, name in names.items():
        passed, measure = scratch[f"passed_{key}"], f"requests until {name} is passed for good"
        if passed is None:
            rows.append(Row(what, measure, "not within them", "at most 4000", False))
        else:
            rows.append(at_most(what, measure, passed, 4000))
    return rows


def _none_if_any(values: Sequence[int | None], of: Callable[[Sequence[int]], int]) -> int | None:
    known = [value for value in values if value is not None]
    return of(known) if known and len(known) == len(values) else None


def main(
    runs: Annotated[list[Path], typer.Argument(help="folders of finished streams")],
    scratch: Annotated[Path | None, typer.Option(help="one from random weights, mixed")] = None,
    publish: Annotated[bool, typer.Option(help="write rows/jobs.json, too")] = False,
    out: Out = RESULTS / "stream.json",
) -> None:
    """Read finished demos, and write what they show."""
    recordings = [recording_of(run) for run in runs]
    figures: dict[str, Any] = {"streams": [stream_figures(one) for one in recordings]}
    if scratch is not None:
        found = recording_of(scratch)
        figures["scratch"] = scratch_figures(found, recordings[0])
    write_result(out, figures)
    rows = rows_of(figures)
    if publish:
        write_rows("jobs", rows, SOURCE)
    for row in rows:
        typer.echo(f"{row.row}: {row.measure}: {row.value} (goal: {row.goal}, holds: {row.holds})")


if __name__ == "__main__":
    typer.run(main)
