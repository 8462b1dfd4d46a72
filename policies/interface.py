"""The contract between the engine and a draft policy. Host-side, torch-free, no I/O, microseconds.

The life of a decision:

1. **Start-up.** ``policies.catalog.build_policy`` builds the policy from settings and the traits of
   the server's drafters. ``calibrate`` gives it step times measured before any request is served,
   and ``on_swap`` the calibration of each learning drafter's initial weights.
2. **Rest or plan.** Before every step the engine calls ``rest``. If it returns a decision, that is
   used; ``None`` makes the engine inspect the batch and call ``plan`` with a ``StepObs``. It looks
   up matches only if ``wants_matches`` says so, because that takes most of the time.
3. **Draft and verify.** The engine runs the decision: the drafter proposes up to ``draft_k`` tokens
   per request, fewer where ``caps`` say so, none where a drafter with ``needs_match`` has no match.
   Every round of the trace carries the decision's ``policy`` and ``propensity``, for off-policy
   estimates (``policies.off_policy``). With an ``allocation``, the device cuts each request's draft
   to a length of its own before it is verified (``policies.allocation``). Everything else that a
   policy knows of its decision is in its ``note``, which nobody but the policy understands.
4. **Observe.** ``observe`` receives the outcome, with the decision and its note, once the host has
   read the step. Outcomes come in the order of the decisions, but the next step may be planned
   before this one is observed. A step launched before a swap and read after it is never observed.
5. **Swap.** ``on_swap`` is called between two steps when a drafter gets other weights.

Lossless by construction: ``plan`` runs before the step's tokens are drawn, on figures of earlier
steps and on prefix-only facts (what kind of match was found), never on a drawn draft token. What
the device decides per request looks at the drafter's distributions alone (``specops.allocation``).

The engine calls a policy from its own thread only, so a policy needs no locks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any, NamedTuple, Protocol, runtime_checkable

from policies.allocation import Allocation

_NOTHING: Mapping[str, float] = {}


class DrafterTraits(Protocol):
    """What a policy asks about a drafter instead of its name."""

    @property
    def on_device(self) -> bool:
        """It drafts on the device, within the round, and may have to catch up on rows committed
        without it; otherwise it proposes on the host and is always up to date."""
        ...

    @property
    def needs_match(self) -> bool:
        """It proposes only for requests whose text it has found elsewhere."""
        ...

    @property
    def picks_itself(self) -> bool:
        """In a mix it drafts for the requests whose match it is sure of, so that nobody is picked
        when a step is planned."""
        ...

    @property
    def former_of(self) -> str | None:
        """Kind of the drafter whose version before the newest it has, while there is one; ``None``:
        it is a drafter of its own."""
        ...

    @property
    def prior_acceptance(self) -> tuple[float, ...]:
        """Acceptance of the first draft token before anything is measured: one value, or one for
        each kind of match, the first of them for no match."""
        ...

    @property
    def prior_draft_cost(self) -> float:
        """Time to draft one token before anything is measured, as a share of a plain step."""
        ...


@dataclass(frozen=True, slots=True)
class PolicyContext:
    """What a policy is built for, apart from its settings."""

    drafters: Mapping[str, DrafterTraits]
    """Traits by kind of every drafter the server holds."""
    max_draft: int
    """Largest K the engine runs, 0..16."""
    seed: int
    """Seed for a policy that makes random choices."""
    mixes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Name -> kinds of the drafters that can draft in one step, each for some of its requests;
    neural ones first. A policy that decides so names the mix as the drafter, and who drafts for
    whom."""


@dataclass(frozen=True, slots=True)
class CostSample:
    """One timed step of the start-up profile."""

    drafter: str
    """``none`` iff draft_k is 0."""
    draft_k: int
    batch: int
    step_s: float
    """Wall time of the step, drafting included."""
    draft_s: float
    """Part of ``step_s`` spent drafting, and planning where no round ran meanwhile."""


class DraftRecord(NamedTuple):
    """What one drafter has done for one request so far: sums over its rounds, the last one counting
    1 and each before it a thirty-second less than the one after it."""

    num_rounds: float
    num_verified: float
    """Draft tokens."""
    num_accepted: float


class Pick(NamedTuple):
    """Who drafts for one request of a step that several drafters draft in."""

    drafter: str
    propensity: float
    """Probability of this pick, given the step's decision, in (0, 1]."""
    reason: str
    """``best``: it is expected to keep the most; ``try``: to know what it would keep; ``match``: by
    what the device found. ``unmatched`` in place of these: the first of the mix, because the one
    that was picked needs a match and found none in the tokens that are committed by now."""


PICK_REASONS = frozenset(("best", "try", "unmatched", "match"))
"""Values of ``Pick.reason``. No decision has one of them as its own reason, so a round whose reason
is among them is one of a mix."""


@dataclass(frozen=True, slots=True)
class StepObs:
    """The batch about to be decoded."""

    step: int
    """Running number of the engine's steps."""
    batch: int
    """Requests to decode, >= 1."""
    caps: bytes
    """[batch] largest K of each request now, by its own limit and the tokens it has left. Bytes are
    compared and counted at a tenth of the time of a tuple of numbers."""
    matches: bytes | None
    """[batch] kind of the match that a drafter with ``needs_match`` would continue for each
    request, 0 for none; ``None`` without such a drafter, and where nobody looked. The drafter
    numbers the kinds, as in its ``prior_acceptance``."""
    drafters: tuple[str, ...]
    """Kinds of the drafters that can propose now, and mixes; where nobody looked, none with
    ``needs_match``, and no mix with such a drafter. One with a former version can while there is
    one."""
    max_draft: int
    """Largest K the engine can run."""
    version: int
    """Version of the learning drafter in force."""
    pending_rows: Mapping[str, int] = field(default_factory=dict)
    """Committed rows, over the batch, that each neural drafter must process before it can draft.
    A missing kind has none."""
    records: tuple[Mapping[str, DraftRecord], ...] | None = None
    """[batch] what drafters have done for each request, by kind; ``None`` unless several can draft
    in one step. Outcomes of earlier rounds only."""
    groups: bytes | None = None
    """[batch] group of each request, by its temperature and its tenant; see ``policies.groups``.
    The same object while the batch is the same."""
    context: int | None = None
    """Tokens of a request whose keys and values a step reads, a mean over the batch; it may be some
    steps old."""

    def longest(self, most: int) -> int:
        """The largest K that some request can use, at most ``most``."""
        most = min(most, self.max_draft)
        # The first request mostly can, and nobody looks at the other 255.
        return most if self.caps[0] >= most else min(most, max(self.caps))


class Note(Protocol):
    """What one policy attaches to a decision: a record of its own type, mostly a ``NamedTuple``."""

    def columns(self) -> Mapping[str, float]:
        """Figures that traces keep in every round of the step, by name: finite numbers that float32
        can hold. A trace has them as ``kind.name``; empty if the note is for ``observe`` alone.
        ``policies evaluate`` compares ``tokens`` of a request and ``seconds`` of a step with what
        came."""
        ...


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do in this step: what the engine must know to run it, and what every log is judged
    by. A policy that knows more puts it into a note; it does not add a field here."""

    drafter: str
    """Kind of the drafter, or name of a mix; ``none`` iff draft_k is 0."""
    draft_k: int
    propensity: float
    """Probability with which the policy chose exactly this (drafter, draft_k), in (0, 1]."""
    explore: bool
    reason: str
    """A word for logs and traces: ``goodput``, ``probe``, ``rest``, ``fixed``, ``plain``."""
    policy: str = ""
    """Kind of the policy that chose, for traces; empty where none was asked."""
    allocation: Allocation | None = None
    """How the device cuts each request's draft after a neural drafter has proposed it; ``None``:
    not at all. Batches in which a request asks for log probabilities are not cut."""
    picks: tuple[Pick, ...] | None = None
    """[batch] for a mix: who drafts for each request. ``None``: the first of the mix for all."""
    note: Note | None = field(default=None, compare=False)
    """The policy's own; it finds it again in ``Outcome.decision``, also where the engine has held
    the decision to what the requests allow."""

    def asked_for(self, propensity: float, note: Note) -> Decision:
        """The same choice, made with another probability and with another note.
        ``dataclasses.replace`` takes three times as long, and a guard does this at every step."""
        return Decision(
            self.drafter, self.draft_k, propensity, self.explore, self.reason, self.policy,
            self.allocation, self.picks, note,
        )  # fmt: skip

    def columns(self) -> Mapping[str, float]:
        """What traces keep of the note."""
        return _NOTHING if self.note is None else self.note.columns()


@dataclass(frozen=True, slots=True)
class RowOutcomes:
    """The results of the rounds of a step: columns over its requests, which must not be changed.
    Requests that ended before the step was read are left out."""

    num_verified: Sequence[int]
    """Draft tokens verified, 0..K."""
    num_accepted: Sequence[int]
    matches: Sequence[int] | None = None
    """The entries of ``StepObs.matches``; ``None`` where that is ``None`` or the policy rested."""
    drafters: Sequence[str] | None = None
    """Of a mix, who drafted for each request; ``None``: the decision's drafter for all."""
    groups: bytes | None = None
    """Those of ``StepObs.groups``; ``None`` where the engine does not tell them."""
    judged: Mapping[str, RowOutcomes] = field(default_factory=dict)
    """Rounds that another drafter would have had, by its kind: its tokens were held against those
    that the round committed, as far as these go. ``num_verified`` are the places that this
    decides, which is no draft length that anybody chose."""

    def __len__(self) -> int:
        return len(self.num_accepted)

    @property
    def tokens_each(self) -> float:
        """Mean tokens of a request, the target's own included; 1 without requests."""
        return 1 + sum(self.num_accepted) / max(len(self.num_accepted), 1)

    def by(self, drafter: str) -> RowOutcomes:
        """Those of a mix that this drafter drafted."""
        is_own = [kind == drafter for kind in self.drafters or ()]
        verified, accepted = (
            compress(self.num_verified, is_own),
            compress(self.num_accepted, is_own),
        )
        matches = None if self.matches is None else list(compress(self.matches, is_own))
        groups = None if self.groups is None else bytes(compress(self.groups, is_own))
        return RowOutcomes(list(verified), list(accepted), matches, groups=groups)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one step."""

    decision: Decision
    batch: int
    rows: RowOutcomes
    step_s: float
    """Wall time of the whole step, seconds."""
    draft_s: float
    """Part of ``step_s`` spent drafting, and planning where no round ran meanwhile."""
    has_prefill: bool
    """The step also computed prompt chunks, or log probabilities that a request asked for, or
    weights were copied before it, so its time says nothing about the arms."""
    version: int
    """Version of the drafter that drafted."""
    plan_s: float = 0.0
    """Part of ``step_s`` spent inspecting the batch and planning: this step, or the next one while
    this one ran. It belongs to the last ``rest`` or ``plan`` that was called."""
    num_caught_up: int = 0
    """Rows, over the batch, that were computed before the drafter could draft: after steps without
    it, after its rows were forgotten because former weights came back, or of cached prompts that it
    had not seen."""
    context: int | None = None
    """See ``StepObs``."""


class DraftPolicy(Protocol):
    """Decides before each step and learns after it."""

    @property
    def wants_profile(self) -> bool:
        """It uses step times, so that measuring them at start-up is worth the seconds."""
        ...

    def calibrate(self, samples: Sequence[CostSample]) -> None:
        """Take in step times measured at start-up."""
        ...

    def rest(self) -> Decision | None:
        """A decision for the next step that needs no inspection of the batch, or ``None``."""
        ...

    def wants_matches(self) -> bool:
        """Whether matches are to be looked up before the next ``plan``; asked after ``rest``."""
        ...

    def plan(self, obs: StepObs) -> Decision:
        """Choose a drafter and K for the next step."""
        ...

    def observe(self, outcome: Outcome) -> None:
        """Learn from a finished step."""
        ...

    def on_swap(self, drafter: str, version: int, calibration: dict[str, Any]) -> None:
        """Forget or re-seed the acceptance figures of a drafter whose weights changed.

        Args:
            drafter: its kind.
            version: the version now in force.
            calibration: ``Manifest.policy`` of that version, e.g. ``{"acceptance": [0.8, 0.7],
                "parent": 3, "parent_acceptance": [0.75, 0.6]}``: conditional acceptance of draft
                positions 1, 2, ... on held-out traces, by the version and by its parent.
                ``acceptance_by_temperature``, by class (``policies.groups``), where traces have
                several; networks of learned policies under keys of their own. Every key may be
                missing.
        """
        ...

    def figures(self) -> dict[str, Any]:
        """JSON-ready state for the dashboard, and ``policy`` of ``GET /dashboard/data``."""
        ...


@runtime_checkable
class LearnsTimes(Protocol):
    """A policy that learns what steps take, which another one of the same server can take over."""

    def start_from(self, other: DraftPolicy) -> None:
        """Start from the times that another policy has learned, and from nothing that tells what
        drafts keep. Called after ``calibrate`` and before the first step.

        Args:
            other: of the same class, settings and drafters.
        """
        ...


@runtime_checkable
class TakesPublished(Protocol):
    """A policy for which networks come with a drafter's versions."""

    def refused(self, drafter: str) -> str | None:
        """Why what came for it with this drafter's version in force cannot be used.

        Returns:
            ``None``: it is used, or nothing came.
        """
        ...


@runtime_checkable
class ValuesMatches(Protocol):
    """A policy that learns what each kind of match is worth. Before matches are looked up, the
    drafters are told, so that of several matches of a request they continue the best."""

    def match_values(self, drafter: str) -> list[float] | None:
        """Expected tokens of the longest draft, by kind of match; the same list while nothing has
        changed.

        Args:
            drafter: kind of a drafter with ``needs_match``.

        Returns:
            ``None``: nothing is known.
        """
        ...
