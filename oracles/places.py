"""Buffers of every kind for the tests that each backend must pass.

To let a new backend pass them, add a function that makes a ``Place`` to ``PLACES``.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Protocol

import pytest

from buffer.backends import open_backend
from buffer.interface import Backend
from buffer.redis_url import parse_redis_url
from buffer.socket_buffer import SocketBackend
from oracles.kafka_brokers import Broker, Kind
from oracles.redis_servers import RedisServer, debian_binary, valkey_binary


class Server(Protocol):
    """A server that a test may kill and start again."""

    def kill(self) -> None: ...

    def start(self) -> None: ...


@dataclass(frozen=True)
class Place:
    """One buffer of one backend, for one test."""

    url: str
    run_dir: Path
    server: Server | None = None
    """``None``: there is none, or it belongs to somebody else."""
    for_processes: bool = True
    """Other processes can open it, too."""
    notifies: bool = False
    """Its weights store tells when a version was published."""
    lacks: Mapping[str, str] = field(default_factory=dict)
    """Tests that its server cannot pass, whatever we do -> why."""
    damage: Callable[[int], None] | None = None
    """Changes one byte of a version's ``drafter.safetensors``."""

    def open(self) -> Backend:
        """Open it, or open it again as a restart would."""
        return open_backend(self.url, self.run_dir)


def _log(tmp_path: Path) -> Place:
    def damage(version: int) -> None:
        path = tmp_path / "weights" / str(version) / "drafter.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    return Place("log:", tmp_path, damage=damage)


def _memory(tmp_path: Path) -> Place:
    return Place(f"memory:{tmp_path}", tmp_path, for_processes=False, notifies=True)


def _socket(tmp_path: Path) -> Place:
    place = Place("socket:", tmp_path)
    holder = place.open()
    assert isinstance(holder, SocketBackend) and holder.host()
    _HOLDERS.append(holder)
    return place


def _valkey(tmp_path: Path) -> Place:
    given = os.environ.get("REDIS_URL")
    if given is not None:
        return _redis(given, tmp_path, None)
    server = _server(valkey_binary())
    return _redis(server.url, tmp_path, server)


def _debian_redis(tmp_path: Path) -> Place:
    binary = debian_binary()
    if binary is None:
        pytest.skip("redis-server is not installed")
    server = _server(binary)
    return _redis(server.url, tmp_path, server)


def _redis(url: str, tmp_path: Path, server: RedisServer | None) -> Place:
    options = f"run=test-{secrets.token_hex(8)}&member_timeout_s=2&piece_bytes=1048576"
    url = f"{url}{'&' if '?' in url else '?'}{options}"

    def damage(version: int) -> None:
        from buffer.redis_client import RedisClient

        client = RedisClient(parse_redis_url(url, tmp_path))
        pattern = client.options.key("content", "*", "drafter.safetensors", "0")
        for key in client.redis.scan_iter(pattern):
            content = bytearray(client.call("GET", key))
            content[-1] ^= 1
            client.call("SET", key, bytes(content))
        client.close()

    return Place(url, tmp_path, server, notifies=True, damage=damage)


def _kafka(kind: Kind) -> Callable[[Path], Place]:
    def make(tmp_path: Path) -> Place:
        given = os.environ.get("KAFKA_BOOTSTRAP")
        broker = None if given is not None else _broker(kind)
        address = given if broker is None else broker.address
        # One record a batch: Tansu says that a batch ends behind its first record.
        options = "partitions=2&session_s=6" + ("&batch_bytes=0" if kind == "tansu" else "")
        url = f"kafka://{address}/test-{secrets.token_hex(8)}?{options}"
        is_tansu = broker is not None and kind == "tansu"  # it forgets all, and deletes no records
        damage = None if is_tansu else partial(_damage_kafka, url)
        # No server to kill: one forgets all, the other what it got within the last second or so.
        lacks = {} if broker is None else _LACKS[kind]
        return Place(url, tmp_path, notifies=True, lacks=lacks, damage=damage)

    return make


_NO_RETENTION = "without a server, Kafka's own retention removes records, in its own time"
_NO_DELETION = "Tansu deletes no records"
_SLOW = "noida shows it, and Tansu takes three seconds for each change of a group"
_LATE = "noida shows it; Tansu shows what eight append at once up to 40 s after it acknowledged it"
_NO_COMMIT = "Tansu lists no group that has not committed"
_LACKS: dict[Kind, dict[str, str]] = {
    "tansu": {
        "test_the_oldest_records_are_evicted_and_counted": _NO_DELETION,
        "test_an_evicted_record_is_found_no_more": _NO_DELETION,
        "test_records_are_evicted_at_their_ttl_even_if_nothing_is_appended": _NO_DELETION,
        "test_what_is_evicted_before_it_was_committed_is_lost_and_counted": _NO_DELETION,
        "test_a_trace_that_was_evicted_before_it_was_committed_may_be_sent_again": _NO_DELETION,
        "test_a_trace_whose_trainer_died_is_learnt_by_another_also_if_it_was_sent_again": _SLOW,
        "test_traces_are_told_apart_by_any_name_and_any_number": _SLOW,
        "test_what_a_checkpoint_has_learnt_is_learnt_by_nobody_else_though_it_was_not_committed": (
            _SLOW
        ),
        "test_every_trainer_that_takes_over_gets_an_epoch_of_its_own": _LATE,
        "test_a_reader_that_is_opened_with_offsets_commits_them": _NO_COMMIT,
        "test_each_group_gets_everything_and_a_reader_without_one_leaves_no_mark": _NO_COMMIT,
        "test_every_record_is_committed_pending_lost_or_deleted": "Tansu drops what commits say",
        "test_a_deletion_takes_what_was_put_aside_along": _NO_DELETION,
        "test_old_records_vanish_though_no_server_runs": _NO_RETENTION,
        "test_put_aside_records_vanish_when_they_are_old": _NO_DELETION,
        "test_appended_is_committed_plus_pending_plus_lost_at_any_time": (
            "Tansu takes three seconds for each change of a group"
        ),
        "test_whoever_comes_and_goes_each_trace_is_saved_once": (
            "Tansu takes three seconds for each change of a group"
        ),
    },
    "noida": {
        "test_two_trainers_learn_a_replayed_trace_once_between_them": (
            "Tansu shows it; noida cuts answers short now and then, which ends the client's thread"
        ),
        "test_old_records_vanish_though_no_server_runs": _NO_RETENTION,
        "test_two_members_share_the_records_of_two_writers": (
            "a group of several members does not always settle in noida"
        ),
        "test_appended_is_committed_plus_pending_plus_lost_at_any_time": (
            "after some changes of a group, noida sends a member an empty assignment, which ends "
            "the client's thread"
        ),
        "test_whoever_comes_and_goes_each_trace_is_saved_once": (
            "after some changes of a group, noida sends a member an empty assignment, which ends "
            "the client's thread"
        ),
        "test_what_a_killed_member_had_goes_to_another": "noida expels no dead member",
        "test_a_second_version_is_read_into_the_memory_of_the_first": (
            "noida sends more than was asked for"
        ),
    },
}


def _damage_kafka(url: str, version: int) -> None:
    """Kafka changes no message, so the log of publications is replaced by one that names a wrong
    piece."""
    from kafka import TopicPartition

    from buffer.kafka_link import KafkaLink, parse_url
    from buffer.kafka_versions import VersionFiles, VersionLog

    link = KafkaLink(parse_url(url))
    log, files = VersionLog(link), VersionFiles(link)
    stored = log.follow().to_json()
    for number, _, nonce, _, places, _ in stored["published"]:
        if number == version:
            name = "drafter.safetensors"
            content = bytearray(b"".join(files.read(nonce, name, places[name])))
            content[-1] ^= 1
            places[name] = files.write(nonce, {name: bytes(content)})[name]
    partition = TopicPartition(link.topic("weights"), 0)
    log.append({"kind": "nothing"})  # so that those who follow the log must begin again, too
    end = log.end
    log.append({"kind": "state", "up_to": end, "state": stored})
    with link.admin() as admin:
        admin.delete_records({partition: end})


@cache
def _broker(kind: Kind) -> Broker:
    """One broker of a kind for all tests of this process; see ``close_servers``."""
    folder = Path(tempfile.mkdtemp(prefix=f"{kind}-"))
    broker = Broker(kind, folder)
    _BROKERS.append((broker, folder))
    return broker


@cache
def _server(binary: str) -> RedisServer:
    """One server for all tests of this process; see ``close_servers``."""
    server = RedisServer(binary)
    _RUNNING.append(server)
    return server


_RUNNING: list[RedisServer] = []
_HOLDERS: list[SocketBackend] = []
"""Each holds its buffer in this process as long as it is here."""
_BROKERS: list[tuple[Broker, Path]] = []

PLACES: dict[str, Callable[[Path], Place]] = {
    "log": _log,
    "memory": _memory,
    "socket": _socket,
    "valkey": _valkey,
    "redis": _debian_redis,
    "tansu": _kafka("tansu"),
    "noida": _kafka("noida"),
}


def _shared_memory(tmp_path: Path) -> Place:
    root = tmp_path / "weights"

    def damage(version: int) -> None:
        in_memory = Path("/dev/shm") / f"slipstream-{(root / 'SHM_NAME').read_text()}"
        for folder in (root, in_memory):  # memory is given back when nobody uses it
            if (folder / str(version)).is_dir():
                _flip(folder / str(version) / "drafter.safetensors")

    return Place("shm:", tmp_path, notifies=True, damage=damage)


def _objects_in_folder(tmp_path: Path) -> Place:
    def damage(version: int) -> None:
        [path] = (tmp_path / "objects" / "content").glob("*/drafter.safetensors")
        _flip(path)

    return Place(f"fsspec:file://{tmp_path}/objects", tmp_path, damage=damage)


def _objects_in_memory(tmp_path: Path) -> Place:
    url = f"fsspec:memory://{secrets.token_hex(8)}"
    lacks = {
        "test_a_second_version_is_read_into_the_memory_of_the_first": (
            "fsspec's file in memory copies itself when it is first read"
        )
    }
    return Place(url, tmp_path, for_processes=False, lacks=lacks)


def _s3(tmp_path: Path) -> Place:
    return Place(f"{os.environ['S3_URL']}/{secrets.token_hex(8)}", tmp_path)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


STORES: dict[str, Callable[[Path], Place]] = {
    "shared memory": _shared_memory,
    "objects in a folder": _objects_in_folder,
    "objects in memory": _objects_in_memory,
    **({"s3": _s3} if "S3_URL" in os.environ else {}),
}
"""Stores of versions whose traces are in a buffer of ``PLACES``; only tests of versions are for
them. ``S3_URL`` is such as ``s3://bucket/tests``, with credentials as s3fs takes them."""


def close_servers() -> None:
    """End all servers that were started."""
    _HOLDERS.clear()
    while _RUNNING:
        _RUNNING.pop().close()
    while _BROKERS:
        broker, folder = _BROKERS.pop()
        broker.kill()
        shutil.rmtree(folder, ignore_errors=True)
    _server.cache_clear()
    _broker.cache_clear()
