"""P-EAGLE: an EAGLE-3 drafter that drafts all its tokens in one pass.

Rows and their indices are those of ``drafters.eagle3.model``: row p is (x_p, h_{p-1}), h is
``fuse(features)``, and predicts x_{p+1}. The rows behind the anchor are not computed one from
another: each of them reads the same learnt pair, an embedding and tapped features that stand for
what is not known yet, and sees the rows before it. A draft of K tokens is therefore the anchor's
row, which is computed when its token is committed, and one pass over K - 1 rows.

The first layer is EAGLE-3's; further ones are Llama's, over its output.

Shapes: T rows, R requests, K draft tokens, H hidden, m tapped layers, Hq/Hkv query/key heads, D
head dimension.

Source: P-EAGLE, arXiv:2602.01469; speculators and vLLM for masks, positions and names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from drafters import fused_layers
from drafters.eagle3.fused import FusedEagle3, supports_first_layer
from drafters.eagle3.model import Attend, Eagle3, Eagle3Config
from drafters.fused_layers import Fusable, FusedLayers, Parts, norm_of
from drafters.norms import RMSNorm
from drafters.protocol import DrafterContext, DrafterKind, Traits, Weights, choose_block
from drafters.rotary import rotate
from drafters.stored_module import check_shape, first_weights, for_serving
from specops.attention import DecodePass, PagedPass, Places
from specops.device import decode_attention, places_of, prepare_pass, trained_gate
from specops.draft_sampling import vocab_map
from specops.rope import Heads
from targets.layers import Layer
from targets.target import KvPool

TRAITS = Traits(
    on_device=True, learns=True, needs_match=False, draws=True, prior_draft_cost=0.05
)  # fmt: skip

LayerAttend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [..., Hq, D], k and v [..., Hkv, D], after RoPE) -> [..., Hq, D]."""


@dataclass(frozen=True, slots=True)
class PEagleConfig:
    """Shapes and meaning of a drafter's tensors."""

    first: Eagle3Config
    """Of everything that EAGLE-3 has too."""
    num_layers: int
    mask_token_id: int
    """Token whose row of an embedding table holds ``mask_embed`` in published layouts."""

    def to_json(self) -> dict[str, Any]:
        """Config as JSON: that of EAGLE-3 with two more keys."""
        own = {"num_layers": self.num_layers, "mask_token_id": self.mask_token_id}
        return {**self.first.to_json(), **own}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PEagleConfig:
        """Inverse of ``to_json``. Raises ValueError if a key is missing, unknown or impossible."""
        rest = dict(value)
        own = {name: rest.pop(name, None) for name in ("num_layers", "mask_token_id")}
        if any(type(number) is not int for number in own.values()):
            raise ValueError(f"not a P-EAGLE config: num_layers and mask_token_id are {own}")
        found = cls(Eagle3Config.from_json(rest), **own)
        if found.num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {found.num_layers}")
        if not 0 <= found.mask_token_id < found.first.target_vocab_size:
            raise ValueError(
                f"mask_token_id {found.mask_token_id} is none of the target's "
                f"{found.first.target_vocab_size} tokens"
            )
        if found.first.norm_output:
            raise ValueError("norm_output is about rows that read outputs, which P-EAGLE has not")
        return found


class _Layer(nn.Module):
    """A decoder layer of Llama's form behind the first."""

    def __init__(self, c: Eagle3Config) -> None:
        super().__init__()
        self._config, hidden = c, c.hidden_size
        self.input_layernorm = RMSNorm(hidden, c.rms_norm_eps)
        rows = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        self.qkv_proj = nn.Linear(hidden, rows, bias=False)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, hidden, bias=False)
        self.post_attention_layernorm = RMSNorm(hidden, c.rms_norm_eps)
        self.gate_up_proj = nn.Linear(hidden, 2 * c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, hidden, bias=False)

    def forward(self, stream: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """Residual stream [..., H] -> [..., H]."""
        c = self._config
        heads = self.qkv_proj(self.input_layernorm(stream))
        heads = heads.unflatten(-1, (c.num_heads + 2 * c.num_kv_heads, c.head_dim))
        q, k, v = heads.split((c.num_heads, c.num_kv_heads, c.num_kv_heads), dim=-2)
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        mixed = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)
        stream = stream + self.o_proj(mixed.flatten(-2))
        gated = trained_gate(self.gate_up_proj(self.post_attention_layernorm(stream)))
        out: Tensor = stream + self.down_proj(gated)
        return out


class PEagle(Eagle3):
    """EAGLE-3's tensors, further layers, and what stands for rows that are not known."""

    def __init__(self, config: PEagleConfig) -> None:
        super().__init__(config.first)
        self.parallel = config
        c = config.first
        self.rest = nn.ModuleList(_Layer(c) for _ in range(config.num_layers - 1))
        self.mask_hidden = nn.Parameter(torch.zeros(1, 1, len(c.layer_ids) * c.hidden_size))
        """In place of tapped features; published with this shape."""
        self.mask_embed = nn.Parameter(torch.zeros(c.hidden_size))
        """In place of a token's embedding."""

    @torch.no_grad()
    def initialise(self, seed: int, target_lm_head: Tensor | None = None) -> None:
        """Draw random weights as ``Eagle3`` does; further layers pass the stream on unchanged."""
        super().initialise(seed, target_lm_head)
        for layer in self.layers:
            layer.o_proj.weight.zero_()
            layer.down_proj.weight.zero_()
        generator = torch.Generator().manual_seed(seed + 1)
        for mask in (self.mask_hidden, self.mask_embed):
            mask.copy_(torch.randn(mask.shape, generator=generator))

    @property
    def layers(self) -> list[_Layer]:
        """The layers behind the first."""
        found: Any = self.rest
        return list(found)

    def masked(self) -> tuple[Tensor, Tensor]:
        """Embedding and h, [H] each, of a row whose token and features are not known."""
        return self.mask_embed, self.fuse(self.mask_hidden.flatten())

    def masked_heads(self) -> Tensor:
        """[C] queries, keys and values of such a row in the first layer, before RoPE."""
        embed, hidden = self.masked()
        pair = torch.cat((self.input_layernorm(embed), self.hidden_norm(hidden)), dim=-1)
        heads: Tensor = self.qkv_proj(pair)
        return heads

    def run(
        self, embeds: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor, attend: LayerAttend
    ) -> Tensor:
        """All layers: outputs of rows before the final norm, [..., H].

        Args:
            embeds: [..., H], the target's embedding of each row's token, or ``masked``.
            hidden: [..., H], fused features, or ``masked``.
            cos, sin: see ``rope``, at the rows' positions.
        """
        stream: Tensor = self(embeds, hidden, cos, sin, partial(attend, 0))
        for index, layer in enumerate(self.rest, start=1):
            stream = layer(stream, cos, sin, partial(attend, index))
        return stream


def supports(module: nn.Module, embed: nn.Module) -> str | None:
    """``None`` if ``FusedPEagle`` computes what this drafter does, else why not.

    Args:
        embed: the target's token embedding; must be a plain ``nn.Embedding``.
    """
    if type(module) is not PEagle:
        return f"the drafter is a {type(module).__name__}"
    return supports_first_layer(module, embed)


class FusedPEagle:
    """A ``PEagle`` run by our operations on the module's own weights: the first layer as
    ``FusedEagle3`` runs it, the others as ``FusedLayers`` does.

    All rows behind an anchor read the same pair, so the input of their first layer, up to RoPE, is
    one row. It is computed when the weights change, not in every pass.
    """

    def __init__(
        self, module: PEagle, embed: nn.Module, num_positions: int, **options: Any
    ) -> None:
        """
        Args:
            module, embed: see ``supports``.
            num_positions: exclusive upper bound on the rows' positions.
            options: keywords of ``FusedEagle3``.

        Raises:
            ValueError: the drafter cannot be fused.
        """
        self.module = module
        self.first = FusedEagle3(module, embed, num_positions, **options)
        self.rest: FusedLayers | None = None
        if module.layers:
            layers = tuple(_fused_layer(layer, self.first.heads) for layer in module.layers)
            self.rest = FusedLayers(Parts(layers, {}), **options)
        self._masks = self._mask_rows()

    def _mask_rows(self) -> tuple[Tensor, Tensor]:
        """Queries, keys and values [1, C] of a row that is not known, and its h [1, H]. By the
        module's own code: a kernel would be compiled here, alone."""
        module = self.module
        return module.masked_heads().detach()[None], module.masked()[1].detach()[None]

    def follow(self) -> None:
        """The module's weights were overwritten where they lie."""
        self.first.follow()
        if self.rest is not None:
            self.rest.follow()
        for kept, made in zip(self._masks, self._mask_rows(), strict=True):
            kept.copy_(made)

    def observe(
        self,
        ids_T: Tensor,
        features: Tensor,
        places: Places,
        attend: fused_layers.Attend,
        pool: KvPool,
    ) -> Tensor:
        """Outputs [T, H] of committed rows before the final norm.

        Args:
            features: [T, m * H] tapped rows in ``layer_ids`` order.
            places: [R, Q] positions and slots of the rows.
        """
        hidden = self.first.fuse(features)
        qkv = self.first.heads_of(ids_T, hidden)
        return self._layers(qkv, hidden, places, attend, pool)

    def ahead(self, places: Places, attend: fused_layers.Attend, pool: KvPool) -> Tensor:
        """Outputs [T, H] of rows that are not known."""
        num_rows = places.positions.numel()
        qkv, hidden = (x.expand(num_rows, -1) for x in self._masks)
        return self._layers(qkv, hidden, places, attend, pool)

    def logits(self, outputs: Tensor) -> Tensor:
        """[T, H] -> [T, Vd] over the draft vocabulary, in the weights' dtype."""
        return self.first.logits(outputs)

    def _layers(
        self,
        qkv: Tensor,
        hidden: Tensor,
        places: Places,
        attend: fused_layers.Attend,
        pool: KvPool,
    ) -> Tensor:
        positions_T, slots_T = places.positions.flatten(), places.slots.flatten()
        stream, squares = self.first.behind_heads(
            qkv, hidden, positions_T, slots_T, partial(attend, 0), pool.keys[0], pool.values[0]
        )
        if self.rest is None:
            return stream
        do, heads = self.rest.do, self.rest.heads
        table = do.rope_rows(self.first.table, positions_T)

        def heads_of(index: int, qkv: Tensor) -> Tensor:
            kept = pool.keys[index + 1], pool.values[index + 1]
            q = do.rope_and_write(qkv, heads[index], table, positions_T, slots_T, *kept)
            return attend(index + 1, q).flatten(1)

        return self.rest.forward(stream, squares, heads_of)[0]


def _fused_layer(layer: _Layer, heads: Heads) -> Layer:
    return Layer(
        norm_of(layer.input_layernorm),
        layer.qkv_proj.weight.detach(),
        heads,
        layer.o_proj.weight.detach(),
        norm_of(layer.post_attention_layernorm),
        layer.gate_up_proj.weight.detach(),
        layer.down_proj.weight.detach(),
    )


class PagedPEagle(Fusable[FusedPEagle]):
    """One drafter module, its KV pool and its version. A ``NeuralDrafter``."""

    kind = "p_eagle"
    traits = TRAITS
    first_row = 1

    def __init__(self, module: PEagle, embed: nn.Module, num_slots: int) -> None:
        """
        Args:
            module: weights in serving dtype and device; edited in place by swaps.
            embed: the target's token embedding module (with its own scaling, if it has one).
            num_slots: slots of the target's KV pool; the drafter's pool uses the same numbers.
        """
        c, weight = module.config, module.fc.weight
        self.module, self.embed = module, embed
        self.version = 0
        self.layer_ids = c.layer_ids
        self.output_size = c.hidden_size
        self.scale = c.head_dim**-0.5
        self._heads_per_key = c.num_heads // c.num_kv_heads
        self.pool = KvPool(
            module.parallel.num_layers, num_slots, c.num_kv_heads, c.head_dim, weight.dtype,
            weight.device,
        )  # fmt: skip
        d2t = module.d2t
        self.vocab = None if d2t is None else vocab_map(d2t, c.target_vocab_size)

    def _why_not_fused(self) -> str | None:
        return supports(self.module, self.embed)

    def _make_fused(self, num_positions: int, **options: Any) -> FusedPEagle:
        return FusedPEagle(self.module, self.embed, num_positions, **options)

    def observe(self, ids_T: Tensor, features_TmH: Tensor, at: DecodePass) -> Tensor:
        """See ``NeuralDrafter.observe``."""
        num_query = at.num_query(len(ids_T))
        rows, paged = places_of(at, num_query), prepare_pass(at, num_query, self._heads_per_key)
        features = features_TmH.flatten(1)
        if self._fused is not None:
            attend = self._attend_to(paged)
            return self._fused.observe(ids_T, features, rows, attend, self.pool)
        hidden = self.module.fuse(features)
        embeds = self.embed(ids_T).to(hidden.dtype)
        return self._pass(embeds, hidden, rows.positions.flatten(), paged)

    def propose(
        self,
        outputs_RH: Tensor,
        at: DecodePass,
        num_draft: int,
        choose: Callable[[Tensor, int], Tensor],
    ) -> Tensor:
        """See ``NeuralDrafter.propose``: one pass, over one row fewer than are drafted, and one
        product of all of them and the anchors with the lm_head."""
        num_requests, ahead = len(outputs_RH), num_draft - 1
        outputs = outputs_RH
        if ahead:
            masks = self._masks(at, num_requests, ahead).view(num_requests, ahead, -1)
            outputs = torch.cat((outputs_RH[None], masks.transpose(0, 1))).flatten(0, 1)
        model = self.module if self._fused is None else self._fused
        logits = model.logits(outputs).view(num_draft, num_requests, -1)
        return choose_block(choose, logits)

    def _masks(self, at: DecodePass, num_requests: int, ahead: int) -> Tensor:
        """Outputs [R * ahead, H] of the rows behind the anchors."""
        rows, paged = places_of(at, ahead), prepare_pass(at, ahead, self._heads_per_key)
        if self._fused is not None:
            return self._fused.ahead(rows, self._attend_to(paged), self.pool)
        embed, hidden = (x.expand(num_requests * ahead, -1) for x in self.module.masked())
        return self._pass(embed, hidden, rows.positions.flatten(), paged)

    def _attend_to(self, paged: DecodePass | PagedPass) -> fused_layers.Attend:
        def attend(index: int, q: Tensor) -> Tensor:
            kept = self.pool.keys[index], self.pool.values[index]
            return decode_attention(q, None, None, *kept, paged, self.scale)

        return attend

    def _pass(
        self,
        embeds: Tensor,
        hidden: Tensor,
        positions_T: Tensor,
        paged: DecodePass | PagedPass,
    ) -> Tensor:
        """Outputs of T rows [T, H], whose keys and values are written to their slots."""

        def write_and_attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.pool.keys[index], self.pool.values[index]
            return decode_attention(q, k, v, keys, values, paged, self.scale)

        return self.module.run(embeds, hidden, *self.module.rope(positions_T), write_and_attend)


def layer_ids(weights: Weights | None) -> tuple[int, ...]:
    """Layers of the target that a drafter with these weights reads."""
    return () if weights is None else PEagleConfig.from_json(weights.config).first.layer_ids


def build(context: DrafterContext) -> PagedPEagle:
    """The drafter that the engine begins with.

    Raises:
        ValueError: its weights are shaped for another target.
    """
    weights = first_weights(context)
    config = PEagleConfig.from_json(weights.config)
    check_shape(context, config.first.hidden_size, config.first.target_vocab_size)
    module = for_serving(lambda: PEagle(config), context)
    drafter = PagedPEagle(module, context.embed, context.num_slots)
    drafter.version = weights.version
    return drafter


KIND = DrafterKind(TRAITS, build, layer_ids)
