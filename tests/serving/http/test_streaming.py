"""From the engine's thread to a client: no output is lost, nobody waits, nothing leaks."""

from __future__ import annotations

import asyncio
import socket
import time
from types import SimpleNamespace

import pytest

from serving.http import streaming
from serving.http.streaming import EventStream, Mailbox
from serving.requests import Output, SpeculationStats, TokenLogprob, join_outputs
from tests.serving.http.live import LiveServer


def output(text: str, *tokens: int, reason=None, logprobs=None, steps=1) -> Output:
    stats = SpeculationStats(drafter_version=0, steps=steps, proposed=0, accepted=0)
    return Output("r", text, tokens, logprobs, reason, stats, 3, 0)


def test_joined_outputs_say_what_the_parts_said():
    first = output("He", 1, 2, logprobs=(TokenLogprob(1, -0.5, ()), TokenLogprob(2, -1.0, ())))
    second = output("llo", 3, logprobs=(TokenLogprob(3, -0.1, ()),), reason="stop", steps=2)

    joined = join_outputs([first, second])

    assert (joined.text, joined.token_ids, joined.finish_reason) == ("Hello", (1, 2, 3), "stop")
    assert [entry.token_id for entry in joined.logprobs] == [1, 2, 3]
    assert joined.stats.steps == 2


def test_joined_outputs_without_logprobs_have_none():
    assert join_outputs([output("a", 1), output("b", 2)]).logprobs is None


def test_a_mailbox_gives_everything_once_and_in_order():
    async def scenario():
        mailbox, tokens = Mailbox(), []

        async def engine():
            for token in range(2000):
                mailbox.put(output("x", token))
                if token % 3 == 0:
                    await asyncio.sleep(0)

        putting = asyncio.create_task(engine())
        while len(tokens) < 2000:
            tokens += [t for arrival in await mailbox.take() for t in arrival.output.token_ids]
        await putting
        return tokens

    assert asyncio.run(asyncio.wait_for(scenario(), 20)) == list(range(2000))


def test_putting_never_waits_for_a_reader():
    async def scenario():
        mailbox = Mailbox()
        for token in range(10_000):
            mailbox.put(output("x", token))
        return await mailbox.take()

    assert len(asyncio.run(scenario())) == 10_000


class Client:
    """The other end of one response, as a server would drive it."""

    def __init__(self, reads: int, leaves_after_s: float | None = None) -> None:
        self.received: list[dict] = []
        self._reads = reads
        self._leaves_after_s = leaves_after_s

    async def send(self, message) -> None:
        if len(self.received) >= self._reads:
            await asyncio.Event().wait()  # the socket is full and stays full
        self.received.append(message)

    async def receive(self):
        if self._leaves_after_s is None:
            await asyncio.Event().wait()
        await asyncio.sleep(self._leaves_after_s)
        return {"type": "http.disconnect"}


class Told:
    """Events that are known."""

    def __init__(self, *events: bytes | Exception, pause_s: float = 0.0) -> None:
        self._left = list(events)
        self._pause_s = pause_s

    @property
    def is_over(self) -> bool:
        return not self._left

    def write_with(self, write) -> None:
        raise AssertionError("nobody offered it")

    async def next(self) -> bytes:
        await asyncio.sleep(self._pause_s)
        data = self._left.pop(0)
        if isinstance(data, Exception):
            raise data
        return data


def endless() -> Told:
    return Told(*[b"data: x\n\n"] * 100_000, pause_s=0.001)


def answer(client: Client, events, stall_s: float = 5.0) -> list[str]:
    """Run one response to its end. Returns how often it was closed."""
    closed: list[str] = []
    request = SimpleNamespace(state=SimpleNamespace(request_id="id-1"))

    async def run():
        stream = EventStream(events, request, lambda: closed.append("closed"), stall_s)
        await asyncio.wait_for(stream({"type": "http"}, client.receive, client.send), 10)

    asyncio.run(run())
    return closed


def test_a_client_that_stops_reading_is_given_up(caplog):
    client = Client(reads=3)
    assert answer(client, endless(), stall_s=0.1) == ["closed"]
    assert "id-1" in caplog.text and "read nothing" in caplog.text


def test_a_client_that_leaves_ends_the_request():
    client = Client(reads=1_000_000, leaves_after_s=0.05)
    assert answer(client, endless()) == ["closed"]


def test_a_complete_stream_is_closed_too():
    client = Client(reads=100)
    assert answer(client, Told(b"data: 1\n\n", b"data: 2\n\n")) == ["closed"]
    assert [m.get("body") for m in client.received[1:]] == [b"data: 1\n\n", b"data: 2\n\n"]
    assert [m["more_body"] for m in client.received[1:]] == [True, False]


def test_a_failure_of_ours_becomes_a_last_event_without_its_text(caplog):
    prompt = "secret"

    client = Client(reads=100)
    answer(client, Told(b"data: 1\n\n", RuntimeError(prompt)))
    last_event = client.received[-1]["body"]
    assert client.received[-1]["more_body"] is False
    assert b"internal_error" in last_event and b"id-1" in last_event
    assert b"secret" not in last_event
    assert "secret" not in caplog.text and "RuntimeError" in caplog.text


def test_the_default_patience_is_bounded():
    assert 0 < streaming.STALL_S <= 60


@pytest.mark.parametrize("data", ["{}", '{"text":"a b"}'])
def test_an_event_is_one_frame(data):
    assert streaming.event(data) == f"data: {data}\n\n".encode()


def test_small_answers_are_not_held_back(server: LiveServer):
    """With Nagle's algorithm on, each would wait 40 ms for the client's delayed ACK."""
    times = []
    with server.client() as client:
        for _ in range(60):  # the first few are acknowledged at once in any case
            started = time.perf_counter()
            client.get("/health")
            times.append(time.perf_counter() - started)
    assert sorted(times[20:])[10] < 0.035


def raw_answer(server: LiveServer, version: str) -> tuple[str, bytes]:
    """Head and body of a stream of 4 tokens, as they are on the wire until the server closes."""
    body = b'{"prompt": "ab", "max_tokens": 4, "ignore_eos": true, "stream": true}'
    lines = (
        f"POST /v1/completions {version}", "Host: x", "Content-Type: application/json",
        f"Content-Length: {len(body)}", "Connection: close",
    )  # fmt: skip
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as link:
        link.sendall("\r\n".join((*lines, "", "")).encode() + body)
        data = b"".join(iter(lambda: link.recv(1 << 16), b""))
    head, _, rest = data.partition(b"\r\n\r\n")
    return head.decode().lower(), rest


def test_a_client_that_does_not_know_chunks_gets_none(server: LiveServer):
    head, body = raw_answer(server, "HTTP/1.0")

    assert "transfer-encoding" not in head
    assert body.startswith(b"data: {") and body.endswith(b"data: [DONE]\n\n")


def test_every_chunk_on_the_wire_says_how_long_it_is(server: LiveServer):
    head, body = raw_answer(server, "HTTP/1.1")
    parts = []
    while True:
        size, _, rest = body.partition(b"\r\n")
        part, end, body = (
            rest[: int(size, 16)],
            rest[int(size, 16) :][:2],
            rest[int(size, 16) + 2 :],
        )
        assert end == b"\r\n"
        if not part:
            break
        parts.append(part)

    assert "transfer-encoding: chunked" in head and body == b""
    assert all(part.startswith(b"data: {") or part == b"data: [DONE]\n\n" for part in parts)
    assert b"".join(parts).endswith(b"}\n\ndata: [DONE]\n\n")
