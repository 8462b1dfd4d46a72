"""The default policy: the arm with the most expected tokens per second, plain decoding included.

Arms are plain decoding and every (drafter, K). Acceptance, which does not depend on hardware, and
step time, which does not depend on weights, are learned separately and combined when a step is
planned.

Inspecting the batch takes time that plain decoding does not need, so it is charged to the arms that
draft. While plain decoding is the best arm and inspection is expensive, the policy rests.

Exploration keeps the estimates of idle arms current. A probe is charged its predicted loss against
the best arm, and afterwards whatever it took beyond the prediction, catching up included. Probes
are paid from an account that grows by 0.8 % of the time spent: exploration costs less than 1 %
however bad a drafter is, and an expensive probe is postponed, never dropped.

``plan`` takes 90 to 110 us at batch 1 to 4 and 190 us at batch 64 (medians of thread time, CPython
3.11, one of two cores under a load of 5; two drafters, K up to 8).
"""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

from configs.schema import PolicySettings
from policies.acceptance import AcceptanceModel, match_bucket
from policies.cost import CostModel
from policies.fixed import PLAIN
from policies.interface import CostSample, Decision, Outcome, PolicyContext, StepObs

_HYSTERESIS = 1.01
"""Ratio of predicted speeds that another arm must exceed to replace the last one."""
_EXPLORE_BUDGET = 0.008
"""Share of the time that probes may lose."""
_ACCOUNT_STEPS = 8.0
"""Largest balance of the account, in steps of the best arm."""
_MOST_EXCESS = 25.0
"""Largest charge of a probe beyond its prediction, relative to it; more is a hiccup."""
_PROBE_WEIGHTS = {"deeper": 2.0, "deepest": 1.0, "idle": 2.0, "plain": 0.5}
"""Weights with which one of the affordable probes is drawn."""
_FLOOR_WINDOW = 32
"""Drafting steps over which measured speed is compared with plain decoding."""
_FIRST_PAUSE, _LAST_PAUSE = 64, 4096
"""Steps of plain decoding after a window below the floor, doubled for each further one in a row."""
_EXPENSIVE = 0.2
"""Share of a plain step above which inspecting the batch is expensive. Below it, missing a chance
to draft costs more."""
_INSPECTION_BUDGET = 0.03
"""Share of the time that expensive inspections may take while plain decoding is the best arm."""
_PLAN_GAIN = 0.05
"""Gain of the moving average of that share."""

_Arm = tuple[str, int]


class _Forecast(NamedTuple):
    """The prediction for one arm of one step.

    A named tuple, because a plan makes 17 of them and a dataclass takes three times as long.
    """

    tokens: float
    """Expected tokens over the batch."""
    seconds: float
    speed: float
    """Tokens per second."""


class _Floor:
    """Pauses drafting when it is measured to be slower than plain decoding is predicted to be."""

    def __init__(self) -> None:
        self._window: deque[tuple[int, float, float]] = deque()
        self._pause = _FIRST_PAUSE
        self.pause_left = 0
        self.num_falls = 0

    def observe(self, tokens: int, step_s: float, plain_s: float) -> None:
        """Take in a drafting step.

        Args:
            tokens: tokens committed over the batch.
            step_s: measured seconds of the step.
            plain_s: predicted seconds of plain decoding for the same tokens.
        """
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
        """Start over after a swap: what was slow may be fast with other weights."""
        self._window.clear()
        self._pause, self.pause_left = _FIRST_PAUSE, 0


class GoodputPolicy:
    """Implements ``DraftPolicy``. Deterministic for one seed and one sequence of calls."""

    wants_profile = True

    def __init__(
        self,
        context: PolicyContext,
        *,
        explore: float,
        half_life_rounds: float,
        margin: float,
    ) -> None:
        """
        Args:
            explore: share of steps that try another arm, as far as the account allows.
            half_life_rounds: rounds after which an old observation counts half.
            margin: predicted speed relative to plain decoding that an arm must reach.

        Raises:
            ValueError: a drafter has neither one prior acceptance nor one for each match bucket.
        """
        self._explore = explore
        self._margin = margin
        self._drafters = context.drafters
        self._acceptance = AcceptanceModel(half_life_rounds, context.drafters)
        self._cost = CostModel(context.max_draft, context.drafters)
        self._rng = random.Random(context.seed)
        self._floor = _Floor()
        self._max_draft = context.max_draft
        self._arm: _Arm = ("none", 0)
        self._last_drafter = "none"
        self._account_s = 0.0
        self._probes_s: deque[float] = deque()
        """Predicted seconds of the probes whose steps are yet to be observed."""
        self._plan_share = 0.0
        self._rest_left = 0
        self._decisions: Counter[str] = Counter()

    @classmethod
    def from_settings(cls, settings: PolicySettings, context: PolicyContext) -> Self:
        """Read ``policy.explore``, ``policy.half_life_rounds`` and ``policy.margin``."""
        return cls(
            context,
            explore=settings.explore,
            half_life_rounds=settings.half_life_rounds,
            margin=settings.margin,
        )

    def calibrate(self, samples: Sequence[CostSample]) -> None:
        """Start the cost model from step times measured at start-up."""
        self._cost.calibrate(samples)

    def rest(self) -> Decision | None:
        """Plain decoding during a pause, and for some steps after an expensive inspection that
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
        if decision.reason == "plain" and self._plan_share > _EXPENSIVE:
            self._rest_left = math.ceil(self._plan_share / _INSPECTION_BUDGET)
        self._decisions[decision.reason] += 1
        return decision

    def observe(self, outcome: Outcome) -> None:
        """Learn acceptance from every step, and times from steps without prefill."""
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

    def on_swap(self, drafter: str, version: int, calibration: dict[str, Any]) -> None:
        """Forget or re-seed this drafter's acceptance; that of the others is untouched."""
        self._acceptance.on_swap(drafter, calibration)
        self._rest_left = 0
        self._probes_s.clear()  # a step that a swap overtakes is never observed
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
        """Predictions for every arm of this step."""
        batch = obs.batch
        plain_s = self._cost.step_s("none", 0, batch)
        arms: dict[_Arm, _Forecast] = {("none", 0): _Forecast(batch, plain_s, batch / plain_s)}
        for drafter in obs.drafters:
            if self._drafters[drafter].needs_match and not any(obs.matches or ()):
                continue
            times = self._cost.arm_times(drafter, batch)
            late_s = self._cost.catch_up_s(drafter, obs.pending_rows.get(drafter, 0), batch)
            tokens = self._expected_tokens(drafter, obs, max_k)
            for k in range(1, max_k + 1):
                seconds = times[k] + late_s
                arms[drafter, k] = _Forecast(tokens[k], seconds, tokens[k] / seconds)
        return arms

    def _expected_tokens(self, drafter: str, obs: StepObs, max_k: int) -> list[float]:
        """Expected tokens over the batch at k = 0, 1, ... max_k, each row limited to its cap."""
        matches = obs.matches if obs.matches is not None else (0,) * len(obs.caps)
        rows = Counter(zip(map(match_bucket, matches), obs.caps, strict=True))
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
        """Weights of the probes that the account can pay for now."""
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
                counts = seen.setdefault(match_bucket(row.match), Counter())
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
        traits = self._drafters.get(decision.drafter)
        may_catch_up = traits is not None and traits.is_neural
        caught_up = not may_catch_up or decision.drafter == self._last_drafter
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
    """Seconds that an arm is predicted to lose against the best one for the same tokens."""
    return max(0.0, arm.seconds - arm.tokens / best.speed)
