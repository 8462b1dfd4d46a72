"""A policy-gradient term: the drafter is the policy, the target's verdict on a draft the reward.

For each draft token x that was verified, ``-w (r - b) log q(x)`` with r = 1 if the target kept it
and 0 if not, and b the mean of r over the batch. Traces come late, so w is the ratio of what the
drafter gives x now to what it gave it then, at most ``MOST_RATIO``; 1 where drafts are not drawn.
Drafts that were never verified have no reward, and no term.

A verified token at depth k of a round is what step k of the chain at that round's anchor predicts
(``drafters.eagle3.training``), so its row is already computed.

Shapes: R rows with a loss, A chains carried beyond step 0, K steps, H hidden, Vd draft vocabulary.

Source: the reward is that of DVI, arXiv:2510.05421; the truncated ratio is Ionides 2008.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from drafters.batch import TrainingBatch
from drafters.eagle3.chains import Chains
from specops.distill import Rows

MOST_RATIO = 2.0
"""A drafter that has become surer of a token by more than this learns no faster from it."""


class Verified(NamedTuple):
    """The draft tokens of a batch whose outcome is known, one for each row at most."""

    flat_R: Tensor
    """Index of the row that predicts it among the outputs of all steps; any where there is none."""
    token_R: Tensor
    """Its draft id."""
    kept_R: Tensor
    """float32 reward, 1 or 0."""
    counts_R: Tensor
    """bool: there is one, and its chain is computed."""


def verified(batch: TrainingBatch, chains: Chains, labels: Rows, rejected: Rows) -> Verified:
    """Find the outputs that predict what was verified.

    Args:
        labels: draft id of the committed token after each row.
        rejected: draft id of the token that was rejected there instead, if it was.
    """
    assert batch.outcome_R3 is not None, "the store keeps outcomes if there is a reward"
    depth_R, rejected_R = batch.outcome_R3[:, 0].long(), batch.outcome_R3[:, 1]
    num_steps, num_rows = chains.alive_KR.shape
    own_R = torch.arange(num_rows, device=depth_R.device)
    step_R = depth_R.clamp(0, num_steps - 1)
    begin_R = (own_R - step_R).clamp_min(0)
    is_known_R = (depth_R >= 0) & (depth_R < num_steps) & (own_R >= depth_R) & batch.is_row_R
    counts_R = is_known_R & chains.alive_KR[step_R, begin_R]
    kept_R = rejected_R < 0
    known_R = torch.where(kept_R, labels.label_known_N, rejected.label_known_N)
    token_R = torch.where(kept_R, labels.label_ids_N, rejected.label_ids_N)
    return Verified(_flat(chains, step_R, begin_R), token_R, kept_R.float(), counts_R & known_R)


def reward_loss(
    inputs: list[Tensor], weight_VH: Tensor, batch: TrainingBatch, found: Verified
) -> Tensor:
    """The term, a scalar to minimise; 0 without outcomes.

    Args:
        inputs: the lm_head's inputs, [R, H] of step 0, then [A, H] of each later step.
        weight_VH: [Vd, H] the lm_head that drafts.
    """
    assert batch.outcome_R3 is not None
    heat_R = torch.where(batch.temperature_R == 0, 1.0, batch.temperature_R)
    hidden = torch.cat(inputs)[found.flat_R]
    scores = hidden @ weight_VH.to(hidden.dtype).T
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) / heat_R[:, None]
    logq_R = scores.log_softmax(dim=-1).gather(1, found.token_R[:, None])[:, 0]
    then_R = batch.outcome_R3[:, 2].contiguous().view(torch.float32)
    ratio_R = (logq_R.detach() - then_R).exp().clamp_max(MOST_RATIO)
    ratio_R = torch.where(then_R.isnan(), 1.0, ratio_R)
    counts_R = found.counts_R.float()
    total = counts_R.sum().clamp_min(1)
    baseline = (found.kept_R * counts_R).sum() / total
    terms_R = ratio_R * (found.kept_R - baseline) * logq_R
    return -torch.where(found.counts_R, terms_R, 0.0).sum() / total


def _flat(chains: Chains, step_R: Tensor, begin_R: Tensor) -> Tensor:
    """Index of step ``step`` of the chain that begins at row ``begin`` among all outputs."""
    num_rows = chains.alive_KR.shape[1]
    if chains.carried_A is None:
        return step_R * num_rows + begin_R
    num_carried = len(chains.carried_A)
    place_R = torch.zeros_like(begin_R)
    place_R[chains.carried_A] = torch.arange(num_carried, device=begin_R.device)
    later_R = num_rows + (step_R - 1) * num_carried + place_R[begin_R]
    return torch.where(step_R == 0, begin_R, later_R)
