"""Counts of one buffer while its files and services are in the middle of something."""

import contextlib
import shutil
import time
from dataclasses import replace

import pytest

from buffer import kafka, segment_report, segment_stats
from buffer.backends import open_backend
from buffer.codec import encode_trace
from buffer.interface import ServiceAwayError, TraceLimits
from oracles.kafka_brokers import Broker, running_broker


def check(stats, group="trainer"):
    [found] = [one for one in stats.groups if one.group == group]
    parts = (found.committed, found.pending, found.lost, found.deleted)
    assert min(parts) >= 0 and sum(parts) == stats.appended, (found, stats.appended)
    return found


def write(writer, count, num_bytes=400):
    for _ in range(count):
        writer.append(bytes(num_bytes))
    writer.sync()


def commit_all(member):
    while member.read(100):
        member.commit(member.offsets())


def test_what_happens_while_a_log_is_counted_leaves_the_sums_right(tmp_path, limits, monkeypatch):
    """A member commits, and the writer appends and evicts, before and after its files are read."""
    log = open_backend("log:", tmp_path)
    writer = log.open_trace_writer(replace(limits, max_bytes=1 << 15))
    member = log.open_record_reader(group="trainer")
    late = log.open_record_reader(group="late")
    write(writer, 30)
    commit_all(member)
    late.read(3)
    late.commit(late.offsets())
    check_writer = segment_stats.check_writer

    def meanwhile(folder):
        write(writer, 10)
        commit_all(member)
        found = check_writer(folder)
        write(writer, 200)  # evicts all that was there before
        commit_all(member)
        return found

    monkeypatch.setattr(segment_stats, "check_writer", meanwhile)
    stats = log.stats()
    found = check(stats)
    assert (found.committed, found.lost) == (30, 0) and found.pending >= 10
    assert check(stats, "late").committed == 3
    monkeypatch.undo()
    assert check(log.stats()).pending == 0
    member.close(), late.close(), writer.close()


def test_a_segment_that_is_evicted_while_it_is_inspected_is_no_damage(
    tmp_path, limits, monkeypatch
):
    log = open_backend("log:", tmp_path)
    with log.open_trace_writer(replace(limits, max_bytes=1 << 15)) as writer:
        write(writer, 30)
        segment_numbers, done = segment_report.segment_numbers, []

        def then_evict(folder):
            found = segment_numbers(folder)
            if not done:
                done.append(True)
                write(writer, 100)
            return found

        monkeypatch.setattr(segment_report, "segment_numbers", then_evict)
        reports = segment_report.check_segments(tmp_path / "traces")
    assert sum(report.damaged for report in reports) == 0


@pytest.mark.parametrize("is_cut", [False, True])
def test_records_that_somebody_has_overwritten_or_cut_off_are_counted_once(
    tmp_path, limits, is_cut
):
    log = open_backend("log:", tmp_path)
    with log.open_trace_writer(limits) as writer:
        write(writer, 6)
    member = log.open_record_reader(group="trainer")
    commit_all(member)
    member.close()
    late = log.open_record_reader(group="late")
    late.read(1)
    late.commit(late.offsets())
    [segment] = (tmp_path / "traces").glob("w*/*.seg")
    content = segment.read_bytes()
    half = content[: len(content) // 2]
    segment.write_bytes(half if is_cut else half.ljust(len(content), b"\0"))
    stats = log.stats()
    first, second = check(stats), check(stats, "late")
    counts = [(one.committed, one.pending, one.lost) for one in (first, second)]
    if is_cut:  # no group can have come so far: it begins again, and passes over what it has learnt
        assert (stats.appended, stats.held, stats.forgotten) == (3, 3, 0)
        assert counts == [(0, 3, 0), (1, 2, 0)]
        again = log.open_record_reader(group="trainer")
        commit_all(again)
        again.close()
        assert check(log.stats()).committed == 3
    else:
        assert (stats.appended, stats.held, stats.forgotten) == (6, 3, 3)
        assert counts == [(6, 0, 0), (1, 2, 3)]
    late.close()


def test_records_of_the_last_batch_count_though_the_broker_names_an_end_inside_of_it(
    tmp_path, limits, caplog
):
    """Tansu says that a partition ends behind the first record of its last batch."""
    with running_broker("tansu", tmp_path / "broker") as broker:
        url = f"kafka://{broker.address}/batches?partitions=1&session_s=6"
        buffer = open_backend(url, tmp_path)
        with buffer.open_trace_writer(limits) as writer:
            write(writer, 100)
        member = buffer.open_record_reader(group="trainer")
        while member.offsets().get("0", [0])[0] < 100:
            member.read(100)
        member.commit(member.offsets())
        offsets = member.offsets()
        member.close()
        stats = buffer.stats()
        assert (stats.appended, stats.held, stats.forgotten) == (100, 100, 0)
        found = check(stats)
        assert (found.committed, found.pending, found.lost) == (100, 0, 0)
        again = buffer.open_record_reader(offsets, group="trainer")
        assert again.read(10) == [] and again.offsets()["0"] == [100, 0, 0]
        again.close()
        assert "lost records" not in caplog.text

        records = buffer.open_record_reader().read(100)
        wanted = {(one.writer, one.location): one.payload for one in records[1::9]}
        beyond = records[0].writer, "0-100"
        assert buffer.fetch([*wanted, beyond]) == wanted


def test_a_broker_that_forgot_everything_hides_no_new_record_and_no_count(tmp_path, limits):
    """A trainer that restarts then brings the place that it had before."""
    broker = Broker("tansu", tmp_path / "broker")
    url = f"kafka://{broker.address}/forgets?partitions=1&batch_bytes=0&session_s=6"

    def read_all(member, wanted):
        found, deadline = [], time.monotonic() + 60
        while len(found) < wanted:
            assert time.monotonic() < deadline
            with contextlib.suppress(ServiceAwayError):
                found += member.read(100)
        return found

    try:
        with open_backend(url, tmp_path).open_trace_writer(limits) as writer:
            write(writer, 20)
        member = open_backend(url, tmp_path).open_record_reader(group="trainer")
        read_all(member, 20)
        before = member.offsets()
        member.commit(before)
        member.close()
        broker.kill()
        broker.start()
        with open_backend(url, tmp_path).open_trace_writer(limits) as writer:
            write(writer, 5)
        member = open_backend(url, tmp_path).open_record_reader(before, group="trainer")
        assert len(read_all(member, 5)) == 5
        stats = open_backend(url, tmp_path).stats()
        assert [one.pending for one in stats.groups] in ([], [5]) and not stats.forgotten
        member.commit(before)  # by a checkpoint that was made before
        member.commit(member.offsets())
        found = check(open_backend(url, tmp_path).stats())
        assert (found.committed, found.pending, found.lost) == (5, 0, 0)
        member.close()
    finally:
        broker.kill()


@pytest.mark.parametrize("passed", [5, 20])
def test_a_group_that_is_ahead_of_its_broker_is_counted_in_words(passed):
    places = {"trainer": {0: kafka.Place(passed, 2, 1)}, "late": {0: kafka.Place(3)}}
    one = kafka._Partition.of(0, {0: range(1, 5)}, 5, [4], places)
    assert (one.known, one.end) == (5, passed)
    for name in places:
        counts = kafka._counts_of(name, places[name], {0: one})
        parts = (counts.committed, counts.pending, counts.lost, counts.deleted)
        assert min(parts) >= 0 and sum(parts) == passed
    assert kafka._counts_of("late", places["late"], {0: one}).lost == passed - 5


def copied(folder, name):
    shutil.copytree(folder, folder.with_name(name))


def linked(folder, name):
    folder.with_name(name).symlink_to(folder.name)


@pytest.mark.parametrize("twice", [copied, linked])
@pytest.mark.parametrize("name", ["w0-before", "w99999999-after"])
def test_a_copy_of_a_writers_folder_is_read_and_counted_once(tmp_path, make_trace, twice, name):
    limits = TraceLimits(segment_bytes=4096, max_bytes=1 << 20, ttl_s=3600.0, sync_interval_s=0.0)
    log, root = open_backend("log:", tmp_path), tmp_path / "traces"
    with log.open_trace_writer(limits) as writer:
        for seq in range(6):
            writer.append(encode_trace(make_trace(seq=seq, tenant=("acme", "umbrella")[seq % 2])))
        writer.sync()
        folder = root / writer.name
        twice(folder, name)
        member = log.open_record_reader(group="trainer")
        assert len(member.read(100)) == 6
        member.commit(member.offsets())
        assert len(log.open_record_reader().read(100)) == 6
        stats = log.stats()
        assert (stats.num_writers, stats.appended, stats.held) == (1, 6, 6)
        assert check(stats).committed == 6
        assert len(list(log.reports(limits))) == 1 + len(list(folder.glob("*.seg")))
    member.close()
    log.delete("umbrella")  # finds it in copies, too
    assert not [
        path for path in root.rglob("*") if path.is_file() and b"umbrella" in path.read_bytes()
    ]
    if twice is copied:  # the only one that is left
        shutil.rmtree(folder)
        assert len(log.open_record_reader().read(100)) == 3


def test_links_are_evicted_with_what_they_lead_to(tmp_path, limits):
    log, root = open_backend("log:", tmp_path), tmp_path / "traces"
    with log.open_trace_writer(limits) as writer:
        write(writer, 30)
    linked(root / writer.name, "w0-link")
    (root / "w1-nowhere").symlink_to(tmp_path / "gone")
    log.expire(replace(limits, ttl_s=1e-9))
    assert log.stats().held == 0
    with log.open_trace_writer(replace(limits, ttl_s=1e-9)) as other:
        write(other, 1)
        other.tend()


def test_a_group_of_a_topic_that_is_gone_has_lost_nothing_that_it_had_committed():
    places = {"trainer": {0: kafka.Place(20)}}
    one = kafka._Partition.of(0, {}, 0, [], places)
    assert (one.end, one.known) == (20, 0)
    counts = kafka._counts_of("trainer", places["trainer"], {0: one})
    assert (counts.committed, counts.pending, counts.lost) == (20, 0, 0)
