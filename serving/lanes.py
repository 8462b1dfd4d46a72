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

from serving.sequence import Sequence
from serving.target import Target
from serving.verifying import Rule
from specops.attention import DecodePass
from specops.lane_penalties import LaneRequests
from specops.rng import Numbering
from specops.sampling import SamplingRows
from specops.verify_logits import Rule as Judge

_LENGTH, _NONCE, _ANCHOR, _FIXED = 0, 1, 2, 3
"""Fields that change with every round, and the first of those that stay."""
_NUM_FIELDS = _FIXED + 8


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy that does not wait for what the device has under way, as one from memory that may be
    moved would."""
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class LaneRows:
    """The lanes of one batch, gathered: R requests."""

    lanes_R: Tensor
    """[R] int64 which they are."""
    ints: Tensor
    """[fields, R] int64: kernels are handed a field of all requests, side by side."""
    floats: Tensor
    """[3, R] float32: temperature, top-p, min-p."""
    pages_RP: Tensor
    """[R, P] int32 page ids; 0 where the request has none."""

    def decode_pass(self, first_R: Tensor, page_size: int, first_key: int = 0) -> DecodePass:
        """Equally many rows of each request, from position ``first`` on."""
        return DecodePass(self.pages_RP, first_R.int(), page_size, first_key=first_key)

    def sampling(self) -> SamplingRows:
        """What the requests asked for; whether any of them cuts its law off is not known here."""
        temperature, top_p, min_p = self.floats.unbind()
        return SamplingRows(
            temperature, self.top_k_R, top_p, min_p, all_greedy=False, truncates=True
        )

    def rules(self, rule: Rule) -> Tensor:
        """[R] int64, ``specops.verify_logits.Rule`` of each request: MATCH if greedy or seeded."""
        own = Judge.BLOCK if rule == "block" else Judge.STANDARD
        return torch.where(self.by_match_R, int(Judge.MATCH), int(own))

    def numbering(self) -> Numbering:
        """Random numbers of the tokens after each anchor: the same in every round for requests
        verified by ``match``, fresh ones for the others."""
        nonces = torch.where(self.by_match_R, 0, self.nonce_R + 1)
        return Numbering(self.key_R, nonces, self.length_R)

    def adjusting(self) -> LaneRequests:
        """Which of the requests want their logits changed."""
        return LaneRequests(self.lanes_R, self._fixed(6), self._fixed(7))

    @property
    def length_R(self) -> Tensor:
        """[R] committed tokens, the anchor included."""
        return self.ints[_LENGTH]

    @property
    def nonce_R(self) -> Tensor:
        """[R] rounds so far."""
        return self.ints[_NONCE]

    @property
    def anchor_R(self) -> Tensor:
        """[R] the last committed token."""
        return self.ints[_ANCHOR]

    def _fixed(self, index: int) -> Tensor:
        return self.ints[_FIXED + index]

    @property
    def limit_R(self) -> Tensor:
        """[R] length at which the request ends."""
        return self._fixed(0)

    @property
    def cap_R(self) -> Tensor:
        """[R] most tokens that may be drafted for the request in one round."""
        return self._fixed(1)

    @property
    def key_R(self) -> Tensor:
        """[R] key of its random numbers, the 64 bits as a signed number."""
        return self._fixed(2)

    @property
    def by_match_R(self) -> Tensor:
        """[R] bool: greedy or seeded, verified by ``match``."""
        return self._fixed(3) != 0

    @property
    def top_k_R(self) -> Tensor:
        """[R]"""
        return self._fixed(4)

    @property
    def captures_R(self) -> Tensor:
        """[R] 1 for a request whose rows are captured, else 0."""
        return self._fixed(5)


class Lanes:
    """All lanes. The last one belongs to nobody: rows that fill up a batch use it."""

    def __init__(self, max_batch: int, pages_each: int, max_draft: int, target: Target) -> None:
        self.padding = max_batch
        self._vocab_size = target.vocab_size
        self._max_draft = max_draft
        device = target.device
        self.ints = torch.zeros((_NUM_FIELDS, max_batch + 1), dtype=torch.int64, device=device)
        self.ints[_LENGTH, self.padding] = 1
        self.ints[_FIXED, self.padding] = 1  # its limit: nothing is committed
        self.pages = torch.zeros((max_batch + 1, pages_each), dtype=torch.int32, device=device)
        self.floats = torch.zeros((3, max_batch + 1), dtype=torch.float32, device=device)
        shape = (max_batch + 1, target.config.hidden_size)
        self.outputs_LH = torch.zeros(shape, dtype=target.dtype, device=device)
        """The neural drafter's output at each anchor: its next draft starts there."""
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
        floats = np.zeros((len(sequences), 3), dtype=np.float32)
        pages = np.zeros((len(sequences), self.pages.shape[1]), dtype=np.int32)
        for row, reals, held, sequence in zip(rows, floats, pages, sequences, strict=True):
            sampling = sequence.request.sampling
            row[:_FIXED] = len(sequence.tokens), sequence.num_rounds, sequence.tokens[-1]
            cap = sequence.request.max_draft
            row[_FIXED:] = (
                sequence.num_prompt + sampling.max_tokens,
                self._max_draft if cap is None else min(cap, self._max_draft),
                np.uint64(sequence.key).astype(np.int64),
                sequence.matches_target,
                min(sampling.top_k or self._vocab_size, self._vocab_size),
                sequence.request.capture,
                len(sampling.logit_bias),
                sampling.penalizes,
            )
            held[: len(sequence.pages)] = sequence.pages
            reals[:] = sampling.temperature, sampling.top_p, sampling.min_p
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
        return LaneRows(
            lanes_R,
            self.ints.index_select(1, lanes_R),
            self.floats.index_select(1, lanes_R),
            self.pages.index_select(0, lanes_R),
        )

    def commit(self, lanes_R: Tensor, rows: LaneRows, emitted_RQ: Tensor, count_R: Tensor) -> None:
        """Append the first ``count`` of each request's emitted tokens."""
        tokens = torch.cat((rows.anchor_R[:, None], emitted_RQ), dim=1)
        anchor_R = tokens.gather(1, count_R[:, None])[:, 0]
        fresh = torch.stack((rows.length_R + count_R, rows.nonce_R + 1, anchor_R))
        self.ints[:_FIXED].index_copy_(1, lanes_R, fresh)
