"""Ends the drafts of the default policy early, where that measurably pays.

``goodput`` chooses a drafter and a fixed K. Here such a step becomes one that may draft further,
and that ends where its own confidence says so (``ending_model``). Steps of three sorts are mixed at
random, and the propensity of the decision says how likely the sort was:

- *ended* ones, most of them while ending pays;
- *lengthened* ones, which go on one token beyond the end: they tell what was left out;
- *fixed* ones, as ``goodput`` decided them. While ending does not pay, these are all but a few,
  which note their figures and are not ended.

The model says at what speed ended drafts decode, and at what speed each K does, from the same
counts. Where the former is higher, ending is on, until its steps tell otherwise: either each is
worth less than one of K tokens beyond doubt, which the same round mostly tells, or fixed steps are
faster by their own tokens and seconds, which rest on no model. Then it pauses, each time longer.

To ``goodput`` an ended step is shown as one without an end (``interface.Ended``): what was left out
of K tokens is drawn from the model, or else only confident drafts would say what deep positions
keep, and its time is left out: fixed steps tell what K tokens take. What ending gains is told by
``gain``: drafting may pay with it where no K does.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from operator import mul
from typing import Any, NamedTuple

from policies.average import Average
from policies.ending import Ending
from policies.ending_model import EndingModel, Prices
from policies.interface import Decision, Ended, Outcome, PolicyContext
from policies.line import Line
from policies.step_time import StepTimes

_MOST_BATCH = 1
"""Requests of a step whose drafts are ended: several draft in the same passes."""
_FIXED_SHARE, _LENGTHENED_SHARE = 1 / 16, 1 / 16
"""Shares of steps while ending pays."""
_TOLD_SHARE, _FIRST_TOLD_SHARE, _FIRST_ROUNDS = 1 / 16, 1 / 2, 128
"""Largest share of steps with figures while it does not, and that of a drafter's first rounds with
its weights."""
_TOLD_COST = 0.001
"""Time that the figures of a position may take on average while it does not, in plain steps."""
_SURE_ROUNDS, _DEAR, _MOST_TELLING = 8, 0.05, 0.5
"""Rounds after which the figures of a position may be found to take too long, time from which on
they do, and time that counts at most: more is a machine's hiccup."""
_LEAST_ROUNDS = 64
"""From which on a model, or a mean, is believed."""
_TABLE_ROUNDS, _MOST_TABLE_ROUNDS = 16, 128
"""Rounds after which tables are made again, at first and at most: that takes most of a
millisecond."""
_LEAST_GAIN = 1.01
"""Predicted speed relative to the best K, or to plain decoding, that ending needs to begin."""
_GAIN = 0.004
"""Gain of the mean worth of ending, and of the speeds of ended and fixed steps."""
_BOUND, _RIVAL = 2.0, 3.5
"""Standard errors by which a mean worth below 0 ends ending, and by which fixed steps do that are
faster."""
_PAUSE_ROUNDS, _LONGEST_PAUSE = 16, 1024
"""Rounds with figures that ending pauses for, at first and at most."""
_MOST_S = 3.0
"""Times of a step, relative to the expected one, that count: more is a machine's hiccup."""
_MOST_SURPRISE, _PRIOR_STEPS, _FADE = 0.5, 64, 1 / 64
"""Of the time of ended steps that nothing explains: what counts at most, steps that none of it
counts for at first, and the share that is forgotten in a round while ending is off."""
_MOST_GAIN = 1.5
_PASS_PART, _ROW_PART = 0.6, 0.4
"""Prior parts of what a further token takes,"""
_SLOPE_K = 3
"""as far as it takes the same: a target's time may jump at some number of rows."""


class Sorted(NamedTuple):
    """The note of a decision of ``goodput`` that this part has taken further, or could have."""

    decision: Decision
    """As ``goodput`` made it."""

    def columns(self) -> Mapping[str, float]:
        return self.decision.columns()


class _Speed:
    """Tokens and seconds of steps of one sort."""

    def __init__(self) -> None:
        self.tokens, self.seconds = Average(_GAIN), Average(_GAIN)
        self.crossed = Average(_GAIN)

    def add(self, tokens: float, seconds: float) -> None:
        self.tokens.add(tokens)
        self.seconds.add(seconds)
        self.crossed.add(tokens * seconds)

    def rate(self) -> tuple[float, float]:
        """Tokens for each second, and the standard error of its logarithm."""
        tokens, seconds = self.tokens.mean, self.seconds.mean
        covariance = self.crossed.mean - tokens * seconds
        variance = (
            self.tokens.variance / tokens**2
            + self.seconds.variance / seconds**2
            - 2 * covariance / (tokens * seconds)
        )
        return tokens / seconds, math.sqrt(max(variance, 0.0) / self.tokens.weight)


class _Row(NamedTuple):
    """A round with figures."""

    tops: Sequence[float]
    num_verified: int
    num_accepted: int


class _Times:
    """What the parts of an ended step take, in plain steps."""

    def __init__(self) -> None:
        self._drafting, self._verifying = Line(), Line()
        """By passes, and by rows."""
        self._telling = Average(_GAIN)
        """A position's figures."""
        self._residual, self._num_explained = 0.0, 0
        """What passes, rows and figures do not explain, and steps behind that."""

    @property
    def telling(self) -> float:
        """Time that a position's figures take."""
        return self._telling.mean

    @property
    def is_dear(self) -> bool:
        """Figures take so long that few are noted even at first."""
        return self._telling.num >= _SURE_ROUNDS and self.telling > _DEAR

    def prices(self, by_k: Sequence[float]) -> Prices:
        """What passes and rows take: together as steps without an end say, split as measured.

        Args:
            by_k: [K] time of a step at K = 1, 2, ...
        """
        deep = min(_SLOPE_K, len(by_k) - 1)
        each = max((by_k[deep] - by_k[0]) / deep, 0.0) if deep else by_k[0] - 1
        pass_s = self._drafting.slope(_PASS_PART * each)
        rows_s = [self._verifying.slope(_ROW_PART * each)]
        rows_s += [max(after - before - pass_s, 0.0) for before, after in pairwise(by_k)]
        base_s = max(by_k[0] - rows_s[0], 1.0) + self.telling
        return Prices(base_s + self._residual, pass_s + self.telling, rows_s)

    def told(self, row: _Row, seconds: float, draft_s: float, telling_s: float) -> None:
        """Take in the time of a step with figures, that of drafting, and of the figures."""
        num_seen = len(row.tops)
        self._telling.add(min(telling_s / num_seen, _MOST_TELLING))
        self._drafting.add(num_seen, min(draft_s, seconds))
        self._verifying.add(row.num_verified, max(seconds - draft_s, 0.0))

    def explain(self, row: _Row, by_k: Sequence[float], seconds: float) -> None:
        """Take in the time of an ended step."""
        prices = self.prices(by_k)
        expected = prices.base_s + (len(row.tops) - 1) * prices.pass_s
        expected += sum(prices.rows_s[: row.num_verified])
        self._num_explained += 1
        surprise = min(max(seconds - expected, -_MOST_SURPRISE), _MOST_SURPRISE)
        self._residual += max(_GAIN, 1 / (self._num_explained + _PRIOR_STEPS)) * surprise

    def fade(self) -> None:
        """Ending is off, so that nothing is learned of its steps: expect a little less of them to
        be left unexplained, or it would never be tried again."""
        self._residual *= 1 - _FADE
        self._num_explained = 0


class _Known:
    """All that is known of ending one drafter's drafts. Times are in plain steps."""

    def __init__(self, max_draft: int) -> None:
        self.model = EndingModel(max_draft)
        self.times = _Times()
        self._by_k: list[float] = []
        """Time of a step at K = 1, 2, ... when tables were made last."""
        self.is_on = False
        self._pause_left, self._next_pause = 0, _PAUSE_ROUNDS
        self.ending: Ending | None = None
        self._rate = 1.0
        """Tokens in a plain step's time that the model expects of ended drafts."""
        self._made_at = 0
        self.gain = 1.0
        """Speed of ended steps relative to those of the best K, as far as is known."""
        self._begin()

    def _begin(self) -> None:
        self.worth = Average(_GAIN)
        """Tokens by which ended steps are better than those of K tokens."""
        self._ended, self._fixed = _Speed(), _Speed()

    def on_swap(self) -> None:
        """Other weights draft from now on; how confidence tells acceptance is mostly the same."""
        self.model.on_swap()
        self._made_at = 0
        self._pause_left, self._next_pause = 0, _PAUSE_ROUNDS
        self._begin()

    @property
    def told_share(self) -> float:
        """Share of steps with figures while ending is off."""
        if self.model.num_rounds < _FIRST_ROUNDS and not self.times.is_dear:
            return _FIRST_TOLD_SHARE
        return min(_TOLD_SHARE, _TOLD_COST / max(self.times.telling, _TOLD_COST))

    def learn(self, row: _Row, by_k: Sequence[float], k: int) -> None:
        """Take in what a round with figures kept, and make tables again if they are old.

        Args:
            by_k: see ``prices``.
            k: that ``goodput`` decided on.
        """
        self.model.learn(row.tops, row.num_verified, row.num_accepted)
        self._pause_left = max(self._pause_left - 1, 0)
        if not self.is_on:
            self.times.fade()
        num_rounds = self.model.num_rounds
        least = min(max(num_rounds // 8, _TABLE_ROUNDS), _MOST_TABLE_ROUNDS)
        if self.ending is not None and num_rounds - self._made_at < least:
            return
        self._made_at, self._by_k = num_rounds, list(by_k)
        self.ending, self._rate = self.model.best(self.times.prices(by_k), self._rate)
        survivals = accumulate(self.model.usual(), mul)
        tokens = accumulate(survivals, initial=1.0)
        next(tokens)
        fixed = max(t / s for t, s in zip(tokens, by_k, strict=True))
        lead = self._rate / max(fixed, 1.0)
        if self.is_on and lead < 1:
            self.is_on = False
            self._begin()
        elif not self.is_on and lead > _LEAST_GAIN and not self._pause_left:
            self.is_on = self.model.num_rounds >= _LEAST_ROUNDS
            self._begin()
        if not self.is_on:
            self.gain = 1.0
        elif self.worth.num < _LEAST_ROUNDS:
            self.gain = min(max(self._rate / fixed, 1.0), _MOST_GAIN)
        else:
            speed = self._ended.rate()[0]
            of_k = max(speed - self.worth.mean / by_k[k - 1], speed / _MOST_GAIN)
            self.gain = max(speed / of_k, 1.0)

    def weigh(self, row: _Row, by_k: Sequence[float], k: int, seconds: float) -> None:
        """Compare an ended step with one of K tokens."""
        self.times.explain(row, by_k, seconds)
        self._ended.add(1 + row.num_accepted, seconds)
        rest = 0.0
        if row.num_accepted == row.num_verified < k:
            rest = self.model.continuation(row.tops, row.num_verified, k)
        more = row.num_accepted - min(row.num_accepted, k) - rest
        is_known = self._ended.tokens.num >= _LEAST_ROUNDS
        speed = self._ended.rate()[0] if is_known else self._rate
        self.worth.add(more - speed * (seconds - by_k[k - 1]))
        error = math.sqrt(self.worth.variance / self.worth.weight)
        if self.worth.num >= _LEAST_ROUNDS and self.worth.mean < -_BOUND * error:
            self._pause()

    def compare(self, num_accepted: int, seconds: float) -> None:
        """Take in a fixed step while ending is on."""
        self._fixed.add(1 + num_accepted, seconds)
        if min(self._fixed.tokens.num, self._ended.tokens.num) < _LEAST_ROUNDS:
            return
        (ended, error), (fixed, other) = self._ended.rate(), self._fixed.rate()
        if math.log(fixed / ended) > _RIVAL * math.hypot(error, other):
            self._pause()

    def _pause(self) -> None:
        self.is_on, self.gain = False, 1.0
        self._pause_left = self._next_pause
        self._next_pause = min(2 * self._next_pause, _LONGEST_PAUSE)
        self._begin()

    def figures(self) -> dict[str, Any]:
        """JSON-ready; times in plain steps."""
        prices = None
        if self._by_k:
            found = self.times.prices(self._by_k)
            prices = {**found._asdict(), "telling_s": self.times.telling, "by_k": self._by_k}
        return {
            "is_on": self.is_on,
            "prices": prices,
            "worth": round(self.worth.mean, 4),
            "gain": round(self.gain, 4),
            **self.model.figures(),
        }


class EarlyEnds:
    """Takes decisions of one policy further, and shows it what came of them as it expects it."""

    def __init__(self, context: PolicyContext, times: StepTimes) -> None:
        """
        Args:
            times: of steps without an end.
        """
        self._max_draft, self._times = context.max_draft, times
        self._known = {kind: _Known(context.max_draft) for kind in sorted(context.ending)}
        self._rng = random.Random(context.seed + 2)
        self._batch = 0
        """Of the last outcome."""

    def gain(self, drafter: str, batch: int) -> float:
        """Speed of a drafter's steps relative to those of the best K, at least 1."""
        known = self._known.get(drafter)
        return 1.0 if known is None or batch > _MOST_BATCH else known.gain

    def taken(
        self, decision: Decision, batch: int | None = None, most: int | None = None
    ) -> Decision:
        """The decision for a step, given that of ``goodput``.

        Args:
            batch: ``None``: as the last one was.
            most: largest K of the step; ``None``: any.
        """
        known = self._known.get(decision.drafter)
        batch = self._batch if batch is None else batch
        if known is None or not 1 <= batch <= _MOST_BATCH:
            return decision
        if decision.explore and known.told_share < _FIRST_TOLD_SHARE:
            return decision
        share, ending = (1.0, _WHOLE) if decision.explore else self._sort(known)
        k = decision.draft_k
        if ending is not None and ending.may_end:
            k = self._max_draft if most is None else min(self._max_draft, most)
        return Decision(
            decision.drafter, k, decision.propensity * share, decision.explore, decision.reason,
            decision.policy, decision.allocation, decision.picks, Sorted(decision), ending,
        )  # fmt: skip

    def _sort(self, known: _Known) -> tuple[float, Ending | None]:
        """The probability of the sort of the next step, and how its draft ends."""
        drawn, ending = self._rng.random(), known.ending
        if not known.is_on or ending is None:
            share = known.told_share
            return (share, _WHOLE) if drawn < share else (1 - share, None)
        if drawn < _FIXED_SHARE:
            return _FIXED_SHARE, None
        if drawn < _FIXED_SHARE + _LENGTHENED_SHARE:
            return _LENGTHENED_SHARE, replace(ending, grace=1)
        return 1 - _FIXED_SHARE - _LENGTHENED_SHARE, ending

    def learned(self, outcome: Outcome) -> Outcome:
        """Learn from an outcome; returns it as ``goodput`` expects it."""
        self._batch = outcome.batch
        if not isinstance(sort := outcome.decision.note, Sorted):
            return outcome
        asked, done = sort.decision, outcome.decision
        if done.draft_k < asked.draft_k:  # held to what the request allows
            asked = replace(asked, drafter=done.drafter, draft_k=done.draft_k)
        found = replace(outcome, decision=asked)
        known = self._known.get(asked.drafter)
        if known is None or outcome.batch > _MOST_BATCH or len(outcome.rows) != 1:
            return found
        k, plain_s = asked.draft_k, self._times.plain_s(outcome.batch)
        by_k = [one / plain_s for one in self._times.arm_times(asked.drafter, outcome.batch)]
        tops = outcome.rows.tops[0] if outcome.rows.tops else ()
        row = _Row(tops, outcome.rows.num_verified[0], outcome.rows.num_accepted[0])
        seconds = (outcome.step_s - outcome.plan_s) / plain_s
        seconds = min(seconds, _MOST_S * by_k[max(row.num_verified, 1) - 1])
        is_timed = not outcome.has_prefill and seconds > 0
        if done.ending is None or not tops:
            if is_timed and known.is_on and row.num_verified == k:
                known.compare(row.num_accepted, seconds)
            return found
        if is_timed:
            known.times.told(row, seconds, outcome.draft_s / plain_s, outcome.rows.tops_s / plain_s)
            if done.ending.may_end and known.is_on and known.ending is not None:
                known.weigh(row, by_k, k, seconds)
        known.learn(row, by_k, k)
        kept = min(row.num_accepted, k)
        if row.num_accepted == row.num_verified < k:
            kept = known.model.drawn(row.tops, row.num_verified, k, self._rng)
        as_whole = replace(outcome.rows, num_verified=[k], num_accepted=[kept], tops=None)
        return replace(found, ended=Ended(as_whole))

    def on_swap(self, drafter: str) -> None:
        """Other weights draft from now on."""
        if drafter in self._known:
            self._known[drafter].on_swap()

    def figures(self) -> dict[str, Any]:
        """JSON-ready, by drafter."""
        return {kind: known.figures() for kind, known in self._known.items()}


_WHOLE = Ending((), (), None, None)
"""Notes the figures of a draft and leaves it whole."""
