"""Played again, a text's rounds are as many as verification made of them: every text and every
draft is enumerated, so there is no sampling noise."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from drafters.batch import TrainingBatch, from_sequences
from drafters.kept import acceptance_of_text, target_label_probs
from specops.distill import FrozenHead, RowFigures
from specops.verify import block_acceptance

V, K = 3, 3
TARGET = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5]], dtype=torch.float64)
"""[V, V] law of the next token by the last one."""
DRAFT = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1], [0.2, 0.2, 0.6]], dtype=torch.float64)


def kept_with_text(text: tuple[int, ...], *, block: bool) -> list[float]:
    """[K] probability that the first k tokens of a draft are kept and the text begins with them,
    by what the rules say of each draft."""
    found = []
    for k in range(1, K + 1):
        drafts = itertools.product(range(V), repeat=K - k)
        total = 0.0
        for rest in drafts:
            ids = text[:k] + rest
            before = [0, *ids]
            p, q = (law[before[:-1]][None] for law in (TARGET, DRAFT))
            drafted = float(torch.stack([q[0, i, ids[i]] for i in range(K)]).prod())
            chain = torch.tensor([ids])
            if block:
                stop_RK, _, _ = block_acceptance(p, q, chain, torch.tensor([K]))
                kept = float(1 - (1 - stop_RK[0, k - 1 :]).prod())
            else:
                ratio = torch.stack([p[0, i, ids[i]] / q[0, i, ids[i]] for i in range(k)])
                kept = float(ratio.clamp_max(1).prod())
            total += drafted * kept
        found.append(total)
    return found


def batch_of(text: tuple[int, ...], **changes: torch.Tensor) -> TrainingBatch:
    """A text behind two tokens, so that the rows with a loss predict the text."""
    ids = torch.tensor([[1, 0, *text]])
    size = ids.shape[1]
    rows = torch.eye(V)[ids]
    known, loss = torch.ones(1, size, dtype=torch.bool), torch.ones(1, size, dtype=torch.bool)
    loss[:, -1] = False
    given = ids, torch.arange(size)[None], rows, rows, known, loss
    return from_sequences(*given, **changes)


def figures_of(label_prob: torch.Tensor, agrees: torch.Tensor) -> RowFigures:
    """A drafter's figures, with overlaps of a quarter."""
    return RowFigures(
        torch.zeros_like(label_prob), torch.full_like(label_prob, 0.25), label_prob, agrees
    )


HEAD = FrozenHead(TARGET.log().T.float())
"""Its logits are those of the last token's law."""


@pytest.mark.parametrize("block", [False, True], ids=["standard", "block"])
def test_what_is_kept_given_the_text_is_what_the_rule_keeps(block: bool) -> None:
    for text in itertools.product(range(V), repeat=K):
        batch = batch_of(text)
        before = [0, *text[:-1]]
        p = torch.stack([TARGET[b, x] for b, x in zip(before, text, strict=True)])
        q = torch.stack([DRAFT[b, x] for b, x in zip(before, text, strict=True)])
        alive_KR = torch.tensor([[True] * K, [True, True, False], [True, False, False]])
        drafted = torch.stack([q.roll(-k) for k in range(K)])
        figures = figures_of(drafted, torch.zeros(K, K, dtype=torch.bool))

        _, alphas, is_full = acceptance_of_text(batch, HEAD, figures, alive_KR, block=block)

        found = alphas[0].double().cumprod(0) * p.cumprod(0)
        expected = torch.tensor(kept_with_text(text, block=block), dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
        assert is_full.tolist() == [True, False, False]
        assert bool((alphas[1:][~alive_KR.T[1:]] == 0).all())


@pytest.mark.parametrize(("temperature", "overlap"), [(0.0, [1.0, 0.0, 1.0]), (0.7, [0.25] * 3)])
def test_greedy_and_seeded_requests_keep_what_the_drafter_finds_likeliest(
    temperature: float, overlap: list[float]
) -> None:
    agrees = torch.tensor([[True, False, True]])
    batch = batch_of((0, 1, 2), temperature_B=torch.tensor([temperature]))
    batch = replace(batch, by_match_R=torch.ones(3, dtype=torch.bool))
    figures = figures_of(torch.full((1, 3), 0.9), agrees)

    found = acceptance_of_text(batch, HEAD, figures, torch.ones(1, 3, dtype=torch.bool))

    assert found.kept_RK[:, 0].tolist() == [1.0, 0.0, 1.0]
    assert found.overlap_RK[:, 0].tolist() == overlap


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_targets_probabilities_are_at_the_temperature_and_capped_where_it_caps(
    temperature: float,
) -> None:
    text = (2, 0, 1)
    batch = batch_of(text, temperature_B=torch.tensor([temperature]))
    for softcap in (None, 0.8):
        logits = TARGET.log()
        capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        law = (capped / temperature).softmax(-1)

        found = target_label_probs(batch, FrozenHead(HEAD.weight_VH, softcap))

        expected = torch.stack([law[b, x] for b, x in zip((0, 2, 0), text, strict=True)])
        torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
