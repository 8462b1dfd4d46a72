"""Draft chains of a training batch: which are run, how far, and how much each position weighs.

A chain is one draft that a server could have made: it begins at a row with a loss and has one row
in each step of training-time test. See ``drafters.eagle3.training``. Rows with a loss that follow
each other in a text follow each other in R, so chain r predicts for row r + k in step k.

All shapes depend on those of the batch alone: what does not exist has weight 0.

Shapes: T positions, R rows that have a loss (each is the first row of a chain), A chains carried
beyond the first step, K steps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from drafters.batch import TrainingBatch
from drafters.objectives import Positions, position_weights


class Chains(NamedTuple):
    """Chains of a batch and their steps."""

    carried_A: Tensor | None
    """int64 index into R, ascending: chains carried beyond step 0; ``None``: all of them."""
    alive_KR: Tensor
    """bool: the chain has the step."""
    carried_R: Tensor
    """bool: the chain is carried beyond step 0."""


def lay_out(
    batch: TrainingBatch, num_steps: int, share: float, generator: torch.Generator | None
) -> Chains:
    """Choose the chains of a batch and follow each until its first row without a loss.

    Args:
        share: of the chains is carried beyond the first step, drawn anew for each batch.
    """
    num_rows = batch.row_R.numel()
    carried_A, carried_R = _carried(batch, share, generator)
    own_R = torch.arange(num_rows, device=batch.row_R.device)
    alive = [batch.is_row_R]
    for step in range(1, num_steps):
        next_R = (own_R + step).clamp_max(num_rows - 1)
        follows_R = (batch.row_R[next_R] == batch.row_R + step) & batch.is_row_R[next_R]
        alive.append(alive[-1] & follows_R & carried_R)
    return Chains(carried_A, torch.stack(alive), carried_R)


def _carried(
    batch: TrainingBatch, share: float, generator: torch.Generator | None
) -> tuple[Tensor | None, Tensor]:
    """``Chains.carried_A`` and ``Chains.carried_R``."""
    if share >= 1:
        return None, batch.is_row_R
    num_rows, device = batch.row_R.numel(), batch.row_R.device
    drawn = torch.randperm(num_rows, generator=generator)[: round(share * num_rows)]
    carried_A = drawn.sort().values.to(device)
    chosen = torch.zeros_like(batch.is_row_R).index_fill(0, carried_A, True)
    return carried_A, chosen & batch.is_row_R


def by_chain(chains: Chains, values: list[Tensor]) -> Tensor:
    """Arrange the values of every step by chain, [K, R]; 0 where a chain lacks the step.

    Args:
        values: [R] of step 0, then [A] of each later step.
    """
    rows = values
    if chains.carried_A is not None:
        zeros = values[0].new_zeros(values[0].shape)
        rows = [values[0], *(zeros.index_copy(0, chains.carried_A, v) for v in values[1:])]
    arranged = torch.stack(rows)
    return torch.where(chains.alive_KR, arranged, torch.zeros_like(arranged))


def by_step(chains: Chains, values_KR: Tensor) -> list[Tensor]:
    """Inverse of ``by_chain``."""
    steps = list(values_KR.unbind())
    if chains.carried_A is None:
        return steps
    return [steps[0], *(step[chains.carried_A] for step in steps[1:])]


def chain_weights(
    chains: Chains, label_probs: list[Tensor], floor: float, positions: Positions = "own"
) -> Tensor:
    """Weight [K, R] of every position of every chain; 0 where a chain lacks the step.

    A chain that stops at step 0 is assumed to survive later steps as the carried chains do on
    average. Carried chains are weighted up to compensate, so the expected loss is that of all
    chains.

    Args:
        label_probs: the drafter's probability of the committed token, as ``by_chain`` takes it.
        floor, positions: see ``position_weights``.
    """
    prob_KR = by_chain(chains, label_probs)
    carried_R, is_row_R = chains.carried_R, chains.alive_KR[0]
    num_carried = carried_R.sum().clamp_min(1)
    mean_K1 = (prob_KR * carried_R).sum(dim=1, keepdim=True) / num_carried
    is_first_K1 = (torch.arange(len(label_probs), device=carried_R.device) == 0)[:, None]
    known_KR = carried_R | is_first_K1
    survival_KR = torch.where(known_KR, prob_KR, mean_K1)
    valid_KR = chains.alive_KR | ~known_KR
    weights_KR = position_weights(positions, survival_KR, valid_KR, floor) * chains.alive_KR
    scale = is_row_R.sum() / num_carried
    return torch.where(is_first_K1, weights_KR, weights_KR * scale)
