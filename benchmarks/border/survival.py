"""Requests of mixed kinds while HTTP processes are killed."""

from __future__ import annotations

import json
import random
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import httpx

from benchmarks.border.servers import BenchServer, bench_server, kill
from benchmarks.harness.results import Row, say
from oracles.support import save_tiny_target

MAX_BATCH = 8
SETTINGS = (
    "device=cpu",
    "engine.cpu_threads=1",
    "engine.max_model_len=256",
    f"engine.max_batch={MAX_BATCH}",
    "engine.max_queue=64",
    "server.model_name=tiny",
)
AT_ONCE = 12
"""Clients."""
IDLE_S = 120.0
"""Longest wait for the engine to be idle in the end."""
ANSWER_S = 120.0
"""A request without an answer for so long hangs."""
KINDS = ("whole", "chat", "choices", "prompts", "stream", "stream", "leaves", "gives up", "invalid")


@dataclass(slots=True)
class Findings:
    """What clients saw."""

    endings: Counter[str] = field(default_factory=Counter)
    """By kind and ending."""
    dishonest: list[str] = field(default_factory=list)
    """Answers that were neither complete nor an error."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, kind: str, ending: str) -> None:
        """Take in one ending; those that no client should see begin with an exclamation mark."""
        with self.lock:
            self.endings[f"{kind}: {ending}"] += 1
            if ending.startswith("!"):
                self.dishonest.append(f"{kind}: {ending}")


def measure(requests: int, seed: int, processes: int, kill_every_s: float) -> dict[str, Any]:
    """Send so many requests and count what became of them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tiny_target(folder / "target")
        own = (f"target={folder / 'target'}", f"server.processes={processes}")
        with bench_server(folder, (*SETTINGS, *own)) as server:
            figures = _storm(server, requests, seed, processes, kill_every_s)
        log = server.log
    return {
        **figures,
        "exit_code_after_sigterm": server.child.process.returncode,
        "tracebacks": log.count("Traceback (most recent call last)"),
    }


def _storm(
    server: BenchServer, requests: int, seed: int, processes: int, kill_every_s: float
) -> dict[str, Any]:
    findings, stopping, killed = Findings(), threading.Event(), list[int]()
    killer = threading.Thread(
        target=_kill_now_and_then, args=(server, processes, kill_every_s, seed, stopping, killed)
    )
    memory, began = [server.resident_mib()], time.monotonic()
    killer.start()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for start in range(0, requests, 500):
            seeds = range(seed + start, seed + min(start + 500, requests))
            list(pool.map(lambda number: _ask(server, findings, number), seeds))
            memory.append(server.resident_mib())
            say(f"{start + len(seeds)} requests, {len(killed)} HTTP processes killed")
    seconds = time.monotonic() - began
    stopping.set()
    killer.join()
    left = _when_idle(server)
    return {
        "requests": requests,
        "seconds": seconds,
        "http_processes": processes,
        "killed": len(killed),
        "endings": dict(sorted(findings.endings.items())),
        "num_dishonest": len(findings.dishonest),
        "dishonest": findings.dishonest[:20],
        **left,
        "full_batch_after": _full_batch(server),
        "memory_mib": memory,
        "engine_lives": server.child.process.poll() is None,
    }


def _kill_now_and_then(
    server: BenchServer,
    processes: int,
    every_s: float,
    seed: int,
    stopping: threading.Event,
    killed: list[int],
) -> None:
    """Kill any HTTP process, once all of them accept connections."""
    numbers = random.Random(seed)
    while not stopping.wait(every_s):
        while len(pids := [pid for pid in server.http_pids if pid not in killed]) < processes:
            if stopping.wait(0.1):
                return
        killed.append(numbers.choice(pids))
        kill(killed[-1])


def _ask(server: BenchServer, findings: Findings, number: int) -> None:
    numbers = random.Random(number)
    kind = numbers.choice(KINDS)
    try:
        ending = _ending(server, kind, numbers)
    except (httpx.RemoteProtocolError, httpx.ReadError, httpx.ConnectError, httpx.WriteError):
        ending = "connection lost"  # its process was killed: the client sees that it lacks the rest
    except httpx.TimeoutException:
        ending = "!hangs"
    findings.note(kind, ending)


def _ending(server: BenchServer, kind: str, numbers: random.Random) -> str:
    num_tokens = numbers.randint(1, 48)
    body: dict[str, Any] = {
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "temperature": numbers.choice((0, 0.8)),
        "return_token_ids": True,
        "stream": kind in ("stream", "leaves"),
    }
    body["n"] = {"choices": 3}.get(kind, 1)
    prompt = "a" * numbers.randint(1, 40)
    if kind == "chat":
        path, more = "/v1/chat/completions", {"messages": [{"role": "user", "content": prompt}]}
    else:
        path, more = "/v1/completions", {"prompt": [prompt, "b"] if kind == "prompts" else prompt}
    body |= more
    if kind == "invalid":
        body["max_tokens"] = 10_000
    if body["stream"]:
        leaves_after = numbers.randint(0, 8) if kind == "leaves" else None
        return _streamed(server.url + path, body, num_tokens, leaves_after)
    timeout = httpx.Timeout(ANSWER_S)
    if kind == "gives up":
        timeout = httpx.Timeout(ANSWER_S, read=numbers.uniform(0.001, 0.1))
    try:
        answer = _client().post(server.url + path, json=body, timeout=timeout)
    except httpx.ReadTimeout:
        if kind == "gives up":
            return "left"
        raise
    return _whole(answer, kind, num_tokens)


@cache
def _client() -> httpx.Client:
    """For all requests; each has a connection of its own, so that they spread over processes."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.Client(timeout=ANSWER_S, limits=limits)


def _whole(answer: httpx.Response, kind: str, num_tokens: int) -> str:
    if answer.status_code != 200:
        return _refusal(answer.status_code, answer.text, kind)
    if kind == "invalid":
        return "!was taken"
    choices = answer.json()["choices"]
    wanted = {"choices": 3, "prompts": 2}.get(kind, 1)
    is_whole = len(choices) == wanted and all(
        len(choice["token_ids"]) == num_tokens and choice["finish_reason"] == "length"
        for choice in choices
    )
    return "complete" if is_whole else "!incomplete"


def _refusal(status: int, text: str, kind: str) -> str:
    code = json.loads(text)["error"]["code"]
    if status in (429, 503) or (status == 400 and kind == "invalid"):
        return f"{status} {code}"
    return f"!{status} {code}"


def _streamed(
    url: str,
    body: dict[str, Any],
    num_tokens: int,
    leaves_after: int | None,
) -> str:
    """How a stream ended.

    Args:
        leaves_after: leave after so many events; ``None``: stay.
    """
    tokens, events, last = 0, 0, ""
    with _client().stream("POST", url, json=body) as answer:
        if answer.status_code != 200:
            return _refusal(answer.status_code, answer.read().decode(), "stream")
        for line in answer.iter_lines():
            if events == leaves_after:
                return "left"
            if not line:
                continue
            last, events = line.removeprefix("data: "), events + 1
            if last != "[DONE]" and "error" not in (event := json.loads(last)):
                tokens += sum(len(choice["token_ids"]) for choice in event["choices"])
    if last == "[DONE]":
        return "complete" if tokens == num_tokens else "!incomplete"
    return "error event" if '"error"' in last else "!ended in silence"


def _when_idle(server: BenchServer) -> dict[str, float]:
    """What is left once the engine has nothing to do, or after ``IDLE_S``."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    deadline_s = time.monotonic() + IDLE_S
    while True:
        found = server.metrics()
        left = {name: found[name] for name in names}
        if not any(left.values()) or time.monotonic() > deadline_s:
            counted = {"tokens": found["generation_tokens_total"]}
            return {**{f"left_{name}": value for name, value in left.items()}, **counted}
        time.sleep(0.2)


def _full_batch(server: BenchServer) -> int:
    """Of as many requests as the batch holds, sent at once, those that were answered: a lane that
    was lost would be missed here."""
    body = {"prompt": "a", "max_tokens": 200, "ignore_eos": True}
    with ThreadPoolExecutor(MAX_BATCH) as pool:
        url = f"{server.url}/v1/completions"
        answers = pool.map(lambda _: _client().post(url, json=body), range(MAX_BATCH))
        return sum(answer.status_code == 200 for answer in answers)


def rows_of(figures: dict[str, Any]) -> list[Row]:
    """The claims of a run."""
    about = (
        f"{figures['requests']:,} requests of mixed kinds, {figures['http_processes']} HTTP "
        f"processes, {figures['killed']} times one killed"
    )
    none = [
        ("requests left in the engine", figures["left_num_requests_running"]),
        ("requests left in the queue", figures["left_num_requests_waiting"]),
        ("share of pages left in use", figures["left_kv_cache_usage_perc"]),
        ("lanes missing from a full batch", MAX_BATCH - figures["full_batch_after"]),
        ("answers neither complete nor an honest error", figures["num_dishonest"]),
        ("tracebacks in the log", figures["tracebacks"]),
        ("exit code after SIGTERM", figures["exit_code_after_sigterm"]),
    ]
    return [Row(about, measure, value, "none", value == 0) for measure, value in none]
