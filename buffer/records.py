"""The records that flow between rooms, on one page. Frozen, torch-free.

Layer ids everywhere: the residual stream after k decoder layers; 0 is the embeddings.
Positions count from 0 over prompt and completion together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import chain, islice, repeat
from typing import Any, Literal, Self, overload

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Counts over a window of verification steps. Join windows with ``+``.

    Only counts are stored, so windows add exactly; ratios are derived on reading and are
    ``None``, never 0 or NaN, when there is nothing to divide by.
    """

    num_steps: int = 0
    """Target forward passes."""
    num_proposed: int = 0
    """Tokens the drafter proposed."""
    num_accepted: int = 0
    """Proposed tokens kept. Excludes the one token the target itself adds per step."""

    def __post_init__(self) -> None:
        if not 0 <= self.num_accepted <= self.num_proposed:
            raise ValueError(
                f"num_accepted must be in 0..num_proposed={self.num_proposed}, "
                f"got {self.num_accepted}"
            )

    def __add__(self, other: Acceptance) -> Acceptance:
        return Acceptance(
            self.num_steps + other.num_steps,
            self.num_proposed + other.num_proposed,
            self.num_accepted + other.num_accepted,
        )

    @property
    def rate(self) -> float | None:
        """Accepted / proposed, in [0, 1]."""
        return self.num_accepted / self.num_proposed if self.num_proposed else None

    @property
    def tokens_per_step(self) -> float | None:
        """Tokens emitted per target pass, in [1, K + 1]; counts the target's own token."""
        return 1 + self.num_accepted / self.num_steps if self.num_steps else None


@dataclass(frozen=True, slots=True)
class Consideration:
    """A draft before the device cut it, for a policy that decides on each request's length."""

    may_cut: bool
    """The step's allocation could shorten drafts; otherwise all that was drafted was verified, for
    others to judge by."""
    confidence: tuple[float, ...]
    """Three figures of each position of the draft: probability of the likeliest token, entropy in
    nats, and lead of the likeliest over the second, by the drafter at temperature 1 and before the
    token was drawn. The draft that was verified has as many tokens, or fewer. Where it ended before
    it was whole (``policies.ending``), 0 for positions that were not computed."""

    @property
    def length(self) -> int:
        """Of the draft before the cut."""
        return len(self.confidence) // FIGURES


FIGURES = 3
"""Figures of each position in ``Consideration.confidence``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundNotes:
    """What servers did not note of a round from the beginning, so that it may be missing."""

    policy: str = ""
    """Kind of the policy that took it; empty in a record of a server that did not note it."""
    step: int | None = None
    """Running number of the step in its server, modulo 2**30; ``None`` likewise. Rounds of one step
    share one decision."""
    reason: str = ""
    """Why this drafter and K, in a word: that of the step's decision, or where several drafters
    drafted in the step that of the pick (``policies.interface``); empty likewise."""
    considered: Consideration | None = None
    """``None`` where the device was not asked to cut drafts."""
    is_timed: bool = True
    """The step's time is that of rounds alone. ``False`` where prompts, or log probabilities that a
    request asked for, were computed beside them; ``True`` likewise."""
    notes: tuple[tuple[str, float], ...] = ()
    """Figures that the policy noted of its decision, in the order of their names: what is one
    policy's own is here and needs no field (``policies.interface.Note``). Rounded to float32."""


@dataclass(frozen=True, slots=True)
class Round(RoundNotes):
    """One draft and one verification of one request."""

    anchor: int
    """Position of the last committed token before the draft; grows from round to round."""
    drafter: str
    """Kind of the drafter that proposed; ``none`` when nothing was proposed."""
    version: int
    """Version of the drafter that proposed; that of the neural drafter if it was idle."""
    draft_ids: tuple[int, ...]
    """Proposed token ids that were verified, K of them; empty at K = 0."""
    q_logp: tuple[float, ...] | None
    """Natural log of the drafter's probability of each token; ``None`` for a delta draft, and where
    nothing was proposed."""
    p_logp: tuple[float, ...]
    """Natural log of the target's probability (after penalties, temperature and truncation) of each
    draft token up to and including the first rejected one; -inf if the token was excluded."""
    num_accepted: int
    """Draft tokens kept, 0..K."""
    next_id: int
    """The target's own token after the kept ones."""
    draft_k: int
    """K that the policy planned for the step (before per-request caps)."""
    propensity: float
    """Probability with which the policy took this action."""
    batch: int
    """Requests in the step."""
    step_s: float
    """Wall time of the step, seconds."""


class Considering(IntEnum):
    """Rows of ``Rounds.considered``."""

    LENGTH = 0
    """1 + length of the draft before the cut; 0: the device was not asked to cut."""
    MAY_CUT = 1
    """``Consideration.may_cut``, 0 or 1."""


class Count(IntEnum):
    """Rows of ``Rounds.counts``. What is meant is said at the field of ``Round``."""

    ANCHOR = 0
    DRAFTER = 1
    """Index into ``Rounds.drafters``."""
    VERSION = 2
    NEXT_ID = 3
    DRAFT_K = 4
    BATCH = 5
    NUM_Q = 6
    """Values of ``q_logp``: as many as draft tokens, or 0 where a round has none."""
    NUM_ACCEPTED = 7
    NUM_P = 8
    """Values of ``p_logp``."""
    NUM_DRAFTED = 9
    """Draft tokens, K."""
    POLICY = 10
    """1 + index into ``Rounds.policies``; 0: not noted."""
    STEP = 11
    """1 + number of the step; 0: not noted."""
    REASON = 12
    """1 + index into ``Rounds.reasons``; 0: not noted."""
    UNTIMED = 13
    """0 where the step's time is that of rounds alone, or where that is not noted."""


FIRST_COUNTS = 10
"""Rows of ``Rounds.counts`` in the oldest records of this version; the others are 0 there."""


class Real(IntEnum):
    """Rows of ``Rounds.reals``."""

    PROPENSITY = 0
    STEP_S = 1


@dataclass(frozen=True, slots=True, eq=False)
class Rounds(Sequence[Round]):
    """The R rounds of one request by column; a ``Round`` is made when somebody asks for it."""

    counts: NDArray[np.int32]
    """[14, R]: one row for each ``Count``; all >= 0."""
    reals: NDArray[np.float64]
    """[2, R]: one row for each ``Real``."""
    draft_ids: NDArray[np.int32]
    """[sum of K] the draft tokens of one round after another."""
    q_logp: NDArray[np.float32]
    """[sum of NUM_Q] likewise."""
    p_logp: NDArray[np.float32]
    """[sum of NUM_P] likewise."""
    drafters: tuple[str, ...]
    """Kinds of the drafters that occur."""
    policies: tuple[str, ...] = ()
    """Kinds of the policies that occur."""
    reasons: tuple[str, ...] = ()
    """Reasons of decisions that occur."""
    considered: NDArray[np.int32] = field(default_factory=lambda: np.zeros((0, 0), np.int32))
    """[2, R], one row for each ``Considering``; no values where no draft could be cut."""
    confidence: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    """[3 * sum of lengths before the cut], see ``Consideration``."""
    note_names: tuple[str, ...] = ()
    """Names of the figures that policies noted, as ``kind.name``, in their order."""
    notes: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    """[names, R] these figures; NaN where a round has none of a name. No values without names."""

    @classmethod
    def of(cls, rounds: Iterable[Round] = ()) -> Self:
        """Columns of some rounds; log probabilities are rounded to float32.

        Raises:
            OverflowError: a count does not fit int32.
        """
        rounds = tuple(rounds)
        drafters = tuple(dict.fromkeys(one.drafter for one in rounds))
        policies = tuple(dict.fromkeys(one.policy for one in rounds if one.policy))
        reasons = tuple(dict.fromkeys(one.reason for one in rounds if one.reason))
        q_logp = [one.q_logp or () for one in rounds]
        counts = {
            Count.ANCHOR: [one.anchor for one in rounds],
            Count.DRAFTER: [drafters.index(one.drafter) for one in rounds],
            Count.VERSION: [one.version for one in rounds],
            Count.NEXT_ID: [one.next_id for one in rounds],
            Count.DRAFT_K: [one.draft_k for one in rounds],
            Count.BATCH: [one.batch for one in rounds],
            Count.NUM_Q: list(map(len, q_logp)),
            Count.NUM_ACCEPTED: [one.num_accepted for one in rounds],
            Count.NUM_P: [len(one.p_logp) for one in rounds],
            Count.NUM_DRAFTED: [len(one.draft_ids) for one in rounds],
            Count.POLICY: [policies.index(one.policy) + 1 if one.policy else 0 for one in rounds],
            Count.STEP: [0 if one.step is None else one.step + 1 for one in rounds],
            Count.REASON: [reasons.index(one.reason) + 1 if one.reason else 0 for one in rounds],
            Count.UNTIMED: [int(not one.is_timed) for one in rounds],
        }
        reals = [one.propensity for one in rounds], [one.step_s for one in rounds]
        return cls(
            np.array([counts[row] for row in Count], np.int32),
            np.array(reals, np.float64),
            np.array([*chain.from_iterable(one.draft_ids for one in rounds)], np.int32),
            np.array([*chain.from_iterable(q_logp)], np.float32),
            np.array([*chain.from_iterable(one.p_logp for one in rounds)], np.float32),
            drafters,
            policies,
            reasons,
            *_considered(rounds),
            *_noted(rounds),
        )

    def __len__(self) -> int:
        return int(self.counts.shape[1])

    @overload
    def __getitem__(self, index: int) -> Round: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Round, ...]: ...

    def __getitem__(self, index: int | slice) -> Round | tuple[Round, ...]:
        return tuple(self)[index]

    def __iter__(self) -> Iterator[Round]:
        counts, reals = self.counts.tolist(), self.reals.tolist()
        fields = zip(
            counts[Count.ANCHOR],
            map(self.drafters.__getitem__, counts[Count.DRAFTER]),
            counts[Count.VERSION],
            _in_pieces(self.draft_ids, counts[Count.NUM_DRAFTED]),
            (piece or None for piece in _in_pieces(self.q_logp, counts[Count.NUM_Q])),
            _in_pieces(self.p_logp, counts[Count.NUM_P]),
            counts[Count.NUM_ACCEPTED],
            counts[Count.NEXT_ID],
            counts[Count.DRAFT_K],
            reals[Real.PROPENSITY],
            counts[Count.BATCH],
            reals[Real.STEP_S],
            strict=True,
        )
        notes = zip(
            map(("", *self.policies).__getitem__, counts[Count.POLICY]),
            (number - 1 if number else None for number in counts[Count.STEP]),
            map(("", *self.reasons).__getitem__, counts[Count.REASON]),
            self._considerations(),
            (not untimed for untimed in counts[Count.UNTIMED]),
            self._notes(),
            strict=True,
        )
        return (
            Round(
                *own, policy=policy, step=step, reason=reason, considered=considered,
                is_timed=is_timed, notes=noted,
            )
            for own, (policy, step, reason, considered, is_timed, noted) in zip(
                fields, notes, strict=True
            )
        )  # fmt: skip

    def _notes(self) -> Iterator[tuple[tuple[str, float], ...]]:
        if not self.note_names:
            return repeat((), len(self))
        return (
            tuple((n, v) for n, v in zip(self.note_names, own, strict=True) if not math.isnan(v))
            for own in self.notes.T.tolist()
        )

    def _considerations(self) -> Iterator[Consideration | None]:
        if not self.considered.size:
            return repeat(None, len(self))
        lengths, may_cut = self.considered.tolist()
        figures = _in_pieces(self.confidence, [FIGURES * max(n - 1, 0) for n in lengths])
        return (
            Consideration(bool(cut), own) if length else None
            for length, cut, own in zip(lengths, may_cut, figures, strict=True)
        )


def _considered(rounds: Sequence[Round]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    found = [one.considered for one in rounds]
    if not any(found):
        return np.zeros((0, 0), np.int32), np.zeros(0, np.float32)
    lengths = [0 if one is None else 1 + one.length for one in found]
    may_cut = [int(one is not None and one.may_cut) for one in found]
    figures = chain.from_iterable(one.confidence for one in found if one is not None)
    return np.array([lengths, may_cut], np.int32), np.array([*figures], np.float32)


def _noted(rounds: Sequence[Round]) -> tuple[tuple[str, ...], NDArray[np.float32]]:
    found = [dict(one.notes) for one in rounds]
    names = tuple(sorted({name for own in found for name in own}))
    values = [[own.get(name, math.nan) for own in found] for name in names]
    return names, np.array(values, np.float32) if names else np.zeros((0, 0), np.float32)


def _in_pieces(values: NDArray[Any], lengths: list[int]) -> Iterator[tuple[Any, ...]]:
    """Consecutive pieces of these lengths."""
    left = iter(values.tolist())
    return (tuple(islice(left, length)) for length in lengths)


SamplingValue = float | int | str | bool | None


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters of one request.

    The server's table of sampling fields decides which fields a trace keeps. It leaves out biases
    and penalties, so that the trainer learns the target's own text.
    """

    values: Mapping[str, SamplingValue]
    """Name of a field -> its value; ``temperature`` is always among them."""

    @property
    def temperature(self) -> float:
        """>= 0; 0 is greedy."""
        value = self.values["temperature"]
        assert isinstance(value, int | float)
        return value


@dataclass(frozen=True, slots=True)
class FeatureRows:
    """Hidden rows of the target at some positions of a trace."""

    positions: NDArray[np.int32]
    """[N], ascending; positions that were computed. The others were cached or dropped."""
    layer_ids: tuple[int, ...]
    """The m tapped layers."""
    dtype: Literal["bfloat16", "float8_e4m3fn", "float32"]
    """Dtype of ``rows``."""
    rows: NDArray[Any]
    """[N, m + 1, H]: tapped layers in ``layer_ids`` order, then the lm_head's input (after the
    final norm). bfloat16 is stored as uint16 bits, float8 as uint8 bits, float32 as float32."""
    scale: NDArray[np.float32] | None
    """[N, m + 1] multiplier that restores fp8 rows; ``None`` otherwise."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Record of one request: its tokens, rounds and hidden rows."""

    producer: str
    """Server process that made it."""
    epoch: int
    """Start of that process, unix ms; a restart is a new epoch."""
    seq: int
    """Running number within (producer, epoch), from 0. The triple is unique."""
    request_id: str
    tenant: str
    target_fingerprint: str
    """Digest of the target that produced the rows; traces of another target are not trained on."""
    sampling: Sampling
    prompt_length: int
    """Tokens of the prompt; the rest of ``token_ids`` was generated."""
    token_ids: NDArray[np.int32]
    """[T] prompt and completion."""
    rounds: Rounds
    features: FeatureRows | None
    finished_unix_ms: int

    @property
    def domain(self) -> str:
        """Kind of text that the client named; empty if it named none."""
        domain = self.sampling.values.get("domain")
        return domain if isinstance(domain, str) else ""

    @property
    def versions(self) -> set[int]:
        """Versions of the drafters of its rounds."""
        return set(self.rounds.counts[Count.VERSION].tolist())


@dataclass(frozen=True, slots=True)
class FileDigest:
    """One file of a bundle."""

    sha256: str
    """Of the file, in hex; with ``piece_bytes``, of the SHA-256 digests of its pieces, in order."""
    num_bytes: int
    piece_bytes: int | None = None
    """Length of the pieces that are digested apart, so that several threads can; the last piece is
    what is left. ``None``: the file is digested as a whole."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """Description of a bundle (``manifest.json``); a snapshot is this and the tensors."""

    version: int
    """Integer of a published drafter; 0 is the initial one; never reused."""
    parent: int | None
    """Version it was trained from."""
    kind: str
    """Kind of the drafter: a name in the catalog of drafters."""
    drafter_config: dict[str, Any]
    """Shape of the drafter; must equal the running one's."""
    target_fingerprint: str
    files: dict[str, FileDigest]
    """Every file of the bundle but the manifest."""
    gate: dict[str, Any] = field(default_factory=dict)
    """Figures on which it passed the gate, e.g. simulated tokens_per_step of it and its parent."""
    policy: dict[str, Any] = field(default_factory=dict)
    """Calibration of the policy for these weights, e.g. acceptance by position."""
    created_unix_ms: int = 0
    signature: str | None = None
    """Of all the above, see ``buffer.signatures``; ``None``: not signed."""
