"""The Mistral family: Llama's layers, whose attention may slide over a window."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers.models.mistral import modeling_mistral

from targets.layers import Layer, llama_layer, llama_like


def layer(module: Any, by_columns: bool) -> Layer:
    """The weights of a decoder layer; all have the window of the model's config."""
    found = llama_layer(module, by_columns)
    return replace(found, window=module.self_attn.config.sliding_window)


FAMILY = replace(llama_like(modeling_mistral, "Mistral"), layer=layer)
