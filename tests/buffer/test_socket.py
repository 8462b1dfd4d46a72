"""A buffer in the memory of a trainer: who holds it, what happens when that process ends, and that
nothing of it is on a disk."""

import gc
import os
import time
from contextlib import suppress

import pytest

from buffer.backends import open_backend
from buffer.codec import decode_trace, encode_trace
from buffer.interface import ServiceAwayError, TraceLimits
from buffer.socket_writer import SocketWriter
from oracles.forked import Forked
from oracles.support import REPOSITORY

LIMITS = TraceLimits(segment_bytes=4096, max_bytes=1 << 24, ttl_s=3600.0, sync_interval_s=0.0)

HOLD = """
import sys, time
from pathlib import Path
from buffer.backends import open_backend

backend = open_backend("socket:", Path(sys.argv[1]))
assert backend.host()
print("holding", flush=True)
time.sleep(600)
"""


def wait_until(holds):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def hold(tmp_path):
    """Start processes that hold the buffer of ``tmp_path / "run"``."""
    started = []

    def start():
        output = tmp_path / f"holder-{len(started)}"
        env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        process = Forked(["-c", HOLD, str(tmp_path / "run")], env, tmp_path, output)
        started.append(process)
        wait_until(lambda: "holding" in output.read_text())
        return process

    yield start
    for process in started:
        process.kill()


def payloads(make_trace, seqs):
    return [bytes(encode_trace(make_trace(seq=seq))) for seq in seqs]


def sync(writer):
    def works():
        with suppress(ServiceAwayError):
            writer.sync()
        return writer.counts.pending == 0

    wait_until(works)


def test_records_wait_for_a_holder_and_those_of_a_killed_one_are_gone(tmp_path, make_trace, hold):
    run = tmp_path / "run"
    backend = open_backend("socket:", run)
    with backend.open_trace_writer(LIMITS) as writer:
        for payload in payloads(make_trace, range(5)):
            writer.append(payload)
        with pytest.raises(ServiceAwayError, match="no trainer holds the buffer"):
            writer.sync()
        assert writer.counts.pending == 5
        holder = hold()
        sync(writer)
        assert backend.stats().held == 5
        holder.kill()
        holder.wait(60)
        with pytest.raises(ServiceAwayError):
            backend.stats()

        for payload in payloads(make_trace, range(5, 8)):
            writer.append(payload)
        hold()
        sync(writer)
        reader = backend.open_record_reader()
        assert [decode_trace(one.payload).seq for one in reader.read(10)] == [5, 6, 7]
        stats = backend.stats()
        assert (stats.appended, stats.held) == (3, 3)
        counts = writer.counts
        assert (counts.appended, counts.durable, counts.dropped) == (8, 8, 0)
        reader.close()


def test_the_next_member_takes_over_from_a_killed_holder(tmp_path, make_trace, hold):
    run = tmp_path / "run"
    holder, backend = hold(), open_backend("socket:", run)
    member = open_backend("socket:", run).open_record_reader(group="trainer")
    with backend.open_trace_writer(LIMITS) as writer:
        writer.append(payloads(make_trace, [0])[0])
        writer.sync()
        assert [decode_trace(one.payload).seq for one in member.read(10)] == [0]
        before = member.offsets()
        holder.kill()
        holder.wait(60)
        with pytest.raises(ServiceAwayError):
            member.read(10)
        assert member.read(10) == []  # it holds the buffer itself from now on
        writer.append(payloads(make_trace, [1])[0])
        sync(writer)
        assert [decode_trace(one.payload).seq for one in member.read(10)] == [1]
        member.commit(before)  # of the former holder: nothing is left of it
        member.commit(member.offsets())
        assert member.counts.read == 2
        (group,) = open_backend("socket:", run).stats().groups
        assert (group.committed, group.pending, group.lost) == (1, 0, 0)
    member.close()


def test_the_oldest_are_dropped_and_counted_while_nobody_holds_the_buffer(tmp_path, make_trace):
    many = payloads(make_trace, range(20))
    writer = SocketWriter(tmp_path / "none.sock", LIMITS, spool_bytes=8 * len(many[0]))
    for payload in many:
        writer.append(payload)
    counts = writer.counts
    assert counts.pending + counts.dropped == counts.appended == 20
    assert counts.pending <= 9  # what was tried to send stays, and the newest
    with pytest.raises(ServiceAwayError):
        writer.close()
    counts = writer.counts
    assert (counts.pending, counts.dropped + counts.doubtful) == (0, 20)


def test_nothing_is_on_the_disk_and_only_the_owner_may_connect(tmp_path, make_trace):
    run = tmp_path / ("a" * 100) / "run"  # longer than an address may be
    backend = open_backend("socket:", run)
    assert backend.host()
    with backend.open_trace_writer(LIMITS) as writer:
        for payload in payloads(make_trace, range(5)):
            writer.append(payload)
    assert backend.stats().held == 5
    backend.keep_unreadable("content-w-1", b"secret")
    files = {path.name: path for path in run.rglob("*")}
    assert files.keys() == {"traces.sock", "traces.sock.lock"}
    assert files["traces.sock"].stat().st_mode & 0o777 == 0o600
    assert files["traces.sock.lock"].stat().st_size == 0


def test_a_path_that_is_not_absolute_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must name an absolute path, as in 'socket:/some/path'"):
        open_backend("socket:x", tmp_path)


def make_file(path):
    path.write_text("mine")


@pytest.mark.parametrize(
    ("make", "kind"), [(make_file, "a file"), (os.mkdir, "a folder"), (os.mkfifo, "a named pipe")]
)
def test_what_is_no_socket_is_refused_and_left_as_it_is(tmp_path, make, kind):
    path = tmp_path / "place"
    early = open_backend(f"socket:{path}", tmp_path / "run")
    make(path)
    before = path.lstat()
    with pytest.raises(ValueError, match=f"{path} is {kind}, not a socket") as error:
        open_backend(f"socket:{path}", tmp_path / "run")
    assert f"buffer.url 'socket:{path}'" in str(error.value)
    for _ in range(2):  # the first leaves no lock behind
        with pytest.raises(FileExistsError, match=f"{path} is {kind}, not a socket"):
            early.host()
    after = path.lstat()
    assert (after.st_ino, after.st_mode, after.st_size) == (
        before.st_ino,
        before.st_mode,
        before.st_size,
    )


def test_a_file_that_has_replaced_the_socket_outlives_its_holder(tmp_path):
    path = tmp_path / "run" / "traces.sock"
    backend = open_backend("socket:", tmp_path / "run")
    assert backend.host()
    path.unlink()
    make_file(path)
    del backend
    gc.collect()
    assert path.read_text() == "mine"
    path.unlink()
    assert open_backend("socket:", tmp_path / "run").host()  # the former holder has let go


def test_what_a_killed_holder_had_handed_out_is_the_members_that_got_it(tmp_path, make_trace, hold):
    run = tmp_path / "run"
    run.mkdir()
    holder = hold()
    writer = open_backend("socket:", run).open_trace_writer(LIMITS)
    for one in payloads(make_trace, range(3)):
        writer.append(one)
    sync(writer)
    writer.close()
    reader = open_backend("socket:", run).open_record_reader(group="trainer")
    records = reader.read(10)
    found = [(one, ("server-1", 1, number)) for number, one in enumerate(records)]
    assert reader.claim(found[:2]) == [True, True]
    assert reader.claim([(found[2][0], found[0][1])]) == [False]
    holder.kill()
    holder.wait(60)
    with pytest.raises(ServiceAwayError):
        reader.claim(found)
    assert reader.claim(found) == [True, True, True]
    reader.close()
