"""Operations of a layer in float32 on a CPU equal their definitions, and a row's result depends on
that row alone."""

from __future__ import annotations

import pytest
import torch

from specops import cpu_operations, linear, rope, rows
from specops.decoder_operations import (
    DEFINITIONS,
    IN_FLOAT32,
    PACKED,
    few_rows_of,
    has_kernels,
    pick_operations,
)
from specops.linear import Norm
from specops.rope import Heads, rope_table

DIM, SLOTS = 64, 40


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def norm_of(size, seed):
    return Norm(1 + normal(size, seed=seed) / 8, 1e-6)


def turned(apply, qkv, heads, positions, slots):
    """Queries, and the pages with the rows' keys and values."""
    inv_freq = 1e4 ** -(torch.arange(0, DIM, 2) / DIM)
    table = rope_table(inv_freq, 1.0, 900, torch.float32)
    keys = torch.full((SLOTS, heads.num_kv, DIM), 7.0)
    values = keys.clone()
    if apply is cpu_operations.rope_and_write:
        table = cpu_operations.rope_rows(table, positions)
    return apply(qkv, heads, table, positions, slots, keys, values), keys, values


@pytest.mark.parametrize("num_rows", [1, 5])
@pytest.mark.parametrize("normed", [(), ("q",), ("k",), ("q", "k")])
@pytest.mark.parametrize("biased", [False, True])
def test_heads_are_normed_and_turned_to_the_same_bits(num_rows, normed, biased):
    width = (4 + 2 * 2) * DIM
    heads = Heads(
        4, 2,
        norm_of(DIM, 1) if "q" in normed else None,
        norm_of(DIM, 2) if "k" in normed else None,
        normal(width, seed=3) if biased else None,
    )  # fmt: skip
    qkv = normal(num_rows, width)
    given = qkv.clone()
    positions = torch.tensor([700, 0, 3, 899, 4])[:num_rows]
    slots = torch.tensor([9, 3, 39, 0, 17])[:num_rows]

    want = turned(rope.rope_and_write, qkv, heads, positions, slots)
    got = turned(cpu_operations.rope_and_write, qkv, heads, positions, slots)

    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(qkv, given)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_product_is_added_and_normed(in_place):
    x, weight, norm = normal(5, 96), normal(72, 96, seed=1), norm_of(72, 2)
    streams = [normal(5, 2, 72, seed=3) for _ in range(2)]  # strided rows, as taps are
    outs = [stream[:, 1 if in_place else 0] for stream in streams]

    want = rows.linear_add_norm(x, weight, streams[0][:, 1], norm, outs[0])
    got = cpu_operations.linear_add_norm(x, weight, streams[1][:, 1], norm, outs[1])

    torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(streams[1], streams[0], atol=4e-5, rtol=2e-6)


def test_the_gate_equals_its_definition():
    gate_up = normal(5, 144)
    assert torch.equal(cpu_operations.silu_gate(gate_up), linear.silu_gate(gate_up))


def test_a_cpu_leaves_products_to_the_library():
    weight, half = normal(8, 8), normal(8, 8).bfloat16()
    assert pick_operations([(weight, False)], None, None) is IN_FLOAT32
    assert pick_operations([(half, False)], None, None) is DEFINITIONS
    assert few_rows_of(weight) == 0 and few_rows_of(weight, use_kernels=True) == 1
    assert not any(map(has_kernels, (DEFINITIONS, IN_FLOAT32, PACKED)))


def test_heads_with_both_norms_are_turned_alike_with_copies_of_their_weights():
    heads = Heads(4, 2, norm_of(DIM, 1), norm_of(DIM, 2))
    qkv, rows_at = normal(3, 8 * DIM), (torch.tensor([700, 0, 3]), torch.tensor([9, 3, 39]))

    want = turned(cpu_operations.rope_and_write, qkv, heads, *rows_at)
    got = turned(cpu_operations.rope_and_write, qkv, cpu_operations.joint_norms(heads), *rows_at)

    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("num_inputs", "num_outputs"), [(256, 512), (624, 256), (100, 74)])
def test_a_row_of_a_packed_product_does_not_depend_on_the_others(num_inputs, num_outputs):
    weight, x = normal(num_outputs, num_inputs), normal(20, 2, num_inputs, seed=1)[:, 1]
    if not cpu_operations.can_pack([weight]):
        pytest.skip("this build of torch has no oneDNN")
    packed = cpu_operations.packed(weight)

    whole = cpu_operations.packed_linear(x, packed)

    torch.testing.assert_close(whole, x @ weight.T, atol=1e-4, rtol=1e-5)
    for num_rows in (1, 2, 3, 5, 12):
        assert torch.equal(cpu_operations.packed_linear(x[:num_rows], packed), whole[:num_rows])


@pytest.mark.parametrize("in_place", [False, True])
def test_a_packed_product_is_added_and_normed(in_place):
    x, weight, norm = normal(5, 96), normal(72, 96, seed=1), norm_of(72, 2)
    if not cpu_operations.can_pack([weight]):
        pytest.skip("this build of torch has no oneDNN")
    streams = [normal(5, 2, 72, seed=3) for _ in range(2)]
    outs = [stream[:, 1 if in_place else 0] for stream in streams]

    want = rows.linear_add_norm(x, weight, streams[0][:, 1], norm, outs[0])
    got = cpu_operations.packed_linear_add_norm(
        x, cpu_operations.packed(weight), streams[1][:, 1], norm, outs[1]
    )

    torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(streams[1], streams[0], atol=4e-5, rtol=2e-6)


def test_only_weights_in_float32_that_fit_are_packed():
    assert not cpu_operations.can_pack([normal(8, 8).bfloat16()])
    assert not cpu_operations.can_pack([torch.empty(1 << 15, 1 << 14)])  # 2 GiB, never touched
