"""Acceptance of each draft position of one drafter: Kaplan-Meier hazards with decay.

A round that verified k tokens and accepted A observes positions 1 to min(A + 1, k) and none beyond:
longer drafts are right-censored. The hazards c_j = P(position j accepted | all before it accepted)
therefore give the expected tokens of *every* k, whichever was tried.

Old evidence loses weight in two ways: by a half-life in rounds, and at once when a change detector
(Page 1954, CUSUM) finds that traffic has changed. What was usual before is remembered then, in case
traffic changes back (``policies.regimes``).

What is recent and what is usual are kept apart, because requests differ: a drafter that fails on
one request does well on the next, but once it is idle nothing new is learned of it. So evidence
that lasts ten times as long is the prior of the recent one, and while a drafter is idle its recent
evidence fades: what is expected of it returns to what is usual.

Evidence is kept by kind of the text match, as the drafter that found it numbers them, for neural
drafters too: text that has occurred before is easy for them as well. Judged by its average, a
neural drafter looks best exactly where no match exists, and there it is worst (documentation, K =
4, bundled target: 1.8 tokens a step without a match, 2.7 after a match of 6 to 8 tokens;
benchmarks/by_match.py).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import mul
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.dispersion import Dispersion
from policies.interface import DrafterTraits
from policies.log_odds import log_odds
from policies.regimes import Evidence, Regimes, Shift, Since
from policies.round_counts import Beyond, ByBucket, Outcomes, counts_of

_PRIOR_WEIGHT, _DEEP_WEIGHT = 4.0, 12.0
"""Rounds that the prior of the first position counts for, and those of deeper ones: they are seldom
reached, and much like the one before them."""
_FLOOR_WEIGHT, _POOLED_FLOOR = 4.0, 1.0
"""Rounds that decay leaves of old observations, without a pool and of one and with one: an idle
drafter is remembered, but weakly."""
_POOL_WEIGHT = 2.0
"""Rounds that a drafter's pool of all buckets counts for as the prior of each bucket."""
_DEPTH_FACTOR = 0.97
"""Prior of c_{j + 1} relative to c_j."""
_IDLE_RATE = 0.25
"""Decay of a drafter's evidence in a round without it, relative to a round with it."""
_LASTING = 10.0
"""Half-life of lasting evidence, in those of recent evidence."""
_LASTING_WEIGHT, _BUCKET_LASTING_WEIGHT = 200.0, 30.0
"""Rounds that lasting evidence counts for as the prior of recent evidence: in a pool, which varies
with the requests of the hour, and in a bucket without one, whose text is alike."""
_FADE = 0.5
"""Half-life of an idle drafter's recent evidence, in those of a busy one's."""
_FADE_ROUNDS = 8
"""Rounds, for each request of the batch, after which fading is worth computing again."""
_SHIFT_WEIGHT, _RETURN_WEIGHT = 48.0, 4.0
"""Rounds that recent evidence counts for after a detected shift, of which it is then, and when a
former regime returns, of which it is not."""
_LASTING_SHIFT_WEIGHT = 400.0
"""Rounds that a bucket's lasting evidence counts for after a shift; the pool has regimes."""
_STALE_WEIGHT = 4.0
"""Rounds that an idle mix's evidence counts for after the traffic of a member has changed."""
_MIN_STEPS = 24
"""Least half-life in steps: at a batch of 64, 200 rounds are three steps, mostly noise."""
NOTHING = 1e-9
POOL = -1
"""Row of a drafter's pool: the last one."""

Floats = NDArray[np.float64]


class DrafterAcceptance:
    """Conditional acceptance of one drafter by (bucket, position), decayed by rounds.

    The buckets of a drafter with a single prior share a pool of its rounds, from which each bucket
    takes its prior; the buckets of a drafter with a prior for each are independent.
    """

    def __init__(
        self, kind: str, traits: DrafterTraits, half_life_rounds: float, shape: tuple[int, int]
    ) -> None:
        """
        Args:
            shape: buckets, and the largest K.

        Raises:
            ValueError: the drafter has neither one prior nor one for each bucket.
        """
        self._priors = traits.prior_acceptance
        """Of the first position, by row if there is no pool; of a mix by position, once its members
        are known."""
        has_pool = len(self._priors) == 1
        num_rows = shape[0] + 1
        if len(self._priors) not in (1, shape[0]):
            raise ValueError(
                f"prior_acceptance of drafter {kind!r} must hold 1 or {shape[0]} values, "
                f"got {len(self._priors)}"
            )
        self._is_silent = traits.needs_match
        self._half_life_rounds = half_life_rounds
        floors = np.full(num_rows, _FLOOR_WEIGHT)
        if has_pool:
            floors[:POOL] = _POOLED_FLOOR
        self._floors = floors[:, None]
        self._since = Since(num_rows)
        own = (num_rows - 1,) if has_pool else range(num_rows - 1)
        self._regimes = {row: Regimes(shape[1]) for row in own}
        """Of the rows whose lasting evidence is a prior."""
        self._seen_at = [0.0] * num_rows
        """Rounds that the engine had done at the last update of each row."""
        self._recent = self._lasting = Evidence.none((num_rows, shape[1]))
        self._faded_at = 0.0
        """Rounds that the engine had done when recent evidence was last brought up to date."""
        self._hazards = np.zeros((num_rows, shape[1]))
        self._usual = np.zeros((num_rows, shape[1]))
        """The same by lasting evidence alone."""
        self._expected: tuple[Floats, Floats] | None = None
        """[B + 1, K + 1] expected tokens of every row, and [B, K + 1] without the pool; ``None`` if
        evidence has come since."""
        self._stale = self._all_rows()
        """Rows whose chained hazards are to be computed again."""
        self._dispersion = Dispersion()

    @property
    def _has_pool(self) -> bool:
        return len(self._hazards) - 1 in self._regimes

    def observe(self, step: ByBucket, batch: int, clock: float, beyond: Beyond) -> None:
        """Take in the rounds of one step, by bucket.

        Args:
            batch: requests of the step; sets the least half-life.
            clock: rounds that the engine has done, these included.
            beyond: see ``AcceptanceModel``.
        """
        expected = self._all_expected()[0].tolist()
        shifted: dict[int, Shift] = {}
        half_life = max(self._half_life_rounds, _MIN_STEPS * batch)
        factors, lasting_factors = [1.0] * len(expected), [1.0] * len(expected)
        recent, lasting = self._recent, self._lasting
        new: list[Sequence[Sequence[float]]] = []
        rows = self._rows(step)
        for row, outcomes in rows:
            rounds, surprise = 0, 0.0
            for (num_verified, num_accepted), count in outcomes.items():
                rounds += count
                surprise += (num_accepted + 1 - expected[row][num_verified]) * count
            reached, accepted = counts_of(outcomes, recent.reached.shape[1])
            if (excess := beyond.get(None if row == POOL else row)) is not None:
                surprise -= excess.tokens
                accepted = (np.array(accepted) - excess.kept).tolist()
            new.append((reached, accepted))
            shift = self._since.notices(row, new[-1], surprise, rounds, self._usual[row])
            if shift is not None:
                shifted[row] = shift
            if row == POOL:
                self._dispersion.observe(reached[0], accepted[0], expected[row][1] - 1, batch)
            idle = max(0.0, clock - self._seen_at[row] - rounds)
            factors[row] = math.exp2(-(rounds + _IDLE_RATE * idle) / half_life)
            lasting_factors[row] = math.exp2(-rounds / (_LASTING * half_life))
            self._seen_at[row] = clock
            self._stale.add(row)
        self._faded_at = clock
        scaled = np.array(factors)[:, None] * recent.reached
        kept = recent.scaled(np.maximum(scaled, np.minimum(recent.reached, self._floors)))
        lasting = lasting.times(np.array(lasting_factors)[:, None])
        at = [row for row, _ in rows]
        counts = np.array(new, dtype=np.float64)
        for evidence in (kept, lasting):
            evidence.reached[at] += counts[:, 0]
            evidence.accepted[at] += counts[:, 1]
        self._recent, self._lasting = kept, lasting
        self._follow(dict(zip(at, counts, strict=True)), shifted, clock)
        if beyond:  # what is taken out of few rounds can be more than they kept
            for evidence in (self._recent, self._lasting):
                np.clip(evidence.accepted, 0.0, evidence.reached, out=evidence.accepted)
        self._expected = None

    def _follow(
        self, step: Mapping[int, Floats], shifted: Mapping[int, Shift], clock: float
    ) -> None:
        """Let the regimes of rows change, after a step's rounds were taken in.

        Args:
            step: [2, K] rounds of each row.
            shifted: rows in which a shift was noticed.
        """
        recent, lasting = self._recent, self._lasting
        for row, counts in step.items():
            regimes, shift = self._regimes.get(row % len(self._hazards)), shifted.get(row)
            if shift is not None:
                factor = _SHIFT_WEIGHT / max(float(shift.since[0, 0]), _SHIFT_WEIGHT)
                recent.reached[row], recent.accepted[row] = factor * shift.since
            if regimes is None:
                if shift is not None:
                    factor = _limit(lasting, row, _LASTING_SHIFT_WEIGHT)
                    lasting.reached[row] *= factor
                    lasting.accepted[row] *= factor
                continue
            if regimes.returns(counts, clock):
                own, regimes.former = regimes.former, lasting.row(row)
                factor = _limit(recent, row, _RETURN_WEIGHT)
                recent.reached[row] *= factor
                recent.accepted[row] *= factor
            elif shift is not None:
                own = regimes.begins(shift, lasting.row(row), clock)
            else:
                continue
            lasting.reached[row], lasting.accepted[row] = own

    def fade(self, clock: float, batch: int) -> None:
        """Let recent evidence fade if the drafter has been idle.

        Args:
            batch: requests of the step; sets the least half-life.
            clock: rounds that the engine has done.
        """
        idle = clock - self._faded_at
        if idle < _FADE_ROUNDS * batch:
            return
        self._faded_at = clock
        self._seen_at = [at + idle for at in self._seen_at]
        half_life = _FADE * max(self._half_life_rounds, _MIN_STEPS * batch)
        self._recent = self._recent.times(math.exp2(-idle / half_life))
        self._stale.update({POOL, *np.flatnonzero(self._lasting.reached[:POOL, 0]).tolist()})
        self._expected = None

    def expect(self, hazards: Floats, clock: float, *, is_stale: bool) -> None:
        """Take over what the members of a mix keep: it is the prior of the mix's own rounds.

        Args:
            hazards: [K] of all rounds.
            is_stale: the mix's own rounds are of other traffic.
        """
        self._priors = tuple(hazards.tolist())
        if is_stale:
            self.replace(self._lasting.limited(_STALE_WEIGHT), clock)
        self._stale.add(POOL)
        self._expected = None

    def _all_rows(self) -> set[int]:
        return set(range(POOL, len(self._hazards) - 1))

    def _rows(self, step: ByBucket) -> list[tuple[int, Outcomes]]:
        """The step's rounds by row of evidence: every bucket's, and all together for the pool."""
        rows = [(bucket, outcomes) for bucket, outcomes in step.items() if bucket is not None]
        if self._has_pool:
            everything = Counter[tuple[int, int]]()
            for outcomes in step.values():
                everything.update(outcomes)
            rows.append((POOL, everything))
        return rows

    def hazards(self) -> Floats:
        """[B + 1, K] posterior means of c_1, c_2, ... by bucket; the last row is the pool's."""
        if not self._stale:
            return self._hazards
        for row in self._stale & {POOL} if self._has_pool else self._stale - {POOL}:
            self._hazards[row], self._usual[row] = self._chained(row)
        if self._has_pool:
            for hazards, evidence in ((self._hazards, self._recent), (self._usual, self._lasting)):
                hazards[:POOL] = (evidence.accepted[:POOL] + _POOL_WEIGHT * hazards[POOL]) / (
                    evidence.reached[:POOL] + _POOL_WEIGHT
                )
        self._stale.clear()
        return self._hazards

    def _chained(self, row: int) -> tuple[list[float], list[float]]:
        """Recent and usual hazards of a row. The prior of a position's usual one comes from the
        position before it. The usual one is the prior of the recent one, moved in log-odds as the
        position before it was: text that is hard now is so at every depth."""
        prior = self._priors if self._has_pool else self._priors[row : row + 1]
        regimes = self._regimes[row % len(self._hazards)]
        recent, lasting = self._recent, self._lasting
        own = _usual(lasting.reached[row].tolist(), lasting.accepted[row].tolist(), prior)
        former_reached, former_accepted = regimes.former.tolist()
        former = own if regimes.is_alone else _usual(former_reached, former_accepted, prior)
        regimes.learn(own, former)
        usual = regimes.mixed(self._faded_at)
        hazards: list[float] = []
        lasting_weight = _LASTING_WEIGHT if self._has_pool else _BUCKET_LASTING_WEIGHT
        move = 0.0
        for accepted, reached, hazard in zip(
            recent.accepted[row].tolist(), recent.reached[row].tolist(), usual, strict=True
        ):
            odds = log_odds(hazard)
            expected = 1 / (1 + math.exp(-odds - move))
            hazards.append((accepted + lasting_weight * expected) / (reached + lasting_weight))
            move = log_odds(hazards[-1]) - odds
        return hazards, usual

    def expected_tokens(self) -> Floats:
        """[B, K + 1]; see ``AcceptanceModel``. The same array until evidence comes."""
        return self._all_expected()[1]

    def recent(self) -> tuple[Floats, Floats]:
        """[B, K] hazards by bucket, and the recent rounds behind them."""
        return self.hazards()[:POOL], self._recent.reached[:POOL]

    def _all_expected(self) -> tuple[Floats, Floats]:
        if self._expected is None:
            hazards = self.hazards()
            terms = np.ones((hazards.shape[0], hazards.shape[1] + 1))
            np.cumprod(hazards, axis=1, out=terms[:, 1:])
            if self._is_silent:
                terms[0, 1:] = 0.0
            tokens = terms.cumsum(axis=1)
            self._expected = tokens, tokens[:POOL]
        return self._expected

    def doubt(self, k: int) -> float:
        """Standard deviation of what position k adds to a draft, as a share of its tokens."""
        if not self._has_pool or k > self._recent.reached.shape[1]:
            return 0.0
        hazards = self.hazards()[POOL, :k].tolist()
        survival, tokens = 1.0, 1.0
        for hazard in hazards[:-1]:
            survival *= hazard
            tokens += survival
        weight = float(self._recent.reached[POOL, k - 1]) + 1
        return survival / tokens * math.sqrt(hazards[-1] * (1 - hazards[-1]) / weight)

    def spread(self, k: int) -> float:
        """Standard deviation of the expected tokens of drafts of k tokens, as a share of them: by
        the rounds behind each hazard, those behind its prior included, and by how much rounds
        resemble each other."""
        if not self._has_pool:
            return 0.0
        hazards = self.hazards()[POOL, :k].tolist()
        recent = self._recent.reached[POOL, :k].tolist()
        lasting = self._lasting.reached[POOL, :k].tolist()
        survivals = list(accumulate(hazards, mul))
        tokens: float = 1 + sum(survivals)
        behind = variance = 0.0
        for j in reversed(range(k)):
            behind += survivals[j]
            share = _LASTING_WEIGHT / (recent[j] + _LASTING_WEIGHT)
            of_rounds = recent[j] / (recent[j] + _LASTING_WEIGHT) ** 2
            of_prior = share * share / (lasting[j] + _PRIOR_WEIGHT)
            slope = behind / max(hazards[j], NOTHING)
            variance += slope * slope * hazards[j] * (1 - hazards[j]) * (of_rounds + of_prior)
        return math.sqrt(self._dispersion.factor * variance) / tokens

    def usual(self) -> tuple[Evidence, Floats]:
        """Lasting counts, and a copy of their hazards, [B + 1, K]."""
        self.hazards()
        return self._lasting, self._usual.copy()

    @property
    def num_shifts(self) -> int:
        """See ``AcceptanceModel``."""
        return self._since.num_shifts(POOL)

    def replace(self, evidence: Evidence, clock: float) -> None:
        """Go on from other evidence, as other weights draft now."""
        self._recent = self._lasting = evidence
        self._faded_at = clock
        self._seen_at = [clock] * len(self._seen_at)
        self._since.reset()
        for regimes in self._regimes.values():
            regimes.forget(clock)
        self._stale = self._all_rows()
        self._expected = None

    def figures(self) -> dict[str, Any]:
        """JSON-ready: hazards of recent and of lasting evidence, and rounds of the recent one, of
        every row with evidence."""
        hazards = self.hazards()
        return {
            "all" if row == len(hazards) - 1 else str(row): {
                "hazards": hazards[row].round(4).tolist(),
                "usual": self._usual[row].round(4).tolist(),
                "rounds": self._recent.reached[row].round(1).tolist(),
                "shifts": self._since.num_shifts(row),
            }
            for row in range(len(hazards))
            if self._lasting.reached[row, 0] > 0
        }


def _limit(evidence: Evidence, row: int, weight: float) -> float:
    """Factor that leaves a row at most so many rounds."""
    return weight / max(float(evidence.reached[row].max()), weight)


def _usual(reached: list[float], accepted: list[float], priors: Sequence[float]) -> list[float]:
    """Hazards by lasting evidence; the prior of a position comes from the one before it.

    Args:
        priors: of the first position, or of each. In the latter case the deviation of the position
            before it, in log-odds, is added to a position's prior.
    """
    usual: list[float] = []
    prior, weight = priors[0], _PRIOR_WEIGHT
    for j, (n, a) in enumerate(zip(reached, accepted, strict=True)):
        usual.append((a + weight * prior) / (n + weight))
        prior, weight = _DEPTH_FACTOR * usual[-1], _DEEP_WEIGHT
        if 0 < j + 1 < len(priors):
            odds = log_odds(priors[j + 1]) + log_odds(usual[-1]) - log_odds(priors[j])
            prior = 1 / (1 + math.exp(-odds))
    return usual
