"""The weights store in Redis.

    <run>:weights            hash: ``highest`` version ever published, ``epoch`` of the newest
                             publisher
    <run>:manifests          hash: version -> its ``manifest.json`` and where its content is
    <run>:content:<token>:<file>:<i>  a chunk of a file of one upload
    <run>:denied             versions that a server rolled back from, JSON
    <run>:in_use             hash: server -> versions it uses and when it said so, JSON
    <run>:published          channel on which versions are announced

Content is uploaded first, under a token of its own and with a time to live, in case the publisher
dies. One transaction then takes the version's number, keeps the content and makes it visible,
provided that nobody has published or taken over meanwhile.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import redis

from buffer.bundles import (
    Bundle,
    BundleError,
    BundleInBuffer,
    ExpectedTensors,
    HostBuffer,
    prepare_bundle,
)
from buffer.folder_weights import versions_of
from buffer.manifest import (
    MANIFEST,
)
from buffer.pieces import PiecedBundle
from buffer.records import FileDigest, Manifest
from buffer.redis_client import Command, RedisClient
from buffer.redis_watch import watch_channel
from buffer.sealed import Content, Sealed, plain
from buffer.small_json import parse_small_json
from buffer.tensors import parse_json
from buffer.version_rules import check_keep, check_may_publish, check_producer, versions_to_prune
from buffer.weights_store import WeightsStore

CHUNK_BYTES = 1 << 20
IN_USE_STALE_S = 24 * 3600.0
"""Seconds after which a mark that was not renewed is assumed to be a dead server's."""
_UPLOAD_TTL_S = 3600
_CHUNKS_AT_ONCE = 8
_TRIES = 100
"""How often a transaction is tried again because somebody changed what it depends on."""


@dataclass(frozen=True, slots=True)
class _Stored:
    """What the store knows of a version."""

    token: str
    manifest: bytes


class RedisWeights(WeightsStore):
    """Versions of one run."""

    def __init__(self, client: RedisClient) -> None:
        self._client = client
        key = client.options.key
        self._state, self._manifests = key("weights"), key("manifests")
        self._denied, self._in_use = key("denied"), key("in_use")
        self._channel = key("published")

    @property
    def location(self) -> str:
        return f"weights in {self._client.options.location}"

    def versions(self) -> list[int]:
        return sorted(int(name) for name in self._client.call("HKEYS", self._manifests))

    def next_version(self) -> int:
        highest = self._client.call("HGET", self._state, "highest")
        return 0 if highest is None else int(highest) + 1

    def take_over(self) -> int:
        return int(self._client.call("HINCRBY", self._state, "epoch", 1))

    def publish(
        self,
        manifest: Manifest,
        files: Mapping[str, Content | Sealed],
        epoch: int | None = None,
    ) -> Manifest:
        manifest, content = prepare_bundle(manifest, files)
        self._check(manifest.version, epoch)
        token = secrets.token_hex(8)
        text = content.pop(MANIFEST)
        keys = list(self._upload(token, content))
        stored = json.dumps({"token": token, "manifest": bytes(plain(text)).decode()})

        def commands() -> list[Command]:
            self._check(manifest.version, epoch)
            return [
                ("HSET", self._state, "highest", manifest.version),
                ("HSET", self._manifests, manifest.version, stored),
                *(("PERSIST", key) for key in keys),
                ("PUBLISH", self._channel, manifest.version),
            ]

        answers = self._transaction([self._state], commands)
        num_kept = sum(answer == 1 for answer in answers[2:-1])
        if num_kept < len(keys):
            self._client.call("HDEL", self._manifests, manifest.version)
            raise self._client.away(f"version {manifest.version} took too long to upload")
        return manifest

    def read_manifest(self, version: int) -> Manifest:
        return self._bundle(version).manifest()

    def read(self, version: int, expected: ExpectedTensors | None = None) -> Bundle:
        return self._bundle(version).read(expected)

    def read_into(
        self, host: HostBuffer, version: int, expected: ExpectedTensors | None = None
    ) -> BundleInBuffer:
        return self._bundle(version).read_into(host, expected)

    def change_mark(self, version: int) -> str:
        """The token under which the version was uploaded, or why there is none."""
        try:
            return self._stored(version).token
        except BundleError as error:
            return error.problem

    def watch(self, notify: Callable[[], None]) -> Callable[[], None]:
        return watch_channel(self._client, self._channel, notify)

    def read_denied(self) -> set[int]:
        text = self._client.call("GET", self._denied)
        try:
            return set() if text is None else versions_of(parse_small_json(text))
        except (ValueError, TypeError):
            raise ValueError(
                f"key {self._denied} in {self._client.options.location} must be a JSON list of the "
                f"versions that were rolled back; delete it to forget them"
            ) from None

    def write_denied(self, denied: Collection[int]) -> None:
        self._client.call("SET", self._denied, json.dumps(sorted(denied)))

    def mark_in_use(self, producer: str, in_use: Collection[int]) -> None:
        check_producer(producer)
        mark = json.dumps({"versions": sorted(in_use), "unix_s": time.time()})
        self._client.call("HSET", self._in_use, producer, mark)

    def unmark_in_use(self, producer: str) -> None:
        self._client.call("HDEL", self._in_use, producer)

    def prune(self, keep: int, in_use: Collection[int] = ()) -> list[int]:
        """Remove old versions, and return them; if a mark is unreadable, none are removed."""
        check_keep(keep)
        removed: list[int] = []
        tokens: list[tuple[str, _Stored]] = []

        def commands() -> list[Command]:
            marked = self._marked_in_use()
            removed[:] = (
                []
                if marked is None
                else versions_to_prune(self.versions(), keep, marked | set(in_use), self._parent_of)
            )
            tokens[:] = [(str(version), self._stored(version)) for version in removed]
            return [("HDEL", self._manifests, *removed)] if removed else []

        self._transaction([self._in_use, self._manifests], commands)
        for version, stored in tokens:
            self._delete_content(version, stored)
        return removed

    # ---- publishing ----------------------------------------------------------------------------

    def _check(self, version: int, epoch: int | None) -> None:
        highest, newest = self._client.call("HMGET", self._state, "highest", "epoch")
        lowest = 0 if highest is None else int(highest) + 1
        check_may_publish(
            self.location, version, lowest, epoch, 0 if newest is None else int(newest)
        )

    def _upload(self, token: str, files: Mapping[str, Content | Sealed]) -> Iterator[str]:
        """Store content that expires unless it is kept; yields its keys."""
        chunks: list[tuple[str, memoryview]] = []
        for name, content in files.items():
            whole = memoryview(plain(content))
            for i, at in enumerate(range(0, len(whole), CHUNK_BYTES)):
                chunks.append((self._content(token, name, i), whole[at : at + CHUNK_BYTES]))
        for start in range(0, len(chunks), _CHUNKS_AT_ONCE):
            part = chunks[start : start + _CHUNKS_AT_ONCE]
            self._client.at_once(("SET", key, data, "EX", _UPLOAD_TTL_S) for key, data in part)
            yield from (key for key, _ in part)

    def _content(self, token: str, name: str, chunk: int) -> str:
        return self._client.options.key("content", token, name, str(chunk))

    def _transaction(
        self, watched: Sequence[str], commands: Callable[[], list[Command]]
    ) -> list[Any]:
        """Execute what ``commands`` returns, provided that ``watched`` keys did not change since
        it was called; otherwise call it again."""
        with self._client.errors():
            for _ in range(_TRIES):
                with self._client.redis.pipeline(transaction=True) as pipe:
                    pipe.watch(*watched)
                    todo = commands()
                    if not todo:
                        return []
                    pipe.multi()
                    for command in todo:
                        pipe.execute_command(*command)
                    try:
                        answers: list[Any] = pipe.execute()
                        return answers
                    except redis.WatchError:
                        continue
        raise self._client.away("others change the weights store all the time")

    # ---- reading -------------------------------------------------------------------------------

    def _stored(self, version: int) -> _Stored:
        found = self._client.call("HGET", self._manifests, version)
        if found is None:
            raise BundleError(str(version), f"{self.location} have no version {version}")
        try:
            body = parse_json(found)
            return _Stored(str(body["token"]), str(body["manifest"]).encode())
        except (ValueError, TypeError, KeyError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise BundleError(
                str(version), f"{self.location}: entry unreadable: {problem}"
            ) from None

    def _bundle(self, version: int) -> PiecedBundle:
        return self._bundle_of(version, self._stored(version))

    def _bundle_of(self, version: int, stored: _Stored) -> PiecedBundle:
        return PiecedBundle(
            version,
            self.location,
            stored.manifest,
            partial(self._has_end, stored.token),
            partial(self._chunks, stored.token),
        )

    def _chunks(self, token: str, name: str, digest: FileDigest) -> Iterator[bytes]:
        """Content of a file as far as it is there, and no more than the manifest claims."""
        for i in range(-(-digest.num_bytes // CHUNK_BYTES)):
            chunk = self._client.call("GET", self._content(token, name, i))
            if chunk is None:
                return
            yield chunk

    def _has_end(self, token: str, name: str, digest: FileDigest) -> bool:
        """The chunk that a file ends in is there."""
        last = -(-digest.num_bytes // CHUNK_BYTES) - 1
        return last < 0 or bool(self._client.call("EXISTS", self._content(token, name, last)))

    # ---- pruning -------------------------------------------------------------------------------

    def _marked_in_use(self) -> set[int] | None:
        fresh_s = time.time() - IN_USE_STALE_S
        marked: set[int] = set()
        for text in self._client.call("HVALS", self._in_use):
            try:
                mark = parse_json(text)
                if mark["unix_s"] >= fresh_s:
                    marked |= {int(version) for version in mark["versions"]}
            except (ValueError, TypeError, KeyError):
                return None
        return marked

    def _parent_of(self, version: int) -> int | None:
        try:
            return self.read_manifest(version).parent
        except BundleError:  # a damaged bundle has no parent to protect
            return None

    def _delete_content(self, version: str, stored: _Stored) -> None:
        try:
            manifest = self._bundle_of(int(version), stored).manifest()
        except BundleError:
            return
        for name, digest in manifest.files.items():
            num_chunks = -(-digest.num_bytes // CHUNK_BYTES)
            keys = [self._content(stored.token, name, i) for i in range(num_chunks)]
            if keys:
                self._client.call("UNLINK", *keys)
