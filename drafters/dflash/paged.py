"""DFlash: drafts a whole block of tokens in one pass. The module, and its rows in the pages.

The tapped layers of the target at each position become the context: ``fc`` joins them, and every
layer of the drafter projects the result to keys and values. A draft is one pass over the anchor's
token and masks behind it; these rows see the context before the anchor and each other. The row at
offset k predicts the token k places after the anchor, through the target's own embedding and
lm_head.

Context position j is kept in slot j + 1: there it is the row of token j + 1, which is computed from
the target's hidden states at j, as ``drafters.protocol`` has it. The rows of a draft follow the
anchor's in the same way, and are overwritten. Parameters are named as in published checkpoints
(``DFlashDraftModel``).

Shapes: T rows, R requests, K draft tokens, B = K + 1 rows of a block, H hidden, m tapped layers,
Hq/Hkv query/key heads, D head dimension.

Source: DFlash, arXiv:2602.06036, Section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from drafters.protocol import DrafterContext, DrafterKind, Traits, Weights
from drafters.rotary import RotaryAngles, rotate
from drafters.stored_module import check_shape, first_weights, for_serving
from specops.attention import DecodePass, PagedPass
from specops.device import decode_attention, places_of, prepare_pass
from targets.target import KvPool

TRAITS = Traits(
    is_neural=True, learns=True, needs_match=False, draws=True, prior_draft_cost=0.05
)  # fmt: skip

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [..., Hq, D], k and v [..., Hkv, D] of the block) -> [..., Hq, D]."""


@dataclass(frozen=True, slots=True)
class DFlashConfig:
    """Shapes and meaning of a drafter's tensors."""

    hidden_size: int
    target_vocab_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layer_ids: tuple[int, ...]
    """Tapped layers: residual stream after k decoder layers of the target."""
    block_size: int
    """Rows of the blocks it is trained on, the anchor's included: it drafts one token fewer."""
    mask_token_id: int
    """Token that stands where a token is to be drafted."""
    windows: tuple[int | None, ...]
    """One for each layer: rows see the context of so many last positions; ``None``: all of it."""
    causal: tuple[bool, ...]
    """One for each layer: rows of a block see only those before them."""
    rms_norm_eps: float
    rope_theta: float

    def to_json(self) -> dict[str, Any]:
        """Config as JSON: a dictionary with lists for tuples."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> DFlashConfig:
        """Inverse of ``to_json``. Raises ValueError if a key is missing, unknown or of the wrong
        length."""
        try:
            lists = {name: tuple(value[name]) for name in ("layer_ids", "windows", "causal")}
            found = cls(**{**value, **lists})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a DFlash config: {error}") from error
        if not found.windows or len(found.windows) != len(found.causal):
            raise ValueError(
                "not a DFlash config: windows and causal need one entry for each layer"
            )
        return found


class _Attention(nn.Module):
    def __init__(self, c: DFlashConfig) -> None:
        super().__init__()
        self.q_proj = nn.Linear(c.hidden_size, c.num_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps)
        self.k_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps)


class _Mlp(nn.Module):
    def __init__(self, c: DFlashConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)


class _Layer(nn.Module):
    def __init__(self, c: DFlashConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(c)
        self.mlp = _Mlp(c)
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)


class DFlash(nn.Module):
    """DFlash's tensors. Embedding and lm_head are the target's, frozen and not part of a bundle."""

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        self.fc = nn.Linear(len(c.layer_ids) * c.hidden_size, c.hidden_size, bias=False)
        self.hidden_norm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.layers = nn.ModuleList(_Layer(c) for _ in c.windows)
        self.norm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self._angles = RotaryAngles(c.head_dim, c.rope_theta)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw random weights (normal, std 1 / sqrt(width of the input); norms 1)."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                values = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(values * parameter.shape[1] ** -0.5)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """See ``RotaryAngles.at``."""
        return self._angles.at(positions)

    def context(self, features: Tensor, cos: Tensor, sin: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [..., Hkv, D] that every layer keeps of some positions.

        Args:
            features: [..., m * H] tapped rows in ``layer_ids`` order.
            cos, sin: see ``rope``, at these positions.
        """
        hidden = self.hidden_norm(self.fc(features))
        attentions: list[Any] = [layer.self_attn for layer in self.layers]
        return [self._keys_and_values(attention, hidden, cos, sin) for attention in attentions]

    def forward(self, embeds: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """The lm_head's input at the rows of blocks.

        Args:
            embeds: [..., H] the target's embedding of the anchor's token or of the mask.
            cos, sin: see ``rope``, at the rows' positions.
            attend: attention to the context and to the rows of the same block.
        """
        stream = embeds
        layers: Any = self.layers
        for index, layer in enumerate(layers):
            attention, mlp = layer.self_attn, layer.mlp
            normed = layer.input_layernorm(stream)
            k, v = self._keys_and_values(attention, normed, cos, sin)
            q = attention.q_norm(self._heads(attention.q_proj(normed)))
            q = rotate(q, cos.to(q.dtype), sin.to(q.dtype))
            stream = stream + attention.o_proj(attend(index, q, k, v).flatten(-2))
            normed = layer.post_attention_layernorm(stream)
            gated = nn.functional.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed)
            stream = stream + mlp.down_proj(gated)
        out: Tensor = self.norm(stream)
        return out

    def _keys_and_values(
        self, attention: Any, hidden: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        k = attention.k_norm(self._heads(attention.k_proj(hidden)))
        k = rotate(k, cos.to(k.dtype), sin.to(k.dtype))
        return k, self._heads(attention.v_proj(hidden))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.config.head_dim)


class PagedDFlash:
    """One drafter module, its KV pool and its version. A ``NeuralDrafter``."""

    kind = "dflash"
    traits = TRAITS
    first_row = 1
    vocab = None

    def __init__(
        self,
        module: DFlash,
        embed: nn.Module,
        lm_head: Callable[[Tensor], Tensor],
        num_slots: int,
    ) -> None:
        """
        Args:
            module: weights in serving dtype and device; edited in place by swaps.
            embed, lm_head: the target's.
            num_slots: slots of the target's KV pool; the drafter's pool uses the same numbers.
        """
        c, weight = module.config, module.fc.weight
        self.module, self.embed, self.lm_head = module, embed, lm_head
        self.version = 0
        self.layer_ids = c.layer_ids
        self.output_size = c.hidden_size
        self.scale = c.head_dim**-0.5
        self.pool = KvPool(
            len(c.windows), num_slots, c.num_kv_heads, c.head_dim, weight.dtype, weight.device
        )
        self._mask = torch.tensor([c.mask_token_id], device=weight.device)

    def fuse(self, num_positions: int) -> str | None:
        """See ``NeuralDrafter.fuse``: there are no fused operations for it."""
        return "the layers of DFlash are computed by torch's operations"

    def observe(self, ids_T: Tensor, features_TmH: Tensor, at: DecodePass) -> Tensor:
        """See ``NeuralDrafter.observe``: keeps the context, and returns the tokens' embeddings."""
        rows = places_of(at, at.num_query(len(ids_T)))
        slots_T = rows.slots.flatten()
        rope = self.module.rope(_positions(rows.positions.flatten()))
        context = self.module.context(features_TmH.flatten(1), *rope)
        for index, (k, v) in enumerate(context):
            self.pool.keys[index].index_copy_(0, slots_T, k)
            self.pool.values[index].index_copy_(0, slots_T, v)
        embeds: Tensor = self.embed(ids_T)
        return embeds.to(features_TmH.dtype)

    def propose(
        self,
        outputs_RH: Tensor,
        at: DecodePass,
        num_draft: int,
        choose: Callable[[Tensor, int], Tensor],
    ) -> Tensor:
        """See ``NeuralDrafter.propose``: one pass, over as many rows as are drafted and the
        anchor's."""
        num_requests, block = len(outputs_RH), num_draft + 1
        mask = self.embed(self._mask).to(outputs_RH.dtype).expand(num_requests, num_draft, -1)
        embeds = torch.cat((outputs_RH[:, None], mask), dim=1).flatten(0, 1)
        rows, passes = places_of(at, block), self._passes(at, block)

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            pool = self.pool.keys[index], self.pool.values[index]
            window = self.module.config.windows[index]
            return decode_attention(q, k, v, *pool, passes[index], self.scale, window)

        rope = self.module.rope(_positions(rows.positions.flatten()))
        hidden = self.module(embeds, *rope, attend).view(num_requests, block, -1)
        logits = self.lm_head(hidden[:, 1:])
        tokens = [choose(logits[:, k].contiguous(), k) for k in range(num_draft)]
        return torch.stack(tokens, dim=1)

    def _passes(self, at: DecodePass, block: int) -> list[DecodePass | PagedPass]:
        """The pass of each layer."""
        causal = self.module.config.causal
        made = {kind: prepare_pass(replace(at, is_block=not kind), block) for kind in set(causal)}
        return [made[kind] for kind in causal]


def _positions(rows: Tensor) -> Tensor:
    """Position that a slot's row is about: the row of token j + 1 holds the context of j."""
    return (rows - 1).clamp(min=0)


def layer_ids(weights: Weights | None) -> tuple[int, ...]:
    """Layers of the target that a drafter with these weights reads."""
    return () if weights is None else DFlashConfig.from_json(weights.config).layer_ids


def build(context: DrafterContext) -> PagedDFlash:
    """The drafter that the engine begins with.

    Raises:
        ValueError: its weights are shaped for another target.
    """
    weights = first_weights(context)
    config = DFlashConfig.from_json(weights.config)
    check_shape(context, config.hidden_size, config.target_vocab_size)
    module = for_serving(lambda: DFlash(config), context)
    drafter = PagedDFlash(module, context.embed, context.logits, context.num_slots)
    drafter.version = weights.version
    return drafter


KIND = DrafterKind(TRAITS, build, layer_ids)
