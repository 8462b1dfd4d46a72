"""A hedge over the drafters that a server holds: exponential weights, and a K of its own for each.

Every drafter on the device is an expert. Experts take turns in stretches of steps, because one that
was idle must catch up first; which one is next is drawn by the weights. At every step each expert
is charged the loss that is expected of it, by its own acceptance and times, and the one that
drafted what it lost beyond, divided by the probability of its stretch: a doubly robust estimate of
all losses (Dudik, Langford and Li 2011), where one of the drafter heard alone would scatter so much
that only a very slow rate could follow it. Losses are of tokens per time of a plain step, relative
to the best expert's; times are smoothed, so a late step is no loss of its drafter. A fixed share
(Herbster and Warmuth 1998) keeps every expert within reach.

A stretch tells of one expert. Where the server can mix all experts in one step, some stretches give
each request an expert of its own at random. They tell of all experts at once, on the same traffic,
and take the place of all other exploring: full information, for as many requests as the batch has.

A version is an expert's life. New weights start with the mean of all experts' weights and with the
acceptance that was published with them; a version that comes back, in a rollback, finds the weight
and the acceptance it left with. So does one that goes on as the former version of its drafter:
where a server keeps that as a drafter of its own, this is a hedge over versions, and one that is
worse than its predecessor is left within a few stretches.

Within an expert K is the one with the most expected tokens per time, by Kaplan-Meier hazards whose
counts fade; in a share of the steps any K runs.

Source: HedgeSpec (arXiv:2510.20064) hedges over drafters with full information from the verified
text, which needs every drafter to compute every request's rows; here only mixed steps do.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from configs.policies import HedgeSettings
from configs.schema import PolicySettings
from policies.calibration import Calibration
from policies.interface import CostSample, Decision, Outcome, Pick, PolicyContext, StepObs
from policies.lengths import spread
from policies.live_costs import LiveCosts
from policies.picks import picked_mixes
from policies.versions import remember

_PRIOR_KEPT, _PRIOR_ROUNDS = 1.2, 2.0
"""Rounds that every position starts with, and those of them that kept it."""
_PUBLISHED_ROUNDS = 16.0
"""Rounds that a published acceptance counts for."""
_MOST_WEIGHT = 4.0
"""Largest weight of what was heard against what was expected."""
_LOST_WORTH, _LEAST_STEPS = 0.8, 3
"""A stretch ends early, after so many steps, if one of its experts is worth less than this share of
the best one: nobody has to hear a random drafter for a whole stretch."""


@dataclass(slots=True)
class _Life:
    """What is known of one version of an expert."""

    kept: list[float]
    """[K] fading counts of requests that kept position 1, 2, ... and all before it,"""
    reached: list[float]
    """[K] and of those in which it was verified."""
    log_weight: float = 0.0

    @classmethod
    def of(cls, published: Sequence[float], max_draft: int) -> _Life:
        """A new one, from what was published with it."""
        kept, reached = [_PRIOR_KEPT] * max_draft, [_PRIOR_ROUNDS] * max_draft
        for j, hazard in enumerate(published[:max_draft]):
            kept[j] += _PUBLISHED_ROUNDS * hazard
            reached[j] += _PUBLISHED_ROUNDS
        return cls(kept, reached)

    def observe(self, rounds: Sequence[tuple[int, int]], keep: float) -> None:
        """Count (verified, kept) draft tokens of some requests, older counts fading."""
        for counts, prior in ((self.kept, _PRIOR_KEPT), (self.reached, _PRIOR_ROUNDS)):
            counts[:] = [prior + keep * (count - prior) for count in counts]
        for verified, kept in rounds:
            for j in range(min(kept + 1, verified)):
                self.reached[j] += 1
                self.kept[j] += j < kept

    def tokens(self) -> list[float]:
        """[K + 1] expected tokens of a request at K = 0, 1, ..."""
        found, survival = [1.0], 1.0
        for kept, reached in zip(self.kept, self.reached, strict=True):
            survival *= kept / reached
            found.append(found[-1] + survival)
        return found


@dataclass(slots=True)
class _Expert:
    """One drafter."""

    costs: LiveCosts
    life: _Life
    known: dict[int, _Life]
    """All versions, the one in force too. The same for a drafter and for its former version."""
    version: int | None = None

    def best_k(self, batch: int, max_k: int) -> int:
        """The K >= 1 with the most tokens per time."""
        tokens, shares = self.life.tokens(), self.costs.shares(batch)
        return max(range(1, max_k + 1), key=lambda k: tokens[k] / shares[k])

    def worth(self, batch: int, max_k: int) -> float:
        """Expected tokens per time of a plain step at that K."""
        k = self.best_k(batch, max_k)
        return self.life.tokens()[k] / self.costs.shares(batch)[k]


class _Stretch(NamedTuple):
    """Steps of one expert, or of all of them in a mix."""

    drafter: str
    chance: float
    """Probability with which it was begun."""
    left: int


class _Heard(NamedTuple):
    """The note of a decision whose losses count."""

    chance: float
    """Probability with which these experts were heard."""

    def columns(self) -> Mapping[str, float]:
        return {"heard": self.chance}


class HedgePolicy:
    """Implements ``DraftPolicy``. Deterministic for one seed and one sequence of calls."""

    kind = "hedge"
    wants_profile = True

    def __init__(self, context: PolicyContext, own: HedgeSettings, random_share: float) -> None:
        self._own, self._random_share = own, random_share
        self._max_draft = context.max_draft
        on_device = [kind for kind, traits in context.drafters.items() if traits.on_device]
        known: dict[str, dict[int, _Life]] = {}
        self._experts = {
            kind: _Expert(
                LiveCosts(context.drafters, kind, context.max_draft),
                _Life.of((), context.max_draft),
                known.setdefault(context.drafters[kind].former_of or kind, {}),
            )
            for kind in on_device or context.drafters
        }
        self._ready = tuple(self._experts)
        """Those that could draft when this was asked last."""
        everyone = set(self._experts)
        mixes = picked_mixes(context.drafters, context.mixes)
        self._mix = next((name for name, of in mixes.items() if set(of) == everyone), None)
        """The mix that all experts draft in."""
        self._stretch: _Stretch | None = None
        self._rng = random.Random(context.seed)
        self._counts = Counter[str]()

    @classmethod
    def from_settings(cls, settings: PolicySettings, context: PolicyContext) -> Self:
        """Read ``policy.hedge`` and ``policy.random_share``."""
        return cls(context, settings.hedge, settings.random_share)

    def calibrate(self, samples: Sequence[CostSample]) -> None:
        """Start the step times from those measured at start-up."""
        for expert in self._experts.values():
            expert.costs.calibrate(samples)

    def rest(self) -> Decision | None:
        """``None``: every step is planned."""
        return None

    def wants_matches(self) -> bool:
        """Drafters on the device need none."""
        return False

    # ---- deciding ------------------------------------------------------------------------------

    def plan(self, obs: StepObs) -> Decision:
        """The stretch under way, or a new one if it is over or its expert cannot draft."""
        max_k = obs.longest(self._max_draft)
        ready = [kind for kind in self._experts if kind in obs.drafters]
        if not ready or not max_k:
            return self._plain(1.0)
        self._ready = tuple(ready)
        stretch, begins = self._stretch, False
        if stretch is None or not stretch.left or stretch.drafter not in obs.drafters:
            stretch, begins = self._drawn(ready, obs), True
        self._stretch = stretch._replace(left=stretch.left - 1)
        self._counts[stretch.drafter] += 1
        chance = stretch.chance if begins else 1.0
        if stretch.drafter == self._mix:
            return self._mixed(obs, max_k, stretch, chance)
        best = self._experts[stretch.drafter].best_k(obs.batch, max_k)
        law = spread(best, max_k, self._random_share)
        k = self._rng.choices(range(max_k + 1), law)[0]
        if not k:
            return self._plain(chance * law[0])
        note = _Heard(stretch.chance) if k == best else None
        propensity = chance * law[k]
        return Decision(stretch.drafter, k, propensity, k != best, "hedge", self.kind, note=note)

    def _plain(self, propensity: float) -> Decision:
        explore = propensity < 1
        return Decision("none", 0, propensity, explore, reason="plain", policy=self.kind)

    def _drawn(self, ready: Sequence[str], obs: StepObs) -> _Stretch:
        """A new stretch: of all experts, or of one by its weight."""
        all_chance = 0.0
        if self._mix in obs.drafters and obs.batch > 1 and len(ready) > 1:
            all_chance = self._own.mixing
        weights = self.weights(ready)
        mixing = 0.0 if all_chance else self._own.mixing
        chances = [(1 - all_chance) * ((1 - mixing) * w + mixing / len(ready)) for w in weights]
        names = [*ready, self._mix or ""]
        at = self._rng.choices(range(len(names)), [*chances, all_chance])[0]
        return _Stretch(names[at], [*chances, all_chance][at], self._own.stretch_steps)

    def weights(self, kinds: Sequence[str]) -> list[float]:
        """Weights of some experts, adding up to 1."""
        logs = [self._experts[kind].life.log_weight for kind in kinds]
        raw = [math.exp(one - max(logs)) for one in logs]
        return [one / sum(raw) for one in raw]

    def _mixed(self, obs: StepObs, max_k: int, stretch: _Stretch, chance: float) -> Decision:
        """A step in which each request has an expert of its own, all as likely."""
        kinds = list(self._experts)
        k = max(expert.best_k(obs.batch, max_k) for expert in self._experts.values())
        picks = tuple(Pick(self._rng.choice(kinds), 1 / len(kinds), "try") for _ in obs.caps)
        return Decision(
            stretch.drafter, k, chance, explore=True, reason="hear", policy=self.kind, picks=picks,
            note=_Heard(1.0),
        )  # fmt: skip

    # ---- learning ------------------------------------------------------------------------------

    def observe(self, outcome: Outcome) -> None:
        """Follow times and acceptance, and charge losses."""
        self._observe_time(outcome)
        rows, picks = outcome.rows, outcome.decision.picks
        rounds = list(zip(rows.num_verified, rows.num_accepted, strict=True))
        if picks is not None:
            # Where a request has ended meanwhile, nobody knows whose row is missing.
            whose = [pick.drafter for pick in picks] if len(picks) == len(rounds) else []
        else:
            whose = [outcome.decision.drafter] * len(rounds)
        own: dict[str, list[tuple[int, int]]] = {}
        for kind, one in zip(whose, rounds, strict=False):
            own.setdefault(kind, []).append(one)
        for kind, its in own.items():
            if kind in self._experts:
                keep = 0.5 ** (1 / self._own.half_life_steps)
                self._experts[kind].life.observe(its, keep)
        if isinstance(heard := outcome.decision.note, _Heard):
            self._charge(outcome.batch, outcome.decision.draft_k, own, heard.chance)

    def _observe_time(self, outcome: Outcome) -> None:
        if outcome.has_prefill or outcome.step_s <= outcome.plan_s:
            return
        seconds = outcome.step_s - outcome.plan_s
        if outcome.decision.draft_k == 0:
            for expert in self._experts.values():
                expert.costs.observe(0, outcome.batch, seconds)
        elif (expert_ := self._experts.get(outcome.decision.drafter)) is not None:
            expert_.costs.observe(outcome.decision.draft_k, outcome.batch, seconds)

    def _charge(
        self, batch: int, k: int, own: Mapping[str, Sequence[tuple[int, int]]], chance: float
    ) -> None:
        """Lower all weights by the losses of a step.

        Args:
            own: rounds of each expert that drafted.
            chance: probability with which these experts were heard.
        """
        experts = {kind: self._experts[kind] for kind in self._ready}
        worth = {kind: one.worth(batch, self._max_draft) for kind, one in experts.items()}
        best = max(worth.values())
        for kind, expert in experts.items():
            loss = expected = 1 - worth[kind] / best
            if rounds := own.get(kind):
                tokens = 1 + sum(kept for _, kept in rounds) / len(rounds)
                heard = 1 - tokens / expert.costs.shares(batch)[k] / best
                loss += min(1 / chance, _MOST_WEIGHT) * (heard - expected)
            expert.life.log_weight -= self._own.rate * loss
        if any(worth.get(kind, best) < _LOST_WORTH * best for kind in own):
            self._cut_stretch(own)
        lives = [expert.life for expert in experts.values()]
        highest = max(life.log_weight for life in lives)
        raw = [math.exp(life.log_weight - highest) for life in lives]
        shared = self._own.share * sum(raw) / len(raw)
        for life, weight in zip(lives, raw, strict=True):
            life.log_weight = math.log(weight + shared)

    def _cut_stretch(self, own: Collection[str]) -> None:
        """End the stretch under way early, if it is the one that these experts draft in."""
        stretch = self._stretch
        if stretch is not None and (stretch.drafter in own or len(own) > 1):
            due = max(_LEAST_STEPS - self._own.stretch_steps + stretch.left, 0)
            self._stretch = stretch._replace(left=min(stretch.left, due))

    def on_swap(self, drafter: str, version: int, calibration: dict[str, Any]) -> None:
        """A version leaves with what it has shown, and the next one begins, or goes on."""
        expert = self._experts.get(drafter)
        if expert is None:
            return
        self._stretch = None
        life = expert.known.get(version)
        if life is None:
            life = _Life.of(Calibration.of(calibration).acceptance, self._max_draft)
            weights = [math.exp(one.life.log_weight) for one in self._experts.values()]
            life.log_weight = math.log(sum(weights) / len(weights))
        remember(expert.known, version, life)
        expert.version, expert.life = version, life

    def figures(self) -> dict[str, Any]:
        """JSON-ready: weights, versions, expected tokens of a whole draft, steps by drafter."""
        kinds = list(self._experts)
        return {
            "kind": self.kind,
            "weights": {
                kind: round(weight, 4)
                for kind, weight in zip(kinds, self.weights(kinds), strict=True)
            },
            "tokens": {
                kind: round(one.life.tokens()[-1], 3) for kind, one in self._experts.items()
            },
            "versions": {
                kind: one.version for kind, one in self._experts.items() if one.version is not None
            },
            "decisions": dict(self._counts),
        }
