"""Training-time test for EAGLE-3: the chains the server could have drafted, in one padded pass.

Step 0 takes every row with h from the target's features. A chain begins at an anchor a; its row at
step i is a + i, with the committed token x_{a+i} and, as h, its own output of step i - 1. It
attends to the step-0 keys p' <= a and to its own keys of steps 1..i; RoPE is at a + i. Its output
predicts x_{a+i+1}, draft token i + 1. So every step of every chain equals what serving computes
when it drafts from that anchor and the earlier draft tokens were kept.

``reference_chain_logits`` is the definition, drafted one token after another as a server does.

Chains share nothing but step 0, so any subset of anchors may be carried beyond it: the first draft
token is trained at every row, the deeper ones, whose weight is smaller, on a share of the chains.

Shapes: B sequences, S positions (padded), A anchors of a sequence, K steps, R rows that have a
loss (each is the first row of a chain), H hidden, m tapped layers, F = m * H, Vd draft vocabulary.

Source: Li et al. 2025, EAGLE-3, arXiv:2503.01840, Section 3.2; rows as in ``eagle3``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from drafters.eagle3.losses import FLOOR, dpace_weights, head_losses
from drafters.eagle3.model import Eagle3
from specops.device import distill, label_figures
from specops.distill import FrozenHead, LossKind, RowFigures, Rows, Target, Teacher, target_of


@dataclass(frozen=True, slots=True)
class TTTBatch:
    """Pieces of traces, padded to one length. What is not ``known`` may hold anything finite."""

    token_ids_BS: Tensor
    """int64."""
    positions_BS: Tensor
    """int64, position in the request; consecutive along S."""
    features_BSF: Tensor
    """Tapped layers in ``layer_ids`` order. bfloat16 runs the layer under autocast."""
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
    chain_share: float = 1.0
    """Share of the chains, drawn anew each time, that is carried beyond the first draft token.
    One half takes six tenths of the time of 1."""
    floor: float = FLOOR
    """a of D-PACE; 1 gives every chain the same weights."""
    keep_logits: bool = True
    """Keep the gradient of every logit, and the target's probabilities, from forward to backward:
    nothing is computed twice, but a row takes 4 bytes for each token of the drafter's vocabulary,
    and as many again (half in bfloat16) in every step. ``False``: about 1 GiB whatever the
    vocabulary, for one more product with the lm_head, which finds the weights of D-PACE first."""
    chunk_rows: int | None = None
    """Rows of logits formed at once; ``None``: 128 on a CPU, where 128 x 4,096 floats stay in its
    cache, or what fits 1 GiB on a GPU."""


_CACHED_ROWS = 128


class TTTLoss(NamedTuple):
    """One batch judged. Only ``loss`` has a gradient."""

    loss: Tensor
    """Scalar: mean over all chain positions, weighted by D-PACE."""
    alpha_K: Tensor
    """Mean overlap of each draft position; 0 where no chain has it."""
    agree_K: Tensor
    """Share of positions where the drafter's argmax is the committed token."""
    num_rows: int
    """R."""


class Step(NamedTuple):
    """Where the N outputs of one step that have a loss come from and belong to; int64 each."""

    output_N: Tensor
    """Index into the step's outputs, flattened."""
    row_N: Tensor
    """The row of R they predict for."""
    chain_N: Tensor
    """The row of R their chain began at."""


class Chains(NamedTuple):
    """Which chains are run, and how far."""

    flat_R: Tensor
    """Index into B * S of every row that begins a chain."""
    place_BA: Tensor
    """int64 index along S of the anchors carried beyond step 0, padded with any."""
    carried_R: Tensor
    """bool: the chain is among them."""
    steps: tuple[Step, ...]
    """[K]"""


def ttt_loss(
    model: Eagle3,
    embed: Tensor,
    head: FrozenHead,
    batch: TTTBatch,
    objective: Objective,
    generator: torch.Generator | None = None,
) -> TTTLoss:
    """Loss of the chains in a batch.

    Args:
        embed: [V, H] the target's embedding table, scaled as the target scales it.
        head: the target's.
        generator: draws the chains when ``chain_share`` is below 1.
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
    judged = [
        head_losses(hidden, weight, target, _compared(labels, step), objective.loss, chunk_rows)
        for hidden, step in zip(inputs, chains.steps, strict=True)
    ]
    return weigh(chains, judged, objective.floor)


def _distilled(
    model: Eagle3,
    chains: Chains,
    inputs: list[Tensor],
    teacher: Teacher,
    labels: Rows,
    objective: Objective,
) -> TTTLoss:
    """``weigh`` of all steps at once, with the weights found first."""
    hidden = torch.cat(inputs)
    rows = _together([_compared(labels, step) for step in chains.steps])
    lengths = [len(x) for x in inputs]
    weight = model.lm_head.weight
    probs = label_figures(hidden, weight, rows, objective.chunk_rows).label_prob_N
    weights_KR = chain_weights(chains, list(torch.split(probs, lengths)), objective.floor)
    weights_KR = weights_KR / weights_KR.sum().clamp_min(1e-9)
    weights = torch.cat([w[step.chain_N] for w, step in zip(weights_KR, chains.steps, strict=True)])
    found = distill(hidden, weight, teacher, rows, weights, objective.loss, objective.chunk_rows)
    columns = zip(*(torch.split(column, lengths) for column in found.figures), strict=True)
    alpha_K, agree_K = _means(chains, [RowFigures(*step) for step in columns])
    return TTTLoss(found.loss, alpha_K, agree_K, chains.flat_R.numel())


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
        temperature_B: 0 is greedy: 1 where the drafter's argmax is the committed token, else 0.
            Else ``sum_x min(p, q)`` at that temperature. The greedy figure uses the committed
            token, which is the argmax the server really took, whatever the rows' rounding.
        chunk_rows: as in ``Objective``.

    Returns:
        [N, K] float32, and [N] int64, the sequence each chain belongs to.
    """
    chains = lay_out(batch, num_steps, 1.0, None)
    sequence_R = chains.flat_R // batch.loss_BS.shape[1]
    temperature_R = temperature_B.to(sequence_R.device)[sequence_R]
    greedy_R = temperature_R == 0
    scale_R = torch.where(greedy_R, 1.0, temperature_R)
    inputs = list(_head_inputs(model, embed, batch, chains))
    rows = _together([_compared(_labels(model, batch, chains.flat_R), s) for s in chains.steps])
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
    """Target id of each draft id; ``None``: the vocabularies are one."""
    if model.d2t is None:
        return None
    return model.to_target_ids(torch.arange(model.config.draft_vocab_size, device=model.d2t.device))


def _labels(model: Eagle3, batch: TTTBatch, flat_R: Tensor) -> Rows:
    """The committed token after every row ``flat_R`` (index into B * S)."""
    label_R = batch.token_ids_BS.flatten()[flat_R + 1]
    ids = _target_ids(model)
    if ids is not None:
        draft_id_V = torch.full((model.config.target_vocab_size,), -1, device=flat_R.device)
        draft_id_V[ids] = torch.arange(len(ids), device=flat_R.device)
        label_R = draft_id_V[label_R]
    return Rows(label_R.clamp_min(0), label_R >= 0)


def _compared(labels: Rows, step: Step) -> Rows:
    """The labels of one step, and which row of R each output is compared with."""
    at = step.row_N
    return Rows(labels.label_ids_N[at], labels.label_known_N[at], at)


def _together(parts: list[Rows]) -> Rows:
    places = [rows.teacher_row_N for rows in parts if rows.teacher_row_N is not None]
    return Rows(
        torch.cat([rows.label_ids_N for rows in parts]),
        torch.cat([rows.label_known_N for rows in parts]),
        torch.cat(places),
    )


@torch.no_grad()
def _target_rows(teacher: Teacher, chunk_rows: int) -> Target:
    """All of the teacher's distribution at once."""
    parts = [
        target_of(hidden @ teacher.head.weight_VH.T, teacher.ids_D, teacher.head.softcap, None)
        for hidden in torch.split(teacher.hidden_RH, chunk_rows)
    ]
    return Target(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def ttt_outputs(
    model: Eagle3, embed: Tensor, batch: TTTBatch, place_BA: Tensor, num_steps: int
) -> Iterator[Tensor]:
    """Outputs g of step 0 at every row [B, S, H], then of step 1, 2, ... of each chain [B, A, H].

    Rows without features hold garbage, but finite; so do chains past the end of their sequence.
    """
    mixed = partial(
        torch.autocast,
        batch.features_BSF.device.type,
        dtype=torch.bfloat16,
        enabled=batch.features_BSF.dtype == torch.bfloat16,
    )
    last = batch.token_ids_BS.shape[1] - 1
    attend = _ChainAttention(_delayed(batch.known_BS), place_BA)
    with mixed():
        hidden = _delayed(model.fuse(batch.features_BSF))
        embeds = embed[batch.token_ids_BS].to(hidden.dtype)
        hidden = model(embeds, hidden, *model.rope(batch.positions_BS), attend)
    yield hidden
    hidden = _pick(hidden, place_BA)
    for step in range(1, num_steps):
        place = (place_BA + step).clamp_max(last)
        with mixed():
            embeds = embed[batch.token_ids_BS.gather(1, place)].to(hidden.dtype)
            positions = batch.positions_BS.gather(1, place_BA) + step
            hidden = model(embeds, hidden, *model.rope(positions), attend)
        yield hidden


class _ChainAttention:
    """The attention of one pass; called for step 0, then for each later step in order."""

    def __init__(self, has_row_BS: Tensor, place_BA: Tensor) -> None:
        self.has_row_BS = has_row_BS
        self.place_BA = place_BA
        self.trunk: tuple[Tensor, Tensor] | None = None
        """Keys and values of step 0, [B, Hkv, S, D]."""
        self.own: list[tuple[Tensor, Tensor]] = []
        """Keys and values of each later step, [B, Hkv, 1, A, D]."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, S or A, Hq, D], k and v [B, S or A, Hkv, D] -> as q."""
        if self.trunk is None:
            self.trunk = (k.transpose(1, 2), v.transpose(1, 2))
            place = torch.arange(k.shape[1], device=k.device).expand(k.shape[:2])
        else:
            self.own.append((k.transpose(1, 2)[:, :, None], v.transpose(1, 2)[:, :, None]))
            place = self.place_BA
        return self._attend(q, *self.trunk, place)

    def _attend(self, q: Tensor, trunk_k: Tensor, trunk_v: Tensor, place: Tensor) -> Tensor:
        B, A, Hq, D = q.shape
        Hkv, S = trunk_k.shape[1:3]
        G = Hq // Hkv
        grouped = (q * D**-0.5).view(B, A, Hkv, G, D).permute(0, 2, 3, 1, 4)  # B Hkv G A D
        scores = (grouped.flatten(2, 3) @ trunk_k.transpose(-1, -2)).view(B, Hkv, G, A, S)
        scores = scores + self._hidden_from(place, scores.dtype)
        own = [(grouped * k).sum(-1, keepdim=True) for k, _ in self.own]
        weights = torch.cat((scores, *own), dim=-1).softmax(dim=-1).to(trunk_v.dtype)
        mixed = (weights[..., :S].flatten(2, 3) @ trunk_v).view(B, Hkv, G, A, D)
        for j, (_, v) in enumerate(self.own):
            mixed = mixed + weights[..., S + j, None] * v
        merged: Tensor = mixed.permute(0, 3, 1, 2, 4).reshape(B, A, Hq, D)
        return merged

    def _hidden_from(self, place: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, 1, 1, A, S] 0 where anchor ``place`` sees a step-0 key, very negative elsewhere.

        Seen are rows that exist, up to the anchor, and always the anchor itself, so that no softmax
        is empty.
        """
        key = torch.arange(self.has_row_BS.shape[1], device=place.device)
        behind = (key <= place[..., None]) & self.has_row_BS[:, None]
        seen = behind | (key == place[..., None])
        bias = torch.zeros(seen.shape, dtype=dtype, device=place.device)
        return bias.masked_fill(~seen, torch.finfo(dtype).min / 2)[:, None, None]


def lay_out(
    batch: TTTBatch, num_steps: int, share: float, generator: torch.Generator | None
) -> Chains:
    """Choose the chains of a batch and follow each until its first row without a loss."""
    S = batch.loss_BS.shape[1]
    begins_BS = batch.loss_BS & _delayed(batch.known_BS)
    flat_R = begins_BS.flatten().nonzero()[:, 0]
    row_of = torch.zeros_like(begins_BS, dtype=torch.int64).flatten()
    row_of[flat_R] = torch.arange(flat_R.numel(), device=flat_R.device)
    place_BA, alive_BA = _draw(begins_BS, share, generator)
    start_BA = torch.arange(begins_BS.shape[0], device=flat_R.device)[:, None] * S
    chain_BA = row_of[start_BA + place_BA]
    carried_R = torch.zeros_like(flat_R, dtype=torch.bool)
    carried_R[chain_BA[alive_BA]] = True
    steps = [Step(flat_R, row_of[flat_R], row_of[flat_R])]
    for step in range(1, num_steps):
        within_BA = (place_BA + step).clamp_max(S - 1)  # the last row never has a loss
        alive_BA = alive_BA & begins_BS.gather(1, within_BA)
        output_N = alive_BA.flatten().nonzero()[:, 0]
        row_N, chain_N = row_of[(start_BA + within_BA)[alive_BA]], chain_BA[alive_BA]
        steps.append(Step(output_N, row_N, chain_N))
    return Chains(flat_R, place_BA, carried_R, tuple(steps))


def by_chain(chains: Chains, values: list[Tensor]) -> Tensor:
    """[N] figures of every step -> [K, R] by chain; 0 where a chain does not have the step."""
    zeros = values[0].new_zeros(chains.flat_R.numel())
    rows = zip(chains.steps, values, strict=True)
    return torch.stack([zeros.index_copy(0, step.chain_N, figures) for step, figures in rows])


def _draw(
    begins_BS: Tensor, share: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Each beginning with probability ``share`` -> its index along S, and which are no padding."""
    if share < 1:
        luck_BS = torch.rand(begins_BS.shape, generator=generator).to(begins_BS.device)
        begins_BS = begins_BS & (luck_BS < share)
    num_anchors = int(begins_BS.sum(dim=1).max()) if begins_BS.numel() else 0
    place_BA = (~begins_BS).byte().argsort(dim=1, stable=True)[:, :num_anchors]
    return place_BA, begins_BS.gather(1, place_BA)


def weigh(chains: Chains, judged: list[RowFigures], floor: float) -> TTTLoss:
    """Losses of all steps -> one number: their mean, weighted by ``chain_weights``."""
    weights_KR = chain_weights(chains, [r.label_prob_N for r in judged], floor)
    loss_KR = by_chain(chains, [r.loss_N for r in judged])
    alpha_K, agree_K = _means(chains, judged)
    return TTTLoss(
        (weights_KR * loss_KR).sum() / weights_KR.sum().clamp_min(1e-9),
        alpha_K,
        agree_K,
        chains.flat_R.numel(),
    )


def chain_weights(chains: Chains, label_probs: list[Tensor], floor: float) -> Tensor:
    """D-PACE weight [K, R] of every position of every chain; 0 where it does not have the step.

    A chain that was not carried beyond step 0 is taken to survive there as the others do on
    average, and those count for it as well, so the expected loss is that of all chains.

    Args:
        label_probs: of each step [N], the drafter's probability of the committed token.
    """
    prob_KR = by_chain(chains, label_probs)
    valid_KR = _valid(chains)
    carried_R = chains.carried_R
    num_carried = carried_R.sum().clamp_min(1)
    mean_K1 = (prob_KR * carried_R).sum(dim=1, keepdim=True) / num_carried
    known_KR = carried_R | (torch.arange(len(label_probs), device=carried_R.device) == 0)[:, None]
    survival_KR = torch.where(known_KR, prob_KR, mean_K1)
    weights_KR = dpace_weights(survival_KR, valid_KR | ~known_KR, floor) * valid_KR
    weights_KR[1:] *= carried_R.numel() / num_carried
    return weights_KR


def _means(chains: Chains, judged: list[RowFigures]) -> tuple[Tensor, Tensor]:
    """Mean overlap and mean agreement of each position."""
    num_K = _valid(chains).sum(dim=1).clamp_min(1)
    alpha_K = by_chain(chains, [r.alpha_N.detach() for r in judged]).sum(dim=1) / num_K
    return alpha_K, by_chain(chains, [r.agrees_N for r in judged]).sum(dim=1) / num_K


def _valid(chains: Chains) -> Tensor:
    """[K, R] bool: the chain has the step."""
    every = [torch.ones_like(step.chain_N, dtype=torch.bool) for step in chains.steps]
    return by_chain(chains, every)


def _head_inputs(model: Eagle3, embed: Tensor, batch: TTTBatch, chains: Chains) -> Iterator[Tensor]:
    """lm_head inputs [N, H] of every step."""
    outputs = ttt_outputs(model, embed, batch, chains.place_BA, len(chains.steps))
    for step, output in zip(chains.steps, outputs, strict=True):
        normed: Tensor = model.norm(output.flatten(0, 1)[step.output_N])
        yield normed.to(batch.features_BSF.dtype)


def _delayed(x: Tensor) -> Tensor:
    """x [B, S, ...] with row p holding what was at p - 1; zero at the start."""
    return torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)


def _pick(x: Tensor, place_BA: Tensor) -> Tensor:
    """x [B, S, H] -> [B, A, H]."""
    return x.gather(1, place_BA[..., None].expand(-1, -1, x.shape[2]))


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
