"""Seconds of a step by K and batch, as they were measured: the profile of a run, or its traces.

Fixed tables for judging policies after the fact. A policy that serves follows times as they change
(``policies.step_time``, ``policies.live_costs``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from buffer.files import read_regular
from configs.choices import SettingsError
from policies.interface import CostSample
from policies.logged import LoggedStep

PROFILE_FILE = "step_times.json"
"""Where a server keeps its profile in the run folder."""
_MOST_BYTES = 1 << 20
LEAST_STEPS = 5
"""Steps of one K and batch from which on traces tell its time."""

Floats = NDArray[np.float64]


class CostTable:
    """Seconds of a step with one drafter at every K and batch: measured, or interpolated between
    its neighbours; beyond them, the last slope goes on. Never decreasing in K."""

    def __init__(self, samples: Iterable[CostSample], drafter: str, max_draft: int) -> None:
        """
        Args:
            samples: those of other drafters are passed over.

        Raises:
            ValueError: no plain step, or no step of the drafter was timed.
        """
        samples = list(samples)
        drafting = _by_batch(samples, drafter, lambda sample: sample.draft_s)
        known = _by_batch(samples, drafter, lambda sample: sample.step_s)
        whole = {batch: by_k for batch, by_k in known.items() if 0 in by_k and len(by_k) > 1}
        if not whole:
            raise ValueError(
                f"no batch size has both a plain step and one drafted by {drafter!r} that was "
                f"timed, so times of other K cannot be told"
            )
        self._batches = np.array(sorted(whole), np.float64)
        self._curves = np.array([_curve(whole[b], max_draft) for b in sorted(whole)])
        shares = np.array([_curve(drafting[b], max_draft) for b in sorted(whole)])
        self._drafting = np.minimum(shares, self._curves)
        self._found: dict[int, Floats] = {}

    def saved(self, batch: int, draft_k: int, verified_each: float) -> float:
        """Seconds by which a step at this K is shorter if it verifies only some of the draft
        tokens, in packed rows: as much as verification of a shorter K takes less. 0 if no sample
        tells drafting and verification apart.

        Args:
            verified_each: mean for each request, at most ``draft_k``.
        """
        if not self._drafting.any():
            return 0.0
        rest = [
            float(np.interp(batch, self._batches, column))
            for column in (self._curves - self._drafting).T[: draft_k + 1]
        ]
        shorter = float(np.interp(verified_each, np.arange(draft_k + 1), rest))
        return max(rest[draft_k] - shorter, 0.0)

    def seconds(self, batch: int) -> Floats:
        """[max_draft + 1] seconds at K = 0, 1, ..."""
        found = self._found.get(batch)
        if found is None:
            found = self._found[batch] = self._at(batch)
        return found

    def of_steps(self, steps: Sequence[LoggedStep]) -> Floats:
        """[S, max_draft + 1] seconds of every step at every K."""
        return np.array([self.seconds(step.batch) for step in steps])

    def samples(self, drafter: str) -> list[CostSample]:
        """The table again, as a profile for a policy that is to be judged by it."""
        return [
            CostSample(drafter if k else "none", k, int(batch), float(seconds), float(drafting))
            for batch, curve, shares in zip(
                self._batches, self._curves, self._drafting, strict=True
            )
            for k, (seconds, drafting) in enumerate(zip(curve, shares, strict=True))
        ]

    def _at(self, batch: int) -> Floats:
        batches, curves = self._batches, self._curves
        if batch > batches[-1] and len(batches) > 1:
            slope = (curves[-1] - curves[-2]) / (batches[-1] - batches[-2])
            found: Floats = curves[-1] + np.maximum(slope, 0.0) * (batch - batches[-1])
            return found
        return np.array([np.interp(batch, batches, curve) for curve in curves.T])


def _by_batch(
    samples: Iterable[CostSample], drafter: str, value: Callable[[CostSample], float]
) -> dict[int, dict[int, float]]:
    """Medians of plain steps and of one drafter's, by batch and K."""
    cells: dict[int, dict[int, list[float]]] = {}
    for sample in samples:
        if sample.draft_k == 0 or sample.drafter == drafter:
            at = cells.setdefault(sample.batch, {}).setdefault(sample.draft_k, [])
            at.append(value(sample))
    return {batch: {k: median(v) for k, v in by_k.items()} for batch, by_k in cells.items()}


def are_enough(samples: Iterable[CostSample], drafter: str) -> bool:
    """A ``CostTable`` can be made of them: some batch has a plain step and one of the drafter."""
    cells = _by_batch(samples, drafter, lambda sample: sample.step_s).values()
    return any(0 in by_k and len(by_k) > 1 for by_k in cells)


def _curve(by_k: dict[int, float], max_draft: int) -> Floats:
    at = np.array(sorted(by_k))
    values = np.array([by_k[k] for k in sorted(by_k)])
    ks = np.arange(max_draft + 1)
    slope = max((values[-1] - values[-2]) / (at[-1] - at[-2]), 0.0)
    curve: Floats = np.interp(ks, at, values) + slope * np.maximum(ks - at[-1], 0)
    return np.maximum.accumulate(curve)


def profile_of(run_dir: Path) -> list[CostSample]:
    """The profile that a server left in a run folder; empty if it left none.

    Raises:
        SettingsError: the file is damaged.
    """
    path = run_dir / PROFILE_FILE
    try:
        stored: Any = json.loads(read_regular(path, _MOST_BYTES, follow=True))
        samples = [CostSample(**sample) for sample in stored["samples"]]
        if not all(0 < sample.step_s < math.inf for sample in samples):
            raise ValueError("a step takes no time, or forever")
    except FileNotFoundError:
        return []
    except (TypeError, KeyError, ValueError) as error:
        raise SettingsError(
            f"{path} is no profile ({error}); delete it, and the next start of the server measures "
            f"again, or use --times traces"
        ) from None
    return samples


def times_of(steps: Iterable[LoggedStep]) -> list[CostSample]:
    """Median times of the steps of a log, by drafter, K and batch; a step of several drafters is no
    single one's. Of old traces, which do not tell
    which steps computed prompts as well, those are among them; as long as they are the fewer, a
    median passes over them."""
    times: dict[tuple[str, int, int], list[float]] = {}
    for step in steps:
        if not step.is_timed or step.is_mixed:
            continue
        drafter = step.drafter if step.draft_k else "none"
        times.setdefault((drafter, step.draft_k, step.batch), []).append(step.step_s)
    return [
        CostSample(drafter, k, batch, median(found), 0.0)
        for (drafter, k, batch), found in sorted(times.items())
        if len(found) >= LEAST_STEPS
    ]
