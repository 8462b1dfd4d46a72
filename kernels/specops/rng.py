"""Random numbers keyed by their purpose, so that no two uses share one.

A number is a pure function of (key, position, nonce, stream): batch order, padding and rows without
a draft cannot change it. ``nonce`` is the request's round number, so a position drafted again after
a rejection gets new numbers; requests with a seed keep it at 0, so a position has its numbers once
and for all: one for each token of the vocabulary, which takes part in a race (``sampling.race``).

Source of the mixer: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"
(SplitMix64), Section 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Stream(IntEnum):
    """What a number is used for. Streams are disjoint by construction."""

    DRAFT = 1
    ACCEPT = 2
    RESIDUAL = 3
    TARGET = 4


@dataclass(frozen=True, slots=True)
class Numbering:
    """The random numbers of R requests, as tensors that a CUDA graph can read."""

    keys_R: Tensor
    """[R] int64, the bits of each request's uint64 key."""
    nonces_R: Tensor
    """[R] int64, round number, or 0."""
    positions_R: Tensor
    """[R] int64, position of the first token to be decided; the others follow it."""


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
        keys_R: [R] uint64, one per request.
        positions_RK: [R, K] int64, position of the token that the number decides.
        nonces_R: [R] int64, round number, or 0.
        stream: what the numbers are used for.
    """
    with np.errstate(over="ignore"):
        bits = _mix(_host_words(keys_R, positions_RK, nonces_R, stream)) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def _host_words(
    keys_R: NDArray[np.uint64],
    positions_RK: NDArray[np.int64],
    nonces_R: NDArray[np.int64],
    stream: Stream,
) -> NDArray[np.uint64]:
    """[R, K], the state from which the numbers of a position are mixed."""
    state = _mix(keys_R + _GAMMA * np.uint64(int(stream)))
    state = _mix(state + _GAMMA * (nonces_R.astype(np.uint64) + np.uint64(1)))
    return _mix(state[:, None] + _GAMMA * (positions_RK.astype(np.uint64) + np.uint64(1)))


def device_uniforms(
    keys_R: Tensor, positions_RK: Tensor, nonces_R: Tensor, stream: Stream
) -> Tensor:
    """``uniforms`` for tensors on one device: bitwise equal, without reading them on the host.

    Args:
        keys_R: [R] int64, the bits of the uint64 keys.
        positions_RK: [R, K] int64.
        nonces_R: [R] int64.
        stream: what the numbers are used for.

    Returns:
        [R, K] float64 in [0, 1).
    """
    if not keys_R.is_cuda:
        numbers = uniforms(
            keys_R.numpy().view(np.uint64), positions_RK.numpy(), nonces_R.numpy(), stream
        )
        return torch.from_numpy(numbers)
    words_RK = _words(keys_R, positions_RK, nonces_R, stream)
    return _shifted(_mix_int64(words_RK), 11).double() * 2.0**-53


def device_exponentials(
    keys_R: Tensor, positions_RK: Tensor, nonces_R: Tensor, stream: Stream, vocab_size: int
) -> Tensor:
    """Exponential numbers of rate 1, one for each token of each position.

    Each has 52 random bits. The smallest are precise, so that improbable tokens win at their rate.

    Args:
        keys_R: [R] int64, the bits of the uint64 keys.
        positions_RK: [R, K] int64.
        nonces_R: [R] int64.
        stream: what the numbers are used for.
        vocab_size: V.

    Returns:
        [R, K, V] float64, above 0 and below 37.
    """
    if keys_R.is_cuda:
        words_RK = _words(keys_R, positions_RK, nonces_R, stream)
        gamma = _as_int64(0x9E3779B97F4A7C15)
        ids = torch.arange(1, vocab_size + 1, device=keys_R.device)
        bits = _shifted(_mix_int64(words_RK[..., None] + gamma * ids), 12)
    else:  # numpy has unsigned shifts and writes where it reads: a third of the time
        keys, positions, nonces = keys_R.numpy(), positions_RK.numpy(), nonces_R.numpy()
        with np.errstate(over="ignore"):
            words = _host_words(keys.view(np.uint64), positions, nonces, stream)
        mixed = _mix_in_place(words[..., None] + _steps(vocab_size))
        bits = torch.from_numpy(mixed.view(np.int64))
    numbers = bits.double().add_(0.5).mul_(-(2.0**-52))
    return numbers.log1p_().neg_()


def _words(keys_R: Tensor, positions_RK: Tensor, nonces_R: Tensor, stream: Stream) -> Tensor:
    """[R, K] int64, the state from which the numbers of a position are mixed."""
    gamma = _as_int64(0x9E3779B97F4A7C15)
    state = _mix_int64(keys_R + _as_int64(0x9E3779B97F4A7C15 * int(stream)))
    state = _mix_int64(state + gamma * (nonces_R + 1))
    return _mix_int64(state[:, None] + gamma * (positions_RK + 1))


@cache
def _steps(vocab_size: int) -> NDArray[np.uint64]:
    """[V] what the mixer's state grows by for each token."""
    with np.errstate(over="ignore"):
        return np.arange(1, vocab_size + 1, dtype=np.uint64) * _GAMMA


def _mix_in_place(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The upper 52 bits of ``_mix``. Overwrites its argument."""
    shifted = np.right_shift(x, np.uint64(30))
    for factor, places in ((0xBF58476D1CE4E5B9, 27), (0x94D049BB133111EB, 31)):
        np.bitwise_xor(x, shifted, out=x)
        np.multiply(x, np.uint64(factor), out=x)
        np.right_shift(x, np.uint64(places), out=shifted)
    np.bitwise_xor(x, shifted, out=x)
    return np.right_shift(x, np.uint64(12), out=x)


def _as_int64(word: int) -> int:
    """The int64 with the same 64 bits: torch has no uint64 arithmetic, and int64 wraps."""
    return (word + 2**63) % 2**64 - 2**63


def _shifted(x: Tensor, places: int) -> Tensor:
    """Logical right shift: clears the sign bits that an int64 shifts in."""
    return torch.bitwise_and(x >> places, (1 << (64 - places)) - 1)


def _mix_int64(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _as_int64(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _as_int64(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)
