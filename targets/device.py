"""The device of a process, from its setting."""

from __future__ import annotations

import os
import re

import torch

from configs.choices import SettingsError

_DEVICE = re.compile(r"auto|cpu|cuda(?::([0-9]{1,4}))?")
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_only: int | None = None
"""The GPU that this process has been confined to, as numbered before."""


def check_device(name: str, setting: str = "device") -> None:
    """Whether this can be the name of a device, on whatever host.

    Raises:
        SettingsError: it cannot.
    """
    if not _DEVICE.fullmatch(name):
        raise SettingsError(f"{setting} must be auto, cpu, cuda or cuda:N, got {name!r}")


def pick_device(name: str, setting: str = "device", *, further: int = 0) -> torch.device:
    """Device from its setting; ``auto`` is CUDA if available, else the CPU.

    A process that is to use another GPU than the first one sees no other from then on, and calls
    it the first: Triton kernels and CUDA graphs run on a thread's current device, which is the
    first one in each new thread.

    Args:
        setting: name of the setting, for the error message.
        further: added to the number of the GPU.

    Raises:
        SettingsError: there is no such device, or CUDA is requested but not available; or this
            process uses another GPU already.
    """
    check_device(name, setting)
    if name == "cpu":
        return torch.device("cpu")
    index = int(name.partition(":")[2] or 0) + further
    # Before anything initializes CUDA, which is when it reads the variable.
    if index and torch.cuda.device_count():
        process = f" and this is process {further} of its host" if further else ""
        _see_only(index, f"{setting} is {name!r}{process}")
    has_cuda = torch.cuda.is_available()
    if name == "auto" and not has_cuda:
        return torch.device("cpu")
    if not has_cuda:
        raise SettingsError(
            f"{setting} is {name!r}, but no CUDA device is available; set it to cpu or auto"
        )
    return torch.device("cuda")


def hardware_of(device: torch.device) -> str:
    """``cpu``, or the name that a GPU has for all processes: ``GPU-`` and its UUID."""
    if device.type != "cuda":
        return device.type
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def _see_only(index: int, asked: str) -> None:
    global _only
    if _only == index:
        return
    if _only is not None:
        raise SettingsError(f"{asked}, but this process uses GPU {_only} already")
    num = torch.cuda.device_count()
    if index >= num:
        raise SettingsError(f"{asked}, but the CUDA devices here are 0..{num - 1}")
    visible = os.environ.get(_VISIBLE)
    names = visible.split(",") if visible else [str(n) for n in range(num)]
    os.environ[_VISIBLE] = names[index]
    if torch._C._cuda_getDeviceCount() != 1:
        os.environ[_VISIBLE] = ",".join(names)
        raise SettingsError(f"{asked}, but this process uses other GPUs already")
    _only = index
