"""The kernels of cuts (interpreted without a GPU) against their definition: lengths are equal,
figures within 1e-6.

Where a score is computed from figures it may differ in its last bits; lengths are compared where
nothing hangs on them.
"""

from __future__ import annotations

import math
from itertools import permutations, product

import pytest
import torch
import triton
import triton.language as tl

from benchmarks.harness.launches import counted
from specops import allocation, allocation_triton, device
from specops.allocation import HeadWeights, PackedRows
from tests.specops.test_allocation import (
    BOTH,
    DEVICE,
    allocate,
    below,
    cut_drafts,
    judged_by,
    on_device,
    pack_rows,
    random_head,
)

NAN, INF = math.nan, math.inf
ODD = (0.0, -0.0, 0.25, 0.5, 0.5, 1.0, 1.0, NAN, INF, -INF, 7.0, -0.3, 1e-30, 1e-40)


@pytest.fixture
def poisoned(monkeypatch):
    """Fill the memory that kernels write to with garbage."""
    right = torch.empty, torch.empty_like

    def empty(*shape, **options):
        made = right[0](*shape, **options)
        return made.fill_(True if made.dtype == torch.bool else 113)

    def empty_like(other, **options):
        return right[1](other, **options).fill_(113)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", empty_like)


# ---- lengths -----------------------------------------------------------------------------------


def kinds_of_scores(generator, num_requests, num_draft):
    """Scores of which many are equal, some are none, and all are different."""
    odd = torch.tensor(ODD)[torch.randint(0, len(ODD), (num_requests, num_draft))]
    steps = torch.randint(0, 4, (num_requests, num_draft), generator=generator) / 3
    yield from (odd, steps, torch.ones(num_requests, num_draft))
    yield torch.rand(num_requests, num_draft, generator=generator)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("num_requests", "num_draft"), [(1, 1), (1, 16), (33, 3), (256, 1), (256, 8), (256, 16)]
)
def test_lengths_are_the_definitions(num_requests, num_draft):
    """Ties, zeros of both signs, figures that are none, drafts of length 0, and budgets from none
    to more than all; every budget of the smaller batches."""
    generator = torch.Generator().manual_seed(num_requests + num_draft)
    most = num_requests * num_draft
    budgets = range(most + 2) if most < 20 else (0, 1, most // 5, most // 2, most - 1, most)
    budgets = [*budgets, -3.0, most / 3 + 0.5, 1e9, INF, NAN]
    thresholds = (0.0, 0.25, 0.6, 1.0, NAN)
    for number, scores in enumerate(kinds_of_scores(generator, num_requests, num_draft)):
        offered = torch.randint(0, num_draft + 1, (num_requests,), generator=generator)
        if number % 2:
            offered.fill_(num_draft)
        for index, budget in enumerate(budgets):
            threshold = thresholds[index % len(thresholds)] if index % 2 else 0.0
            asked = scores, offered, threshold, float(budget), (index + number) % 3 == 0
            wanted = allocate(allocation, *asked)
            assert torch.equal(allocate(allocation_triton, *asked), wanted), asked[2:]


def test_every_budget_of_a_batch_in_which_all_is_equal():
    """The whole order: by survival, then by position, then by request."""
    scores = torch.tensor([1.0, 0.5, 0.5]).repeat(5, 1)
    offered = torch.tensor([3, 0, 2, 3, 1])
    lengths = [
        allocate(allocation_triton, scores, offered, 0.0, float(budget), cumulative=False).tolist()
        for budget in range(10)
    ]
    assert lengths == [
        [0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 1, 1, 1],
        [2, 0, 1, 1, 1], [2, 0, 2, 1, 1], [2, 0, 2, 2, 1], [3, 0, 2, 2, 1], [3, 0, 2, 3, 1],
    ]  # fmt: skip


@BOTH
def test_the_same_factors_in_another_order_are_the_same_survival(by):
    """Products are rounded once: if each were, permuted factors would seldom tie."""
    orders = list(permutations((0.9, 0.7, 0.3, 0.99)))
    scores, offered = torch.tensor(orders), torch.full((24,), 4)
    for num in range(25):
        lens = allocate(by, scores, offered, 0.0, 72.0 + num, cumulative=True)
        assert lens.tolist() == [4] * num + [3] * (24 - num)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("score", ["top", "entropy", "margin", "head"])
@pytest.mark.parametrize("num_requests", [1, 40])
def test_figures_are_cut_as_by_the_definition_and_noted(score, num_requests):
    """Figures that are none, padding, and different temperatures; what is behind the noted rows
    and columns stays."""
    num_draft, padding = 5, num_requests // 4
    generator = torch.Generator().manual_seed(num_requests)
    logits = 2 * torch.randn(num_requests * num_draft, 30, generator=generator)
    figures = allocation.confidence(logits).view(num_requests, num_draft, 3)
    figures[::7, 2] = NAN
    figures[::5, 3, 0] = 0.0
    offered = torch.randint(0, num_draft + 1, (num_requests,), generator=generator)
    offered[num_requests - padding :] = 0
    warmth = torch.rand(num_requests, generator=generator)
    head = on_device(random_head())
    for cumulative, share in product((False, True), (0.3, 0.6, 2.0)):
        threshold = below(judged_by(score, figures.nan_to_num(), cumulative=False))
        budget = share * num_requests * num_draft if share < 1 else 1e9
        values = torch.tensor([threshold ** (1 + cumulative), budget, 0.2], device=DEVICE)
        found = []
        for by in (allocation, allocation_triton):
            noted = torch.full((num_requests + 2, 1 + 3 * num_draft + 4), 7.0, device=DEVICE)
            lens = by.cut_drafts(
                figures.to(DEVICE), offered.to(DEVICE), warmth.to(DEVICE),
                allocation.CutValues(*values.unbind()), head, noted[:num_requests],
                score=score, cumulative=cumulative,
            )  # fmt: skip
            found.append((lens, noted.nan_to_num(-1.0)))
        (wanted, wanted_noted), (got, got_noted) = found
        assert torch.equal(got_noted, wanted_noted)
        assert torch.equal(got, wanted)
        assert got.sum() <= budget


@triton.jit
def _scores(figures_ptr, temperature, w, scores_ptr, SIZE: tl.constexpr, HIDDEN: tl.constexpr):
    at = tl.arange(0, SIZE)
    score = allocation_triton.head_score(
        tl.load(figures_ptr + at * 3), tl.load(figures_ptr + at * 3 + 1),
        tl.load(figures_ptr + at * 3 + 2), (at % 8).to(tl.float32), temperature,
        w, w + 5, w + 10, w + 90, w + 106, w + 122, HIDDEN,
    )  # fmt: skip
    tl.store(scores_ptr + at, score)


@pytest.mark.parametrize("size", [0.3, 1.0, 30.0])
def test_a_heads_scores_are_the_definitions(size):
    """Also where units are saturated."""
    generator = torch.Generator().manual_seed(1)
    figures = torch.rand(8, 8, 3, generator=generator).to(DEVICE)
    figures[0, 0] = 0.0
    flat = size * torch.randn(123, generator=generator).to(DEVICE)
    mean, scale, w1, b1, w2, b2 = flat.split((5, 5, 80, 16, 16, 1))
    head = HeadWeights(mean, scale, w1.view(16, 5), b1, w2, b2[0])
    wanted = allocation.head_scores(figures.double(), torch.full((8,), 0.7).to(DEVICE), _wide(head))

    found = torch.empty(64, device=DEVICE)
    _scores[(1,)](figures, 0.7, flat, found, SIZE=64, HIDDEN=16)

    tolerance = 3e-6 * max(1.0, size * size)
    torch.testing.assert_close(found.view(8, 8), wanted.float(), rtol=0, atol=tolerance)
    assert 0 < wanted.mean() < 1


def _wide(head):
    return HeadWeights(*(getattr(head, name).double() for name in HeadWeights.__slots__))


@pytest.mark.parametrize(("num_requests", "num_draft"), [(1024, 16), (1025, 1), (600, 20)])
def test_batches_that_fit_no_program_are_cut_by_the_definition(num_requests, num_draft):
    generator = torch.Generator().manual_seed(2)
    scores = torch.randint(1, 9, (num_requests, num_draft), generator=generator) / 8
    offered = torch.randint(0, num_draft + 1, (num_requests,), generator=generator)
    asked = scores, offered, 0.1, num_requests * num_draft / 4, True

    with counted() as launched:
        meta = [torch.empty(one.shape, dtype=one.dtype, device="meta") for one in asked[:2]]
        number = torch.empty((), device="meta")
        allocation_triton.allocate(*meta, number, number, cumulative=True)

    assert (launched["_cut"], launched["sort"]) in ((1, 0), (0, 1))
    assert (launched["_cut"] == 1) == (num_requests == 1024)
    wanted = allocate(allocation, *asked)
    assert torch.equal(allocate(allocation_triton, *asked), wanted)


def test_figures_of_a_batch_that_fits_no_program_are_noted_too():
    figures, offered = torch.rand(1025, 2, 3), torch.full((1025,), 2)
    asked = "margin", figures, offered, 0.5, 1e9, False
    assert torch.equal(cut_drafts(allocation_triton, *asked), cut_drafts(allocation, *asked))
    noted = torch.zeros(1025, 7, device=DEVICE)
    values = allocation.CutValues(*torch.zeros(3, device=DEVICE).unbind())
    allocation_triton.cut_drafts(
        figures.to(DEVICE), offered.to(DEVICE), torch.ones(1025, device=DEVICE), values,
        on_device(random_head()), noted, score="top", cumulative=False,
    )  # fmt: skip
    assert torch.equal(noted[:, 1:].cpu(), figures.flatten(1)) and (noted[:, 0] == 2).all()


@BOTH
@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_there_may_be_nothing_to_cut(by, shape):
    lens = allocate(by, torch.zeros(shape), torch.zeros(shape[0]).long(), 0.0, 4.0, False)
    assert lens.tolist() == [0] * shape[0]


def test_tensors_of_another_kind_are_refused():
    scores, offered = torch.rand(4, 3, device=DEVICE), torch.zeros(4, device=DEVICE).long()
    number = torch.ones((), device=DEVICE)

    def refused(*asked):
        return pytest.raises(ValueError, match=asked[0])

    with refused("scores must be contiguous torch.float32, got torch.float64"):
        allocation_triton.allocate(scores.double(), offered, number, number, cumulative=True)
    with refused("scores must be contiguous"):
        strided = torch.rand(3, 4, device=DEVICE).T
        allocation_triton.allocate(strided, offered, number, number, cumulative=True)
    with refused("offered must be contiguous torch.int64, got torch.int32"):
        allocation_triton.allocate(scores, offered.int(), number, number, cumulative=True)
    with refused("lens must be contiguous torch.int64, got torch.int32"):
        allocation_triton.pack_rows(offered.int(), 3, 4)
    with refused("at least two logits"):
        allocation_triton.confidence(torch.zeros(3, 1, device=DEVICE))
    with refused("must be contiguous rows"):
        allocation_triton.confidence(torch.zeros(4, 3, device=DEVICE).T)


# ---- packed rows -------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("num_requests", "num_draft"), [(1, 1), (1, 16), (7, 3), (256, 8), (300, 2), (3, 40)]
)
@pytest.mark.parametrize("spare", [0, 1, 600])
def test_packed_rows_are_the_definitions(num_requests, num_draft, spare):
    """Without padding, and with more than is written at once; more requests than are added at
    once; longer drafts than any round's."""
    generator = torch.Generator().manual_seed(num_requests)
    lens = torch.randint(0, num_draft + 1, (num_requests,), generator=generator)
    asked = lens, num_draft, int(lens.sum()) + spare

    got, wanted = pack_rows(allocation_triton, *asked), pack_rows(allocation, *asked)

    for name in PackedRows.__slots__:
        one, other = getattr(got, name), getattr(wanted, name)
        assert one.dtype == other.dtype and torch.equal(one, other), name


# ---- confidence --------------------------------------------------------------------------------


def figures_exactly(logits):
    """The three figures in float64."""
    law = logits.double().softmax(-1)
    best = law.topk(2, dim=-1).values
    entropy = torch.special.entr(law).sum(-1)
    return torch.stack((best[:, 0], entropy, best[:, 0] - best[:, 1]), dim=1)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("vocab", "options"),
    [
        (2, {}),
        (300, {}),
        (5000, {}),
        (1000, {"span": 64}),
        (1000, {"span": 16, "spans_of_part": 3}),
        (1009, {"span": 64, "spans_of_part": 1}),
    ],
    ids=str,
)
def test_figures_are_those_of_the_law(vocab, options, dtype):
    """Flat laws and sharp ones; rows of one span and of many, of one part and of several."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(6, vocab, generator=generator)
    logits *= torch.tensor([0.0, 0.1, 1.0, 3.0, 10.0, 60.0])[:, None]
    logits += torch.tensor([0.0, 50.0, -300.0, 0.0, 1000.0, 0.0])[:, None]
    logits = logits.to(dtype).to(DEVICE)

    found = allocation_triton.confidence(logits, **options)

    torch.testing.assert_close(
        found.double(), figures_exactly(logits), rtol=1e-6, atol=2.5e-7, check_dtype=False
    )
    torch.testing.assert_close(found, allocation.confidence(logits), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("spans_of_part", [99, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_no_law_and_masked_ones(dtype, spans_of_part):
    vocab = 150
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(14, vocab, generator=generator)
    logits[0, 0] = NAN
    logits[1, 149] = NAN
    logits[2, 77] = INF
    logits[3] = -INF
    logits[4, 60], logits[4, 61] = INF, -INF
    logits[5] = NAN
    logits[6, 1:] = -INF  # one token is left,
    logits[7, :149] = -INF
    logits[8, :140] = -INF  # or some of the last part,
    logits[9, 3:] = torch.finfo(dtype).min
    logits[10, [20, 100]] = 9.0  # two are the likeliest, in one part and another,
    logits[11, [20, 21]] = 9.0
    logits[12, [20, 36]] = 9.0  # and in one lane
    logits[13, :] = -0.0
    logits = logits.to(dtype).to(DEVICE)

    found = allocation_triton.confidence(logits, span=16, spans_of_part=spans_of_part)

    none = torch.tensor([0.0, math.log(vocab), 0.0], device=DEVICE)
    torch.testing.assert_close(found[:6], none.expand(6, 3))
    torch.testing.assert_close(found[6:8].cpu(), torch.tensor([[1.0, 0.0, 1.0]]).expand(2, 3))
    assert (found[10:, 2] == 0).all()
    torch.testing.assert_close(found, allocation.confidence(logits), rtol=2e-6, atol=1e-6)


def test_rows_may_lie_apart():
    logits = torch.randn(4, 3, 70, device=DEVICE)

    found = allocation_triton.confidence(logits[:, 1])

    torch.testing.assert_close(found, allocation.confidence(logits[:, 1]), rtol=2e-6, atol=1e-6)
    assert allocation_triton.confidence(logits[:0, 1]).shape == (0, 3)


# ---- launches ----------------------------------------------------------------------------------


def test_a_cut_is_one_launch_and_so_are_the_figures_of_a_pass_and_packed_rows():
    with torch.device("meta"):
        figures, offered, warmth = torch.empty(256, 8, 3), torch.empty(256).long(), torch.empty(256)
        values = allocation.CutValues(*torch.empty(3).unbind())
        shapes = ((5,), (5,), (16, 5), (16,), (16,), ())
        head = HeadWeights(*(torch.empty(shape) for shape in shapes))
        noted = torch.empty(256, 1 + 3 * 8)
        logits = torch.empty(256, 32_000, dtype=torch.bfloat16)
        few = torch.empty(4, 150_000, dtype=torch.bfloat16)
    with counted() as launched:
        for score in ("top", "entropy", "margin", "head"):
            device.cut_drafts(
                figures, offered, warmth, values, head, noted, score=score, cumulative=True
            )
    assert launched == {"_cut": 4}
    with counted() as launched:
        device.confidence(logits)
    assert launched == {"_confidence_of_part": 1}
    with counted() as launched:
        device.confidence(few)
    assert launched == {"_confidence_of_part": 1, "_join_confidence": 1}
    with counted() as launched:
        device.pack_rows(offered, 8, 1024)
    assert launched == {"_pack": 1}
