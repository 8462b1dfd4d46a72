"""The catalog of target families: the models whose layers our own decoder can compute.

A model that is not listed here runs Hugging Face's own code over our pages: the same results, more
launches.
"""

from __future__ import annotations

import pkgutil
from typing import Any

from targets.layers import Family

FAMILIES = {
    "Gemma3ForCausalLM": "targets.gemma3:FAMILY",
    "LlamaForCausalLM": "targets.llama:FAMILY",
    "MistralForCausalLM": "targets.mistral:FAMILY",
    "OwnCausalLM": "targets.own_model:FAMILY",
    "Qwen2ForCausalLM": "targets.qwen2:FAMILY",
    "Qwen3ForCausalLM": "targets.qwen3:FAMILY",
}
"""Name of a model class -> its ``Family``, imported when a model needs it: those of Hugging Face,
and our own modules, which stand for Llama, Qwen2 and Qwen3."""


def family_of(model: Any) -> Family | None:
    """The family of a model; ``None`` if exactly its class is not listed."""
    row = FAMILIES.get(type(model).__name__)
    if row is None:
        return None
    family: Family = pkgutil.resolve_name(row)
    return family if type(model) is family.model else None
