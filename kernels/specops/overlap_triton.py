"""Starting a kernel while the one before it still runs (CUDA's programmatic dependent launch).

A kernel that is launched with ``launch_pdl=True`` starts as soon as every program of the kernel
before it has called ``let_next_start`` or ended. Before ``wait_for_previous`` it may read only what
no kernel before it writes, such as weights, and it may write nothing; every program must call it.
So the pause between two kernels goes to fetching the first weights of the second.

Needs compute capability 9.0. Triton's interpreter has neither: callers leave these out there.
Source: CUDA Programming Guide, Programmatic Dependent Launch; PTX ISA, griddepcontrol, prefetch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda


def can_overlap(device: torch.device) -> bool:
    """Whether kernels on ``device`` may be launched so."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def let_next_start():
    tl_cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous():
    tl_cuda.gdc_wait()


@triton.jit
def fetch_into_l2(pointers):
    """Ask for the 128-byte lines at ``pointers``; nothing waits for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1];\n mov.b32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
