"""What policies decide on the simulated engine, as one digest for each policy and world.

    python -m tests.policies.decided          # rewrites decided.json

A change that is meant to leave decisions alone leaves the digests alone. Another numpy, or another
processor, rounds sums otherwise, which now and then decides between two arms: digests are compared
where they were made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy._core._multiarray_umath import __cpu_features__

from configs.schema import PolicySettings
from policies.catalog import CATALOG, build_policy
from policies.interface import Decision, StepObs
from tests.policies.simulated import (
    DRAFTERS,
    INDEX,
    NEURAL,
    Noise,
    Rows,
    Simulation,
    World,
    calibration,
)

STORED = Path(__file__).with_name("decided.json")
GOOD = (0.6, 0.58, 0.57, 0.56, 0.55, 0.55, 0.55, 0.55)
SMALL = World(
    eagle=GOOD, plain_s=0.00069, draft_s=0.00011, verify_per_token_s=2e-6, cold_s=0.0003,
    plan_s=0.0001, look_s=0.00008, noise=Noise(0.1, 0.02, 0.003), untimed_share=0.1,
    rows={1: Rows(0.25, 0.15), 3: Rows(0.1, 0.45, 0.5), 5: Rows(0.1, 0.8, 1.0)},
    difficulties=(-1.0, 0.0, 1.0), request_tokens=25,
)  # fmt: skip
USELESS = replace(SMALL, eagle=(0.02,) * 8, rows={})
MIXES = {"both": ("eagle3", "other"), "all": ("eagle3", "other", "suffix")}
MIXED = replace(
    SMALL, batch=4, others={"other": (0.55,) * 8}, mixes=MIXES, are_opposed=True
)  # fmt: skip
PHASES = {
    "one request": (SMALL, USELESS, SMALL),
    "no use": (USELESS,),
    "load": (SMALL, replace(SMALL, batch=24), replace(USELESS, batch=8), SMALL),
    "no index": (replace(SMALL, has_index=False, rows={}), replace(USELESS, has_index=False)),
    "mixed": (MIXED, replace(MIXED, eagle=(0.1,) * 8)),
}
"""Worlds one after another; before the last a version with other figures is swapped in."""
CAPPED = "load, capped"
ALL_OF_THEM = ("goodput", "ragged", "hedge")
"""Policies that play in every world; others do in ``load``."""


def cases() -> Iterator[tuple[str, str]]:
    for kind in CATALOG:
        yield from ((kind, name) for name in (PHASES if kind in ALL_OF_THEM else ("load",)))
    yield from ((kind, CAPPED) for kind in ALL_OF_THEM)


class Capped(Simulation):
    """Requests that may draft no further than they go on."""

    def _seen(self, world: World, matches: tuple[int, ...] | None) -> StepObs:
        caps = bytes(min(left, world.max_draft) for left in self._left)
        return replace(super()._seen(world, matches), caps=caps)


def decided(kind: str, name: str, *, steps: int = 400, seed: int = 3) -> str:
    """Digest of everything that a policy decides in the worlds of this name."""
    phases = PHASES[name.removesuffix(", capped")]
    drafters = {"eagle3": NEURAL, "other": NEURAL, "suffix": INDEX} if name == "mixed" else DRAFTERS
    if not phases[0].has_index:
        drafters = {"eagle3": NEURAL}
    policy = build_policy(PolicySettings(kind=kind), drafters, seed, 8, phases[0].mixes)
    policy.calibrate(phases[0].profile())
    server = (Capped if name == CAPPED else Simulation)(policy, seed)
    found = hashlib.sha256()

    def note(decision: Decision, _rows: object) -> None:
        allocation, picks = decision.allocation, decision.picks
        found.update(
            repr(
                (
                    decision.drafter, decision.draft_k, f"{decision.propensity:.9g}",
                    decision.explore, decision.reason, decision.policy,
                    allocation and (f"{allocation.threshold:.9g}", allocation.budget_each),
                    picks and [(one.drafter, f"{one.propensity:.9g}", one.reason) for one in picks],
                )
            ).encode()
        )  # fmt: skip

    for number, world in enumerate(phases):
        if number == len(phases) - 1:
            server.swap(number, calibration(world))
        server.run(world, steps, note)
    return found.hexdigest()[:16]


def made_with() -> dict[str, str]:
    """What rounding depends on."""
    features = sorted(name for name, has in __cpu_features__.items() if has)
    digest = hashlib.sha256(" ".join(features).encode()).hexdigest()[:16]
    return {"numpy": np.__version__, "processor": digest}


def main() -> None:
    found = {f"{kind}, {name}": decided(kind, name) for kind, name in cases()}
    STORED.write_text(json.dumps({"made_with": made_with(), "digests": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
