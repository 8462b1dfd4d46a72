"""Rows whose draft tokens were rejected weigh more."""

from __future__ import annotations

from policies.preference import LONG_RUN, row_weights


def test_the_row_of_the_first_rejected_token_weighs_more():
    """Anchor 4, three drafted, one kept: the token at 6 was wrong, and row 5 predicts it."""
    assert row_weights(9, [(4, 3, 1)], 3.0).tolist() == [1, 1, 1, 1, 1, 3, 1, 1, 1]


def test_a_draft_that_was_kept_weighs_as_any_other():
    assert row_weights(9, [(4, 3, 3), (8, 0, 0)], 3.0).tolist() == [1] * 9


def test_a_rejection_in_a_long_run_weighs_more_still():
    rounds = [(p, 2, 0) for p in range(1, 6)]

    weights = row_weights(8, rounds, 2.0).tolist()

    assert LONG_RUN == 3
    assert weights == [1, 2, 2, 3, 3, 3, 1, 1]


def test_a_kept_token_ends_a_run_and_a_round_without_a_draft_does_not():
    assert row_weights(8, [(1, 2, 0), (2, 2, 0), (3, 2, 1), (5, 2, 0)], 2.0)[5] == 2
    assert row_weights(8, [(1, 2, 0), (2, 2, 0), (3, 0, 0), (4, 2, 0)], 2.0)[4] == 3


def test_rounds_past_the_end_of_a_cut_text_do_not_count():
    assert row_weights(4, [(2, 4, 3)], 5.0).tolist() == [1] * 4
