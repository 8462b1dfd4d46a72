"""What a Kafka buffer decides without a broker: its URL, the shares of a group, what a log of
publications means."""

import itertools
import random
import threading

import pytest
from kafka.errors import KafkaError

from buffer.backends import open_backend
from buffer.kafka_group import share_out
from buffer.kafka_link import KafkaLink, parse_url
from buffer.kafka_outbox import Outbox
from buffer.kafka_versions import State


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("kafka://", "must look like kafka://"),
        ("kafka://host:9092", "must look like kafka://"),
        ("kafka://host/prefix", "a broker is not named as HOST:PORT"),
        ("kafka://host:70000/prefix", "not named as HOST:PORT"),
        ("kafka://a:1,b/prefix", "not named as HOST:PORT"),
        ("kafka://a:1/pre fix", "the prefix must match"),
        ("kafka://a:1/p?partition=3", "option 'partition': .* known are partitions, "),
        ("kafka://a:1/p?partitions=0", "option 'partitions': .* greater than or equal to 1"),
        ("kafka://a:1/p?partitions=1&partitions=2", "gives an option twice"),
        ("kafka://a:1/p?partitions", "must be OPTION=VALUE"),
        ("kafka://me@a:1/p?mechanism=plain", "would send the password readable"),
        ("kafkas://a:1/p?security=plaintext", "kafkas:// means security=ssl"),
    ],
)
def test_a_url_that_cannot_be_meant_is_refused(url, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        open_backend(url, tmp_path)


def test_a_password_in_the_url_is_refused_and_not_shown():
    with pytest.raises(ValueError, match="leave the user in it") as caught:
        parse_url("kafka://me:hunter2@a:1/p")
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ValueError) as caught:
        parse_url("kafka://me:hunter2@a:1")
    assert "hunter2" not in str(caught.value)


def test_a_user_needs_the_password_of_its_variable(monkeypatch):
    monkeypatch.delenv("OUR_PASSWORD", raising=False)
    link = KafkaLink(parse_url("kafkas://me@a:1/p?password_env=OUR_PASSWORD"))
    with pytest.raises(ValueError, match="OUR_PASSWORD is not set"):
        link.consumer(link)


def test_every_partition_has_one_owner_and_what_is_held_stays():
    chance = random.Random(1)
    for _ in range(500):
        partitions = range(chance.randrange(1, 12))
        members = [f"m{i}" for i in range(chance.randrange(1, 6))]
        held = {member: [] for member in members}
        for partition in partitions:
            if chance.random() < 0.5:
                held[chance.choice(members)].append(partition)
        shares, released = share_out(partitions, held)
        assert sorted(itertools.chain(*shares.values())) == list(partitions)
        most = -(-len(partitions) // len(members))
        for member in members:
            assert set(held[member]) <= shares[member]
            assert len(shares[member] - released[member]) <= most
            assert released[member] <= set(held[member])


def publish(version, nonce, epoch=None):
    return {
        "kind": "publish",
        "version": version,
        "epoch": epoch,
        "nonce": nonce,
        "parent": None,
        "files": {},
        "sha256": "",
    }


def test_the_first_of_two_publications_wins_and_a_late_one_of_an_old_epoch_loses():
    messages = [
        {"kind": "take_over", "epoch": 1, "nonce": "a"},
        publish(0, "first", 1),
        publish(0, "second", 1),
        {"kind": "take_over", "epoch": 2, "nonce": "b"},
        {"kind": "take_over", "epoch": 2, "nonce": "c"},
        publish(1, "late", 1),
        publish(1, "ours", 2),
        {"kind": "use", "producer": "s", "versions": [0], "at": 10},
        {"kind": "prune", "versions": [0, 1], "at": 11},
        publish(1, "again", 2),
    ]
    state = State()
    for offset, message in enumerate(messages):
        state.follow(offset, message)
    assert {v: one.nonce for v, one in state.published.items()} == {0: "first"}
    assert (state.epoch, state.highest, state.owners) == (2, 1, ["a", "b"])
    assert State.from_json(state.to_json()) == state


def test_messages_that_make_no_sense_change_nothing():
    state = State()
    before = state.to_json()
    for message in (
        {},
        {"kind": 3},
        {"kind": "publish", "version": 1, "epoch": None, "nonce": "x"},
    ):
        state.follow(0, message)
    assert state.to_json() == before


def test_an_outbox_drops_the_oldest_waiting_and_counts_every_record():
    box = Outbox(100)
    for _ in range(3):
        box.add(bytes(30))
    box.is_sent()
    box.is_sent()
    for _ in range(4):
        box.add(bytes(30))
    assert (box.appended, box.dropped) == (7, 2)
    box.is_acknowledged()
    box.send_again()
    assert [one.number for one in box.waiting] == [1, 4, 5, 6]
    box.is_sent()
    box.give_up()
    assert box.appended == box.durable + box.dropped + box.doubtful == 7
    assert (box.durable, box.doubtful) == (1, 1)


def test_attempts_to_reach_brokers_that_are_away_leave_no_threads_behind():
    """The client's library would leave one for each, which tries to connect for ever."""

    class Owner:
        pass

    link = KafkaLink(parse_url("kafka://127.0.0.1:1/p?timeout_s=0.1"))
    for make in (link.consumer, link.producer, lambda owner: link.admin().__enter__()):
        with pytest.raises(KafkaError):
            make(Owner())
        assert not [one for one in threading.enumerate() if one.name.startswith("kafka-io")]
