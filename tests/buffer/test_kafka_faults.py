"""Whatever the network does between us and Kafka, calls end in time, nothing acknowledged is lost,
and every record is counted. The broker is Tansu, behind a proxy."""

import contextlib
import time
from dataclasses import replace

import pytest
import trustme

from buffer.backends import open_backend
from buffer.disk_spool import DiskSpool
from buffer.interface import ServiceAwayError
from oracles.kafka_brokers import Broker, free_port
from oracles.proxies import Proxy


def payload(number, num_bytes=1000):
    return number.to_bytes(8, "little").ljust(num_bytes, b".")


def numbers(records):
    return [int.from_bytes(record.payload[:8], "little") for record in records]


def wait_until(holds):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def tend(writer):
    with contextlib.suppress(ServiceAwayError):
        writer.tend()
    return not writer.counts.pending


def read_until(reader, num_records):
    read = []

    def is_done():
        with contextlib.suppress(ServiceAwayError):
            read.extend(numbers(reader.read(100)))
        return len(set(read)) >= num_records

    wait_until(is_done)
    return read


@pytest.fixture(scope="module")
def certificates():
    return trustme.CA()


@pytest.fixture(params=[False], ids=["plain"])
def tls(request):
    return request.param


@pytest.fixture
def proxy(tmp_path, certificates, tls):
    """A proxy before a broker that knows no other way to itself."""
    context = None
    if tls:
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificates.issue_cert("127.0.0.1").configure_cert(context)
    port = free_port()
    with Proxy(port, context) as proxy:
        broker = Broker("tansu", tmp_path / "broker", port, advertised=proxy.port)
        yield proxy
        broker.kill()


@pytest.fixture
def open_buffer(proxy, tmp_path):
    url = f"kafka://127.0.0.1:{proxy.port}/faults?partitions=1&batch_bytes=0&timeout_s=1"
    return lambda more="": open_backend(url + more, tmp_path)


def stall(proxy):
    proxy.stall()


def cut(proxy):
    proxy.refuses = True
    proxy.cut()


def reset(proxy):
    proxy.refuses = True
    proxy.reset()


def swallow(proxy):
    proxy.swallow_answers = True


def delay(proxy):
    proxy.delay_s = 0.05


@pytest.mark.parametrize("fault", [stall, cut, reset, swallow, delay])
def test_what_is_written_during_a_fault_arrives_after_it(open_buffer, proxy, limits, fault):
    writer = open_buffer().open_trace_writer(limits)
    reader = open_buffer().open_record_reader()
    for i in range(20):
        writer.append(payload(i))
    writer.sync()
    assert read_until(reader, 20) == list(range(20))
    fault(proxy)
    for i in range(20, 60):
        writer.append(payload(i))
        if i % 10 == 0:
            tend(writer)
    proxy.flow()
    wait_until(lambda: tend(writer))
    counts = writer.counts
    assert (counts.appended, counts.durable, counts.dropped, counts.doubtful) == (60, 60, 0, 0)
    # What was stored although its answer was lost may come twice, never out of order or not at all.
    assert sorted(set(read_until(reader, 40))) == list(range(20, 60))
    writer.close()
    reader.close()


def test_without_a_broker_the_oldest_are_dropped_and_all_are_counted(open_buffer, proxy, limits):
    cut(proxy)
    writer = open_buffer("&spool_bytes=65536").open_trace_writer(replace(limits, max_bytes=1 << 24))
    for i in range(100):
        writer.append(payload(i, 10_000))
        tend(writer)
    dropped = writer.counts.dropped
    assert dropped == 94
    proxy.flow()
    wait_until(lambda: tend(writer))
    assert read_until(open_buffer().open_record_reader(), 6) == list(range(94, 100))
    writer.close()
    counts = writer.counts
    assert (counts.durable, counts.dropped, counts.pending, counts.doubtful) == (6, 94, 0, 0)


def test_with_a_spool_on_the_disk_what_waits_outlives_the_server(
    open_buffer, proxy, limits, tmp_path
):
    root = tmp_path / "spool"
    wide = replace(limits, max_bytes=1 << 24)

    def open_spool():
        inner = open_buffer("&spool_bytes=65536").open_trace_writer(wide)
        return DiskSpool(inner, root, wide, 1 << 20, window_bytes=20_000)

    writer = open_spool()
    writer.append(payload(0))
    writer.sync()
    cut(proxy)
    for i in range(1, 60):
        writer.append(payload(i))
    with pytest.raises(ServiceAwayError):
        writer.close()
    assert (writer.counts.durable, writer.counts.left, writer.counts.dropped) == (1, 59, 0)
    proxy.flow()
    second = open_spool()
    wait_until(lambda: tend(second) and second.counts.recovered == 59)
    second.close()
    assert sorted(read_until(open_buffer().open_record_reader(), 60)) == list(range(60))
    assert not list(root.glob("w*"))


def test_a_writer_that_is_closed_during_a_fault_counts_what_it_gives_up(open_buffer, proxy, limits):
    writer = open_buffer().open_trace_writer(limits)
    writer.append(payload(0))
    writer.sync()
    proxy.stall()
    for i in range(1, 6):
        writer.append(payload(i))
    with pytest.raises(ServiceAwayError, match="5 records are not acknowledged"):
        writer.close()
    counts = writer.counts
    assert (counts.appended, counts.durable, counts.pending) == (6, 1, 0)
    assert counts.doubtful + counts.dropped == 5


@pytest.mark.parametrize("tls", [True], indirect=True, ids=["tls"])
def test_tls_carries_traces_and_a_stranger_is_refused(proxy, tmp_path, certificates, limits):
    ca = tmp_path / "ca.pem"
    certificates.cert_pem.write_to_path(str(ca))
    url = f"kafkas://127.0.0.1:{proxy.port}/tls?partitions=1&batch_bytes=0&timeout_s=2"
    with open_backend(f"{url}&ca={ca}", tmp_path).open_trace_writer(limits) as writer:
        writer.append(payload(7))
        writer.sync()
    assert numbers(open_backend(f"{url}&ca={ca}", tmp_path).open_record_reader().read(5)) == [7]
    with pytest.raises(ServiceAwayError):
        open_backend(url, tmp_path).open_record_reader().read(5)


def test_a_record_over_the_limit_of_a_message_is_split_and_comes_back_in_its_place(
    open_buffer, proxy, limits
):
    wide = replace(limits, max_bytes=1 << 24)
    with open_buffer("&message_bytes=8192").open_trace_writer(wide) as writer:
        for i, num_bytes in enumerate((100, 50_000, 7000, 7681, 20_000, 8)):
            writer.append(payload(i, num_bytes))
        writer.sync()
    records = open_buffer().open_record_reader().read(10)
    assert numbers(records) == list(range(6))
    assert [len(one.payload) for one in records] == [100, 50_000, 7000, 7681, 20_000, 8]
    wanted = {(one.writer, one.location): one.payload for one in records[1:5]}
    assert open_buffer().fetch(wanted) == wanted
