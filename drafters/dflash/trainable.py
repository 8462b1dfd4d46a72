"""Learning side of DFlash: blocks at random anchors, each drafted at once as a server would.

A block begins at a row with a loss, its anchor. It sees the context before the anchor alone: a row
that saw the anchor's own hidden state would know the next token. Half of the blocks have all
``block_size`` rows; the others end earlier, because a server drafts blocks of any length and a row
sees how many masks there are. The token k places after the anchor is compared with the target's
distribution at the row before it, weighted by ``exp(-(k - 1) / gamma)``.

Shapes: T positions, R rows with a loss, A blocks, B rows of a block, K = B - 1 draft positions,
H hidden, V vocabulary, Hq/Hkv query/key heads, G = Hq / Hkv, D head dimension.

Source: DFlash, arXiv:2602.06036, Section 4.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from configs.schema import TrainerSettings
from drafters.batch import TrainingBatch
from drafters.dflash.model import DFlash, DFlashConfig
from drafters.eagle3.chains import lay_out
from drafters.eagle3.model import rope_theta
from drafters.kept import acceptance_of_text, heat_of
from drafters.objectives import (
    Objective,
    dpace_weights,
    objective_loss,
    objective_of,
    shares,
)
from drafters.stored_module import StoredModule
from drafters.trainable import BatchLoss, ChainAcceptance
from specops.device import distill, label_figures
from specops.distill import RowFigures, Rows, Teacher
from targets.head import TargetHead
from targets.last_layer import LastLayer

if TYPE_CHECKING:
    from targets.causal import CausalWeights

BLOCK_SIZE = 16
"""Of new drafters."""
_MOST_LAYERS = 5
_NUM_TAPS = 5
_SHARE = 8
"""One in so many rows with a loss is an anchor in each update."""
_LEAST_ANCHORS = 64
_ANCHORS_AT_ONCE = 64
"""Anchors whose attention is computed at once: their scores are in memory together."""


@dataclass(frozen=True, slots=True)
class DFlashTrainable(StoredModule[DFlash]):
    """DFlash's ``drafters.trainable.Trainable``, which describes every method."""

    config_class: ClassVar = DFlashConfig
    module_class: ClassVar = DFlash
    kind: str = "dflash"

    def new_model(
        self,
        target_config: Any,
        lm_head_VH: Tensor,
        layer_ids: tuple[int, ...] | None,
        seed: int,
        draft_ids: Tensor | None = None,
        last_layer: LastLayer | None = None,
        causal: CausalWeights | None = None,
    ) -> DFlash:
        """Random weights: no layer of the target computes what these do."""
        if draft_ids is not None:
            raise ValueError(
                "DFlash drafts with the target's lm_head; take drafter.draft_vocab out"
            )
        model = DFlash(config_for_target(target_config, layer_ids))
        model.initialise(seed)
        return model

    def matrices(self, model: DFlash) -> list[Tensor]:
        """All products."""
        return [p for name, p in model.named_parameters() if not name.endswith("norm.weight")]

    def loss(
        self,
        model: DFlash,
        head: TargetHead,
        batch: TrainingBatch,
        settings: TrainerSettings,
        generator: torch.Generator | None,
    ) -> BatchLoss:
        """Distillation at the rows of random blocks. Reports the first ``trainer.ttt_steps``
        positions; 0 beyond the block."""
        num_draft = model.config.block_size - 1
        anchor_A = _anchors(batch, generator)
        length_A = _lengths(anchor_A, model.config.block_size, generator)
        hidden = block_hidden(model, head, batch, anchor_A, num_draft, length_A)
        step_K = torch.arange(num_draft, device=anchor_A.device)
        alive_AK = lay_out(batch, num_draft, 1.0, None).alive_KR.T[anchor_A]
        alive_AK = alive_AK & (step_K < length_A[:, None] - 1)
        row_AK = (anchor_A[:, None] + step_K).clamp_max(len(batch.row_R) - 1)
        objective, given = objective_of(settings), _given(head, batch, hidden, row_AK.flatten())
        place_AK = _place_weights(objective, given, alive_AK, model.config.block_size)
        weights = shares(objective, place_AK, batch.weight_R[row_AK])
        figures = objective_loss(objective, *given, weights.each(torch.flatten))
        shape = alive_AK.shape
        alpha_K = _mean(figures.figures.alpha_N.detach().view(shape), alive_AK, settings.ttt_steps)
        agree_K = _mean(figures.figures.agrees_N.view(shape), alive_AK, settings.ttt_steps)
        return BatchLoss(figures.loss, alpha_K, agree_K)

    @torch.no_grad()
    def acceptance(
        self,
        model: DFlash,
        head: TargetHead,
        batch: TrainingBatch,
        num_draft: int,
        *,
        block: bool = False,
    ) -> ChainAcceptance:
        """Of blocks of ``num_draft + 1`` rows, as a server drafts them, at every row."""
        num_rows, device = len(batch.row_R), batch.row_R.device
        own_R = torch.arange(num_rows, device=device)
        step_K = torch.arange(num_draft, device=device)
        alive_KR = lay_out(batch, num_draft, 1.0, None).alive_KR
        row_N = (own_R[:, None] + step_K).clamp_max(num_rows - 1).flatten()
        hidden = block_hidden(model, head, batch, own_R, num_draft, None)
        heat_R = heat_of(batch)
        cooled = (hidden / heat_R.repeat_interleave(num_draft)[:, None]).to(hidden.dtype)
        given = _given(head, batch, cooled, row_N, heat_R)
        found = distill(*given, torch.zeros(len(cooled), device=device), "lk").figures
        drafted = RowFigures(*(column.view(num_rows, num_draft).T for column in found))
        return acceptance_of_text(batch, head.lm_head, drafted, alive_KR, block=block)


def config_for_target(
    target_config: Any, layer_ids: tuple[int, ...] | None = None, block_size: int = BLOCK_SIZE
) -> DFlashConfig:
    """Config of a new drafter whose layers have the shape of the target's.

    Raises:
        ValueError: a layer id outside 0..N, or the target caps its logits.
    """
    text = target_config.get_text_config()
    num_layers = text.num_hidden_layers
    ids = default_layer_ids(num_layers) if layer_ids is None else layer_ids
    if not ids or any(not 0 <= k <= num_layers for k in ids):
        raise ValueError(f"drafter.layer_ids must be in 0..{num_layers}, got {ids}")
    if getattr(text, "final_logit_softcapping", None) is not None:
        raise ValueError("DFlash drafts with the target's lm_head, whose logits this target caps")
    count = min(_MOST_LAYERS, max(1, num_layers // 4))
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return DFlashConfig(
        hidden_size=text.hidden_size,
        target_vocab_size=text.vocab_size,
        intermediate_size=text.intermediate_size,
        num_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads,
        head_dim=head_dim,
        layer_ids=tuple(ids),
        block_size=block_size,
        mask_token_id=text.vocab_size - 1,
        windows=(None,) * count,
        causal=(False,) * count,
        rms_norm_eps=text.rms_norm_eps,
        rope_theta=rope_theta(text),
    )


def default_layer_ids(num_layers: int) -> tuple[int, ...]:
    """Five layers from the second to the third from the end, as in published checkpoints; fewer for
    shallow targets."""
    spread = (num_layers - 4) / (_NUM_TAPS - 1)
    wanted = (round(1 + i * spread) + 1 for i in range(_NUM_TAPS))
    return tuple(sorted({min(max(k, 1), num_layers) for k in wanted}))


def block_hidden(
    model: DFlash,
    head: TargetHead,
    batch: TrainingBatch,
    anchor_A: Tensor,
    num_draft: int,
    length_A: Tensor | None,
) -> Tensor:
    """The lm_head's input at the masks of blocks, [A * num_draft, H] in the dtype of the batch.

    Args:
        anchor_A: int64 index into R, ascending, of each block's first row.
        num_draft: masks of a block.
        length_A: rows of each block that others see; ``None``: all.
    """
    dtype, device = batch.features_TF.dtype, anchor_A.device
    place_A = batch.row_R[anchor_A]
    offset_B = torch.arange(num_draft + 1, device=device)
    mask = torch.full((1, num_draft), model.config.mask_token_id, device=device)
    ids_AB = torch.cat((batch.token_ids_T[place_A, None], mask.expand(len(place_A), -1)), dim=1)
    positions_AB = batch.positions_T[place_A, None] + offset_B
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        context = model.context(batch.features_TF, *model.rope(batch.positions_T))
        blocks = _Blocks(model.config, batch, place_A, offset_B, length_A, context)
        embeds = head.embed_VH[ids_AB].to(dtype)
        hidden = model(embeds, *model.rope(positions_AB), blocks.attend)
    flat: Tensor = hidden[:, 1:].flatten(0, 1).to(dtype)
    return flat


class _Blocks:
    """Attention of blocks to the context before their anchors and to themselves."""

    def __init__(
        self,
        config: DFlashConfig,
        batch: TrainingBatch,
        place_A: Tensor,
        offset_B: Tensor,
        length_A: Tensor | None,
        context: list[tuple[Tensor, Tensor]],
    ) -> None:
        """
        Args:
            place_A: index into T of each anchor, ascending where it counts.
            context: keys and values [T, Hkv, D] of each layer.
        """
        self._config, self._batch, self._context = config, batch, context
        self._place_A, self._offset_B, self._length_A = place_A, offset_B, length_A

    def attend(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [A, B, Hq, D], k and v [A, B, Hkv, D] -> shape of q."""
        with torch.autocast(q.device.type, enabled=False):
            parts = zip(
                *(torch.split(x, _ANCHORS_AT_ONCE) for x in (self._place_A, q, k, v)), strict=True
            )
            lengths = (
                [None] * -(-len(q) // _ANCHORS_AT_ONCE)
                if self._length_A is None
                else torch.split(self._length_A, _ANCHORS_AT_ONCE)
            )
            each = zip(parts, lengths, strict=True)
            return torch.cat([self._some(index, length, *part) for part, length in each])

    def _some(
        self, index: int, length_A: Tensor | None, place_A: Tensor, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        keys, values = self._context[index]
        seen = self._reach(place_A)
        sees_ABS = self._sees_context(index, place_A, seen)
        sees_ABC = self._sees_block(index, length_A, place_A)
        num_kv = k.shape[2]
        q = q.view(*q.shape[:2], num_kv, -1, q.shape[-1]) * q.shape[-1] ** -0.5  # A B Hkv G D
        before = torch.einsum("abhgd,shd->ahgbs", q, keys[seen].to(q.dtype))
        within = torch.einsum("abhgd,achd->ahgbc", q, k)
        scores = torch.cat(
            (
                before.masked_fill(~sees_ABS[:, None, None], float("-inf")),
                within.masked_fill(~sees_ABC[:, None, None], float("-inf")),
            ),
            dim=-1,
        )
        weights = scores.softmax(dim=-1)
        on_context, on_block = weights.tensor_split([before.shape[-1]], dim=-1)
        mixed = torch.einsum("ahgbs,shd->abhgd", on_context, values[seen].to(q.dtype))
        mixed = mixed + torch.einsum("ahgbc,achd->abhgd", on_block, v)
        return mixed.flatten(2, 3)

    def _reach(self, place_A: Tensor) -> slice:
        """Positions of the batch that some of these blocks may see: on a GPU all, because their
        places are not known to the host."""
        if place_A.is_cuda:
            return slice(0, len(self._batch.token_ids_T))
        first = max(int(place_A.min()) - self._batch.longest, 0)
        return slice(first, max(int(place_A.max()), first + 1))

    def _sees_context(self, index: int, place_A: Tensor, seen: slice) -> Tensor:
        """[A, B, S] bool: known, in the anchor's piece, before it and in the layer's window."""
        batch, window = self._batch, self._config.windows[index]
        key_S = torch.arange(len(batch.token_ids_T), device=place_A.device)[seen]
        sees = (batch.segment_T[seen] == batch.segment_T[place_A, None]) & batch.known_T[seen]
        sees = (sees & (key_S < place_A[:, None]))[:, None]
        if window is None:
            return sees.expand(-1, len(self._offset_B), -1)
        return sees & (key_S > (place_A[:, None] + self._offset_B)[..., None] - window)

    def _sees_block(self, index: int, length_A: Tensor | None, place_A: Tensor) -> Tensor:
        """[A, B, B] bool: rows of the same block that the block has; always itself, so that no
        softmax is empty."""
        offset = self._offset_B
        window = self._config.windows[index]
        sees = torch.ones(len(offset), len(offset), dtype=torch.bool, device=offset.device)
        if self._config.causal[index]:
            sees = offset <= offset[:, None]
        if window is not None:
            sees = sees & (offset > offset[:, None] - window)
        sees = sees.expand(len(place_A), -1, -1)
        if length_A is None:
            return sees
        has = offset < length_A[:, None]
        return (sees & has[:, None]) | torch.eye(len(offset), dtype=torch.bool, device=has.device)


def _anchors(batch: TrainingBatch, generator: torch.Generator | None) -> Tensor:
    """[A] int64 ascending: random rows with a loss; other rows only where there are too few."""
    num_rows = len(batch.row_R)
    count = min(num_rows, max(num_rows // _SHARE, _LEAST_ANCHORS))
    drawn = _uniform(num_rows, batch.row_R.device, generator)
    chosen: Tensor = (drawn + (~batch.is_row_R).float()).argsort()[:count]
    return chosen.sort().values


def _lengths(anchor_A: Tensor, block_size: int, generator: torch.Generator | None) -> Tensor:
    """[A] int64 rows of each block: ``block_size`` for half of them, else 2 or more."""
    drawn = _uniform(len(anchor_A), anchor_A.device, generator)
    return (2 + (2 * drawn * (block_size - 1)).long()).clamp_max(block_size)


def _uniform(count: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """[count] numbers in [0, 1). On a GPU they come from its own generator, which a captured update
    advances at every replay."""
    if device.type == "cuda":
        return torch.rand(count, device=device)
    return torch.rand(count, generator=generator)


def _gamma(block_size: int) -> float:
    """Decay of the weights: 7, 5 and 4 for blocks of 16, 10 and 8 rows."""
    return block_size / 2 if block_size < 10 else 5 + (block_size - 10) / 3


def _place_weights(
    objective: Objective, given: _Given, alive_AK: Tensor, block_size: int
) -> Tensor:
    """[A, K] weight of each position of each block, 0 where the block lacks it."""
    if objective.positions == "own":
        step_K = torch.arange(alive_AK.shape[1], device=alive_AK.device)
        return torch.exp(-step_K / _gamma(block_size)) * alive_AK
    if objective.positions == "equal":
        return alive_AK.float()
    probs_N = label_figures(given.hidden_NH, given.weight_VH, given.rows).label_prob_N
    return dpace_weights(probs_N.view(alive_AK.shape).T, alive_AK.T).T


class _Given(NamedTuple):
    """What a loss of rows is computed from."""

    hidden_NH: Tensor
    weight_VH: Tensor
    teacher: Teacher
    rows: Rows


def _given(
    head: TargetHead,
    batch: TrainingBatch,
    hidden: Tensor,
    row_N: Tensor,
    heat_R: Tensor | None = None,
) -> _Given:
    """Rows, and the target's at ``row_N`` of R that they are compared with."""
    last = batch.token_ids_T.numel() - 1  # where only padding is
    labels = batch.token_ids_T[(batch.row_R[row_N] + 1).clamp_max(last)]
    heat_N = None if heat_R is None else heat_R[row_N]
    teacher = Teacher(batch.last_hidden_RH[row_N], head.lm_head, None, heat_N)
    weight = head.lm_head.weight_VH.to(hidden.dtype)
    return _Given(hidden, weight, teacher, Rows(labels, batch.is_row_R[row_N]))


def _mean(values_AK: Tensor, alive_AK: Tensor, num_steps: int) -> Tensor:
    """[num_steps] mean over the blocks that have the position."""
    mean_K = (values_AK * alive_AK).sum(dim=0) / alive_AK.sum(dim=0).clamp_min(1)
    return torch.nn.functional.pad(mean_K, (0, max(num_steps - len(mean_K), 0)))[:num_steps]
