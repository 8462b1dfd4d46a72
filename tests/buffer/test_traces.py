"""The log's URL, its quarantine, and what a reader remembers."""

import json
import time
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from buffer.backends import open_backend
from buffer.codec import encode_trace
from buffer.embedded_log import EmbeddedLog, log_root
from buffer.frames import HEAD, MAGIC
from buffer.interface import TraceLimits
from buffer.resend import Wanted, replay_traces
from buffer.segment_report import check_segments
from buffer.segment_writer import SegmentWriter
from buffer.traces import TraceReader

LIMITS = TraceLimits(segment_bytes=1 << 16, max_bytes=1 << 22, ttl_s=3600.0, sync_interval_s=0.0)


@pytest.fixture
def log(tmp_path):
    return EmbeddedLog(f"log:{tmp_path}", tmp_path)


@pytest.fixture
def writer(tmp_path):
    with SegmentWriter(tmp_path, LIMITS) as one:
        yield one


def test_the_url_of_the_log_says_where_it_is(tmp_path):
    assert log_root("log:", tmp_path) == (tmp_path / "traces", None)
    assert str(log_root("log:/data/traces", tmp_path)[0]) == "/data/traces"
    assert log_root("log:?key_env=KEY", tmp_path)[1] == ("key_env", "KEY")


@pytest.mark.parametrize("url", ["amqp://me:secret@host", "log", "", "LOG:"])
def test_an_unknown_url_is_refused_and_the_known_ones_are_named(tmp_path, url):
    with pytest.raises(ValueError, match=r"scheme.*; known are 'log:', .*'memory:'") as caught:
        open_backend(url, tmp_path)
    assert "secret" not in str(caught.value)


def test_a_relative_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must name an absolute folder, as in 'log:/some/folder'"):
        open_backend("log:traces", tmp_path)


def test_records_that_are_no_traces_are_put_aside_with_their_reason(
    tmp_path, log, writer, make_trace, caplog
):
    sound = bytes(encode_trace(make_trace()))
    newer = sound[:16] + b"\7" + sound[17:]
    poison = sound.replace(b'"prompt_length":2', b'"prompt_length":9')
    for record in (b"rubbish!", newer, poison, sound):
        writer.append(record)
    reader = TraceReader(log)

    assert [trace.seq for trace in reader.read(100)] == [0]
    assert reader.counts.quarantined == 3
    assert reader.counts.quarantined_by_reason == {"header": 1, "version": 1, "content": 1}
    kept = {
        path.name.split("-")[0]: path.read_bytes() for path in (tmp_path / "quarantine").iterdir()
    }
    assert kept == {"header": b"rubbish!", "version": newer, "content": poison}
    # An error among the arguments would hold its frames: the record, for as long as the log's.
    assert all(isinstance(one, str) for line in caplog.records for one in line.args)
    assert len(caplog.records) == 3


OLD = Path(__file__).parent / "golden" / "trace-v1.safetensors"


def frame_of_version_1(payload, number):
    """As an older server wrote it, with a CRC-32."""
    rest = 1, 0, len(payload), number, int(time.time() * 1000)
    crc = zlib.crc32(payload, zlib.crc32(HEAD.pack(MAGIC, 0, *rest)[8:]))
    return HEAD.pack(MAGIC, crc, *rest) + payload


def test_the_log_of_an_older_server_is_put_aside_and_counted_and_the_rest_is_read(
    tmp_path, log, make_trace, caplog
):
    folder = tmp_path / "w1-1"
    folder.mkdir()
    (folder / "LOCK").touch()
    frames = [frame_of_version_1(OLD.read_bytes(), number) for number in range(3)]
    flipped = bytearray(frames[1])
    flipped[100] ^= 1
    (folder / "000000.seg").write_bytes(frames[0] + flipped + frames[2])
    with SegmentWriter(tmp_path, LIMITS) as writer:
        writer.append(encode_trace(make_trace(seq=5)))
    reader = TraceReader(log)

    assert [trace.seq for trace in reader.read(100)] == [5]
    assert reader.counts.quarantined_by_reason == {"version": 2}
    assert reader.counts.damaged == 1
    assert len(list((tmp_path / "quarantine").iterdir())) == 2
    [told] = [record.getMessage() for record in caplog.records]
    assert "of version 1, written by an older server" in told
    assert [report.records for report in check_segments(tmp_path)] == [2, 1]


def test_the_quarantine_is_bounded_in_bytes_and_the_count_goes_on(tmp_path, writer):
    for _ in range(10):
        writer.append(b"x" * 300)
    log = EmbeddedLog(f"log:{tmp_path}", tmp_path, max_unreadable_bytes=1000)
    reader = TraceReader(log)
    reader.read(100)

    assert reader.counts.quarantined == 10
    assert sum(path.stat().st_size for path in (tmp_path / "quarantine").iterdir()) == 900


def test_all_that_was_written_is_accounted_for(tmp_path, log, make_trace):
    limits = replace(LIMITS, segment_bytes=8192, max_bytes=32_768)
    reader = TraceReader(log)
    with SegmentWriter(tmp_path, limits) as writer:
        for seq in range(200):
            blob = encode_trace(make_trace(seq=seq // 2 if seq % 10 == 1 else seq + 1000))
            writer.append(b"rubbish" if seq % 7 == 0 else blob)
            if seq % 60 == 59:
                reader.read(20)
        while reader.read(50):
            pass
        path = sorted((tmp_path / writer.name).glob("*.seg"))[-1]
        offset = path.stat().st_size
        writer.append(encode_trace(make_trace(seq=5000)))
        writer.append(encode_trace(make_trace(seq=5001)))
        with path.open("r+b") as file:
            file.seek(offset + 40)
            file.write(b"\xff")
        assert [trace.seq for trace in reader.read(9)] == [5001]

    counts = reader.counts
    assert counts.evicted_unread > 0
    assert counts.damaged == 1
    assert (
        counts.read + counts.duplicate + counts.quarantined + counts.damaged + counts.evicted_unread
    ) == 202


@pytest.mark.parametrize("restarts", [False, True])
def test_a_replay_is_learnt_once_whatever_the_number_of_epochs(tmp_path, make_trace, restarts):
    source = open_backend(f"memory:{tmp_path}/source", tmp_path)
    with source.open_trace_writer(LIMITS) as writer:
        for epoch in range(300):
            writer.append(encode_trace(make_trace(epoch=epoch, features=None)))
    log = EmbeddedLog("log:", tmp_path)
    reader = TraceReader(log)
    replay_traces(source, log, LIMITS, Wanted())
    assert len(reader.read(1000)) == 300
    if restarts:
        reader = TraceReader(log, json.loads(json.dumps(reader.offsets())))
    replay_traces(source, log, LIMITS, Wanted())
    assert reader.read(1000) == []
    assert reader.counts.duplicate == 300


def test_a_replay_of_one_tenant_after_another_loses_nothing(tmp_path, make_trace):
    source, log = open_backend(f"memory:{tmp_path}/source", tmp_path), EmbeddedLog("log:", tmp_path)
    with source.open_trace_writer(LIMITS) as writer:
        for seq in range(2200):
            trace = make_trace(seq=seq, tenant=f"t{seq % 2}", features=None)
            writer.append(encode_trace(trace))
    for tenant in ("t0", "t1"):
        replay_traces(source, log, LIMITS, Wanted(tenants=[tenant]))
    reader = TraceReader(log, group="trainer")
    learnt = []
    while traces := reader.read(64):
        learnt += [trace.seq for trace in traces]
    assert sorted(learnt) == list(range(2200))
    assert reader.counts.duplicate == 0
    reader.close()
