"""Scores of other K hold under block verification: P(at least j kept) does not depend on K."""

from __future__ import annotations

import torch

from specops.verify import verify_block, verify_standard

V, NUM = 5, 120_000


def survival(rule, k, seed):
    """[k] share of rounds that keep at least 1, 2, ... k draft tokens."""
    tables = torch.Generator().manual_seed(1)
    p = torch.softmax(1.5 * torch.randn(5, V, generator=tables, dtype=torch.float64), -1)
    q = torch.softmax(1.5 * torch.randn(4, V, generator=tables, dtype=torch.float64), -1)
    numbers = torch.Generator().manual_seed(seed)
    draft = torch.stack(
        [torch.multinomial(q[j], NUM, replacement=True, generator=numbers) for j in range(k)], 1
    )
    lens = torch.full((NUM,), k)
    uniform = torch.rand(NUM, k + 1, generator=numbers, dtype=torch.float64)
    verdict = rule(
        p[: k + 1].expand(NUM, k + 1, V),
        q[:k].expand(NUM, k, V),
        draft,
        lens,
        uniform[:, :k],
        uniform[:, k],
    )
    kept = verdict.num_accepted_R
    return [float((kept >= j).double().mean()) for j in range(1, k + 1)]


def test_a_longer_draft_keeps_at_least_j_tokens_as_often_as_a_short_one():
    longest = survival(verify_block, 4, 7)
    for k in (1, 2, 3):
        for short, long in zip(survival(verify_block, k, k), longest, strict=False):
            assert abs(short - long) < 5 * (2 * 0.25 / NUM) ** 0.5


def test_block_verification_keeps_more_than_the_standard_rule_here():
    """Otherwise the test above would say nothing about it."""
    block, standard = survival(verify_block, 4, 7), survival(verify_standard, 4, 7)
    assert block[-1] > standard[-1] + 0.005
