"""Head norms, RoPE and the write to the pages equal Hugging Face's operations."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
)

from specops import rope, rope_triton
from specops.linear import Norm
from specops.overlap_triton import can_overlap
from specops.rope import Heads, rope_table

IMPLEMENTATIONS = [
    pytest.param(rope.rope_and_write, id="definition"),
    pytest.param(rope_triton.rope_and_write, id="kernel"),
]


def hugging_face(qkv, num_query, num_kv, dim, norms, positions):
    """Queries, keys and values [T, heads, D] by Hugging Face's code."""
    config = Qwen3Config(head_dim=dim, hidden_size=64, num_attention_heads=4)
    q, k, v = qkv.unflatten(1, (-1, dim)).split((num_query, num_kv, num_kv), dim=1)
    if norms:
        for norm, weight in zip(norms, ("q", "k"), strict=True):
            module = Qwen3RMSNorm(dim, norm.eps).to(qkv)
            module.weight.data.copy_(norm.weight_K)
            q, k = (module(q), k) if weight == "q" else (q, module(k))
    cos, sin = Qwen3RotaryEmbedding(config).to(qkv.device)(qkv, positions[None])
    q, k = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    return q[0].transpose(0, 1), k[0].transpose(0, 1), v


def check(apply, dtype, device, num_query, num_kv, dim, num_rows, normed, **how):
    generator = torch.Generator(device).manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    width = (num_query + 2 * num_kv) * dim
    qkv = normal(num_rows, width + 8)[:, 8:]
    norms = (Norm(1 + normal(dim) / 8, 1e-6), Norm(1 + normal(dim) / 8, 1e-6)) if normed else ()
    heads = Heads(num_query, num_kv, *norms)
    positions = torch.randint(0, 900, (num_rows,), generator=generator, device=device)
    slots = torch.randperm(40, generator=generator, device=device)[:num_rows]
    inv_freq = Qwen3RotaryEmbedding(
        Qwen3Config(head_dim=dim, hidden_size=64, num_attention_heads=4)
    ).inv_freq.to(device)
    keys = torch.full((40, num_kv, dim), 7.0, dtype=dtype, device=device)
    values = keys.clone()
    want = [t.detach() for t in hugging_face(qkv, num_query, num_kv, dim, norms, positions)]

    table = rope_table(inv_freq, 1.0, 900, dtype)
    q = apply(qkv, heads, table, positions, slots, keys, values, **how)

    # Without a norm, results are equal: both round after every operation. With one, summing squares
    # in another order changes the scale by less than 1e-6, and thus, in half precision, an
    # occasional element by one step, at most 2**-8 of it.
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(q, want[0], **close)
    torch.testing.assert_close(keys[slots], want[1], **close)
    torch.testing.assert_close(values[slots], want[2], atol=0, rtol=0)
    for got, same in ((q, want[0]), (keys[slots], want[1])):
        share_equal = (got == same).float().mean()
        assert share_equal == 1 or normed
        assert share_equal > 0.99 or dtype == torch.float32
    untouched = torch.ones(40, dtype=torch.bool, device=device)
    untouched[slots] = False
    assert (keys[untouched] == 7).all() and (values[untouched] == 7).all()


@pytest.mark.parametrize("apply", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16]
)  # the interpreter truncates bfloat16
@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (8, 8)])
@pytest.mark.parametrize("normed", [False, True])
def test_it_equals_hugging_face(apply, dtype, heads, normed):
    check(apply, dtype, "cpu", *heads, 16, 5, normed)


@pytest.mark.parametrize("apply", IMPLEMENTATIONS)
def test_rows_of_keys_and_values_alone_are_written_from_a_part_of_a_product(apply):
    check(apply, torch.float32, "cpu", 0, 2, 16, 5, normed=True)


def test_the_kernel_refuses_what_it_cannot_do():
    table = rope_table(torch.ones(12), 1.0, 4, torch.float32)
    one = torch.zeros(1, dtype=torch.int64)
    pool = torch.zeros(4, 1, 24)
    with pytest.raises(ValueError, match="power of two and at least 4, got 24"):
        rope_triton.rope_and_write(torch.zeros(1, 96), Heads(2, 1), table, one, one, pool, pool)
    with pytest.raises(ValueError, match="must be 4 adjacent heads of 24"):
        rope_triton.rope_and_write(torch.zeros(1, 90), Heads(2, 1), table, one, one, pool, pool)


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("num_rows", [1, 33])
@pytest.mark.parametrize("normed", [False, True])
def test_the_compiled_kernel_equals_hugging_face(num_rows, normed, overlap):
    if overlap and not can_overlap(torch.device("cuda")):
        pytest.skip("needs compute capability 9.0")
    ahead = torch.randn(1024, 4096, device="cuda").bfloat16()
    check(
        rope_triton.rope_and_write, torch.bfloat16, "cuda", 32, 8, 128, num_rows, normed,
        overlap=overlap, ahead=ahead, ahead_bytes=5 << 20,
    )  # fmt: skip
