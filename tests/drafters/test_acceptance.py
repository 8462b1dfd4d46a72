"""Simulated figures are the ones verification would produce."""

from __future__ import annotations

import pytest
import torch

from drafters.acceptance import (
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
