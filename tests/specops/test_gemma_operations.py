"""What Gemma 3 and Qwen2 add to the operations of a layer: norms that round once, another gate, and
biases of the heads. Kernels equal their definitions, and these Hugging Face's code."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from specops import linear, linear_triton, rope, rope_triton, rows, rows_triton
from specops.linear import Norm
from specops.linear_triton import Plan
from specops.rope import Heads, rope_table

HALF = torch.float16  # the interpreter truncates bfloat16
CLOSE = {"atol": 4e-3, "rtol": 4e-3}
"""Two steps of float16: sums in another order change an occasional rounding."""


def normal(*shape, seed=0, dtype=HALF):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gemma_norm(width, seed=1):
    module = Gemma3RMSNorm(width, 1e-6).to(HALF).requires_grad_(False)
    module.weight.copy_(normal(width, seed=seed) / 4)
    return module, Norm(1.0 + module.weight.float(), module.eps)


def test_a_float32_weight_multiplies_before_rows_are_rounded():
    x = normal(50, 96)
    module, norm = gemma_norm(96)

    got = linear.rms_norm(x, norm)

    assert got.dtype == HALF and torch.equal(got, module(x))
    early = linear.rms_norm(x, Norm(norm.weight_K.half(), norm.eps))
    assert not torch.equal(got, early), "rounding early changes nothing to be seen"


@pytest.mark.parametrize("added", [False, True])
def test_the_norm_behind_a_residual(added):
    x, update = normal(5, 96), normal(5, 96, seed=2) if added else None
    module, norm = gemma_norm(96)
    outs = [torch.empty_like(x) if added else None for _ in range(2)]

    want = rows.add_norm(x, update, norm, outs[0])
    got = rows_triton.add_norm(x, update, norm, outs[1])

    assert torch.equal(want, module(x + update if added else x))
    torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("way", ["multiply", "weights_first"])
def test_the_norm_within_a_product(way):
    x, weight = normal(2, 128), normal(64, 128, seed=3) / 128**0.5
    norm = gemma_norm(128)[1]
    plan = Plan(way, 16, 32)

    got = linear_triton.few_row_linear(x, weight, norm, plan=plan)

    torch.testing.assert_close(got, linear.few_row_linear(x, weight, norm), **CLOSE)


def test_the_gate():
    gate_up = normal(3, 2 * 40) * 3
    act = ACT2FN["gelu_pytorch_tanh"]

    want = linear.gelu_gate(gate_up)

    torch.testing.assert_close(want, act(gate_up[:, :40]) * gate_up[:, 40:], **CLOSE)
    torch.testing.assert_close(rows_triton.gelu_gate(gate_up), want, **CLOSE)
    extreme = torch.tensor([[60000.0, -60000.0, 0.0, 1.0, 1.0, 1.0]], dtype=torch.float32)
    torch.testing.assert_close(rows_triton.gelu_gate(extreme), linear.gelu_gate(extreme))


@pytest.mark.parametrize("apply", [rope.rope_and_write, rope_triton.rope_and_write])
@pytest.mark.parametrize("is_normed", [False, True])
def test_the_bias_is_added_before_norms_and_rotation(apply, is_normed):
    num_query, num_kv, dim = 3, 1, 16
    qkv, bias = normal(5, 5 * dim), normal(5 * dim, seed=4)
    norms = (gemma_norm(dim, 5)[1], gemma_norm(dim, 6)[1]) if is_normed else (None, None)
    positions, slots = torch.arange(5), torch.tensor([7, 1, 3, 2, 9])
    table = rope_table(0.5 ** torch.arange(8.0), 1.0, 5, HALF)

    def run(function, rows_TC, bias_C):
        pool = torch.zeros(2, 10, num_kv, dim, dtype=HALF)
        heads = Heads(num_query, num_kv, *norms, bias_C)
        return function(rows_TC, heads, table, positions, slots, *pool), *pool

    got = run(apply, qkv, bias)

    for found, wanted in zip(got, run(rope.rope_and_write, qkv + bias, None), strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)
    assert torch.equal(got[2][slots, 0], (qkv + bias)[:, -dim:])


def test_the_kernel_refuses_a_bias_of_another_length():
    table = rope_table(torch.ones(4), 1.0, 4, HALF)
    one, pool = torch.zeros(1, dtype=torch.int64), torch.zeros(4, 1, 8, dtype=HALF)
    heads = Heads(1, 1, bias_C=torch.zeros(8, dtype=HALF))

    with pytest.raises(ValueError, match=r"the bias must be contiguous \[24\], got \[8\]"):
        rope_triton.rope_and_write(normal(1, 24), heads, table, one, one, pool, pool.clone())
