"""Rounds draft and capture the same whether they overlap or not, by kernels as by definitions."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import serving.engine.drafts
import serving.engine.rounds
from oracles.engines import make_engine, random_model, request_of, run
from policies.interface import Decision, Outcome, StepObs
from serving.capture.rounds import round_columns
from serving.engine.drafter_rows import DrafterRows
from serving.engine.loop import Engine, Listeners
from specops import best_ids_triton, lanes_triton


@dataclass
class Alternating:
    """Plays a list of (drafter, K) over and over."""

    arms: list[tuple[str, int]]
    wants_profile = False

    def rest(self) -> Decision | None:
        return None

    def wants_matches(self) -> bool:
        return True

    def plan(self, obs: StepObs) -> Decision:
        drafter, k = self.arms[obs.step % len(self.arms)]
        return Decision(drafter, min(k, obs.max_draft), 1.0, False, "test")

    def observe(self, outcome: Outcome) -> None: ...
    def calibrate(self, samples: Any) -> None: ...
    def on_swap(self, drafter: str, version: int, calibration: dict[str, Any]) -> None: ...
    def figures(self) -> dict[str, Any]:
        return {}


def rounds_of(
    arms: list[tuple[str, int]], overlaps: bool, num_requests: int = 7, **sampling: Any
) -> dict[str, Any]:
    """Every round of some requests, in order, and what the capture ring kept of them."""
    # A lane for each: a request that waits for one would begin one step later behind a round that
    # is read late, and meet other arms.
    engine = make_engine(
        random_model("qwen3"), policy=Alternating(arms), overlaps=overlaps, max_batch=8
    )
    kept: dict[str, Any] = {}

    def keep(sequence):
        rounds = [
            (r.anchor, r.drafter, r.draft_ids, r.num_accepted, r.next_id)
            for r in round_columns(sequence.rounds)
        ]
        rows = engine.programs.ring.read(sequence.capture_rows)
        kept[sequence.request.id] = rounds, rows

    engine = Engine(engine.parts, engine.policy, Listeners(on_finished=keep))
    requests = [
        request_of(str(i), [5 + i, *range(3 * i, 40)], 12 + 5 * i, **sampling)
        for i in range(num_requests)
    ]
    run(engine, requests)
    return kept


MIXED = [("none", 0), ("none", 0), ("suffix", 5), ("eagle3", 1), ("eagle3", 6)]
ARMS = [
    [("eagle3", 4)],
    [("eagle3", 8)],
    [("none", 0), ("eagle3", 3)],
    MIXED,
    [("none", 0)] * 20 + [("eagle3", 4)] * 3,  # more to catch up on than one block holds
]
SAMPLINGS = {
    "greedy": {},
    "sampled": {"temperature": 0.8},
    "seeded": {"temperature": 1.0, "seed": 3},
    "truncated": {"temperature": 1.2, "top_p": 0.9, "top_k": 40},
}


@pytest.mark.parametrize(
    ("sampling", "arms"),
    # A truncation changes laws, not the order of anything: once is enough.
    [*itertools.product(("greedy", "sampled", "seeded"), ARMS), ("truncated", MIXED)],
)
def test_rounds_that_overlap_draft_what_others_draft(sampling, arms):
    sampling = SAMPLINGS[sampling]
    ahead, waiting = rounds_of(arms, True, **sampling), rounds_of(arms, False, **sampling)

    assert any(draft for one, _ in waiting.values() for _, _, draft, _, _ in one)
    for request_id, (expected, rows) in waiting.items():
        found, found_rows = ahead[request_id]
        assert found == expected
        (held, lost), (held_there, lost_there) = rows, found_rows
        assert (held_there.positions == held.positions).all()
        here, there = (
            torch.from_numpy(x.rows).view(torch.bfloat16).float() for x in (held, held_there)
        )
        assert (there - here).abs().max() < 2e-2 * here.abs().max()
        assert lost == lost_there == 0


def test_a_prompt_leaves_the_drafter_warm(monkeypatch):
    """Its last program computes the drafter's row of the first token: nothing is caught up on."""
    caught_up = []
    monkeypatch.setattr(DrafterRows, "_launch", lambda _self, blocks: caught_up.append(blocks))

    kept = rounds_of([("eagle3", 4)], overlaps=True)

    assert caught_up == []
    assert all(rounds[0][1] == "eagle3" for rounds, _ in kept.values())


@pytest.mark.interpreted
def test_the_kernels_sample_and_verify_in_rounds_as_their_definitions_do(monkeypatch):
    """What a GPU runs, in Triton's interpreter: they read the lanes' fields as they lie."""
    from specops import draft_sampling_triton, verify_logits_triton

    arms, sampling = [("eagle3", 3), ("suffix", 2)], {"temperature": 0.9, "top_p": 0.95}
    expected = rounds_of(arms, True, 2, **sampling)
    calls = []

    def verify(*arguments):
        calls.append(arguments)
        return verify_logits_triton.verify_logits(*arguments, with_logprobs=False)

    monkeypatch.setattr(serving.engine.drafts, "sample_draft", draft_sampling_triton.sample_draft)
    monkeypatch.setattr(serving.engine.rounds, "verify_logits", verify)
    found = rounds_of(arms, True, 2, **sampling)

    assert calls
    assert {k: one for k, (one, _) in found.items()} == {k: one for k, (one, _) in expected.items()}


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.9}, {"temperature": 1.0, "seed": 3}], ids=str
)
@pytest.mark.interpreted
def test_the_kernels_open_and_close_rounds_as_their_definitions_do(monkeypatch, sampling):
    """Greedy rounds also choose by kernel; some rounds have a lane that is nobody's."""
    arms = [("eagle3", 3), ("suffix", 2), ("none", 0)]
    expected = rounds_of(arms, True, 3, **sampling)
    calls = Counter()

    def counted(function):
        def call(*arguments, **options):
            calls[function.__name__] += 1
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(serving.engine.rounds, "open_round", counted(lanes_triton.open_round))
    monkeypatch.setattr(serving.engine.rounds, "close_round", counted(lanes_triton.close_round))
    for module in (serving.engine.rounds, serving.engine.drafts):
        monkeypatch.setattr(module, "best_ids", counted(best_ids_triton.best_ids))
    found = rounds_of(arms, True, 3, **sampling)

    assert calls["open_round"] == calls["close_round"] > 10
    assert bool(calls["best_ids"]) == (not sampling)
    for request_id, (one, rows) in expected.items():
        assert found[request_id][0] == one
        assert (found[request_id][1][0].rows == rows[0].rows).all()
