"""Is the candidate better than what is published, on traces neither was trained on?

Simulated, from the traces' own hidden rows: no server and no target is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from drafters.acceptance import conditional_acceptance, simulated_tokens_per_step
from drafters.eagle3.model import Eagle3
from drafters.eagle3.training import chain_acceptance
from policies.gate import GateVerdict, gate
from targets.head import TargetHead
from trainer.dataset import Sample, collate
from trainer.learner import batch_dtype

GATE_DRAFT_K = 4
"""K at which drafters are compared."""
_TOKENS_AT_ONCE = 8192


@dataclass(frozen=True, slots=True)
class Judgement:
    """A candidate held against the last published version on the same held-out traces."""

    verdict: GateVerdict
    candidate: float | None
    """Simulated tokens_per_step at K = ``GATE_DRAFT_K``; ``None`` without held-out chains."""
    incumbent: float | None
    acceptance: list[float]
    """The candidate's conditional acceptance of each position, up to the last that is known."""
    num_chains: int
    num_traces: int

    def to_json(self) -> dict[str, Any]:
        """What a manifest and the log say of it."""
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
    """Compares models; remembers what the incumbent scored on each trace."""

    head: TargetHead
    device: torch.device
    incumbent: Eagle3
    margin: float
    _known: dict[str, Tensor] = field(default_factory=dict)

    def judge(
        self, candidate: Eagle3, held_out: Sequence[Sample], older: Sequence[Sample] = ()
    ) -> Judgement:
        """Both models on the newest held-out traces, and on ``older`` ones that must not suffer."""
        everything = [*held_out, *older]
        news = [x for x in everything if x.key not in self._known]
        known = self._known | self._measure(self.incumbent, news)
        self._known = {x.key: known[x.key] for x in everything}
        measured = self._measure(candidate, everything)
        ours, theirs = _join(measured, held_out), _join(self._known, held_out)
        mine, best = (simulated_tokens_per_step(x, GATE_DRAFT_K) for x in (ours, theirs))
        figures = (mine, best) if mine is not None and best is not None else (0.0, 0.0)
        kept = [
            simulated_tokens_per_step(_join(found, older), GATE_DRAFT_K)
            for found in (measured, self._known)
        ]
        before = (kept[0], kept[1]) if kept[0] is not None and kept[1] is not None else None
        return Judgement(
            gate(*figures, margin=self.margin, num_rows=len(ours), older=before),
            mine,
            best,
            [a for a in conditional_acceptance(ours) if a is not None],
            len(ours),
            len(held_out),
        )

    def promote(self, candidate: Eagle3) -> None:
        """The candidate was published: it is the one to beat now."""
        self.incumbent.load_state_dict(candidate.state_dict())
        self._known = {}

    def _measure(self, model: Eagle3, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Sample key -> acceptance [N, K] of its chains."""
        found = {x.key: torch.zeros(0, GATE_DRAFT_K) for x in samples}
        for group in _groups(samples):
            parts = [(x, piece) for x in group for piece in x.pieces]
            alphas, owner = chain_acceptance(
                model,
                self.head.embed_VH,
                self.head.lm_head,
                collate(parts).to(self.device, batch_dtype(self.device)),
                torch.tensor([x.temperature for x, _ in parts]),
                GATE_DRAFT_K,
            )
            alphas, owner = alphas.cpu(), owner.cpu()
            for b, (x, _) in enumerate(parts):
                found[x.key] = torch.cat((found[x.key], alphas[owner == b]))
        return found


def _groups(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Samples of like length together, some thousand tokens at once."""
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


def _join(found: dict[str, Tensor], samples: Sequence[Sample]) -> Tensor:
    return torch.cat((torch.zeros(0, GATE_DRAFT_K), *(found[x.key] for x in samples)))
