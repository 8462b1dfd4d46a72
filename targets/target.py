"""The target: Hugging Face modelling code over our paged KV pool, with tapped layers.

T packed rows of one pass, H hidden, V vocabulary, m tapped layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from specops.attention import DecodePass, PagedPass
from specops.device import decode_attention, prepare_pass
from targets.families import family_of
from targets.fused import FusedDecoder, supports
from targets.layers import columns_of
from targets.own_model import OwnCausalLM

ATTENTION_NAME = "slipstream_paged"


@dataclass(frozen=True, slots=True)
class TargetRows:
    """Results of one pass, one row per token."""

    features_TmH: Tensor
    """[T, m, H] residual stream after the tapped layers, in layer_ids order."""
    hidden_TH: Tensor
    """[T, H] the lm_head's input (after the final norm)."""


class KvPool:
    """Keys and values of every layer of one model: [num_slots, Hkv, D] each."""

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_slots, num_kv_heads, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]


def _attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    *,
    paged: PagedPass | DecodePass,
    pool: KvPool,
    **_: Any,
) -> tuple[Tensor, None]:
    """The function Hugging Face calls in every layer: q, k, v are [1, heads, T, D]."""
    layer = module.layer_idx
    out = decode_attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        pool.keys[layer],
        pool.values[layer],
        paged,
        scaling,
        sliding_window,
        softcap,
    )
    return out[None], None


def _attend_by_pages(model: Any) -> None:
    """Let a model of ``transformers`` run our attention. Our own modules run no other."""
    if isinstance(model, OwnCausalLM):
        return
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, _attention_forward)
    model.set_attn_implementation(ATTENTION_NAME)


def fuse_norms(model: nn.Module) -> None:
    """Compute each RMSNorm in one operation instead of six: a third of a step's launches.

    Only norms that the model's family lists are replaced; they compute ``weight * x / rms(x)``.
    """
    family = family_of(model)
    norms = () if family is None else family.norms
    for module in model.modules():
        if type(module) in norms and "forward" not in vars(module):
            module.forward = _FusedNorm(module)


def by_columns(model: nn.Module) -> None:
    """Lay out the weights of a target's or drafter's linear layers by columns, which is faster on a
    CPU with few rows.

    An embedding tied to the head keeps its own copy by rows.
    """
    tables = {m.weight.data_ptr() for m in model.modules() if isinstance(m, nn.Embedding)}
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.device.type == "cpu":
            by_column = columns_of(module.weight.detach())
            if module.weight.data_ptr() in tables:
                module.weight = nn.Parameter(by_column, requires_grad=False)
            else:
                module.weight.data = by_column


class _FusedNorm:
    """Replaces ``forward`` of a norm module; reads its weight at every call."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __call__(self, x: Tensor) -> Tensor:
        weight: Tensor = self._module.weight
        return nn.functional.rms_norm(x, weight.shape, weight, self._module.variance_epsilon)


class Target:
    """A causal LM that runs our attention. Stateless except for the KV pool passed to each call."""

    def __init__(self, model: Any, layer_ids: tuple[int, ...]) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        _attend_by_pages(self.model)
        fuse_norms(self.model)
        by_columns(self.model)
        self.config: Any = self.model.config.get_text_config()
        self.decoder: Any = self.model.get_decoder()
        self.lm_head: Any = self.model.get_output_embeddings()
        self.embed: Any = self.model.get_input_embeddings()
        self.softcap: float | None = getattr(self.config, "final_logit_softcapping", None)
        self.layer_ids = layer_ids
        self.device: torch.device = self.lm_head.weight.device
        self.dtype: torch.dtype = self.lm_head.weight.dtype
        self._fused: FusedDecoder | None = None
        self._taps: dict[int, Tensor] = {}
        for layer_id in layer_ids:
            self._tap(layer_id)

    def _tap(self, layer_id: int) -> None:
        """Keep the residual stream after ``layer_id`` decoder layers (0: the embeddings)."""
        if not 0 <= layer_id <= self.config.num_hidden_layers:
            raise ValueError(
                f"layer id must be in 0..{self.config.num_hidden_layers}, got {layer_id}"
            )

        def keep(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._taps[layer_id] = output[0] if isinstance(output, tuple) else output

        def keep_input(_module: nn.Module, args: tuple[Any, ...]) -> None:
            self._taps[layer_id] = args[0]

        if layer_id == 0:
            self.decoder.layers[0].register_forward_pre_hook(keep_input)
        else:
            self.decoder.layers[layer_id - 1].register_forward_hook(keep)

    def fuse(
        self, num_positions: int, pinned: bool = False, *, in_place: bool = False
    ) -> str | None:
        """Run passes with ``FusedDecoder`` from now on, if it supports this model.

        Args:
            num_positions: exclusive upper bound on the rows' positions.
            pinned: a row's hidden state and logits do not depend on the other rows; on a GPU only.
            in_place: swaps overwrite the weights where they lie, see ``FusedDecoder``.

        Returns:
            Why the model is not supported; ``None`` if it is.
        """
        reason = supports(self.model)
        if reason is not None:
            return reason
        try:
            self._fused = FusedDecoder(
                self.model, num_positions, pinned=pinned, in_place=in_place, packs=True
            )
        except ValueError as error:
            if not in_place:
                raise
            return str(error)
        return None

    @contextmanager
    def abridged(self) -> Iterator[None]:
        """Passes compute only layers that differ from each other in what they launch, as far as our
        decoder computes them, until the block ends. Their results mean nothing."""
        if self._fused is None:
            yield
            return
        with self._fused.abridged(self.layer_ids):
            yield

    def why_not_overwritten(self) -> str | None:
        """Why new values of the parameters would not be all that the next pass computes with;
        ``None``: they would."""
        unreached = 0 if self._fused is None else self._fused.num_unreached(self.model)
        return f"its layers hold {unreached} copies of weights" if unreached else None

    def follow(self) -> None:
        """The parameters were overwritten where they lie: passes compute with them from now on."""
        if self._fused is not None:
            self._fused.follow()

    @property
    def is_fused(self) -> bool:
        """Passes of fixed shape run our decoder, not the target's own code."""
        return self._fused is not None

    @property
    def vocab_size(self) -> int:
        """Rows of the lm_head, V."""
        return int(self.lm_head.weight.shape[0])

    @property
    def logits_dtype(self) -> torch.dtype:
        """float32, or float64 for a float64 target."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def make_pool(self, num_slots: int) -> KvPool:
        """KV pool of this model's shape, which is the same in every layer."""
        c = self.config
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        return KvPool(
            c.num_hidden_layers,
            num_slots,
            c.num_key_value_heads,
            head_dim,
            self.dtype,
            self.device,
        )

    def decode(
        self,
        ids_T: Tensor,
        positions_T: Tensor,
        slots_T: Tensor,
        at: DecodePass | PagedPass,
        pool: KvPool,
    ) -> TargetRows:
        """One pass over T packed rows, the same number for each request.

        On a GPU the launches depend on the shapes only, so it can be captured in a CUDA graph.

        Args:
            ids_T, positions_T: [T] int64.
            slots_T: [T] int64, where each row's key and value go.
            at: page tables and positions of the rows' requests, or what was prepared of them.
        """
        fused = self._fused
        paged = at
        if isinstance(at, DecodePass):
            heads_per_key = 0 if fused is None else fused.heads_per_key
            paged = prepare_pass(at, at.num_query(len(ids_T)), heads_per_key)
        if fused is None:
            return self._by_own_code(ids_T, positions_T, paged, pool)

        def attend(layer: int, q_THD: Tensor) -> Tensor:
            kept = pool.keys[layer], pool.values[layer]
            pinned, window = fused.is_pinned, fused.layers[layer].window
            return decode_attention(
                q_THD, None, None, *kept, paged, fused.scale, window, pinned=pinned
            )

        features, hidden = fused.forward(ids_T, positions_T, slots_T, attend, pool, self.layer_ids)
        shape = (len(ids_T), len(self.layer_ids), hidden.shape[1])
        return TargetRows(features.view(shape), hidden)

    def _by_own_code(
        self, ids_T: Tensor, positions_T: Tensor, paged: PagedPass | DecodePass, pool: KvPool
    ) -> TargetRows:
        """``decode`` with the model's Hugging Face code."""
        hidden = self.decoder(
            input_ids=ids_T[None],
            position_ids=positions_T[None],
            use_cache=False,
            paged=paged,
            pool=pool,
        ).last_hidden_state[0]
        taps = [self._taps[k].reshape(hidden.shape) for k in self.layer_ids]
        self._taps.clear()
        features = (
            torch.stack(taps, dim=1) if taps else hidden.new_empty(len(hidden), 0, hidden.shape[1])
        )
        return TargetRows(features, hidden)

    def logits(self, hidden: Tensor, *, widen: bool = True) -> Tensor:
        """[..., H] -> [..., V] float32 (float64 for a float64 target).

        Args:
            widen: if False, in the cheapest dtype that holds the same values.
        """
        if self._fused is not None:
            return self._fused.logits(hidden, widen=widen)
        scores: Tensor = self.lm_head(hidden)
        if widen or self.softcap is not None:
            scores = scores.to(self.logits_dtype)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        return scores
