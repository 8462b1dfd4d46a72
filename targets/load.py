"""From the name of a target to its model, tokenizer, device and dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA when there is one. Raises ValueError when CUDA is asked for and missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but no CUDA device is available; use cpu or auto")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is float32 on a CPU and bfloat16 on a GPU."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def target_folder(target: str) -> Path:
    """Folder of a target: the path itself, or the local snapshot of a Hugging Face id."""
    path = Path(target)
    if path.is_dir():
        return path
    if path.is_absolute() or target.startswith("."):
        raise ValueError(f"target {target!r} is not a folder")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(target, allow_patterns=patterns))
    except Exception as error:
        raise ValueError(
            f"target {target!r} is neither a folder here nor a Hugging Face id that can be "
            f"loaded ({type(error).__name__}: {error})"
        ) from error


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The causal LM in ``folder``: safetensors only, no code from the folder is run."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
    )
    return model.to(device)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in ``folder``."""
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
