"""A causal LM as drafter: its module, and its rows in pages that share the target's slot numbers.

Row p comes from token p alone, so rows begin at position 0 and no layer of the target is read. Its
output is the input of the lm_head, which predicts token p + 1. The model's layers are computed by
the families of ``targets``, or by Hugging Face's code where no family covers them.

Its vocabulary may be larger or smaller than the target's, as padding often differs: a token that
only one of them has is never proposed, and one that only the target has is read as token 0.

Shapes: T rows, R requests, H hidden size of the drafter, V vocabulary of the target, Vd of both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from drafters.protocol import DrafterContext, DrafterKind, Traits, Weights
from drafters.stored_module import check_shape, first_weights
from specops.attention import DecodePass
from specops.device import places_of, prepare_pass, prepare_steps
from specops.draft_sampling import vocab_map
from targets.causal import make_causal
from targets.target import Target

TRAITS = Traits(
    on_device=True, learns=True, needs_match=False, draws=True, prior_draft_cost=0.25
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class DraftModelConfig:
    """Shapes and meaning of a draft model's tensors."""

    target_vocab_size: int
    target_hidden_size: int
    layer_ids: tuple[int, ...]
    """Layers of the target that traces keep, for other drafters to learn from: it reads none."""
    causal: dict[str, Any]
    """Hugging Face config of the drafter, as ``targets.causal.config_json`` gives it."""

    @property
    def draft_vocab_size(self) -> int:
        """Tokens it can propose: those that both vocabularies have, Vd."""
        return min(self.target_vocab_size, int(self.causal["vocab_size"]))

    def own_ids(self, ids: Tensor) -> Tensor:
        """Token ids of the target (any shape, int64) as the drafter reads them."""
        if self.draft_vocab_size == self.target_vocab_size:
            return ids
        return torch.where(ids < self.draft_vocab_size, ids, 0)

    def to_json(self) -> dict[str, Any]:
        """Config as JSON: a dictionary with lists for tuples."""
        return {**asdict(self), "layer_ids": list(self.layer_ids)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> DraftModelConfig:
        """Inverse of ``to_json``. Raises ValueError if a key is missing or unknown."""
        try:
            found = cls(**{**value, "layer_ids": tuple(value["layer_ids"])})
            int(found.causal["vocab_size"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not the config of a draft model: {error}") from error
        return found


class DraftModel(nn.Module):
    """A causal LM and the config of its bundle; its tensors are named ``lm.`` and Hugging Face's
    names."""

    def __init__(self, config: DraftModelConfig, lm: Any) -> None:
        super().__init__()
        self.config = config
        self.lm = lm


def make_module(
    config: DraftModelConfig,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> DraftModel:
    """The module of a bundle's config and tensors, which are copied."""
    own = {name.removeprefix("lm."): tensor for name, tensor in tensors.items()}
    return DraftModel(config, make_causal(config.causal, own, dtype, device))


class PagedDraftModel:
    """One draft model, its KV pool and its version. A ``NeuralDrafter``."""

    kind = "draft_model"
    traits = TRAITS
    first_row = 0

    def __init__(self, module: DraftModel, num_slots: int) -> None:
        """
        Args:
            module: weights in serving dtype and device; edited in place by swaps.
            num_slots: slots of the target's KV pool; the drafter's pool uses the same numbers.
        """
        c = module.config
        self.module = module
        self.model = Target(module.lm, ())
        self.pool = self.model.make_pool(num_slots)
        self.version = 0
        self.layer_ids = c.layer_ids
        self.output_size = int(self.model.config.hidden_size)
        self._width = c.draft_vocab_size
        same = self._width == c.target_vocab_size
        shift = torch.zeros(self._width, dtype=torch.int64, device=self.model.device)
        self.vocab = None if same else vocab_map(shift, c.target_vocab_size)

    def fuse(self, num_positions: int) -> str | None:
        """See ``NeuralDrafter.fuse``: weights that swaps overwrite must not be copied, which a CPU
        does to lay them out by columns."""
        return self.model.fuse(num_positions, in_place=True)

    @property
    def is_fused(self) -> bool:
        """Whether passes run our decoder instead of Hugging Face's code."""
        return self.model.is_fused

    def observe(self, ids_T: Tensor, features_TmH: Tensor, at: DecodePass) -> Tensor:
        """See ``NeuralDrafter.observe``; the target's hidden states are not read."""
        num_query = at.num_query(len(ids_T))
        rows, paged = places_of(at, num_query), prepare_pass(at, num_query)
        ids_T = self.module.config.own_ids(ids_T).contiguous()
        return self.model.decode(
            ids_T, rows.positions.flatten(), rows.slots.flatten(), paged, self.pool
        ).hidden_TH

    def propose(
        self,
        outputs_RH: Tensor,
        at: DecodePass,
        num_draft: int,
        choose: Callable[[Tensor, int], Tensor],
    ) -> Tensor:
        """See ``NeuralDrafter.propose``."""
        tokens = [choose(self._logits(outputs_RH), 0)]
        if num_draft == 1:
            return tokens[0][:, None]
        steps = places_of(at, num_draft - 1, by_step=True)
        passes = prepare_steps(at, steps.first, num_draft - 1)
        each = zip(steps.positions, steps.slots, passes, strict=True)
        for ahead, (positions_R, slots_R, here) in enumerate(each, start=1):
            hidden = self.model.decode(tokens[-1], positions_R, slots_R, here, self.pool).hidden_TH
            tokens.append(choose(self._logits(hidden), ahead))
        return torch.stack(tokens, dim=1)

    def _logits(self, hidden_RH: Tensor) -> Tensor:
        """[R, Vd] over the tokens that both models have."""
        scores = self.model.logits(hidden_RH, widen=False)
        return scores if scores.shape[1] == self._width else scores[:, : self._width].contiguous()


def layer_ids(weights: Weights | None) -> tuple[int, ...]:
    """Layers of the target that traces keep."""
    return () if weights is None else DraftModelConfig.from_json(weights.config).layer_ids


def build(context: DrafterContext) -> PagedDraftModel:
    """The drafter that the engine begins with.

    Raises:
        ValueError: it was made for a target of another shape.
    """
    weights = first_weights(context)
    config = DraftModelConfig.from_json(weights.config)
    check_shape(context, config.target_hidden_size, config.target_vocab_size)
    module = make_module(config, weights.tensors, context.dtype, context.device)
    drafter = PagedDraftModel(module, context.num_slots)
    drafter.version = weights.version
    return drafter


KIND = DrafterKind(TRAITS, build, layer_ids)
