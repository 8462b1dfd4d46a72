"""What the profile of a start measures."""

from __future__ import annotations

import pytest

from oracles.engines import make_engine, random_model
from serving.profile import Script, profile_steps


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_every_time_is_of_a_step_of_the_whole_batch(monkeypatch, prefix_cache):
    """Rounds beside prompts that are still computed are smaller, and count for nothing."""
    batch_of: dict[float, int] = {}
    observe = Script.observe

    def noted(self, outcome):
        batch_of[outcome.step_s] = outcome.batch
        observe(self, outcome)

    monkeypatch.setattr(Script, "observe", noted)
    engine = make_engine(
        random_model("qwen3"),
        prefill_chunk=8,
        suffix=False,
        prefix_cache=prefix_cache,
        overlaps=False,  # as on a CPU; rounds beside prompts are not timed where they overlap
    )

    samples = profile_steps(engine.parts, repeats=3, context=16)

    assert {one.batch for one in samples} == {1, 5}
    for one in samples:  # of three times, the median is one of them
        assert batch_of[one.step_s] == one.batch, one
    pool = engine.scheduler.pool
    assert pool.num_available == pool.num_usable, "a request of the profile kept pages"
