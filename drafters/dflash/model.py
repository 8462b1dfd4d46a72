"""DFlash's module: which tensors a drafter has, and what they compute.

Parameters are named as in published checkpoints (``DFlashDraftModel``). Shapes as in
``drafters.dflash.paged``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from drafters.norms import RMSNorm
from drafters.rotary import RotaryAngles, rotate

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [..., Hq, D], k and v [..., Hkv, D] of the block) -> [..., Hq, D]."""

_FIRST_SHARE = 0.1
"""Of what layers with random weights would add to the residual stream. All of it would drown the
embeddings, whose elements are of the order of 0.1, so that a mask learns late to read the anchor's
token: ``python -m benchmarks.recipes``."""
_ADDING = ("o_proj.weight", "down_proj.weight")


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
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)


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
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class DFlash(nn.Module):
    """DFlash's tensors. Embedding and lm_head are the target's, frozen and not part of a bundle."""

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        self.fc = nn.Linear(len(c.layer_ids) * c.hidden_size, c.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.layers = nn.ModuleList(_Layer(c) for _ in c.windows)
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self._angles = RotaryAngles(c.head_dim, c.rope_theta)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw random weights (normal, std 1 / sqrt(width of the input); norms 1); what layers add
        to the residual stream is ``_FIRST_SHARE`` of that."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                values = torch.randn(parameter.shape, generator=generator)
                share = _FIRST_SHARE if name.endswith(_ADDING) else 1.0
                parameter.copy_(values * share * parameter.shape[1] ** -0.5)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """See ``RotaryAngles.at``."""
        return self._angles.at(positions)

    def inverse_frequency(self, device: torch.device) -> Tensor:
        """See ``RotaryAngles.inverse_frequency``."""
        return self._angles.inverse_frequency(device)

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
