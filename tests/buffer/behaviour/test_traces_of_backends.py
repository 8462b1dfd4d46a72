"""Every backend keeps what it acknowledged, lets readers go at any pace, and counts all losses."""

import errno
import json
import random
import time
from dataclasses import replace

import pytest

from buffer.codec import encode_trace
from buffer.interface import MAX_UNREADABLE_BYTES, ServiceAwayError
from buffer.traces import TraceReader


def payload(number, num_bytes=100):
    return number.to_bytes(8, "little").ljust(num_bytes, b".")


def wait_until(holds):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def numbers(records):
    return [int.from_bytes(record.payload[:8], "little") for record in records]


def test_a_record_is_acknowledged_by_sync_and_not_before(open_buffer, limits):
    with open_buffer().open_trace_writer(limits) as writer:
        assert [writer.append(payload(i)) for i in range(3)] == [0, 1, 2]
        assert (writer.counts.durable, writer.counts.pending) == (0, 3)
        assert list(writer.sync()) == [0, 1, 2]
        assert (writer.counts.durable, writer.counts.pending) == (3, 0)
        assert list(writer.sync()) == []


def test_tend_waits_for_the_interval_and_then_syncs(open_buffer, limits):
    with open_buffer().open_trace_writer(replace(limits, sync_interval_s=3600)) as writer:
        writer.append(payload(0))
        assert list(writer.tend()) == []
        assert writer.counts.pending == 1
    with open_buffer().open_trace_writer(replace(limits, sync_interval_s=0.02)) as writer:
        writer.append(payload(0))
        writer.append(payload(1))
        acknowledged = []
        wait_until(lambda: acknowledged.extend(writer.tend()) or acknowledged)
        assert acknowledged == [0, 1]


def test_closing_acknowledges_what_is_pending(open_buffer, limits):
    writer = open_buffer().open_trace_writer(limits)
    writer.append(payload(0))
    writer.close()
    assert (writer.counts.appended, writer.counts.durable, writer.counts.doubtful) == (1, 1, 0)


def test_limits_that_hold_no_two_segments_are_refused(limits):
    with pytest.raises(ValueError, match="raise max_bytes or lower segment_bytes"):
        replace(limits, max_bytes=8191)


def test_a_record_over_half_of_max_bytes_is_refused_and_the_writer_remains_usable(
    open_buffer, limits
):
    with open_buffer().open_trace_writer(limits) as writer:
        with pytest.raises(OSError, match="over half of max_bytes") as caught:
            writer.append(bytes(1 << 20))
        assert caught.value.errno == errno.EFBIG
        assert writer.append(payload(0)) == 0


def test_readers_keep_their_own_offsets_and_continue_from_json(open_buffer, limits):
    buffer = open_buffer()
    with buffer.open_trace_writer(limits) as writer:
        fast, slow = buffer.open_record_reader(), buffer.open_record_reader()
        for i in range(100):
            writer.append(payload(i))
        writer.sync()
        assert numbers(fast.read(1000)) == list(range(100))
        assert numbers(slow.read(7)) == list(range(7))
        stored = json.loads(json.dumps(slow.offsets()))
        again = open_buffer().open_record_reader(stored)
        assert numbers(again.read(1000)) == list(range(7, 100))
        assert numbers(slow.read(3)) == [7, 8, 9]
        writer.append(payload(100))
        writer.sync()
        assert numbers(fast.read(1000)) == [100]


def test_offsets_that_are_no_offsets_are_refused(open_buffer):
    with pytest.raises(ValueError, match="offsets of 'w1-2' must"):
        open_buffer().open_record_reader({"w1-2": "seven"})


def test_a_reader_opened_before_the_first_writer_finds_its_records(open_buffer, limits):
    buffer = open_buffer()
    reader = buffer.open_record_reader()
    assert reader.read(10) == []
    with buffer.open_trace_writer(limits) as writer:
        assert reader.read(10) == []
        writer.append(payload(0))
        writer.sync()
        assert numbers(reader.read(10)) == [0]


def test_two_writers_of_one_process_do_not_mix_and_neither_is_starved(open_buffer, limits):
    buffer = open_buffer()
    with buffer.open_trace_writer(limits) as left, buffer.open_trace_writer(limits) as right:
        for i in range(20):
            left.append(payload(i))
            right.append(payload(i + 100))
        left.sync()
        right.sync()
        reader = buffer.open_record_reader()
        first = reader.read(10) + reader.read(20)
        assert {record.writer for record in first} == {left.name, right.name}
        read = numbers(first)
        while more := reader.read(7):
            read += numbers(more)
        assert [n for n in read if n < 100] == list(range(20))
        assert [n for n in read if n >= 100] == list(range(100, 120))


def test_records_of_a_writer_have_locations_of_their_own(open_buffer, limits):
    buffer = open_buffer()
    with buffer.open_trace_writer(limits) as writer:
        for _ in range(50):
            writer.append(payload(0))
        writer.sync()
        locations = {record.location for record in buffer.open_record_reader().read(100)}
    assert len(locations) == 50
    assert not any("/" in location for location in locations)


def test_a_read_stops_at_its_byte_limit(open_buffer, limits):
    buffer = open_buffer()
    with buffer.open_trace_writer(limits) as writer:
        for i in range(10):
            writer.append(payload(i))
        writer.sync()
        reader = buffer.open_record_reader()
        assert numbers(reader.read(10, max_bytes=250)) == [0, 1, 2]
        assert numbers(reader.read(10)) == list(range(3, 10))


def test_the_oldest_records_are_evicted_and_counted(open_buffer, limits):
    buffer = open_buffer()
    with buffer.open_trace_writer(replace(limits, max_bytes=16_384)) as writer:
        reader = buffer.open_record_reader()
        for i in range(1000):
            writer.append(payload(i, 20 + i % 300))
        writer.sync()
        read = numbers(reader.read(1000))

    assert 0 < len(read) < 200
    assert read == list(range(1000 - len(read), 1000))
    assert sum(20 + i % 300 for i in read) <= 16_384
    assert reader.counts.evicted_unread == writer.counts.evicted_records == 1000 - len(read)
    assert writer.counts.evicted_bytes >= sum(20 + i % 300 for i in range(1000 - len(read)))


def test_records_are_evicted_at_their_ttl_even_if_nothing_is_appended(open_buffer, limits):
    buffer = open_buffer()
    with buffer.open_trace_writer(replace(limits, ttl_s=0.2)) as writer:
        writer.append(payload(0))
        writer.sync()
        wait_until(lambda: writer.tend() or writer.counts.evicted_records == 1)
        reader = buffer.open_record_reader()
        assert reader.read(10) == []
        assert reader.counts.evicted_unread == 1
        assert writer.append(payload(1)) == 1
        writer.sync()
        assert numbers(reader.read(10)) == [1]


@pytest.mark.parametrize("seed", range(4))
def test_written_is_read_plus_evicted_at_any_pace_of_the_reader(open_buffer, limits, seed):
    chance = random.Random(seed)
    reader, read = open_buffer().open_record_reader(), []
    total = damaged = evicted = torn = 0
    for _ in range(4):  # four lives of the server
        with open_buffer().open_trace_writer(replace(limits, max_bytes=12_288)) as writer:
            for _ in range(chance.randrange(300)):
                writer.append(payload(total, chance.randrange(8, 400)))
                total += 1
                if chance.random() < 0.05:
                    read += numbers(reader.read(chance.randrange(1, 30)))
                if chance.random() < 0.02:  # the trainer restarts
                    counts = reader.counts
                    damaged, torn = damaged + counts.damaged, torn + counts.torn
                    evicted += counts.evicted_unread
                    reader = open_buffer().open_record_reader(reader.offsets())

    def are_all_known():  # brokers may show the last ones a moment later
        read.extend(numbers(reader.read(50)))
        return len(read) + evicted + reader.counts.evicted_unread >= total

    wait_until(are_all_known)
    assert not reader.read(50)
    assert len(read) == len(set(read))
    assert len(read) + evicted + reader.counts.evicted_unread == total
    assert damaged + torn + reader.counts.damaged + reader.counts.torn == 0


def test_a_trace_goes_from_server_to_trainer(open_buffer, limits, make_trace):
    reader = TraceReader(open_buffer())
    with open_buffer().open_trace_writer(limits) as writer:
        for seq in range(5):
            writer.append(encode_trace(make_trace(seq=seq)))
        writer.sync()
        assert [trace.seq for trace in reader.read(3)] == [0, 1, 2]
        later = TraceReader(open_buffer(), json.loads(json.dumps(reader.offsets())))
        assert [trace.seq for trace in later.read(10)] == [3, 4]


def test_a_trace_that_was_sent_twice_is_returned_once(open_buffer, limits, make_trace):
    with open_buffer().open_trace_writer(limits) as writer:
        for seq in (0, 1, 1, 0, 2):
            writer.append(encode_trace(make_trace(seq=seq)))
        writer.append(encode_trace(make_trace(seq=0, epoch=5)))
        writer.append(encode_trace(make_trace(seq=0, producer="server-2")))
        writer.sync()
        reader = TraceReader(open_buffer())
        read = reader.read(100)

        assert [(t.producer, t.epoch, t.seq) for t in read[3:]] == [
            ("server-1", 5, 0),
            ("server-2", make_trace().epoch, 0),
        ]
        assert (reader.counts.read, reader.counts.duplicate) == (5, 2)
        writer.append(encode_trace(make_trace(seq=2)))
    restarted = TraceReader(open_buffer(), json.loads(json.dumps(reader.offsets())))
    assert restarted.read(100) == []
    assert restarted.counts.duplicate == 1


def test_records_that_are_no_traces_are_counted_and_passed_over(open_buffer, limits, make_trace):
    sound = bytes(encode_trace(make_trace()))
    with open_buffer().open_trace_writer(limits) as writer:
        for record in (b"rubbish!", sound[:16] + b"\7" + sound[17:], sound):
            writer.append(record)
    reader = TraceReader(open_buffer())

    assert [trace.seq for trace in reader.read(100)] == [0]
    assert reader.counts.quarantined == 2
    assert reader.counts.quarantined_by_reason == {"header": 1, "version": 1}


@pytest.mark.parametrize("num_bytes", [0, 1, 4096, (1 << 20) - 1, 1 << 20, 3_500_000])
def test_records_of_any_size_come_back_as_they_were(open_buffer, limits, num_bytes):
    wide = replace(limits, max_bytes=64 << 20)
    record = random.Random(num_bytes).randbytes(num_bytes)
    with open_buffer().open_trace_writer(wide) as writer:
        for one in (b"before", record, bytearray(record), memoryview(record), b"behind"):
            writer.append(one)
    read = [bytes(one.payload) for one in open_buffer().open_record_reader().read(10)]
    assert read == [b"before", record, record, record, b"behind"]


def test_append_all_says_which_records_it_refused(open_buffer, limits):
    with open_buffer().open_trace_writer(limits) as writer:
        errors = writer.append_all([payload(0), bytes(1 << 20), payload(1)])
        assert [error.errno for error in errors] == [errno.EFBIG]
    assert numbers(open_buffer().open_record_reader().read(10)) == [0, 1]


def test_what_cannot_be_decoded_is_kept_aside_as_long_as_there_is_room(open_buffer, limits):
    buffer = open_buffer()
    with buffer.open_trace_writer(limits) as writer:
        writer.append(payload(0))
    for i in range(3):
        buffer.keep_unreadable(f"header-w1-{i}", payload(i))
    buffer.keep_unreadable("header-w1-9", memoryview(bytes(MAX_UNREADABLE_BYTES + 1)))
    assert numbers(buffer.open_record_reader().read(10)) == [0]


def test_inspecting_a_buffer_changes_nothing(open_buffer, limits):
    with open_buffer().open_trace_writer(limits) as writer:
        writer.append(payload(0))
    before = open_buffer().stats()
    for report in open_buffer().reports(limits):
        assert not report.is_damaged
        assert report.to_line()
        json.dumps(report.to_json())
    reader = open_buffer().open_record_reader()
    assert numbers(reader.read(10)) == [0]
    with pytest.raises(ValueError, match="without a group has nothing to commit"):
        reader.commit(reader.offsets())
    assert open_buffer().stats() == before
    assert (before.num_writers, before.appended, before.held, before.groups) == (1, 1, 1, ())
    assert before.held_bytes >= 100


WRITE_FOREVER = """
import sys
from pathlib import Path
from buffer.backends import open_backend
from buffer.interface import TraceLimits

limits = TraceLimits(1 << 16, 1 << 30, 1e6, 0.0)
writer = open_backend(sys.argv[1], Path(sys.argv[2])).open_trace_writer(limits)
number = 0
while True:
    for _ in range(7):
        writer.append(number.to_bytes(8, "little").ljust(20_000, b"."))
        number += 1
    writer.sync()
    print(writer.counts.durable, flush=True)
"""


def test_a_killed_writer_loses_nothing_that_it_acknowledged(other_process, fork_python):
    process, output = fork_python(WRITE_FOREVER, other_process.url, other_process.run_dir)
    wait_until(lambda: output().count("\n") >= 3)
    process.kill()
    process.wait(60)
    acknowledged = int(output().split()[-1])
    reader, read = other_process.open().open_record_reader(), []
    while records := reader.read(100):
        read += numbers(records)
    assert read == list(range(len(read)))
    assert len(read) >= acknowledged > 0
    assert reader.counts.damaged == reader.counts.evicted_unread == 0


def test_a_killed_server_loses_nothing_that_was_acknowledged(place, limits):
    if place.server is None:
        pytest.skip("there is no server, or it is somebody else's")
    reader = place.open().open_record_reader()
    writer = place.open().open_trace_writer(limits)
    read = []
    for life in range(3):
        for i in range(20):
            writer.append(payload(20 * life + i))
        writer.sync()
        read += numbers(reader.read(7))
        place.server.kill()
        writer.append(payload(1000 + life))
        with pytest.raises(ServiceAwayError):
            writer.sync()
        with pytest.raises(ServiceAwayError):
            while records := reader.read(100):  # some may have arrived before
                read += numbers(records)
        assert writer.counts.pending == 1
        place.server.start()
        wait_until(lambda: writer.tend() or not writer.counts.pending)
    writer.close()
    while records := reader.read(100):
        read += numbers(records)
    expected = [n for life in range(3) for n in (*range(20 * life, 20 * life + 20), 1000 + life)]
    assert read == expected
    counts = writer.counts
    assert (counts.durable, counts.dropped, counts.doubtful) == (63, 0, 0)
    assert (reader.counts.damaged, reader.counts.evicted_unread) == (0, 0)


def fetched(backend, locations):
    """What is stored at these locations."""
    found = backend.fetch(locations)
    if found is None:
        pytest.skip("this backend finds records only by reading all of them")
    return {location: bytes(payload) for location, payload in found.items()}


@pytest.mark.parametrize("step", [1, 4, 13])
def test_records_are_found_again_at_their_locations(open_buffer, limits, step):
    sizes = [20 + 977 * (i % 5) for i in range(60)]
    with (
        open_buffer().open_trace_writer(limits) as first,
        open_buffer().open_trace_writer(limits) as second,
    ):
        for number, size in enumerate(sizes):
            (first, second)[number % 3 == 0].append(payload(number, size))
        first.sync()
        second.sync()
        records = open_buffer().open_record_reader().read(100)
        assert len(records) == len(sizes)
        wanted = {(one.writer, one.location): bytes(one.payload) for one in records[3::step]}

        assert fetched(open_buffer(), wanted.keys()) == wanted
        assert fetched(open_buffer(), []) == {}


def test_what_no_reader_would_give_is_at_no_location(open_buffer, limits):
    with open_buffer().open_trace_writer(limits) as writer:
        for number in range(3):
            writer.append(payload(number))
        writer.sync()
        (record,) = open_buffer().open_record_reader().read(1)
        name, at = record.writer, record.location
        strange = [
            *((name, text) for text in ("nowhere", "", "-1", "9", "7-9", "999999-0", f"{at} ")),
            *((text, at) for text in ("../elsewhere", "w0", "", "unknown")),
        ]

        assert fetched(open_buffer(), [(name, at), *strange]).keys() == {(name, at)}


def test_a_large_record_is_found_again_between_small_ones(open_buffer, limits):
    with open_buffer().open_trace_writer(limits) as writer:
        for number, size in ((0, 20), (1, 300_000), (2, 20)):
            writer.append(payload(number, size))
        writer.sync()
        record = open_buffer().open_record_reader().read(3)[1]
        at = record.writer, record.location

        assert fetched(open_buffer(), [at]) == {at: payload(1, 300_000)}


def test_an_evicted_record_is_found_no_more(open_buffer, limits):
    backend = open_buffer()
    with backend.open_trace_writer(limits) as writer:
        writer.append(payload(0))
        writer.append(payload(1, 20_000))
        writer.sync()
        first, *_ = open_buffer().open_record_reader().read(2)
        at = first.writer, first.location
        assert fetched(backend, [at]).keys() == {at}
        for number in range(2 * limits.max_bytes // 20_000):
            writer.append(payload(number, 20_000))
            writer.tend()
        writer.sync()
        newest = [
            (one.writer, one.location) for one in open_buffer().open_record_reader().read(99)
        ][-1]

        assert fetched(backend, [at, newest]).keys() == {newest}
