"""Passes that are listed for a CPU attend as their definition does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from specops import attention
from specops.attention import DecodePass, attend_listed, attend_pages
from specops.listed import listed_pass, listed_steps

PAGE, HEADS, DIM = 4, 2, 16


def make_pass(firsts, **fields):
    """Requests with eight pages each."""
    generator = torch.Generator().manual_seed(1)
    pages = torch.randperm(8 * len(firsts), generator=generator).int().view(-1, 8) + 1
    return DecodePass(pages, torch.tensor(firsts, dtype=torch.int32), PAGE, **fields)


def pools(decode):
    """Keys and values of every slot; those of page 0 are NaN, because no request has it."""
    generator = torch.Generator().manual_seed(2)
    shape = (PAGE * (int(decode.pages_RP.max()) + 1), HEADS, DIM)
    keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
    keys[:PAGE] = values[:PAGE] = float("nan")
    return keys, values


def queries(num_rows):
    return torch.randn(num_rows, 2 * HEADS, DIM, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("num_query", [1, 3])
@pytest.mark.parametrize(
    "fields", [{}, {"first_key": 1}, {"is_block": True}], ids=["chain", "first key", "block"]
)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("heads_per_key", [0, 2], ids=["by head", "together"])
def test_a_listed_pass_attends_as_its_definition(num_query, fields, window, heads_per_key):
    decode = make_pass([9, 2, 21, 5], **fields)
    keys, values = pools(decode)
    q = queries(4 * num_query)

    want = attend_pages(q, keys, values, decode, 0.3, window)
    listed = listed_pass(decode, num_query, heads_per_key)
    got = attend_listed(q, keys, values, listed, 0.3, window)

    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)
    assert torch.equal(listed.slots_T, attention.decode_slots(decode, num_query))


@pytest.mark.parametrize("heads_per_key", [0, 2])
def test_blocks_that_follow_each_other_are_one_group(heads_per_key):
    decode = make_pass([4, 8, 12, 0])
    decode.pages_RP[1:3] = decode.pages_RP[0]
    keys, values = pools(decode)
    q = queries(16)

    listed = listed_pass(decode, 4, heads_per_key)

    assert [(group.start, group.num_query) for group in listed.groups] == [(0, 12), (12, 4)]
    want = attend_pages(q, keys, values, decode, 0.3)
    torch.testing.assert_close(
        attend_listed(q, keys, values, listed, 0.3), want, atol=2e-6, rtol=1e-5
    )


def test_rows_beyond_the_pages_are_written_to_slot_0():
    decode = make_pass([30, 3])
    assert listed_pass(decode, 4).slots_T.view(2, 4)[0].tolist()[2:] == [0, 0]


@pytest.mark.parametrize("heads_per_key", [0, 2])
def test_steps_are_passes_of_single_rows(heads_per_key):
    decode = make_pass([9, 2, 21], first_key=1)
    keys, values = pools(decode)
    for ahead, listed in enumerate(listed_steps(decode, 3, heads_per_key)):
        here = replace(decode, first_R=decode.first_R + ahead)
        q = queries(3)
        want = attend_pages(q, keys, values, here, 0.3)
        got = attend_listed(q, keys, values, listed, 0.3)
        torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)
        assert torch.equal(listed.slots_T, attention.decode_slots(here, 1))


def test_what_a_row_does_not_see_may_be_nan_when_heads_are_taken_together():
    """Slots of a request's last page that nobody has written, and a row whose own key is bad."""
    decode = make_pass([5, 2])
    keys, values = pools(decode)
    slot = PAGE * int(decode.pages_RP[0, 1])
    keys[slot + 2], values[slot + 3] = float("nan"), float("inf")  # positions 6 and 7
    q = queries(4)

    got = attend_listed(q[:2], keys, values, listed_pass(decode, 1, 2), 0.3)
    bad = attend_listed(q, keys, values, listed_pass(decode, 2, 2), 0.3)

    want = attend_pages(q[:2], keys, values, decode, 0.3)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)
    assert bad[1].isnan().all() and bad[[0, 2, 3]].isfinite().all()


def test_a_tree_cannot_be_listed():
    counts = torch.tensor([1, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match="only chains"):
        listed_pass(make_pass([1, 2], counts_R=counts), 2)
