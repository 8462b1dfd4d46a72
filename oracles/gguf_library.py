"""A GGUF file's target as ``transformers`` writes it: the definition of ``targets.gguf_convert``.

Weights are unpacked whole, put into the library's model, and saved by it.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGUFReader, dequantize, get_tensor_name_map
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from targets.gguf_convert import ARCHITECTURES
from targets.gguf_tokenizer import tokenizer_of

_SHAPE = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
}


def convert_by_library(file: Path, folder: Path) -> None:
    """Write the target of a GGUF file into an empty folder."""
    reader = GGUFReader(file)
    said = {name: field.contents() for name, field in reader.fields.items()}
    _tokenizer(said).save_pretrained(folder)
    architecture = said["general.architecture"]
    config = _with_frequencies(_config(reader, said), reader)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(_weights(reader, model, architecture), assign=True, strict=False)
    model.tie_weights()
    ends = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    model.generation_config = GenerationConfig(
        bos_token_id=said.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=sorted({said[key] for key in ends if key in said}) or None,
        pad_token_id=said.get("tokenizer.ggml.padding_token_id"),
    )
    model.save_pretrained(folder)
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    del fields["transformers_version"]
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def _tokenizer(said: dict[str, Any]) -> Any:
    ids = {role: said.get(f"tokenizer.ggml.{key}_token_id") for role, key in (
        ("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))}  # fmt: skip
    tokens = said["tokenizer.ggml.tokens"]
    special = {f"{role}_token": None if n is None else tokens[n] for role, n in ids.items()}
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_of(said).backend_tokenizer,
        clean_up_tokenization_spaces=False,
        **special,
    )
    made.chat_template = said.get("tokenizer.chat_template")
    return made


def _config(reader: Any, said: dict[str, Any]) -> Any:
    architecture = said["general.architecture"]
    found = {field: said.get(f"{architecture}.{name}") for name, field in _SHAPE.items()}
    if found["head_dim"] is None:
        found["head_dim"] = found["hidden_size"] // found["num_attention_heads"]
    return AutoConfig.for_model(
        {"gemma3": "gemma3_text"}.get(architecture, architecture),
        **{field: value for field, value in found.items() if value is not None},
        vocab_size=len(said["tokenizer.ggml.tokens"]),
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        bos_token_id=said.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=said.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=said.get("tokenizer.ggml.padding_token_id"),
    )


def _with_frequencies(config: Any, reader: Any) -> Any:
    found = [tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"]
    if not found:
        return config
    theta = config.rope_parameters["rope_theta"]
    plain = theta ** -(torch.arange(0, config.head_dim, 2).double() / config.head_dim)
    for factor in (8.0, 32.0):
        scaled = copy.deepcopy(config)
        scaled.rope_parameters = {
            "rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        }  # fmt: skip
        frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](scaled, torch.device("cpu"))
        divisors = torch.from_numpy(np.array(found[0], np.float64))
        if torch.allclose(plain / frequencies.double(), divisors, rtol=1e-3):
            return scaled
    raise AssertionError("frequencies scaled otherwise than in Llama 3")


def _weights(reader: Any, model: Any, architecture: str) -> dict[str, torch.Tensor]:
    (number,) = (key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(number, model.config.num_hidden_layers)
    places = {}
    for name, _ in model.named_parameters():
        stem, _, ending = name.rpartition(".")
        places[f"{names.get_name(stem)}.{ending}"] = name
    undo, found = ARCHITECTURES[architecture], {}
    for tensor in reader.tensors:
        if tensor.name != "rope_freqs.weight":
            array = dequantize(tensor.data, tensor.tensor_type)
            array = np.array(undo(tensor.name, array, model.config.head_dim))
            found[places[tensor.name]] = torch.from_numpy(array).to(torch.bfloat16)
    return found
