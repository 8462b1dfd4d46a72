"""Published model shapes, and models of those shapes with random weights.

Speed does not depend on the values of weights, but the acceptance rate does; where it matters,
``predictable.py`` forces it. Imports nothing of the project, so that ``side.py`` can use it with
any version of the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

DRAFT_VOCAB = 32_000
"""Size of a drafter's reduced vocabulary for a published shape; at most a quarter of the target's.
At the 8B shape the drafter's weights then take 0.8 GB."""


def _qwen3(hidden: int, inner: int, layers: int, heads: int, tied: bool) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151_936, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, head_dim=128, tie_word_embeddings=tied,
        max_position_embeddings=40_960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip


def _llama_8b() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
        rms_norm_eps=1e-5, max_position_embeddings=131_072,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    )  # fmt: skip


def _smollm2_135m() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, tie_word_embeddings=True,
        rms_norm_eps=1e-5, max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    )  # fmt: skip


def _tiny() -> Qwen3Config:
    return Qwen3Config(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
        max_position_embeddings=4096, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip


def _wide() -> Qwen3Config:
    return Qwen3Config(
        vocab_size=32_000, hidden_size=4096, intermediate_size=12_288, num_hidden_layers=4,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
        max_position_embeddings=4096, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip


SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "Qwen3-0.6B": lambda: _qwen3(1024, 3072, 28, 16, True),
    "Qwen3-1.7B": lambda: _qwen3(2048, 6144, 28, 16, True),
    "Qwen3-8B": lambda: _qwen3(4096, 12_288, 36, 32, False),
    "Llama-3.1-8B": _llama_8b,
    "SmolLM2-135M": _smollm2_135m,
    "tiny": _tiny,
    "wide": _wide,
}
"""``tiny`` is for trying a benchmark on a CPU. ``wide`` has four layers of Qwen3-8B and a small
vocabulary: its drafter takes 0.8 GB in bfloat16, as that of the 8B shape, and two cores decode it.
"""
LARGE = ("Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-8B", "Llama-3.1-8B")
"""Shapes measured on a GPU."""


def random_weights(config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A causal LM with weights drawn on ``device``: normal with std 0.02, norms 1."""
    from transformers import LlamaForCausalLM, Qwen3ForCausalLM

    make = Qwen3ForCausalLM if isinstance(config, Qwen3Config) else LlamaForCausalLM
    with torch.device("meta"):
        model = make(config).to(dtype)
    model.to_empty(device=device)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    draw_weights(model)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def draw_weights(module: torch.nn.Module) -> None:
    """Draw matrices from a normal distribution of std 0.02 and set vectors (norms) to 1."""
    for parameter in module.parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=0.02)


def draft_vocab_size(vocab_size: int) -> int:
    """Size of the drafter's reduced vocabulary for a target with this vocabulary size."""
    return min(DRAFT_VOCAB, vocab_size // 4)


def floor_bytes(config: Any, model: Any, num_keys: int) -> int:
    """Bytes that a decode step in bfloat16 must read: every key and value once, and all weights
    except an untied embedding, of which it reads only single rows.

    Args:
        num_keys: attended positions, summed over requests.
    """
    weights = {p.data_ptr(): p.numel() for p in model.parameters()}
    if not config.tie_word_embeddings:
        del weights[model.model.embed_tokens.weight.data_ptr()]
    per_position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return 2 * (sum(weights.values()) + per_position * num_keys)
