"""The policy ``ltd`` with a size, through the whole engine: greedy text stays, no more is verified
than the budget, and traces tell which one it was."""

from __future__ import annotations

import random

import pytest

from configs.schema import PolicySettings
from oracles.engines import make_engine, random_model, request_of, run
from policies.budgets import budget_of
from policies.catalog import build_policy
from policies.logged import steps_of
from tests.policies.logs import DRAFTER, MAX_DRAFT
from tests.policies.simulated import NEURAL
from tests.policies.test_ltd_size import NUM, pair
from tests.serving.capture.test_capture import traces_of
from tests.serving.engine.test_greedy_equality import random_prompts, reference


def policy_of(random_share, k=6, share=1):
    policy = build_policy(
        PolicySettings(kind="ltd", guard=False, drafter=DRAFTER, random_share=random_share),
        {DRAFTER: NEURAL}, 0, MAX_DRAFT,
    )  # fmt: skip
    policy.on_swap(DRAFTER, 0, {"ltd": pair(k, share).to_text()})
    return policy


@pytest.mark.parametrize("overlaps", [True, False])
def test_greedy_output_stays_under_any_budget(overlaps):
    numbers, model = random.Random(3), random_model("qwen3", seed=2)
    prompts = random_prompts(numbers, 6, 96)
    lengths = [numbers.randint(4, 20) for _ in prompts]
    expected = [reference(model, p, n) for p, n in zip(prompts, lengths, strict=True)]
    asked = zip(prompts, lengths, strict=True)
    requests = [request_of(str(i), *one) for i, one in enumerate(asked)]
    engine = make_engine(model, overlaps=overlaps, policy=policy_of(0.5), max_batch=4)

    got = run(engine, requests)

    assert [got[str(i)].token_ids for i in range(len(requests))] == expected
    assert engine.figures().num_draft_tokens > 0


def test_traces_tell_the_budget_and_the_figures():
    numbers, model = random.Random(4), random_model("qwen3", seed=2)
    requests = [
        request_of(str(i), prompt, 16) for i, prompt in enumerate(random_prompts(numbers, 3, 96))
    ]
    engine = make_engine(model, policy=policy_of(0.0), max_batch=3)

    traces, _ = traces_of(engine, requests)

    drafted = [step for step in steps_of(traces.values()) if step.draft_k]
    assert any(step.may_cut for step in drafted)
    for step in drafted:
        assert step.has_figures and step.policy == "ltd"
        budget = budget_of(1, NUM, step.batch, step.draft_k)
        if budget == step.batch * step.draft_k:  # of a single token
            assert not step.may_cut and not step.notes
            continue
        ((name, each),) = step.notes
        assert step.may_cut and name == "ltd.budget_each"
        assert round(each * step.batch) == budget
        assert sum(row.num_verified for row in step.rows) <= budget
