"""EAGLE-3: one decoder layer that reads three tapped layers of the target.

Serving and training share this module; only the attention differs and is passed in. Rows are
indexed by the position of their *token*: row p is (x_p, h_{p-1}), predicts x_{p+1}, and keeps its
K/V in slot p, so a page of draft KV depends only on the prefix that identifies the page. h is
``fuse(features)`` at committed positions and the layer's own output at drafted ones.

Shapes: T rows (any leading dimensions work), H hidden, m tapped layers, V target vocabulary,
Vd draft vocabulary, Hq/Hkv query/key heads, D head dimension.

Source: Li et al. 2025, EAGLE-3, arXiv:2503.01840, Section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from drafters.norms import RMSNorm
from drafters.rotary import RotaryAngles, rotate
from specops.device import trained_gate

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [..., Hq, D], k and v [..., Hkv, D], after RoPE -> [..., Hq, D]; scaled by 1 / sqrt(D)."""


@dataclass(frozen=True, slots=True)
class Eagle3Config:
    """Shapes and meaning of a drafter's tensors."""

    hidden_size: int
    target_vocab_size: int
    draft_vocab_size: int
    """Smaller than ``target_vocab_size`` if the vocabulary is reduced, else equal."""
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layer_ids: tuple[int, ...]
    """Tapped layers: residual stream after k decoder layers of the target."""
    rms_norm_eps: float
    rope_theta: float
    norm_before_residual: bool = False
    """The residual stream begins with the normed hidden state."""
    fc_norm: bool = False
    """Each tapped layer is normed before ``fc`` (EAGLE-3.1)."""
    norm_output: bool = False
    """The next row reads the output behind the final norm (EAGLE-3.1)."""

    def to_json(self) -> dict[str, Any]:
        """Config as JSON: a dictionary with lists for tuples, without the variants not used."""
        used = {name: value for name, value in asdict(self).items() if value is not False}
        return {**used, "layer_ids": list(self.layer_ids)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Eagle3Config:
        """Inverse of ``to_json``. Raises ValueError if a key is missing or unknown."""
        try:
            return cls(**{**value, "layer_ids": tuple(value["layer_ids"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not an EAGLE-3 config: {error}") from error


def default_layer_ids(num_layers: int) -> tuple[int, ...]:
    """(2, N // 2, N - 3), clamped to 1..N without duplicates for shallow targets."""
    wanted = (2, num_layers // 2, num_layers - 3)
    ids = sorted({min(max(k, 1), num_layers) for k in wanted})
    return tuple(ids)


def config_for_target(
    target_config: Any,
    layer_ids: tuple[int, ...] | None = None,
    draft_vocab_size: int | None = None,
) -> Eagle3Config:
    """Config of a new drafter whose layer has the shape of the target's layers.

    Raises:
        ValueError: a layer id outside 0..N.
    """
    config = target_config.get_text_config()
    ids = layer_ids if layer_ids is not None else default_layer_ids(config.num_hidden_layers)
    if not ids or any(not 0 <= k <= config.num_hidden_layers for k in ids):
        raise ValueError(f"drafter.layer_ids must be in 0..{config.num_hidden_layers}, got {ids}")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Eagle3Config(
        hidden_size=config.hidden_size,
        target_vocab_size=config.vocab_size,
        draft_vocab_size=draft_vocab_size or config.vocab_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        layer_ids=tuple(ids),
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=rope_theta(config),
    )


def rope_theta(config: Any) -> float:
    """Base of the rotary embedding; for Gemma3, that of the full-attention layers."""
    parameters = config.rope_parameters
    if "rope_theta" not in parameters:
        parameters = parameters["full_attention"]
    return float(parameters["rope_theta"])


class Eagle3(nn.Module):
    """EAGLE-3's tensors and its one layer.

    Token embeddings come from the target's table, which is shared, frozen and not part of a bundle.
    ``d2t`` maps draft ids to target ids: ``target_id = draft_id + d2t[draft_id]``; ``None`` if the
    vocabularies are equal.
    """

    d2t: Tensor | None

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.config = config
        c = config
        hidden, eps = c.hidden_size, c.rms_norm_eps
        self.fc = nn.Linear(len(c.layer_ids) * hidden, hidden, bias=False)
        self.input_layernorm = RMSNorm(hidden, eps)
        self.hidden_norm = RMSNorm(hidden, eps)
        self.qkv_proj = nn.Linear(
            2 * hidden, (c.num_heads + 2 * c.num_kv_heads) * c.head_dim, bias=False
        )
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, hidden, bias=False)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.gate_up_proj = nn.Linear(hidden, 2 * c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, hidden, bias=False)
        self.norm = RMSNorm(hidden, eps)
        self.lm_head = nn.Linear(hidden, c.draft_vocab_size, bias=False)
        self._angles = RotaryAngles(c.head_dim, c.rope_theta)
        norms = [RMSNorm(hidden, eps) for _ in c.layer_ids] if c.fc_norm else []
        self.fc_norm = nn.ModuleList(norms)
        reduced = c.draft_vocab_size != c.target_vocab_size
        self.register_buffer(
            "d2t", torch.zeros(c.draft_vocab_size, dtype=torch.int64) if reduced else None
        )

    @torch.no_grad()
    def initialise(self, seed: int, target_lm_head: Tensor | None = None) -> None:
        """Draw random weights (normal, std 0.02; norms 1); copy the target's lm_head if it fits.

        Args:
            target_lm_head: [V, H]; becomes ``lm_head`` if the vocabularies are equal.
        """
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                values = torch.randn(parameter.shape, generator=generator) * 0.02
                parameter.copy_(values)
        if target_lm_head is not None and target_lm_head.shape == self.lm_head.weight.shape:
            self.lm_head.weight.copy_(target_lm_head)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """See ``RotaryAngles.at``."""
        return self._angles.at(positions)

    def inverse_frequency(self, device: torch.device) -> Tensor:
        """[D / 2] float32, radians per position."""
        return self._angles.inverse_frequency(device)

    def fuse(self, features: Tensor) -> Tensor:
        """Project tapped rows [..., m * H], in ``layer_ids`` order, to h [..., H]."""
        if self.config.fc_norm:
            layers = features.chunk(len(self.fc_norm), dim=-1)
            normed = [norm(rows) for norm, rows in zip(self.fc_norm, layers, strict=True)]
            features = torch.cat(normed, dim=-1)
        fused: Tensor = self.fc(features)
        return fused

    def forward(
        self, embeds: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend
    ) -> Tensor:
        """Run the layer: output g of rows, before the final norm, or behind it if ``norm_output``.

        Args:
            embeds: [..., H], the target's embedding of each row's token.
            hidden: [..., H], fused features, or the output of the preceding row.
            cos, sin: see ``rope``, at the rows' positions.

        Returns:
            [..., H]; input of ``logits``, and ``hidden`` of the next row.
        """
        c = self.config
        normed = self.hidden_norm(hidden)
        pair = torch.cat((self.input_layernorm(embeds), normed), dim=-1)
        heads = self.qkv_proj(pair).unflatten(-1, (c.num_heads + 2 * c.num_kv_heads, c.head_dim))
        q, k, v = heads.split((c.num_heads, c.num_kv_heads, c.num_kv_heads), dim=-2)
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        mixed = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)
        stream = (normed if c.norm_before_residual else hidden) + self.o_proj(mixed.flatten(-2))
        gated = trained_gate(self.gate_up_proj(self.post_attention_layernorm(stream)))
        out: Tensor = stream + self.down_proj(gated)
        return self.norm(out) if c.norm_output else out

    def head_input(self, outputs: Tensor) -> Tensor:
        """The lm_head's input [..., H] for outputs [..., H]."""
        normed: Tensor = outputs if self.config.norm_output else self.norm(outputs)
        return normed

    def head_weight(self, target_VH: Tensor) -> Tensor:
        """[Vd, H] weight of the drafter's own lm_head."""
        return self.lm_head.weight

    def logits(self, outputs: Tensor) -> Tensor:
        """Logits [..., Vd] over the draft vocabulary for outputs [..., H]."""
        scores: Tensor = self.lm_head(self.head_input(outputs))
        return scores

    def to_target_ids(self, draft_ids: Tensor) -> Tensor:
        """Map draft ids (any shape, int64) to target ids."""
        return draft_ids if self.d2t is None else draft_ids + self.d2t[draft_ids]

    def bundle_tensors(self) -> dict[str, Tensor]:
        """Name -> tensor of everything that a bundle holds: parameters and ``d2t``."""
        return dict(self.state_dict())
