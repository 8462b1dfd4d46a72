"""A simulated card that serves a small target: an index on the device, a neural drafter, and a mix
in which text begins each draft and the neural drafter goes on.

Rounds overlap: the next one is planned before the last one is read, and where the host reads one
late the next one seems short. To a policy each of the three is one drafter.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from configs.schema import PolicySettings
from policies.catalog import build_policy
from policies.interface import CostSample, DraftPolicy, Outcome, RowOutcomes, StepObs
from tests.policies.simulated import NEURAL, Noise, Simulation, Traits, World

INDEX, MIX = "text", "eagle3+text"
ON_DEVICE = Traits(True, False, (0.4,), 0.01, picks_itself=True)
DRAFTERS = {"eagle3": NEURAL, INDEX: ON_DEVICE}
PASSES = 4
"""Tokens that the neural drafter of a mix drafts at most."""
_NOISE = Noise(0.1, 0.0, 0.0)
_LATE_SHARE, _LATE_S = 0.02, 0.003
_LEAST_S = 0.0001
"""Least time between two reads."""


@dataclass(frozen=True)
class Card(World):
    """Times of SmolLM2-135M on an H200."""

    plain_s: float = 0.00069
    draft_s: float = 0.000065
    """Seconds of a pass of the neural drafter."""
    index_s: float = 0.00002
    verify_s: float = 0.000003
    """Seconds for each draft token, whatever the batch."""
    cold_s: float = 0.0001
    noise: Noise = _NOISE
    kept: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Conditional acceptance of the index and of the mix by position."""
    is_mixed: bool = True
    offers_neural: bool = True
    """The neural drafter alone is offered beside the mix."""
    has_index: bool = False
    """None on the host."""

    @property
    def drafters(self) -> tuple[str, ...]:
        neural = ("eagle3",) if self.offers_neural else ()
        return (*neural, INDEX, *((MIX,) if self.is_mixed else ()))

    @property
    def neural(self) -> Mapping[str, tuple[float, ...]]:
        return {"eagle3": self.eagle, **self.kept}

    def seconds(self, drafter: str, k: int) -> tuple[float, float]:
        passes = {"eagle3": k, MIX: min(k, PASSES)}.get(drafter, 0)
        draft = passes * self.draft_s + (self.index_s if k and drafter != "eagle3" else 0.0)
        return self.slowdown * (self.plain_s + k * self.verify_s + draft), self.slowdown * draft

    def rows_of(self, drafter: str) -> set[str]:
        return {"eagle3"} & {drafter.partition("+")[0]}

    def profile(self, scale: float = 1.0, draft: float = 1.0, slope: float = 1.0):
        wrong = replace(
            self, slowdown=scale, draft_s=self.draft_s * draft, verify_s=self.verify_s * slope
        )
        arms = [("none", 0)] + [(d, k) for d in (*DRAFTERS, MIX) for k in (1, 2, 4, 6, 8)]
        return [CostSample(d, k, self.batch, *wrong.seconds(d, k)) for d, k in arms]


SIZES = {1: {}, 8: {"plain_s": 0.0008, "draft_s": 0.00007, "verify_s": 0.000004},
         32: {"plain_s": 0.00115, "draft_s": 0.00008, "verify_s": 0.00001}}  # fmt: skip
"""What differs by batch."""


def card(
    index: tuple[float, ...], eagle: tuple[float, ...], mix: tuple[float, ...], batch: int = 1
) -> Card:
    """A card whose drafters keep so much at position 1, 2, ..."""
    return Card(batch=batch, eagle=eagle, kept={INDEX: index, MIX: mix}, **SIZES[batch])


def _flat(kept: float) -> tuple[float, ...]:
    return (kept,) * 8


DOMAINS = {
    "index": (_flat(0.75), _flat(0.6), (0.8,) * 4 + (0.75,) * 4),
    "rising": ((0.55, 0.85) + (0.9,) * 6, _flat(0.55), (0.68, 0.82, 0.84, 0.84) + (0.85,) * 4),
    "high": (_flat(0.9), _flat(0.7), _flat(0.9)),
    "eagle": (_flat(0.3), _flat(0.75), (0.78, 0.76, 0.75, 0.75) + (0.3,) * 4),
    "both bad": (_flat(0.03), _flat(0.08), _flat(0.09)),
}
"""What the index, the neural drafter and the mix keep of some traffic."""


class Overlapping:
    """Passes everything on to a policy, outcomes one round late and with the times of a host that
    sometimes reads late."""

    def __init__(self, policy: DraftPolicy, seed: int) -> None:
        self.policy = policy
        self._rng = random.Random(seed)
        self._waiting: Outcome | None = None
        self._late_s = 0.0

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def observe(self, outcome: Outcome) -> None:
        before, self._waiting = self._waiting, outcome
        if before is None:
            return
        late_s = self._rng.random() * _LATE_S if self._rng.random() < _LATE_SHARE else 0.0
        seen_s = max(before.step_s - self._late_s, _LEAST_S) + late_s
        self._late_s = late_s
        share = min(before.draft_s / before.step_s, 1.0)
        plan_s = min(before.plan_s, seen_s / 2)
        self.policy.observe(replace(before, step_s=seen_s, draft_s=share * seen_s, plan_s=plan_s))


class Server(Simulation):
    """Text drafters lack no rows."""

    def _judged(self, world: Card, drafter: str, rows: RowOutcomes) -> RowOutcomes:
        """In steps of the mix, what text would have kept is known as far as tokens go."""
        if drafter != MIX or not rows.num_verified[0]:
            return rows
        own, mix, k = world.kept[INDEX], world.kept[MIX], rows.num_verified[0]
        tried, kept = [], []
        for accepted in rows.num_accepted:
            most, num = min(accepted + 1, k), 0
            # What the mix keeps, text mostly keeps as well: its tokens are there first.
            while num < most and (
                self._rng.random() < min(own[num] / mix[num], 1.0)
                if num < accepted
                else self._rng.random() < max(own[num] - mix[num], 0.0) / (1 - mix[num])
            ):
                num += 1
            tried.append(min(num + 1, most))
            kept.append(num)
        return replace(rows, judged={INDEX: RowOutcomes(tried, kept)})

    def _seen(self, world: World, matches: tuple[int, ...] | None) -> StepObs:
        seen = super()._seen(world, matches)
        pending = {k: n for k, n in seen.pending_rows.items() if world.rows_of(k)}
        return replace(seen, pending_rows=pending)


def served(world: Card, seed: int, *, profiled: bool = True, **settings: object) -> Server:
    """A server with the default policy."""
    mixes = {MIX: ("eagle3", INDEX)} if world.is_mixed else {}
    policy = build_policy(PolicySettings(**settings), DRAFTERS, seed, world.max_draft, mixes)
    if profiled:
        policy.calibrate(world.profile())
    return Server(Overlapping(policy, seed), seed)
