"""Modules that hold the weights of Llama's likes for ``FusedDecoder``, without ``transformers``.

They are named and shaped as the library's are, so that a checkpoint's tensors fit, and have no
``forward``: only ``FusedDecoder`` computes them. A checkpoint whose tensors are not exactly those
of its config is left to the library, which knows more layouts and what to say about damaged ones.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from targets.head import tensor_files
from targets.layers import Family, llama_layer
from targets.own_config import FAMILIES, OwnConfig, OwnFamily, own_eos_ids


class OwnLinear(nn.Linear):
    """A product whose weight is read from a file. Initial values on the meta device, which nobody
    needs, would import the compiler's tables: 3 s of a core."""

    def reset_parameters(self) -> None:
        """Nothing."""


class OwnNorm(nn.Module):
    """The weight of an RMSNorm."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.variance_epsilon = epsilon


class OwnRotary(nn.Module):
    """The frequencies of a rotary embedding."""

    def __init__(self, config: OwnConfig, device: torch.device) -> None:
        super().__init__()
        self.rope_type: str = config.rope_parameters["rope_type"]
        self.attention_scaling = 1.0
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", frequencies(config).to(device), persistent=False)


class OwnAttention(nn.Module):
    """The products and norms of an attention."""

    def __init__(self, config: OwnConfig, family: OwnFamily) -> None:
        super().__init__()
        size, self.head_dim = config.hidden_size, head_dim_of(config)
        self.scaling = self.head_dim**-0.5
        width, narrow = (
            n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = OwnLinear(size, width, bias=family.has_qkv_bias)
        self.k_proj = OwnLinear(size, narrow, bias=family.has_qkv_bias)
        self.v_proj = OwnLinear(size, narrow, bias=family.has_qkv_bias)
        self.o_proj = OwnLinear(width, size, bias=False)
        if family.has_head_norms:
            self.q_norm = OwnNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = OwnNorm(self.head_dim, config.rms_norm_eps)


class OwnMlp(nn.Module):
    """The products of an MLP."""

    def __init__(self, config: OwnConfig) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = OwnLinear(size, inner, bias=False)
        self.up_proj = OwnLinear(size, inner, bias=False)
        self.down_proj = OwnLinear(inner, size, bias=False)


class OwnLayer(nn.Module):
    """A decoder layer."""

    def __init__(self, config: OwnConfig, family: OwnFamily) -> None:
        super().__init__()
        self.self_attn = OwnAttention(config, family)
        self.mlp = OwnMlp(config)
        self.input_layernorm = OwnNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = OwnNorm(config.hidden_size, config.rms_norm_eps)


class OwnDecoder(nn.Module):
    """Embedding, layers and the norm behind them."""

    def __init__(self, config: OwnConfig, family: OwnFamily) -> None:
        super().__init__()
        shape = (config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(*shape, _weight=torch.empty(shape))  # see ``OwnLinear``
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(OwnLayer(config, family) for _ in layers)
        self.norm = OwnNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb: OwnRotary


class OwnCausalLM(nn.Module):
    """A causal LM: what ``targets.target.Target`` asks of a model, less the forward pass."""

    def __init__(self, config: OwnConfig) -> None:
        super().__init__()
        self.config = config
        self.generation_config = SimpleNamespace(eos_token_id=None)
        self.model = OwnDecoder(config, FAMILIES[config.model_type])
        self.lm_head = OwnLinear(config.hidden_size, config.vocab_size, bias=False)

    def get_decoder(self) -> OwnDecoder:
        return self.model

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head


FAMILY = Family(
    OwnCausalLM,
    norms=(),  # nothing but ``FusedDecoder`` computes them
    why_not=lambda _model: None,
    layer=llama_layer,
)


def load_own_model(
    folder: Path, config: OwnConfig, dtype: torch.dtype, device: torch.device
) -> OwnCausalLM | None:
    """The causal LM in a folder; ``None`` if its tensors are not exactly those of its config.

    Every tensor is copied: the model does not depend on the files once it is loaded.

    Args:
        config: from ``read_own_config`` of the same folder.

    Raises:
        ValueError: the generation config cannot be read.
    """
    with torch.device("meta"):
        model = OwnCausalLM(config)
    wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    found = _read_all(folder, wanted, dtype, device)
    if found is None:
        return None
    if config.tie_word_embeddings:
        found["lm_head.weight"] = found["model.embed_tokens.weight"]
    for name, parameter in found.items():
        path, _, kind = name.rpartition(".")
        setattr(model.get_submodule(path), kind, parameter)
    model.model.rotary_emb = OwnRotary(config, device)
    model.generation_config.eos_token_id = own_eos_ids(folder, config)
    return model


def _read_all(
    folder: Path, wanted: dict[str, torch.Size], dtype: torch.dtype, device: torch.device
) -> dict[str, nn.Parameter] | None:
    """Parameters by name; ``None`` if the files hold others or other shapes."""
    files = tensor_files(folder)
    if files.keys() != wanted.keys():
        return None
    found = {}
    for path in sorted(set(files.values())):
        with safe_open(path, framework="pt") as opened:
            names = [name for name, file in files.items() if file == path]
            for name in names:
                tensor: Tensor = opened.get_tensor(name)
                if tensor.shape != wanted[name] or not tensor.is_floating_point():
                    return None
                copy = tensor.to(device, dtype, copy=True)
                found[name] = nn.Parameter(copy, requires_grad=False)
    return found


def head_dim_of(config: OwnConfig) -> int:
    """Size of a head; Qwen2's configs leave it to the width of the model."""
    size = getattr(config, "head_dim", None)
    return int(size or config.hidden_size // config.num_attention_heads)


def frequencies(config: OwnConfig) -> Tensor:
    """[D / 2] float32 on the CPU, the frequencies that Hugging Face computes, bit for bit."""
    rope, size = config.rope_parameters, head_dim_of(config)
    inv_freq = 1.0 / (rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float) / size))
    return _stretched(inv_freq, rope) if rope["rope_type"] == "llama3" else inv_freq


def _stretched(inv_freq: Tensor, rope: dict[str, Any]) -> Tensor:
    """Frequencies of Llama 3.1: long waves are stretched by a factor, short ones stay, and those
    between are interpolated. The order of operations decides the last bit."""
    factor, low, high = (rope[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
    before = rope["original_max_position_embeddings"]
    longest, shortest = before / low, before / high
    wave = 2 * math.pi / inv_freq
    stretched = torch.where(wave > longest, inv_freq / factor, inv_freq)
    share = (before / wave - low) / (high - low)
    between = (1 - share) * stretched / factor + share * stretched
    is_between = ~(wave < shortest) * ~(wave > longest)
    return torch.where(is_between, between, stretched)
