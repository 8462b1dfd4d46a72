"""Checks of single values in the text of a record."""

from __future__ import annotations

import math
from typing import Any

_MAX_TEXT = 4096


def is_short_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_TEXT


def is_sampling_value(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, str):
        return len(value) <= _MAX_TEXT
    return value is None or isinstance(value, int)


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def is_temperature(value: Any) -> bool:
    """An integer up to what a float holds exactly, or a float; finite and >= 0."""
    if type(value) is int:
        return 0 <= value < 1 << 53
    return isinstance(value, float) and 0 <= value < math.inf
