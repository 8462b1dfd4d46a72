"""Speeds of fixed K predicted from a log of random K, against live turns of the same K.

    python -m benchmarks.off_policy                        # about ten minutes on two cores
    python -m benchmarks.off_policy --batches 4 --steps 2000

One engine decodes sampled text of three domains without a pause, in turns of some steps: most turns
take every K with the same probability and make the log, the others take one K throughout. Turns
come in random order and share one stream of requests, so that log and live turns have the same
texts and the same state of the machine. The first steps of a turn do not count: they still show
what the turn before did.

Speeds are relative to plain decoding of the same sort, live over live and estimated over estimated.
They are given in wall time and in time of the engine's thread: on a machine that other work shares,
wall times of neighbouring turns differ by more than any K does. Both sides scatter; ``spread`` is
the half width of the 95 % interval of their quotient by the bootstraps of both, the difference that
chance alone explains. Writes ``off_policy.json`` and ``rows/off_policy.json``.
"""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.harness.arms import LEARNED
from benchmarks.harness.engines import build
from benchmarks.harness.loops import Feed
from benchmarks.harness.policy import PolicySwitch
from benchmarks.harness.results import RESULTS, Out, Row, at_most, say, write_result, write_rows
from benchmarks.policies import requests, settings_of
from configs.schema import Settings
from policies.costs import times_of
from policies.evaluation import off_policy_rate
from policies.fixed import FixedPolicy
from policies.interface import Decision, DraftPolicy, Outcome
from policies.logged import LoggedRow, LoggedStep
from policies.off_policy import Estimate, Reward, throughput
from policies.replayed_log import ReplayedLog
from serving.engine.loop import Engine

LIVE_KS = (0, 1, 2, 4, 8)
LOG_TURNS = 6
"""Turns of the log for each live turn of a K."""
TURN_STEPS, SKIPPED = 32, 3
CLOCKS = ("processor", "wall")


class _Noting:
    """Passes everything on to a policy, and notes outcomes with the time of this thread."""

    def __init__(self, inner: DraftPolicy) -> None:
        self._inner = inner
        self.noted: list[tuple[Outcome, float]] = []
        self._began_s = time.thread_time()

    def rest(self) -> Decision | None:
        # A step begins here; prompts are computed before it or behind it.
        self._began_s = time.thread_time()
        return self._inner.rest()

    def observe(self, outcome: Outcome) -> None:
        self.noted.append((outcome, time.thread_time() - self._began_s))
        self._inner.observe(outcome)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def turns(
    engine: Engine, switch: PolicySwitch, settings: Settings, batch: int, num_steps: int
) -> dict[int | None, list[LoggedStep]]:
    """Steps of the log under ``None``, and of the live turns by K; ``step_s`` is wall time, and the
    time of the thread is kept as a second step behind each."""
    feed = Feed(engine, requests(settings, f"turns-{batch}"), batch)
    order: list[int | None] = [*LIVE_KS, *[None] * LOG_TURNS]
    found: dict[int | None, list[LoggedStep]] = {k: [] for k in (None, *LIVE_KS)}
    luck = random.Random(batch)
    while len(found[None]) < 2 * num_steps:
        luck.shuffle(order)
        for k in order:
            policy = switch.own if k is None else FixedPolicy(LEARNED, k, needs_match=False)
            noting = _Noting(policy)
            switch.play(noting)
            while len(noting.noted) < TURN_STEPS:
                feed.step()
            for number, (outcome, thread_s) in enumerate(noting.noted):
                if outcome.batch == batch and outcome.rows:
                    step = logged(outcome, is_timed=number >= SKIPPED)
                    found[k] += step, replace(step, step_s=thread_s)
    feed.stop()
    return found


def logged(outcome: Outcome, *, is_timed: bool) -> LoggedStep:
    """A step as its traces would tell it."""
    decision, rows = outcome.decision, outcome.rows
    return LoggedStep(
        drafter=decision.drafter, draft_k=decision.draft_k, batch=outcome.batch,
        propensity=decision.propensity, policy=decision.policy, version=outcome.version,
        step_s=outcome.step_s,
        rows=tuple(map(LoggedRow, rows.num_verified, rows.num_accepted)),
        is_timed=is_timed and not outcome.has_prefill,
    )  # fmt: skip


def live_rate(steps: Sequence[LoggedStep], k: int) -> Estimate | None:
    """Tokens per second of steps that ran at K, prompts left out, with its interval."""
    kept = [step for step in steps if step.is_timed and step.draft_k == k]
    tokens = np.array([step.tokens for step in kept])
    seconds = np.array([step.step_s for step in kept])
    found = throughput(Reward(tokens), Reward(seconds), np.ones(len(kept)))
    return None if found is None else found.estimate()


def estimates(steps: Sequence[LoggedStep], max_draft: int) -> dict[int, Estimate | None]:
    """Doubly robust speed of each K from the log."""
    log = ReplayedLog.of(steps, LEARNED, times_of(steps), max_draft)
    return {k: off_policy_rate(log, np.full(len(log.steps), k, np.int64)) for k in LIVE_KS}


def compared(
    found: dict[int | None, list[LoggedStep]], batch: int, max_draft: int
) -> Iterator[dict[str, Any]]:
    """Live and estimated speed over plain decoding, for each clock and K."""
    for at, clock in enumerate(CLOCKS[::-1]):
        estimated = estimates(found[None][at::2], max_draft)
        live = {k: live_rate(found[k][at::2], k) for k in LIVE_KS}
        for k in LIVE_KS[1:]:
            four = estimated[k], estimated[0], live[k], live[0]
            known = [one for one in four if one is not None]
            if len(known) < len(four):
                continue
            ours, our_plain, theirs, their_plain = known
            ratio = (ours.value / our_plain.value) / (theirs.value / their_plain.value)
            yield {
                "batch": batch, "clock": clock, "k": k,
                "live": theirs.value / their_plain.value,
                "estimated": ours.value / our_plain.value,
                "difference": ratio - 1,
                "spread": spread(known),
                "live_rate": asdict(theirs), "estimated_rate": asdict(ours),
            }  # fmt: skip


def spread(quotients: Sequence[Estimate]) -> float:
    """Half width of the 95 % interval of a quotient of independent estimates, relative to it."""
    widths = [math.log(one.high / one.low) / 2 for one in quotients]
    return math.sqrt(sum(width**2 for width in widths))


def rows_of(rows: Sequence[dict[str, Any]]) -> Iterator[Row]:
    """The claims, by clock."""
    for clock in CLOCKS:
        own = [row for row in rows if row["clock"] == clock]
        worst = max(own, key=lambda row: abs(row["difference"]))
        inside = sum(abs(row["difference"]) <= row["spread"] for row in own)
        where = f"bundled target, temperature 0.7, {clock} time"
        yield at_most(
            f"{where}: batch {worst['batch']}, K = {worst['k']}, the worst of {len(own)}",
            "error of off-policy speed over plain, against live turns",
            abs(worst["difference"]),
            0.02,
        )
        yield Row(
            f"{where}: {len(own)} comparisons", "of them explained by their scatter (95 %)",
            float(inside), None, None,
        )  # fmt: skip


def main(
    steps: Annotated[int, typer.Option(min=1000, help="steps of the log at each load")] = 2000,
    batches: Annotated[list[int] | None, typer.Option(help="loads")] = None,
    out: Out = RESULTS / "off_policy.json",
) -> None:
    """Decode in turns, and compare."""
    torch.set_num_threads(1)
    loads = batches or [1, 4, 8]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(Path(folder), max(loads))
        service, switch = build(settings)
        for batch in loads:
            found = turns(service.engine, switch, settings, batch, steps)
            rows += compared(found, batch, settings.drafter.max_draft)
            for row in rows:
                if row["batch"] == batch:
                    say(
                        "{clock:9} batch {batch} K {k}: live {live:.3f}, estimated "
                        "{estimated:.3f}, {difference:+.3f} (scatter {spread:.3f})".format(**row)
                    )
        service.engine.stop()
    if not rows:
        say("too few live steps to compare: ask for more --steps")
        raise typer.Exit(code=1)
    write_result(out, {"steps": steps, "batches": loads, "rows": rows})
    write_rows("off_policy", rows_of(rows), "python -m benchmarks.off_policy", out.parent)
    say(f"written: {out}")


if __name__ == "__main__":
    typer.run(main)
