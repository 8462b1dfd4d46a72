"""All drafters of one engine: which may propose, the requests they follow, and host proposals."""

from __future__ import annotations

from collections.abc import Sequence as Several

from drafters.protocol import Drafter, HostDrafter
from policies.interface import StepObs
from serving.engine.drafter_rows import DrafterRows
from serving.engine.sequence import Sequence


class Drafting:
    """Any number of drafters, in the order of the settings."""

    def __init__(
        self, hosts: Several[HostDrafter], neural: Several[DrafterRows], max_draft: int
    ) -> None:
        self.hosts = {drafter.kind: drafter for drafter in hosts}
        self.neural = {rows.kind: rows for rows in neural}
        self.max_draft = max_draft
        self._with_match = [d for d in self.hosts.values() if d.traits.needs_match]
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

    # ---- the life of a request -----------------------------------------------------------------

    def begin(self, sequence: Sequence) -> None:
        """Tell all drafters that a request was admitted."""
        for rows in self.neural.values():
            rows.begin(sequence)
        for drafter in self.hosts.values():
            request = sequence.request
            drafter.begin(request.id, sequence.tokens, namespace=request.tenant)

    def foresee(self, sequence: Sequence, tokens: list[int]) -> None:
        """Tell the host drafters of tokens that will be committed unless the request ends first."""
        assert not sequence.num_foreseen, "one round is foreseen at a time"
        for drafter in self.hosts.values():
            drafter.extend(sequence.request.id, tokens)
        sequence.num_foreseen = len(tokens)

    def extend(self, sequence: Sequence, tokens: list[int]) -> None:
        """Tell the host drafters of committed tokens, unless ``foresee`` has."""
        if not sequence.num_foreseen:
            for drafter in self.hosts.values():
                drafter.extend(sequence.request.id, tokens)
        sequence.num_foreseen = 0

    def finish(self, sequence: Sequence, keep: bool) -> None:
        """Tell the host drafters that a request ended.

        Args:
            keep: drafts for later requests may be taken from its text.
        """
        if sequence.pages:
            for drafter in self.hosts.values():
                drafter.finish(sequence.request.id, keep=keep, num_tokens=len(sequence.tokens))

    # ---- a step --------------------------------------------------------------------------------

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
        if not (self.hosts or self.neural) or not any(caps):
            return None
        matches = None
        if self._with_match:
            matches = tuple(
                max(d.observe(s.request.id) for d in self._with_match) if cap else 0
                for s, cap in zip(batch, caps, strict=True)
            )
        pending = {kind: sum(map(r.num_missing, batch)) for kind, r in self.neural.items()}
        return StepObs(
            step=step,
            batch=len(batch),
            caps=caps,
            matches=matches,
            drafters=(*self.neural, *self.hosts),
            max_draft=max(caps),
            version=self.version,
            pending_rows=pending,
        )

    def from_host(self, kind: str, batch: list[Sequence], num_draft: int) -> list[list[int]]:
        """Up to ``num_draft`` tokens that a host drafter proposes for each request."""
        drafter = self.hosts[kind]
        return [
            drafter.propose(s.request.id, min(num_draft, cap)) if (cap := self.cap(s)) else []
            for s in batch
        ]
