"""What a round must know of the requests in flight, on the device: one row, a lane, for each.

A round reads its lanes and writes what it committed back, so that the next one can start before the
host has seen the outcome of this one. The host writes a lane only when it knows better: when a
request begins to decode, and after a step that was computed outside of a round.

Shapes: L lanes, P pages of a lane, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from serving.engine.sequence import Sequence
from serving.sampling import LANE_INTEGERS, LANE_REALS, lane_integers, lane_reals
from specops.attention import DecodePass
from specops.lanes import Field, LaneState
from targets.target import Target

MOST_BIASES = 512
"""Biases of one request that fit its lane; HTTP takes 300."""
_INTEGERS = list(dict.fromkeys((*Field.__members__, *LANE_INTEGERS)))
"""Names of a lane's integers. Those of sampling fields that ``Field`` does not name come last."""
_SAMPLING_ROWS = [_INTEGERS.index(name) for name in LANE_INTEGERS]


def upload(news: Tensor, to: Tensor) -> None:
    """Overwrite a tensor of the same shape, both contiguous, without waiting for the device."""
    to.copy_(news.pin_memory() if to.is_cuda else news, non_blocking=True)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy that does not wait for what the device has under way, as one from memory that may be
    moved would."""
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class LaneRows:
    """Where the lanes of one batch, R requests, have their keys and values."""

    pages_RP: Tensor
    """[R, P] int32 page ids; 0 where the request has none."""

    def decode_pass(self, first_R: Tensor, page_size: int, first_key: int = 0) -> DecodePass:
        """Equally many rows of each request, from position ``first`` on."""
        return DecodePass(self.pages_RP, first_R.int(), page_size, first_key=first_key)


class Lanes:
    """All lanes. The last one belongs to nobody: rows that fill up a batch use it."""

    def __init__(self, max_batch: int, pages_each: int, max_draft: int, target: Target) -> None:
        self.padding = max_batch
        self._vocab_size = target.vocab_size
        self._max_draft = max_draft
        device = target.device
        self.ints = torch.zeros((len(_INTEGERS), max_batch + 1), dtype=torch.int64, device=device)
        self.ints[Field.LENGTH, self.padding] = 1
        self.ints[Field.LIMIT, self.padding] = 1  # nothing is committed
        self.pages = torch.zeros((max_batch + 1, pages_each), dtype=torch.int32, device=device)
        shape = (len(LANE_REALS), max_batch + 1)
        self.floats = torch.zeros(shape, dtype=torch.float32, device=device)
        shape = (max_batch + 1, target.config.hidden_size)
        self.outputs_LH = torch.zeros(shape, dtype=target.dtype, device=device)
        """The neural drafter's output at each anchor: its next draft starts there."""
        self.state = LaneState(self.ints, self.floats, self.pages)
        self._free = list(range(max_batch - 1, -1, -1))

    def take(self) -> int:
        """A lane for a request that was admitted."""
        return self._free.pop()

    def give_back(self, lane: int) -> None:
        """Its request has ended."""
        self._free.append(lane)

    def write(self, sequences: list[Sequence]) -> None:
        """Tell the device what the host knows of these requests."""
        if not sequences:
            return
        rows = np.zeros((len(sequences), len(self.ints)), dtype=np.int64)
        floats = np.zeros((len(sequences), len(LANE_REALS)), dtype=np.float32)
        pages = np.zeros((len(sequences), self.pages.shape[1]), dtype=np.int32)
        for row, reals, held, sequence in zip(rows, floats, pages, sequences, strict=True):
            sampling = sequence.request.sampling
            row[: Field.LIMIT] = len(sequence.tokens), sequence.num_rounds, sequence.tokens[-1]
            cap = sequence.request.max_draft
            row[Field.LIMIT : Field.TOP_K] = (
                sequence.num_prompt + sampling.max_tokens,
                self._max_draft if cap is None else min(cap, self._max_draft),
                np.uint64(sequence.key).astype(np.int64),
                sequence.matches_target,
            )
            row[Field.CAPTURES] = sequence.request.capture
            row[_SAMPLING_ROWS] = lane_integers(sampling, self._vocab_size)
            row[Field.BIASES] = min(row[Field.BIASES], MOST_BIASES)
            held[: len(sequence.pages)] = sequence.pages
            reals[:] = lane_reals(sampling)
        device = self.ints.device
        index = to_device(torch.tensor([s.lane for s in sequences]), device)
        for dim, state, news in (
            (1, self.ints, rows.T),
            (1, self.floats, floats.T),
            (0, self.pages, pages),
        ):
            fresh = to_device(torch.from_numpy(np.ascontiguousarray(news)), device)
            state.index_copy_(dim, index, fresh)
        for sequence in sequences:
            sequence.lane_length = len(sequence.tokens)

    def rows(self, lanes_R: Tensor) -> LaneRows:
        """The lanes of a batch."""
        return LaneRows(self.pages.index_select(0, lanes_R))
