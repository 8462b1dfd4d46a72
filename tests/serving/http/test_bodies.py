"""Request bodies: limits are checked before the work, errors name the field but quote no values."""

from __future__ import annotations

import inspect
import json
import time

import pytest
from openai.resources.chat.completions import Completions as ChatCompletions
from openai.resources.completions import Completions

from serving.http.bodies import MAX_DEPTH, parse_body, parse_json
from serving.http.errors import ApiError
from serving.http.request_bodies import ChatRequest, CompletionRequest

HELLO = [{"role": "user", "content": "hello"}]


def refusal(body: bytes | dict, model=CompletionRequest) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_body(body if isinstance(body, bytes) else json.dumps(body).encode(), model)
    assert caught.value.status == 400
    return caught.value


def parsed(body: dict, model=CompletionRequest):
    return parse_body(json.dumps(body).encode(), model)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        pytest.param(b"\xff{}", "the body is not valid UTF-8", id="not utf-8"),
        pytest.param(b"[]", "the body must be a JSON object", id="not an object"),
        pytest.param(b'{"prompt": NaN}', "the body holds NaN, which is not JSON", id="NaN"),
        pytest.param(
            b'{"prompt": -Infinity}', "the body holds -Infinity, which is not JSON", id="infinity"
        ),
        pytest.param(
            b'{"temperature": 1e999, "prompt": "a"}',
            "temperature: Input should be a finite number",
            id="a float that overflows",
        ),
        pytest.param(
            b'{"prompt": "a\\udc80b"}', "the body holds half a surrogate pair", id="lone surrogate"
        ),
        pytest.param(
            b'{"seed": ' + b"9" * 5000 + b"}",
            "the body holds a number that is too long",
            id="digits",
        ),
        pytest.param(
            b'{"seed": 9223372036854775808, "prompt": "a"}',
            "seed: Input should be less than or equal to 9223372036854775807",
            id="seed of 65 bits",
        ),
        pytest.param(
            b'{"prompt": "a"',
            "the body is not JSON: Expecting ',' delimiter at line 1, column 15",
            id="cut short",
        ),
    ],
)
def test_what_is_not_strict_json_is_refused(body, message):
    assert str(refusal(body)) == message


def test_nesting_is_limited_before_parsing():
    def nested(depth):
        return b'{"x":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"

    parse_json(nested(MAX_DEPTH))
    with pytest.raises(ApiError, match="nests deeper than 32 levels"):
        parse_json(nested(MAX_DEPTH + 1))
    with pytest.raises(ApiError, match="nests deeper than 32 levels"):
        parse_json(b"[" * 1_000_000)


def test_brackets_inside_texts_do_not_count_as_nesting():
    text = '["' * 100 + "\\"
    assert parse_json(json.dumps({"prompt": text}).encode()) == {"prompt": text}


@pytest.mark.parametrize("body", [b'"' + b'\\"' * 500_000, b'"' * 999_999, b'"a\\'])
def test_a_text_that_never_ends_is_scanned_once(body):
    started = time.process_time()
    with pytest.raises(ApiError, match="not JSON"):
        parse_json(body)
    assert time.process_time() - started < 2  # quadratic scanning would take minutes


def test_escaped_pairs_and_nul_are_text():
    assert parse_json(b'{"prompt": "\\ud83d\\ude00\\u0000"}') == {"prompt": "\U0001f600\0"}


@pytest.mark.parametrize(
    ("prompt", "is_fine"),
    [
        ("text", True),
        ("", True),
        (["a", "b"], True),
        ([1, 2], True),
        ([[1], [2, 3]], True),
        ([], False),
        ([[]], False),
        ([1, "a"], False),
        (["a", [1]], False),
        ([1.5], False),
        ([True], False),
        ({"text": "a"}, False),
        (None, False),
    ],
)
def test_a_prompt_is_text_or_ids_one_or_several(prompt, is_fine):
    if is_fine:
        assert parsed({"prompt": prompt}).prompt == prompt
    else:
        error = refusal({"prompt": prompt})
        assert error.body.error.param == "prompt"
        assert str(error).startswith("prompt: must be a string, a list of strings")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", True),
        ("temperature", "1"),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", 0),
        ("min_p", 1),
        ("n", 0),
        ("n", "2"),
        ("n", 1.5),
        ("max_tokens", -1),
        ("logprobs", 21),
        ("stop", ["x"] * 17),
        ("stop", ""),
        ("stop", "x" * 1025),
        ("stop", [1]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", list(range(65))),
        ("stream", "yes"),
        ("user", ""),
        ("user", "a\x1b[2Jb"),
        ("user", "a\u202eb"),
        ("user", "a\n"),
        ("capture", 1),
        ("presence_penalty", 2.1),
        ("presence_penalty", False),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", "1"),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1),
        ("repetition_penalty", 101),
        ("logit_bias", [1]),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"01": 1}),
        ("logit_bias", {"1\n": 1}),
        ("logit_bias", {"1": 100.5}),
        ("logit_bias", {"1": True}),
        ("logit_bias", {"1": "5"}),
        ("logit_bias", {"1": None}),
        ("logit_bias", {str(i): 1 for i in range(301)}),
    ],
)
def test_values_outside_their_range_are_refused_by_name(field, value):
    error = refusal({"prompt": "a", field: value})
    assert error.body.error.param is not None
    assert error.body.error.param.split(".")[0] == field
    assert error.body.error.code == "invalid_value"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": "a", "max_token": 1}, "unknown field 'max_token'; did you mean 'max_tokens'?"),
        ({"prompt": "a", "zzz": 1}, "unknown field 'zzz'"),
        (
            {"prompt": "a", "speculation": {"max_drafts": 1}},
            "unknown field 'speculation.max_drafts'; did you mean 'max_draft'?",
        ),
        ({"prompt": "a", "\x1b[31m\r\n": 1}, "unknown field '\\x1b[31m\\r\\n'"),
        ({}, "prompt: this field is required"),
    ],
)
def test_unknown_and_missing_fields_are_named(body, message):
    assert str(refusal(body)) == message


def test_a_bias_is_a_token_id_and_a_number():
    body = parsed({"prompt": "a", "logit_bias": {"0": -100, "50256": 0.5}})
    assert body.logit_bias == ((0, -100.0), (50256, 0.5))
    assert parsed({"prompt": "a", "logit_bias": None}).logit_bias == ()


@pytest.mark.parametrize(
    ("field", "neutral", "other"),
    [
        ("min_tokens", 0, 1),
        ("min_tokens", None, False),
        ("best_of", 1, 2),
        ("echo", False, True),
        ("echo", None, 0),
        ("suffix", None, "end"),
    ],
)
def test_unsupported_fields_pass_only_at_their_neutral_value(field, neutral, other):
    parsed({"prompt": "a", field: neutral})
    error = refusal({"prompt": "a", field: other})
    assert str(error) == f"{field}: not supported; leave it out"
    assert error.body.error.code == "unsupported_field"


@pytest.mark.parametrize(
    ("field", "neutral", "other"),
    [
        ("tools", [], [{"type": "function"}]),
        ("response_format", {"type": "text"}, {"type": "json_object"}),
        ("service_tier", "auto", "priority"),
        ("modalities", ["text"], ["audio"]),
        ("store", False, True),
    ],
)
def test_unsupported_chat_fields_too(field, neutral, other):
    parsed({"messages": HELLO, field: neutral}, ChatRequest)
    error = refusal({"messages": HELLO, field: other}, ChatRequest)
    assert str(error) == f"{field}: not supported; leave it out"


@pytest.mark.parametrize(
    ("create", "model"),
    [(Completions.create, CompletionRequest), (ChatCompletions.create, ChatRequest)],
)
def test_every_field_of_openais_client_is_known(create, model):
    sent_elsewhere = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    fields = set(inspect.signature(create).parameters) - sent_elsewhere
    assert fields <= set(model.model_fields)


def test_text_parts_of_a_message_are_joined_by_lines():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = parsed({"messages": [{"role": "user", "content": parts}]}, ChatRequest)
    assert body.messages[0].content == "a\nb"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "content": "a"},
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "user", "content": []},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "user", "content": [{"type": "text", "text": "a", "extra": 1}]},
        {"role": "user", "content": "a", "tool_calls": [{}]},
        "hello",
    ],
)
def test_messages_that_are_not_text_are_refused(message):
    assert refusal({"messages": [message]}, ChatRequest).body.error.param.startswith("messages.0")


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]}, "tool_calls"),
        ({"role": "assistant", "tool_calls": [{"id": "a"}]}, "tool_calls"),
        ({"role": "assistant", "content": None, "function_call": {"name": "f"}}, "function_call"),
        ({"role": "assistant", "content": None, "audio": {"id": "a"}}, "audio"),
        ({"role": "assistant", "content": None}, "content"),
    ],
)
def test_a_feature_that_is_missing_is_named_rather_than_what_it_leaves_out(message, param):
    error = refusal({"messages": [*HELLO, message]}, ChatRequest).body.error
    assert error.param == f"messages.1.{param}"
    assert (error.code == "unsupported_field") == (param != "content")


def test_an_answer_of_ours_can_be_sent_back_as_a_message():
    message = {"role": "assistant", "content": "hi", "refusal": None, "tool_calls": None}
    parsed({"messages": [*HELLO, message]}, ChatRequest)


def test_users_have_names_in_any_script():
    for name in ("Jürgen", "用户 1", "a@b.example", "7f3a"):
        assert parsed({"prompt": "a", "user": name}).user == name


def test_a_long_list_of_wrong_items_is_refused_quickly():
    body = json.dumps({"prompt": "a", "stop_token_ids": ["x"] * 200_000}).encode()
    started = time.process_time()
    refusal(body)
    assert time.process_time() - started < 1
