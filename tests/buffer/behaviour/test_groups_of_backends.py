"""Readers of a group share the records, nothing committed comes again, and all counts add up."""

import contextlib
import json
import random
import time
from collections import Counter
from dataclasses import replace

import pytest

from buffer.codec import encode_trace
from buffer.interface import ServiceAwayError
from buffer.traces import TraceReader


def payload(number):
    return number.to_bytes(8, "little").ljust(100, b".")


def numbers(records):
    return [int.from_bytes(record.payload[:8], "little") for record in records]


def read_all(reader, at_once=10):
    read = []
    while records := reader.read(at_once):
        read += numbers(records)
    return read


def wait_until(holds):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def write(place, limits, values):
    with place.open().open_trace_writer(limits) as writer:
        for value in values:
            writer.append(payload(value))


def group_of(place, name="trainer"):
    (found,) = [one for one in place.open().stats().groups if one.group == name]
    return found


def test_a_new_member_gets_what_was_not_committed(place, limits):
    write(place, limits, range(30))
    first = place.open().open_record_reader(group="trainer")
    assert numbers(first.read(10)) == list(range(10))
    offsets = json.loads(json.dumps(first.offsets()))
    assert numbers(first.read(10)) == list(range(10, 20))
    first.commit(offsets)
    first.commit(offsets)  # may be repeated
    first.close()

    second, read = place.open().open_record_reader(group="trainer"), []
    wait_until(lambda: read.extend(read_all(second)) or len(read) >= 20)
    assert sorted(read) == list(range(10, 30))
    second.commit(second.offsets())
    second.close()
    third = place.open().open_record_reader(group="trainer")
    assert third.read(10) == []
    found = group_of(place)
    assert (found.committed, found.pending, found.lost) == (30, 0, 0)


def test_a_reader_that_is_opened_with_offsets_commits_them(place, limits):
    """A trainer may die between its checkpoint and the commit."""
    write(place, limits, range(20))
    first = place.open().open_record_reader(group="trainer")
    read = numbers(first.read(8))
    offsets = json.loads(json.dumps(first.offsets()))
    lost = numbers(first.read(5))  # after the checkpoint
    assert group_of(place).committed == 0
    first.close()

    second, again = place.open().open_record_reader(offsets, "trainer"), []
    wait_until(lambda: again.extend(read_all(second)) or len(again) >= 12)
    assert sorted(again) == sorted(set(range(20)) - set(read))
    assert set(lost) <= set(again)
    assert group_of(place).committed == 8
    second.commit(second.offsets())
    assert group_of(place).committed == 20


def test_each_group_gets_everything_and_a_reader_without_one_leaves_no_mark(place, limits):
    write(place, limits, range(10))
    alone = place.open().open_record_reader()
    left = place.open().open_record_reader(group="left")
    right = place.open().open_record_reader(group="right")
    assert read_all(alone) == read_all(left) == read_all(right) == list(range(10))
    left.commit(left.offsets())
    assert read_all(place.open().open_record_reader()) == list(range(10))
    groups = place.open().stats().groups
    assert [(one.group, one.committed, one.pending) for one in groups] == [
        ("left", 10, 0),
        ("right", 0, 10),
    ]


def test_opening_a_member_makes_no_group(place, limits):
    write(place, limits, range(3))
    place.open().open_record_reader(group="trainer").close()
    assert place.open().stats().groups == ()


def test_two_members_share_the_records_of_two_writers(place, limits):
    writers = [place.open().open_trace_writer(limits) for _ in range(2)]
    members = [place.open().open_record_reader(group="trainer") for _ in range(2)]
    read = [[], []]
    deadline = time.monotonic() + 30
    num_rounds = 0
    # Members of the log look for each other ten times a second, and a round may take 2 ms.
    while num_rounds < 30 or (not all(read) and time.monotonic() < deadline):
        for writer in writers:
            for i in range(4):
                writer.append(payload(8 * num_rounds + 4 * writers.index(writer) + i))
            writer.sync()
        num_rounds += 1
        for member, records in zip(members, read, strict=True):
            records += numbers(member.read(3))
            member.commit(member.offsets())
        found = group_of(place)
        assert found.committed + found.pending + found.lost == 8 * num_rounds
        assert found.committed == len(read[0]) + len(read[1])

    def take_the_rest():
        for member, records in zip(members, read, strict=True):
            records += read_all(member)
            member.commit(member.offsets())
        return len(read[0]) + len(read[1]) >= 8 * num_rounds

    wait_until(take_the_rest)
    assert sorted(read[0] + read[1]) == list(range(8 * num_rounds))
    assert read[0] and read[1]
    assert (group_of(place).committed, group_of(place).pending) == (8 * num_rounds, 0)
    for one in (*writers, *members):
        one.close()


def test_what_is_evicted_before_it_was_committed_is_lost_and_counted(place, limits):
    narrow = replace(limits, max_bytes=16_384)
    with place.open().open_trace_writer(narrow) as writer:
        writer.append(payload(0))
        writer.append(payload(1))
        writer.sync()
        member = place.open().open_record_reader(group="trainer")
        assert numbers(member.read(10)) == [0, 1]
        member.commit(member.offsets())
        for i in range(2, 1000):
            writer.append(payload(i))
        writer.sync()
        found, stats = group_of(place), place.open().stats()
        assert (stats.appended, found.committed) == (1000, 2)
        assert found.lost > 0
        assert found.committed + found.pending + found.lost == 1000
        read = read_all(member)
        assert read == list(range(1000 - len(read), 1000))
        assert member.counts.evicted_unread == 998 - len(read)
        member.commit(member.offsets())
        found = group_of(place)
        assert (found.committed, found.pending) == (2 + len(read), 0)
        assert found.lost == 998 - len(read)


READ_AND_HOLD = """
import sys, time
from pathlib import Path
from buffer.backends import open_backend

member = open_backend(sys.argv[1], Path(sys.argv[2])).open_record_reader(group="trainer")
while not (records := member.read(5)):
    time.sleep(0.01)
print(*(int.from_bytes(record.payload[:8], "little") for record in records), flush=True)
time.sleep(600)
"""


def test_what_a_killed_member_had_goes_to_another(other_process, fork_python, limits):
    place = other_process
    write(place, limits, range(20))
    process, output = fork_python(READ_AND_HOLD, place.url, place.run_dir)
    wait_until(lambda: output().endswith("\n"))
    held = {int(text) for text in output().split()}
    assert held

    member = place.open().open_record_reader(group="trainer")
    before = read_all(member)
    assert held.isdisjoint(before)
    process.kill()
    process.wait(60)
    read = list(before)
    wait_until(lambda: read.extend(read_all(member)) or len(read) >= 20)
    assert sorted(read) == list(range(20))
    member.commit(member.offsets())
    found = group_of(place)
    assert (found.committed, found.pending, found.lost) == (20, 0, 0)
    member.close()


@pytest.mark.parametrize("seed", range(2))
def test_appended_is_committed_plus_pending_plus_lost_at_any_time(place, limits, seed):
    """Writers, members and checkpoints come and go; each value is committed once at most."""
    chance = random.Random(seed)
    narrow = replace(limits, max_bytes=24_576)
    writers, members = [place.open().open_trace_writer(narrow)], []
    saved: dict[int, dict] = {}
    appended, committed = 0, Counter()
    handed: dict[int, list[int]] = {}
    for _ in range(250):
        action = chance.random()
        if action < 0.55:
            writer = chance.choice(writers)
            for _ in range(chance.randrange(1, 8)):
                writer.append(payload(appended))
                appended += 1
            writer.sync()
        elif action < 0.6 and len(writers) < 3:
            writers.append(place.open().open_trace_writer(narrow))
        elif action < 0.65 and len(members) < 3:
            members.append(place.open().open_record_reader(group="trainer"))
            handed[id(members[-1])] = []
        elif action < 0.68 and members:
            member = members.pop(chance.randrange(len(members)))
            del handed[id(member)]
            saved.pop(id(member), None)
            member.close()
        elif action < 0.9 and members:
            member = chance.choice(members)
            # Away: a Kafka group does not settle in time when other members do not read meanwhile.
            with contextlib.suppress(ServiceAwayError):
                handed[id(member)] += numbers(member.read(chance.randrange(1, 20)))
        elif members:
            member = chance.choice(members)
            with contextlib.suppress(ServiceAwayError):
                member.commit(member.offsets())
                committed.update(handed[id(member)])
                handed[id(member)] = []
        stats = place.open().stats()
        assert stats.appended == appended
        for found in stats.groups:
            assert found.committed + found.pending + found.lost == appended
            assert found.committed == committed.total()
            assert found.pending >= 0
            assert found.lost >= 0
    assert committed and max(committed.values()) == 1
    for one in (*writers, *members):
        one.close()


def test_each_trace_is_learnt_once_though_it_was_sent_twice_and_the_trainer_restarted(
    place, limits, make_trace
):
    with place.open().open_trace_writer(limits) as writer:
        for seq in (0, 1, 1, 2, 3, 0):
            writer.append(encode_trace(make_trace(seq=seq)))
        writer.sync()
        reader = TraceReader(place.open(), group="trainer")
        learnt = [trace.seq for trace in reader.read(3)]
        checkpoint = json.loads(json.dumps(reader.offsets()))
        reader.read(1)  # what was read after the checkpoint is read again
        reader.close()
        writer.append(encode_trace(make_trace(seq=2)))
        writer.append(encode_trace(make_trace(seq=4)))
        writer.sync()

        again = TraceReader(place.open(), checkpoint, "trainer")
        wait_until(lambda: learnt.extend(t.seq for t in again.read(100)) or len(learnt) >= 5)
        assert sorted(learnt) == [0, 1, 2, 3, 4]
        again.commit(again.offsets())
    found = group_of(place)
    assert (found.committed, found.pending, found.lost) == (8, 0, 0)
    again.close()


def sent_again(place, limits, traces):
    """Send traces again, each server's on a writer of its own, as a replay does."""
    with place.open().open_trace_writer(limits) as writer:
        for trace in traces:
            writer.append(encode_trace(trace))


def learn(reader, seqs):
    """Take what there is; one read may give nothing while members agree who gets what."""
    with contextlib.suppress(ServiceAwayError):
        seqs += [trace.seq for trace in reader.read(100)]
    return seqs


def test_two_trainers_learn_a_replayed_trace_once_between_them(place, limits, make_trace):
    traces = [make_trace(seq=seq) for seq in range(12)]
    sent_again(place, limits, traces)
    first, second = (TraceReader(place.open(), group="trainer") for _ in range(2))
    learnt, others = [], []
    wait_until(lambda: len(learn(first, learnt)) == 12)
    sent_again(place, limits, traces)  # before the first has committed
    wait_until(lambda: counted(learn_both(first, second, learnt, others)) == 24)
    assert (sorted(learnt), others) == (list(range(12)), [])

    commit_all(first, second)
    first.close()
    sent_again(place, limits, [*traces, make_trace(seq=12)])
    third = TraceReader(place.open(), group="trainer")  # without a checkpoint, as on a new machine
    wait_until(lambda: counted(learn_both(second, third, others, others), first) >= 37)
    assert others == [12]
    commit_all(second, third)
    found = group_of(place)
    assert (found.committed, found.pending, found.lost) == (37, 0, 0)
    again = TraceReader(place.open(), group="another")
    wait_until(lambda: len(learn(again, learnt)) == 25)
    for one in (second, third, again):
        one.close()


def test_what_a_checkpoint_has_learnt_is_learnt_by_nobody_else_though_it_was_not_committed(
    place, limits, make_trace
):
    """A trainer may die between its checkpoint and the commit; its successor commits."""
    traces = [make_trace(seq=seq) for seq in range(8)]
    sent_again(place, limits, traces)
    first, learnt = TraceReader(place.open(), group="trainer"), []
    wait_until(lambda: len(learn(first, learnt)) == 8)
    checkpoint = json.loads(json.dumps(first.offsets()))
    first.close()
    second = TraceReader(place.open(), checkpoint, "trainer")
    sent_again(place, limits, [make_trace(seq=8)])
    wait_until(lambda: len(learn(second, learnt)) == 9)
    commit_all(second)
    second.close()
    third, others = TraceReader(place.open(), group="trainer"), []
    sent_again(place, limits, [*traces, make_trace(seq=9)])
    wait_until(lambda: learn(third, others) is others and counted((third,)) >= 9)
    assert (sorted(learnt), others) == ([*range(9)], [9])
    third.close()


def test_traces_are_told_apart_by_any_name_and_any_number(place, limits, make_trace):
    names = [
        *(("a/1", 2), ("a", 1), ("a:1", 2), ("a\n", 0), ("\ud800", 0), ("", 0), ("é" * 99, 0)),
        *(("a", 2**63 - 1), ("a", 2**62)),
    ]
    seqs = [0, 1, 2047, 2048, 2**53, 2**53 + 1, 2**63 - 2, 2**63 - 1]
    traces = [
        make_trace(producer=name, epoch=epoch, seq=seq) for name, epoch in names for seq in seqs
    ]
    for is_new in (True, False):
        sent_again(place, limits, traces)
        reader = TraceReader(place.open(), group="trainer")
        learnt: list[int] = []
        wait_until(lambda r=reader, ours=learnt: learn(r, ours) is ours and counted((r,)) >= 72)
        assert len(learnt) == (len(traces) if is_new else 0)
        commit_all(reader)
        reader.close()


def learn_both(left, right, of_left, of_right):
    learn(left, of_left)
    learn(right, of_right)
    return left, right


def counted(readers, *others):
    """Traces that these have returned or recognised."""
    return sum(one.counts.read + one.counts.duplicate for one in (*readers, *others))


def commit_all(*readers):
    for one in readers:
        one.commit(one.offsets())


@pytest.mark.parametrize("seed", range(2))
def test_whoever_comes_and_goes_each_trace_is_saved_once(place, limits, make_trace, seed):
    """Trainers die with what they have not saved; traces are sent again and again, by anybody."""
    chance = random.Random(seed)
    saved, num_traces = Counter(), 0
    members: list[tuple[TraceReader, list[int]]] = []

    def read(some):
        for reader, held in some:
            held += [trace.seq for trace in reader.read(chance.randrange(1, 20))]

    def save(some):
        for reader, held in some:
            reader.commit(json.loads(json.dumps(reader.offsets())))
            saved.update(held)
            held.clear()

    for _ in range(150):
        action = chance.random()
        if action < 0.3:
            num_traces += (count := chance.randrange(6))
            old = chance.sample(range(num_traces), min(num_traces, chance.randrange(6)))
            seqs = [*range(num_traces - count, num_traces), *old]
            sent_again(place, limits, [make_trace(seq=seq) for seq in seqs])
        elif action < 0.4 and len(members) < 3:
            members.append((TraceReader(place.open(), group="trainer"), []))
        elif action < 0.48 and members:
            members.pop(chance.randrange(len(members)))[0].close()
        elif action < 0.9:
            read(members)
        else:
            save(members)
        assert not saved or max(saved.values()) == 1
    if not members:
        members.append((TraceReader(place.open(), group="trainer"), []))

    def is_done():
        read(members)
        save(members)
        return len(saved) == num_traces and group_of(place).pending == 0

    wait_until(is_done)
    assert set(saved.values()) == {1}
    for reader, _ in members:
        reader.close()


def test_a_trace_whose_trainer_died_is_learnt_by_another_also_if_it_was_sent_again(
    place, limits, make_trace
):
    traces = [make_trace(seq=seq) for seq in range(8)]
    sent_again(place, limits, traces)
    first = TraceReader(place.open(), group="trainer")
    died, learnt = [], []
    wait_until(lambda: len(learn(first, died)) == 8)
    sent_again(place, limits, traces)
    wait_until(lambda: learn(first, died) and first.counts.duplicate == 8)
    first.close()

    second = TraceReader(place.open(), group="trainer")
    wait_until(lambda: learn(second, learnt) is learnt and counted((second,)) >= 16)
    assert sorted(learnt) == list(range(8))
    assert second.counts.duplicate == 8
    commit_all(second)
    assert group_of(place).pending == 0
    second.close()


def test_a_trace_that_was_evicted_before_it_was_committed_may_be_sent_again(
    place, limits, make_trace
):
    narrow = replace(limits, max_bytes=16_384)
    writer = place.open().open_trace_writer(narrow)
    writer.append(encode_trace(make_trace(seq=0)))
    writer.sync()
    first = TraceReader(place.open(), group="trainer")
    learnt: list[int] = []
    wait_until(lambda: learn(first, learnt) == [0])
    for i in range(400):
        writer.append(payload(i))
        if i % 20 == 0:
            writer.sync()
    writer.sync()
    first.close()  # it dies with what it learnt, and nobody can read that again
    second = TraceReader(place.open(), group="trainer")
    wait_until(lambda: not learn(second, learnt)[1:] and second.counts.quarantined > 0)

    def is_learnt_once_it_is_sent_again():
        before = counted((second,))
        writer.append(encode_trace(make_trace(seq=0)))
        writer.sync()
        wait_until(lambda: learn(second, learnt) and counted((second,)) > before)
        return learnt == [0, 0]

    wait_until(is_learnt_once_it_is_sent_again)  # some notice only after a while who is dead
    writer.append(encode_trace(make_trace(seq=0)))
    writer.append(encode_trace(make_trace(seq=1)))
    writer.sync()
    wait_until(lambda: 1 in learn(second, learnt))
    assert learnt == [0, 0, 1]
    writer.close()
    second.close()


@pytest.mark.parametrize("name", ["", "a/b", "..", "a b", "x" * 129])
def test_a_group_whose_name_is_no_plain_name_is_refused(place, name):
    with pytest.raises(ValueError, match="group must match"):
        place.open().open_record_reader(group=name)


def test_offsets_of_another_kind_are_refused(place):
    with pytest.raises(ValueError, match="offsets of"):
        place.open().open_record_reader({"w1-2": "seven"}, "trainer")
