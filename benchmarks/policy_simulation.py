"""The default policy against the best fixed (drafter, K), on a simulated engine.

    python -m benchmarks.policy_simulation                  # all scenarios, 5 minutes
    python -m benchmarks.policy_simulation --only swap      # scenarios whose name contains a word

Scenarios vary the drafter's acceptance, the batch, scatter and tails of step times, errors of the
start-up profile, prompts that leave steps untimed, swaps, an index beside the drafter, what
planning itself takes, steps that are faster where they repeat the one before, and a trainer on the
same GPU. Figures are speeds relative to the best fixed arm of the scenario, K = 0 to 8, in
hindsight and on the same requests: ``settled`` after the first 500 steps (20 after a swap to a
version that comes with its figures), ``whole`` from the first step. ``vs_plain`` is relative to
plain decoding, from the first step. ``swaps`` are steps from a swap on until the mean speed of the
next 40 is 0.95 of the best fixed arm of the new version. Changes of the traffic without a swap are
in ``benchmarks/policy_changes.py``.

The engine is that of ``tests/policies/simulated.py``; one core, no GPU. Writes
``policy_simulation.json`` and ``rows/policy_simulation.json`` in ``benchmarks/results``.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import typer

from benchmarks.harness.results import RESULTS, Out, Row, write_result, write_rows
from configs.schema import PolicySettings
from policies.catalog import build_policy
from tests.policies.simulated import (
    DRAFTERS,
    Noise,
    Rows,
    Simulation,
    Totals,
    World,
    best_fixed_speed,
    calibration,
    fixed_speed,
)

WARM_UP = 500
"""Steps after which figures are ``settled``: half a second of a small target on a fast GPU."""
STEPS = 2000
SOON = 20
"""Rounds after a swap from which on the policy must be near its final speed."""
NEAR, NEAR_STEPS, STRIDE, MOST = 0.95, 40, 4, 600
SWAP_SEEDS = 5
TURN = 150
"""Steps of a text that turns between easy and hard."""

SMALL = World(plain_s=0.00069, draft_s=0.00011, verify_per_token_s=2e-6, cold_s=0.0003)
"""A small target on a fast GPU: launches and the host set the time of a step."""
CPU = World(plain_s=0.015, draft_s=0.002, verify_per_token_s=0.0015, cold_s=0.006)
"""A tiny target on two CPU cores: every token of the batch is computed."""
NOISES = {
    "calm": Noise(0.1, 0.0, 0.0),
    "some late": Noise(0.1, 0.02, 0.003),
    "more late": Noise(0.1, 0.05, 0.005),
    "scattered": Noise(0.3, 0.05, 0.005),
}
CPU_NOISES = {
    "calm": Noise(0.1, 0.0, 0.0),
    "scattered": Noise(0.3, 0.05, 0.075),
}
DRAFTS = {
    "random": (0.02,) * 8,
    "poor": (0.3,) * 8,
    "good": (0.6, 0.58, 0.57, 0.56, 0.55, 0.55, 0.55, 0.55),
    "very good": (0.8,) * 8,
}
PROFILES = {
    "scale x0.5": {"scale": 0.5},
    "scale x2": {"scale": 2.0},
    "drafting x0.5": {"draft": 0.5},
    "drafting x2": {"draft": 2.0},
    "slope x0.5": {"slope": 0.5},
    "slope x2": {"slope": 2.0},
}
UNEQUAL = (-1.5, -0.7, 0.0, 0.7, 1.5)
SAMPLED = {
    1: Rows(0.25, 0.15),
    2: Rows(0.1, 0.3, 0.3),
    3: Rows(0.06, 0.45, 0.5),
    4: Rows(0.04, 0.55, 0.7),
    5: Rows(0.05, 0.7, 1.0),
}
"""Matches of text sampled at a high temperature: many and short, and followed by little."""


@dataclass(frozen=True)
class Phase:
    """A stretch of one world."""

    world: World
    version: int | None = None
    """Swap to this version at its beginning."""
    published: bool = True
    """The version comes with its calibration."""
    steps: int = STEPS


@dataclass(frozen=True)
class Scenario:
    """Phases of one server, and the errors of its start-up profile."""

    name: str
    phases: tuple[Phase, ...]
    errors: dict[str, float] = field(default_factory=dict)


def stationary() -> Iterator[Scenario]:
    """Every drafter at every batch under every noise, and with every wrong profile in the worst."""
    for machine, base, batches, noises in (
        ("gpu", SMALL, (1, 8, 32), NOISES),
        ("cpu", CPU, (1, 8), CPU_NOISES),
    ):
        for batch in batches:
            for kind, eagle in DRAFTS.items():
                world = replace(base, batch=batch, eagle=eagle, has_index=False)
                about = f"{machine}, batch {batch}, {kind}"
                for noise, drawn in noises.items():
                    yield Scenario(f"{about}, {noise}", (Phase(replace(world, noise=drawn)),))
                worst = Phase(replace(world, noise=noises["scattered"]))
                for wrong, errors in PROFILES.items():
                    yield Scenario(f"{about}, scattered, {wrong}", (worst,), errors)


def changing() -> Iterator[Scenario]:
    """Traffic, load and machine that change; prompts beside rounds; unequal requests."""
    noise = NOISES["more late"]
    for batch in (1, 8, 32):
        world = replace(SMALL, batch=batch, eagle=DRAFTS["good"], noise=noise, has_index=False)
        about = f"gpu, batch {batch}"
        drift = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.7, 0.6, 0.5, 0.4]
        yield Scenario(
            f"{about}, drifting",
            tuple(Phase(replace(world, eagle=(c,) * 8), steps=1000) for c in drift),
        )
        yield Scenario(f"{about}, prompts", (Phase(replace(world, untimed_share=0.7)),))
        yield Scenario(
            f"{about}, unequal", (Phase(replace(world, difficulties=UNEQUAL, request_tokens=25)),)
        )
        slow = replace(world, slowdown=2.5)
        yield Scenario(f"{about}, machine slows", (Phase(world), Phase(slow), Phase(world)))
        for kind in ("random", "very good"):
            other = replace(world, eagle=DRAFTS[kind])
            yield Scenario(f"{about}, traffic to {kind}", (Phase(world), Phase(other)))
            yield Scenario(f"{about}, traffic from {kind}", (Phase(other), Phase(world)))
        turns = (world, replace(world, eagle=(0.1,) * 8)) * 6
        yield Scenario(f"{about}, text turns", tuple(Phase(one, steps=TURN) for one in turns))
    loads = [
        Phase(replace(SMALL, batch=b, eagle=DRAFTS["good"], noise=noise, has_index=False), steps=n)
        for b, n in ((1, 1000), (8, 1000), (32, 1000), (8, 1000), (1, 1000))
    ]
    yield Scenario("gpu, load 1 8 32 8 1", tuple(loads))


def swapping() -> Iterator[Scenario]:
    """Versions that come with and without their figures."""
    noise = NOISES["some late"]
    for batch in (1, 8, 32):
        for before, after in (("good", "very good"), ("good", "random"), ("random", "good")):
            old, new = (
                replace(SMALL, batch=batch, eagle=DRAFTS[k], noise=noise, has_index=False)
                for k in (before, after)
            )
            for published in (True, False):
                told = "told" if published else "untold"
                yield Scenario(
                    f"gpu, batch {batch}, swap {before} to {after}, {told}",
                    (Phase(old, 1, published), Phase(new, 2, published)),
                )
        old, new = (
            replace(SMALL, batch=batch, eagle=DRAFTS[k], noise=noise, has_index=False)
            for k in ("poor", "very good")
        )
        turns = [Phase(old, 1, steps=STEPS), Phase(new, 2, steps=STEPS)]
        turns += [Phase(old, 1, steps=300), Phase(new, 2, steps=300)] * 4
        yield Scenario(f"gpu, batch {batch}, swap to and fro", tuple(turns))


def indexed() -> Iterator[Scenario]:
    """An index beside the drafter, on sampled text and on text that repeats itself."""
    for machine, base, noise in (
        ("gpu", SMALL, NOISES["some late"]),
        ("cpu", CPU, CPU_NOISES["calm"]),
    ):
        for batch in (1, 8):
            for kind, eagle in DRAFTS.items():
                plain_s = base.plain_s
                world = replace(
                    base, batch=batch, eagle=eagle, noise=noise,
                    plan_s=0.01 * plain_s, look_s=0.01 * plain_s,
                )  # fmt: skip
                about = f"{machine}, batch {batch}, index and {kind}"
                yield Scenario(f"{about}, sampled text", (Phase(replace(world, rows=SAMPLED)),))
                repeating = replace(world, rows={4: Rows(0.6, 0.85)})
                yield Scenario(f"{about}, repeating text", (Phase(repeating),))


def planned() -> Iterator[Scenario]:
    """Requests of unequal difficulty, and planning and looking that take as long, relative to a
    step, as was measured for a target of 135M parameters on an H200."""
    noise = Noise(0.15, 0.02, 0.002)
    for batch, plain_s, plan_s, look_s in (
        (1, 0.00064, 0.00015, 0.00002),
        (8, 0.0009, 0.0002, 0.0001),
        (32, 0.0012, 0.00028, 0.0004),
    ):
        for kind in ("random", "poor", "good"):
            for has_index in (False, True):
                world = replace(
                    SMALL, batch=batch, eagle=DRAFTS[kind], noise=noise, difficulties=UNEQUAL,
                    plain_s=plain_s, plan_s=plan_s, look_s=look_s, has_index=has_index,
                    rows=SAMPLED if has_index else {},
                )  # fmt: skip
                index = ", index" if has_index else ""
                yield Scenario(
                    f"gpu, batch {batch}, {kind}{index}, planning takes time",
                    (Phase(world, steps=4 * STEPS),),
                )


def fresh() -> Iterator[Scenario]:
    """Steps that repeat the one before are faster, as was measured on an H200: the first three of
    a K take 40 % longer."""
    for batch, plain_s in ((1, 0.00064), (8, 0.0009), (32, 0.0012)):
        for kind in ("good", "very good"):
            world = replace(
                SMALL, batch=batch, eagle=DRAFTS[kind], noise=Noise(0.1, 0.02, 0.002),
                plain_s=plain_s, plan_s=0.0001, has_index=False, fresh_share=0.4, fresh_steps=3,
            )  # fmt: skip
            yield Scenario(
                f"gpu, batch {batch}, {kind}, first steps take longer",
                (Phase(world, steps=2 * STEPS),),
            )


def beside_a_trainer() -> Iterator[Scenario]:
    """A GPU that a trainer takes slices of, and a drafter that it improves from swap to swap.
    Coming back to the drafter takes seven plain steps, as was measured on an H200."""
    machines = (1, 0.00064, 0.00002), (8, 0.0009, 0.0002), (32, 0.0011, 0.0007)
    for batch, plain_s, look_s in machines:
        for has_index in (False, True):
            base = replace(
                SMALL, batch=batch, plain_s=plain_s, draft_s=0.00012, verify_per_token_s=7e-6,
                cold_s=7 * plain_s, plan_s=0.00015, look_s=look_s, noise=Noise(0.1, 0.3, 0.005),
                untimed_share=0.2, difficulties=UNEQUAL, has_index=has_index,
                rows=SAMPLED if has_index else {},
            )  # fmt: skip
            phases = [Phase(replace(base, eagle=DRAFTS["random"]), steps=500)]
            for version in range(1, 9):
                eagle = tuple((0.3 + 0.3 * version / 8) * 0.97**j for j in range(8))
                phases.append(Phase(replace(base, eagle=eagle), version, steps=800))
            index = ", index" if has_index else ""
            yield Scenario(f"gpu, batch {batch}{index}, beside a trainer", tuple(phases))


def scenarios() -> Iterator[Scenario]:
    """All of them."""
    yield from stationary()
    yield from changing()
    yield from swapping()
    yield from indexed()
    yield from planned()
    yield from fresh()
    yield from beside_a_trainer()


def measure(scenario: Scenario, seed: int) -> dict[str, Any]:
    """Run the default policy through one scenario."""
    first = scenario.phases[0].world
    drafters = {kind: traits for kind, traits in DRAFTERS.items() if kind in first.drafters}
    policy = build_policy(PolicySettings(), drafters, seed, max_draft=8)
    policy.calibrate(first.profile(**scenario.errors))
    server = Simulation(policy, seed)
    whole, settled = list[Totals](), list[Totals]()
    for number, phase in enumerate(scenario.phases):
        if phase.version is not None:
            server.swap(phase.version, calibration(phase.world) if phase.published else {})
        # A swap that brings its figures has no warm-up but the first.
        warm_up = SOON if phase.version is not None and phase.published and number else WARM_UP
        warm_up = min(warm_up, phase.steps // 2)
        parts = [server.run(phase.world, steps) for steps in (warm_up, phase.steps - warm_up)]
        settled.append(parts[1])
        whole.append(_sum(parts))
    worlds = [phase.world for phase in scenario.phases]
    plain = _over_equal_tokens([fixed_speed(world, "none", 0) for world in worlds])
    return {
        "settled": _over_best(settled, worlds),
        "whole": _over_best(whole, worlds),
        "vs_plain": _over_equal_tokens([one.speed for one in whole]) / plain,
    }


def _over_best(found: Sequence[Totals], worlds: Sequence[World]) -> float:
    """Speed relative to the best fixed arm on the same requests."""
    best = best_fixed_speed(*worlds, tokens=[one.by_difficulty for one in found])
    return _over_equal_tokens([one.speed for one in found]) / best


def swaps(seeds: int = SWAP_SEEDS) -> Iterator[dict[str, Any]]:
    """Steps from each swap of ``swapping`` to 0.95 of the new optimum, the worst and the median of
    some seeds; ``None``: not within ``MOST``."""
    for scenario in swapping():
        old, new, *more = scenario.phases
        if more:
            continue
        found = [steps_to_near(old, new, seed) for seed in range(seeds)]
        ordered = sorted(MOST if one is None else one for one in found)
        yield {
            "name": scenario.name,
            "told": new.published,
            "median": ordered[seeds // 2],
            "worst": None if None in found else ordered[-1],
        }


def steps_to_near(old: Phase, new: Phase, seed: int) -> int | None:
    """Steps from one swap to 0.95 of the new optimum."""
    drafters = {kind: traits for kind, traits in DRAFTERS.items() if kind in old.world.drafters}
    policy = build_policy(PolicySettings(), drafters, seed, max_draft=8)
    policy.calibrate(old.world.profile())
    server = Simulation(policy, seed)
    for number, phase in enumerate((old, new), 1):
        server.swap(number, calibration(phase.world) if phase.published else {})
        if phase is old:
            server.run(old.world, STEPS // 2)
    wanted = NEAR * best_fixed_speed(new.world)
    parts = [server.run(new.world, STRIDE) for _ in range((MOST + NEAR_STEPS) // STRIDE)]
    for at in range(MOST // STRIDE):
        if _sum(parts[at : at + NEAR_STEPS // STRIDE]).speed >= wanted:
            return at * STRIDE
    return None


def _sum(parts: Sequence[Totals]) -> Totals:
    by_difficulty = Counter[float]()
    for part in parts:
        by_difficulty.update(part.by_difficulty)
    return Totals(sum(p.tokens for p in parts), sum(p.seconds for p in parts), by_difficulty)


def _over_equal_tokens(speeds: Sequence[float]) -> float:
    return len(speeds) / sum(1 / speed for speed in speeds)


def row_of(scenario: Scenario, seeds: int) -> dict[str, Any]:
    """Means over seeds, and the worst settled seed."""
    found = [measure(scenario, seed) for seed in range(seeds)]
    means = {key: statistics.fmean(each[key] for each in found) for key in found[0]}
    return {"name": scenario.name, **means, "worst_settled": min(f["settled"] for f in found)}


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Worst and median of all scenarios."""
    return {
        f"{pick}_{key}": choose(row[key] for row in rows)
        for key in ("settled", "whole", "vs_plain")
        for pick, choose in (("worst", min), ("median", statistics.median))
    }


def swap_claims(found: Sequence[dict[str, Any]]) -> Iterator[Row]:
    """Rows of the table of claims about swaps."""
    for told, most in ((True, 20), (False, 200)):
        own = [row for row in found if row["told"] == told]
        values = [row["worst"] for row in own]
        worst = None if None in values else float(max(values))
        how = f"{'with' if told else 'without'} calibration, {SWAP_SEEDS} seeds each"
        yield Row(
            f"default policy, {len(own)} simulated swaps {how}",
            "steps to 95 % of the new optimum, the worst",
            worst,
            f"at most {most}",
            worst is not None and worst <= most,
        )


def claims(rows: Sequence[dict[str, Any]]) -> Iterator[Row]:
    """Rows of the table of claims."""
    found = summary(rows)
    about = f"default policy, {len(rows)} simulated scenarios"
    for key, goal in (("settled", 0.98), ("whole", 0.98)):
        for pick in ("worst", "median"):
            value = found[f"{pick}_{key}"]
            yield Row(
                about,
                f"{pick} speed relative to the best fixed arm, {key}",
                round(value, 4),
                f"at least {goal}",
                value >= goal,
            )
    useless = [row["vs_plain"] for row in rows if ", random" in row["name"]]
    if useless:
        value = min(useless)
        yield Row(
            about,
            "worst speed relative to plain decoding with a random drafter",
            round(value, 4),
            "at least 0.985",
            value >= 0.985,
        )


def main(
    seeds: Annotated[int, typer.Option(min=1, help="runs of each scenario")] = 1,
    only: Annotated[str, typer.Option(help="scenarios whose name contains this")] = "",
    out: Out = RESULTS / "policy_simulation.json",
) -> None:
    """Measure all scenarios and write the result."""
    rows = []
    for scenario in scenarios():
        if only in scenario.name:
            rows.append(row_of(scenario, seeds))
            figures = " ".join(f"{rows[-1][k]:.3f}" for k in ("settled", "whole", "vs_plain"))
            print(figures, scenario.name, flush=True)
    swapped = [] if only else list(swaps())
    for row in swapped:
        print(row["median"], row["worst"], row["name"], flush=True)
    result = {
        "seeds": seeds, "warm_up_steps": WARM_UP, "summary": summary(rows), "rows": rows,
        "swaps": swapped,
    }  # fmt: skip
    write_result(out, result)
    if not only:
        found = [*claims(rows), *swap_claims(swapped)]
        write_rows("policy_simulation", found, "python -m benchmarks.policy_simulation")
    print(result["summary"])


if __name__ == "__main__":
    typer.run(main)
