"""Whatever the network or the server does, calls end in time, nothing acknowledged is lost, and
every record is counted."""

import time
from dataclasses import replace

import pytest
import redis

from buffer.backends import open_backend
from buffer.interface import ServiceAwayError
from oracles.places import PLACES, close_servers
from oracles.proxies import Proxy


def payload(number, num_bytes=1000):
    return number.to_bytes(8, "little").ljust(num_bytes, b".")


def numbers(records):
    return [int.from_bytes(record.payload[:8], "little") for record in records]


def read_all(reader):
    read = []
    while records := reader.read(100):
        read += numbers(records)
    return read


def wait_until(holds):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


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
def open_by_proxy(place, proxy):
    """Open the buffer by way of the proxy, with short timeouts and a small spool."""

    def opened(**options):
        url = place.url.replace(str(place.server.port), str(proxy.port))
        more = {"timeout_s": 0.3, "spool_bytes": 20_000, **options}
        return open_backend(
            "&".join([url, *(f"{name}={value}" for name, value in more.items())]), place.run_dir
        )

    return opened


def fail(proxy, fault):
    """Begin a fault that ends with ``proxy.flow()``."""
    if fault == "refuses":
        proxy.refuses = True
        proxy.cut()
    elif fault == "reset":
        proxy.refuses = True
        proxy.reset()
    elif fault == "hangs":
        proxy.stall()
    elif fault == "swallows answers":
        proxy.swallow_answers = True


FAULTS = ["refuses", "reset", "hangs", "swallows answers"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_writer_keeps_what_fits_counts_the_rest_and_goes_on_by_itself(
    place, proxy, open_by_proxy, limits, fault
):
    writer = open_by_proxy().open_trace_writer(limits)
    for i in range(5):
        writer.append(payload(i))
    writer.sync()
    fail(proxy, fault)
    for i in range(5, 100):
        writer.append(payload(i))
        try:
            writer.tend()
        except ServiceAwayError as error:
            assert "127.0.0.1" in str(error)
    counts = writer.counts
    assert counts.appended == 100
    assert counts.appended == counts.durable + counts.pending + counts.doubtful + counts.dropped
    assert counts.dropped >= 60  # a spool of 20,000 bytes holds 20 records
    assert counts.doubtful == 0

    proxy.flow()
    proxy.cut()  # what hung or lost its answers is not used again

    def has_recovered():
        try:
            writer.tend()
        except ServiceAwayError:
            return False
        return writer.counts.pending == 0

    wait_until(has_recovered)
    counts = writer.counts
    assert counts.appended == counts.durable + counts.dropped
    writer.close()
    read = read_all(place.open().open_record_reader())
    assert len(read) == len(set(read)) == counts.durable
    assert read == sorted(read)
    assert read[:5] == [0, 1, 2, 3, 4]
    assert read[-1] == 99  # the newest are kept


def test_closing_a_writer_while_the_server_is_away_counts_what_is_lost(
    proxy, open_by_proxy, limits
):
    writer = open_by_proxy().open_trace_writer(limits)
    writer.append(payload(0))
    writer.sync()
    proxy.swallow_answers = True
    writer.append(payload(1))
    with pytest.raises(ServiceAwayError):
        writer.sync()
    writer.append(payload(2))
    with pytest.raises(ServiceAwayError):
        writer.close()
    counts = writer.counts
    assert (counts.durable, counts.doubtful, counts.dropped, counts.pending) == (1, 1, 1, 0)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_member_misses_nothing_over_a_fault_and_gets_nothing_twice(
    place, proxy, open_by_proxy, limits, fault
):
    """Above all what was handed to it in an answer that it never got."""
    with place.open().open_trace_writer(limits) as writer:
        for i in range(300):
            writer.append(payload(i, 100))
    member = open_by_proxy().open_record_reader(group="trainer")
    read = numbers(member.read(3))
    with place.open().open_trace_writer(limits) as writer:
        for i in range(300, 600):
            writer.append(payload(i, 100))
    fail(proxy, fault)
    with pytest.raises(ServiceAwayError):
        while records := member.read(50):
            read += numbers(records)
    with pytest.raises(ServiceAwayError):
        member.commit(member.offsets())
    proxy.flow()
    proxy.cut()

    def has_all():
        try:
            read.extend(numbers(member.read(1000)))
        except ServiceAwayError:
            return False
        return len(read) >= 600

    wait_until(has_all)
    assert sorted(read) == list(range(600))
    member.commit(member.offsets())
    (found,) = place.open().stats().groups
    assert (found.committed, found.pending, found.lost) == (600, 0, 0)
    member.close()


def test_a_slow_network_delays_and_loses_nothing(proxy, open_by_proxy, limits):
    proxy.delay_s = 0.02
    buffer = open_by_proxy(timeout_s=5)
    with buffer.open_trace_writer(limits) as writer:
        for i in range(10):
            writer.append(payload(i))
            writer.tend()
    assert read_all(buffer.open_record_reader()) == list(range(10))


def test_a_server_that_is_full_is_told_from_one_that_has_stored(place, open_by_proxy, limits):
    """Out of memory, a server refuses single commands; a batch must not be stored in part."""
    writer = open_by_proxy(spool_bytes=1 << 20).open_trace_writer(limits)
    writer.append(payload(0))
    writer.sync()
    with redis.Redis(port=place.server.port) as control:
        control.config_set("maxmemory", "1")
        try:
            for i in range(1, 50):
                writer.append(payload(i))
            with pytest.raises(ServiceAwayError, match="maxmemory"):
                writer.sync()
            assert writer.counts.pending == 49
        finally:
            control.config_set("maxmemory", "0")
    wait_until(lambda: writer.tend() or not writer.counts.pending)
    writer.close()
    assert read_all(place.open().open_record_reader()) == list(range(50))


def test_the_reader_of_a_watch_hears_again_after_a_cut(place, proxy, open_by_proxy):
    heard = []
    end = open_by_proxy().open_weights().watch(lambda: heard.append(1))
    wait_until(lambda: heard)
    proxy.cut()
    heard.clear()
    wait_until(lambda: heard)  # whatever it missed meanwhile: look again
    end()


def test_sync_interval_is_kept_by_a_writer_that_recovered(place, proxy, open_by_proxy, limits):
    writer = open_by_proxy().open_trace_writer(replace(limits, sync_interval_s=3600))
    writer.append(payload(0))
    assert list(writer.tend()) == []
    fail(proxy, "refuses")
    with pytest.raises(ServiceAwayError):
        writer.sync()
    proxy.flow()
    assert list(writer.sync()) == [0]
    writer.close()
