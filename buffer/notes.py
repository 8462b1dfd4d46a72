"""The columns of a trace that hold what policies noted of their own decisions.

A policy names its figures (``policies.interface.Note``), a trace lists the names and keeps one
float32 for each round and name: a new policy changes neither the records nor this file. A reader
that does not know these columns passes over them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from buffer.plain_values import is_short_text
from buffer.records import Rounds

MAX_NOTES = 64
"""Names in one trace."""


def note_columns(rounds: Rounds) -> dict[str, tuple[str, NDArray[Any]]]:
    """Name -> (dtype tag, values); nothing where no policy noted anything."""
    return {"notes": ("F32", rounds.notes)} if rounds.note_names else {}


def notes_of(
    names: Any, columns: Mapping[str, tuple[str, NDArray[Any]]], num_rounds: int
) -> tuple[tuple[str, ...], NDArray[Any]]:
    """``Rounds.note_names`` and ``Rounds.notes``; empty in a trace without notes.

    Args:
        names: what the trace's text lists.
        columns: name -> (dtype tag, values).

    Raises:
        ValueError: names and column contradict each other.
    """
    if not isinstance(names, list):
        raise ValueError("notes must be a list of names")
    if not names:
        return (), np.zeros((0, 0), np.float32)
    tag, values = columns.get("notes", ("", np.zeros(0)))
    if tag != "F32" or values.size != len(names) * num_rounds:
        raise ValueError(
            f"notes must be F32 with {len(names)} rows of {num_rounds} values, "
            f"got {tag or 'nothing'} with {values.size}"
        )
    return tuple(names), values.reshape(len(names), num_rounds)


def check_notes(rounds: Rounds) -> None:
    """Check both against the other columns.

    Raises:
        ValueError: says what is wrong.
    """
    names, notes = rounds.note_names, rounds.notes
    if not all(map(is_short_text, names)) or list(names) != sorted(set(names)):
        raise ValueError("notes must have short names, all different and in order")
    if len(names) > MAX_NOTES:
        raise ValueError(f"a trace must have at most {MAX_NOTES} notes, got {len(names)}")
    shape = (len(names), len(rounds)) if names else (0, 0)
    if notes.dtype != np.float32 or notes.shape != shape:
        raise ValueError(
            f"notes must be float32 {list(shape)}, got {notes.dtype} {list(notes.shape)}"
        )
    if np.isinf(notes).any():
        raise ValueError("every note must be a finite number, or NaN where nothing was noted")


def table_of(
    names: Sequence[tuple[str, ...]], values: Sequence[tuple[float, ...]]
) -> tuple[tuple[str, ...], NDArray[np.float32]]:
    """Notes of some rounds by column.

    Args:
        names: names of each round's figures.
        values: as many figures of each.

    Returns:
        All names, and [names, rounds] float32: NaN where a round has none, or none that is finite;
        no values without names.
    """
    kinds = set(names)
    found = {name: n for n, name in enumerate(sorted({one for kind in kinds for one in kind}))}
    if not found:
        return (), np.zeros((0, 0), np.float32)
    table = np.full((len(found), len(names)), np.nan, np.float32)
    for kind in filter(None, kinds):
        at = [r for r, own in enumerate(names) if own == kind]
        rows = [found[name] for name in kind]
        with np.errstate(over="ignore"):
            table[np.ix_(rows, at)] = np.array([values[r] for r in at], np.float64).T
    table[np.isinf(table)] = np.nan
    return tuple(found), table
