"""Chooses the weights that serve: loads newer versions, judges them, and rolls back worse ones.

``between_steps`` and ``on_rounds`` run on the engine's thread and only copy a staged buffer or add
numbers. Everything that touches storage runs on the watcher's thread or the caller's.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from buffer.interface import WeightsStore
from buffer.records import Manifest
from drafters.protocol import NeuralDrafter
from policies.interface import DraftPolicy
from policies.rollback import Action, SwapWatch
from serving.swap.flat_weights import Expected, FlatWeights, Staged, load_bundle

log = logging.getLogger(__name__)

_RENEW_S = 600.0
"""Interval at which the in-use mark is renewed; a mark is valid for a day."""


@dataclass(slots=True)
class _Order:
    """A swap that waits for the engine's thread."""

    staged: Staged
    done: threading.Event


class Swapper:
    """Current, former and staged weights of one neural drafter."""

    def __init__(
        self,
        *,
        neural: NeuralDrafter,
        weights: FlatWeights,
        initial: Manifest,
        expected: Expected,
        store: WeightsStore,
        producer: str,
        policy: DraftPolicy,
        poll_s: float,
        watch: SwapWatch,
        automatic: bool,
        wake_engine: Callable[[], None],
    ) -> None:
        self._neural = neural
        self._weights = weights
        self._expected = expected
        self._store = store
        self._producer = producer
        self._policy = policy
        self._poll_s = poll_s
        self._watch = watch
        self._automatic = automatic
        self._wake_engine = wake_engine

        self._current = initial
        self._former: Manifest | None = None
        self._former_flat: Tensor | None = None
        self._denied = store.read_denied()
        self._denied_written = set(self._denied)
        self._failed: dict[int, Hashable] = {}
        self._pinned: int | None = None
        # No lock: a deque is safe between two threads, and the engine's thread must not take one.
        self._orders: deque[_Order] = deque()
        self._rollback_order: threading.Event | None = None
        # Held while loading and handing over; never taken by the engine's thread.
        self._one_swap = threading.RLock()
        self._newest_taken = max([initial.version, *self._denied])
        self._counts: Counter[str] = Counter()
        self._swap_seconds = 0.0
        self._last_error: str | None = None
        self._history: list[dict[str, Any]] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="swapper", daemon=True)

    # ---- other threads -------------------------------------------------------------------------

    def start(self) -> None:
        with self._one_swap:
            self._store.mark_in_use(self._producer, self._held())
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(5.0)
        self._remember_denied()
        self._store.unmark_in_use(self._producer)

    def status(self) -> dict[str, Any]:
        """What ``GET /admin/drafter`` shows."""
        known = self._store.versions()
        newest = max(known, default=self._current.version)
        return {
            "kind": self._neural.kind,
            "version": self._neural.version,
            "parent": self._current.parent,
            "staleness": max(newest - self._neural.version, 0),
            "state": self._state(),
            "pinned": self._pinned,
            "versions": known,
            "former": self._former.version if self._former else None,
            "denied": sorted(self._denied),
            "gate": self._current.gate,
            "swaps": self.counts(),
            "swap_seconds": self._swap_seconds,
            "history": list(self._history[-200:]),
            "last_error": self._last_error,
        }

    def counts(self) -> dict[str, int]:
        """``swapped``, ``rejected``, ``rolled_back``."""
        return {k: self._counts[k] for k in ("swapped", "rejected", "rolled_back")}

    @property
    def swap_seconds(self) -> float:
        return self._swap_seconds

    def swap(self, version: int | None, timeout_s: float = 30.0) -> dict[str, Any]:
        """Swap on request: a number pins that version, ``None`` unpins and takes the newest.

        Raises:
            ValueError: there is no such version, or it was refused; the old one keeps serving.
        """
        with self._one_swap:
            return self._swap(version, timeout_s)

    def _swap(self, version: int | None, timeout_s: float) -> dict[str, Any]:
        known = [v for v in self._store.versions() if v not in self._denied]
        if version is None and not known:
            raise ValueError("no version is published")
        wanted = max(known) if version is None else version
        if wanted not in self._store.versions():
            raise ValueError(f"version {wanted} is not published; known: {self._store.versions()}")
        staged = None if wanted == self._current.version else self._load(wanted)
        self._pinned = version  # only now: a refused request changes nothing
        if staged is not None:
            self._hand_over(staged, timeout_s)
        return self.status()

    def rollback(self, timeout_s: float = 30.0) -> dict[str, Any]:
        """Return to the former version, and never take the current one again without being asked.

        Raises:
            ValueError: there is no former version.
        """
        with self._one_swap:
            if self._former is None:
                raise ValueError("there is no former version to return to")
            done = threading.Event()
            self._rollback_order = done
            self._wake_engine()
            if not done.wait(timeout_s):
                raise ValueError("the engine did not take the order in time; it will when it wakes")
            return self.status()

    def _hand_over(self, staged: Staged, timeout_s: float) -> None:
        order = _Order(staged, threading.Event())
        self._orders.append(order)
        self._wake_engine()
        if not order.done.wait(timeout_s):
            raise ValueError("the engine did not take the order in time; it will when it wakes")
        self._store.mark_in_use(self._producer, self._held())

    def _held(self) -> set[int]:
        return {m.version for m in (self._current, self._former) if m is not None}

    def _load(self, version: int) -> Staged:
        self._store.mark_in_use(self._producer, self._held() | {version})
        try:
            staged = load_bundle(self._store, version, self._weights, self._expected)
        except ValueError as error:
            self._counts["rejected"] += 1
            self._last_error = str(error)
            log.warning("%s", error)
            raise
        self._last_error = None
        if self._former_flat is None:  # allocated here because it takes time
            self._former_flat = torch.empty_like(self._weights.flat)
        return staged

    # ---- the watcher's thread ------------------------------------------------------------------

    def _run(self) -> None:
        renewed = time.monotonic()
        while not self._stopping.wait(self._poll_s):
            try:
                with self._one_swap:
                    self._remember_denied()
                    if time.monotonic() - renewed > _RENEW_S:
                        self._store.mark_in_use(self._producer, self._held())
                        renewed = time.monotonic()
                    if self._automatic and self._pinned is None and not self._on_trial:
                        self._look()
            except OSError as error:  # a full disk must not stop the watcher
                self._last_error = str(error)
                log.warning("cannot look for new versions (%s); the running one serves on", error)

    @property
    def _on_trial(self) -> bool:
        """True while a version is judged; another swap would spoil the evidence."""
        return self._watch.state in ("trial", "confirming")

    def _remember_denied(self) -> None:
        """Store rolled-back versions, so that a restart does not begin with one of them."""
        if self._denied != self._denied_written:
            self._denied_written = set(self._denied)
            self._store.write_denied(self._denied_written)

    def _look(self) -> None:
        """Swap to the newest version, unless it is not newer or failed before and is unchanged."""
        newer = [v for v in self._store.versions() if v > self._newest_taken]
        if not newer:
            return
        version = max(newer)
        mark = self._store.change_mark(version)
        if self._failed.get(version) == mark:
            return
        try:
            self._hand_over(self._load(version), timeout_s=30.0)
        except ValueError:
            self._failed[version] = mark

    # ---- the engine's thread -------------------------------------------------------------------

    def between_steps(self) -> None:
        """Apply a waiting swap or rollback: one in-place copy."""
        if self._orders:
            order = self._orders.popleft()
            self._apply(order.staged)
            order.done.set()
        if self._rollback_order is not None:
            done, self._rollback_order = self._rollback_order, None
            self._roll_back("by order")
            done.set()

    def on_rounds(self, drafter: str, rounds: list[tuple[int, int]]) -> None:
        """Report (proposed, accepted) of each of a drafter's rounds in one step."""
        if self._pinned is not None or drafter != self._neural.kind:
            return
        proposed, accepted = sum(p for p, _ in rounds), sum(a for _, a in rounds)
        num_rounds = sum(p > 0 for p, _ in rounds)
        action = self._watch.observe(self._neural.version, proposed, accepted, num_rounds)
        if action is Action.TRY_FORMER:
            self._exchange()
            self._note("trial of the former version")
        elif action is Action.RETURN_TO_NEW:
            self._exchange()
            self._note("trial over")
        elif action is Action.ROLL_BACK:
            self._roll_back("acceptance fell")

    def _apply(self, staged: Staged) -> None:
        started = time.perf_counter()
        assert self._former_flat is not None, "nothing was loaded yet"
        self._former_flat.copy_(self._weights.flat)
        self._weights.take_over(staged.flat)
        self._swap_seconds += time.perf_counter() - started
        self._former, self._current = self._current, staged.manifest
        self._newest_taken = max(self._newest_taken, staged.manifest.version)
        self._neural.version = staged.manifest.version
        self._policy.on_swap(self._neural.kind, staged.manifest.version, staged.manifest.policy)
        self._counts["swapped"] += 1
        self._note("swapped")
        log.info("swapped to version %d", staged.manifest.version)

    def _exchange(self) -> None:
        """Exchange current and former weights, for a trial or a rollback."""
        assert self._former_flat is not None and self._former is not None
        kept = self._weights.flat.clone()
        self._weights.flat.copy_(self._former_flat)
        self._former_flat.copy_(kept)
        self._former, self._current = self._current, self._former
        self._neural.version = self._current.version
        self._policy.on_swap(self._neural.kind, self._current.version, self._current.policy)

    def _roll_back(self, why: str) -> None:
        """Return to the former weights and deny the version that was serving."""
        rejected = self._current.version
        self._exchange()
        self._denied.add(rejected)
        self._counts["rolled_back"] += 1
        self._note(f"rolled back from {rejected}: {why}")
        log.warning("rolled back from version %d to %d: %s", rejected, self._current.version, why)

    def _note(self, event: str) -> None:
        entry = {"unix_s": time.time(), "event": event, "version": self._neural.version}
        self._history.append(entry)

    def _state(self) -> str:
        return "pinned" if self._pinned is not None else self._watch.state
