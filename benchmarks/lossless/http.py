"""Random request bodies get the same answer from a server with drafts as from one without.

Two applications (``serving.http``) in this process, each with its own engine behind the messages
that HTTP processes exchange with it. Whole answers are compared, including multiple choices per
prompt and ``usage``, except for ids, times and fields that say how the answer was computed
(``oracles/random_bodies.py``). Many requests are in flight at once.

Needs httpx, which a server does not.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI

from benchmarks.harness.engines import release
from benchmarks.lossless.engines import MAX_BATCH, PLAIN_BATCH, Run, engine_of, texts
from configs.schema import Settings
from oracles.random_bodies import Body, is_same, question, said
from oracles.random_requests import TOLERANCE
from serving.service import Service

RUN = Run("bundled", "bfloat16", "pinned", 1.0)
RUN_ON_CPU = Run("bundled", "float64", "fast", 1.0)
PATHS = ("/v1/completions", "/v1/chat/completions")
_VOCAB_SIZE = 4096
"""Vocabulary size of the bundled target."""
_TEXTS = 50
"""Texts per domain."""
_AT_ONCE = 16
_NUM_TOLD = 5
"""Maximum number of differing bodies that a row lists in full."""

Asked = tuple[str, Body]
"""Path and body."""


def measure(
    device: torch.device, count: int, budget_s: float, keep: Callable[[dict[str, Any]], None]
) -> None:
    """Measure one run of ``count`` bodies, if the budget is above 0.

    Args:
        keep: called with the row.
    """
    if budget_s <= 0:
        return
    asked = _bodies(random.Random(9), count)
    row = row_of(RUN if device.type == "cuda" else RUN_ON_CPU, device, asked)
    keep(row)
    print(
        f"http, {row['seconds']:.0f} s: {row['mismatches']} of {row['bodies']} differ, "
        f"{row['accepted_tokens']} of {row['drafted_tokens']} draft tokens accepted",
        flush=True,
    )


def row_of(chosen: Run, device: torch.device, asked: list[Asked]) -> dict[str, Any]:
    """Compare plain and drafted answers to these bodies."""
    started = time.perf_counter()
    wanted = _answers(chosen, device, PLAIN_BATCH, None, asked)
    with tempfile.TemporaryDirectory() as folder:
        got = _answers(chosen, device, MAX_BATCH, Path(folder), asked)
    assert not any(answer["speculation"]["proposed"] for answer in wanted)
    tolerance = 0.0 if chosen.numerics == "pinned" else TOLERANCE
    wrong = [
        {"path": path, "body": body, "wanted": plain, "got": drafted}
        for (path, body), plain, drafted in zip(asked, wanted, got, strict=True)
        if not is_same(said(plain), said(drafted), tolerance)
    ]
    fields = sorted({field for _, body in asked for field in body})
    return {
        "target": chosen.target,
        "dtype": chosen.dtype,
        "numerics": chosen.numerics,
        "logprob_tolerance": tolerance,
        "mismatches": len(wrong),
        "first_mismatches": wrong[:_NUM_TOLD],
        **_counted(got),
        "by_field": {
            field: _counted(
                [answer for (_, body), answer in zip(asked, got, strict=True) if field in body]
            )
            for field in fields
        },
        "seconds": time.perf_counter() - started,
    }


def _counted(answers: list[Body]) -> dict[str, int]:
    return {
        "bodies": len(answers),
        "choices": sum(len(answer["choices"]) for answer in answers),
        "tokens": sum(answer["usage"]["completion_tokens"] for answer in answers),
        "drafted_tokens": sum(answer["speculation"]["proposed"] for answer in answers),
        "accepted_tokens": sum(answer["speculation"]["accepted"] for answer in answers),
    }


def _bodies(numbers: random.Random, count: int) -> list[Asked]:
    about = texts(seed=9, of_each=_TEXTS)
    paths = (PATHS[number % len(PATHS)] for number in range(count))
    return [
        (path, question(numbers, "chat" in path, numbers.choice(about), _VOCAB_SIZE))
        for path in paths
    ]


def _answers(
    chosen: Run, device: torch.device, max_batch: int, folder: Path | None, asked: list[Asked]
) -> list[Body]:
    with engine_of(chosen, device, max_batch, folder) as service:
        service.start()
        answers = asyncio.run(_ask(service, asked))
        service.stop()
    release(device)
    return answers


async def _ask(service: Service, asked: list[Asked]) -> list[Body]:
    from oracles.border import across_the_border
    from serving.http.app import create_app

    async with across_the_border(service) as server:
        return await _ask_all(create_app(server, Settings(target="examples/target")), asked)


async def _ask_all(app: FastAPI, asked: list[Asked]) -> list[Body]:
    import httpx  # only this part needs it

    gate = asyncio.Semaphore(_AT_ONCE)
    transport = httpx.ASGITransport(app=app)
    client = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=None)

    async def answer(path: str, body: Body) -> Body:
        async with gate:
            response = await client.post(path, json=body)
        response.raise_for_status()
        return dict(response.json())

    async with app.router.lifespan_context(app), client:
        return list(await asyncio.gather(*(answer(*one) for one in asked)))


def is_sound(rows: list[dict[str, Any]]) -> bool:
    """True if nothing differs, and some draft tokens were accepted and some rejected."""
    return all(
        not row["mismatches"] and 0 < row["accepted_tokens"] < row["drafted_tokens"] for row in rows
    )


def summary(rows: list[dict[str, Any]], count: int) -> dict[str, Any]:
    """Totals; ``count`` bodies were planned."""
    names = (
        "bodies", "choices", "tokens", "drafted_tokens", "accepted_tokens", "mismatches", "seconds",
    )  # fmt: skip
    totals = {name: sum(row[name] for row in rows) for name in names}
    return {"bodies_planned": count, "complete": totals["bodies"] >= count, **totals}
