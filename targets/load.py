"""Load a target: dtype and model from their settings and its folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from targets.fused import supports
from targets.own_config import OwnConfig
from targets.own_model import load_own_model
from targets.surplus import surplus_of


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Dtype from its setting; ``auto`` is float32 on a CPU and bfloat16 on a GPU."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Causal LM in ``folder``; loads safetensors only and runs no code from the folder.

    Shows a progress bar on a terminal only: in a log file it would be control characters.

    Raises:
        ValueError: a weight of the model is missing, or has another shape than its config says, or
            the model has no place for one.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()  # type: ignore[no-untyped-call]
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,  # an error with all of them follows
        output_loading_info=True,
    )
    model: nn.Module
    model, found = loaded
    if found["mismatched_keys"]:
        name, stored, wanted = sorted(found["mismatched_keys"])[0]
        raise ValueError(
            f"{folder}: {name} has the shape {tuple(stored)}, but by config.json the model needs "
            f"{tuple(wanted)}; weights and config must belong together"
        )
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise ValueError(
            f"{folder} lacks {len(missing)} weights of the model: {', '.join(missing[:3])}; "
            f"weights and config.json must belong together"
        )
    if surplus := surplus_of(found["unexpected_keys"], model.config):
        raise ValueError(
            f"{folder} has {len(surplus)} weights that the model of its config.json has not: "
            f"{surplus[0]}; weights and config.json must belong together"
        )
    return model.to(device)


def load_served_model(
    folder: Path, config: Any, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """The causal LM in ``folder`` for a server: our own modules where our decoder computes it and
    its files are as expected, otherwise that of ``load_model``.

    Args:
        config: from ``load_config`` of the same folder.

    Raises:
        ValueError: see ``load_model``.
    """
    if isinstance(config, OwnConfig):
        own = load_own_model(folder, config, dtype, device)
        if own is not None and supports(own) is None:
            return own
    return load_model(folder, dtype, device)
