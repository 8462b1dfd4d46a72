"""Attention of draft chains: kernels equal the definition, in values and in gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specops import chain_attention, chain_attention_triton
from specops.chain_attention import anchors_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Sums of up to a hundred float32 terms of size 1; a GPU multiplies float32 as TF32.
CLOSE = {"rtol": 2e-5, "atol": 1e-5} if DEVICE == "cpu" else {"rtol": 2e-2, "atol": 1e-2}
SEGMENTS = [0] * 30 + [1] * 3 + [2] * 50 + [3] * 7 + [-1] * 6


def drawn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE).requires_grad_()


def segments() -> Tensor:
    return torch.tensor(SEGMENTS, device=DEVICE)


def test_bounds_of_pieces_and_of_padding() -> None:
    anchors = anchors_of(
        torch.tensor([4, 4, 4, 7, 9, 9, -1, -1]),
        torch.ones(8, dtype=torch.bool),
        torch.tensor([5, 1]),
    )

    assert anchors.begin_T.tolist() == [0, 0, 0, 3, 4, 4, 6, 7]
    assert anchors.end_T.tolist() == [3, 3, 3, 4, 6, 6, 7, 8]
    assert anchors.place_T.tolist() == [-1, 1, -1, -1, -1, 0, -1, -1]


@pytest.mark.parametrize("num_own", [0, 3])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3)], ids=["grouped", "alone"])
def test_kernels_equal_the_definition(heads: tuple[int, int], num_own: int) -> None:
    num, dim = len(SEGMENTS), 16
    numbers = torch.Generator().manual_seed(1)
    anchor_A = torch.randperm(num, generator=numbers)[:60].to(DEVICE)
    seen_T = (torch.rand(num, generator=numbers) < 0.8).to(DEVICE)
    anchors = anchors_of(segments(), seen_T, anchor_A)
    given = [drawn(60, heads[0], dim, seed=2)]
    given += [drawn(num, heads[1], dim, seed=3), drawn(num, heads[1], dim, seed=4)]
    given += [drawn(60, heads[1], dim, seed=5 + n) for n in range(2 * num_own)]
    slope = drawn(60, heads[0], dim, seed=20).detach()

    def of(module: object) -> list[Tensor]:
        own = given[3:]
        found = module.attend_chains(  # type: ignore[attr-defined]
            *given[:3], own[:num_own], own[num_own:], anchors
        )
        return [found, *torch.autograd.grad(found, given, slope)]

    for one, other in zip(of(chain_attention_triton), of(chain_attention), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_a_row_sees_its_piece_up_to_itself_and_its_own_chain() -> None:
    """With equal keys, a row's result is the mean of the values that it sees."""
    num = len(SEGMENTS)
    seen_T = torch.ones(num, dtype=torch.bool, device=DEVICE)
    seen_T[32] = False
    anchor_A = torch.tensor([31, 32, 34, 92], device=DEVICE)
    anchors = anchors_of(segments(), seen_T, anchor_A)
    zeros = torch.zeros(num, 1, 16, device=DEVICE)
    values = torch.arange(num, device=DEVICE).float()[:, None, None].expand(num, 1, 16)
    own_v = torch.full((4, 1, 16), 1000.0, device=DEVICE)

    for module in (chain_attention, chain_attention_triton):
        found = module.attend_chains(zeros[:4], zeros, values, [zeros[:4]], [own_v], anchors)[
            :, 0, 0
        ]
        # Position 32 has no row that others see, but sees itself; 92 is padding.
        wanted = [
            (30 + 31 + 1000) / 3, (30 + 31 + 32 + 1000) / 4, (33 + 34 + 1000) / 3, (92 + 1000) / 2,
        ]  # fmt: skip
        torch.testing.assert_close(found.cpu(), torch.tensor(wanted), rtol=1e-3, atol=1e-3)
