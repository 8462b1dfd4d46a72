"""Products joined with what precedes and follows them equal their definitions under every plan: the
kernel in Triton's interpreter, and compiled if there is a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from specops import attention, attention_triton, best_ids, best_ids_triton, joined, linear_triton
from specops.attention import AttendedParts, DecodePass
from specops.best_ids import BestParts
from specops.draft_sampling import Instead
from specops.linear import Norm
from specops.linear_triton import Plan, choose_joined_plan, make_scratch
from specops.overlap_triton import can_overlap
from specops.rope import HeadPlaces, Heads, rope_table
from specops.rows import Pair

VOCAB, HIDDEN, DIM = 90, 48, 16
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
CPU = torch.device("cpu")


class Draw:
    """Random tensors of one dtype."""

    def __init__(self, dtype=torch.float32, device="cpu"):
        self.dtype, self.device = dtype, torch.device(device)
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape, std=1.0):
        return (torch.randn(shape, generator=self.generator) * std).to(self.device, self.dtype)

    def integers(self, high, *shape):
        return torch.randint(high, shape, generator=self.generator).to(self.device)

    def norm(self, width):
        return Norm(1 + self.normal(width, std=0.1), 1e-5)

    def pair(self, num_rows, hidden=HIDDEN, *, first=False, has_squares=False):
        rows = self.normal(num_rows, 2, hidden)[:, 1]
        squares = rows.float().square().view(num_rows, 3, -1).sum(-1) if has_squares else None
        norms = self.norm(hidden), self.norm(hidden)
        table = self.normal(VOCAB, hidden)
        return Pair(self.integers(VOCAB, num_rows), table, rows, *norms, first, squares)

    def scratch(self, *products):
        return make_scratch(products, self.dtype, self.device, joined=True)


def places(draw, num_rows, *, has_bias=False, has_norms=False, num_query=4, num_kv=2, dim=DIM):
    """Where two products put their heads."""
    norm, other = (draw.norm(dim), draw.norm(dim)) if has_norms else (None, None)
    bias = draw.normal((num_query + 2 * num_kv) * dim) if has_bias else None
    table = rope_table(torch.rand(dim // 2), 1.0, 64, draw.dtype)
    table = replace(table, cos=table.cos.to(draw.device), sin=table.sin.to(draw.device))
    slots = torch.randperm(70, generator=draw.generator)[:num_rows].to(draw.device)
    heads = Heads(num_query, num_kv, norm, other, bias)
    positions = draw.integers(64, num_rows)
    for _ in range(2):
        pools = (torch.zeros(70, num_kv, dim, dtype=draw.dtype, device=draw.device),
                 torch.zeros(70, num_kv, dim, dtype=draw.dtype, device=draw.device))  # fmt: skip
        yield HeadPlaces(heads, table, positions, slots, *pools)


HEAD_PLANS = [
    pytest.param(None, id="rule"),
    pytest.param(Plan("multiply", 4, 32), id="multiply"),
    pytest.param(Plan("weights_first", 8, 32), id="weights first"),
    pytest.param(Plan("rows_first", 4, 16, split=3), id="rows first, split"),
]


@pytest.mark.parametrize("num_rows", [1, 2, 20])
@pytest.mark.parametrize("plan", HEAD_PLANS)
@pytest.mark.parametrize("hidden_first", [False, True])
def test_a_pair_becomes_heads_in_pages(num_rows, plan, hidden_first):
    if plan is not None and plan.way == "multiply" and num_rows > 2:
        pytest.skip("'multiply' takes one or two rows")
    draw = Draw()
    pair = draw.pair(num_rows, first=hidden_first, has_squares=num_rows > 1)
    weight = draw.normal(8 * DIM, 2 * HIDDEN, std=0.1)
    ours, theirs = places(draw, num_rows, has_bias=hidden_first)
    scratch = draw.scratch((8 * DIM, 2 * HIDDEN, False))

    want = joined.few_row_heads(pair, weight, theirs)
    got = linear_triton.few_row_heads(pair, weight, ours, plan=plan, scratch=scratch)

    torch.testing.assert_close(got, want, **CLOSE)
    torch.testing.assert_close(ours.keys, theirs.keys, **CLOSE)
    torch.testing.assert_close(ours.values, theirs.values, **CLOSE)
    assert theirs.keys.any() and not scratch.arrived.any()
    got = linear_triton.few_row_linear(pair, weight, scratch=scratch, joined=True)
    torch.testing.assert_close(got, joined.few_row_linear(pair, weight), **CLOSE)


@pytest.mark.parametrize("num_rows", [1, 5])
def test_heads_with_norms_and_biases_behind_a_norm(num_rows):
    """As in Qwen3: the norm of a head needs the whole of it in one tile."""
    draw = Draw()
    x, norm = draw.normal(num_rows, HIDDEN), draw.norm(HIDDEN)
    weight = draw.normal(8 * DIM, HIDDEN, std=0.1)
    ours, theirs = places(draw, num_rows, has_bias=True, has_norms=True)

    want = joined.few_row_heads(x, weight, theirs, norm)
    got = linear_triton.few_row_heads(
        x, weight, ours, norm, scratch=draw.scratch((8 * DIM, HIDDEN, False))
    )

    torch.testing.assert_close(got, want, **CLOSE)
    torch.testing.assert_close(ours.keys, theirs.keys, **CLOSE)
    torch.testing.assert_close(ours.values, theirs.values, **CLOSE)


def attended(draw, num_requests, num_query, num_parts, window=None, *, num_kv=2, group=2, dim=DIM):
    """Attention in parts, and joined: the first request fills several, the second less than one."""
    first = draw.integers(390, num_requests).int()
    first[0] = 350
    first[1:2] = 3
    pages = torch.randperm(num_requests * 100, generator=draw.generator) + 1
    at = DecodePass(pages.int().view(num_requests, 100).to(draw.device), first, 4, first_key=1)
    pool = (num_requests * 100 + 1) * 4, num_kv, dim
    keys, values = draw.normal(*pool), draw.normal(*pool)
    q = draw.normal(num_requests * num_query, num_kv * group, dim)
    parts = attention_triton.attend_in_parts(
        q, keys, values, at, dim**-0.5, window, num_parts=num_parts
    )
    whole = attention.attend_pages(q, keys, values, at, dim**-0.5, window)
    return parts, whole.flatten(1)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("num_requests", "num_query"), [(1, 1), (2, 1), (5, 1), (2, 3)])
@pytest.mark.parametrize("num_parts", [1, 3, 40])
def test_parts_of_attention_join_to_the_whole(num_requests, num_query, num_parts, window):
    parts, whole = attended(Draw(), num_requests, num_query, num_parts, window)

    assert isinstance(parts, AttendedParts) == (num_parts > 1)
    if isinstance(parts, AttendedParts):
        assert parts.num_parts == min(num_parts, 16)
        assert (parts.num_rows, parts.num_heads, parts.group) == (len(whole), 4, 2)
        assert parts.lse.isinf().any() == (
            num_requests > 1 or num_parts > 3 or window is not None
        ), "some have no keys"
    torch.testing.assert_close(attention.attended_rows(parts), whole, **CLOSE)


@pytest.mark.parametrize("num_requests", [1, 2, 5])
@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(None, id="rule"),
        pytest.param(Plan("multiply", 8, 32), id="multiply, two heads a block"),
        pytest.param(Plan("rows_first", 16, 16, split=2), id="rows first, split"),
        pytest.param(Plan("weights_first", 64, 64), id="weights first, four heads a block"),
    ],
)
def test_a_product_joins_the_parts_that_it_reads(plan, num_requests):
    if plan is not None and plan.way == "multiply" and num_requests > 2:
        pytest.skip("'multiply' takes one or two rows")
    draw = Draw()
    parts, whole = attended(draw, num_requests, 1, 3)
    weight, residual = draw.normal(HIDDEN, 64, std=0.1), draw.normal(num_requests, HIDDEN)
    assert isinstance(parts, AttendedParts)
    parts.mixed[parts.lse.isinf()] = torch.nan  # nobody wrote them

    want, want_squares = joined.few_row_residual(whole, weight, residual)
    got, squares = linear_triton.few_row_residual(
        parts, weight, residual, plan=plan, scratch=draw.scratch((HIDDEN, 64, False)), joined=True
    )

    torch.testing.assert_close(got, want, **CLOSE)
    torch.testing.assert_close(squares.sum(1), want_squares.sum(1), **CLOSE)
    torch.testing.assert_close(joined.few_row_residual(parts, weight, residual)[0], want, **CLOSE)


@pytest.mark.parametrize("num_rows", [1, 5, 33])
@pytest.mark.parametrize("num_tokens", [64, 90, 200])
@pytest.mark.parametrize(
    "plan", [None, Plan("weights_first", 64, 32), Plan("rows_first", 16, 16, split=3)]
)
def test_the_best_of_a_product_is_the_argmax(num_rows, num_tokens, plan):
    """Small integers, so that sums are exact and many logits are equal."""
    draw = Draw()
    x, weight = draw.integers(3, num_rows, 48) - 1.0, draw.integers(3, num_tokens, 48) - 1.0
    logits = x @ weight.t()
    scratch = draw.scratch((num_tokens, 48, False))

    for parts in (
        joined.few_row_best(x, weight),
        linear_triton.few_row_best(x, weight, plan=plan, scratch=scratch),
    ):
        assert torch.equal(best_ids.join_best(parts), logits.argmax(1))
        assert torch.equal(best_ids_triton.join_best(parts), logits.argmax(1))


@pytest.mark.parametrize("has_map", [False, True])
def test_tokens_of_others_are_taken_in_place_of_the_best(has_map):
    draw = Draw()
    parts = BestParts(draw.normal(6, 200), draw.integers(40, 6, 200).int())
    parts.tops_MP[2, 7] = parts.tops_MP[2, 150] = torch.nan  # ranks above everything
    parts.tops_MP[3, [7, 150]] = 9.0
    d2t = 3 * torch.arange(40) if has_map else None
    instead = Instead(draw.integers(9, 6, 3)[:, 1] + 1000, draw.integers(2, 6, 3)[:, 2] > 0)
    assert 0 < instead.is_taken_M.sum() < 6

    for other in (None, instead):
        want = best_ids.join_best(parts, d2t, other)
        assert torch.equal(best_ids_triton.join_best(parts, d2t, other), want)
        taken = instead.is_taken_M if other is not None else torch.zeros(6, dtype=torch.bool)
        assert torch.equal(want >= 1000, taken)
    for row in (2, 3):
        lowest = parts.ids_MP[row, [7, 150]].min() * (4 if has_map else 1)
        assert best_ids.join_best(parts, d2t)[row] == lowest


def test_the_rule_for_small_models_uses_the_whole_card():
    """Products of SmolLM2-135M, of which 64 rows of the weight a program are 9 to 48 programs."""
    shapes = {"o": (576, 576, False), "down": (576, 1536, False), "gate_up": (1536, 576, True)}
    for num_rows in (1, 2, 8, 32, 64):
        for num_outputs, num_inputs, gated in shapes.values():
            plan = choose_joined_plan(num_rows, num_outputs, num_inputs, gated)
            assert -(-num_outputs // plan.block_n) * plan.split >= 96
        for is_whole in (False, True):
            plan = choose_joined_plan(num_rows, 960, 1152, False, half=32, is_whole=is_whole)
            assert 960 // (2 * plan.block_n) * plan.split >= 100
            assert 32 % plan.block_n == 0 and (plan.block_n == 32 or not is_whole)
        head = choose_joined_plan(num_rows, 49_152, 576, False)
        assert head == linear_triton.choose_plan(num_rows, 49_152, 576, False)
        large = choose_joined_plan(num_rows, 4096, 12_288, False)
        assert large == linear_triton.choose_plan(num_rows, 4096, 12_288, False)


def test_what_does_not_fit_is_refused():
    draw = Draw()
    pair, weight = draw.pair(3), draw.normal(8 * DIM, 2 * HIDDEN)
    to, other = places(draw, 3)
    normed, _ = places(draw, 3, has_norms=True)
    run = linear_triton.few_row_heads

    with pytest.raises(ValueError, match="rows of 8 heads of 16, got 96"):
        run(pair, weight[:96], to)
    with pytest.raises(ValueError, match="does not fit heads of 16"):
        run(pair, weight, to, plan=Plan("rows_first", 16, 16))
    with pytest.raises(ValueError, match="does not fit heads of 16"):
        run(pair, weight, normed, plan=Plan("rows_first", 4, 16))
    with pytest.raises(ValueError, match="norms and squares of its own"):
        run(pair, weight, to, draw.norm(HIDDEN))
    with pytest.raises(ValueError, match="positions and slots must be of 3 rows"):
        run(pair, weight, replace(other, slots_T=other.slots_T[:2]))
    with pytest.raises(ValueError, match="slots must be contiguous"):
        run(pair, weight, replace(other, slots_T=torch.arange(6)[::2]))


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("num_rows", [1, 2, 8, 32, 64])
@pytest.mark.parametrize("has_norms", [False, True])
def test_the_compiled_kernels_equal_the_definitions(num_rows, has_norms, overlap):
    """SmolLM2-135M's shapes in bfloat16. Sums are rounded once and turned or joined afterwards, so
    some elements differ by one or two units in the last place."""
    if overlap and not can_overlap(torch.device("cuda")):
        pytest.skip("needs compute capability 9.0")
    draw = Draw(torch.bfloat16, "cuda")
    pair = draw.pair(num_rows, 576, has_squares=True)
    qkv, o, head = (draw.normal(*shape, std=0.04) for shape in
                    ((960, 1152), (576, 576), (4096, 576)))  # fmt: skip
    ours, theirs = places(draw, num_rows, has_norms=has_norms, num_query=9, num_kv=3, dim=64)
    how = {"scratch": draw.scratch((960, 1152, False), (576, 576, False)), "overlap": overlap}
    parts, whole = attended(draw, num_rows, 1, 5, num_kv=3, group=3, dim=64)
    residual = draw.normal(num_rows, 576)

    for _ in range(3):
        q = linear_triton.few_row_heads(pair, qkv, ours, **how)
        stream, squares = linear_triton.few_row_residual(parts, o, residual, joined=True, **how)
        best = linear_triton.few_row_best(stream, head, pair.hidden_norm, squares, **how)
        ids = best_ids_triton.join_best(best, overlap=overlap)

    near = {"atol": 3e-2, "rtol": 2**-6}
    torch.testing.assert_close(q, joined.few_row_heads(pair, qkv, theirs), **near)
    torch.testing.assert_close(ours.keys, theirs.keys, **near)
    torch.testing.assert_close(ours.values, theirs.values, **near)
    torch.testing.assert_close(stream, joined.few_row_residual(whole, o, residual)[0], **near)
    logits = joined.few_row_linear(stream, head, pair.hidden_norm).float()
    gap = logits.amax(1) - logits.gather(1, ids[:, None])[:, 0]
    assert (gap <= 2**-6 * logits.amax(1)).all()
    assert not how["scratch"].arrived.any()
