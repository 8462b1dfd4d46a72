"""The running server without its HTTP layer: engine, recorder and swapper."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

from buffer.load import LoadWriter
from policies.arms import ArmPolicies
from policies.interface import DraftPolicy
from policies.savings import Savings
from serving.capture.apart import RecorderProcess
from serving.capture.recorder import Recorder
from serving.capture.traces import TraceMaker
from serving.engine.inbox import Inbox
from serving.engine.loop import Engine
from serving.requests import EngineFigures
from serving.served_model import ServedModel
from serving.swap.swapper import Swapper
from serving.swap.target_update import TargetUpdates

log = logging.getLogger(__name__)

_FULL_COLLECTION = 1000
"""Collections of the middle generation between two full collections: a quarter of an hour at full
load, where Python's default of 10 makes it 8 seconds."""


class Service:
    """It starts and stops its parts together. ``serving.border`` shows it to HTTP."""

    def __init__(
        self,
        model: ServedModel,
        engine: Engine,
        recorder: Recorder | RecorderProcess | None,
        maker: TraceMaker | None,
        swappers: Mapping[str, Swapper],
        policies: ArmPolicies | None = None,
        savings: Savings | None = None,
        target: TargetUpdates | None = None,
        *,
        load: LoadWriter | None = None,
    ) -> None:
        """
        Args:
            swappers: of each drafter that learns, by kind, the main drafter first.
            policies: the engine's policy among those of arms; ``None``: it has no others.
            savings: counts what drafting saves; ``None``: nobody knows what plain steps take.
            target: replaces the target's weights; ``None``: they stay as they are.
            load: shows a trainer on this host how fast requests are decoded; closed by ``stop``.
        """
        self.model = model
        self.engine = engine
        self.recorder = recorder
        self.maker = maker
        self.swappers = swappers
        self.target = target
        self._policies = policies
        self._savings = savings
        self._load = load
        self._thresholds = gc.get_threshold()

    @property
    def swapper(self) -> Swapper | None:
        """The main drafter's; ``None`` if none learns."""
        return next(iter(self.swappers.values()), None)

    def swapper_of(self, drafter: str | None) -> Swapper:
        """The swapper of a drafter; ``None``: of the main one.

        Raises:
            ValueError: there is no such drafter that learns.
        """
        if not self.swappers:
            raise ValueError("this server has no drafter that learns")
        kind = next(iter(self.swappers)) if drafter is None else drafter
        if kind not in self.swappers:
            known = ", ".join(self.swappers)
            raise ValueError(f"no drafter {kind!r} learns in this server; those that do: {known}")
        return self.swappers[kind]

    @property
    def inbox(self) -> Inbox:
        """Takes requests from other threads."""
        return self.engine.inbox

    @property
    def policy(self) -> DraftPolicy | ArmPolicies:
        """The engine's policy, with those of arms if it has any."""
        return self.engine.policy if self._policies is None else self._policies

    def policy_figures(self) -> dict[str, Any]:
        """What the policy shows of itself, for the dashboard; where that fails, only that."""
        try:
            figures = self.policy.figures()
        except Exception as error:  # of a policy from anybody, and about figures alone
            log.exception("the policy's figures cannot be shown")
            figures = {"kind": type(self.engine.policy).__name__, "error": repr(error)}
        failures = self.figures().policy_failures
        return figures | ({"failures": failures} if failures else {})

    def complaint(self) -> str | None:
        """Why this server should get no requests; ``None`` if it is ready."""
        return self.engine.complaint()

    def start(self) -> None:
        """Begin decoding, recording and watching for new versions.

        First it hides all existing objects from the garbage collector, until ``stop``: 400,000
        objects of torch, transformers and the engine that live as long as the server. A full
        collection takes 0.16 s to traverse them, on whatever thread it starts; no other thread runs
        Python meanwhile, so no step begins. The rounds of the requests in flight are 100,000 more,
        40 ms, so full collections, which find next to nothing, are made rare.
        """
        gc.collect()
        gc.freeze()
        youngest, middle, _ = self._thresholds
        gc.set_threshold(youngest, middle, _FULL_COLLECTION)
        if self.target:
            self.target.announce()
        if self.recorder:
            self.recorder.start()
        self.engine.start()
        for swapper in self.swappers.values():
            swapper.start()

    def stop(self) -> None:
        """Stop everything; queued traces are written first."""
        for swapper in self.swappers.values():
            swapper.stop()
        self.engine.stop()
        if self._load:
            self._load.close()
        if self.recorder:
            self.recorder.close(timeout_s=10.0)
        gc.unfreeze()  # the engine is garbage once its last user is gone
        gc.set_threshold(*self._thresholds)

    def figures(self) -> EngineFigures:
        """The engine's figures with those of swaps and traces."""
        found, swappers = self.engine.figures(), self.swappers.values()
        return replace(
            found,
            policy_failures=found.policy_failures + sum(x.num_failed_policies for x in swappers),
            swaps=_sums(one.counts() for one in swappers),
            refusals=_sums(one.refusals() for one in swappers),
            ignored_calibrations=sum(one.num_ignored_calibrations for one in swappers),
            swap_seconds=sum((one.swap_seconds for one in swappers), 0.0),
            traces=self.recorder.counts() if self.recorder else {},
            capture_rows_dropped=self._num_lost_rows(),
            target_version=self.target.version if self.target else 0,
            target_updates=self.target.counts() if self.target else {},
            target_update_seconds=self.target.seconds if self.target else 0.0,
            target_untraced=self.target.num_untraced if self.target else 0,
            extra={name: value for name, value in self._payback().items() if value is not None},
        )

    def _num_lost_rows(self) -> int:
        elsewhere = isinstance(self.recorder, RecorderProcess) and self.recorder.num_lost_rows
        return int(elsewhere) + (self.maker.num_lost_rows if self.maker else 0)

    def _payback(self) -> dict[str, float | None]:
        """Time of decoding, what it would have taken without drafts, and what learning took."""
        savings = self._savings
        known = [one.learning_s for one in self.swappers.values()]
        each_s = [seconds for seconds in known if seconds is not None]
        learning_s = sum(each_s) if each_s else None
        if savings is None:
            return {"learning_seconds": learning_s}
        return {
            "decode_seconds": savings.decode_s,
            "plain_seconds": savings.plain_s,
            "saved_seconds": savings.saved_s,
            "learning_seconds": learning_s,
            "payback_ratio": savings.saved_s / learning_s if learning_s else None,
        }

    def drafter_status(self) -> dict[str, Any]:
        """Kind, version, parent, staleness, state and history of the main drafter, the same of
        those beside it, and what is known of every drafter; what drafting has saved and learning
        has taken."""
        return self._learning_status() | {
            "beside": [one.status() for one in list(self.swappers.values())[1:]],
            "drafters": self._drafters(),
            "payback": self._payback(),
        }

    def _drafters(self) -> list[dict[str, Any]]:
        """Kind and traits of every drafter, and whether it drafts on request only."""
        drafting = self.engine.drafting
        return [
            {"kind": kind, "on_request": kind in drafting.on_request, **asdict(drafter.traits)}
            for kind, drafter in drafting.drafters.items()
        ]

    def _learning_status(self) -> dict[str, Any]:
        if self.swapper:
            return self.swapper.status()
        kind = next(iter(self.engine.drafting.drafters), "none")
        return {
            "kind": kind,
            "version": 0,
            "parent": None,
            "staleness": 0,
            "state": "steady",
            "versions": [],
            "former": None,
            "last_error": None,
        }


def _sums(found: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Counts by name over all drafters; names of every one, also where the count is 0."""
    sums: dict[str, int] = {}
    for counts in found:
        for name, count in counts.items():
            sums[name] = sums.get(name, 0) + count
    return sums
