"""A loss is what its formula says, its gradient is the formula's gradient, and its limits hold."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from drafters.eagle3.losses import head_losses
from drafters.objectives import dpace_weights
from specops.distill import (
    ETA,
    Rows,
    Target,
    forward_kl,
    lk_hybrid,
    overlap,
    reverse_kl,
    row_loss,
    total_variation,
)


def random_rows(seed: int, rows: int = 5, vocab: int = 7) -> tuple[Tensor, Tensor]:
    """Target probabilities and draft logits, float64."""
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    logits = 2 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    return scores.softmax(-1), logits.requires_grad_()


def as_target(probs: Tensor) -> Target:
    mass = probs.sum(-1)
    renormalised = probs / mass[:, None]
    entropy = torch.special.xlogy(renormalised, renormalised).sum(-1)
    return Target(probs, mass, entropy)


def all_known(labels: Tensor, row: Tensor) -> Rows:
    return Rows(labels, torch.ones_like(labels, dtype=torch.bool), row)


@pytest.mark.parametrize("loss", [forward_kl, total_variation, reverse_kl])
def test_gradients_match_finite_differences(loss):  # type: ignore[no-untyped-def]
    probs, logits = random_rows(seed=0)

    assert torch.autograd.gradcheck(lambda z: loss(probs, z), (logits,))


def test_gradient_of_forward_kl_is_q_minus_p() -> None:
    probs, logits = random_rows(seed=1)

    (slope,) = torch.autograd.grad(forward_kl(probs, logits).sum(), logits)

    torch.testing.assert_close(slope, logits.detach().softmax(-1) - probs)


def test_reverse_kl_and_its_gradient_are_those_of_the_formula() -> None:
    probs, logits = random_rows(seed=11)
    q = logits.detach().softmax(-1)

    loss = reverse_kl(probs, logits)
    (slope,) = torch.autograd.grad(loss.sum(), logits)

    for row, (p_row, q_row) in enumerate(zip(probs.tolist(), q.tolist(), strict=True)):
        want = sum(b * math.log(b / a) for a, b in zip(p_row, q_row, strict=True))
        assert float(loss[row].detach()) == pytest.approx(want)
    ratio = (q / probs).log()
    torch.testing.assert_close(slope, q * (ratio - (q * ratio).sum(-1, keepdim=True)))


def test_reverse_kl_is_finite_where_the_target_has_no_probability() -> None:
    probs = torch.tensor([[1.0, 0.0]])
    logits = torch.tensor([[0.0, 0.0]]).requires_grad_()

    loss = reverse_kl(probs, logits)
    loss.sum().backward()

    assert float(loss.detach()) == pytest.approx(0.5 * 69.078 - 0.693, abs=1e-2)
    assert logits.grad is not None and float(logits.grad[0, 1]) > 10  # mass leaves that token


def test_gradient_of_total_variation_is_the_published_one() -> None:
    probs, logits = random_rows(seed=2)
    q = logits.detach().softmax(-1)
    sign = torch.where(q > probs, 1.0, -1.0).double()

    (slope,) = torch.autograd.grad(total_variation(probs, logits).sum(), logits)

    torch.testing.assert_close(slope, 0.5 * q * (sign - (q * sign).sum(-1, keepdim=True)))


def test_equal_distributions_lose_nothing() -> None:
    probs, _ = random_rows(seed=3)

    for loss in (forward_kl, total_variation, lk_hybrid, reverse_kl):
        torch.testing.assert_close(loss(probs, probs.log()), torch.zeros(5, dtype=torch.float64))


def test_disjoint_distributions_lose_everything() -> None:
    probs = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    logits = torch.tensor([[-200.0, 200.0]], dtype=torch.float64)

    assert float(total_variation(probs, logits)) == pytest.approx(1)
    assert float(forward_kl(probs, logits)) == pytest.approx(400)


def test_overlap_is_one_minus_half_the_l1_distance() -> None:
    probs, logits = random_rows(seed=4)

    l1 = (probs - logits.softmax(-1)).abs().sum(-1)

    torch.testing.assert_close(overlap(probs, logits), 1 - 0.5 * l1)


def test_lk_moves_from_kl_to_tv_as_acceptance_grows() -> None:
    probs, logits = random_rows(seed=5)
    share = torch.exp(-ETA * overlap(probs, logits))
    expected = share * forward_kl(probs, logits) + (1 - share) * total_variation(probs, logits)

    torch.testing.assert_close(lk_hybrid(probs, logits), expected)
    torch.testing.assert_close(lk_hybrid(probs, logits, eta=0.0), forward_kl(probs, logits))
    torch.testing.assert_close(lk_hybrid(probs, logits, eta=1e6), total_variation(probs, logits))


def test_lk_share_has_no_gradient() -> None:
    probs, logits = random_rows(seed=6)
    share = torch.exp(-ETA * overlap(probs, logits)).detach()
    fixed = share * forward_kl(probs, logits) + (1 - share) * total_variation(probs, logits)

    (expected,) = torch.autograd.grad(fixed.sum(), logits, retain_graph=True)
    (slope,) = torch.autograd.grad(lk_hybrid(probs, logits).sum(), logits)

    torch.testing.assert_close(slope, expected)


def test_truncated_vocabulary_is_not_renormalised_by_tv_but_by_kl() -> None:
    full = torch.tensor([[0.5, 0.2, 0.3]], dtype=torch.float64)
    reachable = full[:, :2]
    logits = (reachable / reachable.sum()).log()

    assert float(total_variation(reachable, logits)) == pytest.approx(0.3)
    assert float(forward_kl(reachable, logits)) == pytest.approx(0)


@pytest.mark.parametrize("kind", ["lk", "forward_kl", "reverse_kl"])
@pytest.mark.parametrize("vocab", [7, 4], ids=["whole vocabulary", "truncated vocabulary"])
def test_head_losses_equal_their_definition(kind, vocab):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(7)
    probs = random_rows(seed=8)[0][:, :vocab].detach()
    hidden = torch.randn(5, 3, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(vocab, 3, generator=generator, dtype=torch.float64).requires_grad_()
    row_weights = torch.rand(5, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 0])
    plain = row_loss(kind, probs, hidden @ weight.T)

    compared = all_known(labels, torch.arange(5))

    fused = head_losses(hidden, weight, as_target(probs), compared, kind, chunk_rows=2)

    torch.testing.assert_close(fused.loss_N, plain)
    torch.testing.assert_close(fused.alpha_N, overlap(probs, hidden @ weight.T))
    torch.testing.assert_close(
        fused.label_prob_N, (hidden @ weight.T).softmax(-1).gather(1, labels[:, None])[:, 0]
    )
    assert fused.agrees_N.equal((hidden @ weight.T).argmax(-1) == labels)
    expected = torch.autograd.grad((plain * row_weights).sum(), (hidden, weight))
    slopes = torch.autograd.grad((fused.loss_N * row_weights).sum(), (hidden, weight))
    torch.testing.assert_close(slopes, expected)


def test_each_row_is_compared_with_the_target_row_it_names() -> None:
    probs, logits = random_rows(seed=10)
    order = torch.tensor([4, 0, 0])
    compared = all_known(torch.tensor([4, 0, 0]), order)

    rows = head_losses(
        logits.detach()[:3], torch.eye(7).double(), as_target(probs), compared, "lk", 2
    )

    torch.testing.assert_close(rows.loss_N, lk_hybrid(probs[order], logits.detach()[:3]))


def test_committed_token_outside_the_drafters_vocabulary_counts_as_never_drafted() -> None:
    probs, logits = random_rows(seed=9)
    nothing = torch.zeros(5, dtype=torch.bool)
    compared = Rows(torch.zeros(5, dtype=torch.int64), nothing, torch.arange(5))

    rows = head_losses(
        logits.detach(), torch.eye(7).double(), as_target(probs), compared, "lk", chunk_rows=5
    )

    assert not rows.agrees_N.any()
    assert rows.label_prob_N.equal(torch.zeros(5, dtype=torch.float64))


def test_dpace_weight_is_the_survival_that_hangs_on_a_position() -> None:
    label_probs = torch.tensor([[0.8], [0.4], [0.0]], dtype=torch.float64)
    s1, s2, s3 = 0.9, 0.7, 0.5

    weights = dpace_weights(label_probs, torch.ones(3, 1, dtype=torch.bool))

    expected = [s1 + s1 * s2 + s1 * s2 * s3, s1 * s2 + s1 * s2 * s3, s1 * s2 * s3]
    torch.testing.assert_close(weights[:, 0], torch.tensor(expected, dtype=torch.float64))


def test_dpace_ends_a_chain_at_its_first_row_without_loss() -> None:
    valid = torch.tensor([[True], [False], [True]])

    weights = dpace_weights(torch.ones(3, 1), valid)

    assert weights.equal(torch.tensor([[1.0], [0.0], [0.0]]))
