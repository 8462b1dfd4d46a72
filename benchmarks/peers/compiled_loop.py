"""The fastest simple loop: plain PyTorch, a static KV cache, a compiled step in a CUDA graph.

Does what gpt-fast does, for a Hugging Face Qwen3: all prompts have one length, each layer keeps its
keys and values in one tensor as long as prompt and answer together, the step is compiled as a whole
and captured once, and the device feeds each token to the next step. Nothing is read back until the
last token, and no request can join, leave or stop early. No server can be this simple, so it sets
the bar for the decode step alone.

B requests, P prompt tokens, S positions of the cache, H hidden, V vocabulary, Hq and Hkv query and
key heads, G = Hq / Hkv, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention, silu

_WARM_UPS = 3


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in Hugging Face's layout: [..., D], rotated by halves."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class _Layer(nn.Module):
    """One decoder layer with Hugging Face's weights, its projections merged."""

    keys: Tensor
    values: Tensor
    qkv: Tensor
    gate_up: Tensor

    def __init__(self, module: Any, batch: int, num_positions: int) -> None:
        super().__init__()
        attend, mlp = module.self_attn, module.mlp
        self.head_dim: int = attend.head_dim
        self.num_heads = attend.q_proj.out_features // self.head_dim
        self.num_kv_heads = attend.k_proj.out_features // self.head_dim
        self.scale: float = attend.scaling
        self.eps: float = module.input_layernorm.variance_epsilon
        weights = {
            "qkv": torch.cat([m.weight for m in (attend.q_proj, attend.k_proj, attend.v_proj)]),
            "o": attend.o_proj.weight,
            "gate_up": torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
            "down": mlp.down_proj.weight,
            "norm": module.input_layernorm.weight,
            "mlp_norm": module.post_attention_layernorm.weight,
        }
        self.norms_heads = hasattr(attend, "q_norm")  # Qwen3's are, Llama's are not
        if self.norms_heads:
            weights |= {"q_norm": attend.q_norm.weight, "k_norm": attend.k_norm.weight}
        for name, weight in weights.items():
            self.register_buffer(name, weight.detach())
        shape = (batch, self.num_kv_heads, num_positions, self.head_dim)
        for name in ("keys", "values"):
            self.register_buffer(
                name, torch.zeros(shape, dtype=self.qkv.dtype, device=self.qkv.device)
            )

    def _heads(self, x_BTH: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [B, Hq, T, D], rotated keys and values [B, Hkv, T, D]."""
        normed = rms_norm(x_BTH, x_BTH.shape[-1:], self.norm, self.eps)
        heads = linear(normed, self.qkv).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.norms_heads:
            shape = (self.head_dim,)
            q = rms_norm(q, shape, self.q_norm, self.eps)
            k = rms_norm(k, shape, self.k_norm, self.eps)
        return _rotate(q, cos, sin), _rotate(k, cos, sin), v

    def _finish(self, x_BTH: Tensor, mixed: Tensor) -> Tensor:
        """Output projection and MLP after attention; ``mixed`` is [B, Hq, T, D]."""
        x_BTH = x_BTH + linear(mixed.transpose(1, 2).flatten(2), self.o)
        normed = rms_norm(x_BTH, x_BTH.shape[-1:], self.mlp_norm, self.eps)
        gate, up = linear(normed, self.gate_up).chunk(2, dim=-1)
        return x_BTH + linear(silu(gate) * up, self.down)

    def prefill(self, x_BPH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self._heads(x_BPH, cos, sin)
        num = x_BPH.shape[1]
        self.keys[:, :, :num], self.values[:, :, :num] = k, v
        is_grouped = self.num_heads != self.num_kv_heads
        mixed = scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=is_grouped
        )
        return self._finish(x_BPH, mixed)

    def forward(
        self, x_B1H: Tensor, cos: Tensor, sin: Tensor, position: Tensor, at: Tensor
    ) -> Tensor:
        q, k, v = self._heads(x_B1H, cos, sin)
        self.keys.index_copy_(2, position, k)
        self.values.index_copy_(2, position, v)
        return self._finish(x_B1H, self._attend(q, position, at))

    def _attend(self, q_BHq1D: Tensor, position: Tensor, at: Tensor) -> Tensor:
        seen = at <= position
        # The query heads of a group become rows of one head, so that no key is read twice.
        q = q_BHq1D.unflatten(1, (self.num_kv_heads, -1)).squeeze(3)  # [B, Hkv, G, D]
        scores = (q @ self.keys.transpose(-1, -2)).float() * self.scale
        scores = scores.masked_fill(~seen, -torch.inf)
        mixed = scores.softmax(dim=-1).to(q.dtype) @ self.values
        return mixed.flatten(1, 2)[:, :, None]


class CompiledLoop(nn.Module):
    """Greedy decoding at one batch size and one length. Uses the model's weights; merged
    projections are a second copy."""

    cos: Tensor
    sin: Tensor
    ids: Tensor
    position: Tensor
    answer: Tensor
    head: Tensor
    at: Tensor

    def __init__(
        self,
        model: Any,
        batch: int,
        num_positions: int,
        options: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            model: a Qwen3ForCausalLM.
            options: options for torch.compile; ``None``: the step is not compiled.
        """
        super().__init__()
        decoder = model.model
        device = decoder.embed_tokens.weight.device
        self.layers = nn.ModuleList(_Layer(layer, batch, num_positions) for layer in decoder.layers)
        self.eps: float = decoder.norm.variance_epsilon
        at = torch.arange(num_positions, device=device)
        cos, sin = decoder.rotary_emb(decoder.embed_tokens.weight[:1], at[None])
        buffers = {
            "embed": decoder.embed_tokens.weight.detach(),
            "norm": decoder.norm.weight.detach(),
            "head": model.lm_head.weight.detach(),
            "cos": cos[0],
            "sin": sin[0],
            "at": at,
            "ids": torch.zeros(batch, 1, dtype=torch.int64, device=device),
            "position": torch.zeros(1, dtype=torch.int64, device=device),
            "answer": torch.zeros(batch, num_positions, dtype=torch.int64, device=device),
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer.clone() if name in ("cos", "sin") else buffer)
        self._step: Callable[[], None] = self._eager_step
        if options is not None:
            self._step = torch.compile(
                self._eager_step, fullgraph=True, dynamic=False, options=options
            )
        self._graph: torch.cuda.CUDAGraph | None = None

    def _eager_step(self) -> None:
        """Decode one token per request from ``ids`` at ``position``, and advance both."""
        x = embedding(self.ids, self.embed)
        cos, sin = self.cos[self.position], self.sin[self.position]
        for layer in self.layers:
            x = layer(x, cos, sin, self.position, self.at)
        self._emit(x)
        self.position.add_(1)

    def _emit(self, x_BTH: Tensor) -> None:
        normed = rms_norm(x_BTH[:, -1:], x_BTH.shape[-1:], self.norm, self.eps)
        self.ids.copy_(linear(normed, self.head).argmax(dim=-1))
        self.answer.index_copy_(1, self.position, self.ids)

    @torch.no_grad()
    def prepare(self) -> None:
        """Compile the step and, on a GPU, capture it. Overwrites the cache and the answers."""
        self.position.zero_()
        if not self.head.is_cuda:
            self._step()
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may use the device: capture only the work of this thread.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._step()

    @torch.no_grad()
    def prefill(self, ids_BP: Tensor) -> None:
        """Prefill prompts of one length and compute the first token of each answer."""
        num = ids_BP.shape[1]
        x = embedding(ids_BP, self.embed)
        cos, sin = self.cos[:num], self.sin[:num]
        for layer in self.layers:
            x = layer.prefill(x, cos, sin)  # type: ignore[operator]
        self.position.fill_(num - 1)
        self._emit(x)
        self.position.add_(1)

    @torch.no_grad()
    def decode(self, num_steps: int) -> None:
        """Decode ``num_steps`` more tokens of every request."""
        step = self._graph.replay if self._graph is not None else self._step
        for _ in range(num_steps):
            step()

    def generate(self, ids_BP: Tensor, num_new: int) -> list[list[int]]:
        """Greedy answers of ``num_new`` tokens each."""
        first = ids_BP.shape[1] - 1
        self.prefill(ids_BP)
        self.decode(num_new - 1)
        found: list[list[int]] = self.answer[:, first : first + num_new].tolist()
        return found


COMPILE_OPTIONS: dict[str, Any] = {"coordinate_descent_tuning": True}
"""Options for torch.compile. It captures no graph, because one is captured around the step.
Coordinate descent also turns a one-row product into a reduction, the source of gpt-fast's speed at
batch 1."""
