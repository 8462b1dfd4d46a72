"""All drafters of one engine: which may propose, the requests they follow, and host proposals."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Several
from dataclasses import dataclass, replace

from drafters.protocol import Drafter, HostDrafter
from policies.interface import Decision, StepObs
from serving.engine.drafter_rows import DrafterRows
from serving.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class _Offer:
    """The drafters that may draft for a request or for a batch."""

    kinds: tuple[str, ...]
    """Neural ones first."""
    hosts: tuple[HostDrafter, ...]
    with_match: tuple[HostDrafter, ...]
    """Those of ``hosts`` that need a match."""
    without_match: tuple[str, ...]
    """Kinds that need none."""
    neural: dict[str, DrafterRows]


class Drafting:
    """Any number of drafters, in the order in which settings name them.

    A request may choose its drafters. The others do not follow its text, and a step uses only
    drafters that all of its requests allow.
    """

    def __init__(
        self,
        hosts: Several[HostDrafter],
        neural: Several[DrafterRows],
        max_draft: int,
        on_request: Collection[str] = (),
    ) -> None:
        """
        Args:
            on_request: kinds that draft only for requests that name them.
        """
        self.hosts = {drafter.kind: drafter for drafter in hosts}
        self.neural = {rows.kind: rows for rows in neural}
        self.max_draft = max_draft
        self.on_request = frozenset(on_request)
        self._ordinary = self._offer_of({*self.hosts, *self.neural} - self.on_request)
        self._offers: dict[frozenset[str], _Offer] = {}
        self._num_choosing = 0
        """Requests admitted and not finished that choose their drafters."""
        learning = (r.drafter for r in self.neural.values() if r.drafter.traits.learns)
        self._learning = next(learning, None)

    @property
    def drafters(self) -> dict[str, Drafter]:
        """All of them by kind, neural ones first."""
        return {k: rows.drafter for k, rows in self.neural.items()} | dict(self.hosts)

    @property
    def version(self) -> int:
        """Version of the drafter that learns; 0 without one."""
        return self._learning.version if self._learning else 0

    def version_of(self, kind: str) -> int:
        """Version recorded for a round by this drafter; plain rounds and those of host drafters
        record the version of the drafter that learns."""
        return self.neural[kind].drafter.version if kind in self.neural else self.version

    def learns(self, kind: str) -> bool:
        """Whether rounds by this drafter say something about published weights."""
        return kind in self.neural and self.neural[kind].drafter.traits.learns

    # ---- who may draft ------------------------------------------------------------------------

    def choice(self, batch: list[Sequence]) -> frozenset[str] | None:
        """Kinds that all requests of a batch allow; ``None`` if no request chooses. Requests that
        decode plainly do not count."""
        if not self._num_choosing:
            return None
        choices = [s.request.drafters for s in batch if s.request.max_draft != 0]
        chosen = [choice for choice in choices if choice is not None]
        if not chosen:
            return None
        if len(chosen) < len(choices):
            chosen.append(frozenset(self._ordinary.kinds))
        return frozenset.intersection(*chosen)

    def _offer(self, choice: frozenset[str] | None) -> _Offer:
        if choice is None:
            return self._ordinary
        if choice not in self._offers:
            self._offers[choice] = self._offer_of(choice)
        return self._offers[choice]

    def _offer_of(self, kinds: Collection[str]) -> _Offer:
        hosts = tuple(d for d in self.hosts.values() if d.kind in kinds)
        neural = {kind: rows for kind, rows in self.neural.items() if kind in kinds}
        with_match = tuple(d for d in hosts if d.traits.needs_match)
        free = (*neural, *(d.kind for d in hosts if not d.traits.needs_match))
        return _Offer((*neural, *(d.kind for d in hosts)), hosts, with_match, free, neural)

    def _following(self, sequence: Sequence) -> tuple[HostDrafter, ...]:
        """Host drafters that follow the text of a request."""
        choice = sequence.request.drafters
        return self._ordinary.hosts if choice is None else self._offer(choice).hosts

    # ---- the life of a request -----------------------------------------------------------------

    def begin(self, sequence: Sequence) -> None:
        """A request was admitted."""
        request = sequence.request
        self._num_choosing += request.drafters is not None
        for rows in self.neural.values():
            rows.begin(sequence)
        for drafter in self._following(sequence):
            drafter.begin(request.id, sequence.tokens, namespace=request.namespace)

    def foresee(self, sequence: Sequence, tokens: list[int]) -> None:
        """Tell the host drafters of tokens that will be committed unless the request ends first."""
        assert not sequence.num_foreseen, "one round is foreseen at a time"
        for drafter in self._following(sequence):
            drafter.extend(sequence.request.id, tokens)
        sequence.num_foreseen = len(tokens)

    def extend(self, sequence: Sequence, tokens: list[int]) -> None:
        """Tell the host drafters of committed tokens, unless ``foresee`` has."""
        if not sequence.num_foreseen:
            for drafter in self._following(sequence):
                drafter.extend(sequence.request.id, tokens)
        sequence.num_foreseen = 0

    def finish(self, sequence: Sequence, keep: bool) -> None:
        """Tell the host drafters that a request ended.

        Args:
            keep: drafts for later requests may be taken from its text.
        """
        if sequence.pages:
            self._num_choosing -= sequence.request.drafters is not None
            for drafter in self._following(sequence):
                drafter.finish(sequence.request.id, keep=keep, num_tokens=len(sequence.tokens))

    # ---- a step --------------------------------------------------------------------------------

    def cap(self, sequence: Sequence) -> int:
        """Largest K this request may have now: the last token is always the target's own."""
        asked = sequence.request.max_draft
        limit = self.max_draft if asked is None else min(asked, self.max_draft)
        return max(0, min(limit, sequence.num_left - sequence.num_foreseen - 1))

    def observe(
        self,
        batch: list[Sequence],
        step: int,
        most: int,
        choice: frozenset[str] | None = None,
        *,
        look: bool = True,
    ) -> StepObs | None:
        """What the policy sees of a batch; ``None`` when nothing can be drafted.

        Args:
            most: largest K of this step.
            choice: see the method of that name.
            look: look up matches; otherwise drafters that need one are left out.
        """
        caps = tuple(min(self.cap(s), most) for s in batch)
        offer = self._offer(choice)
        kinds = offer.kinds if look else offer.without_match
        if not kinds or not any(caps):
            return None
        matches = None
        if look and offer.with_match:
            matches = tuple(
                max(d.observe(s.request.id) for d in offer.with_match) if cap else 0
                for s, cap in zip(batch, caps, strict=True)
            )
        pending = {kind: sum(map(r.num_missing, batch)) for kind, r in offer.neural.items()}
        return StepObs(
            step=step,
            batch=len(batch),
            caps=caps,
            matches=matches,
            drafters=kinds,
            max_draft=max(caps),
            version=self.version,
            pending_rows=pending,
        )

    def held(self, decision: Decision, batch: list[Sequence], most: int) -> Decision:
        """A decision that was made without a look at the batch, held to what its requests allow.

        Args:
            most: largest K of this step.
        """
        if not decision.draft_k:
            return decision
        allowed = min(decision.draft_k, most, max(map(self.cap, batch)))
        if allowed == decision.draft_k:
            return decision
        return replace(decision, draft_k=allowed, drafter=decision.drafter if allowed else "none")

    def from_host(self, kind: str, batch: list[Sequence], num_draft: int) -> list[list[int]]:
        """Up to ``num_draft`` tokens that a host drafter proposes for each request."""
        drafter = self.hosts[kind]
        return [
            drafter.propose(s.request.id, min(num_draft, cap)) if (cap := self.cap(s)) else []
            for s in batch
        ]
