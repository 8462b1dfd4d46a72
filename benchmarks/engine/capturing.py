"""Capture on against off: throughput on the same prompts, alternating, and device memory."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from benchmarks.harness.engines import Built, engine_of, held_bytes, release
from benchmarks.harness.loops import Prompt, Turn, answer_all, random_prompts
from benchmarks.harness.results import Report
from serving.engine.captured_rows import StoredDtype

_NUM_PROMPT = 256
_CLOSE_S = 60.0
_DTYPES: tuple[StoredDtype, ...] = ("float8_e4m3fn", "bfloat16")


def measure(
    report: Report, device: torch.device, shape: str, batch: int, max_tokens: int, num_turns: int
) -> None:
    """Add the ``capture`` rows, one per dtype of the log: an engine that captures every request
    against one with capture disabled."""
    release(device)
    held = [held_bytes(device)]
    with engine_of(shape, device, _settings(batch, max_tokens, None), num_versions=1) as off:
        held.append(held_bytes(device))
        for dtype in _DTYPES:
            what = {"shape": shape, "batch": batch, "num_prompt": _NUM_PROMPT, "dtype": dtype}

            def row(dtype: StoredDtype = dtype) -> dict[str, Any]:
                release(device)  # the previous row's engine
                before = held_bytes(device)
                chosen = _settings(batch, max_tokens, dtype)
                with engine_of(shape, device, chosen, num_versions=1) as on:
                    own = (held_bytes(device) - before) - (held[1] - held[0])
                    found = compare(on, off, batch, max_tokens, num_turns)
                is_gpu = device.type == "cuda"
                mib = (own + found["peak_bytes"]) / 2**20 if is_gpu else None
                return {"max_tokens": max_tokens, **found, "gpu_memory_mib": mib}

            report.attempt("capture", what, 30, row)


def _settings(batch: int, max_tokens: int, dtype: StoredDtype | None) -> list[str]:
    """``dtype``: dtype of the logged rows; ``None``: nothing is captured."""
    longest = _NUM_PROMPT + max_tokens
    return [
        f"engine.max_batch={batch}",
        f"engine.max_model_len={longest}",
        f"engine.num_pages={batch * (longest // 16 + 4)}",
        "engine.prefix_cache=false",
        "drafter.max_draft=1",
        *(["capture.enabled=true", f"capture.dtype={dtype}"] if dtype else []),
        f"capture.ring_rows={batch * longest * 2}",
    ]


def compare(on: Built, off: Built, batch: int, max_tokens: int, num_turns: int) -> dict[str, Any]:
    """Alternate turns of plain decoding on fresh prompts, while traces are written."""
    recorder = on.service.recorder
    assert recorder is not None
    recorder.start()
    arms = {"on": on, "off": off}
    speeds: dict[str, list[float]] = {"on": [], "off": []}
    peaks = {"on": 0, "off": 0}
    try:
        for number in range(num_turns + 1):
            prompts = random_prompts(batch, _NUM_PROMPT, on.service.model.vocab_size, seed=number)
            for arm in arms if number % 2 else reversed(arms):
                turn, peak = _turn(arms[arm], prompts, max_tokens)
                peaks[arm] = max(peaks[arm], peak)
                if number:  # the first pair warms up
                    speeds[arm].append(turn.tokens_per_s)
    finally:
        recorder.close(_CLOSE_S)
    pairs = [captured / plain for captured, plain in zip(speeds["on"], speeds["off"], strict=True)]
    return {
        "on_tokens_per_s": statistics.median(speeds["on"]),
        "off_tokens_per_s": statistics.median(speeds["off"]),
        "ratio": statistics.median(pairs),
        "ratios": pairs,
        "peak_bytes": peaks["on"] - peaks["off"],
        "traces": recorder.counts(),
        "rows_dropped": on.service.figures().capture_rows_dropped,
        "num_turns": num_turns,
    }


def _turn(built: Built, prompts: list[Prompt], max_tokens: int) -> tuple[Turn, int]:
    """One turn, and its peak of temporary device memory in bytes."""
    if built.device.type != "cuda":
        return answer_all(built.engine, prompts, max_tokens, capture=True), 0
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    turn = answer_all(built.engine, prompts, max_tokens, capture=True)
    return turn, torch.cuda.max_memory_allocated() - base
