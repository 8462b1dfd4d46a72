"""What was verified has an outcome, and nothing else does."""

from __future__ import annotations

import numpy as np

from policies.outcomes import Drafted, outcomes_of


def test_kept_tokens_and_the_first_rejected_one_have_outcomes():
    rounds = [
        Drafted(2, (50, 51, 52, 53), 2, (-0.1, -0.2, -0.3, -0.4)),  # 53 was never verified
        Drafted(5, (60,), 0, None),
        Drafted(6, (61, 62), 2, (-0.5, -0.6)),  # all kept; the next token is the target's own
    ]

    found = outcomes_of(11, rounds)

    assert found.depth_T.tolist() == [-1, -1, 0, 1, 2, 0, 0, 1, -1, -1, -1]
    assert found.rejected_T.tolist() == [-1, -1, -1, -1, 52, 60, -1, -1, -1, -1, -1]
    expected = [np.nan, np.nan, -0.1, -0.2, -0.3, np.nan, -0.5, -0.6, np.nan, np.nan, np.nan]
    np.testing.assert_array_equal(found.q_logp_T, np.array(expected, dtype=np.float32))


def test_tokens_behind_the_end_of_the_request_have_none():
    """A stop string cut a round short: what it kept is not all part of the text."""
    found = outcomes_of(5, [Drafted(2, (50, 51, 52), 3, None)])
    assert found.depth_T.tolist() == [-1, -1, 0, 1, -1]
    assert outcomes_of(3, [Drafted(2, (50,), 1, None)]).depth_T.tolist() == [-1, -1, -1]
