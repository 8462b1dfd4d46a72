"""The default policy: the arm with the most expected tokens per second, plain decoding included.

Looking at a batch costs time too, which plain decoding does not need: it is counted against the
arms that draft, and while plain decoding is the best arm and looking is dear, the policy rests.

Acceptance (free of hardware) and step time (free of weights) are learned apart and joined when a
step is planned. Arms are plain decoding and every (drafter, K).

Exploration keeps idle arms known. A probe is charged what it is predicted to lose against the best
arm, and later what it took beyond that, catching up included; it is taken only from an account that
grows by 0.8 % of the time spent: exploration costs less than 1 % however bad a drafter is, and a
costly probe is late, never forgotten.

``plan`` takes 90 to 110 us at batch 1 to 4 and 190 us at batch 64 (medians of thread time, CPython
3.11, one of two cores under a load of 5; two drafters, K to 8).
"""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from policies.acceptance import AcceptanceModel, suffix_bucket
from policies.cost import CostModel, CostSample
from policies.fixed import PLAIN
from policies.interface import Decision, Outcome, StepObs

_HYSTERESIS = 1.01
"""Gain over the last arm that a change needs."""
_EXPLORE_BUDGET = 0.008
"""Share of time that probes may lose."""
_ACCOUNT_STEPS = 8.0
"""Most steps' time that the account may hold."""
_MOST_EXCESS = 25.0
"""Times its prediction that a probe is charged for at most: more is a hiccup of the machine."""
_PROBE_WEIGHTS = {"deeper": 2.0, "deepest": 1.0, "idle": 2.0, "plain": 0.5}
_FLOOR_WINDOW = 32
"""Drafting steps over which measured speed is compared with plain decoding."""
_FIRST_PAUSE, _LAST_PAUSE = 64, 4096
"""Steps of plain decoding after a window below the floor; doubled each time in a row."""

_DEAR = 0.2
"""Share of a plain step from which on looking at the batch is dear. Below, a chance to draft that
is missed costs more."""
_LOOK_BUDGET = 0.03
"""Share of the time that dear looks may take while plain decoding is the best arm."""
_PLAN_GAIN = 0.05
"""Of the moving average of that share."""

_Arm = tuple[str, int]


class _Forecast(NamedTuple):
    """One arm of one step. A tuple: made 17 times a plan, at a third of a dataclass's price."""

    tokens: float
    """Over the batch."""
    seconds: float
    speed: float
    """Tokens per second."""


class _Floor:
    """Turns drafting off while it measures slower than plain decoding is predicted to be."""

    def __init__(self) -> None:
        self._window: deque[tuple[int, float, float]] = deque()
        self._pause = _FIRST_PAUSE
        self.pause_left = 0
        self.num_falls = 0

    def observe(self, tokens: int, step_s: float, plain_s: float) -> None:
        """A drafting step: its tokens, its seconds, and plain decoding's for as many tokens."""
        self._window.append((tokens, step_s, plain_s))
        if len(self._window) < _FLOOR_WINDOW:
            return
        is_slower = sum(s for _, s, _ in self._window) > sum(s for _, _, s in self._window)
        self._window.clear()
        if is_slower:
            self.pause_left, self._pause = self._pause, min(2 * self._pause, _LAST_PAUSE)
            self.num_falls += 1
        else:
            self._pause = _FIRST_PAUSE

    def reset(self) -> None:
        """Other weights: what was slow may be fast now."""
        self._window.clear()
        self._pause, self.pause_left = _FIRST_PAUSE, 0


class GoodputPolicy:
    """Implements ``DraftPolicy``. Deterministic for one seed and one sequence of calls."""

    def __init__(
        self,
        *,
        explore: float,
        half_life_rounds: float,
        margin: float,
        max_draft: int,
        seed: int,
    ) -> None:
        """
        Args:
            explore: share of steps that try another arm, as far as the account allows.
            half_life_rounds: rounds after which an old observation counts half.
            margin: predicted speed over plain decoding that an arm needs.
            max_draft: largest K ever planned.
        """
        self._explore = explore
        self._margin = margin
        self._acceptance = AcceptanceModel(half_life_rounds)
        self._cost = CostModel(max_draft)
        self._rng = random.Random(seed)
        self._floor = _Floor()
        self._max_draft = max_draft
        self._arm: _Arm = ("none", 0)
        self._last_drafter = "none"
        self._account_s = 0.0
        self._probes_s: deque[float] = deque()
        """Predicted seconds of the probes whose steps were not observed yet."""
        self._plan_share = 0.0
        self._rest_left = 0
        self._decisions: Counter[str] = Counter()

    def calibrate(self, samples: Sequence[CostSample]) -> None:
        """Take in the step times measured at start-up."""
        self._cost.calibrate(samples)

    def rest(self) -> Decision | None:
        """Plain decoding while the floor is in force, and for some steps after a dear look that
        found nothing better."""
        reason = "floor" if self._floor.pause_left else "rest"
        if self._floor.pause_left:
            self._floor.pause_left -= 1
        elif self._rest_left:
            self._rest_left -= 1
        else:
            return None
        self._decisions[reason] += 1
        return Decision("none", 0, 1.0, explore=False, reason=reason)

    def plan(self, obs: StepObs) -> Decision:
        """Choose a drafter and K for the next step."""
        decision = self._decide(obs)
        if decision.reason == "plain" and self._plan_share > _DEAR:
            self._rest_left = math.ceil(self._plan_share / _LOOK_BUDGET)
        self._decisions[decision.reason] += 1
        return decision

    def observe(self, outcome: Outcome) -> None:
        """Take in what the step did: acceptance always, times only without prefill."""
        decision, batch = outcome.decision, outcome.batch
        self._acceptance.tick(batch)
        if decision.reason == "probe" and self._probes_s:
            predicted_s = self._probes_s.popleft()
            if not outcome.has_prefill:
                excess_s = min(outcome.step_s - predicted_s, _MOST_EXCESS * predicted_s)
                self._account_s -= max(0.0, excess_s)
        if decision.draft_k:
            self._observe_rows(outcome)
        if not outcome.has_prefill and outcome.step_s > 0:
            self._observe_time(outcome)
        self._last_drafter = decision.drafter

    def on_swap(self, version: int, calibration: dict[str, Any]) -> None:
        """Forget or re-seed the neural drafter's acceptance; the index's is untouched."""
        self._acceptance.on_swap("eagle3", calibration)
        self._rest_left = 0
        self._probes_s.clear()  # a step that a swap overtakes is observed by nobody
        self._floor.reset()

    def figures(self) -> dict[str, Any]:
        """JSON-ready state."""
        return {
            "kind": "goodput",
            "arm": {"drafter": self._arm[0], "draft_k": self._arm[1]},
            "decisions": dict(self._decisions),
            "floor": {"falls": self._floor.num_falls, "pause_left": self._floor.pause_left},
            "acceptance": self._acceptance.figures(),
            "cost": self._cost.figures(),
        }

    def _decide(self, obs: StepObs) -> Decision:
        max_k = min(obs.max_draft, self._max_draft, max(obs.caps))
        if max_k == 0 or not obs.drafters:
            return PLAIN
        if not self._cost.knows_plain(obs.batch):
            return PLAIN
        if self._cost.plain_is_stale:
            return Decision("none", 0, 1.0, explore=True, reason="refresh")
        arms = self._forecast(obs, max_k)
        self._arm = best = self._best(arms)
        probes = self._affordable(best, arms, max_k) if self._explore else {}
        if not probes:
            return _decision(best, 1.0)
        if self._rng.random() >= self._explore:
            return _decision(best, 1 - self._explore)
        probe = self._rng.choices(list(probes), weights=list(probes.values()))[0]
        self._account_s -= _loss_s(arms[probe], arms[best])
        self._probes_s.append(arms[probe].seconds)
        share = probes[probe] / sum(probes.values())
        return Decision(*probe, self._explore * share, explore=True, reason="probe")

    def _forecast(self, obs: StepObs, max_k: int) -> dict[_Arm, _Forecast]:
        """Every arm of this step."""
        batch = obs.batch
        plain_s = self._cost.step_s("none", 0, batch)
        arms: dict[_Arm, _Forecast] = {("none", 0): _Forecast(batch, plain_s, batch / plain_s)}
        for drafter in obs.drafters:
            matches = obs.suffix_matches
            if drafter == "suffix" and (matches is None or not any(matches)):
                continue
            times = self._cost.arm_times(drafter, batch)
            late_s = 0.0
            if drafter != "suffix" and obs.pending_rows:
                late_s = self._cost.catch_up_s(drafter, obs.pending_rows, batch)
            tokens = self._expected_tokens(drafter, obs, max_k)
            for k in range(1, max_k + 1):
                seconds = times[k] + late_s
                arms[drafter, k] = _Forecast(tokens[k], seconds, tokens[k] / seconds)
        return arms

    def _expected_tokens(self, drafter: str, obs: StepObs, max_k: int) -> list[float]:
        """Over the batch, at k = 0, 1, ... max_k; no row beyond its cap."""
        matches = obs.suffix_matches if obs.suffix_matches is not None else (0,) * len(obs.caps)
        rows = Counter(zip(map(suffix_bucket, matches), obs.caps, strict=True))
        totals = [0.0] * (max_k + 1)
        for (bucket, cap), count in rows.items():
            expected = self._acceptance.expected_tokens(drafter, bucket)
            for k in range(min(cap, max_k) + 1):
                totals[k] += count * expected[k]
            for k in range(cap + 1, max_k + 1):
                totals[k] += count * expected[cap]
        return totals

    def _best(self, arms: dict[_Arm, _Forecast]) -> _Arm:
        plain: _Arm = ("none", 0)
        wanted = self._margin * arms[plain].speed
        eligible = {arm: f.speed for arm, f in arms.items() if arm != plain and f.speed >= wanted}
        if not eligible:
            return plain
        best = max(eligible, key=eligible.__getitem__)
        last = eligible.get(self._arm)
        return self._arm if last is not None and last * _HYSTERESIS >= eligible[best] else best

    def _affordable(self, best: _Arm, arms: dict[_Arm, _Forecast], max_k: int) -> dict[_Arm, float]:
        """Probes that the account can pay now, with their weights."""
        best_s = arms[best].seconds
        limit_s = _ACCOUNT_STEPS * best_s
        self._account_s = min(self._account_s + _EXPLORE_BUDGET * best_s, limit_s)
        probes: dict[_Arm, float] = {}
        drafter, k = best
        if drafter != "none":
            probes["none", 0] = _PROBE_WEIGHTS["plain"]
            probes[drafter, max_k] = _PROBE_WEIGHTS["deepest"]
            probes[drafter, min(k + 2, max_k)] = _PROBE_WEIGHTS["deeper"] / 2
            probes[drafter, min(k + 1, max_k)] = _PROBE_WEIGHTS["deeper"]
        for idle in {arm[0] for arm in arms} - {"none", drafter}:
            _, fastest = max((arms[idle, k].speed, k) for k in range(1, max_k + 1))
            probes[idle, fastest] = _PROBE_WEIGHTS["idle"]
        probes.pop(best, None)
        return {
            arm: weight
            for arm, weight in sorted(probes.items())
            if _loss_s(arms[arm], arms[best]) <= self._account_s
        }

    def _observe_rows(self, outcome: Outcome) -> None:
        drafter = outcome.decision.drafter
        seen: dict[int, Counter[tuple[int, int]]] = {}
        for row in outcome.rows:
            if row.num_verified:
                counts = seen.setdefault(suffix_bucket(row.suffix_match), Counter())
                counts[row.num_verified, row.num_accepted] += 1
        for bucket, counts in seen.items():
            outcomes = [(verified, kept, count) for (verified, kept), count in counts.items()]
            self._acceptance.observe(drafter, bucket, outcomes, outcome.batch)

    def _observe_time(self, outcome: Outcome) -> None:
        decision, batch = outcome.decision, outcome.batch
        k = min(decision.draft_k, self._max_draft)
        if outcome.plan_s:
            share = outcome.plan_s / self._cost.step_s("none", 0, batch)
            self._plan_share += _PLAN_GAIN * (share - self._plan_share)
        caught_up = decision.drafter in ("none", "suffix", self._last_drafter)
        predicted_s = self._cost.step_s(decision.drafter, k, batch)
        self._cost.observe(
            decision.drafter, k, batch, outcome.step_s, outcome.draft_s if caught_up else None
        )
        if k and not decision.explore and outcome.step_s < 5 * predicted_s:
            tokens = batch + sum(row.num_accepted for row in outcome.rows)
            plain_s = self._cost.least_plain_s(batch) * tokens / batch
            self._floor.observe(tokens, outcome.step_s, plain_s)


def _decision(arm: _Arm, propensity: float) -> Decision:
    return Decision(*arm, propensity, explore=False, reason="goodput" if arm[1] else "plain")


def _loss_s(arm: _Forecast, best: _Forecast) -> float:
    """Seconds that an arm is predicted to lose against the best one, at equal tokens."""
    return max(0.0, arm.seconds - arm.tokens / best.speed)
