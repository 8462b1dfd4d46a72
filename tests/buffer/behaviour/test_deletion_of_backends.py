"""Deleting a tenant removes all of its records, disturbs nobody else's, and is counted exactly."""

import time
from contextlib import suppress
from dataclasses import replace

from buffer import deletions
from buffer.codec import decode_trace, encode_trace
from buffer.deletions import digest_of, now_ms
from buffer.interface import ServiceAwayError
from buffer.traces import TraceReader


def encoded(make_trace, seq, tenant="acme", **fields):
    return bytes(encode_trace(make_trace(seq=seq, tenant=tenant, **fields)))


def write(place, limits, payloads):
    with place.open().open_trace_writer(limits) as writer:
        for payload in payloads:
            writer.append(payload)


def read_all(reader, wanted):
    """Numbers of the traces that a reader returns, once it has returned so many."""
    seqs, deadline = [], time.monotonic() + 60
    while len(seqs) < wanted or time.monotonic() > deadline:
        assert time.monotonic() < deadline
        with suppress(ServiceAwayError):
            seqs += [decode_trace(record.payload).seq for record in reader.read(7)]
    with suppress(ServiceAwayError):
        seqs += [decode_trace(record.payload).seq for record in reader.read(100)]
    return seqs


def group_of(place, name="trainer"):
    (found,) = [one for one in place.open().stats().groups if one.group == name]
    return found


def mixed(make_trace, count):
    """Every third trace belongs to another tenant."""
    return [encoded(make_trace, i, "umbrella" if i % 3 == 0 else "acme") for i in range(count)]


def test_no_reader_gets_records_of_a_deleted_tenant(place, limits, make_trace):
    write(place, limits, mixed(make_trace, 30))
    found = place.open().delete("umbrella")
    assert found.records == 10
    assert found.num_bytes == sum(map(len, mixed(make_trace, 30)[::3]))

    kept = [i for i in range(30) if i % 3]
    alone = place.open().open_record_reader()
    assert sorted(read_all(alone, 20)) == kept
    assert (alone.counts.read, alone.counts.deleted, alone.counts.damaged) == (20, 10, 0)
    member = place.open().open_record_reader(group="trainer")
    assert sorted(read_all(member, 20)) == kept
    member.commit(member.offsets())
    stats = place.open().stats()
    assert (stats.appended, stats.held, stats.deleted) == (30, 20, 10)
    member.close()
    alone.close()


def test_every_record_is_committed_pending_lost_or_deleted(place, limits, make_trace):
    """Deleted before, while and after a group has got them, and before a group was made."""
    write(place, limits, mixed(make_trace, 30))
    early = place.open().open_record_reader(group="early")
    read_all(early, 30)
    early.commit(early.offsets())
    half = place.open().open_record_reader(group="half")
    while half.counts.read < 12:
        with suppress(ServiceAwayError):
            half.read(1)
    half.commit(half.offsets())

    place.open().delete("umbrella")
    found = group_of(place, "early")
    assert (found.committed, found.pending, found.lost, found.deleted) == (30, 0, 0, 0)
    found = group_of(place, "half")
    assert (found.committed, found.pending, found.lost, found.deleted) == (12, 12, 0, 6)
    time.sleep(1.1)  # a reader looks for deletions once a second
    read_all(half, 12)
    half.commit(half.offsets())
    late = place.open().open_record_reader(group="late")
    read_all(late, 20)
    late.commit(late.offsets())
    for name, committed, deleted in (("early", 30, 0), ("half", 24, 6), ("late", 20, 10)):
        found = group_of(place, name)
        assert (found.committed, found.pending, found.lost) == (committed, 0, 0)
        assert found.deleted == deleted
    for member in (early, half, late):
        member.close()


def test_records_that_arrive_after_the_deletion_are_dropped_and_later_ones_kept(
    place, limits, make_trace
):
    with place.open().open_trace_writer(limits) as writer:
        writer.append(encoded(make_trace, 0, "umbrella"))
        writer.sync()
        place.open().delete("umbrella")
        writer.append(encoded(make_trace, 1, "umbrella"))  # was on its way
        writer.append(encoded(make_trace, 2, "acme"))
        later_ms = now_ms() + 1000
        writer.append(encoded(make_trace, 3, "umbrella", finished_unix_ms=later_ms))
        writer.sync()
        reader, seqs = TraceReader(place.open(), group="trainer"), []
        deadline = time.monotonic() + 60
        while len(seqs) < 2 and time.monotonic() < deadline:
            with suppress(ServiceAwayError):
                seqs += [trace.seq for trace in reader.read(10)]
        assert seqs == [2, 3]
        assert reader.counts.deleted == 2
        assert reader.counts.read == 2
        reader.close()


def test_a_deletion_may_be_repeated_and_of_a_stranger_is_nothing(place, limits, make_trace):
    write(place, limits, mixed(make_trace, 9))
    assert place.open().delete("nobody").records == 0
    assert place.open().delete("umbrella").records == 3
    again = place.open().delete("umbrella")
    assert again.records in (0, 3)  # Kafka still holds them
    assert (again.records == 0) == (again.remains is None)
    assert place.open().stats().deleted == 3
    names = place.open().deletions()
    assert names.covers("umbrella", 1) and not names.covers("acme", 0)
    assert not any("umbrella" in name for name in names.until_ms)


def test_a_deletion_takes_what_was_put_aside_along(place, limits, make_trace):
    write(place, limits, mixed(make_trace, 2))
    buffer = place.open()
    buffer.keep_unreadable("content-w1-1", encoded(make_trace, 1, "umbrella")[:-1])
    buffer.keep_unreadable("header-w1-2", b"whose is this?")
    assert buffer.delete("umbrella").quarantined == 2
    assert buffer.delete("umbrella").quarantined == 0


def test_a_writer_removes_what_waits_and_counts_it(place, limits, make_trace):
    writer = place.open().open_trace_writer(limits)
    for payload in mixed(make_trace, 6):
        writer.append(payload)
    removed = writer.remove(lambda payload: b"umbrella" in bytes(payload))
    counts = writer.counts
    assert counts.deleted == removed in (0, 2)  # some backends keep nothing in memory
    assert counts.appended == 6 == counts.durable + counts.pending + counts.deleted
    writer.close()
    counts = writer.counts
    assert counts.appended == 6 == counts.durable + counts.deleted


def test_old_records_vanish_though_no_server_runs(place, limits, make_trace):
    short = replace(limits, ttl_s=0.4)
    with place.open().open_trace_writer(short) as writer:
        for payload in mixed(make_trace, 6):
            writer.append(payload)
    buffer, deadline = place.open(), time.monotonic() + 60
    while buffer.stats().held:
        assert time.monotonic() < deadline
        time.sleep(0.05)
        buffer.expire(short)
    assert place.open().stats().appended == 6


def test_put_aside_records_vanish_when_they_are_old(place, limits, make_trace):
    write(place, limits, mixed(make_trace, 1))
    buffer = place.open()
    buffer.keep_unreadable("header-w1-2", b"whose is this?")
    buffer.expire(limits)
    short = replace(limits, ttl_s=0.2)
    time.sleep(0.3)
    buffer = place.open()
    buffer.expire(short)
    assert buffer.delete("nobody").quarantined == 0  # which counts what it finds


ENDED_MS = 1_700_000_001_000
"""When the traces here ended."""
YEAR_MS = 31_536_000_000


def read_traces(place, wanted):
    """Numbers of the traces that a new trainer gets, once it has got so many."""
    reader, seqs, deadline = TraceReader(place.open()), [], time.monotonic() + 60
    while len(seqs) < wanted and time.monotonic() < deadline:
        with suppress(ServiceAwayError):
            seqs += [trace.seq for trace in reader.read(10)]
    with suppress(ServiceAwayError):
        seqs += [trace.seq for trace in reader.read(10)]
    reader.close()
    return sorted(seqs)


def test_a_deletion_under_a_clock_that_is_ahead_costs_no_later_trace(
    place, limits, make_trace, monkeypatch
):
    write(place, limits, mixed(make_trace, 3))
    monkeypatch.setattr(deletions, "now_ms", lambda: ENDED_MS + YEAR_MS)
    until_ms = ENDED_MS + deletions.SKEW_MS
    assert place.open().delete("umbrella").until_ms == until_ms
    assert dict(place.open().deletions().until_ms) == {digest_of("umbrella"): until_ms}
    late = encoded(make_trace, 10, "umbrella", finished_unix_ms=until_ms)
    write(place, limits, [late, encoded(make_trace, 11, "umbrella", finished_unix_ms=until_ms + 1)])
    assert read_traces(place, 3) == [1, 2, 11]


def test_a_deletion_under_a_clock_that_is_behind_covers_all_that_is_stored(
    place, limits, make_trace, monkeypatch
):
    write(place, limits, mixed(make_trace, 3))
    monkeypatch.setattr(deletions, "now_ms", lambda: 1000)
    assert place.open().delete("umbrella").until_ms == ENDED_MS
    write(place, limits, [encoded(make_trace, 10, "umbrella")])  # was on its way
    assert read_traces(place, 2) == [1, 2]


def test_who_deletes_may_say_until_when(place, limits, make_trace):
    write(place, limits, mixed(make_trace, 3))
    asked_ms = ENDED_MS + 2 * deletions.SKEW_MS
    assert place.open().delete("umbrella", until_ms=asked_ms).until_ms == asked_ms
    assert place.open().delete("umbrella", until_ms=5).until_ms == asked_ms  # never less


def test_a_deletion_can_be_taken_back(place, limits, make_trace):
    write(place, limits, mixed(make_trace, 3))
    place.open().delete("umbrella", until_ms=ENDED_MS + YEAR_MS)
    place.open().delete("others")
    assert place.open().undelete(digest_of("umbrella"))
    assert not place.open().undelete(digest_of("umbrella"))
    assert set(place.open().deletions().until_ms) == {digest_of("others")}
    write(place, limits, [encoded(make_trace, 10, "umbrella")])
    assert set(read_traces(place, 3)) - {0} == {1, 2, 10}  # Kafka removes nothing
