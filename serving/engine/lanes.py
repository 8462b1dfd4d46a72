"""Per-request state on the device, which rounds read: one row, a lane, per request in flight.

A round reads its lanes and writes back what it committed, so the next round can start before the
host has seen this one's outcome. The host writes a lane when its request begins to decode, together
with the request's biases and penalties; rounds then count the tokens they commit themselves.

Shapes: L lanes, P pages of a lane, B biases of a lane, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Several
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serving.engine.sequence import Sequence
from serving.sampling import LANE_INTEGERS, LANE_REALS, lane_integers, lane_reals, table_row
from specops.attention import DecodePass
from specops.lane_penalties import LaneRequests, new_tables, table_bytes
from specops.lanes import Field, Input, LaneState, OpenedRound
from targets.target import Target

MOST_BIASES = 512
"""Maximum number of biases of one request; HTTP accepts 300."""
_INTEGERS = list(dict.fromkeys((*Field.__members__, *LANE_INTEGERS)))
"""Names of a lane's integers. Those of sampling fields that ``Field`` does not name come last."""
_SAMPLING_ROWS = [_INTEGERS.index(name) for name in LANE_INTEGERS]


def table_bytes_of(num_lanes: int, vocab_size: int) -> int:
    """Device memory of the tables for biases and penalties."""
    return table_bytes(num_lanes, vocab_size, MOST_BIASES)


def requests_of(inputs_RI: Tensor, opened: OpenedRound) -> LaneRequests:
    """The requests of a round: their lanes, and whose logits to adjust."""
    fields = opened.ints_FR
    return LaneRequests(inputs_RI[:, Input.LANE], fields[Field.BIASES], fields[Field.PENALIZES])


def upload(news: Tensor, to: Tensor) -> None:
    """Overwrite a tensor of the same shape without waiting for the device; both are contiguous."""
    to.copy_(news.pin_memory() if to.is_cuda else news, non_blocking=True)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to a device without waiting for the work it has queued, as a copy from pageable memory
    would."""
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class LaneRows:
    """Pages that hold the keys and values of R requests."""

    pages_RP: Tensor
    """[R, P] int32 page ids; 0 if the request has none."""

    def decode_pass(self, first_R: Tensor, page_size: int, first_key: int = 0) -> DecodePass:
        """A pass over the same number of rows of each request, from position ``first`` on."""
        return DecodePass(self.pages_RP, first_R.int(), page_size, first_key=first_key)


class Lanes:
    """All lanes. The last one belongs to no request: the padding of a batch uses it."""

    def __init__(
        self, max_batch: int, pages_each: int, max_draft: int, target: Target, text_length: int = 0
    ) -> None:
        """
        Args:
            text_length: tokens of each request to keep for drafters that read them on the device,
                those that pad a prompt's last block included; 0: none do.
        """
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
        texts = None
        if text_length:
            texts = torch.zeros((max_batch + 1, text_length), dtype=torch.int32, device=device)
        self.state = LaneState(self.ints, self.floats, self.pages, texts)
        self.tables = new_tables(max_batch + 1, target.vocab_size, MOST_BIASES, device)
        self._free = list(range(max_batch - 1, -1, -1))

    def take(self) -> int:
        """Take a lane for a request that was admitted."""
        return self._free.pop()

    def give_back(self, lane: int) -> None:
        """Free a lane whose request has ended."""
        self._free.append(lane)

    def write(self, sequences: Several[Sequence]) -> None:
        """Write what the host knows about these requests to their lanes."""
        if not sequences:
            return
        tensors, shapes = self.parts(len(sequences))
        news = [
            torch.zeros(shape, dtype=one.dtype) for one, shape in zip(tensors, shapes, strict=True)
        ]
        index = torch.zeros(len(sequences), dtype=torch.int64)
        self.fill(sequences, index.numpy(), *(one.numpy() for one in news))
        device = self.ints.device
        self.put(to_device(index, device), *(to_device(one, device) for one in news))

    def parts(self, num: int) -> tuple[tuple[Tensor, ...], tuple[tuple[int, int], ...]]:
        """What a lane consists of, and the shapes of these parts for so many lanes, as ``fill``
        and ``put`` take them."""
        ints, floats = (len(self.ints), num), (len(self.floats), num)
        return (self.ints, self.floats, self.pages), (ints, floats, (num, self.pages.shape[1]))

    def fill(
        self,
        sequences: Several[Sequence],
        lanes: NDArray[np.int64],
        ints: NDArray[np.int64],
        floats: NDArray[np.float32],
        pages: NDArray[np.int32],
    ) -> None:
        """Fill in what the host knows about these requests. Their tables are written at once.

        Args:
            lanes, ints, floats, pages: see ``parts``; zeros, and for at least as many lanes. What
                is left is for the lane of no request.
        """
        ints[Field.LENGTH], ints[Field.LIMIT] = 1, 1  # of no request: nothing is committed
        for at, sequence in enumerate(sequences):
            sampling = sequence.request.sampling
            assert sequence.lane is not None, "a running request has a lane"
            lanes[at] = sequence.lane
            cap = sequence.request.max_draft
            row = ints[:, at]
            row[: Field.LIMIT] = len(sequence.tokens), sequence.num_rounds, sequence.tokens[-1]
            row[Field.LIMIT : Field.TOP_K] = (
                sequence.num_prompt + sampling.max_tokens,
                self._max_draft if cap is None else min(cap, self._max_draft),
                np.uint64(sequence.key).astype(np.int64),
                sequence.matches_target,
            )
            row[Field.CAPTURES] = sequence.request.capture
            row[Field.SPACE] = sequence.space
            row[_SAMPLING_ROWS] = lane_integers(sampling, self._vocab_size)
            pages[at, : len(sequence.pages)] = sequence.pages
            floats[:, at] = lane_reals(sampling)
            sequence.is_in_lane = True
        self._write_tables([s for s in sequences if s.request.sampling.adjusts_logits])

    def put(self, lanes_S: Tensor, ints_FS: Tensor, floats_GS: Tensor, pages_SP: Tensor) -> None:
        """Write lanes from tensors on the device."""
        self.ints.index_copy_(1, lanes_S, ints_FS)
        self.floats.index_copy_(1, lanes_S, floats_GS)
        self.pages.index_copy_(0, lanes_S, pages_SP)

    def write_prefix(self, sequence: Sequence) -> None:
        """Write the text of a request with a cached prefix, which no prompt program computes."""
        if self.state.texts_LN is not None and sequence.num_cached:
            ids = torch.tensor(sequence.tokens, dtype=torch.int32)
            upload(ids, self.state.texts_LN[sequence.lane, : len(ids)])

    def write_texts(self, lanes_B: Tensor, first_B: Tensor, ids_BI: Tensor) -> None:
        """Write blocks of tokens to the texts of their lanes; part of a program.

        Args:
            lanes_B, first_B: [B] int64 lane and first position of each block.
            ids_BI: [B, I] int64.
        """
        texts = self.state.texts_LN
        if texts is None:
            return
        number = torch.arange(ids_BI.shape[1], device=ids_BI.device)
        slots = (lanes_B * texts.shape[1] + first_B)[:, None] + number
        texts.view(-1).index_copy_(0, slots.flatten(), ids_BI.flatten().int())

    def text_of(self, sequence: Sequence) -> Tensor:
        """[N] int32 the text of a request that has a lane; a view."""
        assert self.state.texts_LN is not None and sequence.lane is not None
        return self.state.texts_LN[sequence.lane, : len(sequence.tokens)]

    def _write_tables(self, sequences: list[Sequence]) -> None:
        """Write these requests' biases and penalties, and count the tokens they hold."""
        if not sequences:
            return
        biased = np.zeros((len(sequences), MOST_BIASES), dtype=np.int32)
        bias = np.zeros((len(sequences), MOST_BIASES), dtype=np.float64)
        penalties = np.zeros((len(sequences), 3), dtype=np.float64)
        for ids, values, row, sequence in zip(biased, bias, penalties, sequences, strict=True):
            p = sequence.request.sampling
            row[:] = table_row(p, "penalties")
            if p.logit_bias:
                ids[: len(p.logit_bias)], values[: len(p.logit_bias)] = zip(
                    *p.logit_bias, strict=True
                )
        lanes = self._upload(np.array([s.lane for s in sequences], dtype=np.int64))
        for table, news in (
            (self.tables.biased_LB, biased),
            (self.tables.bias_LB, bias),
            (self.tables.penalties_L3, penalties),
        ):
            table.index_copy_(0, lanes, self._upload(news))
        self._count([s for s in sequences if s.request.sampling.penalizes])

    def _count(self, sequences: list[Sequence]) -> None:
        """Mark the prompts' tokens if a penalty depends on them."""
        if not sequences:
            return
        counts = self.tables.counts_LV
        lanes = self._upload(np.array([s.lane for s in sequences], dtype=np.int64))
        counts.index_fill_(0, lanes, 0)
        width = counts.shape[1]
        prompts = []
        for sequence in sequences:
            assert sequence.lane is not None
            prompts.append(np.array(_penalized_prompt(sequence)) + sequence.lane * width)
        slots = self._upload(np.concatenate(prompts).astype(np.int64))
        counts.view(-1).index_fill_(0, slots, 1)

    def _upload(self, news: NDArray[Any]) -> Tensor:
        return to_device(torch.from_numpy(news), self.tables.counts_LV.device)

    def rows(self, lanes_R: Tensor) -> LaneRows:
        """Pages of the lanes of a batch."""
        return LaneRows(self.pages.index_select(0, lanes_R))


def _penalized_prompt(sequence: Sequence) -> list[int]:
    """The prompt, if a penalty depends on it."""
    depends = sequence.request.sampling.repetition_penalty != 1
    return sequence.tokens[: sequence.num_prompt] if depends else []
