"""What the metadata of a GGUF file say about its model: its configuration and its weights' shapes.

Llama's likes are described here, without ``transformers``, if the file says all that matters;
everything else is left to the library. Both say the same, byte for byte, which tests compare.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from targets.own_config import FAMILIES, OwnConfig, read_own_config, shapes_of

SHAPE = {
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
"""Metadata of an architecture -> field of its configuration."""
_MODEL_TYPES = {"gemma3": "gemma3_text"}
"""Architectures that ``transformers`` calls otherwise."""
_LLAMA3_FACTORS = (8.0, 32.0)
"""Scalings of Llama 3.1 and 3.2; the other constants are the same in both."""

_SAME = {
    "attention_dropout": 0.0, "dtype": "bfloat16", "hidden_act": "silu", "initializer_range": 0.02,
    "use_cache": True,
}  # fmt: skip
_LIKE_QWEN = {"max_window_layers": 28, "sliding_window": None, "use_sliding_window": False}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
    "qwen2": _LIKE_QWEN,
    "qwen3": {"attention_bias": False, **_LIKE_QWEN},
}
"""By architecture, what ``transformers`` (5.17) says in a configuration although no file does."""
_SAID = frozenset(SHAPE.values()) - {"sliding_window"}
"""What a file must say to be described here."""


@dataclass(frozen=True, slots=True)
class Described:
    """The model of a GGUF file."""

    config: dict[str, Any]
    """Its config.json."""
    shapes: dict[str, tuple[int, ...]]
    """Shape of each weight, by its name in the model; a head that is tied has none."""
    model_class: str
    head_dim: int


def described(
    metadata: Mapping[str, Any], divisors: np.ndarray | None, *, is_tied: bool
) -> Described:
    """The model that metadata describe.

    Args:
        divisors: [head_dim / 2] float64, what rotary frequencies are divided by; ``None``: nothing.
        is_tied: its lm_head is the embedding.

    Raises:
        ValueError: the frequencies are scaled otherwise than in Llama 3.
    """
    said = _said(metadata, is_tied)
    own = _described_here(metadata["general.architecture"], said, divisors)
    return own or _described_by_library(metadata["general.architecture"], said, divisors)


def _said(metadata: Mapping[str, Any], is_tied: bool) -> dict[str, Any]:
    architecture = metadata["general.architecture"]
    found = {field: metadata.get(f"{architecture}.{name}") for name, field in SHAPE.items()}
    said = {field: value for field, value in found.items() if value is not None}
    if "head_dim" not in said:
        said["head_dim"] = said["hidden_size"] // said["num_attention_heads"]
    special = {"bos": "bos", "eos": "eos", "pad": "padding"}
    ids = {
        f"{name}_token_id": metadata.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in special.items()
    }
    vocab_size = len(metadata["tokenizer.ggml.tokens"])
    return {**said, **ids, "vocab_size": vocab_size, "tie_word_embeddings": is_tied}


def _described_here(
    architecture: str, said: Mapping[str, Any], divisors: np.ndarray | None
) -> Described | None:
    """``None``: it must be left to ``transformers``."""
    family = FAMILIES.get(architecture)
    if family is None or not said.keys() >= _SAID or "sliding_window" in said:
        return None
    fields = dict(said)
    theta = fields.pop("rope_theta")
    rope = {"rope_theta": theta, "rope_type": "default"}
    if divisors is not None:
        rope = _scaled(theta, fields["head_dim"], divisors)
    fields |= {"model_type": architecture, "architectures": [family.model_class]}
    fields |= {"rope_parameters": rope, **_SAME, **_DEFAULTS[architecture]}
    if family.may_slide:
        fields["layer_types"] = ["full_attention"] * fields["num_hidden_layers"]
    config = _checked(fields)
    if config is None:
        return None
    return Described(fields, shapes_of(config), family.model_class, fields["head_dim"])


def _checked(fields: Mapping[str, Any]) -> OwnConfig | None:
    """What a server makes of the configuration, if that is our own affair."""
    with TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(fields))
        return read_own_config(Path(folder))


def _scaled(theta: float, head_dim: int, divisors: np.ndarray) -> dict[str, Any]:
    """The scaling of rotary frequencies that divides them so."""
    plain = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    for factor in _LLAMA3_FACTORS:
        rope = _llama3(theta, factor)
        if np.allclose(plain / _stretched(plain, rope), divisors, rtol=1e-3):
            return rope
    raise _unknown_scaling()


def _llama3(theta: float, factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _stretched(plain: np.ndarray, rope: Mapping[str, Any]) -> np.ndarray:
    """Frequencies of Llama 3.1: long waves are stretched by a factor, short ones stay, and those
    between are interpolated."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * plain / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    found: np.ndarray = share * plain + (1 - share) * plain / rope["factor"]
    return found


def _unknown_scaling() -> ValueError:
    return ValueError(
        "its rotary frequencies (rope_freqs.weight) are scaled otherwise than in Llama 3; name a "
        "folder with its safetensors"
    )


def _described_by_library(
    architecture: str, said: Mapping[str, Any], divisors: np.ndarray | None
) -> Described:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(_MODEL_TYPES.get(architecture, architecture), **said)
    if divisors is not None:
        config = copy.deepcopy(config)
        theta = config.rope_parameters["rope_theta"]
        config.rope_parameters = _scaled(theta, config.head_dim, divisors)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.bfloat16
        )
    model.tie_weights()
    model.config.architectures = [type(model).__name__]
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    with TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        fields = json.loads(Path(folder, "config.json").read_text())
    del fields["transformers_version"]  # the same whatever version converts the file
    return Described(fields, shapes, type(model).__name__, config.head_dim)
