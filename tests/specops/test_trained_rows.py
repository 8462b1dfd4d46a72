"""Kernels for the row operations of a layer in training equal their definitions, in values and in
gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from specops import trained_rows, trained_rows_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Sums of some hundred float32 terms of size 1.
CLOSE = {"rtol": 2e-5, "atol": 5e-6}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE).requires_grad_()


def with_slopes(work: Callable[..., Tensor], *given: Tensor) -> list[Tensor]:
    """The value, and the gradients of a random combination of its elements."""
    found = work(*given)
    slopes = torch.autograd.grad(found, given, drawn(*found.shape, seed=9).detach())
    return [found.detach(), *slopes]


def close(found: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("width", [64, 100])
def test_a_norm_and_its_gradients(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained_rows_triton, "_PROGRAMS", 4)  # fewer than rows
    x, weight = drawn(3, 5, width), drawn(width, seed=1)

    found = with_slopes(lambda a, b: trained_rows_triton.rms_norm(a, b, 1e-5), x, weight)

    close(found, with_slopes(lambda a, b: trained_rows.rms_norm(a, b, 1e-5), x, weight))
    module = torch.nn.RMSNorm(width, 1e-5, device=DEVICE)
    with torch.no_grad():
        module.weight.copy_(weight)
    close(found[:1], [module(x).detach()])


def test_a_norm_of_rows_without_a_gradient_gives_its_weight_one() -> None:
    x, weight = drawn(7, 32).detach(), drawn(32, seed=1)

    trained_rows_triton.rms_norm(x, weight, 1e-6).square().sum().backward()

    (wanted,) = torch.autograd.grad(trained_rows.rms_norm(x, weight, 1e-6).square().sum(), weight)
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, wanted, **CLOSE)


def test_a_norm_of_bfloat16_rows_is_rounded_once() -> None:
    x, weight = drawn(6, 48).detach().bfloat16().requires_grad_(), drawn(48, seed=1)

    found = trained_rows_triton.rms_norm(x, weight, 1e-6)

    assert found.dtype == torch.bfloat16
    wanted = trained_rows.rms_norm(x.detach().float(), weight, 1e-6)
    # The interpreter cuts off what a GPU rounds.
    torch.testing.assert_close(found.float(), wanted, rtol=2**-7, atol=0)


@pytest.mark.parametrize("width", [24, 1500])
def test_a_gate_and_its_gradients(width: int) -> None:
    gate_up = drawn(2, 3, 2 * width)

    found = with_slopes(trained_rows_triton.silu_gate, gate_up)

    close(found, with_slopes(trained_rows.silu_gate, gate_up))


@pytest.mark.parametrize("is_part", [False, True], ids=["all heads", "heads of a wider row"])
def test_a_rotation_and_its_gradient(is_part: bool) -> None:
    rows = drawn(5, 6 if is_part else 3, 8)
    cos, sin = drawn(5, 1, 8, seed=1).detach(), drawn(5, 1, 8, seed=2).detach()

    def of(rotate: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: rotate(x.split(3, dim=1)[0], cos, sin)

    close(
        with_slopes(of(trained_rows_triton.rotate), rows),
        with_slopes(of(trained_rows.rotate), rows),
    )


def test_rows_that_the_kernels_do_not_take_are_known() -> None:
    angles = torch.zeros(5, 1, 6)
    assert not trained_rows_triton.can_rotate(torch.zeros(5, 3, 6), angles)
    assert not trained_rows_triton.can_rotate(torch.zeros(2, 5, 3, 8), torch.zeros(2, 5, 1, 8))
    assert trained_rows_triton.can_rotate(torch.zeros(5, 3, 8), torch.zeros(5, 1, 8))
    assert not trained_rows_triton.can_norm(torch.zeros(1, 20_000))
