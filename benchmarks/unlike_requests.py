"""What the default policy gains by knowing how the requests of a server differ, simulated.

    python -m benchmarks.unlike_requests          # two minutes on one core

One request in two is easy to draft for and one is hard, or one has a long text that the target
reads at every step. The policy is told their temperatures, their tenants or the length of their
texts, or nothing. Figures are speeds relative to the best single K of all requests, in hindsight;
``gain`` is the speed of the policy that is told over that of the same one that is not.

The engine is that of ``tests/policies/simulated.py``; no GPU. Writes ``unlike_requests.json`` and
``rows/unlike_requests.json`` in ``benchmarks/results``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import typer

from benchmarks.harness.results import RESULTS, Out, Row, write_result, write_rows
from policies.groups import group_of
from tests.policies.unlike import WORLD, lead, lead_of_reader

BATCHES = (1, 2, 4, 8, 32)
DIFFERENCES = {"much": (1.6, -2.2), "little": (0.6, -0.6)}
"""Added to the log-odds of an acceptance of 0.7, easy and hard: 0.92 and 0.21, 0.81 and 0.56."""
READS = {"much": 0.03, "little": 0.005}
"""Seconds that a long text adds to a step of 0.01."""
STEPS = 1000


def cases() -> Iterator[tuple[str, int, Callable[[int], float], Callable[[int], float]]]:
    """What the policy is told, requests of a batch, and its lead when it is told and when not, by
    seed."""
    for much, (easy, hard) in DIFFERENCES.items():
        told = {
            "temperatures": {easy: group_of(0, 0.0), hard: group_of(0, 1.0)},
            "tenants": {easy: group_of(1, 0.7), hard: group_of(2, 0.7)},
        }
        for what, groups in told.items():
            for batch in BATCHES:
                world = replace(WORLD, batch=batch, difficulties=(easy, hard))
                told_of = replace(world, groups=groups)
                both = (partial(lead, one, steps=STEPS) for one in (told_of, world))
                yield f"{what}, which matter {much}", batch, *both
    for much, read_s in READS.items():
        for batch in BATCHES:
            both = (
                partial(lead_of_reader, batch=batch, tells=tells, steps=STEPS, read_s=read_s)
                for tells in (True, False)
            )
            yield f"lengths of texts, which matter {much}", batch, *both


def main(
    seeds: Annotated[int, typer.Option(min=1, help="runs of each case")] = 3,
    out: Out = RESULTS / "unlike_requests.json",
) -> None:
    """Measure all cases and write the result."""
    found: list[dict[str, Any]] = []
    for what, batch, told, untold in cases():
        leads = [sum(map(one, range(seeds))) / seeds for one in (told, untold)]
        row = {"told": what, "batch": batch, "lead": leads[0], "lead_untold": leads[1]}
        found.append(row | {"gain": leads[0] / leads[1]})
        print(f"{what}, batch {batch}: {leads[0]:.3f} {leads[1]:.3f} {leads[0] / leads[1]:.3f}")
    write_result(out, {"seeds": seeds, "steps": STEPS, "rows": found})
    rows = [
        Row(
            f"default policy that is told {row['told']}, batch {row['batch']}, simulated",
            "speed over that of the same policy without",
            round(row["gain"], 4),
            "at least 0.99",
            row["gain"] >= 0.99,
        )
        for row in found
    ]
    write_rows("unlike_requests", rows, "python -m benchmarks.unlike_requests")


if __name__ == "__main__":
    typer.run(main)
