"""How often good candidates are refused: by the live watch, and by the gate.

Real rounds and held-out traces are drawn again and again, whole requests at a time, so that what is
correlated within a request stays so.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from torch import nn

from benchmarks.candidates.world import CLIENTS, Rounds, World
from policies.gate import PairedTrace, gate
from policies.rollback import Action, SwapWatch
from trainer.rows import HeldSample

_REFERENCE_ROUNDS = 320
_MOST_STEPS = 100_000


class Server:
    """Steps of a server with some clients, whose requests are drawn from real ones."""

    def __init__(self, by_version: Sequence[Rounds], chance: random.Random) -> None:
        """
        Args:
            by_version: requests as the former and the new version drafted them.
        """
        self._by_version = by_version
        self._chance = chance
        self._clients: list[Iterator[tuple[int, int]]] = [iter(()) for _ in range(CLIENTS)]

    def begin(self, version: int) -> None:
        """Each client goes on somewhere in a request that this version drafted for."""
        for number in range(CLIENTS):
            rounds = self._chance.choice(self._by_version[version])
            self._clients[number] = iter(rounds[self._chance.randrange(len(rounds)) :])

    def step(self, version: int) -> tuple[int, int, int]:
        """Proposed and accepted tokens, and rounds, of one step."""
        found = [self._next(number, version) for number in range(CLIENTS)]
        return sum(p for p, _ in found), sum(a for _, a in found), len(found)

    def _next(self, number: int, version: int) -> tuple[int, int]:
        while (one := next(self._clients[number], None)) is None:
            self._clients[number] = iter(self._chance.choice(self._by_version[version]))
        return one


def watched(
    former: Rounds,
    new: Rounds,
    watch_rounds: int,
    max_drop: float,
    num_swaps: int,
    seeds: Sequence[int],
) -> dict[str, Any]:
    """Swap from a former version to a new one so many times for each seed; how often is it rolled
    back?"""
    found, spent, by_seed = Counter[str](), list[int](), list[int]()
    for seed in seeds:
        before = found["rolled_back"]
        _watch(former, new, watch_rounds, max_drop, num_swaps, seed, found, spent)
        by_seed.append(found["rolled_back"] - before)
    counts = {name: found[name] for name in ("rolled_back", "trials", "undecided")}
    return {
        "swaps": num_swaps * len(seeds),
        **counts,
        "rolled_back_by_seed": by_seed,
        "median_rounds": median(spent),
        "longest_rounds": max(spent),
    }


def _watch(
    former: Rounds,
    new: Rounds,
    watch_rounds: int,
    max_drop: float,
    num_swaps: int,
    seed: int,
    found: Counter[str],
    spent: list[int],
) -> None:
    """Count in ``found`` what became of the swaps, and add the rounds that each version drafted to
    ``spent``."""
    chance = random.Random(seed)
    for _ in range(num_swaps):
        watch, server = SwapWatch(watch_rounds, max_drop), Server((former, new), chance)
        rounds = 0
        while rounds < _REFERENCE_ROUNDS:
            proposed, accepted, num = server.step(0)
            watch.observe(0, proposed, accepted, num)
            rounds += num
        version, rounds = 1, 0
        server.begin(version)
        for _ in range(_MOST_STEPS):
            proposed, accepted, num = server.step(version)
            action = watch.observe(version, proposed, accepted, num)
            rounds += num if version else 0
            if action in (Action.TRY_FORMER, Action.RETURN_TO_NEW):
                found["trials"] += action is Action.TRY_FORMER
                version = 0 if action is Action.TRY_FORMER else 1
                server.begin(version)
            if action is Action.ROLL_BACK:
                found["rolled_back"] += 1
                break
            if watch.state == "steady":
                break
        else:
            found["undecided"] += 1
        spent.append(rounds)


def gated(
    world: World,
    candidate: nn.Module,
    samples: Sequence[HeldSample],
    num_traces: int,
    num_draws: int,
    seed: int,
) -> dict[str, Any]:
    """Judge a candidate on so many drawn sets of held-out traces; how often does it not pass?"""
    judge = world.judge(world.model())
    ours, theirs = judge.measure(candidate, samples), judge.measure(judge.incumbent, samples)
    pairs = []
    for sample in samples:
        num = len(ours[sample.key].overlap)
        mine, best = (x[sample.key].overlap.tokens_per_step() for x in (ours, theirs))
        if num and mine is not None and best is not None:
            pairs.append(PairedTrace(num, num * mine, num * best))
    chance, refused = random.Random(seed), Counter[str]()
    for _ in range(num_draws):
        drawn = [chance.choice(pairs) for _ in range(num_traces)]
        num = sum(one.num_chains for one in drawn)
        verdict = gate(
            sum(one.candidate for one in drawn) / num,
            sum(one.incumbent for one in drawn) / num,
            margin=judge.margin,
            num_rows=num,
            traces=drawn,
            confidence=judge.confidence,
        )
        if not verdict.passed:
            refused[verdict.kind] += 1
    total = sum(one.num_chains for one in pairs)
    gain = sum(one.candidate for one in pairs) / sum(one.incumbent for one in pairs) - 1
    return {
        "draws": num_draws,
        "held_out_traces": num_traces,
        "refused": refused.total(),
        "by_reason": dict(refused),
        "gain": gain,
        "measured_on": {"traces": len(pairs), "chains": total},
    }
