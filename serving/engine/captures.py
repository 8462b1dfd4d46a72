"""Makes programs: work of fixed shape that is recorded once and replayed as one launch.

Work that consists of our own operations is recorded without having run before: its launches whose
kernels are not loaded yet are noted and left out, those kernels are made, and it is recorded again.
If the disk lacks the first of them, all work that is expected is looked through in the same way,
and worker processes compile what it needs while this goes on (``specops.compiling``).

Any other work is run once before it is recorded, which compiles and loads its kernels one after
another. So is all work once recording without a run has failed.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from buffer.files import read_regular, write_atomically
from configs.phases import took
from serving.engine.graph_recorder import GraphRecorder, Program

if TYPE_CHECKING:
    from specops.compiling import Kernels, Wanted

log = logging.getLogger(__name__)

_TELL_EVERY_S = 10.0
_MOST_TRIES = 4
_REFUSALS = (RuntimeError, TypeError, ValueError)
"""Of the device, or of Triton to describe a launch. A fault of the work comes up again when it is
run."""
_MOST_LIST_BYTES = 16 << 20


@dataclass(slots=True)
class Spent:
    """Seconds spent on making programs, by phase."""

    num_programs: int = 0
    look_s: float = 0.0
    """Looking through expected work for kernels to compile."""
    kernels_s: float = 0.0
    """Compiling and reading kernels, or waiting for workers that do."""
    first_runs_s: float = 0.0
    """Running work before it is recorded, where that is needed; includes what is compiled and
    loaded then."""
    capture_s: float = 0.0
    timing_s: float = 0.0


class Captures:
    """What has to be there before work can be recorded, and where the time goes."""

    def __init__(self, recorder: GraphRecorder) -> None:
        self.recorder = recorder
        self.spent = Spent()
        self._kernels: Kernels | None = None
        self._expected: list[Program] = []
        self._spoilt: Program | None = None
        """A recording with launches left out: memory is shared as long as one recording lives."""
        self._told_s = time.perf_counter()

    def capture(self, work: Program) -> Program:
        """``work`` as one launch."""
        program = None if self._kernels is None else self._at_once(work)
        if program is None:
            program = self._after_run(work)
        self._count()
        return program

    # ---- kernels first -------------------------------------------------------------------------

    def begin(
        self, kernels: Kernels, expected: Sequence[Program], listed: Path | None = None
    ) -> None:
        """Record work without running it from now on.

        Args:
            expected: work that will be captured: our own operations, which keep nothing that they
                allocate, and depend on no value.
            listed: what ``keep_list`` wrote at a former start, if it exists.
        """
        self._kernels, self._expected = kernels, list(expected)
        try:
            self.recorder.begin()
            if listed is not None:
                self._make(_read_list(kernels, listed))
        except _REFUSALS:
            self._run_from_now_on("kernels cannot be made beforehand")

    def end(self) -> None:
        """What was expected is captured, or left for later."""
        self._expected.clear()
        if self._kernels is not None:
            self._kernels.close()

    def keep_list(self, path: Path) -> None:
        """Write down which kernels were needed, for ``begin`` at the next start."""
        if self._kernels is None or not self._kernels.known:
            return
        try:
            write_atomically(path, self._kernels.listed())
        except OSError as error:
            log.warning(
                "kernels cannot be listed in %s (%s); the next start is slower", path, error
            )

    def tell(self) -> None:
        """Log where the time went."""
        spent = self.spent
        if self._kernels is not None:
            work = self._kernels.work
            log.info(
                "%d kernels were compiled, %.1f s of all workers together; %d were on the disk",
                work.num_compiled, work.worker_s, work.num_read - work.num_by_workers,
            )  # fmt: skip
            took("programs, compiling kernels", work.compile_s)
            took("programs, reading kernels", work.read_s)
        took("programs, looking for kernels", spent.look_s)
        took("programs, running them before capture", spent.first_runs_s)
        took("programs, capturing", spent.capture_s)
        took("programs, timing them", spent.timing_s)

    def _make(self, wanted: Sequence[Wanted]) -> None:
        """Load kernels. If the disk lacks the first one, all are compiled together, and with them
        those of all expected work."""
        assert self._kernels is not None
        started_s, looked_s = time.perf_counter(), self.spent.look_s
        if not self._kernels.are_new:
            self._kernels.make(wanted[:1])
        if self._kernels.are_new:
            self._kernels.begin(wanted)
            wanted = [*wanted, *self._look_ahead()]
        self._kernels.make(wanted)
        looked_s = self.spent.look_s - looked_s
        self.spent.kernels_s += time.perf_counter() - started_s - looked_s

    def _look_ahead(self) -> list[Wanted]:
        """Begin to compile what the expected work needs; returns that."""
        assert self._kernels is not None
        works, self._expected = self._expected, []
        if not works:
            return []
        log.info("the disk lacks compiled kernels; looking through %d programs ...", len(works))
        started_s = time.perf_counter()
        found: list[Wanted] = []
        with self._kernels.noted(is_alone=True) as wanted:
            for _ in self.recorder.look_through(works):
                self._kernels.begin(wanted[len(found) :])
                found = list(wanted)
        self.spent.look_s += time.perf_counter() - started_s
        return found

    # ---- recording -----------------------------------------------------------------------------

    def _at_once(self, work: Program) -> Program | None:
        """``None`` if it must be run first."""
        assert self._kernels is not None
        try:
            for _ in range(_MOST_TRIES):
                started_s = time.perf_counter()
                with self._kernels.noted(is_alone=not self.recorder.is_serving) as wanted:
                    program, num_kept = self.recorder.record(work)
                self.spent.capture_s += time.perf_counter() - started_s
                if num_kept:
                    self._run_from_now_on(
                        f"a program keeps {num_kept} bytes that it allocated while it was recorded"
                    )
                    return None
                if not wanted:
                    return program
                self._spoilt = program
                self._make(wanted)
        except _REFUSALS:
            self._run_from_now_on("a program cannot be recorded before it has run")
            return None
        self._run_from_now_on("a program needs other kernels each time that it is recorded")
        return None

    def _after_run(self, work: Program) -> Program:
        started_s = time.perf_counter()
        self.recorder.run(work)
        warm_s = time.perf_counter()
        program, _ = self.recorder.record(work)
        self.spent.first_runs_s += warm_s - started_s
        self.spent.capture_s += time.perf_counter() - warm_s
        return program

    def _run_from_now_on(self, why: str) -> None:
        """The loud way back to what works for any program."""
        log.warning(
            "%s; each program is run before it is captured, which is slower",
            why, exc_info=sys.exc_info()[0] is not None,
        )  # fmt: skip
        if self._kernels is not None:
            self._kernels.close()
        self._kernels, self._expected = None, []

    def _count(self) -> None:
        self.spent.num_programs += 1
        now = time.perf_counter()
        if now - self._told_s > _TELL_EVERY_S:
            self._told_s = now
            log.info("still making programs: %s", self.spent)


def _read_list(kernels: Kernels, path: Path) -> list[Wanted]:
    try:
        return kernels.read_list(read_regular(path, _MOST_LIST_BYTES, follow=True))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        log.warning("kernels listed in %s cannot be made beforehand: %s", path, error)
        return []
