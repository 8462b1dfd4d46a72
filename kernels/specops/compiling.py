"""Compiling Triton kernels on all cores, before the programs that launch them are made.

Triton compiles a specialisation of a kernel when it is first launched: one after another, in the
thread that launches. Here launches are noted instead (``Kernels.noted``), and what they need is
compiled at once (``Kernels.make``): worker processes, forked from this one, fill Triton's cache on
disk, from which this process then reads. A specialisation is described by the JSON that Triton
makes for ``JITFunction.preload``, so a list of them can be kept for the next start.

Needs the hooks of Triton 3.5 to 3.7. Importing this module imports Triton.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as NotInTime
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import triton
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import specops

log = logging.getLogger(__name__)

_MOST_WORKERS = 32
_GIVE_UP_S = 180.0
"""Workers that have not compiled a kernel after so long are not waited for."""
_KERNEL_MODULE = "_triton"
"""Ends the names of modules with kernels."""
_KEPT_PACKAGE = "specops."
"""A list on disk may name kernels of this package only."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Wanted:
    """One specialisation of a kernel."""

    module: str
    name: str
    """Of the kernel, in its module."""
    data: str
    """Types, constants and options, as Triton's JSON."""

    def kernel(self) -> Any:
        """
        Raises:
            ValueError: there is no such kernel.
        """
        found = getattr(importlib.import_module(self.module), self.name, None)
        if not isinstance(found, JITFunction):
            raise ValueError(f"{self.module}.{self.name} is no kernel")
        return found


@dataclass(slots=True)
class Work:
    """What compiling took so far; times in seconds."""

    num_compiled: int = 0
    compile_s: float = 0.0
    """Time that this process compiled, or waited for workers."""
    worker_s: float = 0.0
    """Sum over the workers."""
    num_by_workers: int = 0
    """Of those that were compiled."""
    num_read: int = 0
    """Kernels that were read from the disk, those of the workers included."""
    read_s: float = 0.0


class Kernels:
    """The kernels that programs of this process need. For one thread, but others may launch."""

    def __init__(self, num_workers: int | None = None) -> None:
        """
        Args:
            num_workers: processes that compile; ``None``: one for each core.
        """
        cores = len(os.sched_getaffinity(0))
        self._num_workers = min(cores, _MOST_WORKERS) if num_workers is None else num_workers
        self._pool: ProcessPoolExecutor | None = None
        self._pending: dict[Wanted, Future[float]] = {}
        self._known: dict[Wanted, None] = {}
        """All that were made, in order."""
        self._is_bare = not _holds_any(Path(knobs.cache.dir))
        self.work = Work()
        _fix_keys()

    @property
    def known(self) -> Collection[Wanted]:
        """The specialisations that were made, in order."""
        return self._known

    @property
    def are_new(self) -> bool:
        """The disk held no kernel at first, or has lacked one since, so it may lack others."""
        return self._is_bare or self.work.num_compiled > 0

    @contextmanager
    def noted(self, *, is_alone: bool = False) -> Iterator[list[Wanted]]:
        """Launches of this thread whose kernels are not loaded do nothing but add to the list.

        Args:
            is_alone: no other thread launches meanwhile. Repeated launches of a kernel then take
                as long as ever, and seven times as long otherwise.
        """
        found: dict[Wanted, None] = {}
        wanted: list[Wanted] = []
        stand_ins: list[tuple[dict[Any, Any], Any]] = []
        here, before = threading.get_ident(), knobs.runtime.jit_cache_hook

        def note(**call: Any) -> bool | None:
            if threading.get_ident() != here:
                return None if before is None else before(**call)
            kernel, described = call["fn"], call["compile"]
            one = Wanted(kernel.module, kernel.name, described["specialization_data"])
            if one not in found:
                found[one] = None
                wanted.append(one)
            if is_alone:
                loaded = kernel.jit_function.device_caches[described["device"]][0]
                loaded[call["key"]] = _Nothing
                stand_ins.append((loaded, call["key"]))
            return True

        knobs.runtime.jit_cache_hook = note
        try:
            yield wanted
        finally:
            knobs.runtime.jit_cache_hook = before
            for loaded, key in stand_ins:
                del loaded[key]

    def begin(self, wanted: Iterable[Wanted]) -> None:
        """Let workers compile them, those that the disk holds excepted. Returns at once."""
        new = [one for one in wanted if one not in self._known and one not in self._pending]
        if not new or self._num_workers < 2:
            return
        try:
            if self._pool is None:
                self._pool = _pool(self._num_workers)
            for one in new:
                self._pending[one] = self._pool.submit(_compile, one)
        except (OSError, RuntimeError) as error:
            self._give_up(error)

    def make(self, wanted: Iterable[Wanted]) -> None:
        """Load kernels into this process: from the disk, when workers have compiled those that were
        begun, and compiled here otherwise.

        Raises:
            Exception: Triton cannot compile or load one.
        """
        for one in wanted:
            if one in self._known:
                continue
            self._await(one)
            self._load(one)
            self._known[one] = None

    def close(self) -> None:
        """Do without workers from now on: a server that answers requests does not fork. What is
        still pending is compiled when it is needed."""
        self._num_workers = 0
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
        self._pending.clear()

    # ---- a list for the next start -------------------------------------------------------------

    def listed(self) -> bytes:
        """All that were made, as JSON for ``read_list``."""
        kernels = [asdict(one) | {"source": one.kernel().cache_key} for one in self._known]
        return json.dumps({"made_for": _made_for(), "kernels": kernels}).encode()

    @staticmethod
    def read_list(content: bytes) -> list[Wanted]:
        """What a former start needed, as far as the same kernels would be compiled for it now:
        same sources, Triton and device. Nothing in the list is executed, and it can name kernels of
        this package only.

        Raises:
            ValueError: it is no such list.
        """
        try:
            stored = json.loads(content)
            if stored["made_for"] != _made_for():
                return []
            return [
                Wanted(k["module"], k["name"], k["data"]) for k in filter(_holds, stored["kernels"])
            ]
        except (LookupError, TypeError, AttributeError, ImportError) as error:
            raise ValueError(f"not a list of kernels: {error!r}") from None

    # ---- one kernel ----------------------------------------------------------------------------

    def _await(self, one: Wanted) -> None:
        """Wait for the worker that compiles it."""
        future = self._pending.pop(one, None)
        if future is None:
            return
        started_s = time.perf_counter()
        try:
            error = future.exception(_GIVE_UP_S)
        except NotInTime as not_in_time:
            error = not_in_time
        if isinstance(error, (NotInTime, BrokenProcessPool)):
            self._give_up(error)
        elif error is not None:  # if it is no fault of the worker, it is raised here next
            log.warning("a worker could not compile kernel %s: %r", one.name, error)
        elif took_s := future.result():
            self.work.num_compiled += 1
            self.work.num_by_workers += 1
            self.work.worker_s += took_s
        self.work.compile_s += time.perf_counter() - started_s

    def _give_up(self, error: BaseException) -> None:
        """Do without workers from now on."""
        log.warning("kernels are compiled one after another, because workers failed: %r", error)
        pool = self._pool
        self.close()
        for process in list((getattr(pool, "_processes", None) or {}).values()):
            process.kill()

    def _load(self, one: Wanted) -> None:
        """Compile it or read it from the disk, and load it into the device."""
        was_read = True

        def listen(*, cache_hit: bool, **_: Any) -> None:
            nonlocal was_read
            was_read = cache_hit

        before, started_s = knobs.compilation.listener, time.perf_counter()
        knobs.compilation.listener = listen
        try:
            compiled = one.kernel().preload(one.data)
        finally:
            knobs.compilation.listener = before
        if hasattr(driver.active, "launcher_cls"):
            _ = compiled.run  # loads it: a capture could not
        took_s = time.perf_counter() - started_s
        if was_read:
            self.work.num_read += 1
            self.work.read_s += took_s
        else:
            self.work.num_compiled += 1
            self.work.compile_s += took_s


class _Nothing:
    """In place of a loaded kernel: its launch does nothing."""

    function = packed_metadata = None

    @staticmethod
    def launch_metadata(*_: Any) -> None:
        return None

    @staticmethod
    def run(*_: Any) -> None:
        return None


def _holds_any(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _fix_keys() -> None:
    """Let Triton compute the key of every kernel's source, in one order in all processes.

    A key depends on whether the keys of the functions that the kernel calls were computed before
    (Triton 3.6 and 3.7: ``DependenciesFinder`` takes over their global constants before it asks for
    their key), so a process that computes keys in another order does not find on the disk what this
    one has compiled.
    """
    names = [f"specops.{module.name}" for module in iter_modules(specops.__path__)]
    for name in sorted(name for name in names if name.endswith(_KERNEL_MODULE)):
        for found in vars(importlib.import_module(name)).values():
            if isinstance(found, JITFunction):
                _ = found.cache_key


def _made_for() -> str:
    """What a list of kernels holds for, apart from their sources."""
    return f"triton {triton.__version__}, {driver.active.get_current_target()}"


def _holds(stored: dict[str, str]) -> bool:
    """Whether an entry of a list names a kernel of this package whose source is the same."""
    if not stored["module"].startswith(_KEPT_PACKAGE) or not isinstance(stored["data"], str):
        raise TypeError(f"no kernel of {_KEPT_PACKAGE}*: {stored['module']}")
    one = Wanted(stored["module"], stored["name"], stored["data"])
    key: str = one.kernel().cache_key
    return key == stored["source"]


# ---- workers ------------------------------------------------------------------------------------


class _Elsewhere:
    """The driver as it was before the fork, for a process that must not ask the device."""

    def __init__(self, known: Any, device: int, target: Any) -> None:
        self._known, self._device, self._target = known, device, target

    def get_current_device(self) -> int:
        return self._device

    def get_current_target(self) -> Any:
        return self._target

    def __getattr__(self, name: str) -> Any:
        return getattr(self._known, name)


def _pool(num_workers: int) -> ProcessPoolExecutor:
    """Workers that have all modules of this process already; they are forked now."""
    known = driver.active
    elsewhere = _Elsewhere(known, known.get_current_device(), known.get_current_target())
    pool = ProcessPoolExecutor(
        num_workers, multiprocessing.get_context("fork"), _begin_worker, (elsewhere, os.getpid())
    )
    with warnings.catch_warnings():
        # Workers touch neither torch nor the device, and fork leaves them this thread only.
        warnings.simplefilter("ignore", DeprecationWarning)
        pool.submit(os.getpid)
    return pool


def _begin_worker(elsewhere: _Elsewhere, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    knobs.runtime.jit_cache_hook = knobs.compilation.listener = None
    driver.set_active(elsewhere)


def _compile(wanted: Wanted) -> float:
    """Fill the cache on the disk; returns the seconds that it took, 0 if the disk had it."""
    started_s, was_read = time.perf_counter(), True

    def listen(*, cache_hit: bool, **_: Any) -> None:
        nonlocal was_read
        was_read = cache_hit

    knobs.compilation.listener = listen
    compiled = wanted.kernel().preload(wanted.data)
    launcher = getattr(driver.active, "launcher_cls", None)
    if launcher is not None:  # up to Triton 3.6 it is compiled, too
        launcher(compiled.src, compiled.metadata)
    return 0.0 if was_read else time.perf_counter() - started_s
