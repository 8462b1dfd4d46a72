"""From an optimiser step to the first token that its weights drafted, by each way that a version
can take.

    python -m benchmarks.swap                            # a small drafter, and one of 0.8 GB
    python -m benchmarks.swap --shapes tiny --urls log:,shm:
    python -m benchmarks.swap --urls s3://bucket/bench   # credentials as s3fs takes them
    python -m benchmarks.swap --device cuda --shapes Qwen3-8B

A server decodes for ``--batch`` clients all the time, with swaps as in a real one. A trainer in a
process of its own changes all weights and then does what a trainer does with a candidate that has
passed: tensors to bytes, digests and checks, publication. The server finds the version, reads and
checks it, stages it and swaps. Times are of one clock, which all processes of a host share:

- ``encoded``: the tensors are one sequence of bytes;
- ``published``: ``publish`` has returned (through shared memory, servers may have it before that);
- ``found``, ``loaded``: the server begins to read, and has checked and staged it;
- ``swapped``: it is in force; ``drafted``: the first round that it drafted has been verified.

The judging of the candidate comes before all that and is not in it. Beside these: the bytes, the
engine's own time for the copies, and the longest wait of a client for its next token between the
optimiser step and the first drafted token, against the longest in as much time without a swap. On a
machine whose cores are all busy the trainer's own work slows the server, and both are in that.

``{folder}`` in a URL is a new folder. Writes ``benchmarks/results/swap.json`` and, with
``--publish``, ``rows/swap.json``.
"""

from __future__ import annotations

import itertools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from dataclasses import replace as replaced
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.engine.swaps import Traffic
from benchmarks.harness.engines import Built, release, settings_for
from benchmarks.harness.policy import PolicySwitch
from benchmarks.harness.random_targets import random_target
from benchmarks.harness.results import (
    RESULTS,
    Out,
    Row,
    at_most,
    say,
    write_result,
    write_rows,
)
from buffer.backends import open_backend
from buffer.manifest import TENSORS
from drafters.trainable import trainable
from policies.interface import Outcome
from serving.build import build_service
from serving.service import Service
from serving.swap.flat_weights import Staged
from serving.swap.in_force import WeightsInForce
from targets.device import pick_device
from trainer.publish import Publisher

SOURCE = "python -m benchmarks.swap"
URLS = ("log:", "shm:", "fsspec:file://{folder}/objects")
SAME_HOST_S, FILES_S = 1.0, 10.0
BIG_BYTES = 700 << 20
"""Bundles from here on stand for the drafter of 0.8 GB that the goals are about."""
DRAFT_K = 2
_WAIT_S = 300.0
_QUIET_S = 5.0


# ---- the trainer's process -----------------------------------------------------------------------


def train(orders: Connection, url: str, run_dir: Path) -> None:
    """Publish a version for each order, and answer with when what was done."""
    torch.set_num_threads(1)
    store = open_backend(url, run_dir).open_weights()
    publisher = Publisher(store, store.take_over())
    bundle, _ = store.newest_sound()
    learns = trainable(bundle.manifest.kind)
    from safetensors.torch import load

    model = learns.load_model(bundle.manifest.drafter_config, load(bundle.files[TENSORS]))
    parent = bundle.manifest
    del bundle
    orders.send("ready")
    while orders.recv() == "publish":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9999)
        stamps = {"stepped": time.monotonic()}
        content = publisher.content_of(learns, model)
        stamps["encoded"] = time.monotonic()
        assert publisher.version_with(content) is None
        manifest = replaced(parent, version=parent.version + 1, parent=parent.version, files={})
        parent = store.publish(manifest, {TENSORS: content}, publisher.epoch)
        stamps["published"] = time.monotonic()
        store.prune(2)
        orders.send((parent.version, len(content), stamps))
        del content


# ---- the server's --------------------------------------------------------------------------------


@dataclass(slots=True)
class Stamps:
    """When what happened to each version, in seconds of the host's monotonic clock."""

    found: dict[int, float] = field(default_factory=dict)
    loaded: dict[int, float] = field(default_factory=dict)
    swapped: dict[int, float] = field(default_factory=dict)
    drafted: dict[int, float] = field(default_factory=dict)


class Noting(PolicySwitch):
    """Also notes when a version came into force and first drafted."""

    def __init__(self, own: Any) -> None:
        super().__init__(own)
        self.stamps = Stamps()

    def observe(self, outcome: Outcome) -> None:
        if outcome.decision.draft_k:
            self.stamps.drafted.setdefault(outcome.version, time.monotonic())
        super().observe(outcome)

    def on_swap(self, *swap: Any) -> None:
        self.stamps.swapped[swap[1]] = time.monotonic()
        super().on_swap(*swap)


def note_loads(service: Service, stamps: Stamps) -> None:
    """Note when the swapper's thread begins and ends to load each version."""
    assert service.swapper is not None
    shelf = service.swapper._shelf
    load = shelf.load

    def noting(version: int, force: WeightsInForce) -> Staged:
        stamps.found[version] = time.monotonic()
        staged = load(version, force)
        stamps.loaded[version] = time.monotonic()
        return staged

    shelf.load = noting  # type: ignore[method-assign]


@contextmanager
def server(
    shape: str, device: torch.device, url: str, folder: Path, batch: int
) -> Iterator[tuple[Built, Noting]]:
    """A running server that takes new versions by itself."""
    release(device)
    target = random_target(shape, device, torch.bfloat16)
    chosen = [
        f"buffer.url={url}",
        "dtype=bfloat16",
        "swap.enabled=true",
        f"drafter.max_draft={DRAFT_K}",
        f"policy.draft_k={DRAFT_K}",
        f"engine.max_batch={batch}",
        "engine.max_model_len=2048",
    ]
    settings = settings_for(device, folder, chosen, has_drafter=True)
    made: list[Noting] = []

    def wrap(own: Any) -> Noting:
        made.append(Noting(own))
        return made[0]

    service = build_service(settings, target, wrap)
    note_loads(service, made[0].stamps)
    service.start()
    try:
        yield Built(service, made[0], device), made[0]
    finally:
        service.stop()


def one_swap(orders: Connection, built: Built, stamps: Stamps, traffic: Traffic) -> dict[str, Any]:
    """Let the trainer publish, and wait until a token was drafted."""
    swapper = built.service.swapper
    assert swapper is not None
    copied_s, quiet_from_s = swapper.swap_seconds, time.perf_counter()
    time.sleep(_QUIET_S)
    quiet = longest_wait(traffic, quiet_from_s, time.perf_counter())
    began_s = time.perf_counter()
    orders.send("publish")
    version, num_bytes, by_trainer = _answer(orders)
    end_s = time.monotonic() + _WAIT_S
    while version not in stamps.drafted:
        if time.monotonic() > end_s:
            raise RuntimeError(f"version {version} drafted nothing: {swapper.status()}")
        time.sleep(0.001)
    waited = longest_wait(traffic, began_s, time.perf_counter())
    begun = by_trainer.pop("stepped")
    all_stamps = by_trainer | {
        name: getattr(stamps, name)[version] for name in ("found", "loaded", "swapped", "drafted")
    }
    return {
        "bytes": num_bytes,
        "after_s": {name: stamp - begun for name, stamp in all_stamps.items()},
        "copies_ms": (swapper.swap_seconds - copied_s) * 1e3,
        "longest_wait_ms": waited * 1e3,
        "longest_wait_before_ms": quiet * 1e3,
    }


def longest_wait(traffic: Traffic, begin_s: float, end_s: float) -> float:
    """Longest time that a client waited for tokens within a window."""
    waits = [0.0]
    for client in traffic.clients:
        kept = [stamp for stamp in list(client.news_s) if begin_s <= stamp <= end_s]
        waits += [after - before for before, after in itertools.pairwise(kept)]
    return max(waits)


def _answer(orders: Connection) -> Any:
    if not orders.poll(_WAIT_S):
        raise RuntimeError("the trainer's process does not answer")
    return orders.recv()


def measure(
    shape: str, device: torch.device, url: str, batch: int, num_swaps: int
) -> dict[str, Any]:
    """Swaps of one drafter by one way; the first one, for which memory is taken, apart."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="swap-") as name:
        folder = Path(name)
        where = url.replace("{folder}", name)
        with server(shape, device, where, folder, batch) as (built, noting):
            ours, theirs = context.Pipe()
            trainer = context.Process(target=train, args=(theirs, where, folder), daemon=True)
            trainer.start()
            try:
                _answer(ours)
                traffic = Traffic(built, batch)
                try:
                    traffic.wait_until_all_decode(8, _WAIT_S)
                    first, *later = [
                        one_swap(ours, built, noting.stamps, traffic) for _ in range(num_swaps + 1)
                    ]
                finally:
                    traffic.end()
                ours.send("end")
            finally:
                trainer.join(10)
                if trainer.is_alive():
                    trainer.kill()
            status = built.service.drafter_status()
    return {
        "shape": shape,
        "url": url,
        "batch": batch,
        "draft_k": DRAFT_K,
        "bytes": first["bytes"],
        "median_after_s": _medians(later),
        "median_copies_ms": statistics.median(one["copies_ms"] for one in later),
        "longest_wait_ms": max(one["longest_wait_ms"] for one in later),
        "longest_wait_before_ms": max(one["longest_wait_before_ms"] for one in later),
        "failed_requests": traffic.num_failed,
        "refused": status["refusals"],
        "first": first,
        "swaps": later,
    }


def _medians(swaps: Sequence[dict[str, Any]]) -> dict[str, float]:
    names = swaps[0]["after_s"]
    return {name: statistics.median(one["after_s"][name] for one in swaps) for name in names}


def rows_of(found: Sequence[dict[str, Any]]) -> Iterator[Row]:
    """Seconds, and what clients noticed."""
    for one in found:
        size = f"{one['bytes'] / 1e9:.2f} GB" if one["bytes"] > 1e8 else f"{one['bytes']} bytes"
        what = f"drafter of {size} by {one['url']}, batch {one['batch']}"
        measure, drafted = "optimiser step to first drafted token, s", one["median_after_s"]
        if one["bytes"] >= BIG_BYTES:
            goal = SAME_HOST_S if one["url"].startswith("shm:") else FILES_S
            yield at_most(what, measure, drafted["drafted"], goal)
        else:
            yield Row(what, measure, drafted["drafted"], None, None)
        wait = "longest wait for a token meanwhile, ms"
        yield Row(what, wait, one["longest_wait_ms"], None, None)
        wait = "longest wait for a token in 5 s without a swap, ms"
        yield Row(what, wait, one["longest_wait_before_ms"], None, None)


def main(
    shapes: Annotated[str, typer.Option(help="keys of harness.shapes.SHAPES")] = "tiny,wide",
    urls: Annotated[str, typer.Option(help="buffer.url of each way")] = ",".join(URLS),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda")] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="clients")] = 1,
    swaps: Annotated[int, typer.Option(min=1, help="measured for each, after a first one")] = 3,
    publish: Annotated[bool, typer.Option(help="write rows/swap.json, too")] = False,
    out: Out = RESULTS / "swap.json",
) -> None:
    """Measure each way that a version can take."""
    found: list[dict[str, Any]] = []
    for shape in shapes.split(","):
        for url in urls.split(","):
            one = measure(shape, pick_device(device), url, batch, swaps)
            found.append(one)
            after = ", ".join(f"{name} {s:.3f}" for name, s in one["median_after_s"].items())
            say(
                f"{shape}, {url}: {one['bytes']:,} bytes; s after the optimiser step: {after}; "
                f"longest wait {one['longest_wait_ms']:.0f} ms, "
                f"before {one['longest_wait_before_ms']:.0f} ms"
            )
            write_result(out, {"rows": found})
    if publish:
        write_rows("swap", rows_of(found), SOURCE)


if __name__ == "__main__":
    typer.run(main)
