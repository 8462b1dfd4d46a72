"""Day-0 weights from the target: the drafter's layer begins as the target's last one.

The rows of the drafter are not those of the target: beside the hidden state of the position before,
they hold the token's embedding. What is copied therefore reads the hidden half alone, and learning
finds what the embedding adds.

Shapes as in ``drafters.eagle3.model``.
"""

from __future__ import annotations

import torch

from drafters.eagle3.model import Eagle3
from targets.last_layer import LastLayer


@torch.no_grad()
def imitate(model: Eagle3, last: LastLayer) -> None:
    """Overwrite a new model's layer with the target's last one; its lm_head stays.

    ``fc`` passes the last tapped layer through. Queries, keys and values read the hidden half, with
    zeros on the embedding's. Queries and keys stay random if the target normalises them per head.
    """
    c, hidden = model.config, model.config.hidden_size
    model.fc.weight.zero_()
    model.fc.weight[:, -hidden:].copy_(torch.eye(hidden))
    sizes = [n * c.head_dim for n in (c.num_heads, c.num_kv_heads, c.num_kv_heads)]
    q, k, v = torch.split(model.qkv_proj.weight, sizes)
    if last.qk is not None:
        for rows, given in zip((q, k), last.qk, strict=True):
            rows.zero_()
            rows[:, hidden:].copy_(given)
    v.zero_()
    v[:, hidden:].copy_(last.v)
    model.o_proj.weight.copy_(last.o)
    model.gate_up_proj.weight.copy_(last.gate_up)
    model.down_proj.weight.copy_(last.down)
    model.hidden_norm.weight.copy_(last.attention_norm_H)
    model.post_attention_layernorm.weight.copy_(last.mlp_norm_H)
    model.norm.weight.copy_(last.final_norm_H)
