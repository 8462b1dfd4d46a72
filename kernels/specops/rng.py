"""Random numbers keyed by what they are for, so that no two uses can share one.

A draw is a pure function of (key, position, nonce, stream): batch order, padding and zero-draft
rows cannot move it. ``nonce`` is the request's round number, so a position that is drafted again
after a rejection gets fresh numbers; requests with a seed leave it at 0 and draw once a position.

Source of the mixer: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"
(SplitMix64), Section 5.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Stream(IntEnum):
    """What a number is drawn for. Disjoint by construction."""

    DRAFT = 1
    ACCEPT = 2
    RESIDUAL = 3
    TARGET = 4
    POLICY = 5


_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(
    keys_R: NDArray[np.uint64],
    positions_RK: NDArray[np.int64],
    nonces_R: NDArray[np.int64],
    stream: Stream,
) -> NDArray[np.float64]:
    """[R, K] float64 in [0, 1), 53 random bits each.

    Args:
        keys_R: [R] uint64, one a request.
        positions_RK: [R, K] int64, position of the token the number decides on.
        nonces_R: [R] int64, round number, or 0.
        stream: what the number is for.
    """
    with np.errstate(over="ignore"):
        state = _mix(keys_R + _GAMMA * np.uint64(int(stream)))
        state = _mix(state + _GAMMA * (nonces_R.astype(np.uint64) + np.uint64(1)))
        words = _mix(state[:, None] + _GAMMA * (positions_RK.astype(np.uint64) + np.uint64(1)))
        bits = _mix(words) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53
