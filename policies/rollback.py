"""Keep a new version or roll it back. Decides on counts alone: no clocks, no I/O.

After a swap, tokens_per_step may fall because the version is worse or because traffic has changed,
and only decoding the *same* traffic with both versions tells which. A suspicion therefore starts a
trial: the engine decodes with the former weights for a while, then returns to the new ones (A-B-A).
The new version is rolled back only if it is worse than the former by ``max_drop`` both before and
after the trial. To be mistaken for a bad version, traffic would have to shift twice, in opposite
directions.

    steady -> watching -> trial -> confirming -> steady (kept or rolled back)
                 \\-> steady (kept)    |    \\-> trial, if it is neither clearly worse nor as good
                                        \\-> steady (kept)

A confirmation that ends undecided is limited by the trial, which is one window of the former
version, and not by its own length. So the trial goes on instead, up to three of them in all, and
each adds to what is known of both versions.

Rounds of one request are correlated, so tests compare means of blocks of rounds, and the variance
is raised by the correlation between neighbouring blocks.

Simulated (requests of 40 rounds on average and unequal difficulty, K = 4, batch 1, max_drop 0.15):
an equal version is rolled back in 1 of 3,000 swaps at watch_rounds=200, and in 3 of 1,000 at 64; a
random drafter always, after 290 rounds; a version with half the tokens_per_step in 100 of 100
swaps, after 290 rounds; one with two thirds in 79 of 100, after 500 rounds and 2,100 at most. A
version that loses only slightly more than max_drop is mostly kept.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Sequence
from enum import Enum
from statistics import fmean
from typing import Any

_BLOCK_ROUNDS = 16
_MIN_BLOCKS = 6
"""Minimum blocks in a window before it is tested."""
_SUSPECT_SIGMA = 2.0
"""Standard errors beyond ``max_drop`` that start a trial before the watching window is full."""
_EARLY_TRIAL_SIGMA, _TRIAL_SIGMA = 3.5, 0.7
"""Standard errors needed to convict, during and at the end of the trial."""
_CONFIRM_SIGMA, _VERDICT_SIGMA = 2.0, 4.0
"""Standard errors needed to roll back: in the confirming window alone, and in it together with the
window before the trial."""
_MAX_CONFIRM, _NEXT_CONFIRM = 4, 1
"""Longest confirmation after the first trial, and after each further one, in windows."""
_MAX_TRIALS = 3
_PRIOR_BLOCKS = 8
"""Blocks that the prior variance and correlation of blocks count for."""


class Action(Enum):
    """What the server must do now."""

    KEEP_GOING = "keep_going"
    TRY_FORMER = "try_former"
    """A trial begins: decode with the former weights until ``RETURN_TO_NEW``."""
    RETURN_TO_NEW = "return_to_new"
    """The trial is over: decode with the new weights."""
    ROLL_BACK = "roll_back"
    """The new version is worse: return to the former one for good."""
    ACCEPT = "accept"
    """The new version stays."""


class SwapWatch:
    """Watches one learning drafter; takes one observation for each step in which it drafted."""

    def __init__(self, watch_rounds: int, max_drop: float) -> None:
        """
        Args:
            watch_rounds: rounds of each window, >= 1; at least 96 are used.
            max_drop: relative loss of tokens_per_step that rolls a version back, in (0, 1).

        Raises:
            ValueError: an argument is out of range.
        """
        if watch_rounds < 1 or not 0 < max_drop < 1:
            raise ValueError(
                f"need watch_rounds >= 1 and max_drop in (0, 1), got {watch_rounds}, {max_drop}"
            )
        self._num_blocks = max(_MIN_BLOCKS, math.ceil(watch_rounds / _BLOCK_ROUNDS))
        self._max_drop = max_drop
        self._state = "steady"
        self._new: int | None = None
        self._former: int | None = None
        self._version: int | None = None
        self._filling: tuple[float, int] = (0.0, 0)
        self._recent: deque[float] = deque(maxlen=self._num_blocks)
        self._reference: list[float] = []
        self._trial: list[float] = []
        self._suspect: list[float] = []
        self._confirmation: list[float] = []
        self._num_trials = 0
        self._last_verdict: str | None = None

    @property
    def state(self) -> str:
        """``steady``, ``watching``, ``trial`` or ``confirming``."""
        return self._state

    def observe(self, version: int, num_proposed: int, num_accepted: int, rounds: int) -> Action:
        """Take in one step of the drafter and return what to do.

        Args:
            version: the version that drafted. A new one means a swap; late steps of the version
                just left, at either end of a trial, are ignored.
            num_proposed: draft tokens of the step; a step with 0 is ignored.
            num_accepted: those accepted, 0..num_proposed.
            rounds: requests of the step that drafted.

        Raises:
            ValueError: num_accepted is out of range.
        """
        if not 0 <= num_accepted <= num_proposed:
            raise ValueError(f"num_accepted {num_accepted} is not in 0..{num_proposed}")
        if num_proposed == 0 or rounds < 1:
            return Action.KEEP_GOING
        if version != self._version and version not in self._left_behind():
            self._begin(version)
        is_late = version != self._version
        block = None if is_late else self._fill(1 + num_accepted / rounds, rounds)
        if block is None:
            return Action.KEEP_GOING
        self._recent.append(block)
        match self._state:
            case "watching":
                return self._watch()
            case "trial":
                return self._try_former(block)
            case "confirming":
                return self._confirm(block)
            case _:
                return Action.KEEP_GOING

    def figures(self) -> dict[str, Any]:
        """JSON-ready state."""
        return {
            "state": self._state,
            "version": self._version,
            "former": self._former,
            "last_verdict": self._last_verdict,
        }

    def _left_behind(self) -> tuple[int | None, ...]:
        """Versions whose late steps may still arrive after the engine switched at a trial."""
        return (self._new, self._former) if self._state in ("trial", "confirming") else ()

    def _begin(self, version: int) -> None:
        """Start a watch after a swap; the former version's last window is the reference."""
        has_former = self._version is not None and len(self._recent) >= _MIN_BLOCKS
        self._reference = list(self._recent)
        self._former, self._new = (self._version if has_former else None), version
        self._state = "watching" if has_former else "steady"
        self._switch_to(version)

    def _switch_to(self, version: int | None) -> None:
        self._version = version
        self._filling = (0.0, 0)
        self._recent.clear()

    def _fill(self, tokens_per_step: float, rounds: int) -> float | None:
        """Add rounds to the current block; return its mean once it is full."""
        total, count = self._filling
        total, count = total + tokens_per_step * rounds, count + rounds
        if count < _BLOCK_ROUNDS:
            self._filling = (total, count)
            return None
        self._filling = (0.0, 0)
        return total / count

    def _watch(self) -> Action:
        if len(self._recent) < _MIN_BLOCKS:
            return Action.KEEP_GOING
        new, former = list(self._recent), self._reference
        is_full = len(new) >= self._num_blocks
        needed = 0.0 if is_full else _SUSPECT_SIGMA
        if self._sigmas_worse(new, former) > needed:
            self._suspect = new
            self._trial, self._num_trials = [], 0
            return self._begin_trial()
        return self._end("kept", Action.ACCEPT) if is_full else Action.KEEP_GOING

    def _begin_trial(self) -> Action:
        self._num_trials += 1
        self._confirmation = []
        self._state = "trial"
        self._switch_to(self._former)
        return Action.TRY_FORMER

    def _try_former(self, block: float) -> Action:
        self._trial.append(block)
        num_trial = len(self._trial)
        is_full = num_trial >= self._num_trials * self._num_blocks
        if len(self._recent) < _MIN_BLOCKS and not is_full:
            return Action.KEEP_GOING
        needed = _TRIAL_SIGMA if is_full else _EARLY_TRIAL_SIGMA
        is_convicted = self._sigmas_worse(self._suspect, self._trial) > needed
        if not is_convicted and not is_full:
            return Action.KEEP_GOING
        self._state = "confirming" if is_convicted else "steady"
        self._last_verdict = None if is_convicted else "kept"
        self._switch_to(self._new)
        return Action.RETURN_TO_NEW

    def _confirm(self, block: float) -> Action:
        self._confirmation.append(block)
        after = self._confirmation
        if len(after) < _MIN_BLOCKS:
            return Action.KEEP_GOING
        is_worse = self._sigmas_worse(after, self._trial) > _CONFIRM_SIGMA
        if is_worse and self._sigmas_worse(self._suspect + after, self._trial) > _VERDICT_SIGMA:
            self._new, self._former = self._former, None
            self._switch_to(self._new)
            return self._end("rolled back", Action.ROLL_BACK)
        windows = _MAX_CONFIRM if self._num_trials == 1 else _NEXT_CONFIRM
        if len(after) < windows * self._num_blocks:
            return Action.KEEP_GOING
        self._suspect = self._suspect + after
        is_doubtful = self._sigmas_worse(self._suspect, self._trial) > 0
        if is_doubtful and self._num_trials < _MAX_TRIALS:
            return self._begin_trial()
        return self._end("kept", Action.ACCEPT)

    def _end(self, verdict: str, action: Action) -> Action:
        self._state, self._last_verdict = "steady", verdict
        return action

    def _sigmas_worse(self, new: Sequence[float], former: Sequence[float]) -> float:
        """Standard errors by which ``new`` is below ``(1 - max_drop) * former``."""
        keep = 1 - self._max_drop
        drop = keep * fmean(former) - fmean(new)
        variance = _block_variance(new, former)
        return drop / math.sqrt(variance * (1 / len(new) + keep**2 / len(former)))


def _block_variance(*windows: Sequence[float]) -> float:
    """Variance of a block's mean, raised for the correlation between neighbouring blocks.

    Pooled over the windows and, since they are short, shrunk towards usual values: a round's
    standard deviation is half its mean, and neighbouring blocks correlate by 0.3.
    """
    squares, lagged, num = 0.0, 0.0, 0
    for blocks in windows:
        mean = fmean(blocks)
        deviations = [value - mean for value in blocks]
        squares += sum(d * d for d in deviations)
        lagged += sum(a * b for a, b in itertools.pairwise(deviations))
        num += len(blocks) - 1
    level = fmean(value for blocks in windows for value in blocks)
    usual = (0.5 * level) ** 2 / _BLOCK_ROUNDS
    variance = (squares + _PRIOR_BLOCKS * usual) / (num + _PRIOR_BLOCKS)
    measured = lagged / squares if squares else 0.0
    correlation = (num * measured + _PRIOR_BLOCKS * 0.3) / (num + _PRIOR_BLOCKS)
    correlation = min(max(correlation, 0.2), 0.7)
    return variance * (1 + correlation) / (1 - correlation)
