"""Load a target: device, dtype, folder, model and tokenizer from their settings."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from targets.gguf_cache import converted_folder

GGUF = ".gguf"
"""Ending of the name of a GGUF file."""


def pick_device(name: str, setting: str = "device") -> torch.device:
    """Device from its setting; ``auto`` is CUDA if available, else the CPU.

    Args:
        setting: name of the setting, for the error message.

    Raises:
        ValueError: CUDA is requested but not available.
    """
    has_cuda = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if has_cuda else "cpu")
    if name.startswith("cuda") and not has_cuda:
        raise ValueError(
            f"{setting} is {name!r}, but no CUDA device is available; set it to cpu or auto"
        )
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Dtype from its setting; ``auto`` is float32 on a CPU and bfloat16 on a GPU."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def target_folder(target: str, cache: Path | None = None) -> Path:
    """Folder of a target: the path itself, what a GGUF file was converted into, or the snapshot of
    a Hugging Face id, downloaded if new.

    Args:
        cache: folder of converted GGUF files; ``None``: ``targets.gguf_cache.default_cache()``.

    Raises:
        ValueError: ``target`` is neither a folder, nor a GGUF file or an id that can be loaded.
    """
    path = Path(target)
    if path.is_dir():
        return path
    if path.is_file() or target.endswith(GGUF):
        return converted_folder(path, cache)
    if path.is_absolute() or target.startswith("."):
        raise ValueError(f"target {target!r} is neither a folder nor a GGUF file")
    from huggingface_hub import snapshot_download

    if not sys.stderr.isatty():
        disable_progress_bar()  # type: ignore[no-untyped-call]
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(target, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"target {target!r} is neither a folder, a GGUF file nor a Hugging Face id that can be "
            f"loaded ({type(error).__name__}: {error})"
        ) from error


def target_name(target: str) -> str:
    """Name of a target in the API: the last part of its path or id, without ``.gguf``."""
    return Path(target).absolute().name.removesuffix(GGUF)


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Causal LM in ``folder``; loads safetensors only and runs no code from the folder.

    Shows a progress bar on a terminal only: in a log file it would be control characters.
    """
    if not sys.stderr.isatty():
        disable_progress_bar()  # type: ignore[no-untyped-call]
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
    )
    return model.to(device)


def load_tokenizer(folder: Path) -> Any:
    """Tokenizer in ``folder``; runs no code from the folder."""
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
