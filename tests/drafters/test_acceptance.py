"""Simulated figures are the ones verification would produce."""

from __future__ import annotations

import pytest
import torch

from drafters.acceptance import (
    Chains,
    conditional_acceptance,
    expected_acceptance,
    simulated_tokens_per_step,
)


def test_acceptance_is_one_for_equal_and_zero_for_disjoint_distributions() -> None:
    target = torch.tensor([[[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]])
    draft = torch.tensor([[[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]])

    assert expected_acceptance(target, draft).equal(torch.tensor([[1.0, 0.0]]))


def test_acceptance_of_different_shapes_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"one shape \[B, K, V\], got \(1, 2, 3\) and \(1, 2, 4\)"):
        expected_acceptance(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4))


def test_tokens_per_step_counts_the_kept_prefix_and_the_targets_own_token() -> None:
    alphas = torch.tensor([[1.0, 1.0, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0]])

    assert simulated_tokens_per_step(alphas, 4) == 1 + (2 + 0) / 2
    assert simulated_tokens_per_step(alphas, 1) == 1.5
    assert simulated_tokens_per_step(alphas, 0) == 1.0


def test_tokens_per_step_of_constant_acceptance_is_the_geometric_sum() -> None:
    alphas = torch.full((3, 4), 0.8, dtype=torch.float64)

    assert simulated_tokens_per_step(alphas, 4) == pytest.approx((1 - 0.8**5) / (1 - 0.8))


def test_nothing_to_average_is_none_and_not_zero() -> None:
    assert simulated_tokens_per_step(torch.zeros(0, 4), 4) is None
    assert conditional_acceptance(torch.zeros(0, 2)) == [None, None]


def test_more_positions_than_simulated_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"draft_k must be in 0\.\.4, got 5"):
        simulated_tokens_per_step(torch.zeros(2, 4), 5)


def test_conditional_acceptance_multiplies_to_survival() -> None:
    alphas = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 1.0]])

    assert conditional_acceptance(alphas) == [0.5, 0.5]


def of_texts(texts: list[torch.Tensor]) -> list[Chains]:
    """Texts of which all chains count."""
    return Chains.of_texts(texts, [torch.ones(len(text), dtype=torch.bool) for text in texts])


def decoded(alphas: torch.Tensor, num_draft: int, generator: torch.Generator) -> tuple[int, int]:
    """Tokens and rounds of one text decoded with these acceptances, by drawing each verdict."""
    at = rounds = 0
    while at < len(alphas):
        kept = 0
        while kept < num_draft and torch.rand((), generator=generator) < alphas[at, kept]:
            kept += 1
        at, rounds = at + kept + 1, rounds + 1
    return at, rounds


def uneven_text(generator: torch.Generator, num_draft: int = 4) -> torch.Tensor:
    """Stretches that are easy and stretches that are hard to draft, as text has them."""
    levels = torch.tensor([0.95, 0.15]).repeat(8).repeat_interleave(12)
    noise = 0.05 * torch.rand(len(levels), num_draft, generator=generator)
    return (levels[:, None] - 0.05 + noise).float()


def test_chains_bring_the_tokens_per_step_that_decoding_does() -> None:
    """The mean over all places is a quarter higher here: rounds skip the easy places."""
    generator = torch.Generator().manual_seed(0)
    texts = [uneven_text(generator) for _ in range(20)]
    chains = Chains.join(of_texts(texts), 4)
    tokens_by_k = chains.tokens_by_k()
    assert tokens_by_k is not None

    for num_draft in (1, 4):
        runs = [decoded(text, num_draft, generator) for text in texts for _ in range(4)]
        lived = sum(tokens for tokens, _ in runs) / sum(rounds for _, rounds in runs)
        assert tokens_by_k[num_draft - 1] == pytest.approx(lived, rel=0.02)
    assert simulated_tokens_per_step(chains.alphas_NK, 4) > 1.2 * tokens_by_k[3]  # type: ignore[operator]


def test_acceptance_of_chains_multiplies_to_their_tokens_per_step() -> None:
    texts = [uneven_text(torch.Generator().manual_seed(1))]
    (chains,) = of_texts(texts)
    survival = torch.tensor(chains.acceptance()).cumprod(0)

    assert 1 + float(survival.sum()) == pytest.approx(chains.tokens_per_step(), rel=0.01)


def test_chains_that_are_alike_weigh_alike() -> None:
    (chains,) = of_texts([torch.full((4000, 3), 0.5)])

    assert chains.tokens_by_k() == pytest.approx([1.5, 1.75, 1.875], rel=1e-3)
    assert chains.acceptance() == pytest.approx([0.5] * 3)


def test_the_end_of_a_text_cuts_the_last_round() -> None:
    """Seven tokens in rounds of at most five: five and two, four rounds of two for K = 1."""
    alphas = torch.ones(7, 4)
    for place in range(7):
        alphas[place, 7 - place :] = 0  # nothing is left to be compared with
    (chains,) = Chains.of_texts([alphas], [torch.arange(7) <= 3])

    assert chains.tokens_by_k() == pytest.approx([7 / 4, 7 / 3, 7 / 2, 7 / 2])
    assert chains.acceptance() == [1.0] * 4


def test_no_chains_are_no_figures() -> None:
    assert of_texts([]) == []
    assert Chains.none(4).tokens_by_k() is None
    assert Chains.none(4).acceptance() == []
    assert len(Chains.join(of_texts([torch.zeros(0, 4)]), 4)) == 0
