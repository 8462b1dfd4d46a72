"""Replaces the target's weights in a running server, for a trainer of the target beside it.

``update`` runs on the caller's thread: it reads and checks. ``between_steps`` runs on the engine's
and only copies. A request in flight keeps its tokens. Its text is computed again with the new
weights before its next token, so every token follows the law of one set of weights, and no row of
keys and values of the former ones is ever read again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from buffer.fingerprint import FULL_BYTES
from buffer.run_target import RunTarget, read_run_target, write_run_target
from serving.engine.loop import ChangeTarget, Restarted
from targets.update import TargetWeights

log = logging.getLogger(__name__)

_TAKEN_WITHIN_S = 60.0
"""Time within which the engine must take an order; a step takes milliseconds."""
_HISTORY = 200


@dataclass(slots=True)
class _Order:
    """An update that waits for the engine's thread."""

    fingerprint: str
    folder: str
    done: threading.Event = field(default_factory=threading.Event)
    restarted: Restarted | None = None
    """Set once it was carried out."""
    seconds: float = 0.0
    """Time for which steps waited."""


@dataclass(frozen=True, slots=True)
class InForce:
    """The target's weights in force."""

    version: int
    """How often they were replaced."""
    fingerprint: str
    folder: str | None
    """Where they were read from; ``None``: handed over in memory."""


class TargetUpdates:
    """Carries out updates of one target, one at a time."""

    def __init__(
        self,
        *,
        weights: TargetWeights,
        in_force: InForce,
        run_dir: Path,
        tell: Callable[[str], None],
        wake_engine: Callable[[], None],
    ) -> None:
        """
        Args:
            run_dir: where the run's trainer learns what the target is.
            tell: gets the new fingerprint between two steps, on the engine's thread; must not wait.
        """
        self._weights = weights
        self._in_force = in_force
        self._run_dir = run_dir
        self._tell = tell
        self._wake_engine = wake_engine
        self._one_update = threading.Lock()
        """Held from reading until the engine has taken what was read; never by its thread."""
        # No lock: a deque is safe between two threads, and the engine's thread must not take one.
        self._orders: deque[_Order] = deque()
        self._counts: Counter[str] = Counter()
        self._history: deque[dict[str, Any]] = deque(maxlen=_HISTORY)
        self._last_error: str | None = None
        self.seconds = 0.0
        """Total time for which steps waited."""
        self.num_untraced = 0
        """Requests that left no trace because of updates."""

    # ---- other threads -------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """How often the weights were replaced."""
        return self._in_force.version

    def counts(self) -> dict[str, int]:
        """Orders by outcome: ``updated``, ``unchanged``, ``refused``."""
        return {name: self._counts[name] for name in ("updated", "unchanged", "refused")}

    def status(self) -> dict[str, Any]:
        """What ``GET /admin/target`` shows."""
        now = self._in_force
        return {
            "version": now.version,
            "fingerprint": now.fingerprint,
            "folder": now.folder,
            "updates": self.counts(),
            "update_seconds": self.seconds,
            "untraced": self.num_untraced,
            "history": list(self._history),
            "last_error": self._last_error,
        }

    def announce(self) -> None:
        """Tell the run's trainer which weights are in force, and where they are, if the run has had
        others. A disk that fails costs that and no more."""
        now = self._in_force
        try:
            known = read_run_target(self._run_dir)
            if known is not None and known.knows(now.fingerprint):
                write_run_target(
                    self._run_dir, known.followed_by(now.fingerprint, now.folder or "")
                )
        except (OSError, ValueError) as error:
            log.warning("the run folder does not say which weights the target has (%s)", error)

    def update(self, folder: Path) -> dict[str, Any]:
        """Read the weights in a folder, check them, and let the engine take them between two steps.

        Raises:
            ValueError: they are refused, or another update is under way; the weights in force stay.
        """
        if not self._one_update.acquire(blocking=False):
            self._counts["refused"] += 1
            raise ValueError(
                "another update of the target is under way; send this one again once it is over"
            )
        try:
            result = self._update(folder)
        except (OSError, ValueError) as error:
            self._refuse(error)
            raise ValueError(f"{error}; the weights in force go on") from error
        finally:
            self._one_update.release()
        self._last_error = None
        return self.status() | result

    def _update(self, folder: Path) -> dict[str, Any]:
        started_s = time.perf_counter()
        fingerprint = self._weights.read(folder)
        load_s = time.perf_counter() - started_s
        if fingerprint == self._in_force.fingerprint:
            return self._unchanged(folder, load_s)
        before, order = self._in_force, _Order(fingerprint, str(folder.absolute()))
        # First, so that no trace of the new weights is read by a trainer that does not know them.
        self._remember(before, fingerprint, order.folder)
        try:
            self._hand_over(order)
        except ValueError:
            self._remember(InForce(0, fingerprint, order.folder), before.fingerprint, before.folder)
            raise
        return self._told(order, load_s)

    def _unchanged(self, folder: Path, load_s: float) -> dict[str, Any]:
        """The fingerprint is that of the weights in force.

        Raises:
            ValueError: it does not tell them apart.
        """
        if not self._weights.are_in_force():
            raise ValueError(
                f"the weights in {folder} are other ones than those in force, but have the same "
                f"fingerprint: of more than {FULL_BYTES >> 30} GiB only parts are hashed, so "
                f"their traces could not be told apart"
            )
        self._counts["unchanged"] += 1
        self._in_force = replace(self._in_force, folder=str(folder.absolute()))
        self.announce()
        return {
            "changed": False, "load_seconds": load_s, "swap_seconds": 0.0,
            "restarted": 0, "untraced": 0,
        }  # fmt: skip

    def _hand_over(self, order: _Order) -> None:
        """Give an order to the engine's thread and wait until it is carried out.

        Raises:
            ValueError: the engine does not take it, or failed on it.
        """
        self._orders.append(order)
        self._wake_engine()
        if not order.done.wait(_TAKEN_WITHIN_S):
            try:
                self._orders.remove(order)
            except ValueError:  # it is being carried out just now
                order.done.wait()
            else:
                raise ValueError(f"the engine took no step within {_TAKEN_WITHIN_S:.0f} s")
        if order.restarted is None:
            raise ValueError("the engine failed while it took the weights; see the server's log")

    def _told(self, order: _Order, load_s: float) -> dict[str, Any]:
        """Count an update that was carried out, and log it; returns what the caller is told."""
        restarted, now = order.restarted, self._in_force
        assert restarted is not None
        self._counts["updated"] += 1
        result = {
            "changed": True,
            "load_seconds": load_s,
            "swap_seconds": order.seconds,
            "restarted": restarted.num_requests,
            "untraced": restarted.num_untraced,
        }
        self._history.append(
            {"unix_s": time.time(), "version": now.version, "fingerprint": now.fingerprint,
             "folder": now.folder, **result}
        )  # fmt: skip
        log.info(
            "the target's weights are those in %s now (%s, update %d): read in %.1f s, steps "
            "waited %.3f s; %d requests in flight go on under them, %d of which leave no trace",
            now.folder, now.fingerprint[:12], now.version, load_s, order.seconds,
            restarted.num_requests, restarted.num_untraced,
        )  # fmt: skip
        return result

    def _refuse(self, error: Exception) -> None:
        self._counts["refused"] += 1
        self._last_error = str(error)
        log.warning("an update of the target is refused: %s; the weights in force go on", error)

    def _remember(self, before: InForce, fingerprint: str, folder: str | None) -> None:
        """Tell the run's trainer which weights come after others. A disk that fails costs that, not
        the update."""
        try:
            known = read_run_target(self._run_dir)
            if known is None or not known.knows(before.fingerprint):
                known = RunTarget(before.fingerprint, before.folder or "", ())
            write_run_target(self._run_dir, known.followed_by(fingerprint, folder or ""))
        except (OSError, ValueError) as error:
            log.warning(
                "the run folder does not say that the target has changed (%s): its trainer refuses "
                "new traces until it is started again with target=%s",
                error,
                folder,
            )

    # ---- the engine's thread -------------------------------------------------------------------

    def between_steps(self, change: ChangeTarget) -> None:
        """Carry out a waiting update: copies over the weights in force."""
        if not self._orders:
            return
        order = self._orders.popleft()
        started_s = time.perf_counter()
        try:
            restarted = change(self._weights.take_over)
            self._tell(order.fingerprint)
            order.seconds = time.perf_counter() - started_s
            self.seconds += order.seconds
            self.num_untraced += restarted.num_untraced
            version = self._in_force.version + 1
            self._in_force = InForce(version, order.fingerprint, order.folder)
            order.restarted = restarted
        finally:
            order.done.set()
