"""Selection of traces for training: the newest and a uniform sample of older ones, none held out.

Pure functions of their state; randomness is a hash of seed and position.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Replay(Generic[T]):
    """The newest traces, and a reservoir sampled from all older ones."""

    recent: tuple[T, ...] = ()
    """Oldest first."""
    reservoir: tuple[T, ...] = ()
    """Unordered."""
    num_left: int = 0
    """Traces that ever left ``recent``; the reservoir is a uniform sample of them."""


def add(
    replay: Replay[T],
    traces: Sequence[T],
    *,
    recent_traces: int,
    reservoir_traces: int,
    seed: int,
) -> Replay[T]:
    """Add new traces, oldest first; those pushed out of ``recent`` may enter the reservoir.

    Either part may have shrunk since the last call: what no longer fits leaves.
    """
    recent = (*replay.recent, *traces)
    num_out = max(0, len(recent) - recent_traces)
    reservoir = _thinned(replay.reservoir, reservoir_traces, f"{seed}/{replay.num_left}")
    for index, trace in enumerate(recent[:num_out], replay.num_left):
        _sample_into(reservoir, trace, index, reservoir_traces, seed)
    return Replay(recent[num_out:], tuple(reservoir), replay.num_left + num_out)


def _thinned(items: Sequence[T], size: int, seed: str) -> list[T]:
    """At most ``size`` of the items, each as likely as the others: a uniform sample stays one."""
    if len(items) <= size:
        return list(items)
    order = sorted(range(len(items)), key=lambda place: _hash(f"{seed}/{place}"))
    return [items[place] for place in sorted(order[:size])]


def _sample_into(reservoir: list[T], trace: T, index: int, size: int, seed: int) -> None:
    """Vitter's algorithm R for one item; ``index`` counts from 0."""
    if len(reservoir) < size:
        reservoir.append(trace)
        return
    slot = _hash(f"{seed}/{index}") % (index + 1)
    if slot < size:
        reservoir[slot] = trace


def is_held_out(trace_key: str, every: int) -> bool:
    """True for one trace in ``every``, which judges candidates and is never trained on.

    Depends only on the key, so a restarted trainer splits the same way.

    Args:
        trace_key: e.g. ``producer/epoch/seq``.
        every: >= 1.
    """
    if every < 1:
        raise ValueError(f"every must be >= 1, got {every}")
    return _hash(trace_key) % every == 0


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
