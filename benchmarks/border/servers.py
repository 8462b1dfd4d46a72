"""Servers of their own for a benchmark, and their HTTP processes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from examples.demo import begin_server, wait_for_server
from examples.plan import DemoSettings
from examples.processes import Child, stop

START_S = 600.0


@dataclass(frozen=True, slots=True)
class BenchServer:
    """A running server."""

    child: Child
    url: str
    model: str

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def http_pids(self) -> list[int]:
        """Its HTTP processes that accept connections."""
        ready = {int(pid) for pid in re.findall(r"HTTP process (\d+) accepts", self.log)}
        found: list[int] = []
        for task in Path(f"/proc/{self.child.process.pid}/task").iterdir():
            found += [int(pid) for pid in (task / "children").read_text().split()]
        return sorted(pid for pid in found if pid in ready)

    def metrics(self) -> dict[str, float]:
        """Sums of all samples of each name, without the prefix."""
        sums: dict[str, float] = {}
        for line in httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines():
            if match := re.match(r"slipstream:(\w+)(\{.*\})? (\S+)$", line):
                sums[match[1]] = sums.get(match[1], 0.0) + float(match[3])
        return sums

    @property
    def log(self) -> str:
        return self.child.log.read_text(errors="replace")

    def resident_mib(self) -> float:
        """Memory of the engine's process that is in RAM."""
        status = Path(f"/proc/{self.child.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


@contextmanager
def bench_server(
    folder: Path, settings: Sequence[str], *, configs: Sequence[str] = ()
) -> Iterator[BenchServer]:
    """A server that is ready; stopped at the end.

    Args:
        configs: settings files or names, before the settings.

    Raises:
        ChildDiedError: it ended while starting; the text quotes its log.
    """
    wanted = DemoSettings(
        configs=tuple(map(Path, configs)),
        run_dir=folder / "run",
        overrides=tuple(settings),
        start_s=START_S,
    )
    child = begin_server(wanted)
    try:
        url = wait_for_server(wanted, [child]).url
        model = httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"]
        yield BenchServer(child, url, model)
    finally:
        stop([child])


def kill(pid: int) -> None:
    """SIGKILL, if it lives."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
