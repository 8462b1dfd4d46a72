"""Members of a group agree on the record that each trace is learnt from, whatever ends one."""

import contextlib
import logging
import time
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kafka.errors import KafkaError

from buffer import claim_file, kafka_claims
from buffer.backends import open_backend
from buffer.claim_file import CLAIMS, ClaimFile
from buffer.claims import Claims
from buffer.codec import encode_trace
from buffer.foreign import foreign_reports
from buffer.interface import Record, ServiceAwayError
from buffer.kafka_claims import KafkaClaims
from buffer.kafka_link import KafkaLink, parse_url
from buffer.traces import TraceReader
from oracles.kafka_brokers import Broker
from oracles.places import PLACES, close_servers

_NAMES = count()


def never_gone(location, member):
    return False


def records(*pairs):
    """(writer, number, seq) each, as ``claim`` takes them."""
    return [(Record(b"", f"w{w}", f"0-{n}"), ("server", 1, seq)) for w, n, seq in pairs]


def content(claims):
    return {"claimed": claims.claimed, "holders": claims.holders, "learnt": claims.learnt.to_json()}


ACTIONS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 9), st.integers(0, 5))
    | st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(1, 10))
    | st.tuples(st.integers(0, 2)),
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(actions=ACTIONS, least_bytes=st.sampled_from([0, 300, 1 << 20]))
def test_members_that_follow_one_file_agree_and_nothing_is_learnt_twice(
    tmp_path_factory, actions, least_bytes
):
    folder = tmp_path_factory.mktemp("group")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claim_file, "_LEAST_BYTES", least_bytes)  # it is written anew all the time
        members = [ClaimFile(folder, f"m{i}") for i in range(3)]
        holder, learnt = {}, set()  # what should be so
        for action in actions:
            which, *rest = action
            member = members[which]
            match rest:
                case [writer, number, seq]:
                    where = f"w{writer}", f"0-{number}"
                    if where in holder.values() and holder.get(seq) != where:
                        continue  # a record holds one trace
                    expected = seq not in learnt and holder.setdefault(seq, where) == where
                    found = member.claim(records((writer, number, seq)), never_gone)
                    assert found == [expected]
                case [writer, end]:
                    member.settle({f"w{writer}": (0, end)}, are_learnt=True)
                    for seq, (name, where) in list(holder.items()):
                        if name == f"w{writer}" and int(where.partition("-")[2]) < end:
                            learnt.add(seq)
                            del holder[seq]
                case _:  # it is killed, and another one takes its place
                    member.close()
                    members[which] = ClaimFile(folder, f"m{next(_NAMES) + 3}")
        latest = []
        for member in members:
            with member.latest():
                latest.append(content(member.claims))
            member.close()
    assert all(one["learnt"] == latest[0]["learnt"] for one in latest)
    assert {of[2] for of in latest[0]["holders"]} == holder.keys()
    assert {seq for _, _, seq in members[0].claims.learnt.beyond(Claims().learnt)} == learnt


def test_of_two_records_in_one_request_the_first_is_the_traces(tmp_path):
    member = ClaimFile(tmp_path, "m")
    assert member.claim(records((0, 1, 7), (1, 1, 7), (0, 2, 8)), never_gone) == [True, False, True]
    again = records((1, 1, 7), (0, 1, 7), (1, 2, 8))
    assert member.claim(again, never_gone) == [False, True, False]


def test_only_what_a_member_has_claimed_is_learnt_when_it_commits(tmp_path):
    """The rest was evicted before it came to it, and was in nobody's checkpoint."""
    dead, member = ClaimFile(tmp_path, "dead"), ClaimFile(tmp_path, "m")
    dead.claim(records((0, 1, 1), (0, 2, 2)), never_gone)
    assert member.claim(records((0, 2, 2), (0, 3, 3)), never_gone) == [True, True]
    member.settle({"w0": (0, 4)})
    found = member.claim(records((1, 1, 1), (1, 2, 2), (1, 3, 3)), never_gone)
    assert found == [True, False, False]


def test_what_a_member_read_of_a_folder_that_is_gone_is_learnt_when_it_commits(tmp_path):
    member, other = ClaimFile(tmp_path, "m"), ClaimFile(tmp_path, "o")
    member.claim(records((0, 1, 1)), never_gone)
    other.claim(records((0, 2, 2)), never_gone)
    member.settle({"w0": None})
    found = other.claim(records((1, 1, 1), (0, 2, 2)), never_gone)
    assert found == [False, True]


def test_a_record_that_is_gone_gives_its_trace_up_but_not_while_its_member_lives(tmp_path):
    member, other = ClaimFile(tmp_path, "m"), ClaimFile(tmp_path, "o")
    member.claim(records((0, 1, 1)), never_gone)
    asked = []
    assert other.claim(records((1, 1, 1)), lambda *about: asked.append(about)) == [False]
    assert asked == [(("w0", "0-1"), "m")]
    assert member.claim(records((1, 1, 1)), lambda *_: True) == [False]  # it has it itself
    assert other.claim(records((1, 1, 1)), lambda *_: True) == [True]
    assert member.claim(records((0, 1, 1)), never_gone) == [False]


def test_a_line_that_somebody_was_killed_in_is_cut_off_and_foreign_ones_are_passed_over(
    tmp_path, caplog
):
    first = ClaimFile(tmp_path, "m")
    first.claim(records((0, 1, 1)), never_gone)
    path = tmp_path / CLAIMS
    foreign = [b"rubbish", b'["claimed", 7, []]', b'["gone", [7]]', b"[" * 100_000]
    foreign += [b'["claimed", "x", [["w", "a-b", "s", 1, 1]]]', b'["done", "x", {"w": 7}, true]']
    foreign += [b'["claimed", "x", [["w", "0-1", "s", 1, -1]]]', b'["seen", [["s", 1, [[3, 1]]]]]']
    with path.open("ab") as file:
        file.write(b"\n".join(foreign) + b'\n["claimed", "dead", [["w0", "0-9", "serv')
    with caplog.at_level(logging.WARNING):
        second = ClaimFile(tmp_path, "n")
        assert second.claim(records((0, 2, 1), (0, 3, 3)), never_gone) == [False, True]
    assert sum("is passed over" in one.getMessage() for one in caplog.records) == len(foreign)
    assert first.claim(records((1, 1, 3), (1, 2, 4)), never_gone) == [False, True]
    assert path.read_bytes().endswith(b"\n")


def empty(path):
    path.write_bytes(b"")


def cut_in_half(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("damage", [empty, cut_in_half, Path.unlink])
def test_a_file_that_was_cut_off_while_nobody_ran_is_reported_once(tmp_path, damage, caplog):
    folder = tmp_path / "groups" / "g"
    folder.mkdir(parents=True)
    member = ClaimFile(folder, "m")
    member.claim(records((0, 1, 1), (0, 2, 2)), never_gone)
    member.settle({"w0": (0, 3)})
    member.close()
    path = folder / CLAIMS
    assert foreign_reports(tmp_path) == [] and not caplog.text
    had = path.stat().st_size
    damage(path)
    [found] = foreign_reports(tmp_path)
    has = path.stat().st_size if path.exists() else 0
    assert found.path == str(path) and f"{has} bytes and had {had}" in found.problem
    for name in ("n", "o"):
        member = ClaimFile(folder, name)
        member.claim(records((1, 9, 9)), never_gone)
        member.close()
    said = [one.getMessage() for one in caplog.records]
    assert len(said) == 1 and said[0].startswith(f"{path} has ") and f" and had {had}: " in said[0]
    assert foreign_reports(tmp_path) == []


def test_a_file_that_is_cut_off_under_a_member_is_written_again(tmp_path, caplog):
    member, other = ClaimFile(tmp_path, "m"), ClaimFile(tmp_path, "o")
    member.claim(records((0, 1, 1), (0, 2, 2)), never_gone)
    member.settle({"w0": (0, 3)})
    other.claim(records((1, 4, 4)), never_gone)
    member.claim(records((0, 5, 5)), never_gone)
    empty(tmp_path / CLAIMS)
    # Known ones stay known, for others too, and new ones are claimed and not taken for duplicates.
    found = member.claim(records((1, 1, 1), (1, 4, 4), (0, 5, 5), (0, 6, 6)), never_gone)
    assert found == [False, True, True, True]
    assert other.claim(records((1, 2, 2), (1, 6, 6), (1, 7, 7)), never_gone) == [False, False, True]
    assert sum("was cut off" in one.getMessage() for one in caplog.records) == 1
    member.settle({"w0": (0, 7)})
    last = ClaimFile(tmp_path, "l")
    assert last.claim(records((1, 5, 5), (1, 8, 8)), never_gone) == [False, True]


def test_a_file_that_is_written_anew_is_not_taken_for_cut_off(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(claim_file, "_LEAST_BYTES", 200)
    for at in range(20):
        member = ClaimFile(tmp_path, f"m{at}")
        member.claim(records((0, at, at)), never_gone)
        member.settle({"w0": (0, at + 1)})
        member.close()
        assert claim_file.cut_off(tmp_path) is None
    assert not caplog.text and (tmp_path / CLAIMS).stat().st_size < 400


def test_a_file_that_was_deleted_begins_anew(tmp_path):
    member = ClaimFile(tmp_path, "m")
    member.claim(records((0, 1, 1)), never_gone)
    (tmp_path / CLAIMS).unlink()
    assert member.claim(records((1, 1, 1)), never_gone) == [True]


def test_traces_that_cannot_be_claimed_wait_and_are_in_no_checkpoint(tmp_path, make_trace, limits):
    buffer = open_backend("log:", tmp_path)
    with buffer.open_trace_writer(limits) as writer:
        for seq in range(5):
            writer.append(encode_trace(make_trace(seq=seq)))
    reader = TraceReader(buffer, group="trainer")
    assert [trace.seq for trace in reader.read(2)] == [0, 1]
    folder = tmp_path / "traces" / "groups" / "trainer"
    folder.rename(folder.with_suffix(".kept"))  # as a disk that fails
    places = reader.places()
    for _ in range(2):
        with pytest.raises(ServiceAwayError, match="nothing is claimed"):
            reader.read(2)
        assert reader.places() == places
    folder.with_suffix(".kept").rename(folder)
    assert [trace.seq for trace in reader.read(1)] == [2, 3]
    assert reader.places() != places
    assert [trace.seq for trace in reader.read(9)] == [4]
    assert reader.counts.read == 5
    reader.close()


def test_on_a_broker_that_forgot_everything_new_traces_are_claimed_and_learnt_ones_are_not(
    tmp_path,
):
    broker = Broker("tansu", tmp_path / "broker")
    member = KafkaClaims(KafkaLink(parse_url(f"kafka://{broker.address}/forgets")), "trainer")
    try:
        for seq in range(5):
            assert member.claim(records((0, seq, seq)), never_gone) == [True]
        member.settle({"w0": (0, 5)})
        broker.kill()
        broker.start()
        new, deadline = records((0, 0, 8), (0, 1, 3), (0, 2, 9)), time.monotonic() + 60
        found: list[bool] = []
        while not found:
            assert time.monotonic() < deadline
            with contextlib.suppress(KafkaError):
                found = member.claim(new, never_gone)
        assert found == [True, False, True]
    finally:
        member.close()
        broker.kill()


@pytest.fixture
def claims_on_kafka(tmp_path):
    place = PLACES["noida"](tmp_path)
    link = KafkaLink(parse_url(place.url))
    made = []

    def make():
        made.append(KafkaClaims(link, "trainer"))
        return made[-1]

    yield make
    for one in made:
        one.close()
    close_servers()


def test_on_kafka_members_agree_and_a_long_topic_is_shortened(claims_on_kafka, monkeypatch):
    monkeypatch.setattr(kafka_claims, "_SHORTEN_AT", 8)
    monkeypatch.setattr(kafka_claims, "_PART_BYTES", 100)
    first, second = claims_on_kafka(), claims_on_kafka()
    for seq in range(8):
        assert first.claim(records((0, seq, seq)), never_gone) == [True]
        assert second.claim(records((1, seq, seq)), never_gone) == [False]
        first.settle({"w0": (0, seq)})  # all but the last
    with second.latest():
        second.refresh()
        assert second.claims.holders == {("server", 1, 7): ("w0", "0-7")}
    third = claims_on_kafka()
    with third.latest():
        assert content(third.claims) == content(first.claims)
    begin = third._consumer.beginning_offsets([third._partition])[third._partition]
    assert begin > 0
    assert third.claim(records((2, 1, 3), (2, 2, 7), (2, 3, 8)), never_gone) == [False, False, True]
