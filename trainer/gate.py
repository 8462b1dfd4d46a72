"""Compare a candidate with the published version on held-out traces.

Rounds are simulated from the hidden rows of the traces, which the store holds already; neither a
server nor the target runs, and only the result is read from the device. Overlaps decide, because
they scatter least; figures of one drafter are those of what its texts would have kept
(``drafters.kept``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from drafters.acceptance import Chains
from drafters.trainable import Trainable
from policies.cost_table import SpeedTable, by_tokens
from policies.gate import GateVerdict, PairedTrace, gain_error, gate
from policies.groups import class_of
from targets.head import TargetHead
from trainer.packing import EMPTY_SLOT, HeldPiece, Packed, pack
from trainer.rows import HeldSample, RowStore
from trainer.update import batch_dtype

GATE_DRAFT_K = 4
"""K up to which drafters are compared in speed, and K at which they are in tokens_per_step."""
_TOKENS_AT_ONCE = 8192
"""Positions of one batch of held-out samples."""


_HOPELESS = 0.25
"""Share of the incumbent's kept tokens a step below which a candidate is given up."""
_WORTH_KEEPING = 0.1
"""Kept tokens a step of an incumbent that has learnt anything."""
_ENOUGH_TRACES = 4
"""Held-out traces without which that may be chance."""


@dataclass(frozen=True, slots=True)
class Speeds:
    """Simulated speeds relative to plain decoding, each drafter at the K that is best for it."""

    candidate: float
    incumbent: float


@dataclass(frozen=True, slots=True)
class DomainSpeeds:
    """The same on one domain; tokens_per_step where step times are unknown."""

    candidate: float
    incumbent: float
    static: float | None
    """Of the version that the trainer began from, if it is measured."""
    num_traces: int

    def of(self, candidate: bool) -> float:
        """The candidate's, or the incumbent's."""
        return self.candidate if candidate else self.incumbent


@dataclass(frozen=True, slots=True)
class Judgement:
    """Result of comparing a candidate with the published version on the same held-out traces."""

    verdict: GateVerdict
    candidate: float | None
    """Simulated tokens_per_step at K = ``GATE_DRAFT_K``, as requests like these would have it;
    ``None`` without held-out chains."""
    incumbent: float | None
    acceptance: list[float]
    """The candidate's conditional acceptance at each position, up to the last one measured."""
    gain_error: float | None
    """Standard error of the difference that decides: of the speeds, if there are any."""
    num_chains: int
    num_traces: int
    incumbent_acceptance: list[float]
    """The incumbent's on the same chains."""
    speeds: Speeds | None = None
    """``None`` where step times are unknown; then tokens_per_step decides."""
    domains: Mapping[str, DomainSpeeds] = field(default_factory=dict)
    """Of the newest and earlier held-out traces."""
    by_temperature: Mapping[int, list[float]] = field(default_factory=dict)
    """The candidate's ``acceptance`` by class of temperature (``policies.groups``); empty unless
    there are two classes with enough of these traces."""

    @property
    def is_hopeless(self) -> bool:
        """The candidate, which began as the incumbent, has so few proposals kept that its weights
        must have gone wrong: finite, but of no use, and few updates would lead back."""
        if self.candidate is None or self.incumbent is None or self.num_traces < _ENOUGH_TRACES:
            return False
        kept, wanted = self.candidate - 1, self.incumbent - 1
        return wanted >= _WORTH_KEEPING and kept < _HOPELESS * wanted

    @property
    def relative_error(self) -> float | None:
        """``gain_error`` relative to the candidate's figure."""
        figure = self.candidate if self.speeds is None else self.speeds.candidate
        return self.gain_error / figure if self.gain_error and figure else None

    @property
    def gain_over_static(self) -> float | None:
        """Speed of the version in force after this, the candidate if it passed, relative to the
        static one, over all domains by their traces; ``None`` if nothing is known of it."""
        found = [(d.num_traces, d.of(self.verdict.passed) / d.static) for d in self.domains.values()
                 if d.static]  # fmt: skip
        total = sum(weight for weight, _ in found)
        return sum(weight * gain for weight, gain in found) / total if total else None

    def to_json(self) -> dict[str, Any]:
        """Figures for the manifest and the log."""
        return {
            "draft_k": GATE_DRAFT_K,
            "passed": self.verdict.passed,
            "reason": self.verdict.reason,
            "candidate": self.candidate,
            "incumbent": self.incumbent,
            "gain_error": self.gain_error,
            "num_chains": self.num_chains,
            "num_traces": self.num_traces,
            "kind": self.verdict.kind,
            "speeds": None if self.speeds is None else asdict(self.speeds),
        }


@dataclass(frozen=True, slots=True)
class Measured:
    """The chains of some texts with one drafter."""

    overlap: Chains
    """For comparisons."""
    kept: Chains
    """For figures."""


@dataclass(frozen=True, slots=True)
class _Launched:
    """A measurement that the device makes."""

    samples: Sequence[HeldSample]
    rows: Tensor
    """[R, 2 K + 1] float32 on the host, once it is ready: overlaps, kept, and whether the text has
    all K tokens of the chain."""
    owner_R: Tensor
    """Index of each chain's sample."""
    arrived: torch.cuda.Event | None
    """``None``: it is ready."""

    @property
    def is_ready(self) -> bool:
        if self.arrived is None:
            return True
        return bool(self.arrived.query())  # type: ignore[no-untyped-call]

    def by_sample(self) -> list[Tensor]:
        """The rows of each sample; waits for the device."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return [self.rows[self.owner_R == place] for place in range(len(self.samples))]


def _measured(launched: Sequence[_Launched]) -> list[dict[str, Measured]]:
    """The chains of each sample by its key, for each measurement; waits for the device."""
    parts = [part for one in launched for part in one.by_sample()]
    is_full = [part[:, -1] > 0 for part in parts]
    places = slice(GATE_DRAFT_K), slice(GATE_DRAFT_K, -1)
    # All at once: what is computed token by token takes as long for one text.
    texts = [part[:, at] for at in places for part in parts]
    chains = Chains.of_texts(texts, [*is_full, *is_full])
    both = zip(chains[: len(parts)], chains[len(parts) :], strict=True)
    found = []
    for one in launched:
        own = zip(one.samples, islice(both, len(one.samples)), strict=True)
        found.append({sample.key: Measured(*pair) for sample, pair in own})
    return found


@dataclass(slots=True)
class Static:
    """A version that never changes, whose acceptance on each trace is cached."""

    model: nn.Module
    known: dict[str, Measured] = field(default_factory=dict)
    """By key of the trace."""


@dataclass(frozen=True, slots=True)
class _Values:
    """What acceptance is worth to the two drafters that are compared, 0 the candidate."""

    speed: SpeedTable
    ks: tuple[tuple[int, ...], tuple[int, ...]]
    """K of each, by size of batch."""

    def of(self, who: int, measured: Measured) -> float | None:
        """Mean over the rounds; ``None`` without any."""
        tokens = measured.overlap.tokens_by_k()
        return None if tokens is None else self.speed.speedup(tokens, self.ks[who])

    def at_best(self, measured: Measured) -> float | None:
        """The same at the K that is best for these chains."""
        tokens = measured.overlap.tokens_by_k()
        return None if tokens is None else self.speed.speedup(tokens, self.speed.best(tokens))

    def paired(self, ours: Measured, theirs: Measured) -> PairedTrace:
        """Both drafters on one trace."""
        count = len(ours.overlap)
        mine, best = self.of(0, ours) or 0.0, self.of(1, theirs) or 0.0
        return PairedTrace(count, count * mine, count * best)


@dataclass(slots=True)
class Judge:
    """Compares candidates with the incumbent, whose acceptance on each trace it caches."""

    trainable: Trainable[Any]
    head: TargetHead
    store: RowStore
    incumbent: nn.Module
    """Model of the published version."""
    margin: float
    """Least ratio of candidate to incumbent."""
    confidence: float
    """With which the candidate must not be worse; 0.5: only the estimates count."""
    static: Static | None = None
    """The version that the trainer began from, for comparison; ``None``: it is not measured."""
    block: bool = False
    """See ``drafters.trainable.Trainable.acceptance``."""
    between: Callable[[], None] = lambda: None
    """Called between the pieces of a measurement, of ``_TOKENS_AT_ONCE`` positions each: others may
    use the device there."""
    _known: dict[str, Measured] = field(default_factory=dict)
    """Sample key -> the incumbent's acceptance."""
    _measured: dict[str, Measured] = field(default_factory=dict)
    """The same of the last candidate."""

    def warm_up(self, longest: int) -> None:
        """Measure an empty batch. On a GPU, the first batch compiles and loads kernels, which takes
        more than a second beside a server. The store must be allocated.

        Args:
            longest: most positions of a piece.
        """
        at = np.arange(_TOKENS_AT_ONCE, dtype=np.int32)
        packed = Packed(np.full_like(at, EMPTY_SLOT), at // longest, at, len(at), longest)
        batch = self.store.batch(packed, batch_dtype(self.store.device))
        given = self.incumbent, self.head, batch, GATE_DRAFT_K
        self.trainable.acceptance(*given, block=self.block).kept_RK.cpu()  # waits until it is done

    def judge(
        self,
        candidate: nn.Module,
        held_out: Sequence[HeldSample],
        older: Sequence[HeldSample] = (),
        speed: SpeedTable | None = None,
    ) -> Judgement:
        """Compare on the newest held-out traces; ``older`` ones guard against forgetting.

        Args:
            speed: what tokens at each K up to ``GATE_DRAFT_K`` are worth; ``None``: unknown.
        """
        return self.begin(candidate, held_out, older, speed).judgement()

    def begin(
        self,
        candidate: nn.Module,
        held_out: Sequence[HeldSample],
        older: Sequence[HeldSample] = (),
        speed: SpeedTable | None = None,
    ) -> Judging:
        """The same, beside what else the device is told to do from now on. What it reads must not
        be overwritten but by the device's own later work, until the judgement is asked for."""
        everything = [*held_out, *older]
        static = self.static
        return Judging(
            self,
            held_out,
            older,
            speed,
            self._launch(candidate, everything),
            self._launch(self.incumbent, [x for x in everything if x.key not in self._known]),
            []
            if static is None
            else [self._launch(static.model, [x for x in everything if x.key not in static.known])],
        )

    def judged(self, judging: Judging) -> Judgement:
        """Its judgement; waits for the device."""
        held_out, older, speed = judging.held_out, judging.older, judging.speed
        everything = [*held_out, *older]
        launched = [judging.ours, judging.theirs, *judging.static]
        measured, known, *static = _measured(launched)
        self._measured = measured
        known = self._known = _of(self._known | known, everything)
        if self.static is not None and static:
            self.static.known = _of(self.static.known | static[0], everything)
        ours, theirs = _join(measured, held_out), _join(known, held_out)
        values = _values(speed or by_tokens(GATE_DRAFT_K), ours, theirs)
        before = [values.of(who, _join(x, older)) for who, x in ((0, measured), (1, known))]
        traces = [values.paired(measured[x.key], known[x.key]) for x in held_out]
        domains = _by_domain(everything)
        verdict = gate(
            values.of(0, ours) or 0.0,
            values.of(1, theirs) or 0.0,
            margin=self.margin,
            num_rows=len(ours.overlap),
            older=None if before[0] is None or before[1] is None else (before[0], before[1]),
            traces=traces,
            confidence=self.confidence,
            domains={
                name: [values.paired(measured[x.key], known[x.key]) for x in samples]
                for name, samples in domains.items()
            },
        )
        figures = (values.of(0, ours), values.of(1, theirs))
        return Judgement(
            verdict,
            ours.kept.tokens_per_step(),
            theirs.kept.tokens_per_step(),
            ours.kept.acceptance(),
            gain_error(traces),
            len(ours.overlap),
            len(held_out),
            theirs.kept.acceptance(),
            Speeds(*figures) if speed and None not in figures else None,  # type: ignore[arg-type]
            self._domain_speeds(values, domains, measured, known),
            _by_temperature(measured, held_out),
        )

    def _domain_speeds(
        self,
        values: _Values,
        domains: Mapping[str, Sequence[HeldSample]],
        measured: dict[str, Measured],
        known: dict[str, Measured],
    ) -> dict[str, DomainSpeeds]:
        static = {} if self.static is None else self.static.known
        found = {}
        for name, samples in domains.items():
            ours, theirs = (values.of(w, _join(x, samples)) for w, x in ((0, measured), (1, known)))
            theirs_static = values.at_best(_join(static, samples)) if static else None
            if ours is not None and theirs is not None:
                found[name] = DomainSpeeds(ours, theirs, theirs_static, len(samples))
        return found

    def promote(self, candidate: nn.Module, *, was_judged: bool = False) -> None:
        """Make the candidate, which was published, the incumbent.

        Args:
            was_judged: it is the one that was judged last, and need not be measured again.
        """
        self.incumbent.load_state_dict(candidate.state_dict())
        self._known, self._measured = self._measured if was_judged else {}, {}

    def measure(self, model: nn.Module, samples: Sequence[HeldSample]) -> dict[str, Measured]:
        """The chains of each sample with a drafter, by its key; waits for the device."""
        (found,) = _measured([self._launch(model, samples)])
        return found

    def _launch(self, model: nn.Module, samples: Sequence[HeldSample]) -> _Launched:
        """Measure the chains of each sample."""
        owners, found = [np.zeros(0, dtype=np.int64)], []
        for group in _groups(samples):
            packed = pack([piece for _, piece in group], None)
            batch = self.store.batch(packed, batch_dtype(self.store.device))
            one = self.trainable.acceptance(model, self.head, batch, GATE_DRAFT_K, block=self.block)
            columns = one.overlap_RK, one.kept_RK, one.is_full_R[:, None].float()
            found.append(torch.cat(columns, dim=1))
            owners.append(_owners(packed, [place for place, _ in group]))
            self.between()
        owner_R = torch.from_numpy(np.concatenate(owners))
        if not found:
            return _Launched(samples, torch.zeros(0, 2 * GATE_DRAFT_K + 1), owner_R, None)
        rows, arrived = _on_host(torch.cat(found))
        return _Launched(samples, rows, owner_R, arrived)


@dataclass(frozen=True, slots=True)
class Judging:
    """A comparison under way."""

    judge: Judge
    held_out: Sequence[HeldSample]
    older: Sequence[HeldSample]
    speed: SpeedTable | None
    ours: _Launched
    theirs: _Launched
    """Of the samples on which the incumbent was not measured yet; ``static`` likewise."""
    static: Sequence[_Launched]
    """Empty if it is not measured."""

    @property
    def is_ready(self) -> bool:
        """``judgement`` would not wait."""
        return all(one.is_ready for one in (self.ours, self.theirs, *self.static))

    def judgement(self) -> Judgement:
        """Its result; waits for the device."""
        return self.judge.judged(self)


def _on_host(rows: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """``rows`` on the host, once the event is over."""
    if rows.device.type != "cuda":
        return rows, None
    host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    host.copy_(rows, non_blocking=True)
    arrived.record()
    return host, arrived


def _values(speed: SpeedTable, ours: Measured, theirs: Measured) -> _Values:
    tokens = [x.overlap.tokens_by_k() for x in (ours, theirs)]
    ks = tuple(speed.best(t) if t else (1,) * len(speed.weights) for t in tokens)
    return _Values(speed, (ks[0], ks[1]))


def _groups(samples: Sequence[HeldSample]) -> Iterator[list[tuple[int, HeldPiece]]]:
    """Pieces of the samples and the samples' places, about ``_TOKENS_AT_ONCE`` positions each."""
    group: list[tuple[int, HeldPiece]] = []
    num = 0
    for place, sample in enumerate(samples):
        for piece in sample.pieces:
            if group and num + len(piece.slots) > _TOKENS_AT_ONCE:
                yield group
                group, num = [], 0
            group.append((place, piece))
            num += len(piece.slots)
    if group:
        yield group


def _owners(packed: Packed, places: Sequence[int]) -> Any:
    """The sample's place for each row with a loss."""
    return np.asarray(places, dtype=np.int64)[packed.segment_T[packed.row_R]]


def _by_domain(samples: Sequence[HeldSample]) -> dict[str, list[HeldSample]]:
    found: dict[str, list[HeldSample]] = {}
    for one in samples:
        found.setdefault(one.domain, []).append(one)
    return found


def _by_temperature(
    measured: dict[str, Measured], samples: Sequence[HeldSample]
) -> dict[int, list[float]]:
    classes: dict[int, list[HeldSample]] = {}
    for one in samples:
        classes.setdefault(class_of(one.temperature), []).append(one)
    found = {
        number: _join(measured, own).kept.acceptance()
        for number, own in sorted(classes.items())
        if len(own) >= _ENOUGH_TRACES
    }
    found = {number: acceptance for number, acceptance in found.items() if acceptance}
    return found if len(found) > 1 else {}


def _of(found: Mapping[str, Measured], samples: Sequence[HeldSample]) -> dict[str, Measured]:
    """What was found of these samples."""
    return {x.key: found[x.key] for x in samples}


def _join(found: dict[str, Measured], samples: Sequence[HeldSample]) -> Measured:
    own = [found[x.key] for x in samples]
    return Measured(
        Chains.join([one.overlap for one in own], GATE_DRAFT_K),
        Chains.join([one.kept for one in own], GATE_DRAFT_K),
    )
