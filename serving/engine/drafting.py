"""All drafters of one engine: which may propose, the requests they follow, and host proposals."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Several
from dataclasses import dataclass, replace
from itertools import compress

from drafters.protocol import Drafter, FollowsTarget, HostDrafter, RanksMatches
from policies.interface import (
    Decision,
    DraftPolicy,
    DraftRecord,
    Pick,
    StepObs,
    ValuesMatches,
)
from serving.engine.drafter_rows import DrafterRows
from serving.engine.grouping import Grouping
from serving.engine.mixed_rows import MixedRows
from serving.engine.proposed import Proposed
from serving.engine.sequence import Sequence
from serving.engine.text_mix import TextMix
from serving.engine.text_rows import TextRows

_KEPT = 1 - 1 / 32
"""See ``policies.interface.DraftRecord``."""
_NO_RECORD = DraftRecord(0.0, 0.0, 0.0)

Mix = MixedRows | TextMix


@dataclass(frozen=True, slots=True)
class _Offer:
    """The drafters that may draft for a request or for a batch."""

    kinds: tuple[str, ...]
    """Neural ones first."""
    offered: tuple[str, ...]
    """Those of them that a policy chooses among. A neural drafter that is mixed with text is not:
    with text before its drafts it keeps at least as much, for a search of some microseconds."""
    hosts: tuple[HostDrafter, ...]
    with_match: tuple[HostDrafter, ...]
    """Those of ``hosts`` that need a match."""
    without_match: tuple[str, ...]
    """Those of ``offered`` that need none."""
    on_device: dict[str, DrafterRows | TextRows | Mix]
    """With the mixes of those that may draft."""
    has_mixes: bool


class _Ranking:
    """Which matches host drafters prefer: as the policy in charge values them."""

    def __init__(self, hosts: Several[HostDrafter]) -> None:
        self._ranked = [drafter for drafter in hosts if isinstance(drafter, RanksMatches)]
        self._policy: DraftPolicy | None = None
        self._knowing: ValuesMatches | None = None
        """The policy, if it values matches."""
        self._values: list[list[float] | None] = [None] * len(self._ranked)

    def follow(self, policy: DraftPolicy) -> None:
        """Tell the drafters of values that have changed."""
        if policy is not self._policy:
            self._policy = policy
            self._knowing = policy if isinstance(policy, ValuesMatches) else None
        for i, drafter in enumerate(self._ranked):
            values = None if self._knowing is None else self._knowing.match_values(drafter.kind)
            if values is not self._values[i]:
                self._values[i] = values
                drafter.rank(values)


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
        mixes: Several[Mix] = (),
        texts: Several[TextRows] = (),
    ) -> None:
        """
        Args:
            on_request: kinds that draft only for requests that name them.
            mixes: drafters of the others that may draft in one round.
            texts: drafters that read text on the device.
        """
        self.hosts = {drafter.kind: drafter for drafter in hosts}
        self.neural = {rows.kind: rows for rows in neural}
        self.texts = {rows.kind: rows for rows in texts}
        self.mixes = {rows.kind: rows for rows in mixes}
        self.on_device: dict[str, DrafterRows | TextRows | Mix] = {
            **self.neural, **self.texts, **self.mixes
        }  # fmt: skip
        """What may draft within a round's program."""
        self._noted = {kind for rows in mixes for kind in (rows.kind, *rows.kinds)}
        """Drafters whose rounds are noted for picks."""
        self.max_draft = max_draft
        self.on_request = frozenset(on_request)
        self._resting = {k for k, rows in self.neural.items() if rows.traits.former_of is not None}
        """Drafters that may not draft now: those with a former version while there is none."""
        self._offers = self._first_offers()
        """By what requests choose; under ``None`` that of those that do not."""
        self._ranking = _Ranking(hosts)
        self.grouping = Grouping()
        self._num_choosing = 0
        """Requests admitted and not finished that choose their drafters."""
        learning = (r.drafter for r in self.neural.values() if r.traits.learns)
        self._learning = next(learning, None)
        self.has_one_version = sum(r.traits.has_versions for r in self.neural.values()) <= 1
        """There is one version whoever drafts."""

    @property
    def drafters(self) -> dict[str, Drafter]:
        """All of them by kind, neural ones first."""
        on_device = {k: rows.drafter for k, rows in (self.neural | self.texts).items()}
        return on_device | dict(self.hosts)

    @property
    def version(self) -> int:
        """Version of the first drafter that learns; 0 without one."""
        return self._learning.version if self._learning else 0

    def versions_of(self, kind: str) -> dict[str, int]:
        """Versions recorded for a round by this drafter or mix: of each that may draft, by kind;
        under ``none`` that of plain rounds. That of plain rounds and of host drafters is the first
        learning drafter's."""
        found = self.on_device.get(kind)
        if found is None:
            return {"none": self.version}
        drafting = dict.fromkeys(("none", *found.kinds), self.version)
        return drafting | {m.kind: m.drafter.version for m in found.members}

    def versions(self) -> dict[str, int]:
        """Version in use of each drafter that has versions, by kind. One that rests uses none."""
        return {
            kind: rows.drafter.version
            for kind, rows in self.neural.items()
            if self.has_versions(kind) and kind not in self._resting
        }

    def has_versions(self, kind: str) -> bool:
        """Whether rounds by this drafter say something about published weights."""
        return kind in self.neural and self.neural[kind].traits.has_versions

    # ---- who may draft ------------------------------------------------------------------------

    def rest(self, kind: str, rests: bool) -> None:
        """Let a drafter, and mixes with it, draft for no request from now on, or again. Rows of its
        drafts under way are committed as usual. Called between two steps."""
        (self._resting.add if rests else self._resting.discard)(kind)
        self._offers = self._first_offers()

    def _first_offers(self) -> dict[frozenset[str] | None, _Offer]:
        kinds = {*self.hosts, *self.neural, *self.texts}
        return {None: self._offer_of(kinds - self.on_request)}

    def choice(self, batch: list[Sequence]) -> frozenset[str] | None:
        """Kinds that all requests of a batch allow; ``None`` if no request chooses. Requests that
        decode plainly do not count."""
        if not self._num_choosing:
            return None
        choices = [s.request.drafters for s in batch if s.request.max_draft != 0]
        chosen = set(choices)  # few are different; a set knows its hash
        if chosen <= {None}:
            return None
        every = frozenset(self._offers[None].kinds)
        allowed = [every if choice is None else choice for choice in chosen]
        return allowed[0] if len(allowed) == 1 else frozenset.intersection(*allowed)

    def _offer(self, choice: frozenset[str] | None) -> _Offer:
        found = self._offers.get(choice)
        if found is None:
            assert choice is not None, "the first one is that of requests that do not choose"
            found = self._offers[choice] = self._offer_of(choice)
        return found

    def _offer_of(self, kinds: Collection[str]) -> _Offer:
        kinds = frozenset(kinds) - self._resting
        hosts = tuple(d for d in self.hosts.values() if d.kind in kinds)
        on_device = {
            kind: rows
            for kind, rows in self.on_device.items()
            if all(kind in kinds for kind in rows.kinds)
        }
        with_match = tuple(d for d in hosts if d.traits.needs_match)
        matching = {d.kind for d in with_match}
        mixed = {rows.neural.kind for rows in on_device.values() if isinstance(rows, TextMix)}
        free = (
            *(kind for kind, rows in on_device.items() if matching.isdisjoint(rows.kinds)),
            *(d.kind for d in hosts if not d.traits.needs_match),
        )
        has_mixes = not self.mixes.keys().isdisjoint(on_device)
        names = (*on_device, *(d.kind for d in hosts))
        offered, free = (tuple(k for k in kinds if k not in mixed) for kinds in (names, free))
        return _Offer(names, offered, hosts, with_match, free, on_device, has_mixes)

    def can_draft(self, kind: object, choice: frozenset[str] | None) -> bool:
        """Whether a drafter, or a mix, can draft for a batch. Where no request chooses, also one on
        the device that drafts on request only: the profile of step times runs them.

        Args:
            choice: see the method of that name.
        """
        is_offered = kind in self._offer(choice).kinds
        return is_offered or (choice is None and kind in self.on_device)

    def members(self, kind: str) -> frozenset[str]:
        """Drafters that draft in a round of this one, or of this mix."""
        found = self.on_device.get(kind)
        return frozenset((kind,) if found is None else found.kinds)

    def _reading(self, sequence: Sequence) -> list[TextRows]:
        """Text drafters that may take drafts from a request's text, now or later."""
        offer = self._offer(sequence.request.drafters)
        return [rows for kind, rows in self.texts.items() if kind in offer.on_device]

    def _following(self, sequence: Sequence) -> tuple[HostDrafter, ...]:
        """Host drafters that follow the text of a request."""
        return self._offer(sequence.request.drafters).hosts

    # ---- the life of a request -----------------------------------------------------------------

    def begin(self, sequence: Sequence) -> None:
        """A request was admitted."""
        request = sequence.request
        sequence.group = self.grouping.group(request)
        self._num_choosing += request.drafters is not None
        for rows in self.neural.values():
            rows.begin(sequence)
        for texts in self._reading(sequence):
            texts.begin(sequence)
        for drafter in self._following(sequence):
            drafter.begin(request.id, sequence.tokens, namespace=request.namespace)
        sequence.num_told = len(sequence.tokens)

    def target_changed(self, running: list[Sequence]) -> None:
        """The target's weights were replaced, and with them what neural drafters have copied of
        them; the rows of running requests are computed again. Host drafters follow text alone."""
        for rows in self.neural.values():
            if isinstance(rows.drafter, FollowsTarget):
                rows.drafter.follow_target()
            for sequence in running:
                rows.begin_again(sequence)

    def returned(self) -> list[DrafterRows]:
        """Rows of the neural drafters that went back to other weights, see ``weights_returned``."""
        return [rows for rows in self.neural.values() if rows.weights_returned()]

    def foresee(self, batch: list[Sequence], news: list[list[int]]) -> None:
        """Tell the host drafters of tokens that will be committed unless the request ends first.

        Args:
            news: [R] the tokens of each request.
        """
        self._catch_up(batch)
        self._tell(batch, news)

    def _catch_up(self, batch: list[Sequence]) -> None:
        """Tell the host drafters of committed tokens that they do not know: only when they are
        asked, so a request that nobody drafts for costs nothing."""
        behind = [s for s in batch if s.num_told < len(s.tokens)]
        self._tell(behind, [s.tokens[s.num_told :] for s in behind])

    def _tell(self, batch: list[Sequence], news: list[list[int]]) -> None:
        """Tell the host drafters of each request of its next tokens."""
        keys = [s.request.id for s in batch]
        for drafter in self.hosts.values():
            if self._num_choosing:
                follow = [drafter in self._following(sequence) for sequence in batch]
                drafter.extend(list(compress(keys, follow)), list(compress(news, follow)))
            elif drafter in self._offers[None].hosts:
                drafter.extend(keys, news)
        for sequence, tokens in zip(batch, news, strict=True):
            sequence.num_told += len(tokens)

    def finish(self, sequence: Sequence, keep: bool) -> None:
        """Tell the host drafters that a request ended.

        Args:
            keep: drafts for later requests may be taken from its text.
        """
        if sequence.pages:  # it was admitted
            for texts in self._reading(sequence):
                texts.finish(sequence, keep)
            self._catch_up([sequence])
            self._num_choosing -= sequence.request.drafters is not None
            for drafter in self._following(sequence):
                drafter.finish(sequence.request.id, keep=keep, num_tokens=len(sequence.tokens))

    # ---- a step --------------------------------------------------------------------------------

    def caps(self, batch: list[Sequence], most: int) -> bytes:
        """[R] largest K of each request now: the last token is always the target's own.

        Args:
            most: largest K of this step.
        """
        # Tokens that the host drafters know may be committed already.
        lefts = [s.limit - max(len(s.tokens), s.num_told) - 1 for s in batch]
        asked = [s.request.max_draft for s in batch]
        if min(lefts) >= most and asked.count(None) == len(batch):  # nearly always
            return bytes((most,)) * len(batch)
        limits = [most if cap is None else min(most, cap) for cap in asked]
        return bytes([max(0, min(both)) for both in zip(limits, lefts, strict=True)])

    def rank_matches(self, policy: DraftPolicy) -> None:
        """Tell the host drafters which matches a policy values most, before they look."""
        self._ranking.follow(policy)

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
        caps = self.caps(batch, most)
        offer = self._offer(choice)
        kinds = offer.offered if look else offer.without_match
        if not kinds or not any(caps):
            return None
        matches = None
        if look and offer.with_match:
            matches = self._matches(batch, caps, offer.with_match)
        members = {one.kind: one for rows in offer.on_device.values() for one in rows.members}
        missing = {kind: one.num_missing(batch) for kind, one in members.items()}
        pending = {
            kind: sum([missing[one.kind] for one in rows.members])
            for kind, rows in offer.on_device.items()
        }
        made_of = self.grouping.of(batch)
        return StepObs(
            step=step,
            batch=len(batch),
            caps=caps,
            matches=matches,
            drafters=kinds,
            max_draft=max(caps),
            version=self.version,
            pending_rows=pending,
            records=tuple(s.records for s in batch) if offer.has_mixes else None,
            groups=made_of.groups,
            context=made_of.context,
        )

    def note(self, batch: list[Sequence], draft: Proposed, num_accepted: list[int]) -> None:
        """Note what was kept of a round's drafts, for the policy's next picks; nothing to do
        without mixes.

        Args:
            batch: [R] requests that go on, or ended in this round.
            num_accepted: [R].
        """
        if draft.drafter not in self._noted:
            return
        for sequence, kind, tokens, kept in zip(
            batch, draft.kinds(), draft.tokens, num_accepted, strict=True
        ):
            if tokens:
                rounds, verified, accepted = sequence.records.get(kind, _NO_RECORD)
                sequence.records[kind] = DraftRecord(
                    _KEPT * rounds + 1, _KEPT * verified + len(tokens), _KEPT * accepted + kept
                )

    def _matches(
        self, batch: list[Sequence], caps: bytes, drafters: tuple[HostDrafter, ...]
    ) -> bytes:
        """[R] kind of the best match of any of some drafters; 0 where nothing may be drafted."""
        keys = self._asking(batch, caps)
        found = [drafter.observe(keys) for drafter in drafters]
        best = found[0] if len(found) == 1 else map(max, zip(*found, strict=True))
        if len(keys) == len(batch):
            return bytes(best)
        asked = iter(best)
        return bytes([next(asked) if cap else 0 for cap in caps])

    def _asking(self, batch: list[Sequence], caps: bytes) -> list[str]:
        """Keys of the requests that may draft now, after the host drafters were told of them."""
        asking = list(compress(batch, caps))
        self._catch_up(asking)
        return [s.request.id for s in asking]

    def held(self, decision: Decision, batch: list[Sequence], most: int) -> Decision:
        """A decision that was made without a look at the batch, held to what its requests allow.

        Args:
            most: largest K of this step.
        """
        if not decision.draft_k:
            return decision
        allowed = min(decision.draft_k, max(self.caps(batch, most)))
        if allowed == decision.draft_k:
            return decision
        return replace(decision, draft_k=allowed, drafter=decision.drafter if allowed else "none")

    def asks_host(self, drafter: str, picks: tuple[Pick, ...] | None) -> bool:
        """Whether a host drafter drafts in a round: this one, or one of those picked in a mix."""
        return drafter in self.hosts or any(one.drafter in self.hosts for one in picks or ())

    def from_host(self, kind: str, batch: list[Sequence], num_draft: int) -> list[list[int]]:
        """Up to ``num_draft`` tokens that a host drafter proposes for each request."""
        return self._propose(kind, batch, self.caps(batch, num_draft))

    def from_hosts(
        self, mix: str, batch: list[Sequence], num_draft: int, picks: tuple[Pick, ...]
    ) -> tuple[list[list[int]], tuple[Pick, ...]]:
        """Up to ``num_draft`` tokens that host drafters propose for the requests for which they
        were picked, and none for the others; and the picks. Where one proposes nothing, the first
        of the mix is picked instead: it drafts anyway."""
        caps = self.caps(batch, num_draft)
        given: list[list[int]] = [[] for _ in batch]
        for kind in {one.drafter for one in picks} & self.hosts.keys():
            rows = [
                r for r, (one, cap) in enumerate(zip(picks, caps, strict=True))
                if cap and one.drafter == kind
            ]  # fmt: skip
            own = [batch[r] for r in rows]
            for r, tokens in zip(
                rows, self._propose(kind, own, bytes([caps[r] for r in rows])), strict=True
            ):
                given[r] = tokens
        lacking = [
            r for r, (one, tokens) in enumerate(zip(picks, given, strict=True))
            if not tokens and one.drafter in self.hosts
        ]  # fmt: skip
        if not lacking:
            return given, picks
        first, changed = self.on_device[mix].kinds[0], list(picks)
        for r in lacking:
            changed[r] = changed[r]._replace(drafter=first, reason="unmatched")
        return given, tuple(changed)

    def _propose(self, kind: str, batch: list[Sequence], caps: bytes) -> list[list[int]]:
        """What a host drafter proposes for each request, as many tokens as it may have."""
        asking = self._asking(batch, caps)
        drafts = iter(self.hosts[kind].propose(asking, list(filter(None, caps))))
        return [next(drafts) if cap else [] for cap in caps]
