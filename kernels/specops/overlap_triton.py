"""Starting a kernel while the previous one still runs (CUDA's programmatic dependent launch).

A kernel launched with ``launch_pdl=True`` starts as soon as every program of the previous kernel
has called ``let_next_start`` or ended. Until it calls ``wait_for_previous``, which every program
must do, it may read only what no earlier kernel writes, such as weights, and must not write. The
gap between two kernels is thus spent fetching the second one's first weights.

Requires compute capability 9.0. Triton's interpreter does not support it; callers do not overlap
there.
Source: CUDA Programming Guide, Programmatic Dependent Launch; PTX ISA, griddepcontrol, prefetch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda


def can_overlap(device: torch.device) -> bool:
    """Kernels on ``device`` support programmatic dependent launch."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def let_next_start():
    tl_cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous():
    tl_cuda.gdc_wait()


@triton.jit
def fetch_into_l2(pointers):
    """Prefetch the 128-byte lines at ``pointers`` without waiting."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1];\n mov.b32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
