"""Every backend gets a copied trace exactly once, however often the copy is started, and a replayed
one as often as it is sent."""

import dataclasses

import pytest

from buffer.backends import open_backend
from buffer.codec import decode_trace, encode_trace
from buffer.interface import TraceLimits
from buffer.records import Sampling
from buffer.resend import Wanted, copy_traces, replay_traces

LIMITS = TraceLimits(segment_bytes=1 << 20, max_bytes=1 << 26, ttl_s=1e9, sync_interval_s=0.0)


@pytest.fixture
def source(tmp_path, make_trace):
    """A log with seven traces, one of them twice, and a record that is none."""
    backend = open_backend("log:", tmp_path / "source")
    with backend.open_trace_writer(LIMITS) as writer:
        for seq in (0, 1, 2, 3, 4, 5, 6, 3):
            sampling = Sampling({"temperature": 0.0, "domain": ("code", "mail")[seq % 2]})
            trace = make_trace(
                seq=seq,
                tenant=("acme", "umbrella", "acme")[seq % 3],
                sampling=sampling,
                finished_unix_ms=1000 * seq,
            )
            writer.append(encode_trace(trace))
        writer.append(b"no trace")
    return backend


def identities(backend):
    reader, found = backend.open_record_reader(), []
    while records := reader.read(3):
        traces = [decode_trace(record.payload) for record in records]
        found += [(trace.producer, trace.epoch, trace.seq) for trace in traces]
    reader.close()
    return found


def payloads(backend):
    reader, found = backend.open_record_reader(), []
    while records := reader.read(64):
        found += [bytes(record.payload) for record in records]
    reader.close()
    return found


def test_a_copy_has_every_trace_once_and_a_second_one_adds_nothing(source, open_buffer):
    first = copy_traces(source, open_buffer(), LIMITS)
    assert (first.read, first.sent, first.already_there, first.unreadable) == (9, 7, 1, 1)
    assert sorted(payloads(open_buffer())) == sorted(set(payloads(source)) - {b"no trace"})

    second = copy_traces(source, open_buffer(), LIMITS)
    assert (second.read, second.sent, second.already_there) == (9, 0, 8)
    assert len(identities(open_buffer())) == 7


def test_a_copy_continues_where_another_one_stopped(source, open_buffer, make_trace):
    """What was there is passed over, wherever it came from and in whatever order."""
    with open_buffer().open_trace_writer(LIMITS) as writer:
        for seq in (5, 1, 70):
            writer.append(encode_trace(make_trace(seq=seq)))

    sent = copy_traces(source, open_buffer(), LIMITS)

    assert sent.sent == 5
    assert sorted(seq for *_, seq in identities(open_buffer())) == [0, 1, 2, 3, 4, 5, 6, 70]


def test_a_replay_sends_what_was_asked_for_each_time(source, open_buffer):
    wanted = Wanted(since_ms=1000, until_ms=6000, tenants={"acme"}, versions={3, 9})
    for _ in range(2):
        sent = replay_traces(source, open_buffer(), LIMITS, wanted)
        assert (sent.sent, sent.filtered) == (3, 4)
    assert sorted(seq for *_, seq in identities(open_buffer())) == [2, 2, 3, 3, 5, 5]


def test_records_that_were_put_aside_are_listed(open_buffer):
    with open_buffer().open_trace_writer(LIMITS) as writer:
        writer.append(b"12345")
    assert list(open_buffer().unreadable()) == []
    open_buffer().keep_unreadable("header-w1-000000-7", b"12345")
    open_buffer().keep_unreadable("content-w1-000000-9", b"123")
    found = sorted(open_buffer().unreadable(), key=lambda one: one.num_bytes)
    assert [dataclasses.astuple(one) for one in found] == [
        ("content-w1-000000-9", 3),
        ("header-w1-000000-7", 5),
    ]
