"""What one request is told, and what it leaves behind: ends, stops, logprobs, refusals."""

from __future__ import annotations

import copy

import pytest
import torch

from oracles.engines import Collected, make_engine, random_model, request_of, run
from policies.fixed import FixedPolicy
from serving.requests import DrainingError, QueueFullError

PROMPT = [40, 41, 42, 43]


@pytest.fixture(scope="module")
def model():
    return random_model("qwen3", vocab_size=288)


def plain_tokens(model, max_tokens=40):
    return run(make_engine(model), [request_of("p", PROMPT, max_tokens, max_draft=0)])["p"]


@pytest.mark.parametrize("overlaps", [False, True], ids=["waits", "overlaps"])
def test_an_end_token_inside_an_accepted_block_ends_there(model, overlaps):
    tokens = plain_tokens(model).token_ids
    end = tokens[7]
    cut = tokens.index(end) + 1

    got = run(
        make_engine(model, eos_ids=frozenset({end}), overlaps=overlaps),
        [request_of("eos", PROMPT, 40), request_of("on", PROMPT, 40, ignore_eos=True)],
    )

    assert got["eos"].token_ids == tokens[:cut]
    assert got["eos"].last.finish_reason == "stop"
    assert got["on"].token_ids == tokens
    assert got["on"].last.finish_reason == "length"


def test_a_stop_string_ends_the_text_before_it(model):
    whole = plain_tokens(model).text
    stop = whole[5:8]

    got = run(make_engine(model), [request_of("s", PROMPT, 40, stop=(stop, "never there"))])["s"]

    assert got.text == whole[: whole.index(stop)]
    assert got.last.finish_reason == "stop"


def test_a_text_that_only_begins_a_stop_string_is_delivered_in_the_end(model):
    whole = plain_tokens(model).text
    got = run(make_engine(model), [request_of("s", PROMPT, 40, stop=(whole[-2:] + "xyz",))])["s"]
    assert got.text == whole


@pytest.mark.parametrize(
    ("overlaps", "drafter", "draft_k"),
    [(False, "suffix", 8), (True, "none", 0), (True, "suffix", 8), (True, "eagle3", 3)],
)
def test_logprobs_are_the_targets_own_and_one_for_each_token(model, overlaps, drafter, draft_k):
    beside = request_of("beside", PROMPT, 12)  # asks for none
    engine = make_engine(model, policy=FixedPolicy(drafter, draft_k), overlaps=overlaps)
    run(engine, [request_of("before", PROMPT, 40)])  # so that the index has something to propose
    got = run(engine, [request_of("l", PROMPT, 12, logprobs=3), beside])["l"]
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = reference(torch.tensor([PROMPT + got.token_ids])).logits[0]
    scores = logits.log_softmax(-1)[len(PROMPT) - 1 : -1]

    assert [p.token_id for p in got.logprobs] == got.token_ids
    for row, entry in zip(scores, got.logprobs, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-3)
        assert [i for i, _ in entry.top] == row.topk(3).indices.tolist()
    assert (got.last.stats.proposed > 0) == (draft_k > 0)
    if drafter == "suffix":
        assert got.last.stats.accepted > 4


def test_zero_tokens_are_answered_at_once(model):
    got = run_without_steps(make_engine(model), request_of("z", PROMPT, 0))
    assert (got.token_ids, got.last.finish_reason) == ([], "length")


def run_without_steps(engine, request):
    collected = Collected()
    engine.inbox.submit(request, collected.take)
    engine.step()
    return collected


@pytest.mark.parametrize("overlaps", [False, True], ids=["waits", "overlaps"])
def test_cancelling_frees_pages_at_any_stage(model, overlaps):
    engine = make_engine(model, max_batch=2, overlaps=overlaps)
    collected = {str(i): Collected() for i in range(5)}
    for name, taker in collected.items():
        engine.inbox.submit(request_of(name, PROMPT + [int(name)] * 30, 100), taker.take)
    with torch.inference_mode():
        for _ in range(4):
            engine.step()
        for name in collected:
            engine.inbox.cancel(name)
        engine.inbox.cancel("unknown")
        engine.step()

    assert all(c.last.finish_reason == "cancelled" for c in collected.values())
    assert engine.inbox.num_inflight() == 0
    assert engine.scheduler.pool.num_available == engine.scheduler.pool.num_usable


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "text"),
    [
        ([], 4, "prompt must hold at least one token"),
        ([1, 288], 4, "token id 288, outside 0..287"),
        ([1] * 250, 7, "make 257, more than max_model_len=256"),
    ],
)
def test_what_can_never_run_is_refused_by_name(model, prompt, max_tokens, text):
    with pytest.raises(ValueError, match=text):
        make_engine(model).inbox.submit(request_of("x", prompt, max_tokens), Collected().take)


@pytest.mark.parametrize(
    ("sampling", "text"),
    [
        ({"logit_bias": tuple((i, 1.0) for i in range(513))}, "513 tokens, at most 512"),
        ({"logprobs": 21}, "logprobs is 21, at most 20"),
    ],
)
def test_what_no_program_holds_is_refused_by_name(sampling, text):
    engine = make_engine(random_model("qwen3", vocab_size=600))
    with pytest.raises(ValueError, match=text):
        engine.inbox.submit(request_of("x", PROMPT, 4, **sampling), Collected().take)


def test_a_request_larger_than_the_pool_is_refused(model):
    with pytest.raises(ValueError, match="needs 29 KV pages, the pool has 9"):
        engine = make_engine(model, num_pages=10)
        engine.inbox.submit(request_of("x", [1], 103), Collected().take)


def test_a_full_queue_and_a_draining_engine_say_so(model):
    engine = make_engine(model, max_queue=1)
    engine.inbox.submit(request_of("a", PROMPT, 4), Collected().take)
    with pytest.raises(QueueFullError):
        engine.inbox.submit(request_of("b", PROMPT, 4), Collected().take)
    engine.inbox.drain()
    with pytest.raises(DrainingError):
        engine.inbox.submit(request_of("c", PROMPT, 4), Collected().take)


@pytest.mark.parametrize("overlaps", [False, True], ids=["waits", "overlaps"])
def test_a_failing_step_ends_its_requests_and_serving_goes_on(model, overlaps):
    """A real failure: the target is made to raise once, by a broken weight shape."""
    engine = make_engine(model, overlaps=overlaps)
    norm = engine.programs.target.decoder.norm
    weight = norm.weight
    norm.weight = torch.nn.Parameter(weight[:-1], requires_grad=False)
    collected = Collected()
    done = Collected()
    engine.start()
    try:
        engine.inbox.submit(request_of("a", PROMPT, 4), collected.take)
        _wait(lambda: collected.last is not None)
        norm.weight = weight
        engine.inbox.submit(request_of("b", PROMPT, 4), done.take)
        _wait(lambda: done.last is not None and done.last.finish_reason is not None)
    finally:
        norm.weight = weight
        engine.stop()

    assert collected.last.finish_reason == "error"
    assert done.last.finish_reason == "length"


def _wait(condition, seconds=20.0):
    import time

    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)
