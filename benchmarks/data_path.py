"""Traces from the capture ring to the trainer's door: what is dropped, and what is read a second.

    python -m benchmarks.data_path                     # five minutes on two cores
    python -m benchmarks.data_path --folder /dev/shm   # without a disk

Three parts, each for hidden rows of 4 x 576 in bfloat16 and in fp8, prompts of 64 and answers of
128 tokens:

- **capture**: the host thread of an engine, simulated: 128 requests at a time, 20,000 tokens a
  second. It notes rounds and rows as the engine does, and holds the interpreter for a share of
  each step; a GPU would fill the ring, so here nobody does. Everything from there on is real:
  ``TraceMaker``, ``Recorder`` and the segment log.
- **encode**: traces a second that one core encodes.
- **read**: traces a second that one core reads, checks and turns into samples, with the time of
  each stage. Processor time counts, since a shared machine says little about wall time.

Writes ``benchmarks/results/data_path.json`` and ``rows/data_path.json``.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.harness.results import RESULTS, Row, say, write_result, write_rows
from buffer.backends import open_backend
from buffer.codec import decode_trace, encode_trace
from buffer.interface import Backend, TraceLimits
from buffer.records import FeatureRows, Round, Rounds, Sampling, Trace
from buffer.traces import TraceReader
from serving.capture.recorder import Recorder
from serving.capture.traces import Producer, TraceMaker
from serving.engine.capture_ring import CaptureRing
from serving.engine.captured_rows import StoredDtype
from serving.engine.noted_rounds import NotedStep
from serving.engine.sequence import Sequence
from serving.requests import Request
from serving.sampling import SamplingParams
from trainer.dataset import Expected, Refusal, sample_of

NUM_PROMPT, NUM_ANSWER, NUM_ROUNDS = 64, 128, 40
LAYER_IDS, HIDDEN, VOCAB = (2, 15, 27), 576, 49_152
BATCH, TOKENS_PER_S = 128, 20_000
FINGERPRINT = "ab" * 32
DTYPES: tuple[StoredDtype, ...] = ("bfloat16", "float8_e4m3fn")
SYNC_INTERVAL_S = 0.2
WAITING_BYTES = 1 << 30  # a sixteenth of 16 GiB
_READ_GOAL = 3000
_WARM_UP = 128
"""Traces read before the clock starts: the first ones touch memory that is recycled later."""


# ---- a server's host thread ----------------------------------------------------------------------


class _Nothing:
    """Stands for what a sequence holds and capture never asks for."""


def new_sequence(number: int, first_row: int) -> Sequence:
    """A request whose prompt was just computed."""
    nothing: Any = _Nothing()
    prompt = tuple(range(NUM_PROMPT))
    request = Request(f"cmpl-{number:032x}", prompt, SamplingParams(temperature=0.7))
    sequence = Sequence(request, print, number, nothing, frozenset(), [*prompt, 1])
    sequence.capture_rows += (0, first_row, NUM_PROMPT)
    return sequence


class SimulatedEngine:
    """Finishes requests at a steady rate, one token per request and step."""

    def __init__(self, ring: CaptureRing, maker: TraceMaker, recorder: Recorder) -> None:
        self._ring, self._maker, self._recorder = ring, maker, recorder
        self._num_started = 0
        self.late_s = 0.0
        """How far behind its schedule it ended."""
        self._running = [self._start(i * NUM_ANSWER // BATCH) for i in range(BATCH)]

    def _start(self, num_done: int = 0) -> Sequence:
        [first] = self._ring.number([NUM_PROMPT])
        self._num_started += 1
        sequence = new_sequence(self._num_started, first)
        for _ in range(num_done):  # so that not all end together
            self._step([sequence])
        return sequence

    def _step(self, batch: list[Sequence]) -> None:
        firsts = self._ring.number([1] * len(batch))
        step = NotedStep("none", 0, 0, 1.0, len(batch), 0.0064).kept()
        for first, sequence in zip(firsts, batch, strict=True):
            anchor = len(sequence.tokens) - 1
            sequence.rounds.add_plain(step, anchor, 7)
            sequence.tokens.append(7)
            sequence.capture_rows += (anchor, first, 1)

    def run(self, seconds: float, busy_share: float) -> None:
        """Decode for ``seconds``, holding the interpreter for ``busy_share`` of each step."""
        period_s = BATCH / TOKENS_PER_S
        begun = time.perf_counter()
        for number in range(int(seconds / period_s)):
            due = begun + number * period_s
            self._step(self._running)
            for index, sequence in enumerate(self._running):
                if len(sequence.tokens) - sequence.num_prompt > NUM_ANSWER:
                    self._recorder.put(self._maker.finished(sequence))
                    self._running[index] = self._start()
            while time.perf_counter() < due + busy_share * period_s:
                pass
            time.sleep(max(0.0, due + period_s - time.perf_counter()))
        self.late_s = time.perf_counter() - begun - seconds


def fill(ring: CaptureRing) -> None:
    """Write the whole ring once, as a server does in its first seconds."""
    rows = torch.ones((1024, len(LAYER_IDS) + 1, HIDDEN), dtype=torch.bfloat16)
    count, none = torch.tensor([len(rows)]), torch.zeros(1)
    for _ in range(BATCH * 2048 // len(rows)):
        ring.append(rows[:, :-1], rows[:, -1], count, none, none)
        ring.number([len(rows)])


def simulate_capture(
    folder: Path, dtype: StoredDtype, seconds: float, busy_share: float
) -> dict[str, Any]:
    """What a recorder makes of it."""
    ring_rows = BATCH * 2048  # as the server chooses for requests of up to 2,048 tokens
    ring = CaptureRing(ring_rows, len(LAYER_IDS), HIDDEN, dtype=dtype)
    ring.reserve(2 * BATCH * 9)
    fill(ring)
    limits = TraceLimits(32 << 20, None, 3600.0, SYNC_INTERVAL_S)
    writer = open_backend("log:", folder).open_trace_writer(limits)
    maker = TraceMaker(Producer("host-1", 1, FINGERPRINT), ring, LAYER_IDS)
    recorder = Recorder(writer, 1024, SYNC_INTERVAL_S, WAITING_BYTES)
    engine = SimulatedEngine(ring, maker, recorder)
    recorder.start()
    before_s = os.times()
    thread = threading.Thread(target=engine.run, args=(seconds, busy_share))
    thread.start()
    thread.join()
    at_end = recorder.counts()
    recorder.close(60.0)
    spent_s = os.times()
    counts = recorder.counts()
    return {
        "seconds": seconds,
        "late_s": engine.late_s,
        "traces_per_s": counts["queued"] / (seconds + engine.late_s),
        "bytes_per_s": counts["written"] * trace_bytes(dtype) / (seconds + engine.late_s),
        "counts": counts,
        "share_dropped": (counts["dropped"] + counts["failed"]) / counts["queued"],
        "lag_traces": at_end["queued"] - at_end["written"] - at_end["dropped"],
        "rows_lost": maker.num_lost_rows,
        "processor_s": sum(spent_s[:2]) - sum(before_s[:2]),
    }


# ---- encoding and reading ------------------------------------------------------------------------


def make_trace(seq: int, dtype: StoredDtype) -> Trace:
    """A trace of random content and the size under test."""
    luck = np.random.default_rng(seq)
    num_tokens = NUM_PROMPT + NUM_ANSWER
    rounds, anchor = [], NUM_PROMPT
    for _ in range(NUM_ROUNDS):
        kept = int(luck.integers(0, 5))
        ids = tuple(luck.integers(0, VOCAB, 4).tolist())
        q, p = (tuple((-luck.random(n)).tolist()) for n in (4, min(kept + 1, 4)))
        rounds.append(Round(anchor, "drafter", 3, ids, q, p, kept, 7, 4, 0.98, BATCH, 0.0064))
        anchor += 3
    shape = num_tokens - 1, len(LAYER_IDS) + 1, HIDDEN
    scale = None
    if dtype == "bfloat16":
        wide = luck.standard_normal(shape, dtype=np.float32)
        rows: Any = (wide.view(np.uint32) >> 16).astype(np.uint16)
    else:
        rows = luck.integers(0, 127, shape).astype(np.uint8)
        scale = np.full(shape[:2], 0.01, np.float32)
    positions = np.arange(num_tokens - 1, dtype=np.int32)
    return Trace(
        producer="host-1",
        epoch=1,
        seq=seq,
        request_id=f"cmpl-{seq:032x}",
        tenant="default",
        target_fingerprint=FINGERPRINT,
        sampling=Sampling({"temperature": 0.7, "top_p": 1.0, "top_k": None, "seed": None}),
        prompt_length=NUM_PROMPT,
        token_ids=luck.integers(0, VOCAB, num_tokens).astype(np.int32),
        rounds=Rounds.of(rounds),
        features=FeatureRows(positions, LAYER_IDS, dtype, rows, scale),
        finished_unix_ms=1,
    )


def trace_bytes(dtype: StoredDtype) -> int:
    """Size of one trace."""
    return len(encode_trace(make_trace(0, dtype)))


def best_us(work: Any, repeats: int, turns: int = 7) -> float:
    """Processor time of one call, the fastest of some turns, in microseconds."""
    taken = []
    for _ in range(turns):
        begun = time.thread_time()
        for _ in range(repeats):
            work()
        taken.append((time.thread_time() - begun) / repeats)
    return min(taken) * 1e6


def measure_encode(dtype: StoredDtype) -> dict[str, Any]:
    trace = make_trace(0, dtype)
    us = best_us(lambda: encode_trace(trace), 100)
    return {"us": us, "traces_per_s": 1e6 / us, "bytes": trace_bytes(dtype)}


def measure_read(backend: Backend, dtype: StoredDtype, num_traces: int) -> dict[str, Any]:
    """Read a log whose segments are in the page cache, several times."""
    few = [make_trace(seq, dtype) for seq in range(8)]
    with backend.open_trace_writer(TraceLimits(32 << 20, None, 3600.0, 1e9)) as writer:
        for seq in range(_WARM_UP + num_traces):
            writer.append(encode_trace(replace(few[seq % 8], seq=seq)))
    expected = Expected(FINGERPRINT, LAYER_IDS, HIDDEN, VOCAB)
    turns = []
    for _ in range(5):
        reader = TraceReader(backend)
        for _ in range(_WARM_UP // 64):
            reader.read(64)
        begun, begun_s, sample_s, num = time.thread_time(), time.perf_counter(), 0.0, 0
        while traces := reader.read(64):
            before = time.thread_time()
            if any(isinstance(sample_of(t, expected, 2048), Refusal) for t in traces):
                raise ValueError("a trace was refused")
            sample_s += time.thread_time() - before
            num += len(traces)
            del traces  # as a trainer that has copied their rows to its card
        assert num == num_traces
        spent = time.thread_time() - begun, time.perf_counter() - begun_s, sample_s
        turns.append([1e6 * s / num for s in spent])
    all_us, wall_us, sample_us = min(turns)
    record = encode_trace(few[0])
    return {
        "us": all_us,
        "traces_per_s": 1e6 / all_us,
        "bytes_per_s": len(record) / all_us * 1e6,
        "wall_us": wall_us,
        "sample_us": sample_us,
        "decode_us": best_us(lambda: decode_trace(record), 100),
        "num_traces": num_traces,
    }


# ---- the page ------------------------------------------------------------------------------------


@contextmanager
def _folder_in(parent: Path | None) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="data-path-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def rows_of(found: dict[str, Any], former: dict[str, Any]) -> Iterator[Row]:
    """The claims, and the same figures of another checkout without a goal."""
    for name, figure in found.items():
        was = former.get(name, {})
        if name.startswith("capture"):
            share = figure["share_dropped"]
            yield Row(name, "share of traces dropped", share, "none", share == 0)
            yield Row(f"{name}, before", "same", was.get("share_dropped"), None, None)
        else:
            rate, is_read = figure["traces_per_s"], name.startswith("read")
            done = "read, checked and made samples" if is_read else "encoded"
            goal = f"at least {_READ_GOAL}" if is_read else None
            holds = rate >= _READ_GOAL if is_read else None
            yield Row(name, f"traces {done} a second of one core's time", rate, goal, holds)
            yield Row(f"{name}, before", "same", was.get("traces_per_s"), None, None)


def main(
    folder: Annotated[Path | None, typer.Option(help="where logs are written")] = None,
    seconds: Annotated[float, typer.Option(help="of each simulated capture")] = 20.0,
    busy: Annotated[
        str, typer.Option(help="shares of a step that the engine computes")
    ] = "0.5,0.9",
    traces: Annotated[int, typer.Option(help="read")] = 600,
    before: Annotated[
        Path | None, typer.Option(help="result of another checkout, published beside this one")
    ] = None,
    out: Annotated[Path, typer.Option(help="result file")] = RESULTS / "data_path.json",
    rows_dir: Annotated[Path, typer.Option(help="folder of rows/data_path.json")] = RESULTS,
) -> None:
    """Measure all parts."""
    found: dict[str, Any] = {}
    former = {} if before is None else {"before": json.loads(before.read_text())}

    def add(name: str, figure: dict[str, Any]) -> None:
        found[name] = {**figure, "load": os.getloadavg()[0]}
        say(f"{name}: {found[name]}")
        write_result(out, {**found, **former})

    for dtype in DTYPES:
        add(f"encode {dtype}", measure_encode(dtype))
        with _folder_in(folder) as log:
            add(f"read {dtype}", measure_read(open_backend("log:", log), dtype, traces))
    for dtype in DTYPES:
        for share in map(float, busy.split(",")):
            with _folder_in(folder) as log:
                name = f"capture {dtype}, engine busy {share:.0%}"
                add(name, simulate_capture(log, dtype, seconds, share))
    source = "python -m benchmarks.data_path"
    write_rows("data_path", rows_of(found, former.get("before", {})), source, rows_dir)


if __name__ == "__main__":
    typer.run(main)
