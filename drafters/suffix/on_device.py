"""The suffix index on the device: a round looks for its requests' last tokens in text that lies
there, so it can be launched before the one before it is read.

Drafts follow the longest earlier occurrences of the last tokens, in the request itself or in recent
finished traffic of its namespace, as most of the latest few went on (``specops.matches``). Every
request has a draft: without an occurrence its last token again, which mostly fails and then counts
as a draft that failed. So what a policy learns of this drafter is what drafting for a batch brings,
and it needs no look at matches.

Finished texts are written to a ring, each from a multiple of ``BLOCK`` positions on, so that blocks
have one namespace each. Where the ring ends, the next text begins at its start, over older ones.

``recent_tokens=0`` keeps every request to itself; privacy is as in ``drafters.suffix.index``.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import NamedTuple

import torch
from torch import Tensor

from drafters.protocol import DrafterContext, Traits
from drafters.suffix.traits import DEVICE_REQUEST_TRAITS, DEVICE_TRAITS
from specops.device import text_drafts
from specops.lanes import Field, OpenedRound
from specops.matches import BLOCK, END, Bounds, RingText, TextDrafts


class _Placed(NamedTuple):
    """A finished text in the ring."""

    start: int
    namespace: str


class FinishedTexts:
    """Recent finished texts on the device, and which namespaces they belong to."""

    def __init__(self, num_tokens: int, device: torch.device) -> None:
        """
        Args:
            num_tokens: how many are kept, separators included; at least one.
        """
        num_blocks = -(-num_tokens // BLOCK)
        self._size = num_blocks * BLOCK
        self.ring = RingText(
            torch.full((self._size,), END, dtype=torch.int32, device=device),
            torch.zeros(num_blocks, dtype=torch.int32, device=device),
            torch.zeros(2, dtype=torch.int64, device=device),
        )
        self._start = self._filled = 0
        self._placed: deque[_Placed] = deque()
        """Oldest first."""
        self._numbers: dict[str, int] = {}
        self._users: Counter[str] = Counter()
        """Texts in the ring and running requests of each namespace."""
        self._last_number = 0

    def begin(self, namespace: str) -> int:
        """Number of a namespace, for a request that begins."""
        if namespace not in self._numbers:
            self._last_number += 1
            self._numbers[namespace] = self._last_number
        self._users[namespace] += 1
        return self._numbers[namespace]

    def finish(self, text_N: Tensor | None, namespace: str) -> None:
        """A request has ended.

        Args:
            text_N: [N] int32 on the device, N >= 1, its text, if later requests may be drafted for
                from it; of a longer text than fits, the end is kept.
        """
        if text_N is not None:
            text_N = text_N[-(self._size - 1) :]
            self._write(text_N, namespace)
        self._leave(namespace)

    def _write(self, text_N: Tensor, namespace: str) -> None:
        ids, length = self.ring.ids_M, len(text_N)
        num = -(-(length + 1) // BLOCK) * BLOCK
        begins_again = self._start + num > self._size
        start = 0 if begins_again else self._start
        end = start + num
        # Texts that are skipped where the ring ends are given up like those that are overwritten:
        # they may still be found, until their namespace has no other text.
        given_up = range(self._start, self._size) if begins_again else range(0)
        while self._placed and (
            start <= self._placed[0].start < end or self._placed[0].start in given_up
        ):
            self._leave(self._placed.popleft().namespace)
        ids[start : start + length].copy_(text_N)
        ids[start + length : end].fill_(END)
        self.ring.spaces_B[start // BLOCK : end // BLOCK].fill_(self._numbers[namespace])
        self._users[namespace] += 1
        self._placed.append(_Placed(start, namespace))
        self._start = end % self._size
        self.ring.bounds_2[0].fill_(self._start)
        if end > self._filled:
            self._filled = end
            self.ring.bounds_2[1].fill_(end)

    def _leave(self, namespace: str) -> None:
        self._users[namespace] -= 1
        if not self._users[namespace]:
            del self._users[namespace], self._numbers[namespace]


class DeviceIndex:
    """The index over the text of requests and, of ``suffix``, over finished texts. A
    ``TextDrafter``."""

    version = 0

    def __init__(
        self, kind: str, traits: Traits, bounds: Bounds, recent_tokens: int, device: torch.device
    ) -> None:
        """
        Args:
            recent_tokens: see ``FinishedTexts``; 0: requests are searched alone.
        """
        self.kind, self.traits = kind, traits
        self._finished = FinishedTexts(recent_tokens, device) if recent_tokens else None
        self._bounds = bounds

    def begin(self, namespace: str) -> int:
        """See ``TextDrafter.begin``."""
        return 0 if self._finished is None else self._finished.begin(namespace)

    def finish(self, text_N: Tensor | None, namespace: str) -> None:
        """See ``TextDrafter.finish``."""
        if self._finished is not None:
            self._finished.finish(text_N, namespace)

    def propose(self, texts_LN: Tensor, opened: OpenedRound, num_draft: int) -> TextDrafts:
        """See ``TextDrafter.propose``."""
        fields = opened.ints_FR
        return text_drafts(
            texts_LN, opened.lanes_R, fields[Field.LENGTH], fields[Field.SPACE],
            None if self._finished is None else self._finished.ring, num_draft, self._bounds,
        )  # fmt: skip


def build(context: DrafterContext) -> DeviceIndex:
    """``suffix``: requests and recent finished traffic, with the bounds of ``drafter.suffix``."""
    s = context.settings.suffix
    bounds = Bounds(s.min_match, s.max_match)
    return DeviceIndex("suffix", DEVICE_TRAITS, bounds, s.recent_tokens, context.device)


def build_for_request(context: DrafterContext) -> DeviceIndex:
    """``suffix_request``: requests alone, whatever ``recent_tokens`` is."""
    s = context.settings.suffix
    bounds = Bounds(s.min_match, s.max_match)
    return DeviceIndex("suffix_request", DEVICE_REQUEST_TRAITS, bounds, 0, context.device)
