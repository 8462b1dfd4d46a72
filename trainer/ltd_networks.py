"""Networks of the policy ``ltd`` while they are fitted, and the features that they see in a replay.

Shapes: S steps, F features, N inputs, H hidden units, A outputs.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from policies.budgets import BudgetScores, SavedTimes, cut_rows, size_inputs
from policies.features import NUM_FEATURES, Features
from policies.network import LAYERS, Network, Size
from policies.played_pair import PairPlay
from policies.replayed_log import ReplayedLog

_LEAST_DEVIATION = 1e-3
"""Of a feature. One that never varied says nothing: in service it may, as the step times of a
single load do, and would drown the others if it were divided by next to nothing."""

Standard = tuple[Tensor, Tensor]
"""[N] what is subtracted from inputs, and [N] what they are multiplied with then."""
Cut = Callable[[int, list[float], int], list[int] | None]
"""(number of a step, its features, K) -> lengths to which its drafts are cut; ``None``: not."""


def features_of(
    log: ReplayedLog,
    choose: Callable[[int, list[float]], int],
    seed: int = 0,
    cut: Cut | None = None,
) -> Tensor:
    """[S, F] features before every step.

    Args:
        choose: (number of the step, its features) -> K.
        cut: what is verified of the drafts; ``None``: everything.
    """
    rng, features = random.Random(seed), Features(max(log.max_draft, 1))
    shares = log.seconds / log.seconds[:, :1]
    rows = []
    for at, step in enumerate(log.steps):
        row = features.vector(step.batch, shares[at].tolist(), step.groups, step.context)
        rows.append(row)
        k = choose(at, row)
        verified, accepted = log.outcome(at, k, rng)
        lengths = cut(at, row, k) if cut is not None and k else None
        if lengths is not None:
            verified, accepted = lengths, list(map(min, accepted, lengths))
        features.observe(k, verified, accepted)
    return torch.tensor(rows)


def played(network: Network, log: ReplayedLog, budgets: BudgetScores | None = None) -> PairPlay:
    """Let a network decide every step.

    Args:
        budgets: ``None``: everything is verified, also by a network with a size.

    Raises:
        ValueError: the network chooses among another number of shares than the budgets have.
    """
    size, saved = network.size, SavedTimes(log.table)
    most = max(log.max_draft, 1)
    ks: list[int] = []

    def choose(_at: int, features: list[float]) -> int:
        ks.append(min(network.best(features), log.max_draft))
        return ks[-1]

    if size is None or budgets is None:
        features_of(log, choose)
        return PairPlay.of(log, np.array(ks))
    num = budgets.num_shares
    if size.num_shares != num:
        raise ValueError(f"a size of {size.num_shares} shares cannot play among {num}")
    shares = np.full(len(log.steps), num - 1)

    def cut(at: int, features: list[float], k: int) -> list[int] | None:
        share = size.best(size_inputs(features, log.steps[at].batch, k, most, saved))
        shares[at] = share
        return cut_rows(log, at, k, share, num)

    features_of(log, choose, cut=cut)
    return PairPlay.of(log, np.array(ks), shares, budgets)


def actor_of(hidden: int, num_outputs: int, num_inputs: int = NUM_FEATURES) -> nn.Sequential:
    """A network as the policy has them, with random weights."""
    return nn.Sequential(nn.Linear(num_inputs, hidden), nn.Tanh(), nn.Linear(hidden, num_outputs))


def standard_of(inputs: Tensor) -> Standard:
    """What makes the mean of inputs 0 and their deviation 1.

    Args:
        inputs: [S, N].
    """
    spread = inputs.std(0)
    scale = torch.where(spread > _LEAST_DEVIATION, 1 / spread.clamp_min(_LEAST_DEVIATION), 0.0)
    return inputs.mean(0), scale


def network_of(actor: nn.Sequential, shift: Tensor, scale: Tensor) -> Network:
    """The network of K that was fitted."""
    return Network(**_arrays(actor, shift, scale))


def size_of(actor: nn.Sequential, shift: Tensor, scale: Tensor) -> Size:
    """The size that was fitted."""
    return Size(**_arrays(actor, shift, scale))


def actor_from(layers: Network | Size) -> tuple[nn.Sequential, Standard]:
    """A network that was fitted, to be fitted further."""
    actor = actor_of(layers.b1.size, layers.b2.size, layers.mean.size)
    mean, scale, *weights = (torch.from_numpy(getattr(layers, name).copy()) for name in LAYERS)
    with torch.no_grad():
        for parameter, value in zip(actor.parameters(), weights, strict=True):
            parameter.copy_(value)
    return actor, (mean, scale)


def best_k(network: Network, _at: int, features: list[float]) -> int:
    """The K that a network scores highest."""
    return network.best(features)


def _arrays(actor: nn.Sequential, shift: Tensor, scale: Tensor) -> dict[str, Any]:
    first, second = actor[0], actor[2]
    assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
    tensors = (shift, scale, first.weight, first.bias, second.weight, second.bias)
    arrays = (tensor.detach().float().numpy().copy() for tensor in tensors)
    return dict(zip(LAYERS, arrays, strict=True))
