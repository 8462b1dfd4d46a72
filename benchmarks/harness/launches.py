"""Counts what a GPU would be given to do, on a machine without one.

Within ``counted`` tensors on the meta device choose kernels as tensors on a GPU do. A launch of a
kernel is counted and does nothing; an operation of torch is counted unless it only makes a view or
allocates memory. Nothing is computed, so code that reads a value cannot be counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor
from triton.runtime.jit import JITFunction

_ALLOCATIONS = ("empty", "new_empty", "_unsafe_view", "lift_fresh")
"""What names of operations that launch nothing begin with, besides those of views."""


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count launches by the name of the kernel or of torch's operation."""
    found: Counter[str] = Counter()

    def launch(kernel: Any, *_: Any, **__: Any) -> None:
        found[kernel.fn.__name__] += 1

    norm = torch.nn.functional.rms_norm

    def one_norm(*arguments: Any, **options: Any) -> torch.Tensor:
        """One launch on a GPU; several operations on the meta device."""
        found["rms_norm"] += 1
        with _disable_current_modes():  # type: ignore[no-untyped-call]
            return norm(*arguments, **options)

    is_on_gpu = property(lambda tensor: tensor.device.type == "meta")
    with (
        patch.object(torch.Tensor, "is_cuda", is_on_gpu),
        patch.object(torch.nn.functional, "rms_norm", one_norm),
        patch.object(JITFunction, "run", launch),
        patch.object(GridExecutor, "__call__", launch),
        torch.no_grad(),
        _Operations(found),
    ):
        yield found


class _Operations(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(_ALLOCATIONS):
            self._found[name] += 1
        return func(*args, **(kwargs or {}))
