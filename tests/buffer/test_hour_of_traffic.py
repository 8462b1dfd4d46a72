"""A log whose size the settings leave open holds an hour of its own traffic."""

import os
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from buffer.backends import open_backend
from buffer.hour_of_traffic import LEAST_BYTES, Traffic, allowed_bytes, measure
from buffer.interface import TraceLimits
from buffer.layout import read_tombstone
from buffer.segment_list import Segment, SegmentList
from buffer.segment_reader import SegmentReader
from buffer.segment_writer import SegmentWriter

GIB = 1 << 30
LIMITS = TraceLimits(segment_bytes=32 << 20, max_bytes=None, ttl_s=86_400.0, sync_interval_s=0.0)
Usage = namedtuple("Usage", "total used free")


def segments(*spans):
    """Segments by (first second, last second, bytes)."""
    return [
        Segment(Path("w1-1"), number, num_bytes, int(first * 1000), int(last * 1000), False)
        for number, (first, last, num_bytes) in enumerate(spans)
    ]


@pytest.fixture
def free_disk(monkeypatch):
    """Say how much of the disk is free."""

    def say(num_bytes):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(num_bytes, 0, num_bytes))

    return say


def test_an_empty_log_has_no_traffic():
    assert measure([]) == Traffic(0, 0.0)


def test_traffic_is_measured_over_the_hour_before_the_newest_record():
    log = segments((0, 100, 10**9), (5000, 6000, 10**6), (6000, 7200, 10**6))
    assert measure(log) == Traffic(10**9 + 2 * 10**6, 2 * 10**6 / 2200)


def test_traffic_of_a_young_log_is_measured_over_its_age():
    assert measure(segments((1000, 1200, 6000))).bytes_per_s == 30


def test_a_burst_of_seconds_counts_as_a_minute():
    assert measure(segments((1000, 1001, 6000))).bytes_per_s == 100


@pytest.mark.parametrize(
    ("bytes_per_s", "log_bytes", "free", "allowed"),
    [
        (0.0, 0, 100 * GIB, LEAST_BYTES),
        (1e6, GIB, 100 * GIB, 3_600_000_000),
        (1e9, GIB, 99 * GIB, 10 * GIB),  # a tenth of what is free without the log
        (1e9, 9 * GIB, 91 * GIB, 10 * GIB),  # which the log itself does not change
        (0.0, 0, 5 * GIB, GIB // 2),  # the disk comes before the floor
        (0.0, 0, 0, 64 << 20),  # and two segments before the disk
    ],
)
def test_a_log_may_hold_an_hour_within_a_floor_and_the_disk(
    free_disk, bytes_per_s, log_bytes, free, allowed
):
    free_disk(free)
    assert allowed_bytes(LIMITS, Traffic(log_bytes, bytes_per_s), Path("/")) == allowed


def test_a_number_in_the_settings_is_taken_as_it_is(free_disk):
    free_disk(0)
    limits = replace(LIMITS, max_bytes=5 * GIB)
    assert allowed_bytes(limits, Traffic(0, 1e9), Path("/")) == 5 * GIB


def test_a_writer_keeps_to_what_the_disk_allows_and_counts_what_it_evicts(tmp_path, free_disk):
    """8 KiB of a disk of 80 KiB: two segments of 4 KiB."""
    free_disk(80 << 10)
    limits = replace(LIMITS, segment_bytes=4096)
    reader = SegmentReader(tmp_path)
    with SegmentWriter(tmp_path, limits) as writer:
        for _ in range(100):
            writer.append(bytes(968))
            held = sum(path.stat().st_size for path in tmp_path.glob("w*/*.seg"))
            assert held <= 3 * 4096
    num_read = len(reader.read(1000))
    assert num_read + reader.counts.evicted_unread == 100
    assert writer.counts.evicted_records == reader.counts.evicted_unread > 80


def test_what_its_own_writer_evicts_is_counted_as_what_another_evicts(tmp_path):
    """The one knows what it wrote, the other reads it."""
    limits = TraceLimits(4096, 12_288, 1e9, 0.0)
    counted = []
    for name, evictor_is_other in (("own", False), ("other", True)):
        root = tmp_path / name
        with SegmentWriter(root, limits) as writer:
            for i in range(12):
                writer.append(bytes(300 + 100 * (i % 7)))
            folder = root / writer.name
            if not evictor_is_other:
                for _ in range(20):
                    writer.append(bytes(968))
        if evictor_is_other:
            with SegmentWriter(root, limits) as writer:
                for _ in range(20):
                    writer.append(bytes(968))
        tombstone = read_tombstone(folder)
        assert tombstone is not None
        counted.append((min(tombstone.next_number, 12), min(tombstone.records, 12)))
    assert counted[0] == counted[1] == (12, 12)


def test_closed_segments_are_opened_once(tmp_path, monkeypatch):
    limits = TraceLimits(4096, 1 << 20, 1e9, 0.0)
    with SegmentWriter(tmp_path, limits) as writer:
        for _ in range(40):
            writer.append(bytes(968))
        listed = SegmentList(tmp_path)
        first = listed.refresh()
        opened = []
        real = os.open

        def counting(path, *arguments, **options):
            opened.append(str(path))
            return real(path, *arguments, **options)

        monkeypatch.setattr(os, "open", counting)
        again = listed.refresh()

    assert first == again
    assert len(first) == 10
    names = [Path(path).name for path in opened if path.endswith(".seg")]
    assert set(names) == {
        "000008.seg",
        "000009.seg",
    }  # their heads say which is open
    assert len(names) <= 3


def test_inspect_shows_what_a_writer_keeps_to(tmp_path):
    backend = open_backend("log:", tmp_path)
    with backend.open_trace_writer(LIMITS) as writer:
        writer.append(bytes(1000))
    size = list(backend.reports(LIMITS))[-1]
    assert size.max_bytes == writer._evictor.max_bytes
    assert (size.segments, size.num_bytes, size.is_measured) == (1, 1032, True)
    assert size.bytes_per_s == 1032 / 60
    fixed = list(backend.reports(replace(LIMITS, max_bytes=GIB)))[-1]
    assert fixed.to_line().endswith(f"holds up to {GIB} bytes (buffer.max_bytes)")
