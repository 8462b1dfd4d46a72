"""What one request of a batch is told, from programs that are replayed as CUDA graphs on a GPU: NaN
in its rows is its own affair, and its log probabilities are those of its own tokens."""

from __future__ import annotations

import pytest
import torch

from drafters.eagle3.model import Eagle3, config_for_target
from oracles import tokenizer_kinds as kinds
from oracles.engines import RandomPolicy, make_engine, random_model, request_of, run
from serving.engine.cuda_graphs import Graphs
from serving.engine.detokenize import Detokenizer
from serving.engine.outputs import NOT_FINITE
from serving.engine.vocabulary import Vocabulary
from serving.http.logprobs import TextOffsets, completion_logprobs

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
V, BAD = 96, 95
NEVER = ((BAD, -100.0),)
SHAPES = {
    "greedy": [{}] * 4,
    "seeded": [{"temperature": 1.2, "seed": n} for n in range(4)],
    "both": [
        {},
        {"temperature": 1.2, "seed": 1},
        {},
        {"temperature": 0.7, "top_p": 0.9, "seed": 2},
    ],
    "all fields": [
        {"temperature": 0.8, "seed": 3, "logprobs": 3},
        {"presence_penalty": 0.5, "logprobs": 0},
        {"temperature": 1.1, "top_k": 7, "min_p": 0.01, "seed": 4},
        {"frequency_penalty": 0.7},
    ],
}  # fmt: skip


def engine_on(device, model, **options):
    """An engine whose programs are graphs if the device has them."""
    model = model.to(device)
    drafter = Eagle3(config_for_target(model.config))
    drafter.initialise(1, model.get_output_embeddings().weight.cpu())
    given = {"policy": RandomPolicy(), **options}
    engine = make_engine(model, drafter=drafter.to(device), **given)
    assert engine.programs.graphs.are_real == (device == "cuda")
    return engine


def poisoned(poison):
    """A target whose embedding of ``BAD`` is not finite."""
    model = random_model("qwen3", vocab_size=V, head_dim=64)
    with torch.no_grad():
        model.lm_head.weight[BAD] = 0
        if poison is not None:
            model.model.embed_tokens.weight[BAD] = poison
    return model


def neighbours(shape):
    prompts = [[(7 * n + i * i) % 90 for i in range(5 + 6 * n)] for n in range(4)]
    return [
        request_of(str(n), prompt, 16, logit_bias=NEVER, **params)
        for n, (prompt, params) in enumerate(zip(prompts, SHAPES[shape], strict=True))
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_request_does_not_touch_its_neighbours(device, shape, poison):
    """In each of three batches, one request is poisoned, greedy or sampled."""
    few = {"max_batch": 5, "num_pages": 60}  # pages of poisoned requests are used again
    alone = run(engine_on(device, poisoned(None), **few), neighbours(shape))
    engine = engine_on(device, poisoned(poison), **few)
    for turn, params in enumerate([{}, {"temperature": 1.0}, {"temperature": 1.0, "logprobs": 2}]):
        bad = request_of("bad", [1, 2, BAD, *range(9 + turn)], 20, **params)
        first, *others = neighbours(shape)

        got = run(engine, [first, bad, *others])

        last = got["bad"].last
        assert (last.finish_reason, last.error_code) == ("error", NOT_FINITE)
        assert (got["bad"].token_ids, got["bad"].logprobs) == ([], [])
        for name, answer in alone.items():
            assert got[name].token_ids == answer.token_ids, (turn, name)
            assert got[name].last.finish_reason == "length"
            values = [entry.logprob for entry in got[name].logprobs]
            assert values == pytest.approx([entry.logprob for entry in answer.logprobs], abs=1e-3)
    assert engine.figures().num_corrupted == 3
    assert engine.figures().num_draft_tokens > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_running_a_program_before_it_is_captured_changes_no_answer(shape, monkeypatch):
    """At its first use, on the inputs of nobody: the kernels of a GPU are compiled in this way."""
    want = run(engine_on("cpu", poisoned(None)), neighbours(shape))
    num_run = 0

    def after_a_run(_graphs, work):
        nonlocal num_run
        num_run += 1
        work()
        return work

    monkeypatch.setattr(Graphs, "capture", after_a_run)

    got = run(engine_on("cpu", poisoned(None)), neighbours(shape))

    assert num_run > 3
    assert {n: a.token_ids for n, a in got.items()} == {n: a.token_ids for n, a in want.items()}


TOKENIZERS = {"byte level": kinds.byte_level(), "sentencepiece": kinds.sentencepiece()}


def text_of(vocabulary, prompt, tokens):
    detokenizer = Detokenizer(vocabulary, prompt)
    for token in tokens:
        detokenizer.add(token)
    return detokenizer.take(final=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_offsets_and_values_are_those_of_the_tokens(device, name):
    """Answers of single bytes: most are parts of characters. Four at once, whatever is drafted."""
    tokenizer = TOKENIZERS[name]
    vocabulary = Vocabulary(tokenizer)
    model = random_model("qwen3", vocab_size=len(tokenizer), head_dim=64)
    engine = engine_on(device, model)
    prompts = [tokenizer.encode(text) for text in ("the café", "🙂🙂", "a", "漢字 é")]
    requests = [
        request_of(str(n), prompt, 40, seed=n, logprobs=3, temperature=1.5)
        for n, prompt in enumerate(prompts)
    ]

    got = run(engine, requests)

    num_parts = 0
    reference = random_model("qwen3", vocab_size=len(tokenizer), head_dim=64)
    for request in requests:
        entries, tokens = got[request.id].logprobs, got[request.id].token_ids
        assert [entry.token_id for entry in entries] == tokens
        ids = torch.tensor([[*request.prompt_ids, *tokens]])
        with torch.inference_mode():
            rows = reference(ids).logits[0, len(request.prompt_ids) - 1 : -1].log_softmax(-1)
        for row, entry in zip(rows, entries, strict=True):
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-2)
            best = row.topk(3)
            assert [value for _, value in entry.top] == pytest.approx(
                best.values.tolist(), abs=1e-2
            )

        text = text_of(vocabulary, request.prompt_ids, tokens)
        whole = completion_logprobs(entries, vocabulary, TextOffsets(vocabulary, request))
        offsets = whole.text_offset
        assert offsets == sorted(offsets)
        assert 0 == offsets[0] <= offsets[-1] <= len(text)
        num_parts += len(offsets) - len(set(offsets))
        for start in {0, len(tokens) // 2}:
            at = offsets[start]
            before = text_of(vocabulary, request.prompt_ids, tokens[:start])
            assert text[:at] == before[:at]
        for token, offset in zip(tokens, offsets, strict=True):
            data = vocabulary.bytes_of(token, skip_special=True)
            if data is not None and data.isascii() and offset < len(text):
                assert text[offset:].startswith(data.decode()), (token, offset)
    assert num_parts > 0, "no character has two tokens"
