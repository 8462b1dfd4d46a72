"""Damage in one place costs at most the record that it hits, and is always noticed."""

import os
from dataclasses import replace

import pytest

from buffer.frames import HEAD, read_frame, scan
from buffer.interface import TraceLimits
from buffer.segment_reader import SegmentReader
from buffer.segment_report import check_segments
from buffer.segment_stats import log_stats
from buffer.segment_writer import SegmentWriter

LIMITS = TraceLimits(segment_bytes=1 << 20, max_bytes=4 << 20, ttl_s=3600.0, sync_interval_s=0.0)


def write_segment(root, payloads, **limits):
    """Write a closed segment with these records, and return its path."""
    with SegmentWriter(root, replace(LIMITS, **limits)) as writer:
        for payload in payloads:
            writer.append(payload)
    return root / writer.name / "000000.seg"


def sound_payloads(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return [frame.payload for frame in scan(descriptor, path.stat().st_size)]
    finally:
        os.close(descriptor)


def read_all(root):
    reader = SegmentReader(root)
    return [record.payload for record in reader.read(1000)], reader.counts


def flips(content):
    """Every copy of ``content`` with one bit flipped: (index of the byte, bytes)."""
    for bit in range(len(content) * 8):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bit // 8, flipped


def frame_index(payloads, position):
    """Index of the record that the byte at ``position`` belongs to."""
    end = 0
    for index, payload in enumerate(payloads):
        end += HEAD.size + len(payload)
        if position < end:
            return index
    raise AssertionError(position)


def test_every_flipped_bit_of_4_kib_costs_exactly_the_record_it_lies_in(tmp_path):
    payloads = [bytes([index]) * 992 for index in range(4)]
    path = write_segment(tmp_path, payloads)
    content = path.read_bytes()
    assert len(content) == 4096
    memory = os.memfd_create("segment")
    os.write(memory, content)
    for position, flipped in flips(content):
        os.pwrite(memory, flipped[position : position + 1], position)
        lost = position // 1024
        found = [frame.payload for frame in scan(memory, 4096)]
        os.pwrite(memory, content[position : position + 1], position)
        assert found == payloads[:lost] + payloads[lost + 1 :]
    os.close(memory)


def test_a_reader_counts_every_flipped_bit_as_one_lost_record(tmp_path):
    payloads = [b"first record", b"", b"the third and last"]
    path = write_segment(tmp_path, payloads)
    for position, flipped in flips(path.read_bytes()):
        path.write_bytes(flipped)
        lost = frame_index(payloads, position)
        found, counts = read_all(tmp_path)
        assert found == payloads[:lost] + payloads[lost + 1 :]
        assert counts.damaged + counts.torn == 1
        [report] = check_segments(tmp_path)
        assert report.damaged == 1 or report.torn_bytes > 0
        assert report.records == 2


def test_a_segment_cut_anywhere_keeps_its_whole_prefix(tmp_path):
    payloads = [os.urandom(480) for _ in range(8)]
    path = write_segment(tmp_path, payloads)
    for size in reversed(range(4096)):
        os.truncate(path, size)
        assert sound_payloads(path) == payloads[: size // 512]


def test_a_reader_steps_over_the_torn_tail_of_a_dead_writer_once(tmp_path):
    payloads = [b"one", b"two", b"three"]
    path = write_segment(tmp_path, payloads)
    for size in reversed(range(path.stat().st_size)):
        os.truncate(path, size)
        whole = (size >= HEAD.size + 3) + (size >= 2 * HEAD.size + 6)
        is_torn = size not in (0, HEAD.size + 3, 2 * HEAD.size + 6)
        reader = SegmentReader(tmp_path)
        assert [record.payload for record in reader.read(10)] == payloads[:whole]
        assert (reader.counts.torn, reader.counts.damaged) == (is_torn, 0)
        assert reader.read(10) == []
        assert reader.counts.torn == is_torn
        again = SegmentReader(tmp_path, reader.offsets())
        assert again.read(10) == []
        assert again.counts.torn == 0


def test_a_half_written_record_of_a_living_writer_is_waited_for(tmp_path):
    with SegmentWriter(tmp_path, LIMITS) as writer:
        writer.append(b"whole")
        path = tmp_path / writer.name / "000000.seg"
        whole = path.read_bytes()
        reader = SegmentReader(tmp_path)
        for size in range(len(whole)):
            os.truncate(path, size)
            assert reader.read(10) == []
        path.write_bytes(whole)
        assert [record.payload for record in reader.read(10)] == [b"whole"]
        assert reader.counts.torn == reader.counts.damaged == 0


def test_neighbouring_damaged_records_are_counted_one_by_one(tmp_path):
    payloads = [bytes([index]) * 100 for index in range(10)]
    path = write_segment(tmp_path, payloads)
    content = bytearray(path.read_bytes())
    for index in (3, 4, 5, 9):
        content[index * (HEAD.size + 100) + 50] ^= 1
    path.write_bytes(content)

    found, counts = read_all(tmp_path)
    assert found == payloads[:3] + payloads[6:9]
    assert counts.damaged == 4
    assert check_segments(tmp_path)[0].damaged == 4


def test_damage_at_the_end_of_a_segment_does_not_hide_the_next_segment(tmp_path):
    payloads = [bytes([index]) * 2000 for index in range(6)]
    path = write_segment(tmp_path, payloads, segment_bytes=4096)
    os.truncate(path, path.stat().st_size - 1)

    found, counts = read_all(tmp_path)
    assert found == payloads[:1] + payloads[2:]
    assert (counts.damaged, counts.torn) == (1, 0)
    assert sum(report.damaged for report in check_segments(tmp_path)) == 1


def test_a_frame_inside_a_payload_is_not_taken_for_a_record_while_its_record_is_sound(tmp_path):
    inner = write_segment(tmp_path / "inner", [b"forged"]).read_bytes()
    write_segment(tmp_path / "outer", [inner, b"next"])

    assert read_all(tmp_path / "outer")[0] == [inner, b"next"]


@pytest.mark.parametrize("filler", [b"\0" * 5000, os.urandom(5000), b"\xf5\xaa\xd7\xfe" * 1250])
def test_rubbish_in_front_of_sound_records_is_skipped(tmp_path, filler):
    path = write_segment(tmp_path, [b"one", b"two"])
    path.write_bytes(filler + path.read_bytes())

    found, counts = read_all(tmp_path)
    assert found == [b"one", b"two"]
    assert counts.damaged == 0


@pytest.mark.parametrize("content", [b"", b"\x00", b"[]", b'{"segment": "a"}'])
def test_a_damaged_tombstone_stops_neither_readers_nor_writers(tmp_path, content):
    path = write_segment(tmp_path, [b"one", b"two"])
    (path.parent / "EVICTED.json").write_bytes(content)

    assert read_all(tmp_path)[0] == [b"one", b"two"]
    assert [report.records for report in check_segments(tmp_path)] == [2]
    limits = replace(LIMITS, segment_bytes=4096, max_bytes=8192)
    with SegmentWriter(tmp_path, limits, clock=lambda: 9e9) as writer:  # all else has expired
        writer.append(b"three")
        assert writer.counts.evicted_records == 2


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", ["000000.seg", "LOCK", "EVICTED.json"])
def test_a_pipe_in_place_of_a_writers_file_stops_nobody(tmp_path, name):
    payloads = [bytes([number]) * 3000 for number in range(2)]  # a segment for each
    folder = write_segment(tmp_path, payloads, segment_bytes=4096).parent
    assert (folder / "000001.seg").is_file()
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)

    num_lost = int(name == "000000.seg")
    found, counts = read_all(tmp_path)
    assert ([bytes(one) for one in found], counts.damaged) == (payloads[num_lost:], num_lost)
    reports = check_segments(tmp_path)
    assert [report.records for report in reports] == [1] * (2 - num_lost)
    assert sum(report.damaged for report in reports) == num_lost
    assert log_stats(tmp_path).held == 2 - num_lost


@pytest.mark.timeout(30)
def test_what_is_no_regular_file_stops_neither_readers_nor_writers(tmp_path):
    path = write_segment(tmp_path, [b"sound"])
    path.with_name("000001.seg").mkdir()
    os.mkfifo(path.with_name("000002.seg"))
    path.with_name("000003.seg").symlink_to(tmp_path / "nowhere")
    path.with_name("000004.seg").symlink_to(path)

    assert [bytes(payload) for payload in read_all(tmp_path)[0]] == [b"sound"]
    assert [report.records for report in check_segments(tmp_path)] == [1]
    write_segment(tmp_path, [b"another"])
    assert sorted(bytes(payload) for payload in read_all(tmp_path)[0]) == [b"another", b"sound"]


def test_a_frame_whose_end_is_known_is_checked_as_much(tmp_path):
    path = write_segment(tmp_path, [b"the first record", b"the second"])
    content = path.read_bytes()
    memory = os.memfd_create("segment")
    os.write(memory, content)
    frames = list(scan(memory, len(content)))
    for frame in frames:
        again = read_frame(memory, frame.start, len(content), end=frame.end)
        assert again == frame
        for end in (frame.end - 1, frame.end + 1, frame.start + HEAD.size, len(content) + 100):
            assert read_frame(memory, frame.start, len(content), end=end) is None
    first = frames[0]
    for position, flipped in flips(content[: first.end]):
        os.pwrite(memory, flipped[position : position + 1], position)
        assert read_frame(memory, 0, len(content), end=first.end) is None
        os.pwrite(memory, content[position : position + 1], position)
    os.close(memory)
