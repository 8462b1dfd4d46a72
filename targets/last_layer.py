"""The target's last decoder layer, read from its files: what a drafter's own layer may start from.

Shapes: H hidden, Hq/Hkv query/key heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from targets.config import load_config
from targets.head import read_tensor, tensor_files

_LIKE_LLAMA = ("llama", "qwen3", "qwen2", "mistral")
"""Model types whose layers have Llama's products and norms."""


class NormedQK(NamedTuple):
    """Products of queries and keys that are normalised per head, and these norms."""

    q: Tensor
    """[Hq * D, H]"""
    k: Tensor
    """[Hkv * D, H]"""
    q_norm_D: Tensor
    k_norm_D: Tensor


@dataclass(frozen=True, slots=True)
class LastLayer:
    """Weights of the last decoder layer and the norm behind it, on the CPU in the files' dtype."""

    attention_norm_H: Tensor
    qk: tuple[Tensor, Tensor] | None
    """[Hq * D, H] and [Hkv * D, H]; ``None`` if queries and keys are normalised per head, which a
    layer without such norms cannot imitate."""
    normed_qk: NormedQK | None
    """The same if they are; otherwise ``None``."""
    v: Tensor
    """[Hkv * D, H]"""
    o: Tensor
    """[H, Hq * D]"""
    mlp_norm_H: Tensor
    gate_up: Tensor
    """[2 * intermediate size, H]: rows of the gate, then of ``up``."""
    down: Tensor
    final_norm_H: Tensor


def load_last_layer(folder: Path) -> LastLayer:
    """Read the last decoder layer of the target in ``folder``.

    Raises:
        ValueError: its layers are not Llama's, or a tensor is not in its safetensors files or holds
            NaN or infinity.
    """
    config = load_config(folder).get_text_config()
    if config.model_type not in _LIKE_LLAMA:
        raise ValueError(
            f"the target in {folder} is a {config.model_type}: only layers like Llama's can be "
            f"copied ({', '.join(_LIKE_LLAMA)})"
        )
    files = tensor_files(folder)
    prefix = f"model.layers.{config.num_hidden_layers - 1}."

    def read(name: str, before: str = prefix) -> Tensor:
        wanted = f"{before}{name}.weight"
        found = [full for full in files if full.endswith(wanted)]
        tensor = read_tensor(files, found[0] if found else wanted, folder)
        if not tensor.isfinite().all():
            raise ValueError(f"{wanted} of the target in {folder} holds NaN or infinity")
        return tensor

    qk = read("self_attn.q_proj"), read("self_attn.k_proj")
    normed = None
    if f"{prefix}self_attn.q_norm.weight" in files:
        normed = NormedQK(*qk, read("self_attn.q_norm"), read("self_attn.k_norm"))
    return LastLayer(
        attention_norm_H=read("input_layernorm"),
        qk=qk if normed is None else None,
        normed_qk=normed,
        v=read("self_attn.v_proj"),
        o=read("self_attn.o_proj"),
        mlp_norm_H=read("post_attention_layernorm"),
        gate_up=torch.cat((read("mlp.gate_proj"), read("mlp.up_proj"))),
        down=read("mlp.down_proj"),
        final_norm_H=read("norm", before="model."),
    )
