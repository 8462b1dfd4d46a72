"""Every sample gets its turn: the default."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.schema import TrainerSettings
from policies.draws.interface import Places, Pool


def draw(pool: Pool, settings: TrainerSettings, random: np.random.Generator) -> Places:
    """Samples trained on least often first, so that new traffic is learnt first and every sample
    gets its turn. A share of ``reservoir_share`` is taken uniformly from all samples, so that old
    traffic is not forgotten."""
    count = len(pool)
    wanted = count if pool.num_wanted is None else min(pool.num_wanted, count)
    need_N, luck_N = pool.visits_N / pool.num_pieces_N, random.random(count)
    by_luck = random.permutation(count)
    take_any = random.random(2 * count) < settings.reservoir_share
    # A list that has given this many has given as many different ones, so no more are needed.
    by_need, by_luck = _first_by(need_N, luck_N, wanted), by_luck[:wanted]
    return _interleaved(by_need, by_luck, take_any[: 2 * wanted], count)[:wanted]


def _first_by(need_N: NDArray[Any], luck_N: NDArray[Any], num: int) -> Places:
    """The first ``num`` places by need, and by luck where that is equal: sorting all of them for a
    batch of a dozen would take longer than the rest of an update."""
    if num >= len(need_N):
        return np.lexsort((luck_N, need_N))
    bound = np.partition(need_N, num - 1)[num - 1]
    below, equal = np.flatnonzero(need_N < bound), np.flatnonzero(need_N == bound)
    missing = num - len(below)
    if missing < len(equal):
        equal = equal[np.argpartition(luck_N[equal], missing - 1)[:missing]]
    places = np.concatenate((below, equal))
    return places[np.lexsort((luck_N[places], need_N[places]))]


def _interleaved(
    needed: Places, lucky: Places, take_lucky: NDArray[np.bool_], count: int
) -> Places:
    """Each index of ``range(count)`` in the lists once, taken from the front of the list that
    ``take_lucky`` selects."""
    choices = np.concatenate((take_lucky, np.zeros(len(needed), dtype=np.bool_)))
    turn = np.where(choices, np.cumsum(choices), np.cumsum(~choices)) - 1
    is_there = turn < len(needed)
    taken = np.where(choices, lucky[turn * is_there], needed[turn * is_there])[is_there]
    at, is_lucky = np.arange(len(taken)), choices[is_there]
    first = np.full(count, len(taken))
    first[taken[is_lucky]] = at[is_lucky]
    others = taken[~is_lucky]
    first[others] = np.minimum(first[others], at[~is_lucky])
    order: Places = taken[first[taken] == at]
    return order
