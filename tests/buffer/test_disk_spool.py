"""With a spool on the disk, what a service does not take outlives the server, and is counted."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from dataclasses import replace

import pytest

from buffer.backends import open_backend, open_trace_writer
from buffer.codec import encode_trace
from buffer.disk_spool import DiskSpool
from buffer.interface import ServiceAwayError
from buffer.traces import TraceReader
from configs.schema import BufferSettings
from oracles.places import PLACES, close_servers
from oracles.proxies import Proxy

NUM_BYTES = 1000


def payload(number, num_bytes=NUM_BYTES):
    return number.to_bytes(8, "little").ljust(num_bytes, b".")


def numbers_in(place):
    reader = place.open().open_record_reader()
    found = []
    while records := reader.read(100):
        found += [int.from_bytes(record.payload[:8], "little") for record in records]
    return found


def wait_until(holds):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def tended(writer):
    with contextlib.suppress(ServiceAwayError):
        writer.tend()
    return writer.counts.pending == 0


def adds_up(counts):
    c = counts
    parts = c.durable, c.pending, c.doubtful, c.dropped, c.left, c.deleted
    return c.appended == sum(parts) and min(parts) >= 0


@pytest.fixture(scope="module", autouse=True)
def servers():
    yield
    close_servers()


@pytest.fixture
def place(tmp_path):
    place = PLACES["valkey"](tmp_path)
    if place.server is None:
        pytest.skip("the server is somebody else's")
    return place


@pytest.fixture
def proxy(place):
    with Proxy(place.server.port) as proxy:
        yield proxy


@pytest.fixture
def root(tmp_path):
    return tmp_path / "spool"


@pytest.fixture
def url(place, proxy):
    """Of the buffer, by way of the proxy."""
    return place.url.replace(str(place.server.port), str(proxy.port)) + "&timeout_s=0.3"


@pytest.fixture
def open_spool(place, url, limits, root):
    """Open a writer with a spool of 100 kB, which hands on a few records at a time."""

    def opened(max_bytes=100_000, window_bytes=8 * NUM_BYTES):
        inner = open_backend(url, place.run_dir).open_trace_writer(limits)
        return DiskSpool(inner, root, limits, max_bytes, window_bytes=window_bytes)

    return opened


def go_away(proxy):
    proxy.refuses = True
    proxy.cut()


def folders(root):
    return [path for path in root.glob("w*") if path.is_dir()]


def test_what_a_service_that_is_away_does_not_take_waits_on_the_disk(
    place, proxy, root, open_spool
):
    writer = open_spool()
    for i in range(5):
        writer.append(payload(i))
    assert list(writer.sync()) == [0, 1, 2, 3, 4]
    go_away(proxy)
    for i in range(5, 60):
        assert writer.append(payload(i)) == i
        tended(writer)
        assert adds_up(writer.counts)
    assert (writer.counts.durable, writer.counts.dropped, writer.counts.pending) == (5, 0, 55)
    assert sum(path.stat().st_size for path in root.rglob("*.seg")) > 50 * NUM_BYTES
    proxy.flow()
    wait_until(lambda: tended(writer))
    writer.close()
    assert numbers_in(place) == list(range(60))
    assert writer.counts.durable == 60
    assert folders(root) == []


def test_over_its_limit_the_oldest_are_dropped_and_counted(place, proxy, root, open_spool):
    go_away(proxy)
    writer = open_spool(max_bytes=65536)
    for i in range(300):
        writer.append(payload(i))
        tended(writer)
        assert adds_up(writer.counts)
    dropped = writer.counts.dropped
    assert dropped > 200
    assert sum(path.stat().st_size for path in root.rglob("*.seg")) <= 65536
    proxy.flow()
    wait_until(lambda: tended(writer))
    writer.close()
    found = numbers_in(place)
    assert found == sorted(found) and len(found) == len(set(found)) == 300 - dropped
    assert found[-1] == 299
    assert (writer.counts.durable, writer.counts.dropped) == (300 - dropped, dropped)


def test_what_is_left_when_a_server_stops_the_next_one_sends(place, proxy, root, open_spool):
    go_away(proxy)
    writer = open_spool()
    for i in range(30):
        writer.append(payload(i))
    with pytest.raises(ServiceAwayError):
        writer.close()
    counts = writer.counts
    assert (counts.left, counts.pending, counts.dropped, counts.doubtful) == (30, 0, 0, 0)
    proxy.flow()
    second = open_spool()
    second.append(payload(30))
    wait_until(lambda: tended(second) and second.counts.recovered == 30)
    second.close()
    assert sorted(numbers_in(place)) == list(range(31))
    assert (second.counts.durable, second.counts.unrecovered) == (1, 0)
    assert folders(root) == []


def is_odd(record):
    return bool(record[0] % 2)


def bytes_in(root):
    return b"".join(path.read_bytes() for path in root.rglob("*.seg"))


def test_what_was_deleted_while_it_waited_is_neither_sent_nor_left_on_the_disk(
    place, proxy, root, open_spool
):
    go_away(proxy)
    writer = open_spool()
    for i in range(60):
        writer.append(payload(i))
        tended(writer)

    assert writer.remove(is_odd) == 30

    left = bytes_in(root)
    assert [i for i in range(60) if payload(i) in left] == list(range(0, 60, 2))
    proxy.flow()
    wait_until(lambda: tended(writer))
    counts = writer.counts
    writer.close()
    assert adds_up(counts)
    found = numbers_in(place)
    assert set(range(0, 60, 2)) <= set(found)
    # The few that the service's writer had already are on their way: readers pass over them.
    assert len(found) == counts.durable == 60 - counts.deleted
    assert 60 - counts.deleted <= 30 + 8
    assert folders(root) == []


def test_what_a_dead_process_left_is_not_sent_if_it_was_deleted_since(
    place, proxy, root, open_spool
):
    go_away(proxy)
    first = open_spool()
    for i in range(30):
        first.append(payload(i))
    with pytest.raises(ServiceAwayError):
        first.close()
    proxy.flow()
    second = open_spool()
    second.remove(is_odd)

    wait_until(lambda: tended(second) and second.counts.unrecovered == 15)

    second.close()
    assert sorted(numbers_in(place)) == list(range(0, 30, 2))
    assert second.counts.recovered == 15
    assert folders(root) == []


SPOOL_UNTIL_KILLED = """
import contextlib, sys, time
from pathlib import Path
from buffer.backends import open_backend
from buffer.disk_spool import DiskSpool
from buffer.interface import TraceLimits

limits = TraceLimits(4096, 1 << 20, 3600.0, 0.0)
inner = open_backend(sys.argv[1], Path(sys.argv[2])).open_trace_writer(limits)
writer = DiskSpool(inner, Path(sys.argv[3]), limits, 100_000, window_bytes=8000)
for line in sys.stdin:
    writer.append(bytes.fromhex(line))
    with contextlib.suppress(OSError):
        writer.tend()
    print(writer.counts.durable, flush=True)
"""


@pytest.fixture
def run_and_kill(start_python, place, url, root):
    """Append records in a process that is killed once it has taken them; returns how many it
    knew to be stored."""

    def run(records):
        process = start_python(SPOOL_UNTIL_KILLED, url, place.run_dir, root, stdin=-1, bufsize=1)
        for record in records:
            process.stdin.write(bytes(record).hex() + "\n")
            process.stdin.flush()
            durable = int(process.stdout.readline())
        process.kill()
        process.wait()
        return durable

    return run


def test_what_a_killed_server_had_spooled_is_sent_once_by_the_next(
    place, proxy, root, open_spool, run_and_kill, make_trace
):
    traces = [make_trace(producer="killed", seq=i) for i in range(20)]
    assert run_and_kill([encode_trace(trace) for trace in traces[:5]]) == 5
    go_away(proxy)
    assert run_and_kill([encode_trace(trace) for trace in traces[5:]]) == 0
    proxy.flow()
    second = open_spool()
    # The first life's five are stored; as far as that was not noted, they are sent once more.
    wait_until(lambda: tended(second) and second.counts.recovered >= 15 and not folders(root)[1:])
    second.close()
    reader = TraceReader(place.open())
    found = [trace.seq for trace in reader.read(1000)]
    assert sorted(found) == list(range(20))
    assert reader.counts.duplicate == second.counts.recovered - 15
    assert folders(root) == []


def test_what_was_stored_and_not_noted_is_recognised(place, root, open_spool, make_trace):
    writer = open_spool()
    for i in range(5):
        writer.append(encode_trace(make_trace(seq=i)))
    [folder] = folders(root)
    shutil.copytree(folder, root / "w1-1")  # as a process leaves it that is killed after ``sync``
    writer.close()
    second = open_spool()
    wait_until(lambda: tended(second) and not folders(root)[1:])
    assert second.counts.recovered == 5
    second.close()
    reader = TraceReader(place.open())
    assert [trace.seq for trace in reader.read(100)] == list(range(5))
    assert reader.counts.duplicate == 5


def test_a_damaged_record_and_a_torn_tail_are_counted_and_the_rest_is_sent(
    place, proxy, root, open_spool
):
    go_away(proxy)
    writer = open_spool()
    for i in range(10):
        writer.append(payload(i, 300))
    with pytest.raises(ServiceAwayError):
        writer.close()
    [segment] = root.rglob("*.seg")
    content = bytearray(segment.read_bytes())
    content[4 * 332 + 100] ^= 1
    segment.write_bytes(content[:-100])
    proxy.flow()
    second = open_spool()
    wait_until(lambda: tended(second) and not folders(root)[1:])
    assert (second.counts.recovered, second.counts.unrecovered) == (8, 2)
    second.close()
    assert numbers_in(place) == [0, 1, 2, 3, 5, 6, 7, 8]


def test_a_spool_that_somebody_deletes_is_counted_and_goes_on(place, proxy, root, open_spool):
    go_away(proxy)
    writer = open_spool()
    for i in range(30):
        writer.append(payload(i))
    handed = 30 - 22  # a window of 8 records is in memory, too
    shutil.rmtree(root)
    writer.append(payload(30))
    assert (writer.counts.dropped, adds_up(writer.counts)) == (22, True)
    proxy.flow()
    wait_until(lambda: tended(writer))
    writer.close()
    assert numbers_in(place) == [*range(handed), 30]
    assert (writer.counts.durable, writer.counts.dropped) == (handed + 1, 22)


def test_a_spool_that_is_deleted_for_good_leaves_nothing_uncounted(proxy, root, open_spool):
    go_away(proxy)
    writer = open_spool()
    for i in range(30):
        writer.append(payload(i))
    shutil.rmtree(root)
    with pytest.raises(ServiceAwayError):
        writer.close()
    counts = writer.counts
    assert adds_up(counts)
    assert (counts.pending, counts.left, counts.dropped, counts.doubtful) == (0, 0, 22, 8)


def test_where_the_disk_refuses_records_wait_in_memory(place, proxy, root, open_spool):
    root.write_text("in the way")
    writer = open_spool()
    for i in range(3):
        assert writer.append(payload(i)) == i
    assert list(writer.sync()) == [0, 1, 2]
    go_away(proxy)
    for i in range(3, 11):
        writer.append(payload(i))
    with pytest.raises(OSError, match=r"exists|directory"):
        writer.append(payload(11))
    proxy.flow()
    wait_until(lambda: writer.counts.pending == 0 or tended_whatever(writer))
    with contextlib.suppress(OSError):
        writer.close()
    assert numbers_in(place) == list(range(11))
    assert adds_up(writer.counts)


def tended_whatever(writer):
    with contextlib.suppress(OSError):
        writer.tend()
    return writer.counts.pending == 0


def test_what_the_service_can_never_hold_is_counted_and_stops_nothing(place, root, limits):
    small = replace(limits, max_bytes=16384)  # a record may take half of it
    with DiskSpool(place.open().open_trace_writer(small), root, limits, 1 << 20) as writer:
        for i, num_bytes in enumerate((100, 9000, 100)):
            writer.append(payload(i, num_bytes))
        writer.sync()
        assert (writer.counts.durable, writer.counts.dropped) == (2, 1)
        assert adds_up(writer.counts)
    assert numbers_in(place) == [0, 2]


def test_servers_that_share_a_spool_send_their_own(place, proxy, root, open_spool):
    go_away(proxy)
    first, second = open_spool(), open_spool()
    for i in range(20):
        (first if i % 2 else second).append(payload(i))
    proxy.flow()
    wait_until(lambda: tended(first) and tended(second))
    assert first.counts.recovered == second.counts.recovered == 0
    first.close()
    second.close()
    assert sorted(numbers_in(place)) == list(range(20))


def test_a_spool_is_its_owners_alone_to_read(proxy, root, open_spool):
    before = os.umask(0)  # the most careless one
    try:
        writer = open_spool(max_bytes=65536)
        for i in range(100):
            writer.append(payload(i))
        writer.sync()
        go_away(proxy)
        for i in range(200):
            writer.append(payload(i))
        modes = {path: path.stat().st_mode & 0o777 for path in (root, *root.rglob("*"))}
    finally:
        os.umask(before)
    assert {path.name for path in modes} >= {"LOCK", "SENT.json", "EVICT.lock"}
    for path, mode in modes.items():
        assert mode == (0o700 if path.is_dir() else 0o600), path
    proxy.flow()
    wait_until(lambda: tended(writer))
    writer.close()


def test_a_setting_that_does_nothing_is_refused(tmp_path, place):
    settings = BufferSettings(disk_spool_bytes=1 << 20, max_bytes=None)
    with pytest.raises(ValueError, match="'log:' has none"):
        open_trace_writer(open_backend("log:", tmp_path), settings, tmp_path)
    settings = replace_settings(settings, url=place.url)
    with open_trace_writer(place.open(), settings, tmp_path) as writer:
        assert isinstance(writer, DiskSpool)
        writer.append(payload(1))
    assert numbers_in(place) == [1]


def replace_settings(settings, **changes):
    return settings.model_copy(update=changes)
