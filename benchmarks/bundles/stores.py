"""Puts bundles into stores past all checks, as somebody who can write to them would."""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from pathlib import Path
from typing import Any, Protocol

from benchmarks.bundles.kinds import Given
from buffer.backends import open_backend
from buffer.weights_store import WeightsStore


class Target(Protocol):
    """A store, and the way into it."""

    name: str
    store: WeightsStore

    def plant(self, version: int, given: Given) -> None:
        """Store a bundle as this version, whatever is in it."""
        ...

    def remove(self, version: int) -> None:
        """Free the space again."""
        ...


class InFolder:
    """Folders of one root."""

    name = "folder"

    def __init__(self, run_dir: Path) -> None:
        self.store = open_backend("log:", run_dir).open_weights()
        self.root = run_dir / "weights"

    def path(self, version: int) -> Path:
        """Folder of a version."""
        return self.root / str(version)

    def plant(self, version: int, given: Given) -> None:
        path = self.path(version)
        path.mkdir(parents=True)
        (path / "manifest.json").write_bytes(given.manifest_text)
        for name, content in given.files.items():
            (path / name).write_bytes(content)

    def remove(self, version: int) -> None:
        path = self.path(version)
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path)


class InRedis:
    """Keys of one run, written as ``buffer.redis_weights`` does."""

    name = "redis"

    def __init__(self, url: str, run_dir: Path) -> None:
        from buffer.redis_client import RedisClient
        from buffer.redis_url import parse_redis_url

        self.store = open_backend(url, run_dir).open_weights()
        self._client = RedisClient(parse_redis_url(url, run_dir))

    def plant(self, version: int, given: Given) -> None:
        key, token = self._client.options.key, secrets.token_hex(8)
        for name, content in given.files.items():
            if content:
                self._client.call("SET", key("content", token, name, "0"), content)
        text = given.manifest_text.decode(errors="surrogateescape")
        stored = json.dumps({"token": token, "manifest": text})
        self._client.call("HSET", key("manifests"), version, stored)

    def remove(self, version: int) -> None:
        self._client.call("HDEL", self._client.options.key("manifests"), version)


class InKafka:
    """Topics of one prefix, written as ``buffer.kafka_weights`` does."""

    name = "kafka"

    def __init__(self, url: str, run_dir: Path) -> None:
        from buffer.kafka_link import KafkaLink, parse_url
        from buffer.kafka_versions import VersionFiles, VersionLog

        self.store = open_backend(url, run_dir).open_weights()
        link = KafkaLink(parse_url(url))
        self._log, self._files = VersionLog(link), VersionFiles(link)

    def plant(self, version: int, given: Given) -> None:
        nonce, text = secrets.token_hex(8), given.manifest_text
        places = self._files.write(nonce, {**given.files, "manifest.json": text})
        message: dict[str, Any] = {
            "kind": "publish",
            "version": version,
            "epoch": None,
            "nonce": nonce,
            "parent": 0,
            "files": places,
            "sha256": hashlib.sha256(text).hexdigest(),
        }
        self._log.append(message)

    def remove(self, version: int) -> None:
        self._log.append({"kind": "prune", "versions": [version], "at": 0})
