"""A batch that is kept full: another request begins when one ends."""

from __future__ import annotations

from itertools import islice

from benchmarks.harness.loops import Feed, greedy_requests
from benchmarks.real import full_batch
from benchmarks.real.full_batch import UNHELD, measure
from benchmarks.real.speculation import OFF, POLICY
from oracles.engines import RandomPolicy, make_engine, random_model
from tests.benchmarks.built import built_over

PROMPTS = [(5, 6, 7), (8, 9), (3,)]


def test_another_request_begins_as_soon_as_one_ends():
    engine = make_engine(random_model("qwen3"), policy=RandomPolicy(), prefix_cache=False)
    feed = Feed(engine, greedy_requests(PROMPTS, 4, 8), 4)
    windows = [feed.run(0.2)]
    while feed.num_tokens <= 4 * 8:  # what the first four have
        windows.append(feed.run(0.2))

    assert engine.inbox.num_inflight() == 4
    assert sum(window.num_tokens for window in windows) == feed.num_tokens
    assert any(window.num_steps > 0 for window in windows)
    feed.stop()

    assert engine.inbox.num_inflight() == 0


def test_a_batch_drains_when_there_are_no_more_requests():
    engine = make_engine(random_model("qwen3"), policy=RandomPolicy(), prefix_cache=False)
    feed = Feed(engine, islice(greedy_requests(PROMPTS, 2, 8), 5), 2)

    feed.finish()
    assert (feed.num_finished, feed.num_tokens) == (2, 4 + 8)

    feed = Feed(engine, islice(greedy_requests(PROMPTS, 2, 8), 5), 2)
    feed.run(60.0)
    assert (feed.num_finished, feed.num_tokens) == (5, 4 + 4 * 8)


def test_every_arm_has_its_turns_and_each_engine_its_policy_back(monkeypatch):
    monkeypatch.setattr(full_batch, "WARM_S", 0.05)
    built, unheld = built_over(RandomPolicy()), built_over(RandomPolicy())
    names = [OFF, "eagle3-k2", POLICY, POLICY + UNHELD]

    arms = measure(built, unheld, PROMPTS, 2, 8, turns=2, window_s=0.2, names=names)

    rows = {name: arm.row() for name, arm in arms.items()}
    assert [row["turns"] for row in rows.values()] == [2, 2, 2, 2]
    assert set(rows[OFF]["steps"]) == {"none-k0"}
    assert rows[OFF]["tokens_per_step_of_the_batch"] <= 2
    assert rows["eagle3-k2"]["steps"]["eagle3-k2"] > 0
    assert [arm.built for arm in arms.values()] == [built, built, built, unheld]
    assert all(one.policy.playing is one.policy.own for one in (built, unheld))
