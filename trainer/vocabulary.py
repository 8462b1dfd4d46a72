"""The tokens that traffic uses, for a drafter that proposes no others."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from buffer.records import Trace

Counts = npt.NDArray[np.int64]


def count_generated(traces: Iterable[Trace], vocab_size: int, fingerprint: str) -> Counts:
    """[V] how often each token was generated in traces of one target.

    Prompts do not count: a drafter never proposes them.
    """
    counts: Counts = np.zeros(vocab_size, dtype=np.int64)
    for trace in traces:
        if trace.target_fingerprint == fingerprint:
            generated = trace.token_ids[trace.prompt_length :]
            counts += np.bincount(generated[generated < vocab_size], minlength=vocab_size)
    return counts


def most_used(counts: Counts, size: int) -> list[int]:
    """Ids of the ``size`` tokens generated most often, ascending; of equal ones the lower ids.

    Raises:
        ValueError: nothing was counted, or there are fewer tokens than ``size``.
    """
    if not 1 <= size <= len(counts):
        raise ValueError(f"size must be in 1..{len(counts)}, the target's vocabulary, got {size}")
    if not counts.any():
        raise ValueError("the log holds no generated tokens of this target")
    order = np.lexsort((np.arange(len(counts)), -counts))
    return sorted(order[:size].tolist())


def coverage(counts: Counts, ids: list[int]) -> float:
    """Share of the generated tokens that are in ``ids``."""
    return float(counts[ids].sum() / counts.sum())
