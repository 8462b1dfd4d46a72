"""Rounds of fixed shape decode as passes put together for each step do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from policies.interface import Decision, Outcome, StepObs
from tests.engines import make_engine, random_model, request_of, run


@dataclass
class Alternating:
    """Plays a list of (drafter, K) over and over."""

    arms: list[tuple[str, int]]

    def rest(self) -> Decision | None:
        return None

    def plan(self, obs: StepObs) -> Decision:
        drafter, k = self.arms[obs.step % len(self.arms)]
        return Decision(drafter, min(k, obs.max_draft), 1.0, False, "test")

    def observe(self, outcome: Outcome) -> None: ...
    def on_swap(self, version: int, calibration: dict[str, Any]) -> None: ...
    def figures(self) -> dict[str, Any]:
        return {}


def rounds_of(arms: list[tuple[str, int]], rounds: bool, **sampling: Any) -> dict[str, Any]:
    """Every round of some requests, in order, and what the capture ring kept of them."""
    engine = make_engine(random_model("qwen3"), policy=Alternating(arms), programs=rounds)
    kept: dict[str, Any] = {}
    engine.on_finished = lambda sequence: kept.__setitem__(
        sequence.request.id,
        (
            [
                (r.anchor, r.drafter, r.draft_ids, r.num_accepted, r.next_id)
                for r in sequence.rounds
            ],
            engine.ring.take(sequence.capture_rows),
        ),
    )
    requests = [
        request_of(str(i), [5 + i, *range(3 * i, 40)], 12 + 5 * i, **sampling) for i in range(7)
    ]
    run(engine, requests)
    return kept


@pytest.mark.parametrize(
    "arms",
    [
        [("eagle3", 4)],
        [("eagle3", 8)],
        [("none", 0), ("eagle3", 3)],
        [("none", 0), ("none", 0), ("suffix", 5), ("eagle3", 1), ("eagle3", 6)],
    ],
)
@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.8}, {"temperature": 1.2, "top_p": 0.9, "top_k": 40}, {"seed": 3}],
    ids=["greedy", "sampled", "truncated", "seeded"],
)
def test_rounds_draft_what_passes_draft(arms, sampling):
    if "seed" in sampling:
        sampling = {"temperature": 1.0, **sampling}
    rounds, passes = rounds_of(arms, True, **sampling), rounds_of(arms, False, **sampling)

    assert any(draft for one, _ in passes.values() for _, _, draft, _, _ in one)
    for request_id, (expected, rows) in passes.items():
        found, found_rows = rounds[request_id]
        assert found == expected
        assert (found_rows[0] == rows[0]).all()
        assert (found_rows[1] - rows[1]).abs().max() < 2e-2 * rows[1].abs().max()
        assert found_rows[2] == rows[2] == 0
