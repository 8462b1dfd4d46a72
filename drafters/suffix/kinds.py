"""Kinds of match: what an earlier occurrence of the last few tokens says of the next ones.

Length alone says little. A match in the request's own text is continued far more often than one of
the same length in other requests' text, and where all earlier occurrences were followed by the same
token, the next one mostly is too. So a kind is where the match was found, whether its occurrences
agree on the next token, and its length.

Kinds are numbered from 1 by ``PRIOR_ACCEPTANCE``, the lowest first; 0 is no match.
"""

from __future__ import annotations

from typing import NamedTuple

LENGTHS = (1, 3, 6, 9)
"""Shortest match of each class of lengths."""
_CLASS_OF = (0, 0, 0, 1, 1, 1, 2, 2, 2)
"""Class of each length; longer ones are of the last."""


class Kind(NamedTuple):
    """A kind of match."""

    is_own: bool
    """In the request itself, else in finished traffic."""
    votes: str
    """``divided``: the occurrences were followed by different tokens; ``alone``: there is one;
    ``agreed``: all were followed by the same token."""
    least: int
    """Shortest match of its class of lengths, in tokens."""

    def __str__(self) -> str:
        place = "own" if self.is_own else "recent"
        return f"{place}, {self.votes}, {self.least} and more"


_MEASURED = {
    (True, "divided"): (0.31, 0.37, 0.45, 0.52),
    (True, "alone"): (0.57, 0.74, 0.84, 0.93),
    (True, "agreed"): (0.84, 0.92, 0.96, 0.98),
    (False, "divided"): (0.11, 0.16, 0.28, 0.36),
    (False, "alone"): (0.18, 0.29, 0.55, 0.79),
    (False, "agreed"): (0.35, 0.56, 0.76, 0.93),
}
"""Share of first draft tokens that the target repeats, by class of lengths: code and documentation,
bundled target, temperature 0.5 (benchmarks/matches.py)."""
_PRIORS = {
    Kind(is_own, votes, least): share
    for (is_own, votes), shares in _MEASURED.items()
    for least, share in zip(LENGTHS, shares, strict=True)
}

KINDS: tuple[Kind, ...] = tuple(sorted(_PRIORS, key=_PRIORS.__getitem__))
"""Kind of number 1, 2, ..."""
PRIOR_ACCEPTANCE = (0.0, *(_PRIORS[kind] for kind in KINDS))
"""Acceptance of the first draft token by number, before anything is measured."""
NAMES = ("no match", *map(str, KINDS))
"""By number."""

_NUMBERS = {
    (is_own, votes): tuple(1 + KINDS.index(Kind(is_own, votes, least)) for least in LENGTHS)
    for is_own, votes in _MEASURED
}
"""Numbers by class of lengths."""


VOTES = ("divided", "alone", "agreed")
"""Order of votes in ``table``."""


def table() -> list[tuple[int, ...]]:
    """[7, 4] numbers of kinds by class of lengths, in six rows: by votes in finished traffic and
    then in the request itself. The last row is ``LENGTHS``."""
    return [*(_NUMBERS[own, votes] for own in (False, True) for votes in VOTES), LENGTHS]


def number_of(length: int, is_own: bool, followers: list[int]) -> int:
    """Number of a match's kind.

    Args:
        length: tokens, >= 1.
        followers: token after each of its occurrences, at least one.
    """
    if len(followers) == 1:
        votes = "alone"
    else:
        votes = "agreed" if followers.count(followers[0]) == len(followers) else "divided"
    size = _CLASS_OF[length] if length < len(_CLASS_OF) else len(LENGTHS) - 1
    return _NUMBERS[is_own, votes][size]


def least_better(values: list[float], own: int) -> int | None:
    """Length from which on a match in finished traffic may be worth more than one of a kind.

    Args:
        values: what a match of each kind is worth, by number.
        own: number of the kind; 0: there is no other match.

    Returns:
        ``None``: none is worth more, however long.
    """
    for size, least in enumerate(LENGTHS):
        numbers = (_NUMBERS[False, votes][size] for votes in VOTES)
        if not own or any(values[number] > values[own] for number in numbers):
            return least
    return None
