"""The neural drafter's row at a new anchor, computed by the program that has found the anchor.

Shapes: R requests of Q rows each, T = R Q, m tapped layers, H hidden.
"""

from __future__ import annotations

from torch import Tensor

from serving.engine.drafting import Drafting
from serving.engine.lanes import LaneRows, Lanes
from specops.lanes import ClosedRound, OpenedRound


def take_in(
    drafting: Drafting,
    lanes: Lanes,
    opened: OpenedRound,
    closed: ClosedRound,
    lanes_R: Tensor,
    features_TmH: Tensor,
    page_size: int,
) -> None:
    """Compute the rows after the old anchors, and keep the output at each new one in its lane: the
    next draft starts there, whatever its K is. Rows behind the new anchor are overwritten before
    anybody sees them.

    Args:
        lanes_R: [R] int64, those of ``opened`` as an index.
        features_TmH: tapped rows of the round: of the old anchors and of the drafts.
    """
    assert drafting.neural is not None
    at = LaneRows(opened.pages_RP).decode_pass(opened.draft_at_R, page_size, first_key=1)
    outputs = drafting.neural.take_in(closed.emitted_RQ.view(-1), features_TmH, at)
    fresh = outputs.index_select(0, closed.anchor_row_R)
    lanes.outputs_LH.index_copy_(0, lanes_R, fresh)
