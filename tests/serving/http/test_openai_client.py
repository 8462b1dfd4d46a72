"""The contract with OpenAI's own client, against a real server."""

from __future__ import annotations

import math
import re

import httpx
import openai
import pytest

from oracles.support import tiny_tokenizer
from tests.serving.http.live import MODEL, LiveServer

PROMPT = "def add(left, right):"
GREEDY = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 24}
CHAT = {
    "model": MODEL,
    "messages": [
        {"role": "system", "content": "You add."},
        {"role": "user", "content": [{"type": "text", "text": "left"}]},
    ],
    "temperature": 0,
    "max_completion_tokens": 16,
}


def test_a_completion_says_what_it_cost_and_how_it_was_decoded(client):
    answer = client.completions.create(**GREEDY)

    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.model == MODEL
    assert answer.choices[0].finish_reason in ("stop", "length")
    usage = answer.usage
    assert usage.prompt_tokens == len(tiny_tokenizer()(PROMPT)["input_ids"])
    assert 0 < usage.completion_tokens <= 24
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 <= usage.prompt_tokens_details.cached_tokens <= usage.prompt_tokens
    speculation = answer.speculation
    assert speculation["drafter_version"] == 0
    assert 0 <= speculation["accepted"] <= speculation["proposed"]
    committed = speculation["steps"] + speculation["accepted"]
    assert committed >= usage.completion_tokens
    assert speculation["tokens_per_step"] == pytest.approx(committed / speculation["steps"])


def test_a_stream_says_what_the_whole_answer_says(client):
    whole = client.completions.create(**GREEDY)

    chunks = list(client.completions.create(**GREEDY, stream=True))

    assert "".join(c.choices[0].text for c in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert all(c.choices[0].finish_reason is None for c in chunks[:-1])
    assert {c.id for c in chunks} == {chunks[0].id}
    assert chunks[-1].speculation["steps"] >= 1
    assert chunks[-1].usage is None


def test_a_stream_ends_with_usage_when_asked(client):
    chunks = list(
        client.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True})
    )

    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 0
    assert chunks[-1].speculation["drafter_version"] == 0
    assert all(c.usage is None for c in chunks[:-1])


def test_a_raw_stream_is_server_sent_events_up_to_done(server):
    with server.client() as client:
        answer = client.post("/v1/completions", json={**GREEDY, "stream": True})

    assert answer.headers["content-type"].startswith("text/event-stream")
    frames = answer.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    assert all(frame.startswith("data: {") for frame in frames[:-2])


def test_plain_decoding_gives_the_same_tokens(client):
    fast = client.completions.create(**GREEDY)
    plain = client.completions.create(**GREEDY, extra_body={"speculation": {"max_draft": 0}})

    assert plain.choices[0].text == fast.choices[0].text
    assert plain.speculation["proposed"] == 0
    assert plain.speculation["tokens_per_step"] == 1


def test_several_prompts_and_choices_keep_their_order(client):
    prompts = ["def add(", "for item in"]
    alone = [client.completions.create(**{**GREEDY, "prompt": p}).choices[0].text for p in prompts]

    together = client.completions.create(**{**GREEDY, "prompt": prompts}, n=2)

    assert [c.index for c in together.choices] == [0, 1, 2, 3]
    assert [c.text for c in together.choices] == [alone[0], alone[0], alone[1], alone[1]]
    ids = [len(tiny_tokenizer()(p)["input_ids"]) for p in prompts]
    assert together.usage.prompt_tokens == sum(ids)


def test_several_choices_can_be_streamed(client):
    texts = ["", ""]
    for chunk in client.completions.create(**GREEDY, n=2, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text

    assert texts[0] == texts[1] == client.completions.create(**GREEDY).choices[0].text


def test_token_ids_are_taken_and_given(client):
    ids = tiny_tokenizer()(PROMPT)["input_ids"]
    as_text = client.completions.create(**GREEDY, extra_body={"return_token_ids": True})
    as_ids = client.completions.create(
        **{**GREEDY, "prompt": ids}, extra_body={"return_token_ids": True}
    )
    as_lists = client.completions.create(**{**GREEDY, "prompt": [ids, ids]})

    assert as_text.choices[0].prompt_token_ids == ids
    assert as_ids.choices[0].token_ids == as_text.choices[0].token_ids
    assert as_text.usage.completion_tokens == len(as_text.choices[0].token_ids)
    assert [c.text for c in as_lists.choices] == [as_text.choices[0].text] * 2


def test_streamed_token_ids_are_the_same(client):
    body = {"return_token_ids": True}
    whole = client.completions.create(**GREEDY, extra_body=body)
    chunks = list(client.completions.create(**GREEDY, stream=True, extra_body=body))

    assert [t for c in chunks for t in c.choices[0].token_ids] == whole.choices[0].token_ids
    assert chunks[0].choices[0].prompt_token_ids == whole.choices[0].prompt_token_ids


def test_a_seed_repeats_an_answer_and_differs_between_choices(client):
    sampled = {**GREEDY, "temperature": 1.0, "seed": 7}
    first = client.completions.create(**sampled, n=2)
    again = client.completions.create(**sampled, n=2)
    alone = client.completions.create(**{**sampled, "seed": 8})

    texts = [c.text for c in first.choices]
    assert texts == [c.text for c in again.choices]
    assert texts[0] != texts[1]
    assert alone.choices[0].text == texts[1]


def test_a_stop_text_ends_the_choice_and_is_not_part_of_it(client):
    whole = client.completions.create(**GREEDY).choices[0].text
    stop = whole[6:9]
    at = whole.index(stop)

    stopped = client.completions.create(**GREEDY, stop=[stop, "never there"]).choices[0]
    streamed = client.completions.create(**GREEDY, stop=stop, stream=True)

    assert (stopped.text, stopped.finish_reason) == (whole[:at], "stop")
    assert "".join(c.choices[0].text for c in streamed) == whole[:at]


def test_a_stop_token_ends_the_choice(client):
    body = {"return_token_ids": True}
    ids = client.completions.create(**GREEDY, extra_body=body).choices[0].token_ids
    stop_at = next(i for i in range(3, len(ids)) if ids[i] not in ids[:i])

    stopped = client.completions.create(
        **GREEDY, extra_body={**body, "stop_token_ids": [ids[stop_at]]}
    ).choices[0]

    assert stopped.finish_reason == "stop"
    assert stopped.token_ids[:stop_at] == ids[:stop_at]
    assert len(stopped.token_ids) <= stop_at + 1


def test_log_probabilities_have_openais_shape(client):
    choice = client.completions.create(**GREEDY, logprobs=3).choices[0]
    logprobs = choice.logprobs

    count = len(logprobs.tokens)
    assert count == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 24
    assert logprobs.text_offset[0] == 0
    assert logprobs.text_offset == sorted(logprobs.text_offset)
    for token, own, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert len(top) == 3
        assert own == pytest.approx(max(top.values()))  # greedy took the best
        assert token in top
        assert sum(math.exp(p) for p in top.values()) <= 1 + 1e-5


def test_streamed_log_probabilities_are_the_same(client):
    whole = client.completions.create(**GREEDY, logprobs=1).choices[0].logprobs
    chunks = client.completions.create(**GREEDY, logprobs=1, stream=True)
    parts = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs is not None]

    assert [t for p in parts for t in p.tokens] == whole.tokens
    assert [o for p in parts for o in p.text_offset] == whole.text_offset


def test_zero_alternatives_still_report_the_token(client):
    logprobs = client.completions.create(**GREEDY, logprobs=0).choices[0].logprobs
    assert len(logprobs.token_logprobs) == 24
    pairs = zip(logprobs.tokens, logprobs.token_logprobs, strict=True)
    assert logprobs.top_logprobs == [{token: logprob} for token, logprob in pairs]


def test_a_prompt_seen_before_is_cached(client):
    prompt = "The drafter proposes, the target decides.\n" * 8
    request = {**GREEDY, "prompt": prompt, "max_tokens": 1}
    client.completions.create(**request)
    again = client.completions.create(**request)
    assert again.usage.prompt_tokens_details.cached_tokens > 0


def test_a_prompt_is_cached_for_its_own_tenant_and_salt_only(client):
    prompt = "Who asked this before shall not be told to others.\n" * 8
    seen = []
    for _ in range(2):
        for user, salt in (("one", None), ("two", None), ("one", "a"), ("one", "b"), ("two", "a")):
            extra = {} if salt is None else {"cache_salt": salt}
            request = {**GREEDY, "prompt": prompt, "max_tokens": 1, "user": user}
            usage = client.completions.create(**request, extra_body=extra).usage
            seen.append(usage.prompt_tokens_details.cached_tokens)
    assert seen[:5] == [0] * 5
    assert min(seen[5:]) > 0


@pytest.mark.parametrize("salt", ["", "s" * 1025, 7, ["a"]])
def test_a_salt_is_a_text_of_1_to_1024_characters(client, salt):
    with pytest.raises(openai.BadRequestError, match="cache_salt: "):
        client.completions.create(**GREEDY, extra_body={"cache_salt": salt})


def test_chat_uses_the_targets_template(client):
    answer = client.chat.completions.create(**CHAT, extra_body={"return_token_ids": True})
    text = "system: You add.\nuser: left\nassistant: "

    assert answer.prompt_token_ids == tiny_tokenizer()(text)["input_ids"]
    as_completion = client.completions.create(**{**GREEDY, "prompt": text, "max_tokens": 16})
    assert answer.choices[0].message.content == as_completion.choices[0].text
    assert answer.choices[0].message.role == "assistant"
    assert answer.object == "chat.completion"
    assert answer.usage.completion_tokens == 16
    assert answer.speculation["steps"] >= 1


def test_a_chat_stream_names_the_role_first(client):
    whole = client.chat.completions.create(**CHAT)
    chunks = list(
        client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True})
    )

    assert chunks[0].choices[0].delta.role == "assistant"
    content = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert content == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage or chunks[-1].usage.completion_tokens == 16


def test_chat_log_probabilities_have_openais_shape(client):
    answer = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content

    assert len(content) == 16
    for entry in content:
        assert len(entry.top_logprobs) == 2
        assert entry.logprob == pytest.approx(max(t.logprob for t in entry.top_logprobs))
        if not entry.token.startswith("token_id:"):  # else it is a part of a character
            assert bytes(entry.bytes).decode() == entry.token
    data = b"".join(bytes(entry.bytes) for entry in content)
    assert data.decode(errors="replace") == answer.choices[0].message.content


def test_chat_without_a_limit_fills_the_context(client):
    request = {k: v for k, v in CHAT.items() if k != "max_completion_tokens"}
    answer = client.chat.completions.create(**request, extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == 512
    assert answer.choices[0].finish_reason == "length"


def test_no_completion_tokens_is_an_answer_too(client):
    answer = client.completions.create(**{**GREEDY, "max_tokens": 0})
    assert (answer.choices[0].text, answer.usage.completion_tokens) == ("", 0)


def test_models_are_listed(client):
    (card,) = client.models.list().data
    assert card.id == MODEL
    assert card.metadata["drafter_version"] == 0
    assert client.models.retrieve(MODEL).max_model_len == 512
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("change", "kind", "param"),
    [
        ({"model": "other"}, openai.NotFoundError, "model"),
        ({"max_tokens": 511}, openai.BadRequestError, "prompt"),
        ({"prompt": [1, 10**6]}, openai.BadRequestError, "prompt"),
        ({"prompt": [-1]}, openai.BadRequestError, "prompt"),
        ({"prompt": [1, 1 << 70]}, openai.BadRequestError, "prompt"),
        ({"prompt": ""}, openai.BadRequestError, "prompt"),
        ({"prompt": "word " * 2000}, openai.BadRequestError, "prompt"),
        ({"n": 9}, openai.BadRequestError, "n"),
        ({"best_of": 3}, openai.BadRequestError, "best_of"),
        ({"presence_penalty": 3.0}, openai.BadRequestError, "presence_penalty"),
        ({"logit_bias": {"288": 1}}, openai.BadRequestError, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, openai.BadRequestError, "stream_options"),
        ({"extra_body": {"max_token": 3}}, openai.BadRequestError, "max_token"),
        (
            {"extra_body": {"speculation": {"max_draft": 17}}},
            openai.BadRequestError,
            "speculation.max_draft",
        ),
        ({"extra_body": {"stop_token_ids": [10**6]}}, openai.BadRequestError, "stop_token_ids"),
        (
            {"extra_headers": {"X-Slipstream-No-Capture": "yes"}},
            openai.BadRequestError,
            "X-Slipstream-No-Capture",
        ),
    ],
)
def test_a_refusal_is_the_clients_own_exception_and_names_the_field(client, change, kind, param):
    with pytest.raises(kind) as caught:
        client.completions.create(**{**GREEDY, **change})
    assert caught.value.param == param
    assert caught.value.response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"max_tokens": 3}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ],
)
def test_chat_refusals_name_the_field_too(client, change, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{**CHAT, **change})
    assert caught.value.param == param


def test_every_choice_of_a_refused_request_is_refused(server: LiveServer, client):
    with pytest.raises(openai.BadRequestError):
        client.completions.create(**{**GREEDY, "prompt": ["fine", ""]})
    server.wait_until_idle()


def test_a_request_id_of_the_caller_comes_back(server: LiveServer):
    with server.client() as client:
        own = client.get("/health", headers={"X-Request-Id": "trace-1:a.b"})
        odd = client.get("/health", headers={"X-Request-Id": "a b\tc"})
    assert own.headers["x-request-id"] == "trace-1:a.b"
    assert len(odd.headers["x-request-id"]) == 32


def test_traffic_is_counted(server: LiveServer, client):
    before = server.metric("request_success_total", finished_reason="length")
    tokens = server.metric("generation_tokens_total")
    client.completions.create(**GREEDY, extra_body={"ignore_eos": True})

    assert server.metric("request_success_total", finished_reason="length") == before + 1
    assert server.metric("generation_tokens_total") == tokens + 24
    counted = server.metric("time_to_first_token_seconds_count")
    between = server.metric("inter_token_latency_seconds_count")
    assert counted + between <= server.metric("generation_tokens_total")
    assert server.metric("e2e_request_latency_seconds_count") >= 1


def test_the_dashboard_is_one_page_and_its_data(server: LiveServer):
    with server.client() as client:
        page = client.get("/dashboard")
        data = client.get("/dashboard/data").json()
        later = client.get("/dashboard/data", params={"since": data["samples"][-1][0]}).json()

    assert "http://" not in page.text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert data["model"] == MODEL
    assert data["sample_fields"][0] == "unix_s"
    assert len(data["samples"][0]) == len(data["sample_fields"])
    assert len(later["samples"]) <= 1
    shown = set(re.findall(r"payback\.(\w+)", page.text))
    assert shown == {"saved_seconds", "learning_seconds", "payback_ratio"}
    assert shown <= data["drafter"]["payback"].keys()


def test_a_client_that_leaves_frees_its_pages(server: LiveServer):
    body = {**GREEDY, "temperature": 1, "max_tokens": 480, "ignore_eos": True, "n": 4}
    cancelled = server.metric("request_success_total", finished_reason="cancelled")
    tokens = server.metric("generation_tokens_total")
    with server.client() as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/completions", json=body, timeout=0.15)
    with server.client() as client:  # and in the middle of a stream
        stream = client.stream("POST", "/v1/completions", json={**body, "stream": True})
        with stream as answer:
            next(answer.iter_lines())

    server.wait_until_idle()
    assert server.metric("kv_cache_usage_perc") == 0
    assert server.metric("request_success_total", finished_reason="cancelled") == cancelled + 8
    assert server.metric("generation_tokens_total") < tokens + 8 * 480
