"""What requests keep of their rounds is numbers: the garbage collector, which visits every object
that could refer to another, finds next to nothing of it, however long the answers are."""

from __future__ import annotations

import gc

import pytest
import torch

from oracles.engines import make_engine, random_model, request_of
from policies.fixed import FixedPolicy

BATCH, STEPS = 4, 40


def num_visited() -> int:
    """Objects that a collection visits, from the second one on: it leaves alone what turns out to
    refer to numbers only."""
    gc.collect()
    return len(gc.get_objects())


@torch.inference_mode()
@pytest.mark.parametrize("draft_k", [0, 3])
def test_no_object_is_kept_of_a_round(draft_k):
    policy = FixedPolicy("eagle3" if draft_k else "none", draft_k)
    engine = make_engine(random_model("qwen3"), policy=policy)
    for number in range(BATCH):
        request = request_of(f"{number}", [3 + number, 4, 5], 240, temperature=0.8)
        engine.inbox.submit(request, lambda output: None)
    for _ in range(12):  # prompts, and whatever is made when it is first wanted
        engine.step()
    before, tokens = num_visited(), engine.figures().generation_tokens
    for _ in range(STEPS):
        engine.step()
    kept = num_visited() - before

    assert engine.scheduler.num_running == BATCH
    assert engine.figures().generation_tokens - tokens >= BATCH * (STEPS - 1)
    assert kept < STEPS / 4
