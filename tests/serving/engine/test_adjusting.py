"""Rounds change logits by biases and penalties themselves, and what comes out is the book's.

Answers by the book are decoded by one full pass for each token. Here rounds are launched before the
last one was read, K and drafter change with every step, and lanes change hands.
"""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import pytest
import torch

import serving.engine.lanes
import serving.engine.prefill
import serving.engine.rounds
from oracles.engines import random_model, request_of, run
from oracles.plain_reference import decode
from oracles.random_requests import every_shape, exact_engine, twice
from serving.engine.lanes import Lanes, table_bytes_of
from specops import lane_penalties, lane_penalties_triton
from specops.lane_penalties import LaneTables
from targets.target import Target

V = 288


@pytest.fixture(scope="module")
def model():
    return random_model("qwen3", vocab_size=V).double()


@pytest.fixture(scope="module")
def by_the_book(model):
    """Requests of every shape and different lengths, and their answers. The prompts of a third are
    in the prefix cache but for one token, so that they begin in a round."""
    requests = [
        replace(
            r,
            prompt_ids=(*r.prompt_ids, *range(int(r.id) % 3)),
            sampling=replace(r.sampling, max_tokens=6 + 5 * (int(r.id) % 4)),
        )
        for r in every_shape()
    ]
    return [(r, decode(model, r)) for r in requests]


def wrong_answers(model, by_the_book, max_batch=4, between=lambda _engine, _step: None, **options):
    """Requests that are answered otherwise than by the book, at the first step with one."""
    engine = exact_engine(model, "echo", max_batch=max_batch, **options)
    book = {r.id: tokens for r, tokens in by_the_book}

    def wrong(got):
        return {name for name, one in got.items() if is_wrong(one, book[name.split()[0]])}

    got = run(engine, twice(r for r, _ in by_the_book), between, until=wrong)
    if not wrong(got) and options.get("max_draft", 8):
        assert engine.figures().num_accepted_tokens > 50, "hardly anything was drafted well"
    return wrong(got)


def is_wrong(collected, want):
    """Other tokens, or another number of them unless it is being decoded or was cancelled."""
    reason = None if collected.last is None else collected.last.finish_reason
    is_part = reason in (None, "cancelled")
    return collected.token_ids != (want[: len(collected.token_ids)] if is_part else want)


@pytest.mark.parametrize("max_batch", [1, 3, 8])
def test_rounds_answer_every_shape_by_the_book(model, by_the_book, max_batch):
    assert not wrong_answers(model, by_the_book, max_batch)


def test_rounds_without_drafts_do_too(model, by_the_book):
    assert not wrong_answers(model, by_the_book, max_draft=0)


def test_lanes_of_cancelled_requests_leave_nothing_behind(model, by_the_book):
    numbers = random.Random(7)
    doomed = {r.id: numbers.randrange(2, 40) for r, _ in by_the_book[::3]}

    def between(engine, step):
        for name in (name for name, when in doomed.items() if when == step):
            engine.inbox.cancel(name)

    assert not wrong_answers(model, by_the_book, between=between)


@pytest.mark.interpreted
def test_the_kernels_answer_by_the_book(model, by_the_book, monkeypatch):
    """What a GPU runs, in Triton's interpreter."""
    monkeypatch.setattr(serving.engine.rounds, "adjust_rows", lane_penalties_triton.adjust_rows)
    monkeypatch.setattr(serving.engine.rounds, "count_tokens", lane_penalties_triton.count_tokens)

    assert not wrong_answers(model, by_the_book[:12])


def test_log_probabilities_beside_penalties_are_the_targets_own(model):
    request = request_of(
        "a", [5, 6, 7], 12, logprobs=2, presence_penalty=1.9, frequency_penalty=1.0
    )
    engine = exact_engine(model, "random")

    got = run(engine, [request, request_of("b", [5, 6, 7], 12)])["a"]

    assert got.token_ids == decode(model, request)
    tokens = [*request.prompt_ids, *got.token_ids]
    with torch.no_grad():
        scores = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    for place, one in enumerate(got.logprobs, start=2):
        assert one.token_id == tokens[place + 1]
        # Hugging Face's own attention takes its softmax in float32; a penalty would be 1 and more.
        assert one.logprob == pytest.approx(float(scores[place, one.token_id]), abs=1e-5)
        assert [token for token, _ in one.top] == scores[place].topk(2).indices.tolist()


def test_tables_take_as_much_memory_as_is_kept_free_for_them(model):
    tables = Lanes(2, 8, 4, Target(copy.deepcopy(model), ())).tables
    held = sum(getattr(tables, name).nbytes for name in LaneTables.__slots__)
    assert held == table_bytes_of(3, V)


# ---- bugs planted --------------------------------------------------------------------------------


def blind_to_the_draft(logits, draft, requests, tables):
    for row in range(logits.shape[1]):
        lane_penalties.adjust_rows(logits[:, row : row + 1], draft[:, :0], requests, tables)


def one_draft_late(logits, draft, requests, tables):
    lane_penalties.adjust_rows(logits, draft.roll(1, dims=1), requests, tables)


def rejected_drafts_too(emitted, count, requests, tables):
    everything = torch.full_like(count, emitted.shape[1])
    lane_penalties.count_tokens(emitted, everything, requests, tables)


def the_lane_before(logits, draft, requests, tables):
    wrong = replace(requests, lanes_R=requests.lanes_R.roll(1))
    lane_penalties.adjust_rows(logits, draft, wrong, tables)


@pytest.mark.parametrize(
    ("name", "mutant", "without_drafts"),
    [
        ("adjust_rows", lambda *_: None, True),
        ("adjust_rows", the_lane_before, True),
        ("count_tokens", lambda *_: None, True),
        ("adjust_rows", blind_to_the_draft, False),
        ("adjust_rows", one_draft_late, False),
        ("count_tokens", rejected_drafts_too, False),
    ],
)
def test_a_bug_in_a_round_is_seen(model, by_the_book, monkeypatch, name, mutant, without_drafts):
    monkeypatch.setattr(serving.engine.rounds, name, mutant)

    assert wrong_answers(model, by_the_book)
    assert bool(wrong_answers(model, by_the_book, max_draft=0)) == without_drafts


class Unclearable(torch.Tensor):
    """Counts of which no row is ever cleared."""

    def index_fill_(self, *_args):
        return self


def test_counts_left_by_the_lanes_former_request_are_seen(model, by_the_book, monkeypatch):
    right = serving.engine.lanes.new_tables

    def tables(*args):
        found = right(*args)
        return replace(found, counts_LV=found.counts_LV.as_subclass(Unclearable))

    monkeypatch.setattr(serving.engine.lanes, "new_tables", tables)

    assert wrong_answers(model, by_the_book, max_batch=2)


def test_prompts_that_lanes_are_not_told_of_are_seen(model, by_the_book, monkeypatch):
    monkeypatch.setattr(serving.engine.lanes, "_penalized_prompt", lambda _sequence: [])

    assert wrong_answers(model, by_the_book)
