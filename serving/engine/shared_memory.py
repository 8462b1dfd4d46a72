"""Memory that other processes can map, and that a device can write to."""

from __future__ import annotations

import mmap
import os
import weakref

import torch
from torch import Tensor

_PORTABLE_AND_MAPPED = 1 | 2  # cudaHostRegisterPortable, cudaHostRegisterMapped


def can_share() -> bool:
    """Whether the system has such memory."""
    return hasattr(os, "memfd_create")


class SharedMemory:
    """Bytes without a name in any file system: who is given the descriptor can map them, and they
    are gone with the last process that did."""

    def __init__(self, num_bytes: int, *, is_pinned: bool = False) -> None:
        """
        Args:
            is_pinned: a GPU writes to it.

        Raises:
            OSError: the system has no such memory, or the driver cannot pin it.
        """
        if not can_share():
            raise OSError("this system has no memory without a name (memfd_create)")
        self.descriptor = os.memfd_create("slipstream-rows")
        try:
            os.ftruncate(self.descriptor, num_bytes)
            self.bytes: Tensor = torch.frombuffer(
                mmap.mmap(self.descriptor, num_bytes), dtype=torch.uint8
            )
            """[num_bytes] uint8."""
            if is_pinned:
                _pin(self.bytes)
        except BaseException:
            os.close(self.descriptor)  # or what the driver touched would never be given back
            raise
        if is_pinned:
            # Other memory that is mapped at this address later could not be pinned.
            end = weakref.finalize(self, _unpin, self.bytes)
            end.atexit = False


def _pin(memory: Tensor) -> None:
    """
    Raises:
        OSError: the driver refused.
    """
    cuda = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    code = cuda.cudaHostRegister(memory.data_ptr(), memory.numel(), _PORTABLE_AND_MAPPED)
    if int(code) != 0:
        raise OSError(
            f"the driver cannot pin {memory.numel()} bytes of shared memory: error {int(code)}"
        )


def _unpin(memory: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())  # type: ignore[no-untyped-call]
