"""What a policy asks the engine to do: end a draft before its next token costs more than it brings.

A cut (``policies.allocation``) saves verification alone: by then the whole draft is made. Where the
engine runs programs as ordinary calls, the host can look at the drafter's confidence after each of
its passes, and leave out the passes that follow.

Two questions are asked at each position, both before its token is drawn. Once the distribution of
position j is known: is its token *kept* in the draft? And if it is: is there a pass for position
j + 1? Both look at the distributions of positions 1 to j alone, so the length of the draft is a
stopping time, and outputs follow the target (``specops.allocation`` has the proof).

What is known of a position is its survival, the probability that all tokens before it are kept, and
the probability of its likeliest token. Both are put into classes, and the answers are tables, so
that asking takes a microsecond.

Shapes: K draft tokens, S classes of survival, B of confidence.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

NUM_SURVIVALS = 24
"""Classes of survival: by quarters of a power of two, the last one open."""
_PER_HALVING = 4.0


def survival_class(survival: float) -> int:
    """Class of a probability; 0 is that of the largest."""
    return bisect_right(_BOUNDS, -survival)


def survival_of(number: int) -> float:
    """Typical probability of a class."""
    return math.pow(2.0, -number / _PER_HALVING)


def survival_bound(number: int) -> float:
    """Probability between a class and the next one."""
    return math.pow(2.0, -(number + 0.5) / _PER_HALVING)


_BOUNDS = [-survival_bound(number) for number in range(NUM_SURVIVALS - 1)]


@dataclass(frozen=True, slots=True)
class Ending:
    """How the drafts of one step are ended."""

    edges: tuple[float, ...]
    """[B - 1] bounds of the classes of confidence, ascending."""
    hazards: tuple[tuple[float, ...], ...]
    """[K][B] probability that a position is accepted if all before it are."""
    keeps: tuple[tuple[tuple[bool, ...], ...], ...] | None
    """[K][S][B] whether a token is kept in the draft, by survival before it; ``None``: all are, and
    the step only notes its figures."""
    goes_on: tuple[tuple[tuple[bool, ...], ...], ...] | None
    """[K][S][B] whether there is a pass for the next position, by survival with this one."""
    grace: int = 0
    """Tokens by which a draft is longer than the tables say, to know what those would have been
    worth."""

    @property
    def may_end(self) -> bool:
        """Some draft may be shorter than planned."""
        return self.keeps is not None

    def confidence_class(self, top: float) -> int:
        """Class of a probability of the likeliest token."""
        return bisect_right(self.edges, top)


class Course:
    """The draft of one request while it is made."""

    def __init__(self, ending: Ending, most: int) -> None:
        """
        Args:
            most: largest length of this draft.
        """
        self._ending, self._most = ending, most
        self._grace = ending.grace
        self._survival = 1.0
        self.length = 0
        """Tokens kept so far."""
        self.wants_more = most > 0
        """There is to be a pass for the next position."""

    def sees(self, top: float) -> bool:
        """Take in the confidence in the next position. Returns whether its token is kept."""
        if not self.wants_more:
            return False
        ending, j = self._ending, self.length
        b = ending.confidence_class(top)
        keeps, goes_on = True, True
        if ending.keeps is not None and ending.goes_on is not None:
            keeps = ending.keeps[j][survival_class(self._survival)][b]
            self._survival *= ending.hazards[j][b]
            goes_on = keeps and ending.goes_on[j][survival_class(self._survival)][b]
            keeps, goes_on = self._with_grace(keeps, goes_on)
        if keeps:
            self.length += 1
        self.wants_more = keeps and goes_on and self.length < self._most
        return keeps

    def _with_grace(self, keeps: bool, goes_on: bool) -> tuple[bool, bool]:
        if keeps and goes_on:
            return True, True
        if not self._grace:
            return keeps, goes_on
        self._grace -= 1
        # One that was not kept is; after one that was to be the last there is another.
        return True, keeps


def lengths(ending: Ending, tops: Sequence[float], most: int) -> tuple[int, int]:
    """Length of a draft, and positions whose distribution was computed, as far as figures tell.

    Args:
        tops: confidence in position 1, 2, ...
    """
    course, seen = Course(ending, most), 0
    for top in tops:
        if not course.wants_more:
            break
        seen += 1
        course.sees(top)
    return course.length, seen
