"""Packing a step's committed rows into a ring: the torch definition.

A row holds m + 1 vectors: the tapped layers' features and the last hidden state. Each is rounded to
fp8 with its own scale. Only the device knows how many rows a step commits, so the device also
counts the position in the ring.

Shapes: T packed rows, R requests of Q = T / R rows each, m tapped layers, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FP8_MAX = 448.0
"""Largest number of float8_e4m3fn."""
_LEAST_SCALE = 1e-12


@dataclass(frozen=True, slots=True)
class PackRing:
    """Packed rows, numbered consecutively: row n is at n modulo the capacity until overwritten.

    The host may read the latest ``capacity`` rows numbered below the value of ``next_1`` after a
    finished step. All tensors but ``next_1`` may be in pinned host memory; a kernel writes to it
    directly.

    Raises:
        ValueError: a tensor does not have the dtype or shape documented below.
    """

    rows: Tensor
    """[capacity, m + 1, H] float8_e4m3fn, or bfloat16 copied unchanged."""
    scales: Tensor | None
    """[capacity, m + 1] float32 factor of each fp8 vector; ``None`` for bfloat16."""
    lanes: Tensor
    """[capacity] int32, the lane of the request that the row belongs to."""
    positions: Tensor
    """[capacity] int32, position in the sequence."""
    next_1: Tensor
    """[1] int64 number of the next row, on the device."""

    def __post_init__(self) -> None:
        if self.rows.dtype not in (torch.float8_e4m3fn, torch.bfloat16):
            raise ValueError(f"rows must be float8_e4m3fn or bfloat16, got {self.rows.dtype}")
        if (self.scales is None) != (self.rows.dtype == torch.bfloat16):
            raise ValueError("fp8 rows need scales, bfloat16 rows have none")
        capacity, num_vectors = self.rows.shape[:2]
        for name, tensor, dtype, shape in (
            ("scales", self.scales, torch.float32, (capacity, num_vectors)),
            ("lanes", self.lanes, torch.int32, (capacity,)),
            ("positions", self.positions, torch.int32, (capacity,)),
            ("next", self.next_1, torch.int64, (1,)),
        ):
            if tensor is not None and (tensor.dtype != dtype or tensor.shape != shape):
                raise ValueError(
                    f"{name} must be {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}"
                )


def new_ring(
    capacity: int,
    num_vectors: int,
    hidden_size: int,
    device: str,
    is_fp8: bool,
    pinned: bool,
    memory: tuple[Tensor, Tensor] | None = None,
) -> PackRing:
    """An empty ring on ``device``, or in pinned host memory with the counter on ``device``.

    Args:
        memory: uint8, the bytes of the rows and of the scales, which ``device`` can write to;
            ``None``: they are allocated.
    """
    where = "cpu" if pinned else device
    dtype = torch.float8_e4m3fn if is_fp8 else torch.bfloat16

    def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=where, pin_memory=pinned)

    def unwritten(dtype: torch.dtype, *shape: int) -> Tensor:  # gigabytes: zeroing takes seconds
        return torch.empty(shape, dtype=dtype, device=where, pin_memory=pinned)

    if memory is None:
        rows = unwritten(dtype, capacity, num_vectors, hidden_size)
        scales = zeros(torch.float32, capacity, num_vectors) if is_fp8 else None
    else:
        rows = memory[0].view(dtype).view(capacity, num_vectors, hidden_size)
        scales = memory[1].view(torch.float32).view(capacity, num_vectors) if is_fp8 else None
    return PackRing(
        rows,
        scales,
        zeros(torch.int32, capacity),
        zeros(torch.int32, capacity),
        torch.zeros(1, dtype=torch.int64, device=device),
    )


def quantise(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise finite vectors [..., H] to float8_e4m3fn, with scales [...] float32.

    The scale is amax / 448, so the largest entry is exactly representable.
    """
    wide = vectors.float()
    largest = wide.abs().amax(dim=-1)
    # Divide by a tensor: for a number, torch on a GPU multiplies by its reciprocal, and more than
    # half of the scales differ from a CPU's by one unit in the last place.
    scale = (largest / torch.full_like(largest, FP8_MAX)).clamp(min=_LEAST_SCALE)
    return (wide / scale[..., None]).to(torch.float8_e4m3fn), scale


def check_step(features_TmH: Tensor, hidden_TH: Tensor, counts_R: Tensor, ring: PackRing) -> int:
    """Check a step's rows and return Q.

    Raises:
        ValueError: the rows are not bfloat16, do not divide evenly among the requests, exceed the
            ring's capacity, or differ from the ring's rows in number or size of vectors.
    """
    num_rows, hidden_size = hidden_TH.shape
    capacity = len(ring.rows)
    want = (num_rows, ring.rows.shape[1] - 1, ring.rows.shape[2])
    if features_TmH.shape != want or hidden_size != want[2]:
        raise ValueError(
            f"features must be {want} and hidden rows {(num_rows, want[2])}, "
            f"got {tuple(features_TmH.shape)} and {tuple(hidden_TH.shape)}"
        )
    if features_TmH.dtype != torch.bfloat16 or hidden_TH.dtype != torch.bfloat16:
        raise ValueError(f"rows must be bfloat16, got {features_TmH.dtype}, {hidden_TH.dtype}")
    if num_rows > capacity:
        raise ValueError(f"{num_rows} rows of one step do not fit a ring of {capacity}")
    if num_rows % len(counts_R):
        raise ValueError(f"{num_rows} rows do not divide among {len(counts_R)} requests")
    return num_rows // len(counts_R)


def pack_kept_rows(
    features_TmH: Tensor,
    hidden_TH: Tensor,
    counts_R: Tensor,
    first_R: Tensor,
    lanes_R: Tensor,
    ring: PackRing,
) -> None:
    """Append the first ``counts`` rows of every request. The definition; waits for the device.

    Args:
        features_TmH: [T, m, H] bfloat16; hidden_TH: [T, H] bfloat16. Finite.
        counts_R: [R] int32 number of rows to keep, 0..Q.
        first_R: [R] int32 position of each request's first row.
        lanes_R: [R] int32 id of each request in the ring.
        ring: written in place; its counter grows by the sum of ``counts``.

    Raises:
        ValueError: see ``check_step``.
    """
    num_query = check_step(features_TmH, hidden_TH, counts_R, ring)
    row = torch.arange(num_query, device=counts_R.device)
    is_kept_RQ = row < counts_R[:, None]
    kept = is_kept_RQ.flatten().nonzero()[:, 0]
    number = ring.next_1 + torch.arange(len(kept), device=kept.device)
    at = (number % len(ring.rows)).to(ring.rows.device)
    vectors = torch.cat((features_TmH, hidden_TH[:, None]), dim=1)[kept]
    if ring.scales is None:
        ring.rows[at] = vectors.to(at.device)
    else:
        packed, scales = quantise(vectors)
        # Copied as bytes: indexing does not support fp8 on every device.
        ring.rows.view(torch.uint8)[at] = packed.view(torch.uint8).to(at.device)
        ring.scales[at] = scales.to(at.device)
    lanes = lanes_R[:, None].expand_as(is_kept_RQ)[is_kept_RQ]
    positions = (first_R[:, None] + row.int())[is_kept_RQ]
    ring.lanes[at] = lanes.to(at.device)
    ring.positions[at] = positions.to(at.device)
    ring.next_1.add_(len(kept))
