"""The Qwen2 and Qwen2.5 family: Llama's layers with biases of queries, keys and values."""

from __future__ import annotations

from transformers.models.qwen2 import modeling_qwen2

from targets.layers import llama_like

FAMILY = llama_like(modeling_qwen2, "Qwen2")
