"""The order in which the rows of a batch's chains are distilled: by the row that they predict for,
so that the teacher's logits of a row are computed once for all chains that reach it.

Output r of step k is compared with row r + k. What the host must know of an order depends on shapes
alone.

Shapes: R chains, K steps, N = K R rows, numbered step by step.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drafters.eagle3.chains import Chains
from specops.distill import TeacherOrder


def full_order_of(chains: Chains, num_rows: int) -> TeacherOrder | None:
    """The order of all rows; ``None`` if it depends on which chains were drawn."""
    if chains.carried_A is not None:
        return None
    return _full_order(num_rows, len(chains.alive_KR), chains.alive_KR.device)


def _full_order(num_rows: int, num_steps: int, device: torch.device) -> TeacherOrder:
    """The order of all chains."""
    order_N = _order_of(num_rows, num_steps, num_rows, device)
    return TeacherOrder(order_N, _sorted_rows(num_rows, num_steps, num_rows))


def blocked_order(
    num_chains: int, num_steps: int, at_once: int, device: torch.device
) -> tuple[TeacherOrder, list[Tensor]]:
    """The order of all chains, ``at_once`` of them in a block, and the order within each block,
    whose rows are numbered step by step, too."""
    within, orders, rows, blocks = [], [], [], []
    for first in range(0, num_chains, at_once):
        count = min(at_once, num_chains - first)
        places = _order_of(count, num_steps, num_chains - first, device)
        within.append(places)
        orders.append(places // count * num_chains + places % count + first)
        rows.append(first + _sorted_rows(count, num_steps, num_chains - first))
        blocks.append(slice(first * num_steps, (first + count) * num_steps))
    if not blocks:
        return _full_order(num_chains, num_steps, device), within
    return TeacherOrder(torch.cat(orders), np.concatenate(rows), tuple(blocks)), within


def _order_of(count: int, num_steps: int, num_left: int, device: torch.device) -> Tensor:
    """Order of the rows of ``count`` chains by their teacher rows, of which they see ``num_left``.

    Computed anew each time: a captured update reads it at every replay, so it must live in the
    graph's own memory. Kept in a cache, it would be freed under a graph.
    """
    ahead = torch.arange(num_steps, device=device)[:, None] + torch.arange(count, device=device)
    return ahead.clamp_max(num_left - 1).flatten().argsort(stable=True)


@lru_cache(maxsize=64)
def _sorted_rows(count: int, num_steps: int, num_left: int) -> NDArray[np.int64]:
    """The same teacher rows, ascending, on the host."""
    ahead = np.arange(num_steps)[:, None] + np.arange(count)
    return np.sort(np.minimum(ahead, num_left - 1), axis=None)
