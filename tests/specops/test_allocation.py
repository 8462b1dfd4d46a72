"""Drafts cut on the device, request by request: outputs follow the target, and what is cut is what
the rule says.

Laws are exact: every draft, every length and every outcome is enumerated in float64 with the
functions that serving calls, for each verification rule and each way to cut, by the definition and
by the kernels (interpreted without a GPU).
"""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
import torch

from policies.allocation import Allocation, Cut
from policies.confidence_head import HIDDEN, Head
from specops import allocation, allocation_triton
from specops.allocation import NUM_FIGURES, TOP, CutValues, HeadWeights, PackedRows
from specops.verify import acceptance, block_acceptance, residual
from tests.specops.test_verification_is_exact import (
    K,
    V,
    decoded_plainly,
    drafted_law,
    joint,
    one_hot,
    random_laws,
    rows,
    spread,
)

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
IMPLEMENTATIONS = [
    pytest.param(allocation, id="definition"),
    pytest.param(allocation_triton, id="kernel"),
]
BOTH = pytest.mark.parametrize("by", IMPLEMENTATIONS)
SCORES = ("top", "entropy", "margin", "head")
ALL_DRAFTS = torch.tensor(list(itertools.product(range(V), repeat=K)))


def random_head(seed=0):
    numbers = np.random.default_rng(seed)
    shapes = ((5,), (5,), (HIDDEN, 5), (HIDDEN,), (HIDDEN,), (1,))
    weights = [numbers.normal(size=shape).astype(np.float32) for shape in shapes]
    return Head(*weights)


def on_device(head):
    tensors = [torch.from_numpy(getattr(head, name)).to(DEVICE) for name in head.__slots__]
    return HeadWeights(*tensors[:-1], tensors[-1][0])


def confidence(by, logits):
    return by.confidence(logits.to(DEVICE)).cpu()


def allocate(by, scores, offered, threshold, budget, cumulative):
    threshold, budget = torch.tensor([threshold, budget], device=DEVICE).unbind()
    lens = by.allocate(
        scores.float().to(DEVICE), offered.to(DEVICE), threshold, budget, cumulative=cumulative
    )
    return lens.cpu()


def cut_drafts(by, score, figures, offered, threshold, budget, cumulative, head=None):
    values = CutValues(*torch.tensor([threshold, budget, 0.2], device=DEVICE).unbind())
    lens = by.cut_drafts(
        figures.to(DEVICE), offered.to(DEVICE), torch.ones(len(offered), device=DEVICE), values,
        on_device(head or random_head()), score=score, cumulative=cumulative,
    )  # fmt: skip
    return lens.cpu()


def pack_rows(by, lens, num_draft, capacity):
    found = by.pack_rows(lens.to(DEVICE), num_draft, capacity)
    return PackedRows(*(getattr(found, name).cpu() for name in PackedRows.__slots__))


def judged_by(score, figures, cumulative, head=None):
    """[R, K] what is compared with the threshold, in float64."""
    cut = Allocation(Cut(score, cumulative), 0.0, gamma=0.2, head=head or random_head())
    scores = np.clip(cut.scores(figures.double().numpy(), np.ones(len(figures))), 0, 1)
    return scores.cumprod(1) if cumulative else scores


def below(numbers, share=0.5):
    """A number just below the quantile of these, and far from all of them."""
    rounded = np.sort(np.asarray(numbers).round(5), axis=None)
    found = rounded[int(share * len(rounded))]
    return float(found + rounded[rounded < found].max()) / 2


def figures_along(q):
    """[drafts, K, F] figures of every draft's positions."""
    logits = torch.stack([q[()].log().expand(len(ALL_DRAFTS), -1)] + [
        torch.stack([q[tuple(draft[:k].tolist())].log() for draft in ALL_DRAFTS])
        for k in range(1, K)
    ], dim=1)  # fmt: skip
    found = allocation.confidence(logits.flatten(0, 1))
    return found.view(len(ALL_DRAFTS), K, NUM_FIGURES)


def weights_of(q):
    """[drafts] probability of every draft."""
    return torch.stack(
        [torch.stack([q[tuple(d[:k].tolist())][d[k]] for k in range(K)]).prod() for d in ALL_DRAFTS]
    )


def drawn_probabilities(q):
    """[drafts, K] probability of every drafted token."""
    return torch.stack(
        [torch.stack([q[tuple(d[:k].tolist())][d[k]] for k in range(K)]) for d in ALL_DRAFTS]
    )


def outcomes(p, q, rule, delta=False):
    """[drafts, K + 1, V ** (K + 1)] law of what comes out of each draft, cut to each length, when
    the round is followed by plain decoding."""
    futures = decoded_plainly(p)
    found = torch.zeros(len(ALL_DRAFTS), K + 1, *[V] * (K + 1), dtype=torch.float64)
    is_possible = (weights_of(q) > 0).tolist()
    for number, draft in enumerate(map(tuple, ALL_DRAFTS.tolist())):
        if not is_possible[number]:
            continue
        p_rows, q_rows = rows(p, q, draft, delta)
        ids = torch.tensor([draft])
        keep = acceptance(p_rows, q_rows, ids)[0][0]
        for length in range(K + 1):
            out = found[number, length]
            if rule == "standard":
                survived = torch.ones((), dtype=torch.float64)
                for i in range(length):
                    rest = residual(p[draft[:i]], drafted_law(q, draft, i, delta))
                    spread(out, draft[:i], rest, survived * (1 - keep[i]), futures)
                    survived = survived * keep[i]
                spread(out, draft[:length], p[draft[:length]], survived, futures)
                continue
            h, pi, _ = block_acceptance(p_rows, q_rows, ids, torch.tensor([length]))
            not_later = torch.ones((), dtype=torch.float64)
            for i in range(length, -1, -1):
                taken = h[0, i - 1] if i else 1.0
                law = p[draft[:i]]
                if i < length:
                    law = residual(law, drafted_law(q, draft, i, delta), pi[0, i])
                spread(out, draft[:i], law, not_later * taken, futures)
                not_later = not_later * (1 - taken)
    return found.flatten(2)


NO_BUDGET = float(len(ALL_DRAFTS) * K)
OFFERED = torch.full((len(ALL_DRAFTS),), K)


def lengths_along(by, q, score, cumulative):
    """[drafts] lengths by the function that serving calls, each draft for itself."""
    figures = figures_along(q)
    threshold = below(judged_by(score, figures, cumulative))
    return cut_drafts(by, score, figures, OFFERED, threshold, NO_BUDGET, cumulative)


def emitted(p, q, rule, lengths, delta=False):
    at = torch.arange(len(ALL_DRAFTS))
    laws = outcomes(p, q, rule, delta)[at, lengths]
    return (weights_of(q)[:, None] * laws).sum(0)


def off(law, wanted):
    return float((law - wanted).abs().sum() / 2)


@BOTH
@pytest.mark.parametrize("rule", ["standard", "block"])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("cumulative", [False, True])
def test_drafts_cut_by_their_own_confidence_leave_the_targets_law(by, rule, score, cumulative):
    p, q = random_laws(3, 1.5), random_laws(103, 2.0)

    lengths = lengths_along(by, q, score, cumulative)

    assert len(set(lengths.tolist())) > 1, "nothing was cut, or everything"
    assert off(emitted(p, q, rule, lengths), joint(p).flatten()) <= 1e-12


@BOTH
@pytest.mark.parametrize("rule", ["standard", "block"])
def test_cut_delta_drafts_leave_the_targets_law(by, rule):
    p, soft = random_laws(4, 1.5), random_laws(104, 2.0)

    lengths = lengths_along(by, soft, "top", cumulative=False)

    law = emitted(p, one_hot(soft), rule, lengths, delta=True)
    assert off(law, joint(p).flatten()) <= 1e-12


@BOTH
@pytest.mark.parametrize("rule", ["standard", "block"])
@pytest.mark.parametrize("cumulative", [False, True])
def test_a_policy_that_looks_at_the_drawn_token_is_seen(by, rule, cumulative):
    """Planted: the score of a position is the probability of the token that was drawn there."""
    p, q = random_laws(3, 1.5), random_laws(103, 2.0)
    drawn = drawn_probabilities(q)
    threshold = below(drawn.cumprod(1) if cumulative else drawn)

    lengths = allocate(by, drawn, OFFERED, threshold, NO_BUDGET, cumulative)

    assert off(emitted(p, q, rule, lengths), joint(p).flatten()) > 1e-3


def pairs_cut(first_DK, second_DK, budget, by=allocation, every=1):
    """[drafts, drafts, 2] lengths of two requests under one budget, for every pair of drafts or for
    some of them; those of others are -1."""
    found = torch.full((len(first_DK), len(second_DK), 2), -1)
    pairs = itertools.product(range(len(first_DK)), range(len(second_DK)))
    for i, j in itertools.islice(pairs, 0, None, every):
        both = torch.stack((first_DK[i], second_DK[j]))
        found[i, j] = allocate(by, both, OFFERED[:2], 0.0, float(budget), cumulative=True)
    return found


def joint_of_two(laws, weights, lengths):
    """[outcomes, outcomes] law of both requests together."""
    num, size = len(ALL_DRAFTS), K + 1
    mass = torch.zeros(num * size, num * size, dtype=torch.float64)
    at = torch.arange(num) * size
    row = at[:, None] + lengths[..., 0]
    column = at[None, :] + lengths[..., 1]
    mass[row, column] = weights[0][:, None] * weights[1][None, :]
    return laws[0].flatten(0, 1).T @ mass @ laws[1].flatten(0, 1)


def test_requests_that_share_a_budget_stay_exact_and_independent():
    """What one request drafts displaces tokens of the other; their joint law is the product all the
    same, by both rules. With the drawn tokens' probabilities it is not."""
    p = random_laws(5, 1.5), random_laws(6, 1.5)
    q = random_laws(17, 1.0), random_laws(18, 1.0)
    weights = [weights_of(one) for one in q]
    wanted = joint(p[0]).flatten()[:, None] * joint(p[1]).flatten()[None, :]

    scores = [figures_along(one)[..., TOP] for one in q]
    lengths = pairs_cut(*scores, budget=K)

    some = pairs_cut(*scores, budget=K, by=allocation_triton, every=67)
    assert (some == lengths).all(dim=-1).sum() == (some >= 0).all(dim=-1).sum() > 60
    cheated = pairs_cut(*map(drawn_probabilities, q), budget=K)
    assert (lengths.sum(-1) == K).all()
    assert len(set(lengths[..., 0].flatten().tolist())) > 2, "one draft never displaces another"
    for rule in ("standard", "block"):
        laws = [outcomes(*both, rule) for both in zip(p, q, strict=True)]
        assert off(joint_of_two(laws, weights, lengths), wanted) <= 1e-12
        assert off(joint_of_two(laws, weights, cheated), wanted) > 1e-3


@BOTH
def test_a_length_depends_on_nothing_behind_it(by):
    """Whatever is drafted at position k and later, whether k is verified stays."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(6, 5, generator=generator)
    offered = torch.tensor([5, 5, 3, 0, 5, 4])
    before = allocate(by, scores, offered, 0.2, 9.0, cumulative=False)
    for r, k in itertools.product(range(6), range(5)):
        other = scores.clone()
        other[r, k + 1 :] = torch.rand(5 - k - 1, generator=generator)
        after = allocate(by, other, offered, 0.2, 9.0, cumulative=False)
        assert min(int(after[r]), k + 1) == min(int(before[r]), k + 1)


@BOTH
@pytest.mark.parametrize("budget", [0, 1, 7, 20, 40])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("cumulative", [False, True])
def test_the_device_cuts_as_the_policys_definition_says(by, score, budget, cumulative):
    generator = torch.Generator().manual_seed(budget)
    head = random_head()
    logits = 2 * torch.randn(8, 5, 30, generator=generator)
    figures = allocation.confidence(logits.flatten(0, 1)).view(8, 5, NUM_FIGURES)
    offered = torch.randint(0, 6, (8,), generator=generator)
    threshold = below(judged_by(score, figures, False, head), 0.2)
    cut = Allocation(Cut(score, cumulative), threshold, budget / 8, head=head)

    got = cut_drafts(
        by, score, figures, offered, threshold, float(cut.budget(8, 5)), cumulative, head
    )

    wanted = cut.lengths(figures.double().numpy(), offered.tolist(), np.ones(8), batch=8)
    assert (got - torch.from_numpy(wanted)).abs().sum() <= 1, "a tie of rounded scores at most"
    assert (got <= offered).all() and got.sum() <= budget


@BOTH
def test_equal_confidence_gives_the_budget_to_earlier_positions(by):
    lens = allocate(by, torch.ones(3, 4), torch.tensor([4, 2, 4]), 0.0, 8.0, cumulative=True)
    assert lens.tolist() == [3, 2, 3]


@BOTH
def test_figures_are_those_of_the_distribution(by):
    logits = torch.tensor([[1.0, 2.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0]])
    law = logits.softmax(-1)

    found = confidence(by, logits)

    best = law.sort(descending=True).values
    torch.testing.assert_close(found[:, 0], best[:, 0])
    torch.testing.assert_close(found[:, 1], -(law * law.log()).sum(-1))
    torch.testing.assert_close(found[:, 2], best[:, 0] - best[:, 1])


@BOTH
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_distribution_that_is_none_has_no_confidence(by, poison):
    logits = torch.tensor([[1.0, poison, 0.0], [1.0, float("-inf"), 0.0]])

    broken, masked = confidence(by, logits)

    assert broken[0] == 0 and broken[2] == 0 and broken[1] == pytest.approx(np.log(3))
    assert 0.5 < masked[0] < 1, "a masked token is no damage"


@BOTH
@pytest.mark.parametrize("capacity", [5, 6, 9, 20])
def test_packed_rows_are_the_rows_that_are_verified(by, capacity):
    lens, num_draft = torch.tensor([2, 0, 3, 0]), 3

    packed = pack_rows(by, lens, num_draft, capacity)

    index = packed.at_T[packed.is_real_T].tolist()
    wanted = [r * 4 + j for r, n in enumerate(lens.tolist()) for j in range(n + 1)]
    assert index == wanted
    assert len(packed.at_T) == 4 + capacity
    assert packed.request_T[packed.is_real_T].tolist() == [at // 4 for at in wanted]
    whole = torch.arange(16.0)[:, None]
    spread_out = packed.spread(whole[packed.at_T]).view(4, 4)
    for r, n in enumerate(lens.tolist()):
        assert spread_out[r].tolist() == [r * 4 + min(j, n) for j in range(4)]
