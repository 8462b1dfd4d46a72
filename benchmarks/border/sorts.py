"""How long the first request of a new sort waits on a server that has seen greedy completions only.

A server makes some programs when they are first wanted, or in the background: the first request
with a temperature, a bias, penalties or log probabilities must not wait for them noticeably, and
neither must the first long prompt.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.border.servers import BenchServer, bench_server
from benchmarks.harness.results import Row, at_most, say

MOST_S = 2.0
NUM_LATER = 3
TEXT = "def add(first, second):\n    return first + second\n\n"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USUAL: dict[str, Any] = {"max_tokens": 16, "ignore_eos": True, "temperature": 0, "stream": True}
SORTS: dict[str, dict[str, Any]] = {
    "sampled": {"temperature": 0.7},
    "sampled with a seed": {"temperature": 0.7, "seed": 3},
    "top-p": {"temperature": 0.7, "top_p": 0.9},
    "top-k": {"temperature": 0.7, "top_k": 20},
    "min-p": {"temperature": 0.7, "min_p": 0.1},
    "bias": {"logit_bias": {"5": 5.0}},
    "bias, sampled": {"temperature": 0.7, "logit_bias": {"5": 5.0}},
    "penalties": {"presence_penalty": 1.0, "frequency_penalty": 0.5},
    "repetition penalty": {"repetition_penalty": 1.2},
    "log probabilities": {"logprobs": 5},
    "stop text": {"stop": ["no such text"]},
    "four choices": {"n": 4, "temperature": 0.7},
    "without drafts": {"speculation": {"max_draft": 0}},
    "one draft token": {"speculation": {"max_draft": 1}},
    "chat": {"messages": [{"role": "user", "content": TEXT}]},
    "chat, log probabilities": {
        "messages": [{"role": "user", "content": TEXT}], "logprobs": True, "top_logprobs": 5
    },
    "a prompt of half the context": {},
}  # fmt: skip
"""What differs from usual requests."""
LONG = "a prompt of half the context"


def first_event_s(server: BenchServer, body: dict[str, Any]) -> float:
    """Seconds from sending a request to the first event of its answer.

    Raises:
        httpx.HTTPStatusError: it was refused.
    """
    path = CHAT if "messages" in body else COMPLETIONS
    began_s, first_s = time.perf_counter(), None
    with httpx.stream("POST", f"{server.url}{path}", json=body, timeout=120) as answer:
        if answer.status_code != 200:
            answer.read()
            answer.raise_for_status()
        for line in answer.iter_lines():
            if line and first_s is None:
                first_s = time.perf_counter() - began_s
            if line.startswith("data: {") and "error" in json.loads(line.removeprefix("data: ")):
                raise RuntimeError(line)
    assert first_s is not None
    return first_s


def bodies(server: BenchServer, context: int) -> dict[str, dict[str, Any]]:
    """A request of each sort.

    Args:
        context: tokens that a request may have.
    """
    usual = {**USUAL, "model": server.model}
    short = {**usual, "prompt": TEXT}
    found = {
        name: {**(usual if "messages" in more else short), **more} for name, more in SORTS.items()
    }
    found[LONG]["prompt"] = [5 + number % 200 for number in range(context // 2)]
    return {"usual": short, **found}


def measure(configs: Sequence[str], settings: Sequence[str]) -> dict[str, Any]:
    """Ask a new server for one sort after another, each once and then some times more."""
    with (
        tempfile.TemporaryDirectory() as name,
        bench_server(Path(name), settings, configs=configs) as server,
    ):
        models = httpx.get(f"{server.url}/v1/models", timeout=60).json()
        asked = bodies(server, int(models["data"][0]["max_model_len"]))
        usual = asked.pop("usual")
        for _ in range(10):
            first_event_s(server, usual)
        found = {}
        for sort, body in asked.items():
            first_s = first_event_s(server, body)
            later = [first_event_s(server, body) for _ in range(NUM_LATER)]
            found[sort] = {"first_s": first_s, "later_s": statistics.median(later)}
            say(f"{sort}: {first_s:.3f} s, later {found[sort]['later_s']:.3f} s")
    return {"configs": list(configs), "settings": list(settings), "sorts": found}


def rows_of(figures: dict[str, Any], name: str) -> list[Row]:
    """The claims of a run."""
    sorts = figures["sorts"]
    worst = max(sorts, key=lambda sort: sorts[sort]["first_s"])
    case = f"{name}, first requests of {len(sorts)} sorts after greedy ones"
    longest_s = sorts[worst]["first_s"]
    more_s = max(one["first_s"] - one["later_s"] for one in sorts.values())
    return [
        at_most(case, "longest wait for the first event, s", longest_s, MOST_S),
        Row(case, "the sort that waited longest", worst, None, None),
        Row(case, "most that the first one waited beyond later ones, s", more_s, None, None),
    ]
