"""What a look at the matches of a step says without a plan.

Matches come and go from step to step, and a plan takes several times as long as a look. What the
last plan compared is still true, so that only what these matches bring is worked out anew: whether
a drafter that continues them is better in this step than what is done without it.

Coming back to a neural drafter takes time, which is charged to the step that leaves it. Text that
repeats itself mostly goes on doing so, and then a run of steps shares that charge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from policies.drafter_acceptance import Floats
from policies.forecast import Arm, Gains, Outline, by_kind, kinds_of


class Glance:
    """Decides from a look alone, between plans, whether a drafter that needs matches gains, and at
    which K. Its arm is taken without a plan: a plan at every match would cost more than most
    matches save."""

    def __init__(
        self,
        outline: Callable[[], Outline],
        batch: int,
        speed: float,
        blind: Arm,
        matching: Sequence[str],
        *,
        leave_s: float = 0.0,
        back_s: float = 0.0,
        hopeful: Callable[[str], Floats] | None = None,
    ) -> None:
        """
        Args:
            outline: returns that of the last plan, with drafters that need a match. It is asked for
                at the first look: most plans are followed by none.
            batch: requests of the last plan,
            speed: and tokens per second, which it has compared its arms at.
            blind: the arm in use.
            matching: drafters of the outline that need a match, no mixes; at least one.
            leave_s: seconds of catching up that are charged to a step that interrupts the base,
            back_s: and to the step of the base that follows it.
            hopeful: returns [B, K + 1] tokens of a row that such a drafter may bring at best.
        """
        self._outline_of, self._batch = outline, batch
        self._speed, self._blind, self._matching = speed, blind, matching
        self._charges_s = {False: leave_s, True: -back_s}
        self._hopeful = hopeful
        self._weighed: tuple[Outline, Gains, Floats] | None = None
        """That outline, what they gain, and [A] tokens' worth of time that the step takes
        longer."""

    def is_for(self, batch: int) -> bool:
        """Whether a batch is about as large as that of the plan."""
        return batch.bit_length() == self._batch.bit_length()

    def best(self, matches: bytes, *, is_interrupted: bool) -> tuple[Arm | None, float, bool]:
        """The arm that gains the most with these matches, and the time that it saves in plain
        steps; ``None`` and 0 if none does. And whether one would if catching up took no time.

        Args:
            is_interrupted: the step before was of such an arm.
        """
        if not any(matches):  # there is nothing to draft with
            return None, 0.0, False
        if self._weighed is None:
            outline = self._outline_of()
            gains = Gains.over(self._blind, outline, self._matching)
            self._weighed = outline, gains, gains.seconds * self._speed
        outline, gains, losses = self._weighed
        rows = by_kind(kinds_of(matches), gains.tokens.shape[1])
        values = (gains.tokens @ rows - losses).tolist()
        best = max(values)
        most = best - self._charges_s[is_interrupted] * self._speed
        if most <= 0:
            return None, 0.0, best > 0
        gain = most / (self._speed * outline.plain_s)
        return gains.arms[values.index(best)], gain, True

    def untried(
        self, matches: bytes, *, is_interrupted: bool
    ) -> tuple[Arm, float, float, float] | None:
        """An arm that may gain with these matches, although that is not expected; the seconds that
        it is expected to lose, and tokens and seconds of its step; ``None`` if none may.

        Args:
            is_interrupted: as for ``best``, which was called before and has found nothing.
        """
        if self._weighed is None or self._hopeful is None or not any(matches):
            return None
        outline, gains, losses = self._weighed
        rows = by_kind(kinds_of(matches), gains.tokens.shape[1])
        more = [
            (self._hopeful(kind) - outline.expected[kind])[:, 1 : outline.max_k + 1].T
            for kind in self._matching
        ]
        values = gains.tokens @ rows - losses - self._charges_s[is_interrupted] * self._speed
        hopes = values + np.concatenate(more) @ rows
        at = int(hopes.argmax())
        if hopes[at] <= 0:
            return None
        drafter, k = gains.arms[at]
        tokens, seconds = outline.expected[drafter][:, k] @ rows, outline.seconds[drafter][k]
        return (drafter, k), float(-values[at]) / self._speed, float(tokens), seconds
