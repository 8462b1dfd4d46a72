"""What ``oracles.forked`` imports once for all processes that it forks: packages of others only, so
that a forked process may run any copy of our own rooms."""

import gc

import fastapi  # noqa: F401
import numba  # noqa: F401
import prometheus_client  # noqa: F401
import safetensors.torch  # noqa: F401
import torch  # noqa: F401
import triton  # noqa: F401
import typer  # noqa: F401
import uvicorn  # noqa: F401
from transformers import (  # noqa: F401
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.models.llama import modeling_llama  # noqa: F401
from transformers.models.qwen3 import modeling_qwen3  # noqa: F401

# A collection in a forked process would traverse all of them, and copy their pages.
gc.collect()
gc.freeze()
