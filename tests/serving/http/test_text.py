"""What clients read from a server whose target has a SentencePiece tokenizer and special tokens."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest

from oracles import tokenizer_kinds as kinds
from oracles.support import save_tiny_target
from tests.serving.http.live import MODEL, LiveServer, running_server

TOKENIZER = kinds.sentencepiece()
MOST = 96
"""Tokens of prompt and completion together."""


@pytest.fixture(scope="module")
def text_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("text")
    target = save_tiny_target(folder / "target", tokenizer=TOKENIZER)
    with running_server(target, folder, f"engine.max_model_len={MOST}") as server:
        yield server


@pytest.fixture
def client(text_server: LiveServer) -> Iterator[openai.OpenAI]:
    with text_server.openai() as client:
        yield client


def only(*tokens: str) -> dict[str, int]:
    """A bias that leaves these tokens alone."""
    ids = TOKENIZER.convert_tokens_to_ids(list(tokens))
    assert TOKENIZER.unk_token_id not in ids
    return {str(token): 100 for token in ids}


def asked(*tokens: str, **more):
    fields = {"model": MODEL, "prompt": "tree", "max_tokens": 6, "temperature": 0, **more}
    return {**fields, "logit_bias": only(*tokens)} if tokens else fields


def test_the_space_after_the_prompt_is_kept(client):
    answer = client.completions.create(**asked("▁the"))
    assert answer.choices[0].text == " the" * 6
    chunks = client.completions.create(**asked("▁the"), stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == " the" * 6


def test_the_space_of_a_text_that_begins_with_the_answer_is_not(client):
    begin = [TOKENIZER.bos_token_id]
    assert client.completions.create(**asked("▁the", prompt=begin)).choices[0].text == (
        "the" + " the" * 5
    )


@pytest.mark.parametrize(
    "tokens",
    [
        pytest.param((), id="any"),
        pytest.param(("<0xC3>", "<0xA9>"), id="halves of characters"),
        pytest.param(("<0xE4>", "<0xBD>", "<0xA0>", "▁the"), id="thirds and words"),
        pytest.param(("<0xC3>", "<0xA9>", kinds.ASSISTANT), id="and special tokens"),
    ],
)
@pytest.mark.parametrize("stop", [None, "never there"])
def test_a_stream_says_what_the_answer_says(client, tokens, stop):
    for seed in range(4):
        body = asked(*tokens, temperature=2, seed=seed, max_tokens=40, logprobs=20, stop=stop)
        whole = client.completions.create(**body).choices[0]
        chunks = [chunk.choices[0] for chunk in client.completions.create(**body, stream=True)]
        parts = [chunk.logprobs for chunk in chunks if chunk.logprobs is not None]
        assert "".join(chunk.text for chunk in chunks) == whole.text
        assert [o for part in parts for o in part.text_offset] == whole.logprobs.text_offset
        assert [t for part in parts for t in part.tokens] == whole.logprobs.tokens


def test_every_alternative_is_reported(client):
    body = asked(logprobs=20, temperature=2, seed=5, max_tokens=40)
    choice = client.completions.create(**body).choices[0]
    # the token that was drawn is there too, at this temperature often as the 21st
    assert {len(top) for top in choice.logprobs.top_logprobs} == {20, 21}


def test_offsets_point_at_the_tokens(client):
    body = asked("<0xC3>", "<0xA9>", "▁the", temperature=2, seed=1, max_tokens=40, logprobs=0)
    choice = client.completions.create(**body).choices[0]
    starts = zip(choice.logprobs.text_offset, choice.logprobs.tokens, strict=True)
    words = [offset for offset, token in starts if token == " the"]
    assert words and all(choice.text.startswith(" the", offset) for offset in words)
    assert "é" in choice.text


def test_the_bytes_of_a_chat_are_its_text(client):
    chat = asked("<0xC3>", "<0xA9>", "▁the", kinds.ASSISTANT, temperature=2, seed=1, max_tokens=40)
    del chat["prompt"]
    answer = client.chat.completions.create(
        **chat, messages=[{"role": "user", "content": "the"}], logprobs=True, top_logprobs=2
    ).choices[0]
    data = b"".join(bytes(entry.bytes or ()) for entry in answer.logprobs.content)
    assert "\u00e9" in answer.message.content
    assert data.decode(errors="replace") == answer.message.content


@pytest.mark.parametrize(
    ("fields", "text", "reason", "num_tokens"),
    [
        pytest.param({}, "", "length", 6, id="it has no text"),
        pytest.param({"stop": kinds.ASSISTANT}, "", "stop", 1, id="but a stop string matches it"),
        pytest.param({"stop": [kinds.ASSISTANT * 2]}, "", "stop", 2, id="or two of it"),
        pytest.param({"stop": ["x", "<|assist"]}, "", "length", 6, id="not a part of it"),
        pytest.param(
            {"stop": kinds.ASSISTANT, "include_stop_str_in_output": True},
            kinds.ASSISTANT, "stop", 1, id="and is kept on demand",
        ),
        pytest.param(
            {"skip_special_tokens": False}, kinds.ASSISTANT * 6, "length", 6, id="shown"
        ),
        pytest.param(
            {"skip_special_tokens": False, "stop": "<|assist"}, "", "stop", 1, id="shown, a part"
        ),
        pytest.param({"stop_token_ids": [3]}, "", "stop", 1, id="by its id"),
        pytest.param(
            {"stop_token_ids": [3], "skip_special_tokens": False}, "", "stop", 1, id="shown, id"
        ),
        pytest.param(
            {
                "stop_token_ids": [3],
                "skip_special_tokens": False,
                "include_stop_str_in_output": True,
            },
            kinds.ASSISTANT, "stop", 1, id="shown, by its id, and kept",
        ),
        pytest.param(
            {"spaces_between_special_tokens": False, "skip_special_tokens": False},
            kinds.ASSISTANT * 6, "length", 6, id="no spaces between",
        ),
    ],
)  # fmt: skip
def test_a_special_token_in_an_answer(client, fields, text, reason, num_tokens):
    assert TOKENIZER.convert_tokens_to_ids(kinds.ASSISTANT) == 3
    answer = client.completions.create(**asked(kinds.ASSISTANT), extra_body=fields)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (text, reason)
    assert answer.usage.completion_tokens == num_tokens


def test_the_end_of_text_is_shown_only_on_demand(client):
    end = asked(kinds.END)
    shown = {"skip_special_tokens": False}
    kept = {**shown, "include_stop_str_in_output": True}
    for fields, text in (({}, ""), (shown, ""), (kept, kinds.END)):
        choice = client.completions.create(**end, extra_body=fields).choices[0]
        assert (choice.text, choice.finish_reason) == (text, "stop")


def chat(server: LiveServer, num_letters: int, **more) -> httpx.Response:
    content = "," * num_letters
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0, **more}
    with server.client() as client:
        return client.post("/v1/chat/completions", json=body)


def test_a_chat_near_the_end_of_the_context(text_server: LiveServer):
    one = chat(text_server, 1, max_tokens=1).json()["usage"]["prompt_tokens"]
    full = 1 + MOST - one
    last = chat(text_server, full - 1, logit_bias=only("▁the"))
    assert last.status_code == 200
    assert last.json()["usage"]["total_tokens"] == MOST
    (choice,) = last.json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (" the", "length")
    for num_letters, num_prompt in ((full, MOST), (full + 1, MOST + 1), (full + 50, MOST + 50)):
        for fields, limit in (
            ({}, "and at least one of a completion"),
            ({"max_tokens": 1}, "and max_tokens 1"),
            ({"max_completion_tokens": 5, "stream": True}, "and max_tokens 5"),
        ):
            answer = chat(text_server, num_letters, **fields)
            error = answer.json()["error"]
            assert answer.status_code == 400
            assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")
            assert error["message"] == (
                f"messages: {num_prompt} tokens {limit}, together at most "
                f"engine.max_model_len ({MOST})"
            )
    nothing = chat(text_server, full, max_tokens=0)
    assert nothing.status_code == 200
    assert nothing.json()["choices"][0]["message"]["content"] == ""


def test_a_completion_without_max_tokens_takes_what_fits(client):
    prompt = [5] * (MOST - 3)
    free = asked("▁the", prompt=prompt)
    del free["max_tokens"]
    answer = client.completions.create(**free)
    assert (answer.choices[0].text, answer.usage.completion_tokens) == (" the" * 3, 3)
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**free | {"prompt": [5] * MOST})
    assert caught.value.param == "prompt"
    with pytest.raises(openai.BadRequestError, match="max_tokens 4, together at most"):
        client.completions.create(**free, max_tokens=4)
