"""Attention of training-time test: step-0 keys of the same piece, and a chain's own later keys.

On a GPU, kernels compute it (``specops.chain_attention``); what follows is for a CPU, for rows that
are not bfloat16, and for heads whose size they do not take.

Positions are taken in blocks. A block's queries see the keys of the block and of the ``longest``
positions before it, as many as a piece can reach back, so that pieces of any lengths lie behind
each other without padding, and the cost of a row is bounded by the longest piece.

Shapes: T positions, A anchors, Hq/Hkv query/key heads, G = Hq / Hkv, D head dimension; n blocks of
Q queries with W + Q keys each.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from specops.chain_attention import Anchors, anchors_of
from specops.device import attend_chains, can_attend_chains

_BLOCK = {"cuda": 128, "cpu": 32}
"""Q. Larger blocks are larger products, with more keys that nothing sees."""


class ChainAttention:
    """Attention of one batch: call it for step 0, then for each later step in order."""

    def __init__(
        self, segment_T: Tensor, has_row_T: Tensor, anchor_A: Tensor, longest: int
    ) -> None:
        """
        Args:
            segment_T: the piece of each position.
            has_row_T: bool, step 0 has a row here that others may see.
            anchor_A: int64 index into T of each chain's first row, no two of them equal.
            longest: positions of the longest piece.
        """
        num = segment_T.numel()
        self._given = segment_T, has_row_T, anchor_A
        self._block = _BLOCK.get(segment_T.device.type, 128)
        self._reach = min(-(-longest // 8) * 8, -(-num // self._block) * self._block)
        self._end = -num % self._block
        self._anchor_A = anchor_A
        self._trunk: tuple[Tensor, Tensor] | None = None
        """Keys [n, Hkv, D, W + Q] and values [n, Hkv, W + Q, D] of step 0."""
        self._own: list[tuple[Tensor, Tensor]] = []
        """Keys and values of each later step, [A, Hkv, D]."""
        self._first: tuple[Tensor, Tensor] | None = None
        """Keys and values of step 0 as they came, where kernels read them."""

    @cached_property
    def _unseen(self) -> Tensor:
        segment_T, has_row_T, _ = self._given
        return self._hidden_keys(segment_T, has_row_T)

    @cached_property
    def _anchors(self) -> Anchors:
        return anchors_of(*self._given)

    @cached_property
    def _every_place(self) -> Anchors:
        """Rows of step 0: each position is an anchor."""
        segment_T, has_row_T, _ = self._given
        own = torch.arange(segment_T.numel(), device=segment_T.device)
        return anchors_of(segment_T, has_row_T, own)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T or A, Hq, D], k and v [T or A, Hkv, D] -> shape of q."""
        with torch.autocast(q.device.type, enabled=False):
            if can_attend_chains(q.device, q.dtype, q.shape[-1]):
                return self._by_kernels(q, k, v)
            q = q * q.shape[-1] ** -0.5
            if self._trunk is None:
                self._trunk = self._windows(k), self._windows(v).transpose(-1, -2).contiguous()
                return self._attend(q, None)[0]
            self._own.append((k, v))
            return self._later(q)

    def _by_kernels(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._first is None:
            self._first = k, v
            return attend_chains(q, k, v, [], [], self._every_place)
        self._own.append((k, v))
        own_k, own_v = (list(x) for x in zip(*self._own, strict=True))
        return attend_chains(q, *self._first, own_k, own_v, self._anchors)

    def _later(self, q_AHD: Tensor) -> Tensor:
        """Attend to the keys of step 0 and to the chain's own."""
        num_kv = self._own[0][0].shape[1]
        grouped = _grouped(q_AHD, num_kv)
        own_AHj = torch.stack(
            [(grouped * k[:, :, None]).sum(-1).flatten(1) for k, _ in self._own], -1
        )
        num = self._unseen.shape[0] * self._block - self._end
        q_THD, own_THj = (
            x.new_zeros(num, *x.shape[1:]).index_copy(0, self._anchor_A, x)
            for x in (q_AHD, own_AHj)
        )
        mixed_THD, weights_THj = self._attend(q_THD, own_THj)
        assert weights_THj is not None
        weights_AHj = _grouped(weights_THj[self._anchor_A], num_kv)
        mixed = _grouped(mixed_THD[self._anchor_A], num_kv)
        for step, (_, v) in enumerate(self._own):
            mixed = mixed + weights_AHj[..., step, None] * v[:, :, None]
        flat: Tensor = mixed.flatten(1, 2)
        return flat

    def _attend(self, q_THD: Tensor, own_THj: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Mix the values of step 0; also the weights of the chain's own keys [T, Hq, j]."""
        assert self._trunk is not None
        keys, values = self._trunk
        num_kv = keys.shape[1]
        q = self._blocks(q_THD, num_kv)  # n Hkv G Q D
        scores = (q.flatten(2, 3) @ keys).view(*q.shape[:4], -1)
        scores = scores.masked_fill_(self._unseen[:, None, None], torch.finfo(q.dtype).min / 2)
        num_keys = scores.shape[-1]
        if own_THj is not None:
            scores = torch.cat((scores, self._blocks(own_THj, num_kv)), dim=-1)
        weights = scores.softmax(dim=-1)
        seen = weights[..., :num_keys].flatten(2, 3)
        mixed = self._unblocked((seen @ values).view(q.shape))
        if own_THj is None:
            return mixed, None
        return mixed, self._unblocked(weights[..., num_keys:])

    def _blocks(self, x_THX: Tensor, num_kv: int) -> Tensor:
        """[T, Hq, X] -> [n, Hkv, G, Q, X]."""
        padded = functional.pad(x_THX, (0, 0, 0, 0, 0, self._end))
        blocks = padded.view(-1, self._block, num_kv, padded.shape[1] // num_kv, padded.shape[2])
        return blocks.permute(0, 2, 3, 1, 4)

    def _unblocked(self, x: Tensor) -> Tensor:
        """Inverse of ``_blocks``."""
        rows = x.permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)
        return rows[: len(rows) - self._end]

    def _windows(self, x_THD: Tensor) -> Tensor:
        """Rows that each block may see, [n, Hkv, D, W + Q]."""
        padded = functional.pad(x_THD, (0, 0, 0, 0, self._reach, self._end))
        return padded.unfold(0, self._reach + self._block, self._block).contiguous()

    def _hidden_keys(self, segment_T: Tensor, has_row_T: Tensor) -> Tensor:
        """[n, Q, W + Q] bool: the query does not see the key.

        A query sees the rows of its piece up to itself, and always itself, so that no softmax is
        empty.
        """
        size = self._reach + self._block
        ends = (self._reach, self._end)
        segment = functional.pad(segment_T, ends, value=-1).unfold(0, size, self._block)
        has_row = functional.pad(has_row_T, ends, value=False).unfold(0, size, self._block)
        key = torch.arange(size, device=segment.device)
        query = torch.arange(self._block, device=segment.device)[:, None] + self._reach
        same = segment[:, None] == segment[:, self._reach :, None]
        seen = (same & has_row[:, None] & (key <= query)) | (key == query)
        return ~seen


def _grouped(x_AHX: Tensor, num_kv: int) -> Tensor:
    """[A, Hq, X] -> [A, Hkv, G, X]."""
    num, num_heads, size = x_AHX.shape
    return x_AHX.reshape(num, num_kv, num_heads // num_kv, size)
