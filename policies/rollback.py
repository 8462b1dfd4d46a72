"""Keep a new version or roll it back. Decides on counts alone: no clocks, no I/O.

After a swap, tokens_per_step may fall because the version is worse or because traffic has changed,
and only decoding the *same* traffic with both versions tells which. So unless the new version is
better beyond doubt, a trial begins: the engine decodes with the former weights for a window, then
returns to the new ones for another (A-B-A-B), and again, as long as there is doubt. To be mistaken
for a bad version, traffic would have to shift twice, in opposite directions.

    steady -> watching -> trial -> confirming -> steady (kept or rolled back)
                 \\-> steady (kept)    |    \\-> trial, while neither is certain
                                        \\-> steady (kept)

It is a sequential test of whether the version lost more than seven tenths of ``max_drop``: it ends
once that is certain, or certain not to be so, and after 24 trials with what is likelier. One
that is far beyond ``max_drop`` is convicted within its first confirmation.

Equal versions take the longest, and there it does not matter which of the two decodes. One window
decides nothing: of some two hundred rounds of five requests, the mean is uncertain by a tenth,
since requests differ.

Rounds of one request are correlated, so tests compare means of blocks of rounds, and the variance
is raised by the correlation between blocks that are near each other.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from operator import mul
from statistics import fmean
from typing import Any

_BLOCK_ROUNDS, _BLOCK_STEPS = 16, 2
"""Least rounds and steps of a block. Whenever weights come back, the rows of all requests are
computed again, which takes longer the more requests there are: windows of a dozen steps would make
drafting seem as slow as that, and a policy that believes it hardly drafts after a swap but in
trials."""
_MIN_BLOCKS = 6
"""Minimum blocks in a window before it is tested."""
_MIDDLE = 0.7
"""Share of ``max_drop`` that parts good versions from bad ones."""
_KEEP_SIGMA, _LOST_SIGMA, _LOST_TRIALS = 2.8, 3.2, 3
"""Standard errors beyond that, to either side, that keep a version and that roll it back, and the
trials that the latter takes: traffic may shift once."""
_SHARE_GAIN = 0.01
"""Weight of a step in the share of those that drafted."""
_END_SIGMA = 1.5
"""Standard errors that roll a version back after the last trial."""
_SUSPECT_SIGMA, _EARLY_TRIAL_SIGMA, _EARLY_TRIALS = 2.0, 3.5, 2
"""Standard errors beyond ``max_drop`` that begin and end a trial before the window is full, and the
trials that this is asked in: later ones look once for each window, since that takes time."""
_CONFIRM_SIGMA, _VERDICT_SIGMA = 2.5, 5.0
"""Standard errors beyond ``max_drop`` that roll back at once: in the confirmation alone, and in all
that the version has decoded."""
MAX_TRIALS = 24
"""Each is followed by one window of confirmation."""
_PRIOR_BLOCKS = 8
"""Blocks that the prior variance of blocks counts for."""
_LAGS, _PRIOR_LAG_BLOCKS, _PRIOR_CORRELATION = 5, 40, 1.0
"""Blocks before each that it may be correlated with, blocks that the prior counts for, and the
prior of the sum of these correlations: requests of 40 rounds, four at a time, have 0.5 to 1.2."""
_LEAST_CORRELATION, _MOST_CORRELATION = 0.25, 2.5


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


@dataclass(slots=True)
class Block:
    """A block of rounds that is being filled."""

    tokens: float = 0.0
    num_rounds: int = 0
    num_steps: int = 0
    usual_rounds: int = _BLOCK_ROUNDS
    """Rounds of the last one that was full."""

    def begin(self) -> None:
        self.tokens, self.num_rounds, self.num_steps = 0.0, 0, 0

    def add(self, tokens_per_step: float, rounds: int) -> float | None:
        """Add a step; return the mean of the block once it is full."""
        self.tokens += tokens_per_step * rounds
        self.num_rounds += rounds
        self.num_steps += 1
        if self.num_rounds < _BLOCK_ROUNDS or self.num_steps < _BLOCK_STEPS:
            return None
        mean, self.usual_rounds = self.tokens / self.num_rounds, self.num_rounds
        self.begin()
        return mean


class DraftingShare:
    """Share of the steps of late in which a drafter has drafted."""

    def __init__(self, value: float = 1.0) -> None:
        self.value = value

    def step(self) -> None:
        """A step begins."""
        self.value *= 1 - _SHARE_GAIN

    def drafted(self) -> None:
        """The drafter has drafted in a step."""
        self.value += _SHARE_GAIN


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
        self._block = Block()
        self._recent: deque[float] = deque(maxlen=self._num_blocks)
        self._reference: list[float] = []
        self._trial: list[float] = []
        self._suspect: list[float] = []
        """Blocks of the new version up to the last trial."""
        self._confirmation: list[float] = []
        """Those since."""
        self._num_watched = 0
        """Of ``_suspect``: those before the first trial."""
        self._num_trials = 0
        self._last_verdict: str | None = None

    @property
    def num_blocks(self) -> int:
        """Blocks of a full window."""
        return self._num_blocks

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
        block = None if is_late else self._block.add(1 + num_accepted / rounds, rounds)
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

    def renamed(self, version: int, now: int) -> None:
        """The same weights draft under another number from now on: there is nothing to watch, and
        nothing to return to. What was seen of them stays.

        Args:
            version: their number so far; another than the one that is watched is passed over.
        """
        if self._version == version:
            self._state, self._version = "steady", now
            self._new = self._former = None

    def is_judging(self, version: int) -> bool:
        """A trial compares this version with another one."""
        return version in self._left_behind()

    def go_on_from(self, version: int, blocks: Sequence[float] = ()) -> None:
        """The version that was watched is given up, without a verdict, for one that has drafted
        beside it, or that somebody has ordered: the next one is compared with that.

        Args:
            blocks: mean tokens_per_step of its last blocks.
        """
        self._state = "steady"
        self._switch_to(version)
        self._recent.extend(blocks)

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
        self._block.begin()
        self._recent.clear()

    def _watch(self) -> Action:
        if len(self._recent) < _MIN_BLOCKS:
            return Action.KEEP_GOING
        new, former = list(self._recent), self._reference
        is_full = len(new) >= self._num_blocks
        if is_full and self._is_sound(new, former):
            return self._end("kept", Action.ACCEPT)
        if is_full or self._sigmas_lost(new, former) > _SUSPECT_SIGMA:
            self._suspect, self._trial, self._num_trials = new, [], 0
            self._num_watched = len(new)
            return self._begin_trial()
        return Action.KEEP_GOING

    def _begin_trial(self) -> Action:
        self._num_trials += 1
        self._confirmation = []
        self._state = "trial"
        self._switch_to(self._former)
        return Action.TRY_FORMER

    def _try_former(self, block: float) -> Action:
        self._trial.append(block)
        is_full = len(self._trial) >= self._num_trials * self._num_blocks
        if not is_full and not self._is_far_worse_already():
            return Action.KEEP_GOING
        is_sound = is_full and self._is_sound(self._suspect, self._trial)
        self._state = "steady" if is_sound else "confirming"
        self._last_verdict = "kept" if is_sound else None
        self._switch_to(self._new)
        return Action.RETURN_TO_NEW

    def _confirm(self, block: float) -> Action:
        self._confirmation.append(block)
        new = self._suspect + self._confirmation
        is_full = len(self._confirmation) >= self._num_blocks
        is_early = self._num_trials <= _EARLY_TRIALS and len(self._confirmation) >= _MIN_BLOCKS
        if not is_full and not is_early:
            return Action.KEEP_GOING
        if self._is_far_worse(new) or (is_full and self._is_worse(new)):
            self._new, self._former = self._former, None
            self._switch_to(self._new)
            return self._end("rolled back", Action.ROLL_BACK)
        if not is_full:
            return Action.KEEP_GOING
        self._suspect = new
        if self._num_trials == MAX_TRIALS or self._is_sound(new, self._trial):
            return self._end("kept", Action.ACCEPT)
        return self._begin_trial()

    def _end(self, verdict: str, action: Action) -> Action:
        self._state, self._last_verdict = "steady", verdict
        return action

    def _is_sound(self, new: Sequence[float], former: Sequence[float]) -> bool:
        """It is certain that the version did not lose too much."""
        return self._sigmas_below(new, former, 1 - _MIDDLE * self._max_drop) < -_KEEP_SIGMA

    def _is_worse(self, new: Sequence[float]) -> bool:
        """It is certain that it did; or, at the end, much likelier than not."""
        if self._num_trials < _LOST_TRIALS:
            return False
        enough = _END_SIGMA if self._num_trials == MAX_TRIALS else _LOST_SIGMA
        confirmed = new[self._num_watched :]  # traffic may have shifted in the first window
        return self._sigmas_below(confirmed, self._trial, 1 - _MIDDLE * self._max_drop) > enough

    def _is_far_worse_already(self) -> bool:
        """What was seen before this trial is over is enough to end it."""
        is_early = self._num_trials <= _EARLY_TRIALS and len(self._recent) >= _MIN_BLOCKS
        return is_early and self._sigmas_lost(self._suspect, self._trial) > _EARLY_TRIAL_SIGMA

    def _is_far_worse(self, new: Sequence[float]) -> bool:
        """It lost so much that one trial is enough."""
        return (
            self._sigmas_lost(self._confirmation, self._trial) > _CONFIRM_SIGMA
            and self._sigmas_lost(new, self._trial) > _VERDICT_SIGMA
        )

    def _sigmas_lost(self, new: Sequence[float], former: Sequence[float]) -> float:
        """Standard errors beyond ``max_drop``."""
        return self._sigmas_below(new, former, 1 - self._max_drop)

    def _sigmas_below(self, new: Sequence[float], former: Sequence[float], keep: float) -> float:
        """Standard errors by which ``new`` is below ``keep * former``."""
        variance = _block_variance(self._block.usual_rounds, new, former)
        error = math.sqrt(variance * (1 / len(new) + keep**2 / len(former)))
        return (keep * fmean(former) - fmean(new)) / error


def _block_variance(block_rounds: int, *windows: Sequence[float]) -> float:
    """Variance of a block's mean, raised for the correlation between blocks near each other.

    Pooled over the windows and, since they are short, shrunk towards usual values: a round's
    standard deviation is half its mean.

    Args:
        block_rounds: of a block.
    """
    squares, lagged, num = 0.0, 0.0, 0
    for blocks in windows:
        mean = fmean(blocks)
        deviations = [value - mean for value in blocks]
        squares += _sum_of_products(deviations, deviations)
        for lag in range(1, min(_LAGS, len(blocks) - 1) + 1):
            lagged += _sum_of_products(deviations[:-lag], deviations[lag:])
        num += len(blocks) - 1
    level = fmean(value for blocks in windows for value in blocks)
    usual = (0.5 * level) ** 2 / block_rounds
    variance = (squares + _PRIOR_BLOCKS * usual) / (num + _PRIOR_BLOCKS)
    measured = lagged / squares if squares else 0.0
    prior = _PRIOR_LAG_BLOCKS * _PRIOR_CORRELATION
    correlation = (num * measured + prior) / (num + _PRIOR_LAG_BLOCKS)
    correlation = min(max(correlation, _LEAST_CORRELATION), _MOST_CORRELATION)
    return variance * (1 + 2 * correlation)


def _sum_of_products(one: Sequence[float], other: Sequence[float]) -> float:
    """``math.sumprod``, which Python 3.11 lacks."""
    total: float = sum(map(mul, one, other))
    return total
