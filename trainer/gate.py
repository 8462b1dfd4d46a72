"""Compare a candidate with the published version on held-out traces.

Acceptance is simulated from the hidden rows of the traces; neither a server nor the target runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from drafters.acceptance import conditional_acceptance
from drafters.samples import Sample
from drafters.trainable import Trainable
from policies.gate import GateVerdict, gate
from targets.head import TargetHead
from trainer.learner import batch_dtype

GATE_DRAFT_K = 4
"""K at which drafters are compared."""
_TOKENS_AT_ONCE = 8192
"""Tokens of one batch of held-out samples."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """Result of comparing a candidate with the published version on the same held-out traces."""

    verdict: GateVerdict
    candidate: float | None
    """Simulated tokens_per_step at K = ``GATE_DRAFT_K``; ``None`` without held-out chains."""
    incumbent: float | None
    acceptance: list[float]
    """The candidate's conditional acceptance at each position, up to the last one measured."""
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
            "num_chains": self.num_chains,
            "num_traces": self.num_traces,
        }


@dataclass(slots=True)
class Judge:
    """Compares candidates with the incumbent, whose acceptance on each trace it caches."""

    trainable: Trainable[Any, Any]
    head: TargetHead
    device: torch.device
    incumbent: nn.Module
    """Model of the published version."""
    margin: float
    """Least ratio of candidate to incumbent."""
    _known: dict[str, Tensor] = field(default_factory=dict)
    """Sample key -> the incumbent's acceptance."""

    def judge(
        self, candidate: nn.Module, held_out: Sequence[Sample], older: Sequence[Sample] = ()
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
        return Judgement(
            gate(*figures, margin=self.margin, num_rows=len(ours), older=before),
            mine,
            best,
            _by_position(ours),
            len(ours),
            len(held_out),
            _by_position(theirs),
        )

    def _tokens_per_step(self, alphas_NK: Tensor) -> float | None:
        return self.trainable.tokens_per_step(alphas_NK, GATE_DRAFT_K)

    def promote(self, candidate: nn.Module) -> None:
        """Make the candidate, which was published, the incumbent."""
        self.incumbent.load_state_dict(candidate.state_dict())
        self._known = {}

    def _measure(self, model: nn.Module, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Acceptance [N, K] of the chains of each sample, by its key."""
        found = {x.key: torch.zeros(0, GATE_DRAFT_K) for x in samples}
        for group in _groups(samples):
            parts = [(x, piece) for x in group for piece in x.pieces]
            batch = self.trainable.collate(parts)
            alphas, owner = self.trainable.acceptance(
                model,
                self.head,
                batch.to(self.device, batch_dtype(self.device)),
                torch.tensor([x.temperature for x, _ in parts]),
                GATE_DRAFT_K,
            )
            alphas, owner = alphas.cpu(), owner.cpu()
            for b, (x, _) in enumerate(parts):
                found[x.key] = torch.cat((found[x.key], alphas[owner == b]))
        return found


def _groups(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Group samples of similar length, about ``_TOKENS_AT_ONCE`` tokens each."""
    groups: list[list[Sample]] = []
    room = 0
    for sample in sorted(samples, key=lambda x: len(x.token_ids_T)):
        length = sum(p.stop - p.start for p in sample.pieces)
        if not groups or length > room:
            groups.append([])
            room = _TOKENS_AT_ONCE
        groups[-1].append(sample)
        room -= length
    return groups


def _by_position(alphas_NK: Tensor) -> list[float]:
    return [a for a in conditional_acceptance(alphas_NK) if a is not None]


def _join(found: dict[str, Tensor], samples: Sequence[Sample]) -> Tensor:
    return torch.cat((torch.zeros(0, GATE_DRAFT_K), *(found[x.key] for x in samples)))
