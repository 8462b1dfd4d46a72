"""Tiny random models as GGUF files, written as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from oracles.support import EOS, tiny_tokenizer

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 2.0**-17,
}
LLAMA = {"head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0}}
QWEN = {"rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0}}
MODELS: dict[str, Any] = {
    "llama": (LlamaForCausalLM, LlamaConfig, LLAMA),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, QWEN),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 128, **QWEN}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {"head_dim": 32, "sliding_window": 16}),
}
"""``general.architecture`` -> class, configuration, and what it has beside ``SHAPE``."""


def random_source(architecture: str, *, tied: bool = True, seed: int = 0) -> Any:
    """A model whose weights bfloat16 holds exactly, large enough that its best tokens are far
    apart."""
    make, make_config, own = MODELS[architecture]
    tokenizer = tiny_tokenizer()
    config = make_config(
        vocab_size=len(tokenizer),
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(EOS),
        **SHAPE,
        **own,
    )
    torch.manual_seed(seed)
    model = make(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # eighths, so that adding and subtracting one is exact
                parameter.copy_(torch.randint(4, 12, parameter.shape) / 8)
            else:
                parameter.normal_(std=0.3).copy_(parameter.bfloat16())
    return model


def write_gguf(
    file: Path,
    model: Any,
    *,
    fields: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    without: str | None = None,
    stored_as: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> Path:
    """Write a model and ``tiny_tokenizer`` as a GGUF file.

    Args:
        fields: further metadata, or in place of what the model has.
        tensors: further tensors.
        without: a tensor to leave out.
        stored_as: type of the matrices; vectors are float32.
    """
    architecture = _architecture(model)
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in {**_fields(model, architecture), **(fields or {})}.items():
        _add(writer, key, value)
    for name, array in {**_tensors(model, architecture), **(tensors or {})}.items():
        if name != without:
            kind = stored_as if array.ndim == 2 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _architecture(model: Any) -> str:
    (name,) = (name for name, (make, _, _) in MODELS.items() if type(model) is make)
    return str(name)


def _fields(model: Any, architecture: str) -> dict[str, Any]:
    """Metadata of a model and of the tokenizer."""
    config, tokenizer = model.config, tiny_tokenizer()
    theta = config.rope_parameters.get("full_attention", config.rope_parameters)["rope_theta"]
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    shape = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(theta),
        "rope.dimension_count": head_dim,
    }
    if architecture == "gemma3":
        shape["attention.sliding_window"] = config.sliding_window
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    end = tokens.index(EOS)
    parts = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return {
        **{f"{architecture}.{key}": value for key, value in shape.items()},
        "general.name": "tiny",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if n == end else 1 for n in range(len(tokens))],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in parts["merges"]],
        "tokenizer.ggml.bos_token_id": tokens.index("A"),  # another one than the end token
        "tokenizer.ggml.eos_token_id": end,
        "tokenizer.ggml.padding_token_id": end,
        "tokenizer.chat_template": tokenizer.chat_template,
    }


def _tensors(model: Any, architecture: str) -> dict[str, np.ndarray]:
    (number,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)
    found = {}
    for name, parameter in model.named_parameters():
        stem, _, ending = name.rpartition(".")
        array = parameter.detach().float().numpy()
        if architecture == "gemma3" and "norm" in name:
            array = array + 1
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            array = _interleaved(array, model.config.head_dim)
        found[f"{names.get_name(stem)}.{ending}"] = np.ascontiguousarray(array)
    return found


def _interleaved(array: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of each head in the order that llama.cpp rotates: pairs side by side."""
    heads = array.reshape(-1, 2, head_dim // 2, *array.shape[1:])
    return heads.swapaxes(1, 2).reshape(array.shape)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)
