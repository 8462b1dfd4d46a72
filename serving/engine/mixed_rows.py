"""Several drafters that draft in one round, each for some of its requests.

All neural members draft for all requests, and the draft of the picked one is taken: at the batch
sizes at which drafting pays, a drafter takes as long for some requests as for all. All of them
compute their rows at the end, so whichever drafts next for a request has its rows, in such a round
or alone. Host drafters propose for the requests that they were picked for, before the launch.

Verification uses the distribution that the picked drafter drew from; what a host drafter proposes
is certain. Which drafter is picked depends on committed tokens only, so outputs follow the target
as with one drafter.

Shapes: R requests, K draft tokens, D draft vocabulary, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Several
from functools import reduce
from typing import TypeVar

import torch
from torch import Tensor

from serving.engine.drafter_rows import DrafterRows
from serving.engine.drafts import Drafts, certain_at
from serving.engine.lanes import LaneRows
from serving.engine.sequence import Sequence
from specops.draft_sampling import DraftLaw, RowLaws
from specops.lanes import ClosedRound, Input, OpenedRound

_T = TypeVar("_T")


class MixedRows:
    """A mix: the drafters that may be picked, in the order of their numbers."""

    def __init__(
        self,
        kind: str,
        members: Several[DrafterRows],
        vocab_size: int,
        hosts: Several[str] = (),
    ) -> None:
        """
        Args:
            kind: name of the mix.
            members: the neural drafters.
            vocab_size: V.
            hosts: kinds of the host drafters.

        Raises:
            ValueError: some draw their tokens and others do not.
        """
        if len({one.draws for one in members}) > 1:
            raise ValueError(
                f"{kind}: drafters that draw their tokens cannot draft in one round with others; "
                f"set drafter.mixed to false"
            )
        self.kind = kind
        self.members = tuple(members)
        self.draws = members[0].draws
        self.hosts = tuple(hosts)
        self._vocab_size = vocab_size
        self._numbers = {one: number for number, one in enumerate(self.kinds)}

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of all drafters that may be picked, neural ones first."""
        return (*(rows.kind for rows in self.members), *self.hosts)

    def number_of(self, drafter: str) -> int:
        """Number of a member, as rounds take it."""
        return self._numbers[drafter]

    def catch_up(self, batch: list[Sequence]) -> int:
        """See ``DrafterRows.catch_up``; of all members."""
        return sum([rows.catch_up(batch) for rows in self.members])

    def has_rows_to(self, sequence: Sequence, length: int) -> None:
        """See ``DrafterRows.has_rows_to``."""
        for rows in self.members:
            rows.has_rows_to(sequence, length)

    # ---- within programs -----------------------------------------------------------------------

    def draft(
        self,
        opened: OpenedRound,
        rows: LaneRows,
        inputs_RI: Tensor,
        num_draft: int,
        *,
        draws: bool,
        tells: bool = False,
    ) -> Drafts:
        """The draft of each request by the member whose number is uploaded for it."""
        assert not tells, "drafts of a mix are not cut"
        found = [one.draft(opened, rows, inputs_RI, num_draft, draws=draws) for one in self.members]
        picked_R = inputs_RI[:, Input.PICKED]
        tokens_RK = _of_picked([one.tokens_RK for one in found], picked_R)
        is_given_R, lens_R = picked_R >= len(self.members), None
        if self.hosts:
            given_RK = inputs_RI[:, Input.TOKENS : Input.TOKENS + num_draft]
            tokens_RK = torch.where(is_given_R[:, None], given_RK, tokens_RK)
            given_R = torch.minimum(opened.lens_R, inputs_RI[:, Input.DRAFTED])
            lens_R = torch.where(is_given_R, given_R, opened.lens_R)
        if not draws:
            return Drafts(tokens_RK, None, None, lens_R)
        logq_RK = _of_picked([_known(one.logq_RK) for one in found], picked_R)
        law = self._law([_known(one.law) for one in found], picked_R, num_draft)
        if self.hosts:
            law, logq_RK = certain_at(law, logq_RK, is_given_R[:, None].repeat(1, num_draft))
        return Drafts(tokens_RK, logq_RK, law, lens_R)

    def _law(self, laws: list[DraftLaw], picked_R: Tensor, num_draft: int) -> DraftLaw:
        """The law of each request's picked draft, over one vocabulary for all. A single member's
        is taken as it is."""
        first = laws[0]
        if len(laws) == 1:
            return first
        if all(law.vocab is first.vocab for law in laws):
            logits_RKD = _of_picked([law.logits_RKD for law in laws], picked_R)
            kept = _picked_laws([law.laws for law in laws], picked_R, num_draft)
            return DraftLaw(logits_RKD, first.sampling, first.greedy_R, first.vocab, kept)
        whole = [over_target(law, self._vocab_size) for law in laws]
        # Laws that were kept number their own vocabulary: verification computes them again.
        return DraftLaw(_of_picked(whole, picked_R), first.sampling, first.greedy_R)

    def observe_round(
        self, opened: OpenedRound, closed: ClosedRound, lanes_R: Tensor, features_TmH: Tensor
    ) -> None:
        """See ``DrafterRows.observe_round``."""
        for rows in self.members:
            rows.observe_round(opened, closed, lanes_R, features_TmH)


def over_target(law: DraftLaw, vocab_size: int) -> Tensor:
    """[R, K, V] a law's logits over the target's vocabulary, -inf for tokens that the drafter does
    not have. The order of the tokens stays, so truncation cuts ties as it did.
    """
    logits_RKD = law.logits_RKD
    if law.vocab is None:
        return logits_RKD
    ids_D = torch.arange(logits_RKD.shape[-1], device=logits_RKD.device)
    logits_RKV = logits_RKD.new_full((*logits_RKD.shape[:-1], vocab_size), float("-inf"))
    return logits_RKV.index_copy_(-1, law.vocab.to_target(ids_D), logits_RKD)


def _of_picked(found: Several[Tensor], picked_R: Tensor) -> Tensor:
    """Of each request the rows of the picked member; tensors are [R, ...]."""

    def take(taken: Tensor, numbered: tuple[int, Tensor]) -> Tensor:
        number, rows = numbered
        is_it = (picked_R == number).view(-1, *[1] * (rows.dim() - 1))
        return torch.where(is_it, rows, taken)

    return reduce(take, list(enumerate(found))[1:], found[0])


def _picked_laws(
    found: Several[RowLaws | None], picked_R: Tensor, num_draft: int
) -> RowLaws | None:
    """[R * K] laws of the picked members' drafts; ``None`` if a member kept none."""
    kept = [law for law in found if law is not None]
    if len(kept) < len(found):
        return None
    picked_T = picked_R[:, None].expand(-1, num_draft).reshape(-1)
    return RowLaws(
        _of_picked([law.tops_cuts_masses for law in kept], picked_T),
        _of_picked([law.lasts for law in kept], picked_T),
    )


def _known(value: _T | None) -> _T:
    assert value is not None, "every member drew its tokens"
    return value
