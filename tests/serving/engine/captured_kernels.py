"""Prints as JSON what making four programs, the last one late, took at several starts: kernels
compiled, read and loaded, recordings, launches, and the log.

Kernels are really compiled, for an H100; the device that records and launches is none. Runs in its
own process, without the interpreter. Argument: a folder for lists of kernels.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.runtime.jit import JITFunction

from serving.engine.captures import Captures
from serving.engine.graph_recorder import Program
from specops import laws_triton, verify_logits_triton
from specops.best_ids_triton import _best_of_part, _join_best, best_ids
from specops.compiling import Kernels
from tests.specops.no_device import NoDevice, use_no_device


class CallsOnly:
    """A recorder whose programs make the calls again."""

    is_serving = False

    def __init__(self, *, breaks: bool) -> None:
        self.calls: list[str] = []
        self._breaks, self._was_run = breaks, False

    def begin(self) -> None:
        self.calls.append("begin")

    def record(self, work: Program) -> tuple[Program, int]:
        self.calls.append("record")
        work()
        if self._breaks and not self._was_run:
            raise RuntimeError("not permitted when stream is capturing")
        return work, 0

    def look_through(self, works: Iterable[Program]) -> Iterator[None]:
        for work in works:
            self.calls.append("look")
            work()
            yield

    def run(self, work: Program) -> None:
        self.calls.append("run")
        self._was_run = True
        work()


def best(num_rows: int, dtype: torch.dtype) -> None:
    best_ids(torch.zeros((num_rows, 4096), dtype=dtype))


def start(
    listed: Path, device: NoDevice, said: StringIO, *, breaks: bool = False
) -> dict[str, Any]:
    """Make the programs as a process does that has loaded no kernel yet, and run them."""
    for kernel in (_best_of_part, _join_best):
        kernel.device_caches.clear()
    said.seek(0)
    said.truncate()
    device.num_loaded = device.num_launched = 0
    recorder, kernels = CallsOnly(breaks=breaks), Kernels(num_workers=2)
    captures = Captures(recorder)
    works = [partial(best, 8, torch.bfloat16), partial(best, 2, torch.bfloat16)]
    works.append(partial(best, 2, torch.float32))
    late = partial(best, 2, torch.float16)
    captures.begin(kernels, [*works, late], listed)
    programs = [captures.capture(work) for work in works]
    captures.end()
    captures.keep_list(listed)
    num_compiled = kernels.work.num_compiled
    recorder.is_serving = True
    programs.append(captures.capture(late))
    device.num_launched = 0
    for program in programs:
        program()
    return {
        "calls": recorder.calls, "work": asdict(kernels.work), "loaded": device.num_loaded,
        "launched": device.num_launched, "log": said.getvalue(),
        "compiled_late": kernels.work.num_compiled - num_compiled,
    }  # fmt: skip


def keys_in_any_order() -> list[str]:
    """The key of a kernel that calls others, asked for before and after those of the others."""
    modules = (laws_triton, verify_logits_triton)
    kernels = [f for one in modules for f in vars(one).values() if isinstance(f, JITFunction)]
    keys = []
    for others in ([], kernels):
        for kernel in kernels:
            kernel.hash, kernel.used_global_vals = None, {}
        Kernels(num_workers=0)
        for kernel in others:
            _ = kernel.cache_key
        keys.append(verify_logits_triton._stop.cache_key)
    return keys


def with_killed_workers() -> list[int]:
    """How many kernels are made here, and by workers, if these die."""
    for kernel in (_best_of_part, _join_best):
        kernel.device_caches.clear()
    kernels = Kernels(num_workers=2)
    with kernels.noted() as wanted:
        best(8, torch.bfloat16)
    kernels.begin(wanted)
    for pid in list(kernels._pool._processes):
        os.kill(pid, signal.SIGKILL)
    kernels.make(wanted)
    return [kernels.work.num_compiled, kernels.work.num_by_workers]


def main() -> None:
    folder, said = Path(sys.argv[1]), StringIO()
    logging.basicConfig(stream=said, level=logging.INFO)
    kept, edited, damaged = (folder / f"{name}.json" for name in ("kept", "edited", "damaged"))
    begin = partial(start, device=use_no_device(), said=said)
    found = {"first": begin(kept), "second": begin(kept)}
    entries = json.loads(kept.read_text())
    for one in entries["kernels"]:
        one["source"] = "another"
    edited.write_text(json.dumps(entries))
    damaged.write_text('{"made_for": 3, "kernels"')
    found |= {"edited": begin(edited), "damaged": begin(damaged)}
    found["breaks"] = begin(folder / "none.json", breaks=True)
    with knobs.cache.scope():
        knobs.cache.dir = str(folder / "other")
        (folder / "other" / "ANOTHER").mkdir(parents=True)
        found["other"] = begin(folder / "none.json")
        knobs.cache.dir = str(folder / "third")
        killed = with_killed_workers()
    found = {"starts": found, "killed": killed, "killed_log": said.getvalue()}
    json.dump(found | {"keys": keys_in_any_order()}, sys.stdout)


if __name__ == "__main__":
    main()
