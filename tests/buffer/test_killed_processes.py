"""After kill -9 at any moment nothing acknowledged is lost and nothing half-written is visible."""

import random
import time
import zlib

import pytest

from buffer.segment_reader import SegmentReader
from buffer.segment_report import check_segments

NUM_KILLS = 15

WRITE_FOREVER = """
import random, sys, zlib
from pathlib import Path
from buffer.interface import TraceLimits
from buffer.segment_writer import SegmentWriter

chance = random.Random(int(sys.argv[2]))
writer = SegmentWriter(Path(sys.argv[1]), TraceLimits(1 << 20, 1 << 30, 1e9, 0))
print(writer.name, flush=True)
while True:
    for _ in range(chance.randrange(1, 20)):
        body = chance.randbytes(chance.choice([10, 1000, 30_000, 900_000]))
        writer.append(zlib.crc32(body).to_bytes(4, "little") + body)
    writer.sync()
    print(writer.counts.durable, flush=True)
"""


def killed_output(process, delay_s, num_lines=1):
    """Kill a process ``delay_s`` after its first lines of output; returns all lines it printed."""
    first = [process.stdout.readline().strip() for _ in range(num_lines)]
    time.sleep(delay_s)
    process.kill()
    rest, _ = process.communicate()
    return [*first, *rest.split()]


def is_sound(payload):
    return zlib.crc32(payload[4:]).to_bytes(4, "little") == payload[:4]


def test_a_killed_writer_loses_nothing_that_it_acknowledged(tmp_path, start_python):
    chance = random.Random(1)
    reader = SegmentReader(tmp_path)
    acknowledged = {}
    read = {}
    for life in range(NUM_KILLS):
        process = start_python(WRITE_FOREVER, tmp_path, life)
        name, *counts = killed_output(process, chance.uniform(0, 0.1))
        acknowledged[name] = int(counts[-1]) if counts else 0
        while batch := reader.read(100):
            assert all(is_sound(record.payload) for record in batch)
            for record in batch:
                read[record.writer] = read.get(record.writer, 0) + 1

    assert sum(acknowledged.values()) > 0
    assert all(read.get(name, 0) >= count for name, count in acknowledged.items())
    assert reader.counts.damaged == reader.counts.evicted_unread == 0
    reports = check_segments(tmp_path)
    assert sum(report.records for report in reports) == sum(read.values())
    assert not any(report.live or report.damaged for report in reports)


@pytest.mark.parametrize("size", [1, 31, 32, 33, 5000])
def test_the_next_life_of_a_server_writes_on_beside_a_torn_record(tmp_path, start_python, size):
    process = start_python(WRITE_FOREVER, tmp_path, 0)
    name, *_ = killed_output(process, 0.05, num_lines=2)  # it has a segment
    last = sorted((tmp_path / name).glob("*.seg"))[-1]
    last.write_bytes(last.read_bytes() + b"\xf5\xaa\xd7\xfe".ljust(size, b"\xff")[:size])
    again = start_python(WRITE_FOREVER, tmp_path, 1)
    second, *counts = killed_output(again, 0.05)

    reader = SegmentReader(tmp_path)
    read = []
    while batch := reader.read(100):
        read += batch
    assert all(is_sound(record.payload) for record in read)
    assert sum(record.writer == second for record in read) >= int(counts[-1] if counts else 0)
    assert reader.counts.torn >= 1  # the second life may have been killed within a record too
    assert reader.counts.damaged == 0
