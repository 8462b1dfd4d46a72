"""The default policy against the best fixed (drafter, K) over half a second, on a simulated card.

    python -m benchmarks.half_second --offered-by mix,all    # five minutes on a quiet core

A small target serves with an index on the device, a neural drafter, and the mix in which text
begins each draft. A stretch is ``STEPS`` steps: half a second at one request. It comes after
nothing (without and with the start-up profile of step times), or after such a stretch of other
traffic on the same server. Figures are the mean over seeds of the speed over that of the best
fixed arm in hindsight, and the least of them. ``mix`` is a server that offers plain decoding, the
index and the mix, as the engine does; ``all`` is one that offers the neural drafter alone, too.

The card is that of ``tests/policies/on_device.py``; no GPU. Writes ``half_second.json`` and
``rows/half_second.json`` in ``benchmarks/results``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from statistics import fmean
from typing import Annotated, Any

import typer

from benchmarks.harness.results import RESULTS, Out, Row, write_result, write_rows
from tests.policies.on_device import DOMAINS, Card, card, served
from tests.policies.simulated import arms, best_fixed_speed, fixed_speed

BATCHES = (1, 8, 32)
STEPS = 700
GOAL = 0.98
BEFORE = {"nothing": None, "profile": None, "index": "index", "eagle": "eagle", "bad": "both bad"}
"""What comes before a stretch, and the traffic of that; ``nothing`` is without a profile."""


def cases(batch: int, *, has_all: bool) -> Iterator[tuple[str, str, Card, Card | None]]:
    """Traffic and what comes before it, as names and as cards."""
    cards = {
        name: replace(card(*kept, batch=batch), offers_neural=has_all)
        for name, kept in DOMAINS.items()
    }
    for name, world in cards.items():
        for before, other in BEFORE.items():
            if other != name:
                yield name, before, world, cards.get(other or "")


def stretch(world: Card, before: Card | None, seed: int, *, profiled: bool) -> float:
    """Speed over that of the best fixed arm."""
    server = served(world, seed, profiled=profiled)
    if before is not None:
        server.run(before, STEPS)
    return server.run(world, STEPS).speed / best_fixed_speed(world)


def main(
    seeds: Annotated[int, typer.Option(min=1, help="runs of each case")] = 6,
    offered_by: Annotated[str, typer.Option(help="servers, see above")] = "mix",
    out: Out = RESULTS / "half_second.json",
) -> None:
    """Measure all cases and write the result."""
    found: list[dict[str, Any]] = []
    for offered in offered_by.split(","):
        for batch in BATCHES:
            for name, before, world, other in cases(batch, has_all=offered == "all"):
                profiled = before != "nothing"
                ratios = [stretch(world, other, seed, profiled=profiled) for seed in range(seeds)]
                best = max(arms(world), key=lambda arm, own=world: fixed_speed(own, *arm))
                row = {"offered": offered, "batch": batch, "traffic": name, "after": before}
                found.append(row | {"best": best, "mean": fmean(ratios), "least": min(ratios)})
                print(*row.values(), *best, f"{fmean(ratios):.3f} {min(ratios):.3f}", flush=True)
    write_result(out, {"seeds": seeds, "steps": STEPS, "rows": found})
    rows = []
    for batch in BATCHES:
        least = min(found, key=lambda row: row["mean"] if row["batch"] == batch else 2.0)
        what = f"default policy over half a second, batch {batch}, simulated: the worst traffic"
        mean = round(least["mean"], 3)
        rows.append(Row(what, "speed over the best fixed arm", mean, f"{GOAL}", mean >= GOAL))
    write_rows("half_second", rows, "python -m benchmarks.half_second", out.parent)


if __name__ == "__main__":
    typer.run(main)
