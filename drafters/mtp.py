"""Multi-token prediction: one decoder layer between the target's own embedding and lm_head.

    x = proj([norm(embedding), norm(hidden)])  ->  decoder layer  ->  norm  ->  the target's lm_head

Rows and their indices are those of ``drafters.eagle3.model``: row p is (x_p, h_{p-1}) and predicts
x_{p+1}. h is the lm_head's input of the target at committed positions, and the row's own output,
behind its norm, at drafted ones: K tokens are drafted by running the one layer K times. The halves
of ``proj``'s input come in the order of the family that a head was published with (``ORDERS``).

Shapes: T rows (any leading dimensions work), H hidden, V target vocabulary, Vd draft vocabulary,
Hq/Hkv query/key heads, D head dimension.

Source: DeepSeek-AI 2024, arXiv:2412.19437, 2.2; FastMTP, arXiv:2509.18362: several tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from drafters.eagle3.model import Attend, rope_theta
from drafters.eagle3.paged import FusedPass, PagedEagle3
from drafters.fused_layers import FusedLayers, Parts, bias_in, norm_of, why_not_fused
from drafters.norms import RMSNorm
from drafters.protocol import DrafterContext, DrafterKind, Traits, Weights
from drafters.rotary import RotaryAngles, rotate
from drafters.stored_module import check_shape, first_weights, for_serving
from specops.device import trained_gate
from specops.rope import Heads, rope_table
from targets.layers import Layer, columns_of

TRAITS = Traits(on_device=True, learns=True, needs_match=False, draws=True)


@dataclass(frozen=True, slots=True)
class Order:
    """How a family lays out its heads in a checkpoint of the target."""

    hidden_first: bool
    """``proj`` reads [hidden, embedding]; otherwise [embedding, hidden]."""
    proj: str
    embed_norm: str
    hidden_norm: str
    final_norm: str
    layer: str
    """Prefix of the decoder layer's tensors."""
    count: str
    """Key of the target's config that says how many heads there are."""
    owned: str
    """Prefix of all its tensors. In these names ``{n}`` is the target's number of layers, which is
    the number of the first head."""
    norm_offset: float = 0.0
    """Added to the weights of norms when they are read (Qwen3.5's are centred at 0)."""


ORDERS = {
    "deepseek_v3": Order(
        False,
        proj="model.layers.{n}.eh_proj",
        embed_norm="model.layers.{n}.enorm",
        hidden_norm="model.layers.{n}.hnorm",
        final_norm="model.layers.{n}.shared_head.norm",
        layer="model.layers.{n}.",
        count="num_nextn_predict_layers",
        owned="model.layers.{n}.",
    ),
    "qwen3_5": Order(
        False,
        proj="mtp.fc",
        embed_norm="mtp.pre_fc_norm_embedding",
        hidden_norm="mtp.pre_fc_norm_hidden",
        final_norm="mtp.norm",
        layer="mtp.layers.0.",
        count="mtp_num_hidden_layers",
        owned="mtp.",
        norm_offset=1.0,
    ),
    "mimo": Order(
        True,
        proj="model.mtp_layers.0.input_proj",
        embed_norm="model.mtp_layers.0.token_layernorm",
        hidden_norm="model.mtp_layers.0.hidden_layernorm",
        final_norm="model.mtp_layers.0.final_layernorm",
        layer="model.mtp_layers.0.",
        count="num_nextn_predict_layers",
        owned="model.mtp_layers.0.",
    ),
}
"""Families of heads. That of new heads is ``NEW_ORDER``."""
NEW_ORDER = "deepseek_v3"
_WITH_HEAD_NORMS = ("qwen3",)
"""Model types of targets whose query and key heads are normed, as those of new heads then are."""


@dataclass(frozen=True, slots=True)
class MtpConfig:
    """Shapes and meaning of a head's tensors."""

    hidden_size: int
    target_vocab_size: int
    draft_vocab_size: int
    """Smaller than ``target_vocab_size`` if the vocabulary is reduced, else equal."""
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layer_ids: tuple[int, ...]
    """The target's last layer: the residual stream before its final norm."""
    rms_norm_eps: float
    rope_theta: float
    rotary_dim: int
    """Leading elements of each head that are rotated; even."""
    order: str = NEW_ORDER
    """A name in ``ORDERS``."""
    has_bias: bool = False
    """Queries, keys and values have a bias."""
    has_head_norms: bool = False
    """Query and key heads are normed."""
    has_output_gate: bool = False
    """Attention's output is multiplied by a sigmoid of the row (Qwen3.5)."""

    def to_json(self) -> dict[str, Any]:
        """Config as JSON: a dictionary with lists for tuples."""
        return {**asdict(self), "layer_ids": list(self.layer_ids)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> MtpConfig:
        """Inverse of ``to_json``. Raises ValueError if a key is missing, unknown or impossible."""
        try:
            config = cls(**{**value, "layer_ids": tuple(value["layer_ids"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a config of MTP heads: {error}") from error
        if config.order not in ORDERS:
            raise ValueError(f"order is {config.order!r}, known are {', '.join(ORDERS)}")
        if len(config.layer_ids) != 1:
            raise ValueError(f"MTP heads read one layer, got {list(config.layer_ids)}")
        return config


def config_for_target(
    target_config: Any,
    layer_ids: tuple[int, ...] | None = None,
    draft_vocab_size: int | None = None,
) -> MtpConfig:
    """Config of a new head whose layer has the shape of the target's layers.

    Raises:
        ValueError: ``layer_ids`` is not the target's last layer.
    """
    config = target_config.get_text_config()
    last = (config.num_hidden_layers,)
    if layer_ids is not None and tuple(layer_ids) != last:
        raise ValueError(
            f"MTP heads read the target's last layer, so drafter.layer_ids must be {list(last)} or "
            f"null, got {list(layer_ids)}"
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return MtpConfig(
        hidden_size=config.hidden_size,
        target_vocab_size=config.vocab_size,
        draft_vocab_size=draft_vocab_size or config.vocab_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        layer_ids=last,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=rope_theta(config),
        rotary_dim=_rotary_dim(config, head_dim),
        has_head_norms=config.model_type in _WITH_HEAD_NORMS,
    )


def _rotary_dim(config: Any, head_dim: int) -> int:
    """Leading elements of each head that a target rotates."""
    rope = getattr(config, "rope_parameters", None) or {}
    share = getattr(config, "partial_rotary_factor", None) or rope.get("partial_rotary_factor")
    return int(head_dim * (share or 1.0))


class MtpAttention(nn.Module):
    """Attention of the layer, with the parts that some families have."""

    def __init__(self, config: MtpConfig) -> None:
        super().__init__()
        self.config = c = config
        hidden, eps, inner = c.hidden_size, c.rms_norm_eps, c.num_heads * c.head_dim
        rows = inner + 2 * c.num_kv_heads * c.head_dim
        self.qkv_proj = nn.Linear(hidden, rows, bias=c.has_bias)
        self.q_norm = RMSNorm(c.head_dim, eps) if c.has_head_norms else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, eps) if c.has_head_norms else nn.Identity()
        self.output_gate = nn.Linear(hidden, inner, bias=False) if c.has_output_gate else None
        self.o_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, normed: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """Rows [..., H] -> [..., H]; for the other arguments see ``Mtp.forward``."""
        c = self.config
        heads = self.qkv_proj(normed).unflatten(-1, (c.num_heads + 2 * c.num_kv_heads, c.head_dim))
        q, k, v = heads.split((c.num_heads, c.num_kv_heads, c.num_kv_heads), dim=-2)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        mixed = attend(self._turned(q, cos, sin), self._turned(k, cos, sin), v).flatten(-2)
        if self.output_gate is not None:
            mixed = mixed * torch.sigmoid(self.output_gate(normed))
        out: Tensor = self.o_proj(mixed)
        return out

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        dim = self.config.rotary_dim
        if dim == x.shape[-1]:
            return rotate(x, cos, sin)
        return torch.cat((rotate(x[..., :dim], cos, sin), x[..., dim:]), dim=-1)


class Mtp(nn.Module):
    """The tensors of an MTP head and its one layer.

    Embedding and lm_head are the target's: shared, frozen and not part of a bundle. ``target_norm``
    is the target's final norm, because layers are tapped before it; it learns like the others.
    ``d2t`` is as in ``drafters.eagle3.model.Eagle3``.
    """

    d2t: Tensor | None

    def __init__(self, config: MtpConfig) -> None:
        super().__init__()
        self.config = config
        c, hidden, eps = config, config.hidden_size, config.rms_norm_eps
        self.target_norm = RMSNorm(hidden, eps)
        self.embed_norm = RMSNorm(hidden, eps)
        self.hidden_norm = RMSNorm(hidden, eps)
        self.proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.input_layernorm = RMSNorm(hidden, eps)
        self.attention = MtpAttention(config)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.gate_up_proj = nn.Linear(hidden, 2 * c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, hidden, bias=False)
        self.norm = RMSNorm(hidden, eps)
        self._angles = RotaryAngles(c.rotary_dim, c.rope_theta)
        reduced = c.draft_vocab_size != c.target_vocab_size
        self.register_buffer(
            "d2t", torch.zeros(c.draft_vocab_size, dtype=torch.int64) if reduced else None
        )

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw random weights (normal, std 0.02; norms 1), and pass the hidden state through
        ``proj``."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        hidden = self.config.hidden_size
        first = 0 if ORDERS[self.config.order].hidden_first else hidden
        self.proj.weight[:, first : first + hidden] += torch.eye(hidden)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """See ``RotaryAngles.at``; the first ``rotary_dim`` elements of a head are rotated."""
        return self._angles.at(positions)

    def inverse_frequency(self, device: torch.device) -> Tensor:
        """See ``RotaryAngles.inverse_frequency``."""
        return self._angles.inverse_frequency(device)

    def fuse(self, features: Tensor) -> Tensor:
        """The target's last layer [..., H] -> its lm_head's input, h [..., H]."""
        normed: Tensor = self.target_norm(features)
        return normed

    def forward(
        self, embeds: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend
    ) -> Tensor:
        """Run the layer: outputs of rows, behind the final norm.

        Args:
            embeds: [..., H], the target's embedding of each row's token.
            hidden: [..., H], see ``fuse``, or the output of the preceding row.
            cos, sin: see ``rope``, at the rows' positions.

        Returns:
            [..., H]; input of the lm_head, and ``hidden`` of the next row.
        """
        stream = self.proj(self._pair(embeds, hidden))
        stream = stream + self.attention(self.input_layernorm(stream), cos, sin, attend)
        gated = trained_gate(self.gate_up_proj(self.post_attention_layernorm(stream)))
        out: Tensor = self.norm(stream + self.down_proj(gated))
        return out

    def _pair(self, embeds: Tensor, hidden: Tensor) -> Tensor:
        halves = self.embed_norm(embeds), self.hidden_norm(hidden)
        return torch.cat(halves[::-1] if ORDERS[self.config.order].hidden_first else halves, dim=-1)

    def head_input(self, outputs: Tensor) -> Tensor:
        """The lm_head's input [..., H] for outputs [..., H]: they are behind the norm already."""
        return outputs

    def head_weight(self, target_VH: Tensor) -> Tensor:
        """[Vd, H], the rows of the target's lm_head that can be proposed."""
        if self.d2t is None:
            return target_VH
        return target_VH[self.to_target_ids(torch.arange(len(self.d2t), device=self.d2t.device))]

    def to_target_ids(self, draft_ids: Tensor) -> Tensor:
        """Map draft ids (any shape, int64) to target ids."""
        return draft_ids if self.d2t is None else draft_ids + self.d2t[draft_ids]

    def bundle_tensors(self) -> dict[str, Tensor]:
        """Name -> tensor of everything that a bundle holds: parameters and ``d2t``."""
        return dict(self.state_dict())


def supports(module: nn.Module, embed: nn.Module) -> str | None:
    """``None`` if ``FusedMtp`` computes what this head does, else why not.

    Args:
        embed: the target's token embedding; must be a plain ``nn.Embedding``.
    """
    if type(module) is not Mtp:
        return f"the drafter is a {type(module).__name__}"
    c = module.config
    if c.has_output_gate:
        return "attention's output has a gate"
    if c.rotary_dim != c.head_dim:
        return f"RoPE rotates only {c.rotary_dim} of {c.head_dim} elements of each head"
    shape = c.hidden_size, c.target_vocab_size, c.head_dim
    return why_not_fused(module, embed, *shape) or bias_in(module, ("attention.qkv_proj",))


class FusedMtp:
    """An ``Mtp`` run by our operations on the module's own weights, as ``FusedEagle3`` runs its
    drafter: ten launches a pass with its logits, and attention."""

    def __init__(
        self,
        module: Mtp,
        embed: nn.Module,
        head_DH: Tensor,
        num_positions: int,
        **options: Any,
    ) -> None:
        """
        Args:
            module, embed: see ``supports``.
            head_DH: weight of the lm_head, [Vd, H]; never packed.
            num_positions: exclusive upper bound on the rows' positions.
            options: keywords of ``FusedLayers``.

        Raises:
            ValueError: the head cannot be fused.
        """
        reason = supports(module, embed)
        if reason is not None:
            raise ValueError(f"the drafter cannot be fused: {reason}")
        assert isinstance(embed, nn.Embedding)
        self._table_VH, self._head_DH = embed.weight.detach(), head_DH
        self._hidden_first = ORDERS[module.config.order].hidden_first
        self._pair_norms = norm_of(module.embed_norm), norm_of(module.hidden_norm)
        self._target_norm, self._final_norm = norm_of(module.target_norm), norm_of(module.norm)
        weight = module.proj.weight.detach()
        frequency = module.inverse_frequency(weight.device)
        self._table = rope_table(frequency, 1.0, num_positions, weight.dtype)
        parts = Parts((_fused_layer(module),), {"proj": weight})
        self.layers = FusedLayers(parts, alone=(head_DH,), **options)

    def follow(self) -> None:
        """The module's weights were overwritten where they lie."""
        self.layers.follow()

    def fuse(self, features: Tensor) -> Tensor:
        """See ``Mtp.fuse``; [T, H]."""
        return self.layers.do.add_norm(features, None, self._target_norm, None)

    def forward(
        self,
        ids_T: Tensor,
        hidden: Tensor,
        positions_T: Tensor,
        slots_T: Tensor,
        attend: Callable[[Tensor], Tensor],
        keys: Tensor,
        values: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the layer like ``Mtp.forward``, and write its keys and values to the rows' slots.

        Args:
            ids_T, positions_T, slots_T: [T] int64 of the rows.
            hidden: [T, H], see ``fuse``, or the output of the preceding row.
            attend: see ``drafters.eagle3.fused``.
            keys, values: [num_slots, Hkv, D] contiguous, written in place.

        Returns:
            Outputs [T, H], behind the final norm, and ``None``.
        """
        do, (heads,) = self.layers.do, self.layers.heads
        ids_T, positions_T, slots_T = (t.contiguous() for t in (ids_T, positions_T, slots_T))
        pair = do.norm_pair(
            ids_T, self._table_VH, hidden, *self._pair_norms, hidden_first=self._hidden_first
        )
        table = do.rope_rows(self._table, positions_T)

        def heads_of(_index: int, qkv: Tensor) -> Tensor:
            q = do.rope_and_write(qkv, heads, table, positions_T, slots_T, keys, values)
            return attend(q).flatten(1)

        stream = self.layers.product(pair, "proj")
        return self.layers.forward(stream, None, heads_of, self._final_norm)

    def logits(
        self, outputs: Tensor, squares: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """See ``FusedEagle3.logits``; the outputs are behind the final norm."""
        return self.layers.multiply(outputs, self._head_DH, out)


def _fused_layer(module: Mtp) -> Layer:
    """The layer's weights, which are the module's own."""
    c, attention = module.config, module.attention
    q_norm, k_norm = (
        norm_of(norm) if isinstance(norm, nn.RMSNorm) else None
        for norm in (attention.q_norm, attention.k_norm)
    )
    bias = attention.qkv_proj.bias
    return Layer(
        norm_of(module.input_layernorm),
        attention.qkv_proj.weight.detach(),
        Heads(c.num_heads, c.num_kv_heads, q_norm, k_norm, None if bias is None else bias.detach()),
        attention.o_proj.weight.detach(),
        norm_of(module.post_attention_layernorm),
        module.gate_up_proj.weight.detach(),
        module.down_proj.weight.detach(),
    )


class PagedMtp(PagedEagle3):
    """An MTP head in a running engine. A ``NeuralDrafter``, with EAGLE-3's rows and passes."""

    kind = "mtp"
    traits = TRAITS

    def __init__(
        self, module: Mtp, embed: nn.Module, num_slots: int, target_head_VH: Tensor
    ) -> None:
        """
        Args:
            module, embed, num_slots: see ``PagedEagle3``.
            target_head_VH: weight of the target's lm_head.
        """
        super().__init__(module, embed, num_slots)
        self._target_head_VH = target_head_VH.detach()
        head = module.head_weight(self._target_head_VH)
        on_cpu = head.device.type == "cpu" and module.d2t is not None
        self._head_weight = columns_of(head) if on_cpu else head

    def follow_target(self) -> None:
        """See ``drafters.protocol.FollowsTarget``: the rows of the lm_head that it drafts with are
        copied if its vocabulary is reduced."""
        if self.module.d2t is not None:
            self._head_weight.copy_(self.module.head_weight(self._target_head_VH))

    def _why_not_fused(self) -> str | None:
        return supports(self.module, self.embed)

    def _make_fused(self, num_positions: int, **options: Any) -> FusedPass:
        return FusedMtp(self.module, self.embed, self._head_weight, num_positions, **options)

    def _logits(self, outputs: Tensor, squares: Tensor | None, out: Tensor | None = None) -> Tensor:
        if self._fused is not None:
            return self._fused.logits(outputs, out=out)
        return nn.functional.linear(outputs, self._head_weight)


def layer_ids(weights: Weights | None) -> tuple[int, ...]:
    """The layer of the target that a head with these weights reads."""
    return () if weights is None else MtpConfig.from_json(weights.config).layer_ids


def build(context: DrafterContext) -> PagedMtp:
    """The drafter that the engine begins with.

    Raises:
        ValueError: its weights are shaped for another target.
    """
    weights = first_weights(context)
    config = MtpConfig.from_json(weights.config)
    check_shape(context, config.hidden_size, config.target_vocab_size)
    module = for_serving(lambda: Mtp(config), context)
    lm_head: Any = context.lm_head
    drafter = PagedMtp(module, context.embed, context.num_slots, lm_head.weight)
    drafter.version = weights.version
    return drafter


KIND = DrafterKind(TRAITS, build, layer_ids)
