"""What a trainer knows of the draft policy that it fits beside its drafter."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from buffer.files import write_atomically
from buffer.records import Manifest
from configs.fitting import FittingSettings
from configs.schema import Settings
from drafters.catalog import chosen
from trainer.fitted_policy import KINDS, FittedKind
from trainer.fitting import Fitted, Request, answer_of, asked
from trainer.recent import RecentTraces

_LOOK_EVERY_S = 0.1
_NEW_SHARE = 0.25
"""Of ``least_steps``, that must have come since a fit before the next one."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is fitted, and to what."""

    kind: str
    """A name in ``trainer.fitting.FITS`` and in ``KINDS``."""
    drafter: str
    settings: FittingSettings
    margin: float
    """``trainer.gate_margin``."""
    run_dir: Path
    max_draft: int
    seed: int

    @property
    def fitted(self) -> FittedKind:
        """Where its network is."""
        return KINDS[self.kind]

    def request(self, published: Manifest, waiting: str | None = None) -> Request:
        """
        Args:
            published: the newest version; what it carries is in force,
            waiting: unless there is a network that the next version carries.
        """
        how = self.settings
        in_force = published.policy.get(self.fitted.key) if waiting is None else waiting
        if not self.fitted.is_usable(in_force, self.drafter):
            in_force = None
        return Request(
            kind=self.kind,
            drafter=self.drafter,
            run_dir=str(self.run_dir),
            max_draft=self.max_draft,
            seed=self.seed,
            held_out=how.held_out,
            least_steps=how.least_steps,
            most_steps=how.most_steps,
            margin=self.margin,
            in_force=in_force,
        )


def plan_of(settings: Settings, line: str) -> Plan | None:
    """What the trainer of one drafter fits; ``None``: nothing, as where servers take the network
    from a file. Of the trainers of a run, that of the drafter which the policy drafts with fits its
    network; the first one, if the run does not have that drafter, because the policy then takes
    another.

    Args:
        settings: of that drafter's trainer.
        line: name of its version line; empty for the first drafter that learns.
    """
    how, policy = settings.trainer.policy, settings.policy
    kind = policy.kind if how.kind == "auto" else how.kind
    if kind not in KINDS or (how.kind == "auto" and getattr(policy, kind).weights is not None):
        return None
    own, wanted = settings.drafter.kind, policy.drafter
    if own != wanted and (line or wanted in chosen(settings.drafter)):
        return None
    margin = settings.trainer.gate_margin
    return Plan(kind, own, how, margin, settings.run_dir, settings.drafter.max_draft, settings.seed)


class FittingProcess:
    """One process that fits, with the lowest priority and no GPU; see ``trainer.fitting``. Nobody
    waits for it."""

    def __init__(
        self, request: Request, records: Sequence[bytes], mark: tuple[int, int] | None = None
    ) -> None:
        """
        Args:
            mark: state of the file that the network is to replace; ``None``: there is none.

        Raises:
            OSError: it could not be started.
        """
        readable, self._lifeline = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "trainer.fitting", str(readable)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=_environment(),
                pass_fds=(readable,),
                start_new_session=True,  # Ctrl-C in a terminal is for the trainer, which ends it
            )
        except OSError:
            os.close(self._lifeline)
            raise
        finally:
            os.close(readable)
        self.began_s = time.monotonic()
        self.mark = mark
        self._answer = b""
        self._thread = threading.Thread(
            target=self._talk, args=(request, records), name="fitter", daemon=True
        )
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """It has answered, or ended without a word."""
        return not self._thread.is_alive()

    def answer(self) -> Fitted:
        """What it found, once it is over.

        Raises:
            NotYetError: more traces are needed.
            ValueError: it failed.
        """
        code = self._process.wait()
        if code:
            how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise ValueError(f"the process that fits {how}; what it wrote to stderr says more")
        return answer_of(self._answer)

    def end(self) -> None:
        """End it, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._thread.join()
        self._process.wait()
        os.close(self._lifeline)

    def _talk(self, request: Request, records: Sequence[bytes]) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(OSError), self._process.stdin as stdin:
            for part in asked(request, records):
                stdin.write(part)
        with self._process.stdout as stdout:
            self._answer = stdout.read()


def _environment() -> dict[str, str]:
    """That of this process, without its GPUs, and with one thread."""
    paths = [path or os.getcwd() for path in sys.path]
    own = {
        "PYTHONPATH": os.pathsep.join(paths),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    return {**os.environ, **own}


@dataclass(slots=True)
class Fits:
    """Where the policy is on its way from traces to a version."""

    plan: Plan | None = None
    """``None``: nothing is fitted."""
    recent: RecentTraces = field(default_factory=lambda: RecentTraces(1))
    process: FittingProcess | None = None
    """Fits now."""
    publishing: Future[Manifest] | None = None
    """A version with the weights in force and the new network is on its way."""
    began_s: float = field(default_factory=time.monotonic)
    """Monotonic time at which the last fit began, or the trainer."""
    steps_then: float = 0.0
    """``RecentTraces.total`` at that time."""
    awaits: str | None = None
    """What more the traces must say, as the last fit found; ``None``: nothing."""
    passed_s: float | None = None
    """Monotonic time since when a network is there that the newest version does not carry."""
    not_before_s: float = -math.inf
    """Monotonic time before which it is not published with the weights in force."""
    mark: tuple[int, int] | None = None
    """State of the file when it was last looked at,"""
    newest: int | None = None
    """and the newest version then."""
    counts: Counter[str] = field(default_factory=Counter)
    """Fits by outcome: ``passed``, ``refused``, ``not_yet`` or ``failed``."""
    last: dict[str, Any] | None = None
    """What became of the last one that was judged."""
    told: str | None = None
    """What was last said to be waited for."""
    looked_s: float = -math.inf
    """Monotonic time at which the trainer has looked last."""

    @property
    def is_on(self) -> bool:
        """A policy is fitted in this trainer."""
        return self.plan is not None

    @property
    def is_publishing(self) -> bool:
        """A version is on its way, so no other may be published now."""
        return self.publishing is not None

    def is_time(self) -> bool:
        """The trainer has not looked for a while: in between updates that take milliseconds, even
        a look would cost."""
        now_s = time.monotonic()
        if now_s - self.looked_s < _LOOK_EVERY_S:
            return False
        self.looked_s = now_s
        return True

    def waits_for(self) -> str | None:
        """What the next fit waits for; ``None`` if it is due."""
        assert self.plan is not None
        how, recent = self.plan.settings, self.recent
        if recent.num_drafted < how.least_steps:
            return (
                f"{how.least_steps - recent.num_drafted} more steps drafted by "
                f"{self.plan.drafter} ({recent.num_drafted} of {how.least_steps} of "
                f"trainer.policy.least_steps)"
            )
        has_fitted = self.counts.total() > 0
        if has_fitted and recent.total - self.steps_then < _NEW_SHARE * how.least_steps:
            return self.awaits or "new traces"
        if has_fitted and time.monotonic() - self.began_s < how.every_s:
            return self.awaits or f"trainer.policy.every_s = {how.every_s:g} to pass"
        return None

    def begin(self, published: Manifest) -> None:
        """Start to fit.

        Raises:
            OSError: the process could not be started.
        """
        assert self.plan is not None and self.process is None
        self.began_s, self.steps_then = time.monotonic(), self.recent.total
        mark, waiting = self._mark_of_file(), None
        if mark is not None:
            waiting = self.plan.fitted.text(self.plan.run_dir, self.plan.drafter)
        request = self.plan.request(published, waiting)
        self.process = FittingProcess(request, self.recent.records(), mark)

    def is_overtaken(self, process: FittingProcess) -> bool:
        """Since a fit began, somebody has put another network in place of that which its own was
        judged against, or has taken it away."""
        return self._mark_of_file() != process.mark

    def _mark_of_file(self) -> tuple[int, int] | None:
        assert self.plan is not None
        try:
            state = self.plan.fitted.path(self.plan.run_dir).stat()
        except OSError:
            return None
        return state.st_mtime_ns, state.st_ino

    def keep(self, network: bytes) -> None:
        """Put a network where the next version takes it from, in place of the former one.

        Raises:
            OSError: it cannot be written; the former one stays.
        """
        assert self.plan is not None
        path = self.plan.fitted.path(self.plan.run_dir)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, network)

    def look(self, published: Manifest) -> None:
        """See whether there is a network that the newest version does not carry: one that has just
        passed, or had before a restart, or that somebody has fitted by hand."""
        assert self.plan is not None
        fitted, run_dir = self.plan.fitted, self.plan.run_dir
        mark = self._mark_of_file()
        if mark == self.mark and published.version == self.newest:
            return
        self.mark, self.newest = mark, published.version
        text = None if mark is None else fitted.text(run_dir, self.plan.drafter)
        is_new = text is not None and text != published.policy.get(fitted.key)
        self.passed_s = (self.passed_s or time.monotonic()) if is_new else None

    def withdraw(self, published: Manifest) -> None:
        """A version was rolled back: go on with the network of the one that is the newest now. What
        was there stays beside it, for people.

        Raises:
            OSError: the file cannot be replaced.
        """
        if self.plan is None:
            return
        fitted = self.plan.fitted
        path = fitted.path(self.plan.run_dir)
        text = published.policy.get(fitted.key)
        if path.exists() and fitted.text(self.plan.run_dir) != text:
            path.replace(path.with_suffix(".rolled_back"))
        if isinstance(text, str) and not path.exists():
            self.keep(fitted.weights.blob_of(text))

    def close(self) -> None:
        """End the process that fits, if one does."""
        if self.process is not None:
            self.process.end()
            self.process = None

    def figures(self) -> dict[str, Any] | None:
        """For the status; ``None``: nothing is fitted."""
        if self.plan is None:
            return None
        waits = None if self.process is not None else self.waits_for()
        state = "fits" if self.process is not None else f"waits for {waits or 'its turn'}"
        return {
            "kind": self.plan.kind,
            "state": state,
            "steps": self.recent.num_drafted,
            "fits": dict(self.counts),
            "last": self.last,
            "unpublished": self.passed_s is not None,
        }
