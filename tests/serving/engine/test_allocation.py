"""Drafts that the device cuts request by request, through the whole engine: greedy text stays,
sampled text follows the target, packed rows compute the same, traces say what was decided."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import pytest

import serving.engine.allocating
import serving.engine.drafts
from buffer.codec import decode_trace, encode_trace
from oracles.engines import RandomPolicy, make_engine, random_model, request_of, run
from oracles.joint_law import chi_squared_excess
from policies.allocation import Allocation, Cut, Score
from policies.interface import Decision, StepObs
from serving.engine.allocating import Allocator
from serving.engine.drafter_rows import DrafterRows
from serving.engine.loop import Engine, Listeners
from specops.allocation import TOP
from specops.verify_logits import Rule
from tests.serving.capture.test_capture import hidden_rows, restored, traces_of
from tests.serving.engine.test_greedy_equality import random_prompts, reference, scramble
from tests.serving.engine.test_sampled_law import (
    LENGTH,
    PROMPT,
    SHAPES,
    counted,
    drafter_for,
    expected_law,
    soft_target,
)
from tests.specops.test_allocation import random_head


@dataclass
class RandomCuts(RandomPolicy):
    """Any drafter, any K, and any cut."""

    numbers: random.Random = field(default_factory=lambda: random.Random(0))
    scores: tuple[Score, ...] = ("top", "entropy", "margin", "head")
    head = random_head()

    def plan(self, obs: StepObs) -> Decision:
        numbers = self.numbers
        each = numbers.choice((None, 0.0, 0.4, 1.0, 2.5, 9.0))
        allocation = Allocation(
            Cut(numbers.choice(self.scores), numbers.random() < 0.5),
            numbers.choice((0.0, 0.05, 0.3, 0.8)), each, head=self.head,
        )  # fmt: skip
        return replace(super().plan(obs), allocation=allocation)


@dataclass
class OneCut(RandomPolicy):
    """The same K and cut in every step."""

    allocation: Allocation | None = None
    draft_k: int = 3

    def wants_matches(self) -> bool:
        return False

    def plan(self, obs: StepObs) -> Decision:
        k = min(self.draft_k, obs.max_draft)
        drafter = obs.drafters[0] if k else "none"
        return Decision(drafter, k, 0.5, False, "cut", "cut", self.allocation)


@pytest.mark.parametrize(
    ("architecture", "seed", "overlaps"), [("qwen3", 0, True), ("gemma3", 1, False)]
)
def test_greedy_output_equals_generate_whatever_is_cut(architecture, seed, overlaps):
    """Requests have caps of their own and end in the middle of drafts; weights are swapped."""
    numbers, model = random.Random(seed), random_model(architecture, seed=seed)
    prompts = random_prompts(numbers, 7, 96)
    lengths = [numbers.randint(1, 24) for _ in prompts]
    expected = [reference(model, p, n) for p, n in zip(prompts, lengths, strict=True)]
    requests = [
        request_of(str(i), p, n, max_draft=numbers.choice((None, None, None, 0, 1, 3)))
        for i, (p, n) in enumerate(zip(prompts, lengths, strict=True))
    ]
    engine = make_engine(model, overlaps=overlaps, policy=RandomCuts(), max_batch=4)

    got = run(engine, requests, scramble)

    for request, answer in zip(requests, expected, strict=True):
        assert got[request.id].token_ids == answer, f"request {request.id}"


def sampled(allocation, *, rule=Rule.BLOCK, regime="opposed", num_samples=1200, overlaps=False):
    model, shape = soft_target(regime), SHAPES["whole"]
    law = expected_law(soft_target(regime), shape)
    engine = make_engine(
        model, drafter=drafter_for(model, regime), max_batch=256, num_pages=1200,
        prefill_chunk=1024, ring_rows=8192, max_draft=3, suffix=False, rule=rule,
        overlaps=overlaps, policy=OneCut(allocation=allocation),
    )  # fmt: skip
    requests = [
        request_of(str(i), PROMPT, LENGTH + 1, capture=False, **shape) for i in range(num_samples)
    ]
    counts = counted(run(engine, requests))
    figures = engine.figures()
    return counts, law, figures.num_draft_tokens / figures.num_rounds


@pytest.mark.parametrize(
    ("allocation", "rule", "overlaps"),
    [
        (Allocation(Cut("top", False), 0.2), Rule.STANDARD, False),
        (Allocation(Cut("top", True), 0.0, budget_each=1.2), Rule.BLOCK, True),
    ],
)
def test_sampled_text_follows_the_target_when_drafts_are_cut(allocation, rule, overlaps):
    counts, law, mean_length = sampled(allocation, rule=rule, overlaps=overlaps)

    assert mean_length < 2.6, "nothing was cut"
    assert chi_squared_excess(counts, law) < 1


def test_a_planted_policy_that_looks_at_the_drawn_token_fails(monkeypatch):
    right = DrafterRows.draft

    def cheating(self, *arguments, **options):
        drafts = right(self, *arguments, **options)
        if drafts.figures_RK3 is None or drafts.logq_RK is None:
            return drafts
        figures = drafts.figures_RK3.clone()
        figures[..., TOP] = drafts.logq_RK.exp()
        return replace(drafts, figures_RK3=figures)

    monkeypatch.setattr(DrafterRows, "draft", cheating)

    counts, law, _ = sampled(Allocation(Cut("top", False), 0.2))

    assert chi_squared_excess(counts, law) > 1


def test_packed_rows_compute_what_whole_rounds_compute(monkeypatch):
    """The same numbers and drafts, once with all rows and once without those that were cut."""
    model = random_model("qwen3")
    requests = [
        request_of(str(i), [3 + i, *range(i, 12)], 20, temperature=0.8, max_draft=(None, 2)[i % 2])
        for i in range(5)
    ]
    policy = {"max_batch": 5, "suffix": False}

    def decoded():
        engine = make_engine(model, policy=RandomCuts(scores=("top", "entropy")), **policy)
        return {name: one.token_ids for name, one in run(engine, requests).items()}

    packed = decoded()
    capacities = []

    def all_rows(self, size, num_draft, budget):
        capacities.append((budget, size * num_draft))
        return [size * num_draft]

    monkeypatch.setattr(Allocator, "_capacities", all_rows)

    assert decoded() == packed
    assert any(budget < most for budget, most in capacities), "nothing was packed"


@pytest.mark.interpreted
def test_the_kernels_cut_in_rounds_as_their_definitions_do(monkeypatch):
    """What a GPU runs, in Triton's interpreter, with padding and packed rows."""
    from specops import allocation_triton

    model = random_model("qwen3")
    requests = [
        request_of(str(i), [3 + i, *range(i, 9)], 9, temperature=0.8, max_draft=(None, 2)[i % 2])
        for i in range(3)
    ]

    def traced():
        engine = make_engine(model, policy=RandomCuts(), max_batch=4, suffix=False)
        traces, _ = traces_of(engine, requests)
        decided, figures = {}, []
        for name, trace in sorted(traces.items()):
            lengths = [(one.considered and one.considered.length) for one in trace.rounds]
            drafts = [one.draft_ids for one in trace.rounds]
            decided[name] = trace.token_ids.tolist(), lengths, drafts
            figures.extend(trace.rounds.confidence.tolist())
        return decided, figures

    (expected, figures), names = traced(), []

    def noted(kernel):
        def call(*arguments, **options):
            names.append(kernel.__name__)
            return kernel(*arguments, **options)

        return call

    kernels = allocation_triton
    monkeypatch.setattr(serving.engine.drafts, "confidence", noted(kernels.confidence))
    monkeypatch.setattr(serving.engine.allocating, "cut_drafts", noted(kernels.cut_drafts))
    monkeypatch.setattr(serving.engine.allocating, "pack_rows", noted(kernels.pack_rows))
    found, found_figures = traced()

    assert found == expected
    assert found_figures == pytest.approx(figures, rel=1e-5, abs=1e-6) and figures
    assert {"confidence", "cut_drafts", "pack_rows"} == set(names)


def test_captured_rows_are_those_of_whole_rounds():
    model = random_model("qwen3")
    engine = make_engine(model, policy=RandomCuts(), prefix_cache=False, max_batch=3)
    requests = [request_of(str(i), [*range(i, 20)], 20, temperature=0.9) for i in range(5)]

    traces, lost = traces_of(engine, requests)

    assert lost == 0
    for trace in traces.values():
        tokens = trace.token_ids.tolist()
        want = hidden_rows(model, tokens, trace.features.layer_ids)[:-1]
        assert trace.features.positions.tolist() == list(range(len(tokens) - 1))
        scale = want.abs().amax(-1, keepdim=True)
        assert ((restored(trace.features) - want).abs() / scale).max() < 2**-8


def test_requests_with_log_probabilities_are_not_cut():
    model = random_model("qwen3")
    policy = OneCut(allocation=Allocation(Cut("top", False), 1.0))
    engine = make_engine(model, policy=policy, suffix=False)
    requests = [request_of("0", [1, 2, 3], 12, logprobs=2), request_of("1", [4, 5, 6], 12)]

    got = run(engine, requests)

    assert len(got["0"].logprobs) == 12
    assert engine.figures().num_draft_tokens > 0


def test_traces_keep_what_was_considered_and_decided():
    model = random_model("qwen3")
    allocation = Allocation(Cut("top", False), 0.3)
    engine = make_engine(model, policy=OneCut(allocation=allocation, draft_k=4), suffix=False)
    requests = [request_of(str(i), [5 + i, *range(i, 15)], 24, max_draft=None) for i in range(3)]

    traces, _ = traces_of(engine, requests)

    cut = 0
    for trace in traces.values():
        rounds = tuple(decode_trace(encode_trace(trace)).rounds)
        drafted = [one for one in rounds if one.considered is not None]
        assert len(drafted) >= len(rounds) - 1, "at the last token nothing is drafted"
        for one in drafted:
            considered = one.considered
            assert considered.may_cut and considered.length <= 4
            tops = considered.confidence[::3]
            length = next((k for k, top in enumerate(tops) if top < 0.3), len(tops))
            assert len(one.draft_ids) == length
            assert (one.policy, one.propensity) == ("cut", 0.5)
            cut += length < considered.length
    assert cut > 0


def test_outcomes_of_cut_steps_tell_the_lengths_after_the_cut():
    model = random_model("qwen3")
    outcomes = []
    allocation = Allocation(Cut("top", True), 0.0, budget_each=1.0)
    engine = make_engine(model, policy=OneCut(allocation=allocation), suffix=False)
    engine = Engine(engine.parts, engine.policy, Listeners(on_outcome=outcomes.append))

    run(engine, [request_of(str(i), [5 + i, *range(i, 15)], 24) for i in range(4)])

    drafted = [one for one in outcomes if one.decision.draft_k]
    assert drafted
    for one in drafted:
        assert sum(one.rows.num_verified) <= one.batch
        assert all(
            a <= v for a, v in zip(one.rows.num_accepted, one.rows.num_verified, strict=True)
        )
