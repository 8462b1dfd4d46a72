"""Kernels and the host open and close rounds bitwise as the definitions do."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from specops import best_ids, device, lanes, lanes_host, lanes_triton
from specops.lanes import Column, Field, Input, LaneState
from specops.verify_logits import UNSOUND, LogitVerdict, Rule

IMPLEMENTATIONS = [
    pytest.param(lanes_host, "cpu", id="host"),
    pytest.param(lanes_triton, "cpu", id="kernel"),
    pytest.param(lanes_triton, "cuda", id="kernel on a GPU", marks=pytest.mark.gpu),
]
NUM_LANES, NUM_PAGES, PAGE, MOST = 9, 1030, 4, 16
LENGTHS = [1, 2, 4, 5, 30, 31, 32, 4117, 1]
"""The last lane is unused; one ends beyond its pages."""


def state_of(device, num_pages=NUM_PAGES):
    generator = torch.Generator().manual_seed(num_pages)

    def some(high, *shape):
        return torch.randint(high, shape, generator=generator)

    ints = torch.zeros((len(Field) + 2, NUM_LANES), dtype=torch.int64)
    ints[len(Field) :] = some(99, 2, NUM_LANES)  # rows that only their own reader knows
    ints[Field.LENGTH] = torch.tensor(LENGTHS)
    ints[Field.NONCE] = some(9, NUM_LANES)
    ints[Field.ANCHOR] = some(1000, NUM_LANES)
    ints[Field.LIMIT] = ints[Field.LENGTH] + torch.tensor([20, 1, 2, 3, 0, 9, 17, 40, 0])
    ints[Field.CAP] = torch.tensor([16, 16, 16, 0, 16, 3, 16, 16, 0])
    ints[Field.KEY] = some(2**62, NUM_LANES) - 2**61
    ints[Field.BY_MATCH] = torch.arange(NUM_LANES) % 2
    ints[Field.TOP_K] = some(50, NUM_LANES)
    ints[Field.CAPTURES] = torch.arange(NUM_LANES) % 3 % 2
    floats = torch.rand(5, NUM_LANES, generator=generator)
    pages = some(5000, NUM_LANES, num_pages).int()
    pages[NUM_LANES - 1] = 0
    texts = some(1000, NUM_LANES, max(LENGTHS) + 50).int()
    return LaneState(*(one.to(device) for one in (ints, floats, pages, texts)))


def inputs_of(chosen, device):
    """Given drafts of different lengths, followed by garbage."""
    rows = torch.arange(len(chosen) * (Input.TOKENS + MOST)).view(len(chosen), -1) % 997
    rows[:, Input.LANE] = torch.tensor(chosen)
    rows[:, Input.DRAFTED] = torch.arange(len(chosen)) * 3 % (MOST + 1)
    return rows.to(device)


def assert_equal(got, want):
    """Compare two records bitwise."""
    for field in dataclasses.fields(want):
        a, b = getattr(got, field.name), getattr(want, field.name)
        if b is None:
            assert a is None, field.name
        else:
            assert (a.dtype, a.shape) == (b.dtype, b.shape), field.name
            assert torch.equal(a, b), field.name


@pytest.fixture
def poisoned(monkeypatch):
    """Fill the memory that kernels write to with garbage."""
    right = torch.empty

    def empty(*shape, **options):
        made = right(*shape, **options)
        return made.fill_(True if made.dtype == torch.bool else -77)

    monkeypatch.setattr(torch, "empty", empty)


CHOSEN = [[0], [3, 8], [7, 1, 2, 6, 5, 0, 4, 8, 8, 8]]
NUM_DRAFTS = [0, 1, 4, 16]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("by", "device"), IMPLEMENTATIONS)
@pytest.mark.parametrize("num_draft", NUM_DRAFTS)
@pytest.mark.parametrize("chosen", CHOSEN, ids=len)
@pytest.mark.parametrize("is_given", [True, False])
def test_rounds_open_alike(chosen, num_draft, is_given, by, device):
    state, inputs = state_of(device), inputs_of(chosen, device)
    arguments = (state, inputs, num_draft, PAGE, Rule.BLOCK)

    want = lanes.open_round(*arguments, is_given=is_given)
    got = by.open_round(*arguments, is_given=is_given)

    if not is_given:  # the drafter's tokens are not known yet
        want.block_RQ[:, 1:] = got.block_RQ[:, 1:] = 0
    assert_equal(got, want)


def test_a_round_reads_what_its_lanes_say():
    opened = lanes.open_round(
        state_of("cpu"), inputs_of([3, 7], "cpu"), 2, PAGE, Rule.STANDARD, is_given=False
    )

    assert opened.positions_T.tolist() == [4, 5, 6, 4116, 4117, 4118]
    assert opened.draft_positions_KR.tolist() == [[5, 4117], [6, 4118]]
    assert opened.lens_R.tolist() == [0, 2]  # its cap, and the whole draft
    assert opened.rules_R.tolist() == [Rule.MATCH, Rule.MATCH]
    pages = state_of("cpu").pages_LP[[3, 7]]
    slots = opened.slots_T.view(2, 3)
    assert slots[0].tolist() == (pages[0, 1] * PAGE + torch.arange(3)).tolist()
    assert slots[1].tolist() == (pages[1, 1029] * PAGE + torch.arange(3)).tolist()


def verdict_of(kind, opened, draft, device):
    """Best ids, or a verdict, that keep 0, 1, 2, ... draft tokens of the requests."""
    num_requests, num_draft = draft.shape
    request = torch.arange(num_requests, device=device)
    kept = torch.minimum(request % (num_draft + 1), opened.lens_R)
    best = 500 + torch.arange(num_requests * (num_draft + 1), device=device).view(num_requests, -1)
    if kind == "greedy":
        place = torch.arange(num_draft, device=device)
        best[:, :-1] = torch.where(place < kept[:, None], draft, best[:, :-1])
        return best, None
    reals = -torch.rand(2, num_requests, num_draft, device=device)
    reals[0] = torch.where(reals[0] < -0.9, -torch.inf, reals[0])
    own = best[request, kept]
    verdict = LogitVerdict(kept, own, reals[0].contiguous(), reals[0], None, None)
    return verdict, reals[1].contiguous() if kind == "drawn" else None


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("by", "device"), IMPLEMENTATIONS)
@pytest.mark.parametrize("num_draft", NUM_DRAFTS)
@pytest.mark.parametrize("chosen", CHOSEN, ids=len)
@pytest.mark.parametrize("kind", ["greedy", "delta", "drawn"])
def test_rounds_close_alike(chosen, num_draft, kind, by, device):
    found = []
    for module in (lanes, by):
        state, inputs = state_of(device), inputs_of(chosen, device)
        outputs = torch.full((12, Column.TOKENS + 3 * MOST), -1, device=device)
        opened = lanes.open_round(state, inputs, num_draft, PAGE, Rule.BLOCK, is_given=True)
        torch.manual_seed(0)
        verdict, logq = verdict_of(kind, opened, opened.given_RK, device)
        draft = opened.block_RQ[:, 1:]
        closed = module.close_round(
            state, opened, draft, verdict, logq, outputs[1 : 1 + len(chosen)]
        )
        found.append((closed, state, outputs))

    (want, state, outputs), (got, other_state, other_outputs) = found
    assert_equal(got, want)
    assert_equal(other_state, state)
    assert torch.equal(other_outputs, outputs)
    assert (outputs[0] == -1).all() and (outputs[1 + len(chosen) :] == -1).all()


@pytest.mark.parametrize(("by", "device"), IMPLEMENTATIONS)
def test_single_drafts_that_were_chosen_by_position_are_rows(by, device):
    """[1, R] ids, transposed, have a stride of R between columns and pass for contiguous."""
    found = []
    for laid_out in (lambda ids: ids.contiguous(), lambda ids: torch.stack([ids[:, 0]]).t()):
        state, inputs = state_of(device), inputs_of([2, 5, 1], device)
        opened = lanes.open_round(state, inputs, 1, PAGE, Rule.BLOCK, is_given=True)
        outputs = torch.full((3, Column.TOKENS + 3 * MOST), -1, device=device)
        best, _ = verdict_of("greedy", opened, opened.given_RK, device)
        by.close_round(state, opened, laid_out(opened.given_RK), best, None, outputs)
        found.append(outputs)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "close", [lanes.close_round, lanes_host.close_round, lanes_triton.close_round]
)
def test_a_round_commits_what_was_kept(close):
    """Two draft tokens kept; all kept, but no room for the last token; an unused lane."""
    chosen, state = [0, 2, 8], state_of("cpu")
    before, texts_before = state.ints_FL.clone(), state.texts_LN.clone()
    opened = lanes.open_round(state, inputs_of(chosen, "cpu"), 3, PAGE, Rule.BLOCK, is_given=False)
    draft = torch.tensor([[11, 12, 13], [21, 22, 23], [31, 32, 33]])
    best = torch.tensor([[11, 12, 99, 98], [21, 97, 96, 95], [31, 32, 33, 94]])
    outputs = torch.zeros((3, Column.TOKENS + 9), dtype=torch.int64)

    closed = close(state, opened, draft, best, None, outputs)

    assert closed.emitted_RQ.tolist() == [[11, 12, 99, 99], [21, 97, 97, 97], [31] * 4]
    assert closed.count_R.tolist() == [3, 2, 0]
    assert closed.anchor_row_R.tolist() == [2, 5, 8]
    assert outputs[:, : Column.PICKED].tolist() == [[2, 99, 3, 0], [1, 97, 1, 0], [0, 31, 0, 0]]
    assert outputs[:, Column.TOKENS : Column.TOKENS + 3].tolist() == draft.tolist()
    for lane, count, anchor in ((0, 3, 99), (2, 2, 97), (8, 0, int(before[Field.ANCHOR, 8]))):
        assert state.ints_FL[Field.LENGTH, lane] == before[Field.LENGTH, lane] + count
        assert state.ints_FL[Field.NONCE, lane] == before[Field.NONCE, lane] + 1
        assert state.ints_FL[Field.ANCHOR, lane] == anchor
    others = [1, 3, 4, 5, 6, 7]
    assert torch.equal(state.ints_FL[:, others], before[:, others])
    texts_before[0, 1:4] = torch.tensor([11, 12, 99])
    texts_before[2, 4:6] = torch.tensor([21, 97])
    assert torch.equal(state.texts_LN, texts_before)


@pytest.mark.parametrize(
    "close", [lanes.close_round, lanes_host.close_round, lanes_triton.close_round]
)
def test_text_that_nobody_reads_is_not_kept(close):
    kept, bare = state_of("cpu"), dataclasses.replace(state_of("cpu"), texts_LN=None)
    for state in (kept, bare):
        opened = lanes.open_round(
            state, inputs_of([0, 2], "cpu"), 3, PAGE, Rule.BLOCK, is_given=True
        )
        outputs = torch.zeros((2, Column.TOKENS + 9), dtype=torch.int64)
        close(state, opened, opened.given_RK, opened.block_RQ, None, outputs)
    assert_equal(bare, dataclasses.replace(kept, texts_LN=None))


@pytest.mark.gpu
def test_rounds_replay_on_what_the_lanes_say_then():
    """Captured once, with overlapping kernels; every replay starts from what the previous one
    committed."""
    expected, captured = state_of("cuda"), state_of("cuda")
    inputs = inputs_of([0, 6, 7, 8], "cuda")
    outputs = torch.zeros((4, Column.TOKENS + 3 * MOST), dtype=torch.int64, device="cuda")
    laws = torch.randn(1000, 30_000, device="cuda")

    def play(state, open_round, best_ids, close_round):
        opened = open_round(state, inputs, 4, PAGE, Rule.BLOCK, is_given=True)
        best = best_ids(laws[opened.block_RQ % 1000])
        close_round(state, opened, opened.given_RK, best, None, outputs)

    kernels = (device.open_round, device.best_ids, device.close_round)
    play(state_of("cuda"), *kernels)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        play(captured, *kernels)
    for _ in range(6):
        graph.replay()
        play(expected, lanes.open_round, best_ids.best_ids, lanes.close_round)

    assert_equal(captured, expected)


def test_states_of_another_layout_are_refused():
    state, inputs = state_of("cpu"), inputs_of([0], "cpu")
    for wrong in (
        dataclasses.replace(state, ints_FL=state.ints_FL.int()),
        dataclasses.replace(state, pages_LP=state.pages_LP.t().contiguous().t()),
    ):
        with pytest.raises(ValueError, match="must be contiguous"):
            lanes_triton.open_round(wrong, inputs, 2, PAGE, Rule.BLOCK, is_given=True)
    opened = lanes_triton.open_round(state, inputs, 2, PAGE, Rule.BLOCK, is_given=True)
    assert opened.given_RK is not None
    outputs = torch.zeros((1, Column.TOKENS + 3 * MOST), dtype=torch.int64)
    with pytest.raises(ValueError, match=r"a verdict must be contiguous torch\.int64"):
        lanes_triton.close_round(
            state, opened, opened.given_RK, opened.block_RQ.int(), None, outputs
        )


@pytest.mark.parametrize(
    "close", [lanes.close_round, lanes_host.close_round, lanes_triton.close_round]
)
@pytest.mark.parametrize("is_greedy", [True, False])
def test_a_token_that_does_not_exist_is_told_but_not_committed(close, is_greedy):
    """The lane goes on with token 0 until the host has ended the request."""
    chosen, state = [0, 2], state_of("cpu")
    opened = lanes.open_round(state, inputs_of(chosen, "cpu"), 3, PAGE, Rule.BLOCK, is_given=False)
    draft = torch.tensor([[11, 12, 13], [21, 22, 23]])
    verdict = torch.tensor([[11, UNSOUND, 99, 98], [UNSOUND, 97, 96, 95]])
    if not is_greedy:
        accepted, reals = torch.tensor([1, 0]), torch.zeros(2, 3)
        verdict = LogitVerdict(accepted, torch.tensor([UNSOUND] * 2), reals, reals, None, None)
    outputs = torch.zeros((2, Column.TOKENS + 9), dtype=torch.int64)

    closed = close(state, opened, draft, verdict, None, outputs)

    assert outputs[:, : Column.NEXT + 1].tolist() == [[1, UNSOUND], [0, UNSOUND]]
    assert closed.emitted_RQ.tolist() == [[11, 0, 0, 0], [0] * 4]
    assert closed.next_R.tolist() == [0, 0]
    assert state.ints_FL[Field.ANCHOR, chosen].tolist() == [0, 0]
