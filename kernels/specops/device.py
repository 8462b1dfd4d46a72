"""Picks the implementation for the device that the tensors are on: kernels on a GPU, else the torch
definitions."""

from __future__ import annotations

from torch import Tensor

from specops import attention
from specops.attention import DecodePass


def decode_attention(
    q_THD: Tensor,
    k_THD: Tensor | None,
    v_THD: Tensor | None,
    keys: Tensor,
    values: Tensor,
    decode: DecodePass,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """See ``specops.attention.decode_attention``."""
    attend, write = attention.attend_pages, attention.write_rows
    if q_THD.is_cuda:
        from specops import attention_triton  # Triton is there where a GPU is

        attend, write = attention_triton.attend_pages, attention_triton.write_rows
    return attention.decode_attention(
        q_THD, k_THD, v_THD, keys, values, decode, scale, window, softcap, attend, write
    )
