"""Every sample gets its turn: the default."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from configs.schema import TrainerSettings
from policies.draws.interface import Places, Pool


def draw(pool: Pool, settings: TrainerSettings, random: np.random.Generator) -> Places:
    """Samples trained on least often first, so that new traffic is learnt first and every sample
    gets its turn. A share of ``reservoir_share`` is taken uniformly from all samples, so that old
    traffic is not forgotten."""
    count = len(pool)
    by_need = np.lexsort((random.random(count), pool.visits_N / pool.num_pieces_N))
    by_luck = random.permutation(count)
    take_any = random.random(2 * count) < settings.reservoir_share
    return _interleaved(by_need, by_luck, take_any)


def _interleaved(needed: Places, lucky: Places, take_lucky: NDArray[np.bool_]) -> Places:
    """Each index once, taken from the front of the list that ``take_lucky`` selects."""
    choices = np.concatenate((take_lucky, np.zeros(len(needed), dtype=np.bool_)))
    turn = np.where(choices, np.cumsum(choices), np.cumsum(~choices)) - 1
    is_there = turn < len(needed)
    taken = np.where(choices, lucky[turn * is_there], needed[turn * is_there])[is_there]
    first = np.unique(taken, return_index=True)[1]
    order: Places = taken[np.sort(first)]
    return order
