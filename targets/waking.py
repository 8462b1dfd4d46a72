"""Wakes a GPU and Triton while other things are imported: most of it needs no Python."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from typing import Any

import torch

log = logging.getLogger(__name__)


def wake(device: torch.device) -> list[threading.Thread]:
    """Begin to make the context of a GPU, with cuBLAS, and Triton's key of itself; nothing for a
    CPU.

    Returns:
        Threads to be joined before programs are captured: a capture forbids what they do.
    """
    if device.type != "cuda":
        return []
    _begin("waking Triton", _hash_triton)
    return [_begin("waking the device", _use, device)]


def _begin(name: str, work: Callable[..., None], *arguments: Any) -> threading.Thread:
    thread = threading.Thread(target=work, args=arguments, name=name, daemon=True)
    thread.start()
    return thread


def _use(device: torch.device) -> None:
    try:
        with torch.inference_mode():
            one = torch.ones((16, 16), dtype=torch.bfloat16, device=device)
            torch.nn.functional.linear(one, one)
            torch.cuda.synchronize(device)
    except RuntimeError:  # whoever needs the device says what is wrong with it
        log.debug("the device cannot be woken", exc_info=True)


def _hash_triton() -> None:
    """Triton reads its library of 400 MB for the key of the first kernel that it looks up, and
    keeps the result. Importing it imports no module that the main thread may be importing."""
    with contextlib.suppress(ImportError):
        from triton.runtime.cache import triton_key

        triton_key()
