"""Asks the drafters: which may propose, what they know, what they propose.

Shapes: R requests, K draft tokens, m tapped layers, H hidden.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from drafters.eagle3.paged import PagedEagle3
from drafters.protocol import CommittedRows, Draft
from drafters.suffix import SuffixIndex
from policies.interface import StepObs
from serving.engine.packing import sampling_of, slot_table, uniforms_of
from serving.engine.sequence import Sequence
from specops.rng import Stream
from targets.target import Target


class Drafting:
    """The neural drafter and the suffix index of one engine, and what they need kept."""

    def __init__(
        self,
        target: Target,
        neural: PagedEagle3 | None,
        suffix: SuffixIndex | None,
        num_pages: int,
        page_size: int,
        max_draft: int,
    ) -> None:
        self.neural = neural
        self.suffix = suffix
        self.max_draft = max_draft
        self._target = target
        self._page_size = page_size
        self._ready = np.zeros(num_pages, dtype=bool)
        # Tapped rows of every slot, so that the drafter can catch up at any time: after an off
        # state, on a prefix somebody else computed, or with new weights. About a fifth of the KV.
        shape = (num_pages * page_size, len(target.layer_ids), target.config.hidden_size)
        self._features = (
            torch.zeros(shape, dtype=target.dtype, device=target.device) if neural else None
        )

    @property
    def version(self) -> int:
        """Version of the neural drafter in force; 0 without one."""
        return self.neural.version if self.neural else 0

    @property
    def kinds(self) -> tuple[str, ...]:
        """Drafters that can propose."""
        return (("eagle3",) if self.neural else ()) + (("suffix",) if self.suffix else ())

    def begin(self, sequence: Sequence) -> None:
        """A request was admitted: find out which of its cached rows the drafter has seen."""
        cached = sequence.num_cached // self._page_size
        self._ready[sequence.pages[cached:]] = False
        gaps = np.flatnonzero(~self._ready[sequence.pages[:cached]])
        num_ready = int(gaps[0]) if len(gaps) else cached
        sequence.draft_next = max(num_ready * self._page_size, 1)
        if self.suffix:
            request = sequence.request
            self.suffix.begin(request.id, sequence.tokens, namespace=request.tenant)

    def foresee(self, sequence: Sequence, tokens: list[int]) -> None:
        """Tokens were decided, and are committed later, unless the request ends before them."""
        assert not sequence.num_foreseen, "one round is foreseen at a time"
        assert self.suffix is not None
        self.suffix.extend(sequence.request.id, tokens)
        sequence.num_foreseen = len(tokens)

    def extend(self, sequence: Sequence, tokens: list[int]) -> None:
        """Tokens were committed."""
        if self.suffix and not sequence.num_foreseen:
            self.suffix.extend(sequence.request.id, tokens)
        sequence.num_foreseen = 0

    def finish(self, sequence: Sequence, keep: bool) -> None:
        """A request ended; ``keep``: others may be drafted from its text."""
        if self.suffix and sequence.pages:
            self.suffix.finish(sequence.request.id, keep=keep, num_tokens=len(sequence.tokens))

    def keep_features(self, slots_T: Tensor, features_TmH: Tensor) -> None:
        """Store the tapped rows of a pass; rows of rejected drafts are overwritten later."""
        if self._features is not None:
            self._features.index_copy_(0, slots_T, features_TmH)

    def features_at(self, slots_T: Tensor) -> Tensor:
        """[T, m, H] tapped rows stored for some slots."""
        assert self._features is not None
        return self._features.index_select(0, slots_T)

    def cap(self, sequence: Sequence) -> int:
        """Largest K this request may have now: the last token is always the target's own."""
        asked = sequence.request.max_draft
        limit = self.max_draft if asked is None else min(asked, self.max_draft)
        return max(0, min(limit, sequence.num_left - sequence.num_foreseen - 1))

    def observe(self, batch: list[Sequence], step: int, most: int) -> StepObs | None:
        """What the policy sees of a batch; ``None`` when nothing can be drafted.

        Args:
            most: largest K of this step.
        """
        caps = tuple(min(self.cap(s), most) for s in batch)
        if not self.kinds or not any(caps):
            return None
        matches = None
        if self.suffix:
            matches = tuple(
                self.suffix.match(s.request.id) if cap else 0
                for s, cap in zip(batch, caps, strict=True)
            )
        pending = sum(max(0, len(s.tokens) - s.draft_next - 1) for s in batch)
        return StepObs(
            step=step,
            batch=len(batch),
            caps=caps,
            suffix_matches=matches,
            drafters=self.kinds,
            max_draft=max(caps),
            version=self.version,
            pending_rows=pending if self.neural else 0,
        )

    def draft(self, batch: list[Sequence], drafter: str, num_draft: int) -> Draft | None:
        """Propose up to ``num_draft`` tokens for each request; ``None`` if nobody proposes any."""
        if num_draft == 0:
            return None
        if drafter == "suffix":
            return self._from_suffix(batch, num_draft)
        return self._from_neural(batch, num_draft)

    def from_index(self, batch: list[Sequence], num_draft: int) -> list[list[int]]:
        """What the suffix index proposes for each request, up to ``num_draft`` tokens."""
        assert self.suffix is not None
        return [
            self.suffix.propose(s.request.id, min(num_draft, cap)) if (cap := self.cap(s)) else []
            for s in batch
        ]

    def is_warm_to(self, sequence: Sequence, length: int) -> None:
        """The neural drafter has the rows of the first ``length`` tokens."""
        sequence.draft_next = length
        self._ready[sequence.pages[: length // self._page_size]] = True

    def _from_suffix(self, batch: list[Sequence], num_draft: int) -> Draft | None:
        proposals = self.from_index(batch, num_draft)
        width = max(len(p) for p in proposals)
        if width == 0:
            return None
        padded = [p + [0] * (width - len(p)) for p in proposals]
        tokens = torch.tensor(padded, dtype=torch.int64, device=self._target.device)
        return Draft("suffix", tokens, tuple(map(len, proposals)), None, self.version)

    def _from_neural(self, batch: list[Sequence], num_draft: int) -> Draft:
        assert self.neural is not None
        device = self._target.device
        matches = [s.matches_target for s in batch]
        greedy_rows = draws = None
        if not all(matches):
            greedy_rows = torch.tensor(matches, device=device)
            draws = uniforms_of(batch, num_draft, Stream.DRAFT, device)
        sampling = sampling_of(batch, self._target.vocab_size, device)
        rows = self._committed_rows(batch, num_draft)
        draft = self.neural.propose(rows, num_draft, sampling, greedy_rows, draws)
        for sequence in batch:
            self.is_warm_to(sequence, len(sequence.tokens))
        lens = tuple(min(num_draft, self.cap(s)) for s in batch)
        return Draft(draft.kind, draft.tokens_RK, lens, draft.q_RKV, draft.version)

    def _committed_rows(self, batch: list[Sequence], num_draft: int) -> CommittedRows:
        """Rows draft_next .. anchor of each request, with the features of the position before."""
        assert self._features is not None
        device = self._target.device
        # A drafter that is warm computes the anchor's row again, for its output.
        starts = [min(s.draft_next, len(s.tokens) - 1) for s in batch]
        from_here = list(zip(batch, starts, strict=True))
        ids = [token for s, start in from_here for token in s.tokens[start:]]
        positions = [p for s, start in from_here for p in range(start, len(s.tokens))]
        before = [s.slots[start - 1 : len(s.tokens) - 1] for s, start in from_here]
        slots = torch.from_numpy(np.concatenate(before)).to(device)
        return CommittedRows(
            counts_R=tuple(len(s.tokens) - start for s, start in from_here),
            ids_T=torch.tensor(ids, device=device),
            positions_T=torch.tensor(positions, device=device),
            features_TmH=self._features[slots],
            slots_RS=slot_table(batch, num_draft, device),
        )
