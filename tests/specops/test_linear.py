"""Products of a few rows equal their definition under every plan and are reproducible: the kernel
in Triton's interpreter, and compiled if there is a GPU."""

from __future__ import annotations

import pytest
import torch

from specops import linear, linear_triton
from specops.linear import Norm
from specops.linear_triton import Plan, Scratch, make_scratch
from specops.overlap_triton import can_overlap

PLANS = [
    pytest.param(Plan("multiply", 8, 32), id="multiply"),
    pytest.param(Plan("weights_first", 64, 32), id="weights first"),
    pytest.param(Plan("weights_first", 64, 16, split=3), id="weights first, split"),
    pytest.param(Plan("rows_first", 16, 32), id="rows first"),
    pytest.param(Plan("rows_first", 32, 16, split=4), id="rows first, split"),
]


def draw(num_rows, num_inputs, num_weight_rows, dtype=torch.float32, device="cpu"):
    """x with strided rows, a weight and a norm."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        drawn = torch.randn(*shape, generator=generator, device=device)
        return drawn.to(dtype)

    x = normal(num_rows, num_inputs + 16)[:, :num_inputs]
    weight = normal(num_weight_rows, num_inputs) / num_inputs**0.5
    return x, weight, Norm(1 + 0.1 * normal(num_inputs), 1e-6)


def scratch_of(plan, outputs, device="cpu"):
    if plan.split == 1:
        return None
    sums = plan.split * 64 * outputs
    return Scratch(
        torch.empty(sums, device=device), torch.zeros(64, dtype=torch.int32, device=device)
    )


def rows_that_fit(plan, num_rows):
    if plan.way == "multiply" and num_rows > 2:
        pytest.skip("'multiply' takes one or two rows")


@pytest.mark.parametrize("num_rows", [1, 2, 17])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_the_kernel_equals_the_definition(num_rows, plan, normed, gated):
    rows_that_fit(plan, num_rows)
    x, weight, norm = draw(num_rows, 100, 74)  # neither a multiple of a block
    norm = norm if normed else None
    squares = x.square().view(num_rows, 20, 5).sum(-1) if normed and num_rows > 1 else None
    want = linear.few_row_linear(x, weight, norm, squares, gated=gated)

    scratch = scratch_of(plan, 74)
    got = linear_triton.few_row_linear(
        x, weight, norm, squares, gated=gated, plan=plan, scratch=scratch
    )

    torch.testing.assert_close(got, want, atol=5e-6, rtol=1e-5)
    if scratch is not None:
        assert not scratch.arrived.any()  # ready for the next launch


@pytest.mark.parametrize("num_rows", [1, 2, 33])
@pytest.mark.parametrize("plan", PLANS)
def test_the_residual_is_added_in_place_and_its_squares_feed_the_next_norm(num_rows, plan):
    rows_that_fit(plan, num_rows)
    x, weight, _ = draw(num_rows, 48, 72)
    norm = draw(1, 72, 1)[2]
    stream = torch.randn(num_rows, 2, 72, generator=torch.Generator().manual_seed(1))
    residual, before = stream[:, 1], stream.clone()  # strided rows, as taps are
    want, want_squares = linear.few_row_residual(x, weight, residual)

    got, squares = linear_triton.few_row_residual(
        x, weight, residual, residual, plan=plan, scratch=scratch_of(plan, 72)
    )

    assert got is residual
    torch.testing.assert_close(got, want, atol=5e-6, rtol=1e-5)
    torch.testing.assert_close(stream[:, 0], before[:, 0], atol=0, rtol=0)
    torch.testing.assert_close(
        linear.rms_norm(got, norm, squares), linear.rms_norm(want, norm, want_squares)
    )
    torch.testing.assert_close(
        linear.rms_norm(want, norm, want_squares), linear.rms_norm(want, norm)
    )


@pytest.mark.parametrize("plan", PLANS)
def test_rounding_is_that_of_separate_operations(plan):
    """Nearly all outputs are bitwise equal; only sums near a tie may round differently. In float16,
    because the interpreter truncates bfloat16."""
    x, weight, norm = draw(2, 128, 128, torch.float16)
    want = linear.few_row_linear(x, weight, norm, gated=True)

    got = linear_triton.few_row_linear(
        x, weight, norm, gated=True, plan=plan, scratch=scratch_of(plan, 128)
    )

    assert (got == want).float().mean() > 0.95
    torch.testing.assert_close(got, want, atol=1e-3, rtol=4e-3)


def test_logits_are_the_float32_of_their_rounded_product():
    x, weight, _ = draw(2, 64, 48, torch.bfloat16)
    out = torch.empty(2, 48)

    assert linear_triton.few_row_linear(x, weight, out=out) is out

    torch.testing.assert_close(out, out.bfloat16().float(), atol=0, rtol=0)


def test_the_rule_gives_every_shape_a_plan():
    for num_rows in (1, 2, 3, 16, 64):
        for num_outputs, num_inputs in ((6144, 4096), (1024, 3072), (151936, 1024), (40, 8)):
            plan = linear_triton.choose_plan(num_rows, num_outputs, num_inputs, False)
            assert (plan.way == "multiply") == (num_rows <= 2 and num_outputs < 151936)
            assert plan.split == 1 or plan.way != "multiply"
    assert linear_triton.choose_plan(5, 4096, 12288, False).split == 4  # 256 programs
    assert linear_triton.choose_plan(5, 151936, 4096, False).split == 1
    gated = linear_triton.choose_plan(5, 12288, 4096, True)
    assert (gated.way, gated.block_n) == ("weights_first", 32)  # 384 programs, three at a time


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("hidden", "qkv", "heads", "inner", "vocab"),
    [
        pytest.param(256, 512, 256, 624, 4096, id="bundled target"),
        pytest.param(1024, 4096, 2048, 3072, 151_936, id="Qwen3-0.6B"),
        pytest.param(2048, 4096, 2048, 6144, 151_936, id="Qwen3-1.7B"),
        pytest.param(4096, 6144, 4096, 12_288, 151_936, id="Qwen3-8B"),
        pytest.param(4096, 6144, 4096, 14_336, 128_256, id="Llama-3.1-8B"),
    ],
)
def test_one_scratch_holds_every_product_of_a_decoder(hidden, qkv, heads, inner, vocab, dtype):
    shapes = [(qkv, hidden), (hidden, heads), (hidden, inner), (vocab, hidden)]
    products = [(*shape, False) for shape in shapes] + [(inner, hidden, True)]
    scratch = make_scratch(products, dtype, torch.device("meta"))
    splits = 0
    for num_rows in range(1, linear_triton.MAX_ROWS + 1):
        for num_outputs, num_inputs, gated in products:
            plan = linear_triton.choose_plan(
                num_rows, num_outputs, num_inputs, gated, dtype.itemsize
            )
            splits += plan.split > 1
            rows = max(16, 1 << (num_rows - 1).bit_length())
            assert plan.split == 1 or (
                scratch.parts.numel() >= plan.split * rows * num_outputs * (1 + gated)
                and scratch.arrived.numel() >= -(-num_outputs // plan.block_n)
            )
    assert splits  # otherwise nothing was checked


def test_the_kernel_refuses_what_it_cannot_do():
    x, weight, _ = draw(2, 64, 48)
    with pytest.raises(ValueError, match=r"1\.\.64 rows, got 65"):
        linear_triton.few_row_linear(torch.zeros(65, 64), weight)
    with pytest.raises(ValueError, match=r"weight must be \[48, 32\], got \[48, 64\]"):
        linear_triton.few_row_linear(torch.zeros(1, 32), weight)
    with pytest.raises(ValueError, match=r"weight torch\.float16; they must be the same"):
        linear_triton.few_row_linear(x, weight.half())
    with pytest.raises(ValueError, match=r"takes 1\.\.2 rows and no split, got 3"):
        linear_triton.few_row_linear(torch.zeros(3, 64), weight, plan=Plan("multiply", 8, 32))
    with pytest.raises(ValueError, match="needs scratch"):
        linear_triton.few_row_linear(x, weight, plan=Plan("rows_first", 16, 32, split=2))
    with pytest.raises(ValueError, match="columns of weight must be adjacent"):
        linear_triton.few_row_linear(x, torch.zeros(64, 48).t())


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("num_outputs", "num_inputs"), [(6144, 4096), (4096, 12288), (1024, 3072), (1000, 520)]
)
@pytest.mark.parametrize(
    ("num_rows", "plan"),
    [
        (1, None),
        (2, None),
        (1, Plan("multiply", 16, 256, num_stages=1)),
        (5, None),
        (16, None),
        (33, None),
        (64, None),
        (5, Plan("weights_first", 64, 128, split=4)),
        (5, Plan("weights_first", 32, 64, split=2)),
        (5, Plan("rows_first", 32, 256)),
        (16, Plan("rows_first", 16, 128, split=2)),
    ],
)
def test_the_compiled_kernel_equals_the_definition(
    num_rows, plan, num_outputs, num_inputs, overlap
):
    if overlap and not can_overlap(torch.device("cuda")):
        pytest.skip("needs compute capability 9.0")
    x, weight, norm = draw(num_rows, num_inputs, num_outputs, torch.bfloat16, "cuda")
    residual = torch.randn(num_rows, num_outputs, device="cuda").bfloat16()
    device = torch.device("cuda")
    # The gated product takes half of the weight's rows as its gate.
    products = [(num_outputs, num_inputs, False), (num_outputs // 2, num_inputs, True)]
    scratch = make_scratch(products, x.dtype, device)
    if plan is not None:
        arrived = torch.zeros(4096, dtype=torch.int32, device=device)
        scratch = Scratch(torch.empty(4 << 20, device=device), arrived)
    how = {"plan": plan, "scratch": scratch, "overlap": overlap}
    squares = x.float().square().view(num_rows, 8, -1).sum(-1)
    # float64 of the same rounded factors: bfloat16 rounds the product by at most 2**-9 of it, and
    # the sum or product that follows once more; errors of float32 sums are far smaller.
    exact = linear.rms_norm(x, norm).double() @ weight.double().t()
    gate, up = exact.chunk(2, dim=-1)

    def outcome():
        plain = linear_triton.few_row_linear(x, weight, norm, squares, **how)
        gated = linear_triton.few_row_linear(x, weight, norm, None, gated=True, **how)
        added, added_squares = linear_triton.few_row_residual(x, weight, residual, **how)
        return plain, gated, added, added_squares

    plain, gated, added, added_squares = outcome()
    torch.testing.assert_close(plain.double(), exact, atol=1e-3, rtol=2**-8)
    want = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(gated.double(), want, atol=4e-3, rtol=2**-6)
    total = residual.double() + x.double() @ weight.double().t()
    torch.testing.assert_close(added.double(), total, atol=2e-2, rtol=2**-8)
    torch.testing.assert_close(added_squares.sum(1), added.float().square().sum(1))
    assert not scratch.arrived.any()
    for _ in range(5):  # the same bits in every run
        for first, again in zip((plain, gated, added, added_squares), outcome(), strict=True):
            assert torch.equal(first, again)
