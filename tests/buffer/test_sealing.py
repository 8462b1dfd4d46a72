"""An encrypted log holds nothing readable, and a wrong key is told before anything happens."""

import os
import secrets

import pytest

from buffer.backends import open_backend
from buffer.codec import encode_trace
from buffer.interface import TraceLimits
from buffer.traces import TraceReader

LIMITS = TraceLimits(segment_bytes=1 << 16, max_bytes=1 << 24, ttl_s=3600.0, sync_interval_s=0.0)


@pytest.fixture
def keys(tmp_path):
    """Two files with a key each."""
    paths = [tmp_path / name for name in ("right.key", "wrong.key")]
    for path in paths:
        path.write_text(f"{secrets.token_hex(32)}\n")
    return paths


def write(url, run, make_trace, seqs):
    with open_backend(url, run).open_trace_writer(LIMITS) as writer:
        for seq in seqs:
            writer.append(encode_trace(make_trace(seq=seq, tenant="umbrella")))


def test_no_file_shows_what_is_in_it_and_the_key_opens_it(tmp_path, make_trace, keys, monkeypatch):
    run = tmp_path / "run"
    url = f"log:?key_file={keys[0]}"
    write(url, run, make_trace, range(5))
    open_backend(url, run).keep_unreadable("header-w-1", b"umbrella")
    contents = [path.read_bytes() for path in run.rglob("*") if path.is_file()]
    assert sum(map(len, contents)) > 1000
    assert not any(b"umbrella" in one or b"slipstream.trace" in one for one in contents)
    monkeypatch.setenv("TRACE_KEY", keys[0].read_text().strip())
    again = open_backend("log:?key_env=TRACE_KEY", run)
    assert [trace.seq for trace in TraceReader(again).read(10)] == [*range(5)]
    assert again.delete("umbrella").records == 5


def test_trainers_of_an_encrypted_log_share_what_they_learn_from(tmp_path, make_trace, keys):
    run, url = tmp_path / "run", f"log:?key_file={keys[0]}"
    write(url, run, make_trace, range(3))
    reader = TraceReader(open_backend(url, run), group="trainer")
    assert len(reader.read(10)) == 3
    reader.commit(reader.offsets())
    reader.close()
    write(url, run, make_trace, range(4))
    other = TraceReader(open_backend(url, run), group="trainer")
    assert [trace.seq for trace in other.read(10)] == [3]
    other.close()


def test_traces_of_an_encrypted_log_are_fetched_unless_their_tenant_was_deleted(
    tmp_path, make_trace, keys
):
    run, url = tmp_path / "run", f"log:?key_file={keys[0]}"
    write(url, run, make_trace, range(5))
    reader = TraceReader(open_backend(url, run))
    locations = {trace.seq: location for location, trace in reader.read_located(10)}
    found = reader.fetch([locations[1], locations[4]])
    assert {location: trace.seq for location, trace in found.items()} == {
        locations[1]: 1,
        locations[4]: 4,
    }
    open_backend(url, run).delete("umbrella")
    assert reader.fetch(locations.values()) == {}


def test_a_wrong_key_or_none_is_refused_and_nothing_is_lost(tmp_path, make_trace, keys):
    run = tmp_path / "run"
    right, wrong = (f"log:?key_file={key}" for key in keys)
    write(right, run, make_trace, range(3))
    for url, problem in ((wrong, "is not that of the log"), ("log:", "is encrypted: name its key")):
        backend = open_backend(url, run)
        for attempt in (
            lambda backend=backend: backend.open_record_reader(group="trainer"),
            lambda backend=backend: backend.open_trace_writer(LIMITS),
            lambda backend=backend: backend.delete("umbrella"),
            lambda backend=backend: backend.stats(),
        ):
            with pytest.raises(ValueError, match=problem):
                attempt()
    reader = TraceReader(open_backend(right, run), group="trainer")
    assert [trace.seq for trace in reader.read(10)] == [0, 1, 2]
    reader.close()


def test_what_was_written_before_encryption_began_stays_readable(tmp_path, make_trace, keys):
    run = tmp_path / "run"
    write("log:", run, make_trace, range(2))
    url = f"log:?key_file={keys[0]}"
    write(url, run, make_trace, range(2, 4))
    traces = TraceReader(open_backend(url, run)).read(10)
    assert sorted(trace.seq for trace in traces) == [0, 1, 2, 3]


def test_a_flipped_bit_is_damage_and_not_another_trace(tmp_path, make_trace, keys):
    run = tmp_path / "run"
    url = f"log:?key_file={keys[0]}"
    write(url, run, make_trace, range(2))
    (path,) = run.rglob("*.seg")
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    reader = TraceReader(open_backend(url, run))
    assert [trace.seq for trace in reader.read(10)] == [1]
    assert reader.counts.damaged == 1


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("log:?key=1", "there may be key_file=PATH or key_env=NAME"),
        ("log:?key_file=", "there may be key_file=PATH"),
        ("log:?key_file=/nowhere/key", "cannot be read: No such file"),
        ("log:?key_env=NO_SUCH_KEY", "NO_SUCH_KEY, which is not set"),
        ("log:?key_env=SHORT_KEY", "must hold 64 hex digits"),
    ],
)
def test_a_key_that_cannot_be_used_is_refused_and_not_shown(tmp_path, monkeypatch, url, problem):
    monkeypatch.setenv("SHORT_KEY", "5ec4e7")
    with pytest.raises(ValueError, match=problem) as error:
        open_backend(url, tmp_path)
    assert "5ec4e7" not in str(error.value)


@pytest.mark.timeout(30)
def test_a_pipe_or_a_device_is_no_key_but_a_link_to_one_is(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "a named pipe"), ("/dev/zero", "a device")):
        problem = f"key_file {path} cannot be read: it is {kind}, not a regular file"
        with pytest.raises(ValueError, match=problem):
            open_backend(f"log:?key_file={path}", tmp_path)
    (tmp_path / "key").write_text("5e" * 32)
    (tmp_path / "link").symlink_to(tmp_path / "key")
    open_backend(f"log:?key_file={tmp_path / 'link'}", tmp_path)
