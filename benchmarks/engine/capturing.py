"""Capture on against off: throughput of the same prompts in turns, and memory of the device."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from benchmarks.engine.engines import Made, Place, engine_of, release
from benchmarks.engine.load import Prompt, Turn, answer_all, random_prompts
from benchmarks.engine.report import Report
from serving.engine.capture_ring import StoredDtype

_NUM_PROMPT = 256
_CLOSE_S = 60.0
_DTYPES: tuple[StoredDtype, ...] = ("float8_e4m3fn", "bfloat16")


def measure(
    report: Report, place: Place, shape: str, batch: int, max_tokens: int, num_turns: int
) -> None:
    """Rows ``capture``, one for each dtype of the log: an engine that captures every request beside
    one that cannot."""
    release(place)
    held = [place.held_bytes()]
    with engine_of(shape, place, _settings(batch, max_tokens, None), num_versions=1) as off:
        held.append(place.held_bytes())
        for dtype in _DTYPES:
            what = {"shape": shape, "batch": batch, "num_prompt": _NUM_PROMPT, "dtype": dtype}

            def row(dtype: StoredDtype = dtype) -> dict[str, Any]:
                release(place)  # of the row before
                before = place.held_bytes()
                chosen = _settings(batch, max_tokens, dtype)
                with engine_of(shape, place, chosen, num_versions=1) as on, torch.inference_mode():
                    own = (place.held_bytes() - before) - (held[1] - held[0])
                    found = compare(on, off, batch, max_tokens, num_turns)
                mib = (own + found["peak_bytes"]) / 2**20 if place.is_gpu else None
                return {"max_tokens": max_tokens, **found, "gpu_memory_mib": mib}

            report.attempt("capture", what, 30, row)


def _settings(batch: int, max_tokens: int, dtype: StoredDtype | None) -> dict[str, Any]:
    """``dtype`` of the log; ``None``: captures nothing."""
    longest = _NUM_PROMPT + max_tokens
    return {
        "engine": {
            "max_batch": batch,
            "max_model_len": longest,
            "num_pages": batch * (longest // 16 + 4),
            "prefix_cache": False,
        },
        "drafter": {"max_draft": 1},
        "capture": {
            "enabled": dtype is not None,
            "dtype": dtype or "bfloat16",
            "ring_rows": batch * longest * 2,
        },
    }


def compare(on: Made, off: Made, batch: int, max_tokens: int, num_turns: int) -> dict[str, Any]:
    """Turns of plain decoding, prompts computed anew in each; traces are written meanwhile."""
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
                if number:  # the first one warms up
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
        "rows_dropped": on.service.engine.figures().capture_rows_dropped,
        "num_turns": num_turns,
    }


def _turn(made: Made, prompts: list[Prompt], max_tokens: int) -> tuple[Turn, int]:
    """One turn, and the bytes that it took on the device for a while."""
    if not made.place.is_gpu:
        return answer_all(made.service.engine, prompts, max_tokens, capture=True), 0
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    turn = answer_all(made.service.engine, prompts, max_tokens, capture=True)
    return turn, torch.cuda.max_memory_allocated() - base
