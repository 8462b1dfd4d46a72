"""Requests that begin: one in each turn of the event loop, as FastAPI would answer them."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute

from configs.schema import Settings
from oracles.support import tiny_tokenizer
from serving.http.app import create_app
from serving.http.generation_route import GenerationRoute
from serving.http.ids import new_id
from serving.http.turns import Turns
from serving.requests import DrainingError
from serving.served_model import ServedModel


def passed(num_tasks: int, cancelled: tuple[int, ...] = ()) -> list[tuple[int, int]]:
    """(turn of the loop, task) in the order in which tasks passed that all came in one turn."""
    found: list[tuple[int, int]] = []

    async def scenario() -> None:
        turns, turn = Turns(), 0

        def count() -> None:
            nonlocal turn
            turn += 1
            asyncio.get_running_loop().call_soon(count)

        async def one(number: int) -> None:
            await turns.mine()
            found.append((turn, number))

        count()
        tasks = [asyncio.create_task(one(number)) for number in range(num_tasks)]
        await asyncio.sleep(0)
        for number in cancelled:
            tasks[number].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asyncio.wait_for(turns.mine(), 5)  # nobody keeps the turn

    asyncio.run(scenario())
    return found


def test_tasks_that_come_together_pass_one_in_a_turn_and_in_order() -> None:
    found = passed(5)

    assert [number for _, number in found] == [0, 1, 2, 3, 4]
    assert len({turn for turn, _ in found}) == 5


def test_a_task_that_is_cancelled_passes_its_turn_on() -> None:
    assert [number for _, number in passed(5, cancelled=(1, 2, 4))] == [0, 3]


def test_ids_are_different_words_also_in_a_process_that_was_forked() -> None:
    ids = {new_id() for _ in range(1000)}
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        os.write(writing, new_id().encode())
        os._exit(0)
    os.waitpid(pid, 0)
    other = os.read(reading, 64).decode()

    assert len(ids) == 1000 and all(len(one) == 32 and int(one, 16) >= 0 for one in ids)
    assert other not in ids and other != new_id()


class Refuses:
    """A ``RunningServer`` that takes no request."""

    can_swap = False

    def __init__(self) -> None:
        self.model = ServedModel("tiny", tiny_tokenizer(), 288, 64, 4, 0)
        self.asked: list[Any] = []

    async def submit(self, requests: Any, on_output: Any) -> None:
        self.asked += requests
        raise DrainingError("it does not")


JSON = {"content-type": "application/json"}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
GOOD = b'{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "seed": 1}'
ASKED = [
    ("POST", CHAT, GOOD, JSON),
    ("POST", TEXT, b'{"prompt": "hi", "stream": true}', JSON),
    ("POST", TEXT, b'{"prompt": ["a", "b"], "n": 2}', JSON | {"x-slipstream-no-capture": "1"}),
    ("POST", CHAT, GOOD, JSON | {"X-Slipstream-No-Capture": "yes"}),
    ("POST", CHAT, GOOD, [*JSON.items(), ("x-slipstream-no-capture", "1"),
                          ("x-slipstream-no-capture", "2")]),
    ("POST", CHAT, GOOD, {"content-type": "text/plain"}),
    ("POST", CHAT, GOOD, JSON | {"authorization": "Bearer wrong"}),
    ("POST", CHAT, GOOD, JSON | {"authorization": "Bearer key", "x-slipstream-no-capture": ""}),
    ("POST", CHAT, b'{"messages": [], "max_token": 3}', JSON),
    ("POST", CHAT, b'{"messages": ', JSON),
    ("POST", CHAT, b"[" * 40 + b"]" * 40, JSON),
    ("POST", TEXT, b"{}", JSON),
    ("POST", TEXT, b"", {}),
    ("POST", TEXT, b'{"prompt": "hi", "model": "other"}', JSON),
    ("POST", TEXT, b'{"prompt": "' + b"a" * 200 + b'"}', JSON),
    ("GET", CHAT, b"", {}),
    ("PUT", TEXT, GOOD, JSON),
    ("OPTIONS", TEXT, b"", {}),
]  # fmt: skip


@pytest.mark.parametrize("key", [None, "key"])
def test_every_refusal_is_that_of_fastapi(key: str | None) -> None:
    """The quick way against the one on which FastAPI resolves what the route declares."""
    settings = Settings().model_copy(deep=True)
    server_settings = settings.server.model_copy(update={"api_key": key})
    settings = settings.model_copy(update={"server": server_settings})

    async def answers(is_quick: bool) -> list[Any]:
        server: Any = Refuses()
        app = create_app(server, settings)
        routes = [route for route in app.router.routes if isinstance(route, GenerationRoute)]
        assert {route.path for route in routes} == {CHAT, TEXT}
        if not is_quick:
            for route in routes:
                route.handle = APIRoute.handle.__get__(route)  # type: ignore[method-assign]
        transport = httpx.ASGITransport(app=app)
        found = []
        try:
            async with httpx.AsyncClient(
                transport=transport, base_url="http://127.0.0.1"
            ) as client:
                for method, path, body, headers in ASKED:
                    answer = await client.request(method, path, content=body, headers=headers)
                    del answer.headers["x-request-id"]
                    found.append((answer.status_code, answer.text, dict(answer.headers)))
        finally:
            for route in routes:
                vars(route).pop("handle", None)
        said = [(one.prompt_ids, one.sampling, one.capture, one.tenant) for one in server.asked]
        return [*found, said]

    quick, thorough = asyncio.run(answers(True)), asyncio.run(answers(False))

    for asked, one, other in zip(ASKED, quick, thorough, strict=False):
        assert one == other, asked
    assert quick[-1] == thorough[-1]
    statuses = {one[0] for one in quick[:-1]}
    assert statuses == ({400, 404, 405, 415, 503} if key is None else {400, 401, 405})
