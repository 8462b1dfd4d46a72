"""A log whose files are deleted under its writer, or whose folder cannot be made, loses nothing
uncounted."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import pytest

from buffer.embedded_log import EmbeddedLog
from buffer.frames import scan
from buffer.interface import TraceLimits
from buffer.segment_reader import SegmentReader
from buffer.segment_report import check_segments
from buffer.segment_writer import SegmentWriter

LIMITS = TraceLimits(segment_bytes=4096, max_bytes=1 << 20, ttl_s=3600.0, sync_interval_s=0.0)


def payload(number: int) -> bytes:
    return number.to_bytes(8, "little").ljust(100, b".")


def on_disk(root) -> list[int]:
    reader = SegmentReader(root)
    found = sorted(int.from_bytes(r.payload[:8], "little") for r in reader.read(1000))
    assert (reader.counts.damaged, reader.counts.torn, reader.counts.evicted_unread) == (0, 0, 0)
    return found


def frame_count(path) -> list[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return [1 for _ in scan(descriptor, path.stat().st_size)]
    finally:
        os.close(descriptor)


def delete_run(root, writer):
    shutil.rmtree(root.parent)


def delete_log(root, writer):
    shutil.rmtree(root)


def delete_folder(root, writer):
    shutil.rmtree(root / writer.name)


def move_log(root, writer):
    root.rename(root.with_name("moved"))


def replace_folder(root, writer):
    (root / writer.name).rename(root / "w1-1")
    (root / writer.name).mkdir()


DELETIONS = [delete_run, delete_log, delete_folder, move_log]


@pytest.mark.parametrize("delete", DELETIONS)
def test_what_is_written_after_a_deletion_is_on_disk(tmp_path, delete):
    root = tmp_path / "run" / "traces"
    with SegmentWriter(root, LIMITS) as writer:
        for number in range(58):
            writer.append(payload(number))
            writer.sync()
        delete(root, writer)
        for number in range(58, 116):
            writer.append(payload(number))
            writer.sync()
        assert on_disk(root) == list(range(58, 116))
        counts = writer.counts
        assert (counts.durable, counts.missing, counts.doubtful) == (116, 58, 0)
    assert [report.damaged for report in check_segments(root)] == [0, 0]


@pytest.mark.parametrize("delete", DELETIONS)
def test_what_was_not_acknowledged_when_it_was_deleted_is_lost_and_counted(tmp_path, delete):
    root = tmp_path / "run" / "traces"
    with SegmentWriter(root, LIMITS) as writer:
        writer.append(payload(0))
        writer.sync()
        writer.append_all([payload(1), payload(2)])
        delete(root, writer)
        with pytest.raises(FileNotFoundError, match="deleted the segment"):
            writer.sync()
        assert (writer.counts.durable, writer.counts.doubtful, writer.counts.pending) == (1, 2, 0)
        assert writer.append_all([payload(3), payload(4)]) == []
        assert list(writer.sync()) == [3, 4]
        assert on_disk(root) == [3, 4]


def test_a_segment_alone_that_is_deleted_is_followed_by_another(tmp_path):
    with SegmentWriter(tmp_path, LIMITS) as writer:
        writer.append(payload(0))
        writer.sync()
        (tmp_path / writer.name / "000000.seg").unlink()
        writer.append(payload(1))
        writer.sync()
        counts = writer.counts
        assert (counts.durable, counts.missing, counts.doubtful) == (2, 1, 0)
        [segment] = (tmp_path / writer.name).glob("*.seg")
        assert segment.name == "000001.seg"


def test_what_was_deleted_is_told_from_what_was_evicted_by_whomever(tmp_path):
    limits = replace(LIMITS, max_bytes=16384)
    with SegmentWriter(tmp_path, limits) as writer, SegmentWriter(tmp_path, limits) as other:
        for number in range(110):
            writer.append(payload(number))
        for number in range(40):  # evicts what the first one wrote
            other.append(payload(number))
        assert other.counts.evicted_records > 0
        assert writer.counts.missing == 0
        oldest, *_ = sorted((tmp_path / writer.name).glob("*.seg"))
        num_deleted = sum(frame_count(oldest))
        oldest.unlink()
        for number in range(30):  # begins a segment, and so looks at what is there
            writer.append(payload(number))
        assert writer.counts.missing == num_deleted > 0


def test_what_was_deleted_from_an_idle_writer_is_counted_when_it_closes(tmp_path, caplog):
    writer = SegmentWriter(tmp_path / "traces", LIMITS)
    for number in range(58):
        writer.append(payload(number))
    writer.sync()
    shutil.rmtree(tmp_path / "traces")
    writer.close()
    assert (writer.counts.durable, writer.counts.missing) == (58, 58)
    assert "deleted 58 acknowledged records" in caplog.text


def test_a_folder_that_somebody_put_in_its_place_is_not_written_to(tmp_path):
    with SegmentWriter(tmp_path, LIMITS) as writer:
        first = writer.name
        replace_folder(tmp_path, writer)
        writer.append(payload(7))
        writer.sync()
        assert writer.name != first
        assert list((tmp_path / first).iterdir()) == []
        assert on_disk(tmp_path) == [7]


def test_an_idle_writer_of_a_deleted_log_has_nothing_to_say(tmp_path):
    root = tmp_path / "traces"
    with SegmentWriter(root, replace(LIMITS, ttl_s=0.001)) as writer:
        writer.append(payload(0))
        writer.sync()
        shutil.rmtree(root)
        for _ in range(3):
            assert list(writer.tend()) == []
        assert not root.exists()


@pytest.mark.parametrize("below", ["", "run", "run/traces"])
def test_a_log_that_cannot_be_made_is_made_once_it_can(tmp_path, below):
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    root = blocked / below
    with SegmentWriter(root, LIMITS) as writer:
        assert [type(e) for e in writer.append_all([payload(0), payload(1)])] in (
            [NotADirectoryError] * 2,
            [FileExistsError] * 2,
        )
        assert list(writer.tend()) == []
        assert (writer.counts.durable, writer.counts.doubtful, writer.counts.pending) == (0, 0, 0)
        blocked.unlink()
        writer.append(payload(2))
        writer.sync()
        assert on_disk(root) == [2]


def test_traces_are_their_owners_alone_to_read(tmp_path):
    before = os.umask(0)  # the most careless one
    try:
        root = tmp_path / "run" / "traces"
        with SegmentWriter(root, replace(LIMITS, max_bytes=8192)) as writer:
            for number in range(200):  # evicts, and so writes all kinds of files
                writer.append(payload(number))
            writer.sync()
            EmbeddedLog("log:", tmp_path / "run").keep_unreadable("x", b"secret")
            modes = {path.relative_to(root): path.stat().st_mode for path in root.rglob("*")}
    finally:
        os.umask(before)
    assert {path.name for path in modes} >= {"LOCK", "EVICTED.json", "EVICT.lock", "x.bin"}
    assert root.stat().st_mode & 0o777 == 0o700
    for path, mode in modes.items():
        assert mode & 0o777 == (0o700 if (root / path).is_dir() else 0o600), path


def test_folders_that_a_reader_makes_are_their_owners_alone_too(tmp_path):
    root = tmp_path / "run" / "traces"
    before = os.umask(0o022)
    try:
        reader = EmbeddedLog("log:", tmp_path / "run").open_record_reader(group="trainer")
        assert reader.read(1) == []
        reader.close()
    finally:
        os.umask(before)
    for folder in (root, root / "groups", root / "groups" / "trainer"):
        assert folder.stat().st_mode & 0o777 == 0o700, folder


@pytest.mark.parametrize(("num_bytes", "num_left"), [(0, 0), (10, 0), (400, 3), (1000, 7)])
def test_what_is_cut_off_an_open_segment_is_missing(tmp_path, num_bytes, num_left):
    root = tmp_path / "traces"
    with SegmentWriter(root, LIMITS) as writer:
        for number in range(10):
            writer.append(payload(number))
        writer.sync()
        (path,) = (root / writer.name).glob("*.seg")
        assert writer.counts.missing == 0
        os.truncate(path, num_bytes)
        assert len(frame_count(path)) == num_left
        writer.append(payload(10))  # behind the hole it would be lost, too
        writer.sync()
        counts = writer.counts
        assert (counts.durable, counts.missing, counts.doubtful) == (11, 10 - num_left, 0)
        assert [path.name for path in sorted(path.parent.glob("*.seg"))] == [
            "000000.seg",
            "000001.seg",
        ]
    reader = SegmentReader(root)
    found = [int.from_bytes(one.payload[:8], "little") for one in reader.read(100)]
    assert found == [*range(num_left), 10]


def test_what_is_cut_off_before_it_was_acknowledged_is_lost_and_counted(tmp_path):
    with SegmentWriter(tmp_path, replace(LIMITS, sync_interval_s=60.0)) as writer:
        writer.append(payload(0))
        writer.sync()
        writer.append(payload(1))
        (path,) = (tmp_path / writer.name).glob("*.seg")
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(FileNotFoundError, match="cut it off"):
            writer.sync()
        counts = writer.counts
        assert (counts.durable, counts.missing, counts.doubtful) == (1, 0, 1)
