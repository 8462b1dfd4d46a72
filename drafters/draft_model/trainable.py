"""Learning side of a draft model: every row imitates the target's distribution at its position.

A row depends on tokens alone, so the row at p is the same in every chain that passes it, and its
acceptance is that of the draft token after p in each of them. One pass over the texts of a batch
therefore trains all positions of all chains. A row is weighted by what improving it would gain in
each chain that contains it: the D-PACE weights of ``drafters.eagle3.chains``, summed over chains.

Shapes: T positions, R rows with a loss (each the first row of a chain), K steps, H hidden size of
the drafter, V vocabulary of the target, Vd of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from configs.schema import TrainerSettings
from drafters.batch import TrainingBatch
from drafters.draft_model.paged import DraftModel, DraftModelConfig, make_module
from drafters.eagle3.chains import Chains, chain_weights, lay_out
from drafters.kept import acceptance_of_text, heat_of
from drafters.objectives import FLOOR, Positions, objective_loss, objective_of, shares
from drafters.stored_module import StoredModule, check_tensors
from drafters.trainable import BatchLoss, ChainAcceptance, TargetShape
from specops.device import distill, label_figures
from specops.distill import RowFigures, Rows, Teacher
from targets.causal import (
    PACKED,
    CausalWeights,
    config_json,
    empty_causal,
    packed_hidden,
    packed_mask,
)
from targets.head import TargetHead
from targets.last_layer import LastLayer

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class DraftModelTrainable(StoredModule[DraftModel]):
    """A draft model's ``drafters.trainable.Trainable``, which describes every method."""

    config_class: ClassVar = DraftModelConfig
    kind: str = "draft_model"

    def new_model(
        self,
        target_config: Any,
        lm_head_VH: Tensor,
        layer_ids: tuple[int, ...] | None,
        seed: int,
        draft_ids: Tensor | None = None,
        last_layer: LastLayer | None = None,
        causal: CausalWeights | None = None,
    ) -> DraftModel:
        """``causal``; without one, random weights of the target's shape with a quarter of its
        layers, and its lm_head."""
        if draft_ids is not None:
            raise ValueError(
                "a draft model proposes from its own vocabulary; take drafter.draft_vocab out"
            )
        text = target_config.get_text_config()
        ids = layer_ids or ()
        if any(not 0 <= k <= text.num_hidden_layers for k in ids):
            raise ValueError(f"drafter.layer_ids must be in 0..{text.num_hidden_layers}, got {ids}")
        begins = causal or _random(target_config, lm_head_VH, seed)
        _check_head(begins.config)
        vocab_size, hidden_size = lm_head_VH.shape
        config = DraftModelConfig(vocab_size, hidden_size, tuple(ids), begins.config)
        return _for_training(config, begins.tensors)

    def load_model(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> DraftModel:
        """Reads bundles of any floating dtype."""
        self.check(config, tensors)
        return _for_training(DraftModelConfig.from_json(config), tensors)

    def check(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """See ``check_tensors``."""
        found = DraftModelConfig.from_json(config)
        check_tensors(lambda: DraftModel(found, empty_causal(found.causal)), tensors)

    def target_shape(self, config: Mapping[str, Any]) -> TargetShape:
        """Vocabulary and hidden size of the target, and the layers that traces keep."""
        found = DraftModelConfig.from_json(config)
        return TargetShape(found.target_vocab_size, found.target_hidden_size, found.layer_ids)

    def matrices(self, model: DraftModel) -> list[Tensor]:
        """All products but the lm_head."""
        head = model.lm.get_output_embeddings()
        linears = (m for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
        return [linear.weight for linear in linears]

    def loss(
        self,
        model: DraftModel,
        head: TargetHead,
        batch: TrainingBatch,
        settings: TrainerSettings,
        generator: torch.Generator | None,
    ) -> BatchLoss:
        """Distillation at every row with a loss; ``trainer.ttt_steps`` draft positions are weighted
        and reported."""
        chains = lay_out(batch, settings.ttt_steps, 1.0, None)
        hidden, rows = row_hidden(model, batch), _labels(model, batch)
        weight, teacher = _head_weight(model), _teacher(model, head, batch)
        probs_R = label_figures(hidden, weight, rows).label_prob_N
        objective = objective_of(settings)
        places_R = _row_weights(chains, probs_R, objective.positions)
        weights = shares(objective, places_R, batch.weight_R)
        found = objective_loss(objective, hidden, weight, teacher, rows, weights)
        return BatchLoss(found.loss, *_means(chains, found.figures))

    @torch.no_grad()
    def acceptance(
        self,
        model: DraftModel,
        head: TargetHead,
        batch: TrainingBatch,
        num_draft: int,
        *,
        block: bool = False,
    ) -> ChainAcceptance:
        """Acceptance of the row k further on, for each position k of a chain."""
        chains, heat_R = lay_out(batch, num_draft, 1.0, None), heat_of(batch)
        hidden = row_hidden(model, batch)
        cooled = (hidden / heat_R[:, None]).to(hidden.dtype)
        found = distill(
            cooled,
            _head_weight(model),
            _teacher(model, head, batch, heat_R),
            _labels(model, batch),
            torch.zeros(len(hidden), device=hidden.device),
            "lk",
        ).figures
        drafted = RowFigures(*(_ahead(column, num_draft) for column in found))
        return acceptance_of_text(batch, head.lm_head, drafted, chains.alive_KR, block=block)


def row_hidden(model: DraftModel, batch: TrainingBatch) -> Tensor:
    """The lm_head's input at every row with a loss, [R, H], in the dtype of the batch.

    A piece that does not begin at position 0 is read as if its text did: what is before it is not
    seen.
    """
    dtype = batch.last_hidden_RH.dtype
    with torch.autocast(
        batch.token_ids_T.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16
    ):
        mask = packed_mask(batch.segment_T)
        ids_T = model.config.own_ids(batch.token_ids_T)
        hidden = packed_hidden(model.lm, ids_T, batch.positions_T, mask)
    return hidden[batch.row_R].to(dtype)


def _for_training(config: DraftModelConfig, tensors: Mapping[str, Tensor]) -> DraftModel:
    model = make_module(config, tensors, torch.float32, _CPU)
    model.lm.set_attn_implementation(PACKED)
    return model


def _random(target_config: Any, lm_head_VH: Tensor, seed: int) -> CausalWeights:
    """Random weights (normal, std 0.02; norms as they are made), a function of the arguments."""
    text = target_config.get_text_config()
    config = config_json(text, max(1, text.num_hidden_layers // 4))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, like in empty_causal(config).state_dict().items():
        if name == "lm_head.weight":
            tensors[name] = lm_head_VH
        elif like.dim() == 1 and name.endswith("weight"):
            # Gemma's norms multiply by 1 + weight.
            tensors[name] = torch.full(like.shape, 0.0 if "gemma" in text.model_type else 1.0)
        else:
            tensors[name] = torch.randn(like.shape, generator=generator) * 0.02
    return CausalWeights(config, tensors)


def _check_head(config: Mapping[str, Any]) -> None:
    if config.get("final_logit_softcapping") is not None:
        raise ValueError("a draft model whose logits are capped cannot be trained; choose another")


def _head_weight(model: DraftModel) -> Tensor:
    """[Vd, H] rows of the lm_head of the tokens that both models have."""
    weight: Tensor = model.lm.get_output_embeddings().weight
    return weight[: model.config.draft_vocab_size]


def _teacher(
    model: DraftModel, head: TargetHead, batch: TrainingBatch, heat_R: Tensor | None = None
) -> Teacher:
    c = model.config
    same = c.draft_vocab_size == c.target_vocab_size
    ids = None if same else torch.arange(c.draft_vocab_size, device=batch.row_R.device)
    return Teacher(batch.last_hidden_RH, head.lm_head, ids, heat_R)


def _labels(model: DraftModel, batch: TrainingBatch) -> Rows:
    """Committed token after each row."""
    last = batch.token_ids_T.numel() - 1  # where only padding is
    label_R = batch.token_ids_T[(batch.row_R + 1).clamp_max(last)]
    is_known = label_R < model.config.draft_vocab_size
    return Rows(torch.where(is_known, label_R, 0), is_known & batch.is_row_R)


def _ahead(values_R: Tensor, num_steps: int) -> Tensor:
    """[K, R] the value of the row k further on; any value where the rows end."""
    own_R = torch.arange(len(values_R), device=values_R.device)
    steps = range(num_steps)
    return torch.stack([values_R[(own_R + k).clamp_max(len(values_R) - 1)] for k in steps])


def _row_weights(chains: Chains, probs_R: Tensor, positions: Positions) -> Tensor:
    """[R] weight of each row, D-PACE's or equal ones, summed over the chains that contain it."""
    num_steps, num_rows = chains.alive_KR.shape
    weights_KR = chain_weights(chains, list(_ahead(probs_R, num_steps)), FLOOR, positions)
    total_R = torch.zeros_like(weights_KR[0])
    own_R = torch.arange(num_rows, device=total_R.device)
    for step, weights_R in enumerate(weights_KR):  # 0 where a chain lacks the step
        total_R = total_R.index_add(0, (own_R + step).clamp_max(num_rows - 1), weights_R)
    return total_R


def _means(chains: Chains, figures: RowFigures) -> tuple[Tensor, Tensor]:
    """Mean overlap [K] and mean agreement [K] of each position."""
    num_steps = len(chains.alive_KR)
    num_K = chains.alive_KR.sum(dim=1).clamp_min(1)
    alpha_KR = _ahead(figures.alpha_N.detach(), num_steps) * chains.alive_KR
    agree_KR = _ahead(figures.agrees_N, num_steps) & chains.alive_KR
    return alpha_KR.sum(dim=1) / num_K, agree_KR.sum(dim=1) / num_K
