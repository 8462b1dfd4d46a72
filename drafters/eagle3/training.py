"""Training-time test for EAGLE-3: the chains a server could have drafted, in one pass.

Step 0 computes every row with h from the target's features. A chain begins at an anchor a; its row
at step i is a + i, with the committed token x_{a+i} and its own output of step i - 1 as h. It
attends to the step-0 keys p' <= a and to its own keys of steps 1..i; RoPE is at a + i. Its output
predicts x_{a+i+1}, draft token i + 1. Every step of every chain therefore equals what serving
computes when it drafts from that anchor and the earlier draft tokens were kept.

``reference_chain_logits`` is the definition: it drafts one token after another as a server does.

Chains share only step 0, so any subset of anchors may be carried beyond it: the first draft token
is trained at every row, later ones, which weigh less, on a share of the chains.

Nothing here reads a value of a tensor on the host, and shapes depend on those of the batch alone,
so that an update can be captured in a CUDA graph.

Shapes: T positions of the batch, R rows that have a loss (each is the first row of a chain), A
chains carried beyond step 0, K steps, N rows of all steps, H hidden, m tapped layers, F = m * H, Vd
draft vocabulary.

Rows are indexed as in ``drafters.eagle3.model``, chains are laid out in ``drafters.eagle3.chains``,
attention is in ``drafters.eagle3.chain_attention``.

Source: Li et al. 2025, EAGLE-3, arXiv:2503.01840, Section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from drafters.batch import TrainingBatch, follows_T
from drafters.eagle3.chain_attention import ChainAttention
from drafters.eagle3.chains import Chains, by_chain, by_step, chain_weights, lay_out
from drafters.eagle3.losses import head_losses
from drafters.eagle3.model import Attend, Eagle3
from drafters.eagle3.orders import blocked_order, full_order_of
from drafters.eagle3.reward import reward_loss, verified
from drafters.kept import acceptance_of_text, heat_of
from drafters.objectives import (
    FLOOR,
    LK,
    Objective,
    Positions,
    objective_loss,
    shares,
)
from drafters.trainable import BatchLoss, ChainAcceptance
from specops.device import distill, label_figures
from specops.distill import (
    MIN_WEIGHT,
    Distilled,
    FrozenHead,
    LossKind,
    RowFigures,
    Rows,
    Target,
    Teacher,
    chains_at_once,
    target_of,
)


@dataclass(frozen=True, slots=True)
class ChainPlan:
    """Loss to minimise, and how its computation is split into blocks."""

    num_steps: int = 4
    """K, passes of training-time test."""
    objective: Objective = LK
    """Loss of the rows, and weights of the positions."""
    chain_share: float = 1.0
    """Share of the chains, redrawn for every batch, that is carried beyond the first draft token.
    0.5 takes 60 % of the time of 1."""
    floor: float = FLOOR
    """D-PACE's a; 1 gives every chain the same weights."""
    keep_logits: bool = True
    """Keep the target's probabilities and the gradient of every logit from forward to backward.
    Nothing is computed twice, but a row takes 4 bytes per token of the drafter's vocabulary, and
    the same again (half in bfloat16) in every step. ``False`` needs about 1 GiB for any vocabulary
    and computes nothing twice either, unless ``chain_share`` is below 1 or the objective adds a
    loss at rejected rows: then one more product with the lm_head finds the weights first."""
    reward_weight: float = 0.0
    """Weight of the policy-gradient term, see ``drafters.eagle3.reward``; 0: there is none."""
    chunk_rows: int | None = None
    """Rows of logits computed at once. ``None``: 128 with ``keep_logits``; without, as many as fit
    into a CPU's cache or 1 GiB of GPU memory."""


class ChainModel(Protocol):
    """A module of one layer that drafts token by token, as ``drafters.eagle3.model.Eagle3``, which
    describes its methods."""

    @property
    def config(self) -> ChainShape: ...
    @property
    def d2t(self) -> Tensor | None: ...
    def fuse(self, features: Tensor) -> Tensor: ...
    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]: ...
    def __call__(
        self, embeds: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend
    ) -> Tensor: ...
    def head_input(self, outputs: Tensor) -> Tensor: ...
    def head_weight(self, target_VH: Tensor) -> Tensor:
        """[Vd, H] weight of the lm_head that it drafts with: its own, or the target's."""

    def to_target_ids(self, draft_ids: Tensor) -> Tensor: ...


class ChainShape(Protocol):
    """What the loss asks of its config."""

    @property
    def target_vocab_size(self) -> int: ...
    @property
    def draft_vocab_size(self) -> int: ...


Outputs = Callable[[Any, Tensor, TrainingBatch, Tensor, int], Iterator[Tensor]]
"""How a kind computes its rows: see ``ttt_outputs``."""
_CACHED_ROWS = 128
"""128 rows of 4,096 float32 logits stay in a CPU's cache."""


def ttt_outputs(
    model: ChainModel, embed: Tensor, batch: TrainingBatch, anchor_A: Tensor, num_steps: int
) -> Iterator[Tensor]:
    """Yield outputs g of step 0 at every position [T, H], then of steps 1, 2, ... [A, H].

    Rows without features, and chains past the end of their piece, hold arbitrary finite values.

    Args:
        anchor_A: int64 index into T, no two of them equal.
    """
    mixed = partial(
        torch.autocast,
        batch.features_TF.device.type,
        dtype=torch.bfloat16,
        enabled=batch.features_TF.dtype == torch.bfloat16,
    )
    last = batch.token_ids_T.numel() - 1
    attend = ChainAttention(batch.segment_T, follows_T(batch), anchor_A, batch.longest)
    with mixed():
        hidden = model.fuse(batch.features_TF)
        hidden = torch.cat((torch.zeros_like(hidden[:1]), hidden[:-1]))
        embeds = embed[batch.token_ids_T].to(hidden.dtype)
        hidden = model(embeds, hidden, *model.rope(batch.positions_T), attend)
    yield hidden
    hidden = hidden[anchor_A]
    for step in range(1, num_steps):
        at = (anchor_A + step).clamp_max(last)
        with mixed():
            embeds = embed[batch.token_ids_T[at]].to(hidden.dtype)
            positions = batch.positions_T[anchor_A] + step
            hidden = model(embeds, hidden, *model.rope(positions), attend)
        yield hidden


def ttt_loss(
    model: ChainModel,
    embed: Tensor,
    head: FrozenHead,
    batch: TrainingBatch,
    plan: ChainPlan,
    generator: torch.Generator | None = None,
    outputs: Outputs = ttt_outputs,
) -> BatchLoss:
    """Training loss of a batch.

    Args:
        embed: [V, H] the target's embedding table, scaled as the target scales it.
        head: the target's lm_head.
        generator: draws the chains if ``chain_share`` is below 1.
    """
    chains = lay_out(batch, plan.num_steps, plan.chain_share, generator)
    inputs = list(_head_inputs(model, embed, batch, chains, outputs))
    teacher = Teacher(batch.last_hidden_RH, head, _target_ids(model))
    labels = _labels(model, batch)
    compared = [_compared(labels, chains, step) for step in range(len(inputs))]
    reward = None
    if plan.reward_weight:
        found = verified(batch, chains, labels, _rejected(model, batch))
        reward = reward_loss(inputs, model.head_weight(head.weight_VH), batch, found)
        reward = reward * plan.reward_weight
    if not plan.keep_logits:
        distilled = _distilled(model, batch, chains, inputs, teacher, compared, plan)
        return _with_reward(distilled, reward)
    weight = model.head_weight(head.weight_VH).to(batch.features_TF.dtype)
    chunk_rows = plan.chunk_rows or _CACHED_ROWS
    target = _target_rows(teacher, chunk_rows)

    def judged(kind: LossKind) -> list[RowFigures]:
        return [
            head_losses(hidden, weight, target, rows, kind, chunk_rows)
            for hidden, rows in zip(inputs, compared, strict=True)
        ]

    objective, figures = plan.objective, judged(plan.objective.loss)
    more = None if objective.rejected is None else judged(objective.rejected)
    weighed = weigh(chains, figures, plan.floor, batch.weight_R, objective.positions, more)
    return _with_reward(weighed, reward)


def _with_reward(computed: BatchLoss, reward: Tensor | None) -> BatchLoss:
    return computed if reward is None else computed._replace(loss=computed.loss + reward)


def _distilled(
    model: ChainModel,
    batch: TrainingBatch,
    chains: Chains,
    inputs: list[Tensor],
    teacher: Teacher,
    compared: list[Rows],
    plan: ChainPlan,
) -> BatchLoss:
    """``weigh`` for all steps at once, without keeping logits."""
    hidden = torch.cat(inputs)
    rows = _concatenated(compared)
    lengths = [len(x) for x in inputs]
    weight = model.head_weight(teacher.head.weight_VH)
    given = hidden, weight, teacher, rows
    if chains.carried_A is None and plan.objective.rejected is None:
        found = _weighed_by_block(batch, chains, *given, plan)
    else:
        found = _weighed_before(batch, chains, lengths, *given, plan)
    columns = zip(*(torch.split(column, lengths) for column in found.figures), strict=True)
    alpha_K, agree_K = _means(chains, [RowFigures(*step) for step in columns])
    return BatchLoss(found.loss, alpha_K, agree_K)


def _weighed_by_block(
    batch: TrainingBatch,
    chains: Chains,
    hidden: Tensor,
    weight: Tensor,
    teacher: Teacher,
    rows: Rows,
    plan: ChainPlan,
) -> Distilled:
    """Blocks of whole chains: the weights of a chain depend on its own probabilities alone, so they
    are known once the logits of its block are, and these are computed once."""
    num_steps, num_chains = chains.alive_KR.shape
    sizes = len(weight), len(teacher.head.weight_VH)
    at_once = chains_at_once(hidden, *sizes, num_steps, plan.chunk_rows)
    order, within = blocked_order(num_chains, num_steps, at_once, hidden.device)
    ahead_KR = _ahead(chains, batch.weight_R)

    def weigh_block(prob_N: Tensor, number: int) -> Tensor:
        own = slice(number * at_once, (number + 1) * at_once)
        places = within[number]
        prob_KC = torch.empty_like(prob_N).index_copy_(0, places, prob_N).view(num_steps, -1)
        part = Chains(None, chains.alive_KR[:, own], chains.carried_R[own])
        positions = plan.objective.positions
        weights_KC = chain_weights(part, list(prob_KC.unbind()), plan.floor, positions)
        weights: Tensor = (weights_KC * ahead_KR[:, own]).flatten()[places]
        return weights

    kind = plan.objective.loss
    return distill(hidden, weight, teacher, rows, weigh_block, kind, plan.chunk_rows, order)


def _weighed_before(
    batch: TrainingBatch,
    chains: Chains,
    lengths: list[int],
    hidden: Tensor,
    weight: Tensor,
    teacher: Teacher,
    rows: Rows,
    plan: ChainPlan,
) -> Distilled:
    """The weights of all rows first, by one more product with the lm_head: what chains that are not
    carried are assumed to be depends on all others."""
    probs = label_figures(hidden, weight, rows, plan.chunk_rows).label_prob_N
    objective, by_number = plan.objective, list(torch.split(probs, lengths))
    places_KR = chain_weights(chains, by_number, plan.floor, objective.positions)
    weights_KR = shares(objective, places_KR, _ahead(chains, batch.weight_R))
    weights = weights_KR.each(lambda values_KR: torch.cat(by_step(chains, values_KR)))
    order = full_order_of(chains, lengths[0])
    given = hidden, weight, teacher, rows
    return objective_loss(objective, *given, weights, plan.chunk_rows, order)


@torch.no_grad()
def chain_acceptance(
    model: ChainModel,
    embed: Tensor,
    head: FrozenHead,
    batch: TrainingBatch,
    num_steps: int,
    chunk_rows: int | None = None,
    outputs: Outputs = ttt_outputs,
    *,
    block: bool = False,
) -> ChainAcceptance:
    """Acceptance of each position of every chain; see ``drafters.kept``.

    For greedy requests it is 1 where the drafter's argmax is the committed token, else 0. The
    committed token is the argmax that the server took, so rounding of the captured rows has no
    influence.

    Args:
        chunk_rows: see ``ChainPlan``.
        block: see ``acceptance_of_text``.
    """
    chains, heat_R = lay_out(batch, num_steps, 1.0, None), heat_of(batch)
    inputs = list(_head_inputs(model, embed, batch, chains, outputs))
    labels = _labels(model, batch)
    rows = _concatenated([_compared(labels, chains, step) for step in range(num_steps)])
    hidden = torch.cat(inputs)
    cooled = (hidden / heat_R.repeat(num_steps)[:, None]).to(hidden.dtype)
    teacher = Teacher(batch.last_hidden_RH, head, _target_ids(model), heat_R)
    weights = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
    order = full_order_of(chains, len(inputs[0]))
    weight = model.head_weight(head.weight_VH)
    found = distill(cooled, weight, teacher, rows, weights, "lk", chunk_rows, order).figures
    drafted = RowFigures(*(column.view(num_steps, -1) for column in found))
    return acceptance_of_text(batch, head, drafted, chains.alive_KR, block=block)


def _target_ids(model: ChainModel) -> Tensor | None:
    """Target id of each draft id; ``None`` if both vocabularies are the same."""
    if model.d2t is None:
        return None
    return model.to_target_ids(torch.arange(model.config.draft_vocab_size, device=model.d2t.device))


def _labels(model: ChainModel, batch: TrainingBatch) -> Rows:
    """Committed token after each row, as a draft id."""
    last = batch.token_ids_T.numel() - 1  # where only padding is
    return _as_draft_ids(model, batch, batch.token_ids_T[(batch.row_R + 1).clamp_max(last)])


def _rejected(model: ChainModel, batch: TrainingBatch) -> Rows:
    """Token that was rejected behind each row, as a draft id."""
    assert batch.outcome_R3 is not None
    return _as_draft_ids(model, batch, batch.outcome_R3[:, 1].long().clamp_min(0))


def _as_draft_ids(model: ChainModel, batch: TrainingBatch, token_R: Tensor) -> Rows:
    ids = _target_ids(model)
    if ids is not None:
        draft_id_V = torch.full((model.config.target_vocab_size,), -1, device=token_R.device)
        draft_id_V[ids] = torch.arange(len(ids), device=token_R.device)
        token_R = draft_id_V[token_R]
    return Rows(token_R.clamp_min(0), (token_R >= 0) & batch.is_row_R)


def _teacher_rows(chains: Chains, step: int) -> Tensor:
    """Row of R that each output of a step predicts for; any row where the chain has ended."""
    num_rows, device = chains.alive_KR.shape[1], chains.alive_KR.device
    begins = chains.carried_A
    if begins is None or step == 0:
        begins = torch.arange(num_rows, device=device)
    return (begins + step).clamp_max(num_rows - 1)


def _compared(labels: Rows, chains: Chains, step: int) -> Rows:
    """Labels of one step, and the row of R that each output is compared with."""
    at = _teacher_rows(chains, step)
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


def weigh(
    chains: Chains,
    figures: list[RowFigures],
    floor: float,
    weight_R: Tensor | None = None,
    positions: Positions = "own",
    rejected: list[RowFigures] | None = None,
) -> BatchLoss:
    """Mean loss over all steps and chains, weighted by ``chain_weights``.

    Args:
        weight_R: further weight of each row that is predicted for; ``None``: 1.
        rejected: the loss that an objective adds at rejected rows. Then what their weight exceeds
            1 by is the weight of this loss.
    """
    weights_KR = chain_weights(chains, [r.label_prob_N for r in figures], floor, positions)
    loss_KR = by_chain(chains, [r.loss_N for r in figures])
    alpha_K, agree_K = _means(chains, figures)
    if rejected is None:
        weights_KR = weights_KR if weight_R is None else weights_KR * _ahead(chains, weight_R)
        total = (weights_KR * loss_KR).sum()
    else:
        assert weight_R is not None, "rows have weights where rejected ones have a loss"
        more_KR = by_chain(chains, [r.loss_N for r in rejected])
        total = (weights_KR * (loss_KR + (_ahead(chains, weight_R) - 1) * more_KR)).sum()
    return BatchLoss(total / weights_KR.sum().clamp_min(MIN_WEIGHT), alpha_K, agree_K)


def _ahead(chains: Chains, weight_R: Tensor) -> Tensor:
    """[K, R] weight of the row that each position of each chain predicts for."""
    num_steps, num_rows = chains.alive_KR.shape
    own_R = torch.arange(num_rows, device=weight_R.device)
    rows = [(own_R + step).clamp_max(num_rows - 1) for step in range(num_steps)]
    return torch.stack([weight_R[at] for at in rows])


def _means(chains: Chains, figures: list[RowFigures]) -> tuple[Tensor, Tensor]:
    """Mean overlap [K] and mean agreement [K] of each position."""
    num_K = (chains.alive_KR & chains.carried_R).sum(dim=1).clamp_min(1)
    num_K[:1] = chains.alive_KR[0].sum().clamp_min(1)
    alpha_K = by_chain(chains, [r.alpha_N.detach() for r in figures]).sum(dim=1) / num_K
    return alpha_K, by_chain(chains, [r.agrees_N for r in figures]).sum(dim=1) / num_K


def _head_inputs(
    model: ChainModel, embed: Tensor, batch: TrainingBatch, chains: Chains, compute: Outputs
) -> Iterator[Tensor]:
    """Yield the lm_head's inputs [R, H] of step 0, then [A, H] of each later step."""
    anchor_A = batch.row_R if chains.carried_A is None else batch.row_R[chains.carried_A]
    outputs = compute(model, embed, batch, anchor_A, len(chains.alive_KR))
    for step, output in enumerate(outputs):
        normed = model.head_input(output[batch.row_R] if step == 0 else output)
        yield normed.to(batch.features_TF.dtype)


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
