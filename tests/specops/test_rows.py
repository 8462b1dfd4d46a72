"""Row operations between products: kernels equal their definitions."""

from __future__ import annotations

import pytest
import torch

from specops import linear, rows, rows_triton
from specops.linear import Norm

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def normal(*shape, device, dtype=torch.float32):
    generator = torch.Generator(device).manual_seed(len(shape))
    return torch.randn(*shape, generator=generator, device=device).to(dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_embedding_writes_rows_and_their_squares(device):
    table = normal(50, 72, device=device)
    ids = torch.tensor([3, 49, 0], device=device)
    streams = [torch.zeros(3, 2, 72, device=device)[:, 1] for _ in range(2)]

    want = rows.embed(ids, table, streams[0])
    got = rows_triton.embed(ids, table, streams[1])

    assert torch.equal(streams[1], table[ids]) and torch.equal(streams[0], table[ids])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("hidden_first", [False, True])
def test_pairs_of_an_embedding_and_an_output(device, dtype, hidden_first):
    table, hidden = (normal(*shape, device=device, dtype=dtype) for shape in ((50, 72), (3, 2, 72)))
    norms = [Norm(1 + normal(72, device=device, dtype=dtype) / 8, eps) for eps in (1e-5, 0.5)]
    ids = torch.tensor([7, 3, 49, 0], device=device)[1:]

    want = rows.norm_pair(ids, table, hidden[:, 1], *norms, hidden_first=hidden_first)
    got = rows_triton.norm_pair(ids, table, hidden[:, 1], *norms, hidden_first=hidden_first)

    halves = want.chunk(2, dim=1)[:: -1 if hidden_first else 1]
    assert torch.equal(halves[0], linear.rms_norm(table[ids], norms[0]))
    assert torch.equal(halves[1], linear.rms_norm(hidden[:, 1], norms[1]))
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("added", [False, True])
def test_norms_after_the_residual(device, dtype, added):
    norm = Norm(1 + normal(72, device=device, dtype=dtype) / 8, 1e-5)
    streams = [normal(3, 2, 72, device=device, dtype=dtype) for _ in range(2)]
    update = normal(3, 72, device=device, dtype=dtype) if added else None

    want, got = (
        add_norm(stream[:, 1], update, norm, stream[:, 0] if added else None)
        for add_norm, stream in zip((rows.add_norm, rows_triton.add_norm), streams, strict=True)
    )

    assert torch.equal(*streams)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gate(device, dtype):
    gate_up = 4 * normal(3, 2 * 1100, device=device, dtype=dtype)

    close = {"atol": 1e-6, "rtol": 1e-5 if dtype == torch.float32 else 2e-2}
    torch.testing.assert_close(rows_triton.silu_gate(gate_up), linear.silu_gate(gate_up), **close)


def test_the_kernels_refuse_what_they_cannot_do():
    norm = Norm(torch.ones(8), 1e-6)
    with pytest.raises(ValueError, match="if and only if there is an update"):
        rows_triton.add_norm(torch.zeros(2, 8), torch.zeros(2, 8), norm, None)
    with pytest.raises(ValueError, match=r"out must be \[2, 8\]"):
        rows_triton.embed(torch.zeros(2).long(), torch.zeros(3, 8), torch.zeros(2, 9))
    with pytest.raises(ValueError, match=r"hidden is torch\.float16, the table torch\.float32"):
        hidden = torch.zeros(2, 8, dtype=torch.float16)
        rows_triton.norm_pair(torch.zeros(2).long(), torch.zeros(3, 8), hidden, norm, norm)
    with pytest.raises(ValueError, match="must be contiguous"):
        rows_triton.silu_gate(torch.zeros(8, 2).t())
