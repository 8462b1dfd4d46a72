"""Refuse metadata of a GGUF file that no sound model has, before anything is made of them.

A file may be whole and still say nonsense: that a layer has no heads, that norms add NaN, or that
texts end with a token which the vocabulary lacks. Some of this would only end as another exception,
and the rest would be converted into a target whose answers are NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_COUNTS = (
    "block_count", "context_length", "embedding_length", "feed_forward_length",
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
)  # fmt: skip
_NEEDED = frozenset(_COUNTS) - {"attention.head_count_kv", "attention.key_length"}
_REALS = ("attention.layer_norm_rms_epsilon", "rope.freq_base")
_LARGEST = 1 << 31
"""More of anything than a model has. Larger counts would be multiplied or listed."""
_LISTS = ("tokens", "token_type")
_TOKEN_IDS = tuple(
    f"{role}_token_id" for role in ("bos", "eos", "eot", "eom", "unknown", "padding")
)


def refuse_nonsense(metadata: Mapping[str, Any], num_tensors: int) -> None:
    """
    Args:
        metadata: with an architecture that is known.
        num_tensors: of the file, which bounds its layers.

    Raises:
        ValueError: a value that a model needs is missing or not of its kind, a layer has no
            tensor, or a special token is not in the vocabulary. The text names the first.
    """
    _refuse_shape(metadata, metadata["general.architecture"], num_tensors)
    _refuse_tokens(metadata)


def _refuse_shape(metadata: Mapping[str, Any], architecture: str, num_tensors: int) -> None:
    for field in _COUNTS:
        name = f"{architecture}.{field}"
        value = metadata.get(name)
        if value is None:
            if field in _NEEDED:
                raise ValueError(f"it does not say {name}")
        elif type(value) is not int or not 0 < value < _LARGEST:
            raise ValueError(f"it says {name} = {value!r}; a whole number above 0 is expected")
    layers = metadata[f"{architecture}.block_count"]
    if layers > num_tensors:
        raise ValueError(
            f"it says {architecture}.block_count = {layers}, and has {num_tensors} tensors"
        )
    for field in _REALS:
        name = f"{architecture}.{field}"
        value = metadata.get(name)
        if value is None:
            continue
        if type(value) not in (int, float) or not (math.isfinite(value) and value > 0):
            raise ValueError(f"it says {name} = {value!r}; a finite number above 0 is expected")


def _refuse_tokens(metadata: Mapping[str, Any]) -> None:
    for field in _LISTS:
        if not isinstance(metadata.get(f"tokenizer.ggml.{field}"), list):
            raise ValueError(f"it has no list tokenizer.ggml.{field}")
    size, types = (len(metadata[f"tokenizer.ggml.{field}"]) for field in _LISTS)
    if size != types:
        raise ValueError(f"its tokenizer has {size} tokens, and types of {types}")
    for field in _TOKEN_IDS:
        name = f"tokenizer.ggml.{field}"
        value = metadata.get(name)
        if value is not None and (type(value) is not int or not 0 <= value < size):
            raise ValueError(f"it says {name} = {value!r}, and its vocabulary has {size} tokens")
