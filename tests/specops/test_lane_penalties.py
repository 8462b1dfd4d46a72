"""Biases and penalties by lane: the definition is bitwise equal to ``specops.penalties``, and the
kernels (interpreted without a GPU) to the definition."""

from __future__ import annotations

import os
import random
from dataclasses import replace

import pytest
import torch

from oracles.packed_penalties import Adjustments, adjust_logits, token_lists
from specops import lane_penalties, lane_penalties_triton
from specops.lane_penalties import LaneRequests, LaneTables, new_tables, table_bytes

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
IMPLEMENTATIONS = [
    pytest.param(lane_penalties, id="definition"),
    pytest.param(lane_penalties_triton, id="kernel"),
]
BIASES = 5
V = 4500
"""Vocabulary of several parts of 2,048 tokens, the last one partial."""


def some_requests(numbers, lanes, vocab):
    """(lane, prompt, completion, penalties, biases) of each request; a third have neither."""
    near = [0, vocab - 1, *range(2040, 2056)]  # both sides of a boundary between parts

    def tokens(most):
        return [numbers.choice(near) for _ in range(numbers.randrange(most))]

    found = []
    for index, lane in enumerate(lanes):
        penalties, biases = (0.0, 0.0, 1.0), {}
        if index % 3:
            penalties = (
                numbers.choice((0.0, numbers.uniform(-2, 2))),
                numbers.choice((0.0, numbers.uniform(-2, 2))),
                numbers.choice((1.0, numbers.uniform(0.3, 3))),
            )
            chosen = numbers.sample(near, numbers.randrange(BIASES + 1))
            biases = {token: numbers.uniform(-9, 9) for token in chosen}
        found.append((lane, tokens(6), tokens(9), penalties, biases))
    return found


def tables_of(requests, num_lanes, vocab):
    """Tables whose unused lanes and undefined entries hold garbage."""
    tables = new_tables(num_lanes, vocab, BIASES, "cpu")
    tables.biased_LB.fill_(3)
    for rubbish in (tables.bias_LB, tables.penalties_L3, tables.counts_LV):
        rubbish.fill_(7)
    asks = []
    for lane, prompt, completion, penalties, biases in requests:
        penalizes = penalties != (0, 0, 1)
        asks.append((lane, len(biases), int(penalizes)))
        for place, (token, value) in enumerate(biases.items()):
            tables.biased_LB[lane, place], tables.bias_LB[lane, place] = token, value
        if penalizes:
            tables.penalties_L3[lane] = torch.tensor(penalties, dtype=torch.float64)
            tables.counts_LV[lane] = 0
            tables.counts_LV[lane, prompt] = 1
            for token in completion:
                tables.counts_LV[lane, token] += 2
    return of_matrix(torch.tensor(asks)), tables


def of_matrix(asks_R3):
    """Laid out as in a round: lanes strided, the others fields of one matrix."""
    return LaneRequests(asks_R3[:, 0], *asks_R3.t().contiguous()[1:])


def on(device, requests, tables):
    asks = torch.stack((requests.lanes_R, requests.num_biased_R, requests.penalizes_R), dim=1)
    fields = (tables.biased_LB, tables.bias_LB, tables.penalties_L3, tables.counts_LV)
    return of_matrix(asks.to(device)), LaneTables(*(t.to(device, copy=True) for t in fields))


def by_lists(logits, draft, requests):
    """The definition by token lists."""
    rows = [r for r, (*_, penalties, b) in enumerate(requests) if penalties != (0, 0, 1) or b]
    own = [requests[r] for r in rows]
    presence, frequency, repetition = torch.tensor(
        [penalties for *_, penalties, _ in own], dtype=torch.float64
    ).unbind(1)
    return adjust_logits(
        logits,
        draft,
        Adjustments(
            rows_A=torch.tensor(rows),
            presence_A=presence,
            frequency_A=frequency,
            repetition_A=repetition,
            prompt=token_lists([prompt for _, prompt, *_ in own]),
            generated=token_lists([completion for _, _, completion, *_ in own]),
            biased=token_lists([list(b) for *_, b in own]),
            bias_T=torch.tensor([v for *_, b in own for v in b.values()], dtype=torch.float64),
        ),
    )


def case(seed, num_requests, num_draft, dtype, vocab=V):
    numbers, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    num_lanes = num_requests + 3
    requests = some_requests(numbers, numbers.sample(range(num_lanes), num_requests), vocab)
    shape = (num_requests, num_draft + 1, vocab)
    logits = (3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    near = torch.tensor([0, 1, vocab - 1, 2047, 2048])
    draft = near[torch.randint(5, (num_requests, num_draft), generator=generator)]
    return requests, logits, draft, *tables_of(requests, num_lanes, vocab)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_are_adjusted_as_by_lists_of_tokens(implementation, dtype):
    for seed, num_draft in enumerate((0, 1, 4, 4, 16)):
        requests, logits, draft, asks, tables = case(seed, 6, num_draft, dtype)
        want = by_lists(logits, draft, requests)
        asks, tables = on(DEVICE, asks, tables)
        got = logits.to(DEVICE, copy=True)

        implementation.adjust_rows(got, draft.to(DEVICE), asks, tables)

        assert torch.equal(got.cpu(), want)
        assert torch.equal(got[0].cpu(), logits[0]), "asked for nothing"
        assert not torch.equal(want, logits)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_emitted_tokens_are_counted_for_those_who_penalize(implementation):
    for seed, num_draft in enumerate((0, 3, 16)):
        requests, _, _, asks, tables = case(seed, 7, num_draft, torch.float32)
        generator = torch.Generator().manual_seed(seed)
        emitted = 2046 + torch.randint(4, (7, num_draft + 1), generator=generator)
        count = torch.randint(num_draft + 2, (7,), generator=generator)
        want = tables.counts_LV.clone()
        for r, (lane, *_, penalties, _) in enumerate(requests):
            for token in emitted[r, : count[r]].tolist() if penalties != (0, 0, 1) else ():
                want[lane, token] += 2
        asks, tables = on(DEVICE, asks, tables)

        implementation.count_tokens(emitted.to(DEVICE), count.to(DEVICE), asks, tables)

        assert torch.equal(tables.counts_LV.cpu(), want)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_counted_tokens_weigh_as_drafted_ones(implementation):
    """Tokens that a round kept weigh in the next one as they did in the rows after them."""
    _, logits, draft, asks, tables = case(5, 6, 4, torch.float32)
    logits = logits[:, :1].expand(-1, 5, -1).contiguous()
    asks, tables = on(DEVICE, asks, tables)
    drafted, counted = logits.to(DEVICE, copy=True), logits[:, :1].to(DEVICE, copy=True)
    draft = draft.to(DEVICE)
    implementation.adjust_rows(drafted, draft, asks, tables)

    everything = torch.full((6,), 4, device=DEVICE)
    implementation.count_tokens(draft, everything, asks, tables)
    implementation.adjust_rows(counted, draft[:, :0].contiguous(), asks, tables)

    assert torch.equal(counted[:, 0], drafted[:, 4])
    assert not torch.equal(drafted[:, 4], drafted[:, 0])


def test_tables_are_as_large_as_said():
    tables = new_tables(3, V, BIASES, "cpu")
    fields = (tables.biased_LB, tables.bias_LB, tables.penalties_L3, tables.counts_LV)
    assert sum(t.nbytes for t in fields) == table_bytes(3, V, BIASES)


def test_what_does_not_fit_is_refused():
    _, logits, draft, asks, tables = case(0, 2, 1, torch.float32, vocab=2100)
    adjust, count = lane_penalties_triton.adjust_rows, lane_penalties_triton.count_tokens
    with pytest.raises(ValueError, match=r"must be float32 or float64, got torch\.bfloat16"):
        adjust(logits.bfloat16(), draft, asks, tables)
    with pytest.raises(ValueError, match=r"draft must be \[2, 1\]"):
        adjust(logits, draft[:, :0], asks, tables)
    with pytest.raises(ValueError, match="each row of logits, and the draft, must be contiguous"):
        adjust(logits[:, :, ::2], draft, asks, tables)
    with pytest.raises(ValueError, match="counts cover 2100 tokens, the logits 2000"):
        adjust(logits[:, :, :2000], draft, asks, tables)
    with pytest.raises(ValueError, match=r"lanes must be \[2\] int64, got \(2,\) torch.int32"):
        adjust(logits, draft, replace(asks, lanes_R=asks.lanes_R.int()), tables)
    with pytest.raises(ValueError, match="num_biased and penalizes must be contiguous"):
        count(draft, draft[:, 0].contiguous(), replace(asks, penalizes_R=draft.repeat(1, 2)[:, 0]),
              tables)  # fmt: skip
    with pytest.raises(ValueError, match=r"count must be \[2\]"):
        count(draft, draft[:1, 0], asks, tables)
    with pytest.raises(ValueError, match="emitted tokens and their count must be contiguous"):
        count(draft.repeat(1, 2).t()[:2], draft[:, 0].contiguous(), asks, tables)


@pytest.mark.gpu
@pytest.mark.parametrize("num_draft", [0, 5])
def test_a_captured_round_adjusts_what_changed(num_draft):
    """Qwen3's vocabulary size; different requests, lanes and drafts at every replay."""
    vocab, num_requests = 151_936, 16
    _, logits, draft, asks, tables = case(0, num_requests, num_draft, torch.float32, vocab)
    held_asks, held = on(DEVICE, asks, tables)
    held_logits, held_draft = logits.to(DEVICE), draft.to(DEVICE)
    emitted = torch.nn.functional.pad(held_draft, (0, 1), value=9)
    count = torch.full((num_requests,), num_draft + 1, device=DEVICE)

    def work():
        lane_penalties_triton.adjust_rows(held_logits, held_draft, held_asks, held)
        lane_penalties_triton.count_tokens(emitted, count, held_asks, held)

    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()

    for seed in range(1, 4):
        requests, logits, draft, asks, tables = case(
            seed, num_requests, num_draft, torch.float32, vocab
        )
        fresh_asks, fresh = on(DEVICE, asks, tables)
        for name in LaneTables.__slots__:
            getattr(held, name).copy_(getattr(fresh, name))
        for name in LaneRequests.__slots__:
            getattr(held_asks, name).copy_(getattr(fresh_asks, name))
        held_logits.copy_(logits)
        held_draft.copy_(draft)
        emitted.copy_(torch.nn.functional.pad(held_draft, (0, 1), value=9))
        graph.replay()

        assert torch.equal(held_logits.cpu(), by_lists(logits, draft, requests))
        lane_penalties.count_tokens(emitted, count, fresh_asks, fresh)
        assert torch.equal(held.counts_LV, fresh.counts_LV)
