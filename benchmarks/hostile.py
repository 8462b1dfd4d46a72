"""Tens of thousands of hostile requests to a real server process: does anything break?

    python -m benchmarks.hostile              # 20,000 requests; about ten minutes on two cores

A server with a tiny target answers, in turn:

- *schema*: what schemathesis generates from the server's own ``/openapi.json``, valid and invalid;
- *cut off*: bodies shorter or longer than announced, broken chunks, senders that leave in the
  middle of a body or an answer, and crawlers that send a byte now and then;
- *mutated*: valid bodies of completions and chats with bytes flipped, dropped and repeated, values
  of other types, numbers out of range, unknown and doubled keys, and nesting up to ten thousand
  levels deep, until there are enough.

Meanwhile an honest client asks for ``/health`` twenty times a second. Nothing may crash or hang: no
answer of 500 or above but 503, no wait of more than a second for ``/health`` or for a refusal, no
traceback in the log, and memory that stays where it is.

Writes ``hostile.json`` and ``rows/hostile.json`` in ``benchmarks/results``.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.harness.results import (
    RESULTS,
    Out,
    Row,
    at_most,
    say,
    write_result,
    write_rows,
)
from examples.demo import begin_server, wait_for_server
from examples.plan import DemoSettings
from examples.processes import Child, stop
from oracles.random_bodies import TEXTS, question
from oracles.support import REPOSITORY, save_tiny_target

SOURCE = "python -m benchmarks.hostile"
VOCAB_SIZE = 288
AT_ONCE = 8
"""Hostile requests in flight."""
PROBE_EVERY_S = 0.05
LONGEST_WAIT_S = 1.0
MOST_GROWTH_MIB = 64.0
"""Of the process's memory, from the first quarter of the requests to the end."""
CRAWL_S = 2.0
"""A crawler gives up after this time."""
PATHS = ("/v1/completions", "/v1/chat/completions")
GENERATED = re.compile(r"(\d+) generated")


@dataclass(slots=True)
class Findings:
    """What was seen, by all threads."""

    statuses: Counter[str] = field(default_factory=Counter)
    """Answers by stage and status; ``closed``: the server ended the connection without one."""
    slow: list[str] = field(default_factory=list)
    """Refusals that took longer than ``LONGEST_WAIT_S``."""
    broken: list[str] = field(default_factory=list)
    """Answers of 500 and above but 503, with what was asked."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, stage: str, status: int | None, seconds: float, asked: str) -> None:
        """Take in one answer."""
        with self.lock:
            self.statuses[f"{stage} {status or 'closed'}"] += 1
            if status is not None and status >= 500 and status != 503:
                self.broken.append(f"{stage}: {status} to {asked[:300]}")
            if status is not None and 400 <= status < 500 and seconds > LONGEST_WAIT_S:
                self.slow.append(f"{stage}: {status} after {seconds:.2f} s to {asked[:300]}")


# Server


@dataclass(frozen=True, slots=True)
class Server:
    """A server process."""

    child: Child
    port: int

    def resident_mib(self) -> float:
        """Memory of the process that is in RAM."""
        status = Path(f"/proc/{self.child.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


@contextmanager
def running_server(folder: Path) -> Iterator[Server]:
    """A server with a tiny target, ready.

    Raises:
        ChildDiedError: it ended while starting; the text quotes its log.
    """
    save_tiny_target(folder / "target")
    settings = DemoSettings(
        configs=(),
        run_dir=folder / "run",
        overrides=(
            f"target={folder / 'target'}",
            "device=cpu",
            "engine.cpu_threads=1",
            "engine.max_model_len=256",
            "engine.max_batch=8",
            "engine.max_queue=64",
            "server.model_name=tiny",
        ),
    )
    child = begin_server(settings)
    try:
        url = wait_for_server(settings, [child]).url
        yield Server(child, int(url.rpartition(":")[2]))
    finally:
        stop([child])


def get(port: int, path: str, timeout_s: float) -> int:
    """Status of a GET on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


class Probe(threading.Thread):
    """An honest client that asks for ``/health`` all the time."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._port, self._stopping = port, threading.Event()
        self.waits_s: list[float] = []
        self.failures: list[str] = []

    def run(self) -> None:
        while not self._stopping.wait(PROBE_EVERY_S):
            began = time.perf_counter()
            try:
                status = get(self._port, "/health", timeout_s=10.0)
                if status != 200:
                    self.failures.append(f"status {status}")
            except OSError as error:
                self.failures.append(f"{type(error).__name__}: {error}")
            self.waits_s.append(time.perf_counter() - began)

    def stop(self) -> None:
        self._stopping.set()
        self.join()


# Hostile requests


def valid_body(numbers: random.Random) -> tuple[str, dict[str, Any]]:
    """A path and a body that the server would take."""
    is_chat = numbers.random() < 0.5
    body = question(numbers, is_chat, numbers.choice(TEXTS), VOCAB_SIZE)
    return PATHS[is_chat], {**body, "max_tokens": numbers.randint(1, 4)}


ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1 << 70, -(1 << 63), 1e308, -0.0, 3.0, "", "x" * 4000, "\x00", "𝔘\u200b",
    [], {}, [[]], [None], [[1, 2], "a"], {"a": {"b": []}}, ["x"] * 200, [1 << 40], {"5": "x"},
)  # fmt: skip


def mutated(numbers: random.Random) -> tuple[str, bytes]:
    """A path and a body with one or more faults, or none."""
    path, body = valid_body(numbers)
    if numbers.random() < 0.5:
        for name in numbers.sample(list(body), numbers.randint(1, 2)):
            body[name] = numbers.choice(ODD_VALUES)
    if numbers.random() < 0.2:
        body[numbers.choice(("streem", "tools", "", "__proto__", "a" * 300))] = 1
    if numbers.random() < 0.2:
        body["stream"] = numbers.random() < 0.7
    text = json.dumps(body).encode()
    return path, numbers.choice((_as_it_is, _as_it_is, _garbled, _nested, _doubled))(text, numbers)


def _as_it_is(text: bytes, numbers: random.Random) -> bytes:
    return text


def _garbled(text: bytes, numbers: random.Random) -> bytes:
    """Bytes flipped, a part dropped, a part repeated."""
    found = bytearray(text)
    for _ in range(numbers.randint(1, 6)):
        found[numbers.randrange(len(found))] = numbers.randrange(256)
    at = numbers.randrange(len(found))
    if numbers.random() < 0.3:
        del found[at : at + numbers.randint(1, 40)]
    if numbers.random() < 0.3:
        found[at:at] = found[at : at + 60] * numbers.randint(1, 50)
    return bytes(found)


def _nested(text: bytes, numbers: random.Random) -> bytes:
    """Something nested where a value should be."""
    depth = numbers.choice((8, 31, 33, 1000, 10_000))
    inner = numbers.choice((b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth))
    return text[:-1] + b', "stop": ' + inner + b"}"


def _doubled(text: bytes, numbers: random.Random) -> bytes:
    """A key twice, with different values."""
    return text[:-1] + b', "max_tokens": 2, "temperature": 0}'


def head(path: str, *fields: str) -> bytes:
    lines = "".join(
        f"{line}\r\n" for line in ("Host: x", "Content-Type: application/json", *fields)
    )
    return f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode()


def answer_to(port: int, parts: Iterator[bytes], timeout_s: float = 30.0) -> int | None:
    """Send parts on a connection of their own; the status, or ``None`` if there came none."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as link:
        try:
            for part in parts:
                link.sendall(part)
            answer = http.client.HTTPResponse(link)
            answer.begin()
            answer.read()
            return answer.status
        except (ConnectionError, http.client.HTTPException, TimeoutError):
            return None


def cut_off(numbers: random.Random) -> tuple[str, list[bytes], bool]:
    """What it is, the parts to send, and whether the sender leaves without reading."""
    path, body = valid_body(numbers)
    text = json.dumps(body).encode()
    half = text[: numbers.randrange(len(text))]
    kind = numbers.choice(("short", "long", "chunks", "leaves", "leaves answer", "crawls", "head"))
    exact = head(path, f"Content-Length: {len(text)}")
    if kind == "short":
        return kind, [head(path, f"Content-Length: {len(half)}"), half], False
    if kind == "long":
        return kind, [exact, text, text], False
    if kind == "chunks":
        size = numbers.choice((f"{len(text):x}", "zz", "-1", "ffffffffffffffff", ""))
        chunked = head(path, "Transfer-Encoding: chunked")
        return kind, [chunked, f"{size}\r\n".encode(), text, b"\r\n0\r\n\r\n"], False
    if kind == "leaves":
        return kind, [exact, half], True
    if kind == "leaves answer":
        streamed = json.dumps({**body, "stream": True, "max_tokens": 60}).encode()
        return kind, [head(path, f"Content-Length: {len(streamed)}"), streamed], True
    if kind == "crawls":
        return kind, [exact, *(text[at : at + 1] for at in range(min(len(text) - 1, 8)))], True
    return kind, [head(path)[: numbers.randint(1, 60)]], True


def send_mutated(server: Server, findings: Findings, seed: int) -> None:
    path, body = mutated(random.Random(seed))
    request = [head(path, f"Content-Length: {len(body)}", "Connection: close"), body]
    began = time.perf_counter()
    status = answer_to(server.port, iter(request))
    findings.note("mutated", status, time.perf_counter() - began, f"{path} {body[:280]!r}")


def send_cut_off(server: Server, findings: Findings, seed: int) -> None:
    kind, parts, leaves = cut_off(random.Random(seed))
    if not leaves:
        began = time.perf_counter()
        status = answer_to(server.port, iter(parts), timeout_s=3.0)
        findings.note("cut off", status, time.perf_counter() - began, f"{kind}: {parts}")
        return
    pause_s = CRAWL_S / len(parts) if kind == "crawls" else 0.0
    with socket.create_connection(("127.0.0.1", server.port), timeout=5.0) as link:
        for part in parts:
            try:
                link.sendall(part)
            except ConnectionError:
                break
            time.sleep(pause_s)
    findings.note("cut off", None, 0.0, kind)


def run_schema(server: Server, folder: Path, max_examples: int) -> dict[str, Any]:
    """Requests that schemathesis makes from the server's schema."""
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run"),
            f"http://127.0.0.1:{server.port}/openapi.json",
            *("--phases", "coverage,fuzzing", "--mode", "all", "--continue-on-failure"),
            *("--max-examples", str(max_examples), "--checks", "not_a_server_error"),
            *("--exclude-path", "/admin/drain", "--request-timeout", "20", "--no-color"),
        ],
        env={
            **os.environ,
            "PYTHONPATH": paths,
            "SCHEMATHESIS_HOOKS": "oracles.openapi_hooks",
        },
        cwd=folder,
        capture_output=True,
        text=True,
    )
    found = GENERATED.search(done.stdout)
    return {
        "exit_code": done.returncode,
        "requests": int(found[1]) if found else 0,
        "summary": done.stdout[-1500:],
    }


# The whole run


def rows_of(figures: dict[str, Any]) -> list[Row]:
    """The claims."""
    about = f"{figures['requests']:,} hostile requests"
    growth, longest = figures["memory_growth_mib"], figures["longest_health_s"]
    faults = [
        ("answers of 500 and above but 503", figures["num_broken"]),
        ("refusals that took longer than 1 s", figures["num_slow"]),
        ("failed requests for /health", len(figures["probe_failures"])),
        ("tracebacks in the log", figures["tracebacks"]),
        ("crashes", int(figures["crashed"])),
    ]
    return [
        *(Row(about, measure, value, "none", value == 0) for measure, value in faults),
        at_most(about, "longest wait for /health, seconds", longest, LONGEST_WAIT_S),
        at_most(
            about,
            "growth of memory from the first quarter to the end, MiB",
            growth,
            MOST_GROWTH_MIB,
        ),
    ]


def main(
    out: Out = RESULTS / "hostile.json",
    requests: Annotated[int, typer.Option(help="in all, at least")] = 20_000,
    seed: int = 0,
) -> None:
    """Send hostile requests and write what came."""
    findings = Findings()
    num_cut_off = requests // 10
    with tempfile.TemporaryDirectory() as name, running_server(Path(name)) as server:
        probe = Probe(server.port)
        probe.start()
        memory = [server.resident_mib()]
        schema = run_schema(server, Path(name), max(10, requests // 120))
        say(f"schema: {schema['requests']} requests, exit code {schema['exit_code']}")
        memory.append(server.resident_mib())
        num_mutated = max(0, requests - num_cut_off - schema["requests"])
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for stage, send, count in (
                ("cut off", send_cut_off, num_cut_off),
                ("mutated", send_mutated, num_mutated),
            ):
                for start in range(0, count, 500):
                    seeds = range(seed + start, seed + min(start + 500, count))
                    jobs = [pool.submit(send, server, findings, n) for n in seeds]
                    for job in jobs:
                        job.result()
                    memory.append(server.resident_mib())
                say(f"{stage}: {dict(findings.statuses)}")
        crashed = server.child.process.poll() is not None
        probe.stop()
        stop([server.child])
        log = server.child.log.read_text(errors="replace")
    figures: dict[str, Any] = {
        "requests": sum(findings.statuses.values()) + schema["requests"],
        "statuses": dict(sorted(findings.statuses.items())),
        "schema": schema,
        "num_broken": len(findings.broken) + (schema["exit_code"] != 0),
        "broken": findings.broken[:20],
        "num_slow": len(findings.slow),
        "slow": findings.slow[:20],
        "probes": len(probe.waits_s),
        "longest_health_s": max(probe.waits_s),
        "probe_failures": probe.failures[:20],
        "tracebacks": log.count("Traceback (most recent call last)"),
        "crashed": crashed,
        "exit_code_after_sigterm": server.child.process.returncode,
        "memory_mib": memory,
        "memory_growth_mib": memory[-1] - memory[len(memory) // 4],
    }
    write_result(out, figures)
    write_rows("hostile", rows_of(figures), SOURCE)
    for row in rows_of(figures):
        say(f"{row.measure}: {row.value} (goal: {row.goal}, holds: {row.holds})")
    if figures["tracebacks"]:
        say(log[log.index("Traceback (most recent call last)") :][:3000])


if __name__ == "__main__":
    typer.run(main)
