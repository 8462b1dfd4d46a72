"""Biases and penalties of the requests in flight, as rounds read them on the device.

The host writes the tables of a lane when it writes the lane of a request that adjusts; from then on
rounds count by themselves what they commit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serving.engine.lanes import MOST_BIASES, to_device
from serving.engine.packing import completion_that_counts, prompt_that_counts
from serving.engine.sequence import Sequence
from serving.sampling import SamplingParams, table_row
from specops.lane_penalties import LaneRequests, new_tables, table_bytes
from specops.lanes import Field, Input, OpenedRound


def fits_lane(sampling: SamplingParams) -> bool:
    """Whether programs can adjust the logits of such a request; one that does not fit is decoded by
    passes, and so are those beside it."""
    return len(sampling.logit_bias) <= MOST_BIASES


def adjusting_bytes(num_lanes: int, vocab_size: int) -> int:
    """Memory of ``Adjusting``."""
    return table_bytes(num_lanes, vocab_size, MOST_BIASES)


def requests_of(inputs_RI: Tensor, opened: OpenedRound) -> LaneRequests:
    """Which requests of a round want their logits changed."""
    fields = opened.ints_FR
    return LaneRequests(inputs_RI[:, Input.LANE], fields[Field.BIASES], fields[Field.PENALIZES])


class Adjusting:
    """The tables of all lanes."""

    def __init__(self, num_lanes: int, vocab_size: int, device: torch.device) -> None:
        self.tables = new_tables(num_lanes, vocab_size, MOST_BIASES, device)

    def write(self, sequences: list[Sequence]) -> None:
        """Tell the device what these requests ask for, and what they have emitted; costs nothing
        where none of them adjusts its logits."""
        asked = [s for s in sequences if s.request.sampling.adjusts_logits]
        own = [s for s in asked if fits_lane(s.request.sampling)]
        if not own:
            return
        biased = np.zeros((len(own), MOST_BIASES), dtype=np.int32)
        bias = np.zeros((len(own), MOST_BIASES), dtype=np.float64)
        penalties = np.zeros((len(own), 3), dtype=np.float64)
        for ids, values, row, sequence in zip(biased, bias, penalties, own, strict=True):
            p = sequence.request.sampling
            row[:] = table_row(p, "penalties")
            if p.logit_bias:
                ids[: len(p.logit_bias)], values[: len(p.logit_bias)] = zip(
                    *p.logit_bias, strict=True
                )
        lanes = self._upload(np.array([s.lane for s in own], dtype=np.int64))
        for table, news in (
            (self.tables.biased_LB, biased),
            (self.tables.bias_LB, bias),
            (self.tables.penalties_L3, penalties),
        ):
            table.index_copy_(0, lanes, self._upload(news))
        self._count([s for s in own if s.request.sampling.penalizes])

    def _count(self, sequences: list[Sequence]) -> None:
        """Count their tokens anew."""
        if not sequences:
            return
        counts = self.tables.counts_LV
        lanes = self._upload(np.array([s.lane for s in sequences], dtype=np.int64))
        counts.index_fill_(0, lanes, 0)
        flat = counts.view(-1)
        flat.index_fill_(0, self._places(sequences, prompt_that_counts), 1)
        emitted = self._places(sequences, completion_that_counts)
        flat.scatter_add_(0, emitted, torch.full_like(emitted, 2, dtype=counts.dtype))

    def _places(self, sequences: list[Sequence], of: Callable[[Sequence], list[int]]) -> Tensor:
        """Where the counts of some tokens of each request lie."""
        width = self.tables.counts_LV.shape[1]
        every = []
        for sequence in sequences:
            assert sequence.lane is not None
            every.append(np.array(of(sequence), dtype=np.int64) + sequence.lane * width)
        return self._upload(np.concatenate(every))

    def _upload(self, news: NDArray[Any]) -> Tensor:
        return to_device(torch.from_numpy(news), self.tables.counts_LV.device)
