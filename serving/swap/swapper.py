"""Chooses the weights that serve: loads newer versions, judges them, and rolls back worse ones.

``between_steps`` and ``on_rounds`` run on the engine's thread and only copy a staged buffer or add
numbers. Everything that touches storage runs on the watcher's thread or the caller's.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from buffer.bundles import BundleError
from buffer.weights_store import StoreDamagedError, WeightsStore
from configs.logs import Outage
from policies.rollback import Action, SwapWatch
from policies.side_by_side import SideBySide
from serving.swap.flat_weights import Expected, RefusedError, Staged, load_bundle
from serving.swap.in_force import (
    FAILED_POLICIES,
    IGNORED_CALIBRATIONS,
    WeightsInForce,
    weights_are_same,
)

log = logging.getLogger(__name__)

_RENEW_S = 600.0
"""Interval at which the in-use mark is renewed; a mark is valid for a day."""
_LEAST_SHARE = 0.2
"""Share of the steps in which the drafter must draft for its trial to go on. A policy that falls
silent would prolong it for minutes, in which newer versions wait."""
_RETRY_S = 5.0
"""The same after a failure."""


@dataclass(slots=True)
class _Order:
    """A swap or a rollback that waits for the engine's thread."""

    staged: Staged | None
    """``None``: roll back."""
    done: threading.Event
    is_former: bool = False
    """The weights are for drafting beside those in force."""


def log_outage(outage: Outage, error: OSError | None) -> None:
    """Log that the store failed, or works again (``None``), if that is worth a line."""
    if error is None:
        if line := outage.ended():
            log.info("%s", line)
    elif line := outage.failed(str(error)):
        log.warning("%s; serving continues, and this is tried again", line)


class Shelf:
    """This server's view of the weights store: what it may take, and what it keeps in use."""

    def __init__(self, store: WeightsStore, producer: str, expected: Expected) -> None:
        self.store = store
        self._producer = producer
        self._expected = expected
        self._denied_written: set[int] | None = None
        with contextlib.suppress(OSError):
            try:
                self._denied_written = set(store.read_denied())
            except StoreDamagedError:  # left as it is until there is something to add
                self._denied_written = set()
        self._failed: dict[int, Hashable] = {}
        self._mark_due_s = 0.0
        self._outage = Outage("record which versions are in use or rolled back")

    def target_changed(self, fingerprint: str) -> None:
        """Take versions made for these weights of the target from now on, and no others."""
        self._expected = replace(self._expected, target_fingerprint=fingerprint)
        self._failed.clear()  # one made for them may have come before them

    def mark(self, versions: set[int]) -> None:
        """Keep versions from being pruned. If the disk refuses, they are served nevertheless: they
        are in memory."""
        with self._noting():
            self._mark_due_s = time.monotonic() + _RETRY_S
            self.store.mark_in_use(self._producer, versions)
            self._mark_due_s = time.monotonic() + _RENEW_S

    def renew(self, versions: set[int]) -> None:
        """``mark`` again, if the last mark is old or failed."""
        if time.monotonic() >= self._mark_due_s:
            self.mark(versions)

    def unmark(self) -> None:
        with self._noting():
            self.store.unmark_in_use(self._producer)

    def remember_denied(self, denied: set[int]) -> None:
        """Store rolled-back versions, so that a restart does not begin with one of them."""
        if denied == self._denied_written:
            return
        with self._noting():
            wanted, others = set(denied), set[int]()  # others: by further servers of the run
            with contextlib.suppress(ValueError):  # the list is unreadable: ours replaces it
                others = self.store.read_denied()
            self.store.write_denied(wanted | others)
            self._denied_written = wanted  # only now: a full disk must not make us forget them

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        """Storing what this server does with versions. That it fails is logged, and costs no
        more."""
        try:
            yield
        except OSError as error:
            log_outage(self._outage, error)
        else:
            log_outage(self._outage, None)

    def load(self, version: int, force: WeightsInForce) -> Staged:
        """Read, check and stage a version.

        Raises:
            RefusedError: the message says why.
        """
        self.mark(force.versions() | {version})
        staged = load_bundle(self.store, version, force.weights, self._expected)
        force.make_room()
        return staged

    def newest_after(self, version: int) -> int | None:
        """Newest version after ``version``, unless it failed before and has not changed since."""
        newest = max((v for v in self.store.versions() if v > version), default=None)
        if newest is not None and self._failed.get(newest) == self.store.change_mark(newest):
            return None
        return newest

    def known_versions(self) -> list[int]:
        """Published versions; none while the store does not say."""
        try:
            return self.store.versions()
        except OSError:  # of a disk, or a service that is away
            return []

    def note_failure(self, version: int, mark: Hashable) -> None:
        """Do not try a version again until it changes."""
        self._failed[version] = mark


class Swapper:
    """Swaps, watches and rolls back the weights of one neural drafter."""

    def __init__(
        self,
        *,
        force: WeightsInForce,
        shelf: Shelf,
        poll_s: float,
        watch: SwapWatch,
        automatic: bool,
        wake_engine: Callable[[], None],
    ) -> None:
        """
        Args:
            poll_s: seconds between two polls of the store.
            automatic: take newer versions without being asked.
        """
        self._force = force
        self._shelf = shelf
        self._poll_s = poll_s
        self._watch = watch
        self._automatic = automatic
        self._wake_engine = wake_engine

        self._sides = SideBySide(watch.num_blocks)
        self._pinned: int | None = None
        # No lock: a deque is safe between two threads, and the engine's thread must not take one.
        self._orders: deque[_Order] = deque()
        # Held while loading and handing over; never taken by the engine's thread.
        self._one_swap = threading.RLock()
        self._last_error: str | None = None
        self._refusals: Counter[str] = Counter()
        self._stopping = threading.Event()
        self._look_now = threading.Event()
        """Something was published, or this swapper stops."""
        self._thread = threading.Thread(target=self._run, name="swapper", daemon=True)

    # ---- other threads -------------------------------------------------------------------------

    def start(self) -> None:
        with self._one_swap:
            self._shelf.mark(self._force.versions())
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._look_now.set()
        if self._thread.is_alive():
            self._thread.join(5.0)
        self._shelf.remember_denied(self._force.denied)
        self._shelf.unmark()

    def status(self) -> dict[str, Any]:
        """What ``GET /admin/drafter`` shows."""
        force, known = self._force, self._shelf.known_versions()
        newest = max(known, default=force.current.version)
        return {
            "kind": force.kind,
            "version": force.version,
            "parent": force.current.parent,
            "staleness": max(newest - force.version, 0),
            "state": "pinned" if self._pinned is not None else self._watch.state,
            "pinned": self._pinned,
            "versions": known,
            "former": force.former.version if force.former else None,
            "drafts_beside": force.drafts_beside,
            "denied": sorted(force.denied),
            "gate": force.current.gate,
            "swaps": self.counts(),
            "refusals": self.refusals(),
            IGNORED_CALIBRATIONS: self.num_ignored_calibrations,
            "swap_seconds": force.swap_seconds,
            "history": list(force.history[-200:]),
            "last_error": self._last_error,
        }

    def counts(self) -> dict[str, int]:
        """``swapped``, ``rejected``, ``rolled_back``."""
        return {k: self._force.counts[k] for k in ("swapped", "rejected", "rolled_back")}

    def refusals(self) -> dict[str, int]:
        """``rejected`` by reason, see ``RefusedError``."""
        return dict(self._refusals)

    @property
    def num_ignored_calibrations(self) -> int:
        """Versions in use, now or before, whose calibration is malformed."""
        return self._force.counts[IGNORED_CALIBRATIONS]

    @property
    def num_failed_policies(self) -> int:
        """Swaps that the policy failed to take in."""
        return self._force.counts[FAILED_POLICIES]

    @property
    def swap_seconds(self) -> float:
        return self._force.swap_seconds

    @property
    def learning_s(self) -> float | None:
        """Seconds that learning took up to the newest version that was taken, as far as its
        trainer says."""
        found = self._force.current.gate.get("learning_s")
        return float(found) if isinstance(found, int | float) else None

    def swap(self, version: int | None, timeout_s: float = 30.0) -> dict[str, Any]:
        """Swap on request: a number pins that version, ``None`` unpins and takes the newest.

        Raises:
            ValueError: there is no such version, or it was refused; the old one keeps serving.
        """
        with self._one_swap:
            return self._swap(version, timeout_s)

    def _swap(self, version: int | None, timeout_s: float) -> dict[str, Any]:
        try:
            published = self._shelf.store.versions()
        except OSError as error:
            raise ValueError(f"the published versions cannot be read at present: {error}") from None
        known = [v for v in published if v not in self._force.denied]
        if version is None and not known:
            raise ValueError("no version is published")
        wanted = max(known) if version is None else version
        if wanted not in published:
            raise ValueError(f"version {wanted} is not published; known: {published}")
        staged = None if wanted == self._force.current.version else self._load(wanted)
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
            former = self._force.former
            if former is None:
                raise ValueError("there is no former version to return to")
            if former.version in self._force.denied:
                raise ValueError(
                    f"there is no former version to return to: version {former.version} was "
                    f"rolled back before"
                )
            self._hand_over(None, timeout_s)
            return self.status()

    def _hand_over(
        self, staged: Staged | None, timeout_s: float, *, is_former: bool = False
    ) -> None:
        """Give an order to the engine's thread and wait until it is carried out."""
        order = _Order(staged, threading.Event(), is_former)
        self._orders.append(order)
        self._wake_engine()
        if not order.done.wait(timeout_s):
            raise ValueError("the engine did not take the order in time; it will when it wakes up")
        self._shelf.mark(self._force.versions())

    def _load(self, version: int) -> Staged:
        try:
            staged = self._shelf.load(version, self._force)
        except RefusedError as error:
            self._force.counts["rejected"] += 1
            self._refusals[error.reason] += 1
            self._last_error = str(error)
            log.warning("%s", error)
            raise
        self._last_error = None
        return staged

    # ---- the watcher's thread ------------------------------------------------------------------

    def _run(self) -> None:
        end_watch = self._shelf.store.watch(self._look_now.set)
        try:
            self._take_parent()
            self._run_until_stopped()
        finally:
            end_watch()

    def _take_parent(self) -> None:
        """After a start, let the parent of the version in force draft beside it, as it did before:
        the newest version may be one that the policy had abandoned."""
        force = self._force
        parent = force.current.parent
        if force.beside_kind is None or parent is None or parent in force.denied:
            return
        try:
            with self._one_swap:
                if force.former is None and parent in self._shelf.known_versions():
                    self._hand_over(self._load(parent), timeout_s=30.0, is_former=True)
        except (OSError, ValueError) as error:
            log.info("version %d does not draft beside its successor: %s", parent, error)

    def _run_until_stopped(self) -> None:
        outage = Outage("look for new versions")
        while not self._stopping.is_set():
            self._look_now.wait(self._poll_s)
            self._look_now.clear()
            if self._stopping.is_set():
                return
            try:
                with self._one_swap:
                    self._shelf.remember_denied(self._force.denied)
                    self._shelf.renew(self._force.versions())
                    if self._automatic and self._pinned is None and not self._on_trial:
                        self._look()
            except OSError as error:  # a disk that fails must not stop the watcher
                log_outage(outage, error)
                self._last_error = str(error)
            else:
                log_outage(outage, None)

    @property
    def _on_trial(self) -> bool:
        """True while a version is judged; another swap would spoil the evidence."""
        is_judged = self._watch.state in ("trial", "confirming")
        return is_judged and self._sides.drafter.value >= _LEAST_SHARE

    def _look(self) -> None:
        """Swap to the newest version, unless it is not newer or failed before and is unchanged."""
        version = self._shelf.newest_after(self._force.newest_taken)
        if version is None:
            return
        if self._watch.state != "steady" and self._brings_policy_alone(version):
            return  # the weights are still watched, and what they had replaced must not be lost
        mark = self._shelf.store.change_mark(version)
        try:
            self._hand_over(self._load(version), timeout_s=30.0)
        except ValueError:
            self._shelf.note_failure(version, mark)

    def _brings_policy_alone(self, version: int) -> bool:
        """A version with the weights in force, while these draft enough to be judged soon."""
        if self._sides.drafter.value < _LEAST_SHARE:
            return False
        try:
            manifest = self._shelf.store.read_manifest(version)
        except BundleError:
            return False  # loading it says why
        return weights_are_same(manifest, self._force.current)

    # ---- the engine's thread -------------------------------------------------------------------

    def between_steps(self) -> None:
        """Carry out a waiting order: one in-place copy."""
        self._force.draft_alone(self._pinned is not None)
        self._sides.step(self._force.drafting())
        if not self._orders:
            return
        order = self._orders.popleft()
        if order.staged is None:
            self._roll_back()
        elif order.is_former:
            self._force.take_former(order.staged)
        else:
            self._take(order.staged)
        order.done.set()

    def _roll_back(self) -> None:
        """By order. In a trial it is the former version that decodes, and it is not that one which
        somebody wants to be rid of. The watch has nothing to judge any more."""
        if self._watch.state == "trial":
            self._force.exchange("trial over")
        self._force.roll_back("by order")
        self._watch.go_on_from(self._force.version)

    def _take(self, staged: Staged) -> None:
        """Serve a loaded version. Beside it stays the one that has drafted most of those two that
        could: that need not be its predecessor."""
        better = self._sides.preferred_to(self._force.version)
        keeps_former = better is not None and better != staged.manifest.version
        if better is not None and keeps_former:
            self._force.note(f"given up for {better}, which drafted more")
            self._watch.go_on_from(better, self._sides.blocks_of(better))
        elif self._watch.is_judging(staged.manifest.version):  # somebody has ordered it
            self._watch.go_on_from(staged.manifest.version)
        replaced = self._force.current
        self._force.take(staged, keeps_former=keeps_former)
        if weights_are_same(staged.manifest, replaced):
            self._sides.renamed(replaced.version, staged.manifest.version)
        former = self._force.former
        if former is not None and self._force.has_same_weights:
            self._watch.renamed(former.version, self._force.version)

    def target_changed(self, fingerprint: str) -> None:
        """The target's weights were replaced. The drafter in force goes on."""
        self._shelf.target_changed(fingerprint)
        self._force.note("the target's weights were replaced")

    def on_rounds(self, drafter: str, rounds: list[tuple[int, int]]) -> None:
        """Report (proposed, accepted) of each of a drafter's rounds in one step."""
        version = self._force.version_of(drafter)
        if version is None:
            return
        proposed, accepted = sum(p for p, _ in rounds), sum(a for _, a in rounds)
        num_rounds = sum(p > 0 for p, _ in rounds)
        self._sides.drafted(version, accepted, num_rounds)
        if drafter != self._force.kind:
            return
        self._sides.drafter.drafted()
        if self._pinned is not None:
            return
        action = self._watch.observe(version, proposed, accepted, num_rounds)
        if action is Action.TRY_FORMER:
            self._force.exchange("trial of the former version")
        elif action is Action.RETURN_TO_NEW:
            self._force.exchange("trial over")
        elif action is Action.ROLL_BACK:
            self._force.roll_back("acceptance fell")
