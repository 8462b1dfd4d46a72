"""Caps hold exactly in every batch, and cost no more of it than they must."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.draws.caps import Cap, rows_within, strata_needed


def ints(*values):
    return np.array(values, dtype=np.int64)


def shares(rows, strata):
    return np.bincount(strata, rows) / rows.sum()


def test_without_caps_whole_pieces_fill_the_batch_in_order():
    rows = rows_within(ints(5, 5, 5, 5), ints(10, 10, 30, 10), 40, [])
    assert rows.tolist() == [5, 5, 0, 0]  # the third does not fit, and nothing overtakes it


def test_the_first_piece_is_always_drawn():
    assert rows_within(ints(5, 5), ints(100, 1), 40, []).tolist() == [5, 0]


def test_a_tenant_over_its_share_makes_room_for_others():
    tenants = ints(0, 0, 0, 0, 1, 2)
    rows = rows_within(ints(*[30] * 6), ints(*[40] * 6), 120, [Cap(tenants, 0.34)])
    assert rows.tolist() == [30, 0, 0, 0, 30, 30]


def test_the_smaller_of_two_tenants_bounds_a_batch_of_halves():
    tenants = ints(0, 0, 0, 1)
    rows = rows_within(ints(100, 100, 100, 30), ints(*[100] * 4), 1000, [Cap(tenants, 0.5)])
    assert rows.tolist() == [30, 0, 0, 30]


@pytest.mark.parametrize(("share", "needed"), [(0.5, 2), (0.25, 4), (0.3, 4), (1 / 3, 3), (1, 1)])
def test_with_fewer_strata_than_the_share_needs_there_is_no_batch(share, needed):
    assert strata_needed(share) == needed
    few, enough = np.arange(needed - 1), np.arange(needed)
    size = np.full(needed, 60)
    assert rows_within(size[1:], size[1:], 10_000, [Cap(few, share)]).sum() == 0
    assert rows_within(size, size, 10_000, [Cap(enough, share)]).sum() == 60 * needed


def test_caps_that_contradict_each_other_leave_no_batch():
    """The only tenant of the second domain may have less than that domain must."""
    tenants, domains = ints(0, 1, 2), ints(0, 0, 1)
    rows = rows_within(
        ints(50, 50, 50), ints(50, 50, 50), 500, [Cap(tenants, 0.4), Cap(domains, 0.5)]
    )
    assert rows.sum() == 0


def test_a_tenant_that_only_one_domain_has_leaves_it_to_the_others():
    """In order, tenants 0 and 1 would take all that domain 0 may have."""
    tenants, domains = ints(0, 1, 2, 0, 1), ints(0, 0, 0, 1, 1)
    caps = [Cap(tenants, 0.4), Cap(domains, 0.5)]
    rows = rows_within(ints(*[50] * 5), ints(*[50] * 5), 100, caps)
    assert rows.sum() >= 80
    assert shares(rows, tenants).max() <= 0.4
    assert shares(rows, domains).max() <= 0.5


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 60), st.integers(0, 30), st.integers(0, 5), st.integers(0, 3)),
        min_size=1,
        max_size=60,
    ),
    st.integers(50, 1000),
    st.sampled_from([0.15, 0.2, 0.25, 1 / 3, 0.5, 0.9, 1.0]),
    st.sampled_from([None, 0.3, 0.5, 0.75]),
)
def test_no_stratum_has_more_than_its_share(pieces, budget, share, other_share):
    num_rows, extra, tenants, domains = (ints(*column) for column in zip(*pieces, strict=True))
    num_tokens = num_rows + extra
    caps = [Cap(tenants, share)]
    if other_share is not None:
        caps.append(Cap(domains, other_share))

    rows = rows_within(num_rows, num_tokens, budget, caps)

    total = rows.sum()
    assert ((rows >= 0) & (rows <= num_rows)).all()
    drawn = (num_tokens - num_rows + rows)[rows > 0]
    assert drawn.sum() <= budget or len(drawn) == 1
    for cap in caps:
        assert (np.bincount(cap.stratum_P, rows) <= cap.share * total + 1e-6).all()
    feasible = len(set(tenants.tolist())) >= strata_needed(share)
    if other_share is None and share == 1.0:
        assert total > 0
    if not feasible:
        assert total == 0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=8), st.sampled_from([0.2, 0.3, 0.5]))
def test_a_batch_is_as_large_as_the_rows_of_all_tenants_allow(sizes, share):
    """Found by trying every size of the batch."""
    num_rows, tenants = ints(*sizes), np.arange(len(sizes))
    found = rows_within(num_rows, num_rows, 100_000, [Cap(tenants, share)]).sum()

    def is_possible(total):
        return np.minimum(num_rows, int(share * total + 1e-9)).sum() >= total

    largest = max(total for total in range(sum(sizes) + 1) if is_possible(total))
    assert found == largest
