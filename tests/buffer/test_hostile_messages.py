"""What a process may send to the holder of a buffer in memory, and what a false holder may answer:
it loses its connection and is counted, and nothing else happens."""

from __future__ import annotations

import json
import random
import resource
import socket
import struct
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

import pytest

from buffer.interface import MAX_UNREADABLE_BYTES, ServiceAwayError, TraceLimits
from buffer.memory import DEFAULT_BYTES
from buffer.socket_buffer import SocketBackend
from buffer.socket_messages import (
    BATCH_BYTES,
    MAX_CLAIMS,
    MAX_RECORDS,
    BadMessageError,
    claimed_of,
)
from buffer.socket_wire import Line, connect, listen
from buffer.socket_writer import SocketWriter

LIMITS = TraceLimits(segment_bytes=4096, max_bytes=1 << 24, ttl_s=3600.0, sync_interval_s=0.0)
WRITE = {
    "op": "write",
    "name": "w1",
    "limits": {"segment_bytes": 1, "max_bytes": 1 << 24, "ttl_s": 60.0, "sync_interval_s": 0},
}
pytestmark = pytest.mark.timeout(60)


def packed(header: object, body: bytes = b"", *, num_body: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<IQ", len(text), len(body) if num_body is None else num_body) + text + body


@pytest.fixture
def backend(tmp_path):
    made = SocketBackend("socket:", tmp_path)
    assert made.host()
    yield made
    made._host.close()


def with_limits(**values: object) -> dict[str, object]:
    return WRITE | {"limits": WRITE["limits"] | values}


BAD: dict[str, list[bytes]] = {
    "4 GiB of header": [struct.pack("<IQ", 0xFFFF_FFFF, 0)],
    "4 MiB and a byte of header": [struct.pack("<IQ", (4 << 20) + 1, 0)],
    "nested": [packed(b"[" * 200_000)],
    "no object": [packed([1])],
    "no text": [packed(b"\xff\xfe")],
    "no request": [packed({})],
    "unknown request": [packed({"op": "exec"})],
    "request that is no text": [packed({"op": ["write"]})],
    "request with more": [packed({"op": "tend", "more": 1})],
    "key given twice": [packed(b'{"op": "tend", "op": "stats"}')],
    "tend before write": [packed({"op": "tend"})],
    "append before write": [packed({"op": "append", "first": 0, "sizes": []})],
    "read before open": [packed({"op": "read", "max_records": 1, "max_bytes": 1})],
    "commit before open": [packed({"op": "commit", "offsets": {}})],
    "body of stats": [packed({"op": "stats"}, num_body=1)],
    "body of keep": [packed({"op": "keep", "name": "x"}, num_body=MAX_UNREADABLE_BYTES + 1)],
    "name of keep": [packed({"op": "keep", "name": "x" * 600})],
    "tenant": [packed({"op": "delete", "tenant": 5, "until_ms": None})],
    "delete without a time": [packed({"op": "delete", "tenant": "a"})],
    "negative time": [packed({"op": "delete", "tenant": "a", "until_ms": -1})],
    "time of 80 bits": [packed({"op": "delete", "tenant": "a", "until_ms": 2**80})],
    "digest": [packed({"op": "undelete", "digest": 5})],
    "long digest": [packed({"op": "undelete", "digest": "x" * 600})],
    "group": [packed({"op": "open", "group": 5, "offsets": None})],
    "offsets": [packed({"op": "open", "group": None, "offsets": [1]})],
    "negative offset": [packed({"op": "open", "group": None, "offsets": {"w": -1}})],
    "huge offset": [packed({"op": "open", "group": None, "offsets": {"w": 2**80}})],
    "offset of a list": [packed({"op": "open", "group": "g", "offsets": {"member": []}})],
    **{
        f"write {values}": [packed(with_limits(**values))]
        for values in (
            {"ttl_s": "60"},
            {"ttl_s": None},
            {"ttl_s": -1},
            {"ttl_s": True},
            {"ttl_s": 1e300},
            {"max_bytes": 2**80},
            {"max_bytes": 1.5},
            {"max_bytes": 0},
            {"segment_bytes": None},
            {"segment_bytes": 1 << 30},
            {"sync_interval_s": []},
            {"more": 1},
        )
    },
    "NaN": [packed(json.dumps(with_limits(ttl_s=float("nan"))).encode())],
    "name": [packed(WRITE | {"name": 7})],
    "name with a path": [packed(WRITE | {"name": "../x"})],
    "no limits": [packed({"op": "write", "name": "w1"})],
    **{
        f"append {first} {str(sizes)[:30]} {num_body}": [
            packed(WRITE),
            packed({"op": "append", "first": first, "sizes": sizes}, num_body=num_body),
        ]
        for first, sizes, num_body in (
            (0, [2**40], 2**40),
            (0, [BATCH_BYTES + 1], BATCH_BYTES + 1),
            (0, [1], 2),
            (0, [-1, 2], 1),
            (0, [True], 1),
            (0, ["1"], 1),
            (0, [1.0], 1),
            (0, "1", 1),
            (-1, [1], 1),
            (2**80, [1], 1),
            (None, [1], 1),
            (0, [0] * (MAX_RECORDS + 1), 0),
        )
    },
    "append as many records as bytes": [
        packed(WRITE),
        # As bytes: to write millions of numbers takes two seconds of each process that collects.
        packed(
            b'{"op": "append", "first": 0, "sizes": [' + b"1, " * BATCH_BYTES + b"1]}",
            num_body=BATCH_BYTES + 1,
        ),
    ],
    "commit without a member": [
        packed({"op": "open", "group": "g", "offsets": None}),
        packed({"op": "commit", "offsets": {"member": 1.5}}),
    ],
    "claim before open": [packed({"op": "claim", "traces": []})],
    **{
        f"claim {str(traces)[:60]}": [
            packed({"op": "open", "group": "g", "offsets": None}),
            packed({"op": "claim", "traces": traces}),
        ]
        for traces in (
            {},
            [5],
            [["w1", "0", "server-1", 1]],
            [["w1", "0", "server-1", 1, 2, 3]],
            [["../x", "0", "server-1", 1, 2]],
            [["w1", 0, "server-1", 1, 2]],
            [["w1", "-1", "server-1", 1, 2]],
            [["w1", "0-1", "server-1", 1, 2]],
            [["w1", "9" * 5000, "server-1", 1, 2]],
            [["w1", "0", 5, 1, 2]],
            [["w1", "0", "x" * 5000, 1, 2]],
            [["w1", "0", "server-1", -1, 2]],
            [["w1", "0", "server-1", True, 2]],
            [["w1", "0", "server-1", 1, 2**63]],
            [["w1", "0", "server-1", 1, 2]] * (MAX_CLAIMS + 1),
        )
    },
    "read of a text": [
        packed({"op": "open", "group": "g", "offsets": None}),
        packed({"op": "read", "max_records": "1", "max_bytes": 1}),
    ],
}


def exchange(path: Path, messages: list[bytes]) -> bool:
    """Send messages; returns whether the holder has ended the connection after the last."""
    with closing(connect(path)) as line:
        for message in messages[:-1]:
            line._socket.sendall(message)
            assert "error" not in line.receive()[0]
        with suppress(OSError):  # it may hang up before all was sent
            line._socket.sendall(messages[-1])
        try:
            line.receive()
        except ConnectionError:
            return True
        return False


def check_it_works(tmp_path: Path, backend: SocketBackend) -> None:
    """The holder's threads are all there, and it takes records from others."""
    names = [thread.name for thread in threading.enumerate()]
    assert {"buffer-host", "buffer-tend"} <= set(names)
    before = backend.stats().held
    with SocketWriter(tmp_path / "traces.sock", LIMITS) as writer:
        writer.append(b"sound")
        assert len(writer.sync()) == 1
    assert backend.stats().held == before + 1


def ended_threads(recwarn):
    """Warnings of threads that ended with an exception."""
    kind = pytest.PytestUnhandledThreadExceptionWarning
    return [one for one in recwarn.list if issubclass(one.category, kind)]


@pytest.mark.parametrize("messages", BAD.values(), ids=BAD.keys())
def test_a_process_that_sends_what_none_of_ours_sends_loses_its_connection(
    tmp_path, backend, messages, recwarn
):
    began_s = time.monotonic()
    assert exchange(tmp_path / "traces.sock", messages)
    assert time.monotonic() - began_s < 4, "it waited for what was announced"
    assert backend._host.refused == 1
    assert [report.connections for report in backend.reports(LIMITS)] == [1]
    [report] = SocketBackend("socket:", tmp_path).reports(LIMITS)
    assert report.to_line().startswith("refused: 1 connections")
    check_it_works(tmp_path, backend)
    assert not ended_threads(recwarn)


def test_what_is_announced_takes_no_memory_until_it_comes(tmp_path, backend):
    largest = DEFAULT_BYTES // 2
    write = with_limits(max_bytes=None)
    append = {"op": "append", "first": 0, "sizes": [largest]}
    lines: list[Line] = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(20):
        line = connect(tmp_path / "traces.sock")
        lines.append(line)
        line._socket.sendall(packed(write | {"name": f"w{number}"}))
        line.receive()
        line._socket.sendall(packed(append, num_body=largest) + b"some")
    check_it_works(tmp_path, backend)
    for line in lines:
        line.close()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10  # KiB


def test_fuzzed_messages_end_no_thread(tmp_path, backend, recwarn):
    drawn = random.Random(7)
    sound = [
        packed(WRITE),
        packed({"op": "append", "first": 0, "sizes": [3, 4]}, b"onetwo!"),
        packed({"op": "open", "group": "g", "offsets": None}),
        packed({"op": "read", "max_records": 4, "max_bytes": 100}),
        packed({"op": "commit", "offsets": {"member": "x", "handed": 1}}),
        packed({"op": "claim", "traces": [["w1", "0", "server-1", 1, 2]]}),
        packed({"op": "stats"}),
        packed({"op": "delete", "tenant": "a", "until_ms": 5}),
        packed({"op": "undelete", "digest": "a"}),
        packed({"op": "kept"}),
    ]
    for _ in range(400):
        sent = bytearray(b"".join(drawn.choices(sound, k=drawn.randrange(1, 5))))
        for _ in range(drawn.randrange(0, 6)):
            at = drawn.randrange(len(sent))
            if drawn.random() < 0.5:
                sent[at] = drawn.randrange(256)
            else:
                del sent[at : at + drawn.randrange(1, 9)]
        with closing(connect(tmp_path / "traces.sock")) as line, suppress(OSError):
            line._socket.sendall(sent)
            line._socket.shutdown(socket.SHUT_WR)
            while line._socket.recv(1 << 16):
                pass
    assert backend._host.refused > 50
    check_it_works(tmp_path, backend)
    assert not ended_threads(recwarn)


@pytest.mark.parametrize("found", [None, {}, [], [True], [True, False, True], [True, 1]], ids=str)
def test_a_false_holder_decides_no_claim(found):
    assert claimed_of({"is_first": [True, False]}, 2) == [True, False]
    with pytest.raises(BadMessageError):
        claimed_of({"is_first": found}, 2)


ANSWERS = [
    {},
    {"have": "1", "evicted": [0, 0]},
    {"have": -1, "evicted": [0, 0]},
    {"have": 1, "evicted": [0]},
    {"have": 1, "evicted": {"a": 1}},
    {"have": 2**80, "evicted": [0, 0]},
    {"was_listed": 1, "deleted": {"records": 0, "num_bytes": 0, "quarantined": 0}},
    {"error": {"a": 1}, "errno": "x"},
    {"error": "no", "errno": None},
    [1],
]


@pytest.mark.parametrize("answer", ANSWERS, ids=map(str, ANSWERS))
def test_a_false_holder_costs_a_server_or_trainer_the_connection_alone(tmp_path, answer):
    path = tmp_path / "traces.sock"
    listening = listen(path)

    def answers() -> None:
        with suppress(OSError):
            while True:
                connected, _ = listening.accept()
                connected.recv(1 << 16)
                connected.sendall(packed(answer))
                connected.close()

    threading.Thread(target=answers, daemon=True).start()
    backend = SocketBackend("socket:", tmp_path)
    try:
        writer = SocketWriter(path, LIMITS)
        writer.append(b"waits")
        with pytest.raises(ServiceAwayError):
            writer.sync()
        assert writer.counts.pending == 1
        for ask in (
            backend.stats,
            backend.unreadable,
            backend.deletions,
            lambda: backend.delete("x"),
            lambda: backend.undelete("x"),
            lambda: backend.open_record_reader().read(1),
        ):
            with pytest.raises((OSError, ValueError)):
                ask()
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
