"""What the thread of a trainer does on the host, beside the updates of its device.

    python -m benchmarks.trainer_host                   # ten seconds on one core

On a GPU an update takes milliseconds, so learning is bound by whatever the loop's thread does in
between. Measured with 4,096 training samples held, in processor time, the fastest of some turns:

- **take in**: a portion of ten traces, as 200 a second arrive, into memory, and into the account of
  what learning costs and brings;
- **draw**: a batch of 2,048 positions by the default rule;
- **figures of the gate**: those of 64 texts, from the acceptance of each position.

Hidden rows are 16 wide: copying wider ones is bound by the memory of the host.

Writes ``benchmarks/results/trainer_host.json`` and ``rows/trainer_host.json``.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks import data_path
from benchmarks.harness.results import RESULTS, Row, say, write_result, write_rows
from buffer.codec import decode_trace, encode_trace
from configs.schema import TrainerSettings
from drafters.acceptance import Chains
from drafters.samples import Sample
from policies.payback import Payback
from trainer.dataset import Expected, sample_of
from trainer.replay import Memory
from trainer.rows import RowStore
from trainer.worth import Worth

NUM_HELD, PORTION, NUM_TEXTS = 4096, 10, 64
HIDDEN = 16
_TURNS = 40

MEASURES = {
    "take in": f"us of the loop's thread for a portion of {PORTION} traces, {NUM_HELD} held",
    "account": f"us of the loop's thread for the account of learning of {PORTION} traces",
    "draw": f"us of the loop's thread for a batch of 2,048 positions, {NUM_HELD} samples held",
    "figures of the gate": f"us of the loop's thread for the figures of {NUM_TEXTS} texts",
}


class Samples:
    """Different samples of the same few traces, with rounds at all sizes of batch."""

    def __init__(self) -> None:
        narrow, data_path.HIDDEN = data_path.HIDDEN, HIDDEN
        traces = [data_path.make_trace(seq, "bfloat16") for seq in range(64)]
        data_path.HIDDEN = narrow
        self._traces = [decode_trace(encode_trace(trace)) for trace in traces]
        given = data_path.FINGERPRINT, data_path.LAYER_IDS, HIDDEN, data_path.VOCAB
        self._expected = Expected(*given, counted="drafter")
        self._numbers = np.random.default_rng(0)
        self._num = 0

    def next(self, count: int) -> list[Sample]:
        """As many as never before."""
        return [self._one() for _ in range(count)]

    def _one(self) -> Sample:
        trace = replace(self._traces[self._num % len(self._traces)], seq=self._num)
        self._num += 1
        sample = sample_of(trace, self._expected, 512)
        assert isinstance(sample, Sample), sample
        assert sample.steps is not None
        num, luck = len(sample.steps.batch_R), self._numbers
        steps = replace(
            sample.steps,
            batch_R=luck.integers(20, 33, num).astype(np.int32),
            draft_k_R=luck.integers(0, 7, num).astype(np.int32),
            step_s_R=luck.random(num) * 0.01,
        )
        return replace(sample, steps=steps)


def fastest_us(work: Callable[..., Any], prepare: Callable[[], Any] = lambda: None) -> float:
    """Processor time of one call with what ``prepare`` returns."""
    taken = []
    for _ in range(_TURNS):
        given = prepare()
        started = time.thread_time()
        work(given)
        taken.append(time.thread_time() - started)
    return 1e6 * min(taken)


def measure() -> dict[str, float]:
    """Microseconds, by the names of ``MEASURES``."""
    samples = Samples()
    half = NUM_HELD // 2
    settings = TrainerSettings(recent_traces=half, reservoir_traces=half, batch_tokens=2048)
    memory = Memory(settings, 0, RowStore(torch.device("cpu"), 1 << 29))
    while len(memory.samples()) < NUM_HELD:
        memory.take_in(samples.next(64))
    worth = Worth(settings, lambda *_, **__: None, Payback(None))
    random, portion = np.random.default_rng(0), lambda: samples.next(PORTION)
    found = {
        "take in": fastest_us(memory.take_in, portion),
        "account": fastest_us(worth.take_in, portion),
        "draw": fastest_us(lambda _: memory.draw(random), lambda: memory.draw(random)),
    }
    lengths = random.integers(60, 260, NUM_TEXTS).tolist()
    generator = torch.Generator().manual_seed(0)
    texts = [torch.rand(length, 4, generator=generator) for length in lengths]
    full = [torch.ones(length, dtype=torch.bool) for length in lengths]
    found["figures of the gate"] = fastest_us(
        lambda _: Chains.of_texts([*texts, *texts], [*full, *full])
    )
    return found


def main(
    before: Annotated[
        Path | None, typer.Option(help="result of another checkout, published beside this one")
    ] = None,
    out: Annotated[Path, typer.Option(help="result file")] = RESULTS / "trainer_host.json",
    rows_dir: Annotated[Path, typer.Option(help="folder of rows/trainer_host.json")] = RESULTS,
) -> None:
    """Measure, print and write."""
    torch.set_num_threads(1)
    former: dict[str, float] = {} if before is None else json.loads(before.read_text())["us"]
    found = measure()
    rows = []
    for name, value in found.items():
        was = former.get(name)
        say(f"{name}: {value:.0f} us" + ("" if was is None else f", before {was:.0f}"))
        rows.append(Row(name, MEASURES[name], value, None, None))
        rows.append(Row(f"{name}, before", "same", was, None, None))
    write_result(out, {"us": found, "before": former, "load": os.getloadavg()[0]})
    write_rows("trainer_host", rows, "python -m benchmarks.trainer_host", rows_dir)


if __name__ == "__main__":
    typer.run(main)
