"""Draft chains of a training batch: which are run, how far, and how much each position weighs.

A chain is one draft that a server could have made: it begins at an anchor row and has one row in
each step of training-time test. See ``drafters.eagle3.training``.

Shapes: B sequences, S positions (padded), A anchors of a sequence, K steps, R rows that have a
loss (each is the first row of a chain), N outputs of one step that have a loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from drafters.eagle3.batch import TTTBatch, delayed
from drafters.eagle3.losses import dpace_weights


class Step(NamedTuple):
    """Indices of the N outputs of one step that have a loss; int64 each."""

    output_N: Tensor
    """Index into the step's outputs, flattened."""
    row_N: Tensor
    """Row of R that the output predicts for."""
    chain_N: Tensor
    """Row of R at which its chain began."""


class Chains(NamedTuple):
    """Chains of a batch and their steps."""

    flat_R: Tensor
    """Index into B * S of every row that begins a chain."""
    anchor_BA: Tensor
    """int64 index along S of the anchors carried beyond step 0, padded with arbitrary indices."""
    carried_R: Tensor
    """bool: the chain is carried beyond step 0."""
    steps: tuple[Step, ...]
    """[K]"""


def lay_out(
    batch: TTTBatch, num_steps: int, share: float, generator: torch.Generator | None
) -> Chains:
    """Choose the chains of a batch and follow each until its first row without a loss."""
    S = batch.loss_BS.shape[1]
    begins_BS = batch.loss_BS & delayed(batch.known_BS)
    flat_R = begins_BS.flatten().nonzero()[:, 0]
    row_of = torch.zeros_like(begins_BS, dtype=torch.int64).flatten()
    row_of[flat_R] = torch.arange(flat_R.numel(), device=flat_R.device)
    anchor_BA, alive_BA = _draw(begins_BS, share, generator)
    start_BA = torch.arange(begins_BS.shape[0], device=flat_R.device)[:, None] * S
    chain_BA = row_of[start_BA + anchor_BA]
    carried_R = torch.zeros_like(flat_R, dtype=torch.bool)
    carried_R[chain_BA[alive_BA]] = True
    steps = [Step(flat_R, row_of[flat_R], row_of[flat_R])]
    for step in range(1, num_steps):
        within_BA = (anchor_BA + step).clamp_max(S - 1)  # the last row never has a loss
        alive_BA = alive_BA & begins_BS.gather(1, within_BA)
        output_N = alive_BA.flatten().nonzero()[:, 0]
        row_N, chain_N = row_of[(start_BA + within_BA)[alive_BA]], chain_BA[alive_BA]
        steps.append(Step(output_N, row_N, chain_N))
    return Chains(flat_R, anchor_BA, carried_R, tuple(steps))


def _draw(
    begins_BS: Tensor, share: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Draw each beginning with probability ``share``.

    Returns:
        [B, A] int64 index along S, and [B, A] bool, False where it is padding.
    """
    if share < 1:
        luck_BS = torch.rand(begins_BS.shape, generator=generator).to(begins_BS.device)
        begins_BS = begins_BS & (luck_BS < share)
    num_anchors = int(begins_BS.sum(dim=1).max()) if begins_BS.numel() else 0
    anchor_BA = (~begins_BS).byte().argsort(dim=1, stable=True)[:, :num_anchors]
    return anchor_BA, begins_BS.gather(1, anchor_BA)


def by_chain(chains: Chains, values: list[Tensor]) -> Tensor:
    """Arrange the [N] values of every step by chain, [K, R]; 0 where a chain lacks the step."""
    zeros = values[0].new_zeros(chains.flat_R.numel())
    rows = zip(chains.steps, values, strict=True)
    return torch.stack([zeros.index_copy(0, step.chain_N, figures) for step, figures in rows])


def has_step(chains: Chains) -> Tensor:
    """[K, R] bool: the chain has the step."""
    every = [torch.ones_like(step.chain_N, dtype=torch.bool) for step in chains.steps]
    return by_chain(chains, every)


def chain_weights(chains: Chains, label_probs: list[Tensor], floor: float) -> Tensor:
    """D-PACE weight [K, R] of every position of every chain; 0 where a chain lacks the step.

    A chain that stops at step 0 is assumed to survive later steps as the carried chains do on
    average. Carried chains are weighted up to compensate, so the expected loss is that of all
    chains.

    Args:
        label_probs: [N] for each step, the drafter's probability of the committed token.
    """
    prob_KR = by_chain(chains, label_probs)
    valid_KR = has_step(chains)
    carried_R = chains.carried_R
    num_carried = carried_R.sum().clamp_min(1)
    mean_K1 = (prob_KR * carried_R).sum(dim=1, keepdim=True) / num_carried
    known_KR = carried_R | (torch.arange(len(label_probs), device=carried_R.device) == 0)[:, None]
    survival_KR = torch.where(known_KR, prob_KR, mean_K1)
    weights_KR = dpace_weights(survival_KR, valid_KR | ~known_KR, floor) * valid_KR
    weights_KR[1:] *= carried_R.numel() / num_carried
    return weights_KR
