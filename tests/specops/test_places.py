"""Positions and slots of a pass's rows: the kernel equals the definition, and both fit the pass."""

from __future__ import annotations

import pytest
import torch

from specops import attention, attention_triton, listed
from specops.attention import DecodePass, decode_slots

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def make_pass(device, counts=None):
    """Five requests with three pages of 4 slots: rows within a page, across its end, before 0 and
    beyond the table, and a request that may be padding."""
    pages = torch.randperm(15, generator=torch.Generator().manual_seed(0)).int() + 1
    first = torch.tensor([1, 6, -2, 10, 3], dtype=torch.int32)
    counts = None if counts is None else torch.tensor(counts, dtype=torch.int32, device=device)
    return DecodePass(pages.view(5, 3).to(device), first.to(device), 4, counts)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("counts", [None, [3, 4, 4, 2, 0]])
@pytest.mark.parametrize("by_step", [False, True])
@pytest.mark.parametrize("num_query", [1, 4, 40])
def test_the_kernel_finds_the_same_places(device, counts, by_step, num_query):
    decode = make_pass(device, counts)

    want = attention.places_of(decode, num_query, by_step=by_step)
    got = attention_triton.places_of(decode, num_query, by_step=by_step)

    for name in ("positions", "slots", "first"):
        ours, theirs = getattr(got, name), getattr(want, name)
        assert ours.dtype == theirs.dtype and ours.is_contiguous() and theirs.is_contiguous()
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("counts", [None, [3, 4, 4, 2, 0]])
@pytest.mark.parametrize("by_step", [False, True])
@pytest.mark.parametrize("num_query", [1, 4, 40])
def test_a_cpu_finds_the_same_places(counts, by_step, num_query):
    decode = make_pass("cpu", counts)

    want = attention.places_of(decode, num_query, by_step=by_step)
    got = listed.places_of(decode, num_query, by_step=by_step)

    for name in ("positions", "slots", "first"):
        ours, theirs = getattr(got, name), getattr(want, name)
        assert ours.dtype == theirs.dtype and ours.is_contiguous()
        assert torch.equal(ours, theirs), name


def test_places_are_those_of_the_pass():
    decode = make_pass("cpu")

    found = attention.places_of(decode, 3)
    steps = attention.places_of(decode, 3, by_step=True)

    assert torch.equal(found.positions, decode.positions(3).clamp(min=0))
    assert torch.equal(found.slots.flatten(), decode_slots(decode, 3))
    assert found.first.tolist()[2] == [-2, -1, 0]
    for name in ("positions", "slots", "first"):
        assert torch.equal(getattr(found, name), getattr(steps, name).t())
