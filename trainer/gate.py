"""Compare a candidate with the published version on held-out traces.

Acceptance is simulated from the hidden rows of the traces, which the store holds already; neither a
server nor the target runs, and only the result is read from the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from drafters.acceptance import conditional_acceptance
from drafters.trainable import Trainable
from policies.gate import GateVerdict, PairedTrace, gain_error, gate
from targets.head import TargetHead
from trainer.packing import HeldPiece, Packed, pack
from trainer.rows import HeldSample, RowStore
from trainer.update import batch_dtype

GATE_DRAFT_K = 4
"""K at which drafters are compared."""
_TOKENS_AT_ONCE = 8192
"""Positions of one batch of held-out samples."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """Result of comparing a candidate with the published version on the same held-out traces."""

    verdict: GateVerdict
    candidate: float | None
    """Simulated tokens_per_step at K = ``GATE_DRAFT_K``; ``None`` without held-out chains."""
    incumbent: float | None
    acceptance: list[float]
    """The candidate's conditional acceptance at each position, up to the last one measured."""
    gain_error: float | None
    """Standard error of ``candidate - incumbent``."""
    num_chains: int
    num_traces: int
    incumbent_acceptance: list[float]
    """The incumbent's on the same chains."""

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
        }


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
    _known: dict[str, Tensor] = field(default_factory=dict)
    """Sample key -> the incumbent's acceptance."""

    def judge(
        self,
        candidate: nn.Module,
        held_out: Sequence[HeldSample],
        older: Sequence[HeldSample] = (),
    ) -> Judgement:
        """Compare on the newest held-out traces; ``older`` ones guard against forgetting."""
        everything = [*held_out, *older]
        unknown = [x for x in everything if x.key not in self._known]
        known = self._known | self._measure(self.incumbent, unknown)
        self._known = {x.key: known[x.key] for x in everything}
        measured = self._measure(candidate, everything)
        ours, theirs = _join(measured, held_out), _join(self._known, held_out)
        mine, best = (self._tokens_per_step(x) for x in (ours, theirs))
        figures = (mine, best) if mine is not None and best is not None else (0.0, 0.0)
        kept = [self._tokens_per_step(_join(found, older)) for found in (measured, self._known)]
        before = (kept[0], kept[1]) if kept[0] is not None and kept[1] is not None else None
        traces = [self._paired(measured[x.key], self._known[x.key]) for x in held_out]
        verdict = gate(
            *figures,
            margin=self.margin,
            num_rows=len(ours),
            older=before,
            traces=traces,
            confidence=self.confidence,
        )
        return Judgement(
            verdict,
            mine,
            best,
            _by_position(ours),
            gain_error(traces),
            len(ours),
            len(held_out),
            _by_position(theirs),
        )

    def _paired(self, ours_NK: Tensor, theirs_NK: Tensor) -> PairedTrace:
        """Both drafters on one trace."""
        count = len(ours_NK)
        mine, best = (self._tokens_per_step(x) or 0.0 for x in (ours_NK, theirs_NK))
        return PairedTrace(count, count * mine, count * best)

    def _tokens_per_step(self, alphas_NK: Tensor) -> float | None:
        return self.trainable.tokens_per_step(alphas_NK, GATE_DRAFT_K)

    def promote(self, candidate: nn.Module) -> None:
        """Make the candidate, which was published, the incumbent."""
        self.incumbent.load_state_dict(candidate.state_dict())
        self._known = {}

    def _measure(self, model: nn.Module, samples: Sequence[HeldSample]) -> dict[str, Tensor]:
        """Acceptance [N, K] of the complete chains of each sample, by its key."""
        owners, found = [], []
        for group in _groups(samples):
            packed = pack([piece for _, piece in group], None)
            batch = self.store.batch(packed, batch_dtype(self.store.device))
            alphas_RK, is_full_R = self.trainable.acceptance(model, self.head, batch, GATE_DRAFT_K)
            found.append(torch.cat((alphas_RK, is_full_R[:, None].float()), dim=1))
            owners.append(_owners(packed, [place for place, _ in group]))
        if not found:
            return {}
        rows = torch.cat(found).cpu()  # waits for the device, once
        is_full = rows[:, -1] > 0
        owner = torch.from_numpy(np.concatenate(owners))[is_full]
        alphas = rows[is_full, :-1]
        return {x.key: alphas[owner == place] for place, x in enumerate(samples)}


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


def _by_position(alphas_NK: Tensor) -> list[float]:
    return [a for a in conditional_acceptance(alphas_NK) if a is not None]


def _join(found: dict[str, Tensor], samples: Sequence[HeldSample]) -> Tensor:
    return torch.cat((torch.zeros(0, GATE_DRAFT_K), *(found[x.key] for x in samples)))
