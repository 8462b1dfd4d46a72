"""Conversations through chat templates, those of well-known targets among them."""

from __future__ import annotations

import asyncio

import pytest

from oracles.support import tiny_tokenizer
from serving.http.errors import ApiError
from serving.http.prompts import PromptEncoder
from tests.serving.http.live import MODEL, LiveServer

SYSTEM = {"role": "system", "content": "be brief"}
USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}

GEMMA = (
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ message['role'] }}: {{ message['content'] | trim }}\n{% endfor %}"
)
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "system: You are helpful.\n{% endif %}"
    "{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def text_of(template: str, *messages: dict[str, str]) -> str:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    encoder = PromptEncoder(tokenizer)
    try:
        return tokenizer.decode(asyncio.run(encoder.encode_chat(messages, most=1000)))
    finally:
        encoder.close()


def test_a_template_adds_its_own_system_prompt_only_where_there_is_none():
    assert text_of(CHATML, USER) == "system: You are helpful.\nuser: hi\nassistant: "
    assert text_of(CHATML, SYSTEM, USER) == "system: be brief\nuser: hi\nassistant: "


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ((SYSTEM, USER), "System role not supported"),
        ((USER, USER), "Conversation roles must alternate"),
        ((ASSISTANT,), "Conversation roles must alternate"),
    ],
)
def test_a_template_may_refuse_messages_and_says_why(messages, reason):
    with pytest.raises(ApiError) as caught:
        text_of(GEMMA, *messages)
    error = caught.value.body.error
    assert (caught.value.status, error.code, error.param) == (400, "chat_template", "messages")
    assert error.message == f"the target's chat template refuses these messages: {reason}"


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ range(1000000) | list | length }}", "OverflowError"),
        ("{{ 1 // (messages | length - 1) }}", "ZeroDivisionError"),
        ("{{ '{:d}'.format(messages[0].content) }}", "ValueError"),
        ("{{ messages[0].content.split('=')[1].strip() }}", None),
        ("{{ messages[0].nothing.at_all }}", None),
    ],
)
def test_a_template_that_fails_is_the_requests_error_and_quotes_no_message(template, fault):
    with pytest.raises(ApiError) as caught:
        text_of(template, USER)
    error = caught.value.body.error
    assert (caught.value.status, error.code) == (400, "chat_template")
    assert fault is None or f"({fault})" in error.message
    assert "'hi'" not in error.message


@pytest.mark.parametrize(
    "template", ["{% for x in %}", "a\n{{ 'hi' | no_such_filter }}", "{% if %"]
)
def test_a_template_that_is_not_valid_is_the_servers_error(template):
    """Its messages are as good as any, and another try fails as well."""
    with pytest.raises(ApiError) as caught:
        text_of(template, USER)
    error = caught.value.body.error
    assert (caught.value.status, error.code, error.param) == (500, "chat_template", None)
    line = template.count("\n") + 1
    assert error.message.startswith(f"the target's chat template is not valid (line {line}: ")
    assert caught.value.headers == {"x-should-retry": "false"}


def test_developer_is_the_newer_name_of_system(server: LiveServer):
    def prompt_ids(role: str) -> list[int]:
        body = {
            "model": MODEL,
            "messages": [{"role": role, "content": "be brief"}, USER],
            "max_tokens": 1,
            "return_token_ids": True,
        }
        with server.client() as client:
            return client.post("/v1/chat/completions", json=body).json()["prompt_token_ids"]

    assert prompt_ids("developer") == prompt_ids("system") != prompt_ids("user")
