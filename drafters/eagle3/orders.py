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
    """The order of all chains: output r of step k is compared with row r + k.

    The device's part is computed anew each time: a captured update reads it at every replay, so it
    must live in the graph's own memory. Kept in a cache, it would be freed under a graph.
    """
    ahead = torch.arange(num_steps, device=device)[:, None] + torch.arange(num_rows, device=device)
    order_N = ahead.clamp_max(num_rows - 1).flatten().argsort(stable=True)
    return TeacherOrder(order_N, _sorted_rows(num_rows, num_steps))


def blocked_order(
    num_chains: int, num_steps: int, at_once: int, device: torch.device
) -> TeacherOrder:
    """The order of all chains, ``at_once`` of them in a block."""
    orders, rows, blocks = [], [], []
    for first in range(0, num_chains, at_once):
        count = min(at_once, num_chains - first)
        like = torch.empty(0, device=device)
        places = block_order(count, num_steps, num_chains - first, like)
        orders.append(places // count * num_chains + places % count + first)
        ahead = np.arange(num_steps)[:, None] + np.arange(first, first + count)
        rows.append(np.sort(np.minimum(ahead, num_chains - 1), axis=None))
        blocks.append(slice(first * num_steps, (first + count) * num_steps))
    if not blocks:
        return _full_order(num_chains, num_steps, device)
    return TeacherOrder(torch.cat(orders), np.concatenate(rows), tuple(blocks))


def block_order(count: int, num_steps: int, num_left: int, like: Tensor) -> Tensor:
    """Order of a block's rows, numbered step by step, by their teacher rows, of which the block
    sees ``num_left``. As in ``_full_order``, computed anew each time."""
    device = like.device
    ahead = torch.arange(num_steps, device=device)[:, None] + torch.arange(count, device=device)
    return ahead.clamp_max(num_left - 1).flatten().argsort(stable=True)


@lru_cache(maxsize=64)
def _sorted_rows(num_rows: int, num_steps: int) -> NDArray[np.int64]:
    """``TeacherOrder.row_N`` of all chains."""
    ahead = np.arange(num_steps)[:, None] + np.arange(num_rows)
    return np.sort(np.minimum(ahead, num_rows - 1), axis=None)
