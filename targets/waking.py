"""Wakes a GPU while other things are imported: its context and libraries take about a second, most
of it without Python."""

from __future__ import annotations

import logging
import threading

import torch

log = logging.getLogger(__name__)


def wake(device: torch.device) -> threading.Thread:
    """Begin to make the context of a GPU, on another thread, which ends at once for a CPU. To be
    joined before programs are captured: a capture forbids what the thread does."""
    thread = threading.Thread(target=_use, args=(device,), name="waking", daemon=True)
    thread.start()
    return thread


def _use(device: torch.device) -> None:
    if device.type != "cuda":
        return
    try:
        with torch.inference_mode():
            one = torch.ones((16, 16), dtype=torch.bfloat16, device=device)
            torch.nn.functional.linear(one, one)
            torch.cuda.synchronize(device)
    except RuntimeError:  # whoever needs the device says what is wrong with it
        log.debug("the device cannot be woken", exc_info=True)
