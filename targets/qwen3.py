"""The Qwen3 family: Llama's layers with norms of the query and key heads."""

from __future__ import annotations

from transformers.models.qwen3 import modeling_qwen3

from targets.layers import llama_like

FAMILY = llama_like(modeling_qwen3, "Qwen3")
