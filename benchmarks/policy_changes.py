"""How soon the default policy notices that the traffic has changed, on a simulated engine.

    python -m benchmarks.policy_changes      # two minutes on a quiet core

``left``: steps after which it decodes plainly, for 20 steps in a row and trials aside, which are
paid for, once a good drafter has become useless without a swap; the median and the worst of some
seeds. ``cheap`` are drafts of 7 % of a plain step and 5 % for each further token, where hardly
anything is lost by drafting one token for nothing; with the speed of the first 300 steps over that
of plain decoding. ``trials``: with an index on the device and a mix, and traffic for which neither
pays, steps until the next draft from a moment at random, which is what better traffic waits for at
least; and speed over plain decoding.

The engines are those of ``tests/policies``; no GPU. Writes ``policy_changes.json`` and
``rows/policy_changes.json`` in ``benchmarks/results``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean
from typing import Annotated, Any

import typer

from benchmarks.harness.results import RESULTS, Out, Row, write_result, write_rows
from benchmarks.policy_simulation import DRAFTS, SMALL, WARM_UP
from configs.schema import PolicySettings
from policies.catalog import build_policy
from policies.interface import Decision
from tests.policies import on_device
from tests.policies.simulated import DRAFTERS, Simulation, Totals, World, fixed_speed

MOST, PLAIN_RUN = 300, 20
"""Steps after a change that are looked at, and plain ones in a row that tell that it is over."""
GOAL, FLOOR = 50, 0.985
TRIED, SETTLED = 2500, 300


@dataclass(frozen=True)
class Cheap(World):
    """A target whose drafts take hardly any time."""

    def seconds(self, drafter: str, k: int) -> tuple[float, float]:
        draft_s = self.plain_s * (0.07 + 0.05 * (k - 1)) if k else 0.0
        return self.plain_s + draft_s, draft_s


def ks_noted(into: list[int]) -> Callable[[Decision, object], None]:
    """Notes K of each step, 0 for trials."""
    return lambda decision, _: into.append(0 if decision.explore else decision.draft_k)


def after_change(old: World, new: World, seed: int) -> tuple[int, Totals]:
    """Steps from a change of the traffic to the first of a run of plain ones, trials aside, or
    ``MOST``; and all steps until then."""
    drafters = {kind: traits for kind, traits in DRAFTERS.items() if kind in old.drafters}
    policy = build_policy(PolicySettings(), drafters, seed, max_draft=8)
    policy.calibrate(old.profile())
    server, ks = Simulation(policy, seed), list[int]()
    server.run(old, 3 * WARM_UP)
    found = server.run(new, MOST, ks_noted(ks))
    runs = (at for at in range(MOST - PLAIN_RUN + 1) if not any(ks[at : at + PLAIN_RUN]))
    return next(runs, MOST), found


def left(name: str, old: World, kept: float, seeds: int) -> dict[str, Any]:
    """``after_change`` of some seeds."""
    new = replace(old, eagle=(kept,) * 8)
    found = [after_change(old, new, seed) for seed in range(seeds)]
    steps, plain = sorted(at for at, _ in found), fixed_speed(new, "none", 0)
    speeds = [one.speed / plain for _, one in found]
    return {
        "name": name, "batch": old.batch, "median": steps[seeds // 2], "worst": steps[-1],
        "vs_plain": fmean(speeds), "least_vs_plain": min(speeds),
    }  # fmt: skip


def trials(batch: int, seeds: int) -> dict[str, Any]:
    """Mean wait for a draft, and speed, where nothing pays."""
    world = replace(
        on_device.card(*on_device.DOMAINS["both bad"], batch=batch), offers_neural=False
    )
    waits, speeds = [], []
    for seed in range(seeds):
        server, ks = on_device.served(world, seed), list[int]()
        server.run(world, SETTLED)
        found = server.run(world, TRIED, lambda one, _, own=ks: own.append(one.draft_k))
        drafted = [at for at, k in enumerate(ks) if k]
        gaps = [after - before for before, after in pairwise([-1, *drafted, TRIED])]
        waits.append(sum(gap * gap for gap in gaps) / 2 / TRIED)
        speeds.append(found.speed / fixed_speed(world, "none", 0))
    return {
        "batch": batch, "wait": fmean(waits), "longest_wait": max(waits),
        "vs_plain": fmean(speeds), "least_vs_plain": min(speeds),
    }  # fmt: skip


def rows_of(found: list[dict[str, Any]], tried: list[dict[str, Any]]) -> Iterator[Row]:
    """Rows of the table of claims."""
    for one in found:
        what = f"default policy, {one['name']}, batch {one['batch']}, without a swap, simulated"
        worst = one["worst"]
        yield Row(what, "steps until it decodes plainly, the worst", worst, f"at most {GOAL}",
                  worst <= GOAL)  # fmt: skip
    for one in tried:
        what = f"default policy, nothing pays, batch {one['batch']}, simulated"
        value = round(one["least_vs_plain"], 4)
        yield Row(what, "speed over plain decoding, the worst seed", value, f"at least {FLOOR}",
                  value >= FLOOR)  # fmt: skip


def main(
    seeds: Annotated[int, typer.Option(min=1, help="runs of each case")] = 8,
    out: Out = RESULTS / "policy_changes.json",
) -> None:
    """Measure all cases and write the result."""
    found, tried = [], []
    for batch in (1, 4, 8, 32):
        world = replace(SMALL, batch=batch, eagle=DRAFTS["good"], has_index=False)
        found.append(left("a good drafter becomes useless", world, 0.02, seeds))
        print(found[-1], flush=True)
    for batch in (1, 4):
        cheap = Cheap(batch=batch, eagle=(0.9,) * 8, plain_s=SMALL.plain_s, has_index=False)
        found.append(left("cheap drafts become useless", cheap, 0.02, seeds))
        print(found[-1], flush=True)
    for batch in (1, 32):
        tried.append(trials(batch, seeds))
        print(tried[-1], flush=True)
    write_result(out, {"seeds": seeds, "left": found, "trials": tried})
    rows = list(rows_of(found, tried))
    write_rows("policy_changes", rows, "python -m benchmarks.policy_changes", out.parent)


if __name__ == "__main__":
    typer.run(main)
