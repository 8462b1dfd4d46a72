"""An engine behind the border answers as one without it, and forgets whoever is gone."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from configs.schema import Settings
from oracles.border import across_the_border
from oracles.engines import request_of
from oracles.random_bodies import TEXTS, is_same, question, said
from serving.border.engine_side import Line, welcome_for
from serving.border.in_process import Desk, InProcess
from serving.border.messages import (
    VERSION,
    Answer,
    Ask,
    FromEngine,
    Hello,
    frame,
)
from serving.framing import Frames
from serving.http.app import create_app
from serving.http.drain import Drain
from serving.http.responses import finite
from serving.requests import (
    ENGINE_GONE,
    DrainingError,
    EngineGoneError,
    Output,
    QueueFullError,
)

PROMPT = [40, 41, 42, 43]
PATHS = ("/v1/completions", "/v1/chat/completions")
TOLERANCE = 1e-3


async def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def is_idle(service) -> bool:
    pool = service.engine.scheduler.pool
    return service.inbox.num_inflight() == 0 and pool.num_available == pool.num_usable


async def answers(server, asked):
    app = create_app(server, Settings(target="examples/target"))
    transport = httpx.ASGITransport(app=app)
    client = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60)
    async with app.router.lifespan_context(app), client:
        return [(await client.post(path, json=body)).json() for path, body in asked]


def test_random_bodies_are_answered_as_without_the_border_and_without_drafts(service):
    numbers = random.Random(3)
    asked = [
        (path, question(numbers, "chat" in path, numbers.choice(TEXTS), vocab_size=288))
        for path in PATHS * 8
    ]
    plain = [(path, {**body, "speculation": {"max_draft": 0}}) for path, body in asked]

    async def across():
        async with across_the_border(service) as server:
            return await answers(server, asked)

    wanted, came = asyncio.run(answers(InProcess(service), plain)), asyncio.run(across())
    assert sum(answer["speculation"]["proposed"] for answer in came) > 0
    for one, other in zip(wanted, came, strict=True):
        assert is_same(said(one), said(other), TOLERANCE)


def test_a_job_is_queued_whole_or_not_at_all(service):
    num_room = service.engine.parts.inbox.limits.max_queue

    async def scenario():
        came: list[Output] = []
        async with across_the_border(service) as server:
            long = [request_of(f"long{i}", PROMPT, 200) for i in range(4)]
            await server.submit(long, came.append)
            await until(lambda: service.inbox.num_waiting() == 0)
            full = [request_of(f"full{i}", PROMPT, 200) for i in range(num_room + 1)]
            with pytest.raises(QueueFullError):
                await server.submit(full, came.append)
            await until(lambda: service.inbox.num_waiting() == 0)
            bad = [request_of("good", PROMPT, 2), request_of("bad", [10**6], 2)]
            with pytest.raises(ValueError, match="outside 0"):
                await server.submit(bad, came.append)
            server.cancel([request.id for request in long])
            await until(lambda: is_idle(service))
        assert {output.request_id for output in came} <= {request.id for request in long}

    asyncio.run(scenario())


def test_whatever_may_be_asked_is_answered_as_in_the_process_itself(service):
    async def asked(server):
        return (
            await server.complaint(),
            (await server.figures()).steps_by_arm,
            finite(await server.drafter_status()),
            await server.history(0.0),
            server.can_swap,
            server.model,
        )

    async def scenario():
        async with across_the_border(service) as server:
            with pytest.raises(ValueError, match="no drafter that learns"):
                await server.swap(1)
            assert (await server.policy_figures()).keys() == service.policy.figures().keys()
            return await asked(server), await asked(InProcess(service))

    across, here = asyncio.run(scenario())
    assert across == here


def test_requests_of_a_process_that_is_gone_are_cancelled(service):
    async def scenario():
        async with across_the_border(service) as server:
            await server.submit([request_of("left", PROMPT, 200, ignore_eos=True)], lambda _: None)
        await until(lambda: is_idle(service))

    asyncio.run(scenario())


def test_a_process_cannot_cancel_what_another_one_asked_for(service):
    async def scenario():
        ends: list[str | None] = []
        async with across_the_border(service) as one, across_the_border(service) as other:
            theirs = [request_of("theirs", PROMPT, 100, ignore_eos=True)]
            await one.submit(theirs, lambda output: ends.append(output.finish_reason))
            other._wire._takers["theirs"] = ends.append  # it pretends that it was its own
            other.cancel(["theirs"])
            await until(lambda: ends and ends[-1] is not None)
        assert ends[-1] == "length"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("first", "why"),
    [
        pytest.param(Ask(1, "figures"), "Ask came before Hello", id="no greeting"),
        pytest.param(Hello(VERSION + 1), "start the server again", id="another version"),
    ],
)
def test_a_stranger_is_shown_the_door(service, first, why):
    ours, theirs = socket.socketpair()
    desk = Desk(service)
    with ThreadPoolExecutor(1) as slowly, theirs:
        line = Line(ours, desk, welcome_for(desk, Settings(), Path()), slowly)
        line.start()
        theirs.settimeout(60)
        theirs.sendall(frame(first))
        assert theirs.recv(1) == b""
        line.end()
    assert line.is_over and line.problem is not None and why in line.problem


def test_a_slow_question_delays_no_other(service, monkeypatch):
    """The status reads the run folder, which may be on a disk that hangs."""
    ours, theirs = socket.socketpair()
    desk = Desk(service)
    monkeypatch.setattr(service, "drafter_status", lambda: time.sleep(0.5) or {})
    with ThreadPoolExecutor(1) as slowly, theirs:
        line = Line(ours, desk, welcome_for(desk, Settings(), Path()), slowly)
        line.start()
        asked = (Hello(VERSION), Ask(1, "status"), Ask(2, "complaint"))
        theirs.sendall(b"".join(map(frame, asked)))
        theirs.settimeout(60)
        frames: Frames[FromEngine] = Frames(FromEngine)
        numbers: list[int] = []
        while len(numbers) < 2:
            came = frames.feed(theirs.recv(1 << 16))
            numbers += [message.number for message in came if isinstance(message, Answer)]
        line.end()
    assert numbers == [2, 1]


def test_an_engine_that_cannot_go_on_tells_its_clients_and_ends_the_server(
    new_service, monkeypatch
):
    """As after an error that leaves the device unusable: the step fails, and so does what follows
    a failed step."""
    service = new_service()
    engine = service.engine
    drain = Drain(service.inbox, 30.0, lambda: engine.has_failed)

    def lost() -> bool:
        raise RuntimeError("device is lost")

    async def scenario():
        ends: list[Output] = []
        async with across_the_border(service) as server:
            await server.submit([request_of("a", PROMPT, 200, ignore_eos=True)], ends.append)
            await until(lambda: ends)
            assert drain.tick() is None
            monkeypatch.setattr(engine, "_fail_all", lost)
            monkeypatch.setattr(engine, "step", lost)
            await until(lambda: ends[-1].finish_reason)
            await until(lambda: engine.has_failed)
            with pytest.raises(DrainingError):
                await server.submit([request_of("b", PROMPT, 2)], ends.append)
            assert await server.complaint() == "the engine does not run"
        assert ends[-1].error_code == ENGINE_GONE

    asyncio.run(scenario())
    assert drain.tick() is not None
    assert drain.exit_code == 1


def test_when_the_engines_process_is_gone_nobody_waits_for_it(service):
    async def scenario():
        ends: list[Output] = []
        async with across_the_border(service) as server:
            await server.submit([request_of("a", PROMPT, 200, ignore_eos=True)], ends.append)
        await until(lambda: ends and ends[-1].finish_reason)
        assert ends[-1].error_code == ENGINE_GONE
        with pytest.raises(EngineGoneError):
            await server.submit([request_of("b", PROMPT, 2)], ends.append)
        with pytest.raises(EngineGoneError):
            await server.figures()
        (refusal,) = await answers(server, [(PATHS[0], {"prompt": "a"})])
        assert refusal["error"]["code"] == ENGINE_GONE
        server.cancel(["a"])
        await until(lambda: is_idle(service))

    asyncio.run(scenario())


def test_the_engine_sees_no_choice_before_all_are_accepted(service, monkeypatch):
    """However long the check of the last one takes: the first must not begin meanwhile."""
    inbox, came = service.inbox, []
    right, seen = inbox._check, threading.Event()

    def slow(request):
        if request.id == "bad":
            seen.wait(0.5)
        right(request)

    monkeypatch.setattr(inbox, "_check", slow)
    good, bad = request_of("good", PROMPT, 2), request_of("bad", [10**6], 2)
    with pytest.raises(ValueError, match="outside 0"):
        Desk(service).submit([good, bad], lambda output: (came.append(output), seen.set()))
    assert came == []
    assert inbox.num_inflight() == 0


def test_in_one_process_outputs_come_in_order_on_the_loops_own_thread(service):
    async def scenario():
        came: list[tuple[int, Output]] = []
        requests = [request_of(str(number), PROMPT, 30, ignore_eos=True) for number in range(4)]
        server = InProcess(service)
        await server.submit(requests, lambda one: came.append((threading.get_ident(), one)))
        await until(lambda: sum(one.finish_reason is not None for _, one in came) == 4)
        return came

    came = asyncio.run(scenario())
    assert {thread for thread, _ in came} == {threading.get_ident()}
    for number in range(4):
        own = [one for _, one in came if one.request_id == str(number)]
        assert [one.stats.steps for one in own] == sorted(one.stats.steps for one in own)
        assert sum(len(one.token_ids) for one in own) == 30
        assert own[-1].finish_reason == "length"


def test_in_one_process_an_engine_goes_on_when_the_loop_is_closed(service):
    async def leave():
        request = request_of("left", PROMPT, 100, ignore_eos=True)
        await InProcess(service).submit([request], lambda _: None)

    asyncio.run(leave())
    asyncio.run(until(lambda: is_idle(service)))
    came: list[Output] = []
    Desk(service).submit([request_of("after", PROMPT, 2)], came.append)
    asyncio.run(until(lambda: came and came[-1].finish_reason is not None))
    assert service.engine.complaint() is None
