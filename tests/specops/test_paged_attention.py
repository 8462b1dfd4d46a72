"""Paged attention equals attention over the contiguous sequence."""

from __future__ import annotations

import pytest
import torch

from specops.attention import PagedPass, make_group, paged_attention

D, PAGE = 16, 4


def dense(q, k, v, positions, scale, window, softcap, first_key):
    """Attention of one request's rows at ``positions`` over all keys, in float64. [Q, Hq, D]."""
    repeat = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(repeat, dim=1) for t in (k, v))
    scores = torch.einsum("qhd,shd->hqs", q.double(), k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    at = torch.arange(k.shape[0])
    visible = (at <= positions[:, None]) & (at >= first_key)
    if window:
        visible &= at > positions[:, None] - window
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("hqs,shd->qhd", weights, v).float()


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, None), (None, 3.0), (6, 2.0)])
@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (8, 1)])
@pytest.mark.parametrize(("num_query", "first_key"), [(1, 1), (3, 0)])
def test_paged_equals_dense(window, softcap, heads, num_query, first_key):
    generator = torch.Generator().manual_seed(0)
    num_query_heads, num_kv_heads = heads
    lengths = [9, 150, 5]
    keys = torch.full((700, num_kv_heads, D), 1e3)  # poison: unwritten slots must not be read
    values = keys.clone()
    pages = torch.randperm(150, generator=generator) + 1
    tables, want, q_rows, k_rows, v_rows, slots = [], [], [], [], [], []
    for index, length in enumerate(lengths):
        own = pages[index * 40 : index * 40 + 40]
        table = (own[:, None] * PAGE + torch.arange(PAGE)).reshape(-1)
        q = torch.randn(num_query, num_query_heads, D, generator=generator)
        k, v = (torch.randn(length, num_kv_heads, D, generator=generator) for _ in range(2))
        old = length - num_query
        keys[table[:old]], values[table[:old]] = k[:old], v[:old]
        positions = torch.arange(old, length)
        want.append(dense(q, k, v, positions, 0.3, window, softcap, first_key))
        tables.append(table[: max(lengths)])
        q_rows.append(q)
        k_rows.append(k[old:])
        v_rows.append(v[old:])
        slots.append(table[old:length])
    positions = torch.tensor([list(range(n - num_query, n)) for n in lengths])
    group = make_group(0, torch.stack(tables), positions, first_key)

    got = paged_attention(
        torch.cat(q_rows),
        torch.cat(k_rows),
        torch.cat(v_rows),
        keys,
        values,
        PagedPass(torch.cat(slots), (group,)),
        0.3,
        window,
        softcap,
    )

    torch.testing.assert_close(got, torch.cat(want), atol=2e-6, rtol=1e-5)
