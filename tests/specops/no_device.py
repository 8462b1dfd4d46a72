"""A driver of Triton for kernels that are compiled for an H100 and never run.

Runs in a process of its own, without the interpreter.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class NoDevice:
    """Looks up kernels, loads them nowhere, and counts launches."""

    def __init__(self) -> None:
        self.num_launched = 0
        self.num_loaded = 0
        self.utils = SimpleNamespace(
            get_device_properties=lambda _device: {"max_shared_mem": 1 << 18},
            load_binary=self._load,
        )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, _source: Any, _metadata: Any) -> Any:
        return self._launch

    def _launch(self, *_: Any) -> None:
        self.num_launched += 1

    def _load(self, *_: Any) -> tuple[Any, int, int, int, int]:
        self.num_loaded += 1
        return object(), 1, 0, 0, 1024


def use_no_device() -> NoDevice:
    """From now on, launches of this process are only counted."""
    found = NoDevice()
    driver.set_active(found)
    return found
