"""The Llama family."""

from __future__ import annotations

from transformers.models.llama import modeling_llama

from targets.layers import llama_like

FAMILY = llama_like(modeling_llama, "Llama")
