"""Rounds are opened and closed in numpy where the lanes are in the memory of the host.

Equal to the definitions in ``specops.lanes``, in a third of the time: a round has a hundred
operations on a few integers, and each call of numpy's takes a quarter of the time of torch's.

Shapes as in ``specops.lanes``.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specops.lanes import (
    ClosedRound,
    Column,
    Field,
    Input,
    LaneState,
    OpenedRound,
    most_drafts,
)
from specops.listed import HostRows, contiguous
from specops.verify_logits import LogitVerdict, Rule

Ints = NDArray[np.int64]


def open_round(
    state: LaneState,
    inputs_RI: Tensor,
    num_draft: int,
    page_size: int,
    rule: Rule,
    *,
    is_given: bool,
) -> OpenedRound:
    """See ``specops.lanes.open_round``."""
    inputs = inputs_RI.numpy()
    lanes_R = inputs[:, Input.LANE]
    ints_FR = state.ints_FL.numpy()[:, lanes_R]
    pages_RP = state.pages_LP.numpy()[lanes_R]
    length_R = ints_FR[Field.LENGTH]
    by_match_R = ints_FR[Field.BY_MATCH] != 0
    lens_R = np.minimum(ints_FR[Field.CAP], ints_FR[Field.LIMIT] - length_R - 1)
    lens_R = np.minimum(np.maximum(lens_R, 0), num_draft)
    block_RQ = np.repeat(ints_FR[Field.ANCHOR][:, None], num_draft + 1, axis=1)
    given_RK = None
    if is_given:
        lens_R = np.minimum(lens_R, inputs[:, Input.DRAFTED])
        given = inputs[:, Input.TOKENS : Input.TOKENS + num_draft].copy()
        block_RQ[:, 1:] = given
        given_RK = torch.from_numpy(given)
    rows = HostRows.at(pages_RP, length_R - 1, num_draft + 1, page_size)
    ahead = np.arange(max(num_draft, 1))[:, None]
    return OpenedRound(
        lanes_R=torch.from_numpy(lanes_R.astype(np.int32)),
        ints_FR=contiguous(ints_FR),
        floats_3R=contiguous(state.floats_3L.numpy()[:, lanes_R]),
        pages_RP=torch.from_numpy(pages_RP),
        by_match_R=torch.from_numpy(by_match_R),
        rules_R=torch.from_numpy(np.where(by_match_R, int(Rule.MATCH), int(rule))),
        nonces_R=torch.from_numpy(np.where(by_match_R, 0, ints_FR[Field.NONCE] + 1)),
        lens_R=torch.from_numpy(lens_R),
        anchor_at_R=torch.from_numpy((length_R - 1).astype(np.int32)),
        draft_at_R=torch.from_numpy(length_R.astype(np.int32)),
        draft_positions_KR=torch.from_numpy(length_R + ahead),
        positions_T=torch.from_numpy(rows.positions_RQ.reshape(-1)),
        slots_T=torch.from_numpy(rows.slots_RQ.reshape(-1)),
        block_RQ=torch.from_numpy(block_RQ),
        given_RK=given_RK,
    )


def close_round(
    state: LaneState,
    opened: OpenedRound,
    draft_RK: Tensor,
    verdict: LogitVerdict | Tensor,
    logq_RK: Tensor | None,
    outputs_RC: Tensor,
) -> ClosedRound:
    """See ``specops.lanes.close_round``."""
    draft, outputs = draft_RK.numpy(), outputs_RC.numpy()
    num_requests, num_draft = draft.shape
    lens_R, ints_FR = opened.lens_R.numpy(), opened.ints_FR.numpy()
    request, place = np.arange(num_requests), np.arange(num_draft + 1)
    logp_RK = None
    if isinstance(verdict, Tensor):
        best_RQ = verdict.numpy()
        is_kept = (best_RQ[:, :-1] == draft) & (place[:-1] < lens_R[:, None])
        accepted_R = np.logical_and.accumulate(is_kept, axis=1).sum(axis=1)
        found_R = best_RQ[request, accepted_R]
    else:
        accepted_R, found_R = verdict.num_accepted_R.numpy(), verdict.next_R.numpy()
        logp_RK = verdict.draft_logp_RK
    next_R = np.maximum(found_R, 0)
    length_R = ints_FR[Field.LENGTH]
    count_R = np.minimum(accepted_R + 1, ints_FR[Field.LIMIT] - length_R)
    emitted_RQ = np.repeat(next_R[:, None], num_draft + 1, axis=1)
    np.copyto(emitted_RQ[:, :num_draft], draft, where=place[:-1] < accepted_R[:, None])
    last_R = emitted_RQ[request, count_R - 1]
    changed = state.ints_FL.numpy()
    lanes_R = opened.lanes_R.numpy()
    changed[Field.LENGTH, lanes_R] = length_R + count_R
    changed[Field.NONCE, lanes_R] = ints_FR[Field.NONCE] + 1
    changed[Field.ANCHOR, lanes_R] = np.where(count_R > 0, last_R, ints_FR[Field.ANCHOR])
    if state.texts_LN is not None:
        rows, places = np.nonzero(np.arange(num_draft + 1) < count_R[:, None])
        texts = state.texts_LN.numpy()
        texts[lanes_R[rows], length_R[rows] + places] = emitted_RQ[rows, places]
    captured_R = count_R * ints_FR[Field.CAPTURES]
    outputs[:, Column.ACCEPTED] = accepted_R
    outputs[:, Column.NEXT] = found_R
    outputs[:, Column.DRAFTED] = lens_R
    outputs[:, Column.CAPTURED] = captured_R
    outputs[:, Column.TOKENS : Column.TOKENS + num_draft] = draft
    for block, reals in enumerate((logp_RK, logq_RK), start=1):
        if reals is not None and num_draft:
            start = Column.TOKENS + block * most_drafts(outputs_RC)
            bits = reals.numpy().astype(np.float64).view(np.int64)
            outputs[:, start : start + num_draft] = bits
    return ClosedRound(
        torch.from_numpy(emitted_RQ),
        torch.from_numpy(next_R),
        torch.from_numpy(count_R),
        torch.from_numpy(captured_R.astype(np.int32)),
        torch.from_numpy(request * (num_draft + 1) + accepted_R),
    )
