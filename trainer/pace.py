"""When the next candidate is judged: as soon as it might pass.

Judging costs time that updates could use, so it needs a sign that a candidate became better. The
updates give one for nothing: their overlap with the target, measured on each batch before the
update. Once it has risen by what the last candidate lacked, the next one is judged, if the share of
time for judging allows. At the latest, one is judged after ``trainer.publish_every_steps`` updates,
because the overlap also falls and rises with the traffic.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from configs.schema import TrainerSettings
from trainer.duty import Duty
from trainer.figures import UpdateReport

_SMOOTHING = 0.3
"""Weight of the newest update in the running estimate."""
_LEAST_GAIN = 0.01
"""Rise that is waited for at least: a version costs a swap."""
_LONGEST_WAIT = 4
"""Times ``publish_every_steps`` that are waited for after candidates that failed."""


@dataclass(slots=True)
class Pace:
    """What happened since the last candidate was judged."""

    settings: TrainerSettings
    steps_since_judged: int = 0
    """Updates since the last candidate."""
    refused_in_row: int = 0
    """Candidates refused since the last published version."""
    estimate: float | None = None
    """Running mean of the tokens_per_step that the updates' overlaps amount to."""
    judged_estimate: float | None = None
    """The estimate when the last candidate was judged; at first that of the initial weights."""
    lacks: float = _LEAST_GAIN
    """Relative rise of the estimate that is waited for."""
    judging_s: float = 0.0
    """Seconds that the last candidate took."""
    judged_s: float = field(default_factory=time.monotonic)
    """Monotonic time at which that was over, without ``duty``'s rests."""
    cool_until_s: float = -math.inf
    """Monotonic time before which no candidate is judged."""
    duty: Duty = field(default_factory=Duty)
    """When the trainer rests; judging has a share of the time in which it does not."""

    def begin(self) -> None:
        """What was measured before says nothing about what comes."""
        self.steps_since_judged = self.refused_in_row = 0
        self.estimate = self.judged_estimate = None
        self.lacks = _LEAST_GAIN

    def saw(self, report: UpdateReport) -> None:
        """Take an update's figures into the estimate."""
        if report.skipped:
            return
        tokens, kept = 1.0, 1.0
        for alpha in report.alpha:
            kept *= alpha
            tokens += kept
        before = tokens if self.estimate is None else self.estimate
        self.estimate = before + _SMOOTHING * (tokens - before)
        if self.judged_estimate is None:
            self.judged_estimate = tokens

    def cool(self, seconds: float) -> None:
        """A version was rolled back: judge no candidate for so long."""
        self.cool_until_s = time.monotonic() + seconds

    @property
    def is_cooling(self) -> bool:
        """The last roll-back is too recent."""
        return time.monotonic() < self.cool_until_s

    @property
    def working_s(self) -> float:
        """Monotonic time without rests."""
        return time.monotonic() - self.duty.rested_s

    def is_due(self) -> bool:
        """Enough updates were made, or the candidate might pass already."""
        waits = min(2**self.refused_in_row, _LONGEST_WAIT)
        if self.steps_since_judged >= self.settings.publish_every_steps * waits:
            return True
        return self._has_risen() and self._can_afford()

    def begin_judging(self) -> None:
        """A candidate was taken; the updates from now on are in the next one."""
        self.steps_since_judged = 0
        self.judged_estimate = self.estimate

    def judged(self, gain_error: float | None, lacks: float | None, seconds: float) -> None:
        """What became of the candidate is known, or that none could be judged.

        Args:
            gain_error: standard error of its gain, relative to its figure.
            lacks: see ``GateVerdict``.
            seconds: that judging and publishing it took, without rests.
        """
        self.lacks = max(_LEAST_GAIN, gain_error or 0.0, lacks or 0.0)
        self.judging_s, self.judged_s = seconds, self.working_s

    def _has_risen(self) -> bool:
        if self.estimate is None or self.judged_estimate is None:
            return False
        return self.estimate >= self.judged_estimate * (1 + self.lacks)

    def _can_afford(self) -> bool:
        since_s = self.working_s - self.judged_s
        return self.judging_s < self.settings.gate_share * since_s
