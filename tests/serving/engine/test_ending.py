"""Drafts that end while they are made, through the whole engine: greedy text stays, sampled text
follows the target, passes are left out, traces say what was decided."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from buffer.codec import decode_trace, encode_trace
from buffer.records import Consideration
from oracles.engines import RandomPolicy, make_engine, random_model, request_of, run
from oracles.joint_law import chi_squared_excess
from policies.ending import NUM_SURVIVALS, Ending
from policies.interface import Decision, StepObs
from policies.logged import Continuations, LoggedRow
from serving.engine.ending import EndingDraft
from serving.engine.loop import Engine, Listeners
from specops.verify_logits import Rule
from tests.serving.capture.test_capture import traces_of
from tests.serving.engine.test_greedy_equality import random_prompts, reference, scramble
from tests.serving.engine.test_sampled_law import (
    LENGTH,
    PROMPT,
    SHAPES,
    V,
    drafter_for,
    expected_law,
    soft_target,
)


def ending(numbers, num_draft, share=0.6, grace=0):
    """Tables that answer at random, as the confidence and the survival say."""
    edges = tuple(sorted(numbers.random() for _ in range(5)))

    def table():
        return tuple(
            tuple(tuple(numbers.random() < share for _ in range(6)) for _ in range(NUM_SURVIVALS))
            for _ in range(num_draft)
        )

    hazards = tuple(tuple(numbers.random() for _ in range(6)) for _ in range(num_draft))
    return Ending(edges, hazards, table(), table(), grace)


@dataclass
class RandomEndings(RandomPolicy):
    """Any drafter, any K, and any way to end."""

    numbers: random.Random = field(default_factory=lambda: random.Random(0))

    def plan(self, obs: StepObs) -> Decision:
        numbers = self.numbers
        one = ending(
            numbers, obs.max_draft, numbers.choice((0.0, 0.5, 0.9)), numbers.choice((0, 1))
        )
        return replace(super().plan(obs), ending=one)


@dataclass
class OneEnding(RandomPolicy):
    """The same K and way to end in every step."""

    ending: Ending | None = None
    draft_k: int = 3

    def wants_matches(self) -> bool:
        return False

    def plan(self, obs: StepObs) -> Decision:
        k = min(self.draft_k, obs.max_draft)
        drafter = obs.drafters[0] if k else "none"
        return Decision(drafter, k, 0.5, False, "end", "end", ending=self.ending if k else None)


@pytest.mark.parametrize(
    ("architecture", "seed", "overlaps"), [("qwen3", 0, True), ("gemma3", 1, False)]
)
def test_greedy_output_equals_generate_wherever_drafts_end(architecture, seed, overlaps):
    """Requests have caps of their own and end in the middle of drafts; weights are swapped."""
    numbers, model = random.Random(seed), random_model(architecture, seed=seed)
    prompts = random_prompts(numbers, 7, 96)
    amounts = [numbers.randint(1, 24) for _ in prompts]
    expected = [reference(model, p, n) for p, n in zip(prompts, amounts, strict=True)]
    requests = [
        request_of(str(i), p, n, max_draft=numbers.choice((None, None, None, 0, 1, 3)))
        for i, (p, n) in enumerate(zip(prompts, amounts, strict=True))
    ]
    engine = make_engine(model, overlaps=overlaps, policy=RandomEndings(), max_batch=4)

    got = run(engine, requests, scramble)

    for request, answer in zip(requests, expected, strict=True):
        assert got[request.id].token_ids == answer, f"request {request.id}"


def above(threshold, num_draft=3):
    """Ends a draft before the first position whose likeliest token has less."""
    rows = ((False, True),) * NUM_SURVIVALS
    whole = ((True, True),) * NUM_SURVIVALS
    return Ending(
        (threshold,), ((0.5, 0.5),) * num_draft, (rows,) * num_draft, (whole,) * num_draft
    )


def sampled(one, *, rule=Rule.BLOCK, regime="opposed", num_samples=400, batch=2):
    model, shape = soft_target(regime), SHAPES["whole"]
    law = expected_law(soft_target(regime), shape)
    engine = make_engine(
        model, drafter=drafter_for(model, regime), max_batch=batch, num_pages=1200,
        prefill_chunk=1024, ring_rows=8192, max_draft=3, suffix=False, rule=rule,
        policy=OneEnding(ending=one),
    )  # fmt: skip
    requests = [
        request_of(str(i), PROMPT, LENGTH + 1, capture=False, **shape) for i in range(num_samples)
    ]
    counts = torch.zeros(V, V, V, dtype=torch.float64)
    for found in run(engine, requests).values():
        counts[tuple(found.token_ids[:LENGTH])] += 1
    figures = engine.figures()
    return counts, law, figures.num_draft_tokens / figures.num_rounds


@pytest.mark.parametrize(("rule", "batch"), [(Rule.STANDARD, 1), (Rule.BLOCK, 2)])
def test_sampled_text_follows_the_target_where_drafts_end(rule, batch):
    counts, law, mean_length = sampled(above(0.4), rule=rule, batch=batch)

    assert mean_length < 2.0, "nothing was ended"
    assert chi_squared_excess(counts, law) < 1


class Cheating(EndingDraft):
    """Draws first, and leaves out tokens that it finds unlikely."""

    def __call__(self, logits, number):
        tokens = self._choose(logits, number)
        is_liked = self._choose._drawn[-1].logq_R.exp().max() >= 0.4
        self._is_over = not is_liked or number + 1 >= max(self._lens)
        if is_liked:
            self.length = number + 1
        else:
            del self._choose._drawn[-1], self._choose._kept[-1]
        return tokens


def test_a_planted_rule_that_looks_at_the_drawn_token_fails(monkeypatch):
    monkeypatch.setattr("serving.engine.drafts.EndingDraft", Cheating)

    counts, law, _ = sampled(above(0.4), rule=Rule.STANDARD, batch=1)

    assert chi_squared_excess(counts, law) > 1


LEVEL = 0.17
"""About as often above as below, for a random drafter."""


def test_passes_behind_the_end_are_left_out(monkeypatch):
    model = random_model("qwen3")
    engine = make_engine(
        model, policy=OneEnding(ending=above(LEVEL, 6), draft_k=6), suffix=False, max_draft=6
    )
    (rows,) = engine.drafting.neural.values()
    right, passes, outcomes = rows.drafter._pass, [], []

    def counted(ids, hidden, *rest):
        passes.append(len(ids))
        return right(ids, hidden, *rest)

    monkeypatch.setattr(rows.drafter, "_pass", counted)
    engine = Engine(engine.parts, engine.policy, Listeners(on_outcome=outcomes.append))
    run(engine, [request_of("0", [*range(3, 15)], 40, capture=False)])

    drafted = [one for one in outcomes if one.decision.draft_k]
    lengths_seen = [(one.rows.num_verified[0], len(one.rows.tops[0])) for one in drafted]
    assert {verified for verified, _ in lengths_seen} > {0, 1}, "all drafts end alike"
    # A pass for each position but the first, and one for the rows of each round.
    in_rounds = sum(max(seen - 1, 0) for _, seen in lengths_seen)
    assert passes.count(1) >= in_rounds
    assert sum(one.decision.draft_k - 1 for one in drafted) > passes.count(1)
    for verified, seen in lengths_seen:
        assert seen - 1 <= verified <= seen


def test_requests_with_log_probabilities_are_not_ended():
    model = random_model("qwen3")
    engine = make_engine(model, policy=OneEnding(ending=above(1.1)), suffix=False)
    requests = [request_of("0", [1, 2, 3], 12, logprobs=2), request_of("1", [4, 5, 6], 12)]

    got = run(engine, requests)

    assert len(got["0"].logprobs) == 12
    assert engine.figures().num_draft_tokens > 0


def test_traces_keep_what_the_end_was_decided_by():
    model = random_model("qwen3")
    policy = OneEnding(ending=above(LEVEL, 4), draft_k=4)
    engine = make_engine(model, policy=policy, suffix=False, max_draft=4, max_batch=1)
    requests = [request_of(str(i), [5 + i, *range(i, 15)], 24) for i in range(3)]

    traces, _ = traces_of(engine, requests)

    num_ended = 0
    for trace in traces.values():
        rounds = tuple(decode_trace(encode_trace(trace)).rounds)
        drafted = [one for one in rounds if one.considered is not None]
        assert len(drafted) >= len(rounds) - 1, "at the last token nothing is drafted"
        for one in drafted:
            considered = one.considered
            assert considered.may_cut and considered.length <= 4
            tops = considered.confidence[::3]
            length = next((k for k, top in enumerate(tops) if top < LEVEL), len(tops))
            assert len(one.draft_ids) == length
            assert all(tops[: length + 1]) and not any(tops[length + 1 :])
            num_ended += length < considered.length
    assert num_ended > 0


def test_a_draft_that_ended_could_have_been_as_long_as_planned():
    """What was not drafted is expected by what is known: neither impossible, nor of no
    confidence."""
    figures = (0.9, 1.0, 0.8, 0.1, 4.0, 0.05, *[0.0] * 6)
    row = LoggedRow(1, 1, Consideration(may_cut=True, confidence=figures))
    assert row.longest(4) is None

    hazards = np.array((0.8, 0.7, 0.6, 0.5))
    beyond = Continuations(hazards, np.array((0.5,)), np.array((0.2, 0.9)))

    assert beyond.of_row(row) == pytest.approx([0, 0, 0.2, 0.2 + 0.2 * 0.6, 0.2 + 0.12 + 0.06])
