"""Capture on against off: throughput of the same prompts in turns, and memory of the device."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from benchmarks.engine.engines import Made, Place, engine_of, release
from benchmarks.engine.load import answer_all, random_prompts
from benchmarks.engine.report import Report

_NUM_PROMPT = 256


def measure(
    report: Report, place: Place, shape: str, batch: int, max_tokens: int, num_turns: int
) -> None:
    """Row ``capture``: two engines one after the other for memory, the second one for speed."""
    off_bytes = _held(place, shape, _settings(batch, max_tokens, is_on=False))
    before = place.held_bytes()
    with engine_of(shape, place, _settings(batch, max_tokens, is_on=True), num_versions=1) as made:
        on_bytes = place.held_bytes() - before
        with torch.inference_mode():
            found = turns(made, batch, max_tokens, num_turns)
    mib = (on_bytes - off_bytes + found["peak_bytes"]) / 2**20
    what = {"shape": shape, "batch": batch, "num_prompt": _NUM_PROMPT, "max_tokens": max_tokens}
    report.add("capture", {**what, **found, "gpu_memory_mib": mib if place.is_gpu else None})


def _held(place: Place, shape: str, settings: dict[str, Any]) -> int:
    """Bytes on the device that an engine takes."""
    release(place)
    before = place.held_bytes()
    with engine_of(shape, place, settings, num_versions=1):
        held = place.held_bytes() - before
    release(place)
    return held


def _settings(batch: int, max_tokens: int, is_on: bool) -> dict[str, Any]:
    longest = _NUM_PROMPT + max_tokens
    return {
        "engine": {
            "max_batch": batch,
            "max_model_len": longest,
            "num_pages": batch * (longest // 16 + 4),
            "prefix_cache": False,
        },
        "drafter": {"max_draft": 1},
        "capture": {"enabled": is_on, "ring_rows": batch * longest * 2},
    }


def turns(made: Made, batch: int, max_tokens: int, num_turns: int) -> dict[str, Any]:
    """Plain decoding, prompts computed anew; requests that capture and requests that do not."""
    engine, recorder = made.service.engine, made.service.recorder
    assert recorder is not None
    recorder.start()
    speeds: dict[bool, list[float]] = {True: [], False: []}
    peaks: dict[bool, int] = {True: 0, False: 0}
    try:
        for number in range(num_turns + 1):
            prompts = random_prompts(batch, _NUM_PROMPT, engine.vocab_size, seed=number)
            for is_on in (True, False) if number % 2 else (False, True):
                if made.place.is_gpu:
                    torch.cuda.reset_peak_memory_stats()
                base = made.place.held_bytes()
                turn = answer_all(engine, prompts, max_tokens, capture=is_on)
                if number:  # the first one warms up
                    speeds[is_on].append(turn.tokens_per_s)
                if made.place.is_gpu:
                    peak = torch.cuda.max_memory_allocated() - base
                    peaks[is_on] = max(peaks[is_on], peak)
    finally:
        recorder.close(timeout_s=10.0)
    pairs = [on / off for on, off in zip(speeds[True], speeds[False], strict=True)]
    return {
        "on_tokens_per_s": statistics.median(speeds[True]),
        "off_tokens_per_s": statistics.median(speeds[False]),
        "ratio": statistics.median(pairs),
        "ratios": pairs,
        "peak_bytes": peaks[True] - peaks[False],
        "traces": recorder.counts(),
        "rows_dropped": engine.figures().capture_rows_dropped,
        "num_turns": num_turns,
    }
