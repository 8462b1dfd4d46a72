"""Turns what the engine noted of a request's rounds into columns, on the recorder's thread."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from buffer.notes import table_of
from buffer.records import Considering, Count, Rounds
from serving.engine.noted_rounds import NotedRounds


def round_columns(noted: NotedRounds) -> Rounds:
    """The columns of some rounds: a few passes of C over lists, and nothing for each round."""
    if not noted.rounds:
        return Rounds.of()
    width = noted.WIDTH
    steps, anchors, num_drafted, num_q, accepted, next_ids = (
        noted.rounds[column::width] for column in range(width)
    )
    (
        kinds, versions, draft_ks, propensities, batches, step_s, names, numbers, whys, timed,
        note_names, notes,
    ) = zip(*steps, strict=True)  # fmt: skip
    num_p = [min(kept + 1, num) for kept, num in zip(accepted, num_drafted, strict=True)]
    drafters = tuple(dict.fromkeys(kinds))
    policies = tuple(dict.fromkeys(filter(None, names)))
    reasons = tuple(dict.fromkeys(filter(None, whys)))
    counts = {
        Count.ANCHOR: anchors,
        Count.DRAFTER: list(map({kind: i for i, kind in enumerate(drafters)}.get, kinds)),
        Count.VERSION: versions,
        Count.NEXT_ID: next_ids,
        Count.DRAFT_K: draft_ks,
        Count.BATCH: batches,
        Count.NUM_Q: num_q,
        Count.NUM_ACCEPTED: accepted,
        Count.NUM_P: num_p,
        Count.NUM_DRAFTED: num_drafted,
        Count.POLICY: list(map({"": 0, **{n: i for i, n in enumerate(policies, 1)}}.get, names)),
        Count.STEP: [0 if number is None else number + 1 for number in numbers],
        Count.REASON: list(map({"": 0, **{n: i for i, n in enumerate(reasons, 1)}}.get, whys)),
        Count.UNTIMED: [int(not is_timed) for is_timed in timed],
    }
    return Rounds(
        _table([counts[row] for row in Count], np.int32),
        _table([propensities, step_s], np.float64),
        np.array(noted.draft_ids, np.int32),
        np.array(noted.q_logp, np.float32),
        np.array(noted.p_logp, np.float32),
        drafters,
        policies,
        reasons,
        _considered(noted, len(steps)),
        np.array(noted.confidence, np.float32),
        *table_of(note_names, notes),
    )


def _considered(noted: NotedRounds, num_rounds: int) -> NDArray[np.int32]:
    """``Rounds.considered``: no values where no draft could be cut."""
    if not noted.considered:
        return np.zeros((0, 0), np.int32)
    numbers, may_cut, lens = np.array(noted.considered, np.int32).reshape(-1, 3).T
    found = np.zeros((len(Considering), num_rounds), np.int32)
    found[Considering.LENGTH, numbers] = 1 + lens
    found[Considering.MAY_CUT, numbers] = may_cut
    return found


def _table(rows: Sequence[Sequence[Any]], dtype: Any) -> NDArray[Any]:
    """As ``np.array(rows, dtype)``, in half the time."""
    shape = len(rows), len(rows[0])
    return np.fromiter(chain.from_iterable(rows), dtype, shape[0] * shape[1]).reshape(shape)
