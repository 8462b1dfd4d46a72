"""Brokers may show a message a moment after they have acknowledged it. Whoever appends one waits
for it, and the state that comes back includes it.

The broker is Tansu. What comes late is made here: kafka-python's consumer is told of each new end
of a partition only when it asks again.
"""

import secrets

import pytest
from kafka import KafkaConsumer
from kafka.errors import KafkaTimeoutError

from buffer.deletions import digest_of
from buffer.kafka_deletions import DeletionLog
from buffer.kafka_fetch import wait_until_shown
from buffer.kafka_link import KafkaLink, parse_url
from buffer.kafka_versions import VersionLog
from oracles.kafka_brokers import running_broker

NUM_LATE = 3
"""Times that a consumer must ask for an end before it is told of it."""


@pytest.fixture(scope="module")
def broker(tmp_path_factory):
    with running_broker("tansu", tmp_path_factory.mktemp("tansu")) as running:
        yield running


@pytest.fixture
def link(broker):
    return KafkaLink(parse_url(f"kafka://{broker.address}/late-{secrets.token_hex(8)}?timeout_s=2"))


@pytest.fixture
def shown_late(monkeypatch):
    """How often consumers asked in vain."""
    real, asked, in_vain = KafkaConsumer.end_offsets, {}, []

    def end_offsets(consumer, partitions):
        found = real(consumer, partitions)
        for partition, end in found.items():
            told, times = asked.get((consumer, partition), (0, 0))
            if end > told and times < NUM_LATE:
                asked[consumer, partition] = told, times + 1
                in_vain.append(partition)
                found[partition] = told
            else:
                asked[consumer, partition] = end, 0
        return found

    monkeypatch.setattr(KafkaConsumer, "end_offsets", end_offsets)
    return in_vain


def test_a_version_log_waits_for_its_own_message(link, shown_late):
    log = VersionLog(link)
    for epoch in (1, 2, 3):
        state = log.append({"kind": "take_over", "epoch": epoch, "nonce": f"owner-{epoch}"})
        assert (state.epoch, state.owners[-1], log.end) == (epoch, f"owner-{epoch}", epoch)
    assert len(shown_late) == 3 * NUM_LATE


def test_a_list_of_deletions_waits_for_its_own_message(link, shown_late):
    log = DeletionLog(link)
    for number in range(3):
        digest = digest_of(f"tenant-{number}")
        log.put(digest, 1_700_000_000_000 + number)
        assert log._deletions.until_ms[digest] == 1_700_000_000_000 + number
    assert len(shown_late) == 3 * NUM_LATE


def test_a_message_that_never_shows_is_an_error_in_time():
    looks = []

    def never():
        looks.append(1)
        return False

    with pytest.raises(KafkaTimeoutError, match="do not show what they have acknowledged"):
        wait_until_shown(never, 0.05)
    assert len(looks) > 1


def test_nobody_looks_again_once_a_message_was_shown():
    answers = iter([False, False, True])
    wait_until_shown(lambda: next(answers), 60.0)
    assert not list(answers)
