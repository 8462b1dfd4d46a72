"""Which versions' steps may teach the network of Learning to Draft, and which may judge it.

    python -m benchmarks.policy_versions        # four minutes of one core

Simulated, at batch 1: text is easy for a hundred steps and hard for the next hundred, and each of
two versions of a drafter has an acceptance of its own in both. The newer one has drafted a few
hundred steps so far, the former one thousands. Networks are fitted to the newer one's steps alone,
to the former one's alone, to both, and to as many of the newer one as there are of the former, and
all are judged on steps of the newer version that none has seen: speed over the best fixed K, which
is chosen in hindsight. Beside it, what the gate of each would have said had the former version's
steps judged. Writes ``policy_versions.json`` and ``rows/policy_versions.json`` in
``benchmarks/results``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.harness.arms import LEARNED
from benchmarks.harness.results import RESULTS, Out, Row, at_least, say, write_result, write_rows
from policies.alike import first_alike
from policies.evaluation import best_ks
from policies.interface import CostSample
from policies.logged import LoggedRow, LoggedStep
from policies.network import Network
from policies.replayed_log import ReplayedLog
from trainer.ltd import FullInformation, chosen_ks, compare_ks, fit_full_information

SOURCE = "python -m benchmarks.policy_versions"
MAX_DRAFT, PLAIN_S = 8, 0.01
TIMES = [1.0, *(1.02 + 0.1 * k for k in range(1, MAX_DRAFT + 1))]
SAMPLES = [
    CostSample(LEARNED if k else "none", k, 1, PLAIN_S * one, 0.0) for k, one in enumerate(TIMES)
]
CASES = {
    "a little better": ((0.80, 0.25), (0.84, 0.28)),
    "much better": ((0.60, 0.15), (0.92, 0.45)),
    "much worse": ((0.92, 0.45), (0.60, 0.15)),
}
"""Acceptance of each position in easy and hard text: of the former version, and of the newer."""
FEW, MANY, JUDGES = 500, 2400, 2400
_STRETCH = 100


def steps_of(
    acceptance: tuple[float, float], num: int, version: int, seed: int
) -> list[LoggedStep]:
    """Steps at any K, all as likely."""
    rng = random.Random(seed)
    steps = []
    for at in range(num):
        hazard, k = acceptance[at // _STRETCH % 2], rng.randint(0, MAX_DRAFT)
        kept = next((j for j in range(k) if rng.random() >= hazard), k)
        steps.append(
            LoggedStep(
                LEARNED if k else "none", k, 1, 1 / (MAX_DRAFT + 1), "any", version,
                PLAIN_S * TIMES[k], (LoggedRow(k, kept),),
            )
        )  # fmt: skip
    return steps


def fitted(steps: Sequence[LoggedStep], seed: int) -> Network:
    """A network fitted to all of some steps."""
    log = ReplayedLog.of(steps, LEARNED, SAMPLES, MAX_DRAFT)
    how = FullInformation(rounds=2, epochs=150, seed=seed)
    return fit_full_information(log, np.ones(len(steps), np.bool_), how)


def gain(network: Network, steps: Sequence[LoggedStep]) -> float:
    """Over the best fixed K of these steps."""
    log = ReplayedLog.of(steps, LEARNED, SAMPLES, MAX_DRAFT)
    return compare_ks(log, chosen_ks(network, log), best_ks(log)).gain


def case(former: tuple[float, float], newer: tuple[float, float], seed: int) -> dict[str, Any]:
    """Gains of one case, by what the network was fitted to."""
    old = steps_of(former, MANY, 0, 10 * seed)
    new = steps_of(newer, MANY, 1, 10 * seed + 1)
    judges = steps_of(newer, JUDGES, 1, 10 * seed + 2)
    old_judges = steps_of(former, JUDGES, 0, 10 * seed + 3)
    taught = {"newer, few": new[:FEW], "former": old, "both": old + new[:FEW], "newer, many": new}
    networks = {name: fitted(steps, seed) for name, steps in taught.items()}
    _, oldest = first_alike([*old, *(replace(one, version=1) for one in new[:FEW])], LEARNED)
    return {
        "gains": {name: gain(network, judges) for name, network in networks.items()},
        "by_former": {name: gain(network, old_judges) for name, network in networks.items()},
        "are_alike": oldest == 0,
    }


def rows_of(found: dict[str, list[dict[str, Any]]]) -> Iterator[Row]:
    """Means over the seeds."""
    for name, runs in found.items():
        for taught in runs[0]["gains"]:
            where = f"simulated, a newer version that is {name}, network fitted to: {taught}"
            mean = fmean(one["gains"][taught] for one in runs)
            yield at_least(where, "speed over the best fixed K on the newer version", 1 + mean, 1.0)


def main(
    seeds: Annotated[int, typer.Option(help="logs and fits of each case")] = 2,
    out: Out = RESULTS / "policy_versions.json",
) -> None:
    """Fit and judge all cases."""
    torch.set_num_threads(1)
    found = dict[str, list[dict[str, Any]]]()
    for name, (former, newer) in CASES.items():
        found[name] = []
        for seed in range(seeds):
            found[name].append(case(former, newer, seed))
            say(f"{name}: {found[name][-1]}")
    write_result(out, {"few": FEW, "many": MANY, "cases": found})
    write_rows("policy_versions", rows_of(found), SOURCE, out.parent)
    say(f"written: {out}")


if __name__ == "__main__":
    typer.run(main)
