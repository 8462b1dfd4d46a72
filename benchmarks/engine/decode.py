"""Plain decoding: step time against the memory floor, and device idle time between steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.engine.graphs import Replays, device_s, median_ms, traced_idle
from benchmarks.harness.engines import (
    Built,
    declare_computed,
    engine_of,
    fill_pool,
    holds,
    num_positions_held,
)
from benchmarks.harness.loops import Batch, random_prompts
from benchmarks.harness.results import Report
from benchmarks.harness.shapes import floor_bytes
from benchmarks.ops.timing import copy_bytes_per_s

Cell = tuple[int, int]
"""Batch and context."""

_WARM_UPS = 6
_SPARE = 8
"""Tokens that a request may decode beyond the measured steps."""
_KV_SHARE = 0.9
"""Share of the memory left after the weights that the KV pool takes."""


@dataclass(frozen=True, slots=True)
class Grid:
    """What is measured at each shape."""

    cells: tuple[Cell, ...]
    num_steps: int
    idle_cell: Cell | None
    """Where idle time is measured."""


_BATCHES, _CONTEXTS = (1, 8, 32, 64, 128), (512, 2048, 8192, 32_768)
FULL = ((1, 1024), *((batch, context) for context in _CONTEXTS for batch in _BATCHES))
SHORT = (
    (1, 1024), (1, 512), (1, 2048), (1, 8192), (1, 32_768),
    (8, 2048), (32, 2048), (64, 2048), (128, 512), (128, 2048),
)  # fmt: skip
TINY = ((1, 64), (4, 64), (4, 128))


def measure(
    report: Report,
    device: torch.device,
    shape: str,
    grid: Grid,
    parts: Sequence[str],
    replays: Replays,
) -> None:
    """Add the ``decode`` and ``idle`` rows of one shape."""
    longest = max(c for _, c in grid.cells) + _max_tokens(3 * grid.num_steps)
    chosen = [
        f"engine.max_batch={max(batch for batch, _ in grid.cells)}",
        f"engine.max_model_len={longest}",
        f"engine.kv_memory_fraction={_KV_SHARE}",
    ]
    with engine_of(shape, device, chosen) as built, torch.inference_mode():
        fill_pool(built.engine)
        bandwidth = _bandwidth(device)
        for batch, context in grid.cells:
            what = {"shape": shape, "batch": batch, "context": context}

            def cell(batch: int = batch, context: int = context) -> dict[str, Any]:
                return decode_row(built, batch, context, grid.num_steps, bandwidth, replays)

            if "decode" in parts:
                report.attempt("decode", what, 5, cell)
            if "idle" in parts and (batch, context) == grid.idle_cell:

                def idle(batch: int = batch, context: int = context) -> dict[str, Any]:
                    return idle_row(built, batch, context, grid.num_steps, replays)

                report.attempt("idle", what, 10, idle)


def _bandwidth(device: torch.device) -> float | None:
    """Bytes per second of a large copy, in the memory that the pool leaves free."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info()
    return copy_bytes_per_s(min(4 << 30, free // 2))


def _max_tokens(num_steps: int) -> int:
    return _WARM_UPS + num_steps + _SPARE


def steady_batch(built: Built, batch: int, context: int, num_steps: int) -> Batch | None:
    """A batch in which every request is decoding; ``None`` if the pool cannot hold it."""
    max_tokens = _max_tokens(num_steps)
    if not holds(built.engine, batch, context, max_tokens):
        return None
    prompts = random_prompts(batch, context, built.engine.inbox.limits.vocab_size)
    declare_computed(built.engine, prompts)
    steady = Batch(built.engine, prompts, max_tokens)
    steady.begin(_WARM_UPS)
    return steady


def decode_row(
    built: Built,
    batch: int,
    context: int,
    num_steps: int,
    bandwidth: float | None,
    replays: Replays,
) -> dict[str, Any]:
    """Step time, tokens per second, and the time it takes to read the same bytes."""
    load = steady_batch(built, batch, context, num_steps)
    if load is None:
        return {"skipped": too_large(built, batch, context)}
    before, started = load.num_tokens, time.perf_counter()
    times = [load.step() for _ in range(num_steps - 1)]
    seconds, tokens = time.perf_counter() - started, load.num_tokens - before
    launched = replays.during(load.step)
    load.end()
    step_ms = median_ms(times)
    tenths = statistics.quantiles(times, n=10)
    row: dict[str, Any] = {
        "step_ms": step_ms,
        "step_low_ms": tenths[0] * 1e3,
        "step_high_ms": tenths[-1] * 1e3,
        "tokens_per_s": tokens / seconds,
        "num_steps": len(times),
    }
    if launched:
        row["device_ms"] = sum(map(device_s, launched)) * 1e3
    if bandwidth is not None:
        floor_ms = floor_bytes(built.config, built.model, batch * context) / bandwidth * 1e3
        row |= {
            "floor_ms": floor_ms,
            "share_of_floor": floor_ms / step_ms,
            "copy_tb_per_s": bandwidth / 1e12,
        }
    return row


def too_large(built: Built, batch: int, context: int) -> str:
    """Why a cell was not measured."""
    held = num_positions_held(built.engine)
    return f"{batch * context} positions needed, the memory left by the weights holds {held}"


def idle_row(
    built: Built, batch: int, context: int, num_steps: int, replays: Replays
) -> dict[str, Any]:
    """Shares of time during which the device is idle.

    ``traced`` comes from the profiler's trace; ``device_ms`` times one graph replayed by itself.
    """
    load = steady_batch(built, batch, context, 3 * num_steps)
    assert load is not None
    wall: list[float] = []

    def steps() -> None:
        wall.append(0.0)
        started = time.perf_counter()
        for _ in range(num_steps):
            load.step()
        wall[-1] = time.perf_counter() - started

    steps()
    launched = replays.during(steps)
    row: dict[str, Any] = {"step_ms": wall[0] / num_steps * 1e3, "num_steps": num_steps}
    if built.device.type == "cuda":
        try:
            traced = traced_idle(steps)
        except RuntimeError as error:  # some machines do not permit tracing
            row["trace_error"] = str(error)
        else:
            row["traced_step_ms"] = wall[-1] / num_steps * 1e3
            row["traced"] = asdict(traced) if traced else None
    load.end()
    if launched:
        row["graphs_per_step"] = len(launched) / num_steps
        row["device_ms"] = device_s(launched[-1]) * 1e3
    return row
