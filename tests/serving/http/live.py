"""A real server: ``python -m serving launch`` in a process of its own, on a port of its own."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai

from oracles.forked import Forked
from oracles.support import REPOSITORY

START_S = 60.0
MODEL = "tiny"
SETTINGS = (
    "device=cpu",
    "engine.cpu_threads=1",
    "engine.max_model_len=512",
    "engine.max_batch=8",
    "engine.max_queue=16",
    f"server.model_name={MODEL}",
    "server.port=0",
)


@dataclass(frozen=True)
class LiveServer:
    process: Forked
    url: str
    run_dir: Path
    log_path: Path
    api_key: str | None

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key=self.api_key or "not needed",
            max_retries=0,
            timeout=30,
        )

    def client(self) -> httpx.Client:
        headers = {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30)

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples that have these labels."""
        with self.client() as client:
            text = client.get("/metrics").text
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        lines = [line for line in text.splitlines() if line.startswith(f"slipstream:{name}{{")]
        return sum(float(x.rpartition(" ")[2]) for x in lines if all(w in x for w in wanted))

    def wait_until_idle(self, timeout_s: float = 10.0) -> None:
        wait_for(lambda: self.metric("num_requests_running") == 0, timeout_s)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=40)


def wait_for(condition, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not so within {timeout_s} s"
        time.sleep(0.02)


@contextmanager
def running_server(target: Path, folder: Path, *more: str, **env: str) -> Iterator[LiveServer]:
    """A server that answers /ready; killed on leaving if it is still alive."""
    run_dir, log_path = folder / "run", folder / "log.txt"
    settings = (*SETTINGS, f"target={target}", f"run_dir={run_dir}", *more)
    process = Forked(launch_command(*settings)[1:], environment(**env), Path.cwd(), log_path)
    try:
        wait_for(lambda: (run_dir / "server.json").exists() or process.poll() is not None, START_S)
        assert process.poll() is None, log_path.read_text()
        place = json.loads((run_dir / "server.json").read_text())
        assert place["pid"] == process.pid
        url = f"http://127.0.0.1:{place['port']}"
        key = env.get("SLIPSTREAM_SERVER__API_KEY")
        server = LiveServer(process, url, run_dir, log_path, key)
        wait_for(lambda: httpx.get(f"{url}/ready").status_code == 200, START_S)
        yield server
    finally:
        process.kill()
        process.wait()


def launch_command(*settings: str) -> list[str]:
    sets = [part for setting in settings for part in ("--set", setting)]
    return [sys.executable, "-m", "serving", "launch", *sets]


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    return {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", **more}
