"""Training-time test for EAGLE-3: the chains a server could have drafted, in one padded pass.

Step 0 computes every row with h from the target's features. A chain begins at an anchor a; its row
at step i is a + i, with the committed token x_{a+i} and its own output of step i - 1 as h. It
attends to the step-0 keys p' <= a and to its own keys of steps 1..i; RoPE is at a + i. Its output
predicts x_{a+i+1}, draft token i + 1. Every step of every chain therefore equals what serving
computes when it drafts from that anchor and the earlier draft tokens were kept.

``reference_chain_logits`` is the definition: it drafts one token after another as a server does.

Chains share only step 0, so any subset of anchors may be carried beyond it: the first draft token
is trained at every row, later ones, which weigh less, on a share of the chains.

Shapes: B sequences, S positions (padded), A anchors of a sequence, K steps, R rows that have a
loss (each is the first row of a chain), H hidden, m tapped layers, F = m * H, Vd draft vocabulary.

Rows are indexed as in ``drafters.eagle3.model``, chains are laid out in ``drafters.eagle3.chains``.

Source: Li et al. 2025, EAGLE-3, arXiv:2503.01840, Section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from drafters.eagle3.batch import TTTBatch, delayed
from drafters.eagle3.chains import Chains, Step, by_chain, chain_weights, has_step, lay_out
from drafters.eagle3.losses import FLOOR, head_losses
from drafters.eagle3.model import Eagle3
from drafters.trainable import BatchLoss
from specops.device import distill, label_figures
from specops.distill import FrozenHead, LossKind, RowFigures, Rows, Target, Teacher, target_of


@dataclass(frozen=True, slots=True)
class Objective:
    """Loss to minimise, and how its computation is split into blocks."""

    num_steps: int = 4
    """K, passes of training-time test."""
    loss: LossKind = "lk"
    """``lk``: LK hybrid; ``forward_kl``: KL(target || drafter). Both are weighted by D-PACE."""
    chain_share: float = 1.0
    """Share of the chains, redrawn for every batch, that is carried beyond the first draft token.
    0.5 takes 60 % of the time of 1."""
    floor: float = FLOOR
    """D-PACE's a; 1 gives every chain the same weights."""
    keep_logits: bool = True
    """Keep the target's probabilities and the gradient of every logit from forward to backward.
    Nothing is computed twice, but a row takes 4 bytes per token of the drafter's vocabulary, and
    the same again (half in bfloat16) in every step. ``False`` needs about 1 GiB for any vocabulary,
    and one more product with the lm_head to find the D-PACE weights first."""
    chunk_rows: int | None = None
    """Rows of logits computed at once. ``None``: 128 with ``keep_logits``; without, as many as fit
    into a CPU's cache or 1 GiB of GPU memory."""


_CACHED_ROWS = 128
"""128 rows of 4,096 float32 logits stay in a CPU's cache."""


def ttt_loss(
    model: Eagle3,
    embed: Tensor,
    head: FrozenHead,
    batch: TTTBatch,
    objective: Objective,
    generator: torch.Generator | None = None,
) -> BatchLoss:
    """Training loss of a batch.

    Args:
        embed: [V, H] the target's embedding table, scaled as the target scales it.
        head: the target's lm_head.
        generator: draws the chains if ``chain_share`` is below 1.
    """
    chains = lay_out(batch, objective.num_steps, objective.chain_share, generator)
    inputs = list(_head_inputs(model, embed, batch, chains))
    teacher = Teacher(batch.last_hidden_BSH.flatten(0, 1)[chains.flat_R], head, _target_ids(model))
    labels = _labels(model, batch, chains.flat_R)
    if not objective.keep_logits:
        return _distilled(model, chains, inputs, teacher, labels, objective)
    weight = model.lm_head.weight.to(batch.features_BSF.dtype)
    chunk_rows = objective.chunk_rows or _CACHED_ROWS
    target = _target_rows(teacher, chunk_rows)
    figures = [
        head_losses(hidden, weight, target, _compared(labels, step), objective.loss, chunk_rows)
        for hidden, step in zip(inputs, chains.steps, strict=True)
    ]
    return weigh(chains, figures, objective.floor)


def _distilled(
    model: Eagle3,
    chains: Chains,
    inputs: list[Tensor],
    teacher: Teacher,
    labels: Rows,
    objective: Objective,
) -> BatchLoss:
    """``weigh`` for all steps at once, with the weights computed first."""
    hidden = torch.cat(inputs)
    rows = _concatenated([_compared(labels, step) for step in chains.steps])
    lengths = [len(x) for x in inputs]
    weight = model.lm_head.weight
    probs = label_figures(hidden, weight, rows, objective.chunk_rows).label_prob_N
    weights_KR = chain_weights(chains, list(torch.split(probs, lengths)), objective.floor)
    weights_KR = weights_KR / weights_KR.sum().clamp_min(1e-9)
    weights = torch.cat([w[step.chain_N] for w, step in zip(weights_KR, chains.steps, strict=True)])
    found = distill(hidden, weight, teacher, rows, weights, objective.loss, objective.chunk_rows)
    columns = zip(*(torch.split(column, lengths) for column in found.figures), strict=True)
    alpha_K, agree_K = _means(chains, [RowFigures(*step) for step in columns])
    return BatchLoss(found.loss, alpha_K, agree_K, chains.flat_R.numel())


@torch.no_grad()
def chain_acceptance(
    model: Eagle3,
    embed: Tensor,
    head: FrozenHead,
    batch: TTTBatch,
    temperature_B: Tensor,
    num_steps: int,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Acceptance of each position of every chain that has ``num_steps`` rows with a loss.

    Args:
        temperature_B: above 0: acceptance is ``sum_x min(p, q)`` at this temperature. 0 is greedy:
            1 where the drafter's argmax is the committed token, else 0. The committed token is the
            argmax that the server took, so rounding of the captured rows has no influence.
        chunk_rows: see ``Objective``.

    Returns:
        alphas_NK: [N, K] float32.
        sequence_N: [N] int64, the sequence of each chain.
    """
    chains = lay_out(batch, num_steps, 1.0, None)
    sequence_R = chains.flat_R // batch.loss_BS.shape[1]
    temperature_R = temperature_B.to(sequence_R.device)[sequence_R]
    greedy_R = temperature_R == 0
    scale_R = torch.where(greedy_R, 1.0, temperature_R)
    inputs = list(_head_inputs(model, embed, batch, chains))
    rows = _concatenated([_compared(_labels(model, batch, chains.flat_R), s) for s in chains.steps])
    at_N = torch.cat([step.row_N for step in chains.steps])
    hidden = torch.cat(inputs)
    cooled = (hidden / scale_R[at_N, None]).to(hidden.dtype)
    seen = batch.last_hidden_BSH.flatten(0, 1)[chains.flat_R]
    teacher = Teacher(seen, head, _target_ids(model), scale_R)
    weights = torch.zeros_like(at_N, dtype=torch.float32)
    found = distill(cooled, model.lm_head.weight, teacher, rows, weights, "lk", chunk_rows).figures
    accepted = torch.where(greedy_R[at_N], found.agrees_N.float(), found.alpha_N.float())
    alphas = list(torch.split(accepted, [len(x) for x in inputs]))
    full_R = by_chain(chains, [torch.ones_like(a, dtype=torch.bool) for a in alphas]).all(dim=0)
    return by_chain(chains, alphas)[:, full_R].T, sequence_R[full_R]


def _target_ids(model: Eagle3) -> Tensor | None:
    """Target id of each draft id; ``None`` if both vocabularies are the same."""
    if model.d2t is None:
        return None
    return model.to_target_ids(torch.arange(model.config.draft_vocab_size, device=model.d2t.device))


def _labels(model: Eagle3, batch: TTTBatch, flat_R: Tensor) -> Rows:
    """Committed token after each row ``flat_R`` (index into B * S), as a draft id."""
    label_R = batch.token_ids_BS.flatten()[flat_R + 1]
    ids = _target_ids(model)
    if ids is not None:
        draft_id_V = torch.full((model.config.target_vocab_size,), -1, device=flat_R.device)
        draft_id_V[ids] = torch.arange(len(ids), device=flat_R.device)
        label_R = draft_id_V[label_R]
    return Rows(label_R.clamp_min(0), label_R >= 0)


def _compared(labels: Rows, step: Step) -> Rows:
    """Labels of one step, and the row of R that each output is compared with."""
    at = step.row_N
    return Rows(labels.label_ids_N[at], labels.label_known_N[at], at)


def _concatenated(parts: list[Rows]) -> Rows:
    teacher_rows = [rows.teacher_row_N for rows in parts if rows.teacher_row_N is not None]
    return Rows(
        torch.cat([rows.label_ids_N for rows in parts]),
        torch.cat([rows.label_known_N for rows in parts]),
        torch.cat(teacher_rows),
    )


@torch.no_grad()
def _target_rows(teacher: Teacher, chunk_rows: int) -> Target:
    """The teacher's distribution at all rows, computed ``chunk_rows`` rows at a time."""
    parts = [
        target_of(hidden @ teacher.head.weight_VH.T, teacher.ids_D, teacher.head.softcap, None)
        for hidden in torch.split(teacher.hidden_RH, chunk_rows)
    ]
    return Target(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def ttt_outputs(
    model: Eagle3, embed: Tensor, batch: TTTBatch, anchor_BA: Tensor, num_steps: int
) -> Iterator[Tensor]:
    """Yield outputs g of step 0 at every row [B, S, H], then of steps 1, 2, ... [B, A, H].

    Rows without features, and chains past the end of their sequence, hold arbitrary finite values.
    """
    mixed = partial(
        torch.autocast,
        batch.features_BSF.device.type,
        dtype=torch.bfloat16,
        enabled=batch.features_BSF.dtype == torch.bfloat16,
    )
    last = batch.token_ids_BS.shape[1] - 1
    attend = _ChainAttention(delayed(batch.known_BS), anchor_BA)
    with mixed():
        hidden = delayed(model.fuse(batch.features_BSF))
        embeds = embed[batch.token_ids_BS].to(hidden.dtype)
        hidden = model(embeds, hidden, *model.rope(batch.positions_BS), attend)
    yield hidden
    hidden = _pick(hidden, anchor_BA)
    for step in range(1, num_steps):
        at = (anchor_BA + step).clamp_max(last)
        with mixed():
            embeds = embed[batch.token_ids_BS.gather(1, at)].to(hidden.dtype)
            positions = batch.positions_BS.gather(1, anchor_BA) + step
            hidden = model(embeds, hidden, *model.rope(positions), attend)
        yield hidden


class _ChainAttention:
    """Attention of one pass: call it for step 0, then for each later step in order."""

    def __init__(self, has_row_BS: Tensor, anchor_BA: Tensor) -> None:
        self.has_row_BS = has_row_BS
        self.anchor_BA = anchor_BA
        self.trunk: tuple[Tensor, Tensor] | None = None
        """Keys and values of step 0, [B, Hkv, S, D]."""
        self.own: list[tuple[Tensor, Tensor]] = []
        """Keys and values of each later step, [B, Hkv, 1, A, D]."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, S or A, Hq, D], k and v [B, S or A, Hkv, D] -> shape of q."""
        if self.trunk is None:
            self.trunk = (k.transpose(1, 2), v.transpose(1, 2))
            anchor = torch.arange(k.shape[1], device=k.device).expand(k.shape[:2])
        else:
            self.own.append((k.transpose(1, 2)[:, :, None], v.transpose(1, 2)[:, :, None]))
            anchor = self.anchor_BA
        return self._attend(q, *self.trunk, anchor)

    def _attend(self, q: Tensor, trunk_k: Tensor, trunk_v: Tensor, anchor: Tensor) -> Tensor:
        B, A, Hq, D = q.shape
        Hkv, S = trunk_k.shape[1:3]
        G = Hq // Hkv
        grouped = (q * D**-0.5).view(B, A, Hkv, G, D).permute(0, 2, 3, 1, 4)  # B Hkv G A D
        scores = (grouped.flatten(2, 3) @ trunk_k.transpose(-1, -2)).view(B, Hkv, G, A, S)
        scores = scores + self._causal_bias(anchor, scores.dtype)
        own = [(grouped * k).sum(-1, keepdim=True) for k, _ in self.own]
        weights = torch.cat((scores, *own), dim=-1).softmax(dim=-1).to(trunk_v.dtype)
        mixed = (weights[..., :S].flatten(2, 3) @ trunk_v).view(B, Hkv, G, A, D)
        for j, (_, v) in enumerate(self.own):
            mixed = mixed + weights[..., S + j, None] * v
        merged: Tensor = mixed.permute(0, 3, 1, 2, 4).reshape(B, A, Hq, D)
        return merged

    def _causal_bias(self, anchor: Tensor, dtype: torch.dtype) -> Tensor:
        """Additive mask [B, 1, 1, A, S]: 0 where anchor sees a step-0 key.

        An anchor sees the existing rows up to itself, and always itself, so that no softmax is
        empty.
        """
        key = torch.arange(self.has_row_BS.shape[1], device=anchor.device)
        behind = (key <= anchor[..., None]) & self.has_row_BS[:, None]
        seen = behind | (key == anchor[..., None])
        bias = torch.zeros(seen.shape, dtype=dtype, device=anchor.device)
        return bias.masked_fill(~seen, torch.finfo(dtype).min / 2)[:, None, None]


def weigh(chains: Chains, figures: list[RowFigures], floor: float) -> BatchLoss:
    """Mean loss over all steps and chains, weighted by ``chain_weights``."""
    weights_KR = chain_weights(chains, [r.label_prob_N for r in figures], floor)
    loss_KR = by_chain(chains, [r.loss_N for r in figures])
    alpha_K, agree_K = _means(chains, figures)
    return BatchLoss(
        (weights_KR * loss_KR).sum() / weights_KR.sum().clamp_min(1e-9),
        alpha_K,
        agree_K,
        chains.flat_R.numel(),
    )


def _means(chains: Chains, figures: list[RowFigures]) -> tuple[Tensor, Tensor]:
    """Mean overlap [K] and mean agreement [K] of each position."""
    num_K = has_step(chains).sum(dim=1).clamp_min(1)
    alpha_K = by_chain(chains, [r.alpha_N.detach() for r in figures]).sum(dim=1) / num_K
    return alpha_K, by_chain(chains, [r.agrees_N for r in figures]).sum(dim=1) / num_K


def _head_inputs(model: Eagle3, embed: Tensor, batch: TTTBatch, chains: Chains) -> Iterator[Tensor]:
    """Yield the lm_head's inputs [N, H] of each step."""
    outputs = ttt_outputs(model, embed, batch, chains.anchor_BA, len(chains.steps))
    for step, output in zip(chains.steps, outputs, strict=True):
        normed: Tensor = model.norm(output.flatten(0, 1)[step.output_N])
        yield normed.to(batch.features_BSF.dtype)


def _pick(x: Tensor, anchor_BA: Tensor) -> Tensor:
    """Rows of x [B, S, H] at the anchors, [B, A, H]."""
    return x.gather(1, anchor_BA[..., None].expand(-1, -1, x.shape[2]))


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
    """Reference: draft logits [K, Vd] of the chain at ``anchor``, over a growing KV cache.

    Rows up to the anchor enter with fused features, as a server ingests committed rows. Then each
    output is fed back with the next committed token, as if it had been drafted and accepted.
    ``token_ids_S[0]`` is at position 0.

    Raises:
        ValueError: the anchor's row has no feature (row p needs the one at p - 1).
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
    """Attention of one row at a time over all earlier keys and its own."""

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
