"""A bundle of 0.8 GB from the trainer's tensors until a server could draft with it, by each way.

    python -m benchmarks.bundles.transports                     # a minute or two on two cores
    python -m benchmarks.bundles.transports --gb 0.1 --urls log:,shm:
    python -m benchmarks.bundles.transports --idle-s 300    # each swap begins on free cores

``benchmarks.swap`` measures the same in a server that decodes, which takes a machine that is fast
enough for such a drafter. Here a loop stands for the swapper: it waits for a version as a server
does, and reads, checks, stages and copies it with the server's own functions. A trainer in a
process of its own changes all weights, makes the bytes, asks whether they were published before,
and publishes. ``swapped`` is when the weights are in force; the first token follows one step later.
The processor time of both, writing to the disk included, tells what a loaded machine hides, and so
do two yardsticks that are taken just before each swap, on one thread: copying as many bytes in
memory that is warm, and their SHA-256. Every way digests twice, at both ends, on up to four threads
each. With ``--idle-s``, each swap waits until the machine has nothing else to do; the result says
how many did begin so.

``{folder}`` in a URL is a new folder. Writes ``benchmarks/results/transports.json`` and, with
``--publish``, ``rows/swap.json``.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import nn

from benchmarks.harness.idle import wait_until_idle
from benchmarks.harness.results import RESULTS, Out, Row, at_most, say, write_result, write_rows
from buffer.backends import open_backend
from buffer.manifest import TENSORS
from buffer.records import Manifest
from buffer.weights_store import WeightsStore
from configs.schema import TrainerSettings
from serving.swap.flat_weights import Expected, FlatWeights, load_bundle
from trainer.publish import Publisher

SOURCE = "python -m benchmarks.bundles.transports"
URLS = ("log:", "shm:", "fsspec:file://{folder}/objects")
SAME_HOST_S, FILES_S = 1.0, 10.0
BIG_BYTES = 700 << 20
WIDTH = 4096
FIRST = Manifest(0, None, "wide", {"width": WIDTH}, "ab" * 32, {})
_WAIT_S = 900.0
_POLL_S = 0.25
"""Of ``swap.poll_s``, by default."""


class Wide(nn.Module):
    """Matrices that are published as so many bytes of bfloat16."""

    def __init__(self, num_bytes: int, dtype: torch.dtype) -> None:
        super().__init__()
        shape = max(1, num_bytes // 2 // 8 // WIDTH), WIDTH
        made = [torch.full(shape, 0.5 + i, dtype=dtype) for i in range(8)]
        self.weights = nn.ParameterList([nn.Parameter(one, requires_grad=False) for one in made])


def train(orders: Connection, url: str, run_dir: Path, num_bytes: int) -> None:
    """Publish version 0, and another one for each order."""
    torch.set_num_threads(1)
    os.nice(TrainerSettings().nice)  # as a trainer beside its server
    store = open_backend(url, run_dir).open_weights()
    publisher = Publisher(store, store.take_over())
    model, manifest = Wide(num_bytes, torch.float32), FIRST  # as trainers hold them
    while True:
        for parameter in model.parameters():
            parameter.mul_(0.99)
        stamps, began_s = {"stepped": time.monotonic()}, time.process_time()
        tensors = {name: one.data for name, one in model.named_parameters()}
        content = publisher.content_with(tensors)
        stamps["encoded"] = time.monotonic()
        assert publisher.version_with(content) is None
        published = store.publish(manifest, {TENSORS: content}, publisher.epoch)
        stamps["published"] = time.monotonic()
        busy_s = time.process_time() - began_s
        store.prune(2)
        orders.send((published.version, len(content), stamps, busy_s))
        if orders.recv() != "publish":
            return
        version = manifest.version + 1
        manifest = replace(FIRST, version=version, parent=manifest.version)


def yardsticks(num_bytes: int) -> dict[str, float]:
    """Seconds of plain work on as many bytes, on one thread."""
    source, place = np.ones((2, num_bytes), np.uint8)
    began_s = time.monotonic()
    np.copyto(place, source)
    copied_s = time.monotonic()
    hashlib.sha256(place).digest()
    return {"copy": copied_s - began_s, "sha256": time.monotonic() - copied_s}


def swap_next(
    store: WeightsStore, weights: FlatWeights, version: int, heard: threading.Event
) -> dict[str, float]:
    """Wait for a version as a server does, and put it in force; returns when what was done."""
    end_s = time.monotonic() + _WAIT_S
    while version not in store.versions():
        if time.monotonic() > end_s:
            raise RuntimeError(f"version {version} was not published")
        heard.wait(_POLL_S)
        heard.clear()
    stamps = {"found": time.monotonic()}
    expected = Expected(FIRST.kind, FIRST.drafter_config, FIRST.target_fingerprint)
    staged = load_bundle(store, version, weights, expected)
    stamps["loaded"] = time.monotonic()
    weights.take_over(staged.flat)
    stamps["swapped"] = time.monotonic()
    return stamps


def measure(url: str, num_bytes: int, num_swaps: int, until_s: float) -> dict[str, Any]:
    """Swaps by one way; the first one, for which memory is taken, apart.

    Args:
        until_s: monotonic time until which each swap waits for free cores.
    """
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="transports-") as name:
        where, run_dir = url.replace("{folder}", name), Path(name)
        ours, theirs = context.Pipe()
        trainer = context.Process(
            target=train, args=(theirs, where, run_dir, num_bytes), daemon=True
        )
        trainer.start()
        try:
            first, size, _, _ = _answer(ours)
            store, heard = open_backend(where, run_dir).open_weights(), threading.Event()
            store.mark_in_use("server", [first])
            end = store.watch(heard.set)
            weights = FlatWeights(Wide(num_bytes, torch.bfloat16))
            swaps, busy = list[dict[str, float]](), list[dict[str, float]]()
            plain, was_idle = list[dict[str, float]](), list[bool]()
            for version in range(first + 1, first + num_swaps + 2):
                plain.append(yardsticks(size))
                is_first = version == first + 1
                was_idle.append(not is_first and wait_until_idle(until_s - time.monotonic()))
                ours.send("publish")
                began_s = time.process_time()
                by_server = swap_next(store, weights, version, heard)
                by_us_s = time.process_time() - began_s
                published, _, by_trainer, by_trainer_s = _answer(ours)
                busy.append({"trainer": by_trainer_s, "server": by_us_s})
                assert published == version
                begun = by_trainer.pop("stepped")
                swaps.append({k: v - begun for k, v in (by_trainer | by_server).items()})
            ours.send("end")
            end()
        finally:
            trainer.join(20)
            if trainer.is_alive():
                trainer.kill()
    later = swaps[1:]
    return {
        "url": url,
        "load": os.getloadavg()[0],
        "num_idle": sum(was_idle[1:]),
        "bytes": size,
        "median_after_s": {k: statistics.median(one[k] for one in later) for k in later[0]},
        "yardsticks_s": {k: statistics.median(one[k] for one in plain[1:]) for k in plain[0]},
        "processor_s": {k: statistics.median(one[k] for one in busy[1:]) for k in busy[0]},
        "first_after_s": swaps[0],
        "after_s": later,
    }


def _answer(orders: Connection) -> Any:
    if not orders.poll(_WAIT_S):
        raise RuntimeError("the trainer's process does not answer")
    return orders.recv()


def rows_of(found: Sequence[dict[str, Any]]) -> Iterator[Row]:
    for one in found:
        what = f"bundle of {one['bytes'] / 1e9:.2f} GB by {one['url']}, nothing decodes"
        is_idle = one["num_idle"] == len(one["after_s"])
        what += ", " if is_idle else f", load {one['load']:.0f} on "
        what += f"{os.cpu_count()} {'free cores' if is_idle else 'cores'}"
        measure, seconds = "optimiser step to weights in force, s", one["median_after_s"]["swapped"]
        goal = SAME_HOST_S if one["url"].startswith("shm:") else FILES_S
        yield at_most(what, measure, seconds, goal if one["bytes"] >= BIG_BYTES else None)
        for name, text in (("copy", "plain copy of the bytes"), ("sha256", "their SHA-256")):
            seconds = one["yardsticks_s"][name]
            yield Row(what, f"{text} on one thread just before, s", seconds, None, None)


def main(
    gb: Annotated[float, typer.Option(help="10**9 bytes of the bundle")] = 0.8,
    urls: Annotated[str, typer.Option(help="buffer.url of each way")] = ",".join(URLS),
    swaps: Annotated[int, typer.Option(min=1, help="measured, after a first one")] = 3,
    idle_s: Annotated[float, typer.Option(help="longest wait for free cores, in all")] = 0.0,
    publish: Annotated[bool, typer.Option(help="write rows/swap.json, too")] = False,
    out: Out = RESULTS / "transports.json",
) -> None:
    """Measure each way."""
    found: list[dict[str, Any]] = []
    until_s = time.monotonic() + idle_s
    for url in urls.split(","):
        found.append(measure(url, int(gb * 1e9), swaps, until_s))
        after = ", ".join(f"{k} {s:.2f}" for k, s in found[-1]["median_after_s"].items())
        busy = ", ".join(f"{k} {s:.2f}" for k, s in found[-1]["processor_s"].items())
        plain = ", ".join(f"{k} {s:.2f}" for k, s in found[-1]["yardsticks_s"].items())
        say(f"{url}: {found[-1]['bytes']:,} bytes; s after the optimiser step: {after}; processor "
            f"time, s: {busy}; yardsticks, s: {plain}; load {found[-1]['load']:.1f}")  # fmt: skip
        write_result(out, {"rows": found})
    if publish:
        write_rows("swap", rows_of(found), SOURCE)


if __name__ == "__main__":
    typer.run(main)
