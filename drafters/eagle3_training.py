"""Training-time test for EAGLE-3: every chain the server could have drafted, in one padded pass.

Step 0 takes every row with h from the target's features. At step i row p takes its committed token
x_p and, as h, the output of step i - 1 at row p - 1: it is draft row i of the chain that began at
anchor a = p - i. So it attends to the step-0 keys p' <= a and to one key of each step j = 1..i, at
row a + j; RoPE is always at p. Output i of row p predicts x_{p+1}, draft token i + 1 of that chain.

``reference_chain_logits`` is the definition, drafted one token after another as a server does.

Shapes: B sequences, S positions (padded), K steps, R rows that have a loss, H hidden, m tapped
layers, F = m * H, V target vocabulary, Vd draft vocabulary, N chains.

Source: Li et al. 2025, EAGLE-3, arXiv:2503.01840, Section 3.2; rows as in ``eagle3``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from drafters.eagle3 import Eagle3
from drafters.losses import (
    FLOOR,
    LossKind,
    RowLosses,
    TargetRows,
    dpace_weights,
    head_losses,
)

TargetHead = Callable[[Tensor], Tensor]
"""lm_head input [R, H] -> the target's logits [R, V]: frozen, softcap included."""


@dataclass(frozen=True, slots=True)
class TTTBatch:
    """Pieces of traces, padded to one length. What is not ``known`` may hold anything finite."""

    token_ids_BS: Tensor
    """int64."""
    positions_BS: Tensor
    """int64, position in the request; consecutive along S."""
    features_BSF: Tensor
    """Tapped layers in ``layer_ids`` order."""
    last_hidden_BSH: Tensor
    """lm_head's input."""
    known_BS: Tensor
    """bool: both of the above exist at this position."""
    loss_BS: Tensor
    """bool: the row counts. Needs ``known`` there, and a committed token after it."""

    def to(self, device: torch.device, dtype: torch.dtype) -> TTTBatch:
        """On ``device``, features and hidden rows in ``dtype``."""
        return TTTBatch(
            self.token_ids_BS.to(device),
            self.positions_BS.to(device),
            self.features_BSF.to(device, dtype),
            self.last_hidden_BSH.to(device, dtype),
            self.known_BS.to(device),
            self.loss_BS.to(device),
        )


@dataclass(frozen=True, slots=True)
class Objective:
    """What is minimised and how it is cut into blocks."""

    num_steps: int = 4
    """K, passes of training-time test."""
    loss: LossKind = "lk"
    """``lk``: LK hybrid; ``forward_kl``. Positions are weighted by D-PACE in both."""
    floor: float = FLOOR
    """a of D-PACE; 1 gives every chain the same weights."""
    chunk_rows: int = 256
    """Rows of logits formed at once: 256 x 4,096 floats stay in a CPU's cache; use some thousands
    on a GPU."""


class TTTLoss(NamedTuple):
    """One batch judged. Only ``loss`` has a gradient."""

    loss: Tensor
    """Scalar: mean over all chain positions, weighted by D-PACE."""
    alpha_K: Tensor
    """Mean overlap of each draft position; NaN-free, 0 where no row has it."""
    agree_K: Tensor
    """Share of rows whose draft argmax is the committed token."""
    num_rows: Tensor
    """Rows that had a loss at step 0."""


def ttt_loss(
    model: Eagle3, embed: Tensor, head: TargetHead, batch: TTTBatch, objective: Objective
) -> TTTLoss:
    """Loss of every chain in the batch.

    Args:
        embed: [V, H] the target's embedding table, scaled as the target scales it.
        head: see ``TargetHead``; called on ``chunk_rows`` rows at a time, without gradient.
    """
    rows_R = batch.loss_BS.flatten().nonzero()[:, 0]
    target = target_rows(model, head, batch, rows_R, None, objective.chunk_rows)
    weight = model.lm_head.weight.to(batch.features_BSF.dtype)
    steps = [
        head_losses(hidden, weight, target, objective.loss, objective.chunk_rows)
        for hidden in _head_inputs(model, embed, batch, rows_R, objective.num_steps)
    ]
    return _weigh(batch, rows_R, steps, objective.floor)


@torch.no_grad()
def chain_acceptance(
    model: Eagle3,
    embed: Tensor,
    head: TargetHead,
    batch: TTTBatch,
    temperature_B: Tensor,
    num_steps: int,
    chunk_rows: int = 256,
) -> tuple[Tensor, Tensor]:
    """Acceptance of each position of every full chain, at each request's temperature.

    Args:
        temperature_B: 0 is greedy: 1 where the drafter's argmax is the committed token, else 0.
            Else ``sum_x min(p, q)`` at that temperature. The greedy figure uses the committed
            token, which is the argmax the server really took, whatever the rows' rounding.

    Returns:
        [N, K] float32 acceptance of the chains whose K rows all count, and [N] int64, the sequence
        each belongs to.
    """
    rows_R = batch.loss_BS.flatten().nonzero()[:, 0]
    temperature_R = temperature_B.to(batch.loss_BS.device)[rows_R // batch.loss_BS.shape[1]]
    greedy_R = temperature_R == 0
    scale_R = torch.where(greedy_R, 1.0, temperature_R)[:, None]
    target = target_rows(model, head, batch, rows_R, scale_R, chunk_rows)
    weight = model.lm_head.weight.to(batch.features_BSF.dtype)
    alphas = []
    for hidden in _head_inputs(model, embed, batch, rows_R, num_steps):
        cooled = (hidden / scale_R).to(hidden.dtype)
        step = head_losses(cooled, weight, target, "lk", chunk_rows)
        alphas.append(torch.where(greedy_R, step.agrees_R.float(), step.alpha_R.float()))
    valid_KN = _chains(batch, rows_R, [torch.ones_like(rows_R, dtype=torch.bool)] * num_steps)
    full_N = (valid_KN & _anchored(batch, num_steps)).all(dim=0)
    sequence_N = torch.arange(full_N.numel(), device=full_N.device) // batch.loss_BS.shape[1]
    return _chains(batch, rows_R, alphas)[:, full_N].T, sequence_N[full_N]


@torch.no_grad()
def target_rows(
    model: Eagle3,
    head: TargetHead,
    batch: TTTBatch,
    rows_R: Tensor,
    temperature_R1: Tensor | None,
    chunk_rows: int,
) -> TargetRows:
    """The target's distribution at flat rows ``rows_R`` over the drafter's vocabulary."""
    c = model.config
    device = rows_R.device
    hidden_RH = batch.last_hidden_BSH.flatten(0, 1)[rows_R]
    ids_Vd = model.to_target_ids(torch.arange(c.draft_vocab_size, device=device))
    probs_RV = torch.empty(
        (rows_R.numel(), c.draft_vocab_size), device=device, dtype=_float(hidden_RH.dtype)
    )
    for start in range(0, rows_R.numel(), chunk_rows):
        rows = slice(start, start + chunk_rows)
        scores = head(hidden_RH[rows]).to(probs_RV.dtype)
        scores = scores if temperature_R1 is None else scores / temperature_R1[rows]
        probs = scores.softmax(dim=-1)
        probs_RV[rows] = probs if model.d2t is None else probs[:, ids_Vd]
    mass_R = probs_RV.sum(dim=-1).clamp_min(1e-6)
    entropy_R = torch.special.xlogy(probs_RV, probs_RV).sum(dim=-1) / mass_R - mass_R.log()
    draft_id_V = torch.full((c.target_vocab_size,), -1, device=device)
    draft_id_V[ids_Vd] = torch.arange(c.draft_vocab_size, device=device)
    label_R = draft_id_V[batch.token_ids_BS.flatten()[rows_R + 1]]
    return TargetRows(probs_RV, mass_R, entropy_R, label_R.clamp_min(0), label_R >= 0)


def ttt_outputs(model: Eagle3, embed: Tensor, batch: TTTBatch, num_steps: int) -> Iterator[Tensor]:
    """Outputs g [B, S, H] of step 0, 1, ... at every row; garbage, but finite, at unknown rows.

    A bfloat16 batch runs under autocast, so float32 master weights need no copy.
    """
    mixed = partial(
        torch.autocast,
        batch.features_BSF.device.type,
        dtype=torch.bfloat16,
        enabled=batch.features_BSF.dtype == torch.bfloat16,
    )
    embeds = embed[batch.token_ids_BS].to(batch.features_BSF.dtype)
    cos, sin = model.rope(batch.positions_BS)
    attend = _ChainAttention(usable_BS=_earlier(batch.known_BS, 1))
    with mixed():
        hidden = model.fuse(batch.features_BSF)
    for _ in range(num_steps):
        with mixed():
            hidden = model(embeds, _earlier(hidden, 1), cos, sin, attend)
        yield hidden


class _ChainAttention:
    """The attention of one pass of training-time test; called once for each step, in order."""

    def __init__(self, usable_BS: Tensor) -> None:
        self.usable_BS = usable_BS
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, S, Hq, D], k and v [B, S, Hkv, D] -> [B, S, Hq, D]."""
        self.keys.append(k)
        self.values.append(v)
        step = len(self.keys) - 1
        B, S, Hq, D = q.shape
        Hkv = k.shape[2]
        grouped = (q * D**-0.5).view(B, S, Hkv, Hq // Hkv, D).permute(0, 2, 3, 1, 4)  # B Hkv G S D
        trunk_k, trunk_v = (x[0].transpose(1, 2) for x in (self.keys, self.values))
        scores = (grouped.flatten(2, 3) @ trunk_k.transpose(-1, -2)).view(B, Hkv, -1, S, S)
        scores = scores.masked_fill(~self._visible(step), torch.finfo(scores.dtype).min)
        own_k = [_earlier(self.keys[j], step - j) for j in range(1, step + 1)]
        own_v = [_earlier(self.values[j], step - j) for j in range(1, step + 1)]
        own = [(grouped * x.transpose(1, 2)[:, :, None]).sum(-1, keepdim=True) for x in own_k]
        weights = torch.cat((scores, *own), dim=-1).softmax(dim=-1).to(v.dtype)
        mixed = (weights[..., :S].flatten(2, 3) @ trunk_v).view(B, Hkv, -1, S, D)
        for j, x in enumerate(own_v):
            mixed = mixed + weights[..., S + j, None] * x.transpose(1, 2)[:, :, None]
        merged: Tensor = mixed.permute(0, 3, 1, 2, 4).reshape(B, S, Hq, D)
        return merged

    def _visible(self, step: int) -> Tensor:
        """[B, 1, 1, S, S] bool: step-0 key p' of an existing row, p' <= p - step."""
        place = torch.arange(self.usable_BS.shape[1], device=self.usable_BS.device)
        behind = place[None, :] <= place[:, None] - step
        return (behind & self.usable_BS[:, None, :])[:, None, None]


def _head_inputs(
    model: Eagle3, embed: Tensor, batch: TTTBatch, rows_R: Tensor, num_steps: int
) -> Iterator[Tensor]:
    """lm_head inputs [R, H] of every step, at the rows that have a loss."""
    for outputs in ttt_outputs(model, embed, batch, num_steps):
        normed: Tensor = model.norm(outputs.flatten(0, 1)[rows_R])
        yield normed.to(batch.features_BSF.dtype)


def _weigh(batch: TTTBatch, rows_R: Tensor, steps: list[RowLosses], floor: float) -> TTTLoss:
    """Losses of all steps -> one number, chain by chain."""
    K = len(steps)
    counted_R = torch.ones_like(rows_R, dtype=torch.bool)
    valid_KN = _chains(batch, rows_R, [counted_R] * K) & _anchored(batch, K)
    label_probs_KN = _chains(batch, rows_R, [s.label_prob_R for s in steps])
    weights_KN = dpace_weights(label_probs_KN, valid_KN, floor)
    loss_KN = _chains(batch, rows_R, [s.loss_R for s in steps])
    num_K = valid_KN.sum(dim=1).clamp_min(1)
    alpha_KN = _chains(batch, rows_R, [s.alpha_R for s in steps]) * valid_KN
    agree_KN = _chains(batch, rows_R, [s.agrees_R for s in steps]) & valid_KN
    return TTTLoss(
        (weights_KN * loss_KN).sum() / weights_KN.sum().clamp_min(1e-9),
        alpha_KN.detach().sum(dim=1) / num_K,
        agree_KN.sum(dim=1) / num_K,
        valid_KN[0].sum(),
    )


def _chains(batch: TTTBatch, rows_R: Tensor, steps: list[Tensor]) -> Tensor:
    """Values [R] of every step -> [K, N]: value of draft position k of the chain at each anchor.

    N = B * S anchors; 0 where row ``anchor + k`` has no loss or is past the end.
    """
    B, S = batch.loss_BS.shape
    out = []
    for k, values_R in enumerate(steps):
        flat = values_R.new_zeros(B * S).index_copy(0, rows_R, values_R)
        out.append(_later(flat.view(B, S), k).flatten())
    return torch.stack(out)


def _anchored(batch: TTTBatch, num_steps: int) -> Tensor:
    """[1, N] bool: the anchor's own row has features, so a chain can begin there."""
    return _earlier(batch.known_BS, 1).flatten()[None]


def _earlier(x: Tensor, by: int) -> Tensor:
    """x [B, S, ...] with row p holding what was at p - by; zeros before the start."""
    if by == 0:
        return x
    return torch.cat((torch.zeros_like(x[:, :by]), x[:, :-by]), dim=1)[:, : x.shape[1]]


def _later(x: Tensor, by: int) -> Tensor:
    """x [B, S] with row p holding what was at p + by; zeros past the end."""
    if by == 0:
        return x
    return torch.cat((x[:, by:], torch.zeros_like(x[:, :by])), dim=1)[:, : x.shape[1]]


def _float(dtype: torch.dtype) -> torch.dtype:
    """Type of probabilities: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.no_grad()
def reference_chain_logits(
    model: Eagle3,
    embed: Tensor,
    token_ids_S: Tensor,
    features_SF: Tensor,
    known_S: Tensor,
    anchor: int,
    num_steps: int,
) -> Tensor:
    """The definition: draft logits [K, Vd] of the chain at ``anchor``, with a growing KV.

    Rows up to the anchor enter with fused features, as a server ingests committed rows; then each
    output is fed back with the next committed token, as if it had been drafted and accepted.
    Positions count from 0 at ``token_ids_S[0]``.

    Raises:
        ValueError: the anchor's own row lacks its feature (row p needs it at p - 1).
    """
    usable = [p for p in range(1, anchor + 1) if bool(known_S[p - 1])]
    if not usable or usable[-1] != anchor:
        raise ValueError(f"row {anchor} needs the feature of position {anchor - 1}")
    attend = _GrowingAttention()
    logits = []
    hidden = features_SF.new_zeros(0)
    for p in [*usable, *range(anchor + 1, anchor + num_steps)]:
        hidden = model.fuse(features_SF[p - 1]) if p <= anchor else hidden
        cos, sin = model.rope(torch.tensor(p, device=features_SF.device))
        hidden = model(embed[token_ids_S[p]].to(hidden.dtype), hidden, cos, sin, attend)
        if p >= anchor:
            logits.append(model.logits(hidden))
    return torch.stack(logits)


class _GrowingAttention:
    """One row at a time over all keys so far."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [Hq, D], k and v [Hkv, D] -> [Hq, D]."""
        self.keys.append(k)
        self.values.append(v)
        share = q.shape[0] // k.shape[0]
        keys, values = (
            torch.stack(x, dim=1).repeat_interleave(share, dim=0) for x in (self.keys, self.values)
        )
        scores = (keys @ q[..., None])[..., 0] * q.shape[-1] ** -0.5  # [Hq, T]
        mixed: Tensor = (scores.softmax(dim=-1)[:, None] @ values)[:, 0]
        return mixed
