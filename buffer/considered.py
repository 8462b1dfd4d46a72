"""Columns of a trace that say how long drafts were before the device cut them, and by what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from buffer.records import FIGURES, Considering, Count, Rounds


def considered_columns(rounds: Rounds) -> dict[str, tuple[str, NDArray[Any]]]:
    """Name -> (dtype tag, values); nothing where no draft could be cut."""
    if not rounds.considered.size:
        return {}
    return {"considered": ("I32", rounds.considered), "confidence": ("F32", rounds.confidence)}


def considered_of(
    columns: Mapping[str, tuple[str, NDArray[Any]]], num_rounds: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """``Rounds.considered`` and ``Rounds.confidence``; empty in a trace whose drafts could not be
    cut. Further rows are passed over.

    Args:
        columns: name -> (dtype tag, values).

    Raises:
        ValueError: one of both is missing, or has another dtype or length.
    """
    if "considered" not in columns:
        return np.zeros((0, 0), np.int32), np.zeros(0, np.float32)
    tag, values = columns["considered"]
    other, confidence = columns.get("confidence", ("", values))
    rows = values.size // num_rounds if num_rounds else 0
    if tag != "I32" or rows < len(Considering) or values.size != rows * num_rounds:
        raise ValueError(
            f"considered must be I32 with {len(Considering)} values for each of {num_rounds} "
            f"rounds, got {tag} with {values.size}"
        )
    if other != "F32":
        raise ValueError("confidence must be F32 where drafts could be cut")
    return values.reshape(rows, num_rounds)[: len(Considering)], confidence


def check_considered(rounds: Rounds) -> None:
    """Check both columns against the others.

    Raises:
        ValueError: says what is wrong.
    """
    considered, confidence = rounds.considered, rounds.confidence
    if considered.dtype != np.int32 or confidence.dtype != np.float32 or confidence.ndim != 1:
        raise ValueError("considered must be int32, and confidence float32 of one dimension")
    if not considered.size:
        if confidence.size:
            raise ValueError("confidence must be empty where no draft could be cut")
        return
    if considered.shape != (len(Considering), len(rounds)):
        raise ValueError(
            f"considered must be {[len(Considering), len(rounds)]}, got {list(considered.shape)}"
        )
    length, may_cut = considered[Considering.LENGTH], considered[Considering.MAY_CUT]
    if length.min() < 0 or may_cut.min() < 0 or may_cut.max() > 1:
        raise ValueError("considered must hold lengths >= 0, and 0 or 1")
    is_noted = length > 0
    if (rounds.counts[Count.NUM_DRAFTED] > length - 1)[is_noted].any():
        raise ValueError("a draft must not be longer than it was before it was cut")
    num_figures = FIGURES * int((length[is_noted].astype(np.int64) - 1).sum())
    if confidence.size != num_figures:
        raise ValueError(f"confidence must hold {num_figures} values, got {confidence.size}")
    if confidence.size and not (confidence.min() >= 0 and confidence.max() < np.inf):
        raise ValueError("every value of confidence must be finite and >= 0")
