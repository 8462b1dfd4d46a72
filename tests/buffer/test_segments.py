"""Segment files: order, size limits, TTL, full disks and power cuts."""

import errno
import os
import resource
import subprocess
import time
from dataclasses import replace

import pytest

from buffer.interface import TraceLimits
from buffer.layout import read_tombstone
from buffer.segment_reader import SegmentReader
from buffer.segment_report import check_segments
from buffer.segment_writer import SegmentWriter
from oracles.small_disk import small_file_system

LIMITS = TraceLimits(segment_bytes=4096, max_bytes=1 << 20, ttl_s=3600.0, sync_interval_s=0.0)
HEAD_BYTES = 32


class Clock:
    """Unix time that moves only on request."""

    def __init__(self):
        self.now_s = 1_700_000_000.0

    def __call__(self):
        return self.now_s


def payload(number, num_bytes=100):
    return number.to_bytes(8, "little").ljust(num_bytes, b".")


def numbers(records):
    return [int.from_bytes(record.payload[:8], "little") for record in records]


def log_bytes(root):
    return sum(path.stat().st_size for path in root.glob("w*/*.seg"))


def test_records_come_back_in_order_over_many_segments(tmp_path):
    with SegmentWriter(tmp_path, LIMITS) as writer:
        for i in range(200):
            writer.append(payload(i))
        assert numbers(SegmentReader(tmp_path).read(1000)) == list(range(200))
        assert len(check_segments(tmp_path)) == 7
        assert all(report.num_bytes <= 4096 for report in check_segments(tmp_path))


def test_a_record_larger_than_a_segment_gets_a_segment_of_its_own(tmp_path):
    with SegmentWriter(tmp_path, LIMITS) as writer:
        for i, num_bytes in enumerate([100, 10_000, 100]):
            writer.append(payload(i, num_bytes))
        assert numbers(SegmentReader(tmp_path).read(10)) == [0, 1, 2]
        assert [report.records for report in check_segments(tmp_path)] == [1, 1, 1]


def test_offsets_of_another_kind_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"'w1-2' must hold segment, offset and number"):
        SegmentReader(tmp_path, {"w1-2": 7})


def test_a_reader_of_a_log_that_does_not_exist_yet_finds_it_later(tmp_path):
    reader = SegmentReader(tmp_path / "traces")
    assert reader.read(10) == []
    with SegmentWriter(tmp_path / "traces", LIMITS) as writer:
        assert reader.read(10) == []
        writer.append(payload(0))
        assert numbers(reader.read(10)) == [0]


def test_a_reader_that_looks_before_a_writer_has_its_lock_still_finds_its_records(tmp_path):
    with SegmentWriter(tmp_path / "elsewhere", LIMITS) as writer:
        writer.append(payload(0))
        writer.sync()
        (tmp_path / "log" / "w1-1").mkdir(parents=True)
        reader = SegmentReader(tmp_path / "log")
        assert reader.read(10) == []
        for path in (tmp_path / "elsewhere" / writer.name).iterdir():
            path.rename(tmp_path / "log" / "w1-1" / path.name)
        assert numbers(reader.read(10)) == [0]


def test_bytes_never_pass_the_cap_and_every_evicted_record_is_counted(tmp_path):
    limits = replace(LIMITS, max_bytes=16_384)
    with SegmentWriter(tmp_path, limits) as writer:
        reader = SegmentReader(tmp_path)
        for i in range(1000):
            writer.append(payload(i, 20 + i % 300))
            assert log_bytes(tmp_path) <= 16_384
        read = numbers(reader.read(1000))

        assert read == list(range(1000 - len(read), 1000))
        assert reader.counts.evicted_unread == 1000 - len(read)
        assert writer.counts.evicted_records == 1000 - len(read)
        written_bytes = sum(HEAD_BYTES + 20 + i % 300 for i in range(1000))
        assert writer.counts.evicted_bytes == written_bytes - log_bytes(tmp_path)


def test_segments_leave_at_their_ttl_also_when_the_server_is_idle(tmp_path):
    clock = Clock()
    limits = replace(LIMITS, ttl_s=0.08)  # eviction is due every 10 ms of real time
    with SegmentWriter(tmp_path, limits, clock=clock) as writer:
        for i in range(10):
            writer.append(payload(i))
        clock.now_s += 0.07
        time.sleep(0.02)
        writer.tend()
        writer.append(payload(10))
        assert numbers(SegmentReader(tmp_path).read(100)) == list(range(11))
        clock.now_s += 0.02
        time.sleep(0.02)
        writer.tend()
        assert numbers(SegmentReader(tmp_path).read(100)) == [10]
        assert writer.counts.evicted_records == 10
        clock.now_s += 0.08
        time.sleep(0.02)
        writer.tend()
        reader = SegmentReader(tmp_path)
        assert reader.read(100) == []
        assert reader.counts.evicted_unread == writer.counts.evicted_records == 11
        assert writer.append(payload(11)) == 11
        assert numbers(reader.read(100)) == [11]


def test_the_segment_that_a_living_process_writes_is_never_evicted(tmp_path, start_python):
    process = start_python(
        "import sys; from pathlib import Path; from buffer.interface import TraceLimits\n"
        "from buffer.segment_writer import SegmentWriter\n"
        "w = SegmentWriter(Path(sys.argv[1]), TraceLimits(4096, 8192, 1e9, 0))\n"
        "w.append(b'\\7'.ljust(8, b'\\0')); w.sync(); print('ready', flush=True)\n"
        "sys.stdin.read()",
        tmp_path,
        stdin=subprocess.PIPE,
    )
    assert process.stdout.readline() == "ready\n"
    with SegmentWriter(tmp_path, replace(LIMITS, max_bytes=12_288)) as writer:
        for i in range(300):
            writer.append(payload(i))
        assert 7 in numbers(SegmentReader(tmp_path).read(1000))
        assert log_bytes(tmp_path) <= 12_288
        process.kill()
        process.wait()
        for i in range(300):
            writer.append(payload(i))
        assert read_tombstone(next(tmp_path.glob(f"w{process.pid}-*"))).records == 1


def test_what_dead_writers_left_behind_is_swept_once_it_is_old(tmp_path):
    clock = Clock()
    clock.now_s = time.time()  # ages of folders and quarantined files are real
    with SegmentWriter(tmp_path, LIMITS, clock=clock) as writer:
        writer.append(payload(0))
    (tmp_path / "quarantine").mkdir()
    (tmp_path / "quarantine" / "header-w1-2-000000-0.bin").write_bytes(b"x")
    (tmp_path / "quarantine" / "link.bin").symlink_to("nowhere")  # stopped every writer
    reader = SegmentReader(tmp_path)
    reader.read(10)

    def tend():
        with SegmentWriter(tmp_path, LIMITS, clock=clock) as later:
            later.tend()

    clock.now_s += 3601
    tend()
    assert not list(tmp_path.glob("w*/*.seg"))
    assert not list(tmp_path.glob("quarantine/*"))
    clock.now_s += 3601
    tend()
    assert not (tmp_path / writer.name).exists()
    assert reader.read(10) == []
    assert writer.name not in reader.offsets()


ONE_BY_ONE = """
failed = []
for i, record in enumerate(records):
    try: w.append(record)
    except OSError as error: failed.append((i, error.errno))
"""
TOGETHER = "failed = [error.errno for error in w.append_all(records)]"


@pytest.mark.parametrize(
    ("write", "failed"),
    [
        pytest.param(ONE_BY_ONE, [(i, errno.EFBIG) for i in (3, 7, 11)], id="one by one"),
        pytest.param(TOGETHER, [errno.EFBIG] * 3, id="together"),
    ],
)
def test_a_full_disk_costs_the_records_that_do_not_fit_and_nothing_else(
    tmp_path, start_python, write, failed
):
    """A file size limit stands in for a full disk: the write stops in the middle of the record."""
    process = start_python(
        "import sys; from pathlib import Path; from buffer.interface import TraceLimits\n"
        "from buffer.segment_writer import SegmentWriter\n"
        "w = SegmentWriter(Path(sys.argv[1]), TraceLimits(1 << 20, 1 << 22, 1e9, 0))\n"
        "records = [i.to_bytes(8, 'little') * (100 if i % 4 == 3 else 1) for i in range(12)]\n"
        f"{write}\n"
        "w.sync(); print(failed, w.counts.durable)",
        tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900)),
    )
    output, _ = process.communicate(timeout=30)
    assert output == f"{failed} 9\n"
    reader = SegmentReader(tmp_path)
    assert numbers(reader.read(100)) == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert reader.counts.damaged == reader.counts.torn == 0


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 256 KiB, where this user may mount one."""
    with small_file_system(tmp_path / "disk", "256k") as folder:
        yield folder


def test_a_full_disk_keeps_all_that_was_acknowledged_and_is_used_again_when_it_has_room(tiny_disk):
    ballast = tiny_disk / "ballast"
    limits = replace(LIMITS, segment_bytes=32_768, max_bytes=131_072)
    with SegmentWriter(tiny_disk, limits) as writer:
        written = [writer.append(payload(i)) for i in range(100)]
        ballast.write_bytes(bytes((os.statvfs(tiny_disk).f_bavail - 1) * 4096))
        dropped = 0
        for i in range(100, 200):
            try:
                written.append(writer.append(payload(i)))
            except OSError as error:
                assert error.errno == errno.ENOSPC
                dropped += 1
        assert dropped > 0
        writer.sync()
        ballast.unlink()
        writer.append(payload(200))
        writer.sync()
        reader = SegmentReader(tiny_disk)
        assert len(reader.read(1000)) == writer.counts.durable == 201 - dropped
        assert reader.counts.damaged == 0
    [report] = check_segments(tiny_disk)
    assert (report.torn_bytes, report.damaged) == (0, 0)


def test_old_segments_can_leave_a_disk_that_is_full(tiny_disk):
    with SegmentWriter(tiny_disk, replace(LIMITS, max_bytes=65_536)) as writer:
        for i in range(600):
            writer.append(payload(i))
        fill = (os.statvfs(tiny_disk).f_bavail) * 4096
        (tiny_disk / "ballast").write_bytes(bytes(fill))  # the log is at its cap
        dropped = 0
        for i in range(600, 1000):
            try:
                writer.append(payload(i))
            except OSError:
                dropped += 1
        writer.sync()
        reader = SegmentReader(tiny_disk)
        assert len(reader.read(2000)) + reader.counts.evicted_unread == 1000 - dropped
        assert writer.counts.evicted_records == reader.counts.evicted_unread
        assert dropped < 50


def test_a_power_cut_takes_nothing_that_was_acknowledged(tmp_path, monkeypatch):
    """Simulated: only flushed bytes of a file are left, and only if its folder was flushed too."""
    flushed, named = {}, set()
    real_fdatasync, real_fsync = os.fdatasync, os.fsync

    def fdatasync(descriptor):
        flushed[os.readlink(f"/proc/self/fd/{descriptor}")] = os.fstat(descriptor).st_size
        real_fdatasync(descriptor)

    def fsync(descriptor):
        folder = os.readlink(f"/proc/self/fd/{descriptor}")
        named.update(os.path.join(folder, name) for name in os.listdir(folder))
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    monkeypatch.setattr(os, "fsync", fsync)
    writer = SegmentWriter(tmp_path / "log", LIMITS)
    for i in range(150):
        writer.append(payload(i))
        if i % 20 == 19:
            writer.sync()
    durable = writer.counts.durable
    assert durable > 140 - 1
    assert str(tmp_path / "log" / writer.name) in named
    for path in (tmp_path / "log" / writer.name).glob("*.seg"):
        os.truncate(path, flushed.get(str(path), 0) if str(path) in named else 0)
    kept = numbers(SegmentReader(tmp_path / "log").read(1000))
    assert kept[:durable] == list(range(durable))
    with pytest.raises(FileNotFoundError, match="cut it off"):  # what was pending is no more there
        writer.close()


def test_records_that_the_disk_failed_to_sync_are_never_acknowledged(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with SegmentWriter(tmp_path, LIMITS) as writer:
        writer.append(payload(0))
        writer.sync()
        writer.append(payload(1))
        with monkeypatch.context() as broken:
            broken.setattr(os, "fdatasync", fail)
            with pytest.raises(OSError, match="Input/output error"):
                writer.sync()
        writer.append(payload(2))
        assert list(writer.sync()) == [2]
        counts = writer.counts
        assert (counts.appended, counts.durable, counts.doubtful) == (3, 2, 1)
        assert [report.segment for report in check_segments(tmp_path)] == [0, 1]


def test_records_written_together_are_those_written_one_by_one(tmp_path):
    payloads = [payload(i, 8 + i * 37 % 900) for i in range(200)]
    contents = []
    for name, together in (("one", False), ("group", True)):
        with SegmentWriter(tmp_path / name, LIMITS, clock=Clock()) as writer:
            if together:
                for start in range(0, 200, 30):
                    assert writer.append_all(payloads[start : start + 30]) == []
            else:
                for one in payloads:
                    writer.append(one)
            assert writer.counts.appended == 200
            assert all(report.num_bytes <= 4096 for report in check_segments(tmp_path / name))
        records = SegmentReader(tmp_path / name).read(1000)
        contents.append([(record.payload, record.location) for record in records])
    assert contents[0] == contents[1]
    assert [one for one, _ in contents[0]] == payloads


def test_a_record_too_large_for_the_log_costs_no_other_of_its_group(tmp_path):
    with SegmentWriter(tmp_path, LIMITS) as writer:
        [error] = writer.append_all([payload(0), bytes(1 << 20), payload(2)])
        assert error.errno == errno.EFBIG
        assert numbers(SegmentReader(tmp_path).read(10)) == [0, 2]
