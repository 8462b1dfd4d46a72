"""Random numbers computed on a device are bitwise those computed on the host."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from specops.laws_triton import exponential, uniform, word_of
from specops.rng import Stream, _mix, device_exponentials, device_uniforms, uniforms

EXTREMES = [0, 1, -1, 2**31, -(2**31), 2**32 - 1, 2**63 - 1, -(2**63), 0x1E3779B97F4A7C15]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@triton.jit
def _numbers(keys_ptr, positions_ptr, nonces_ptr, out_ptr, K, STREAM: tl.constexpr):
    row, place = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions_ptr + row * K + place)
    number = uniform(tl.load(keys_ptr + row), tl.load(nonces_ptr + row), position, STREAM)
    tl.store(out_ptr + row * K + place, number)


def inputs():
    """All combinations of extreme keys, nonces and positions, and random ones."""
    generator = np.random.default_rng(0)
    drawn = generator.integers(-(2**63), 2**63 - 1, size=(200, 3), dtype=np.int64)
    keys = np.array([k for k in EXTREMES for _ in EXTREMES] + drawn[:, 0].tolist(), dtype=np.int64)
    nonces = np.array(EXTREMES * len(EXTREMES) + drawn[:, 1].tolist(), dtype=np.int64)
    positions = np.tile(np.array(EXTREMES, dtype=np.int64), (len(keys), 1))
    positions[-200:, 0] = drawn[:, 2]
    return keys, positions, nonces


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stream", list(Stream))
def test_numbers_made_on_tensors_have_the_same_bits(stream, device):
    keys, positions, nonces = inputs()

    want = uniforms(keys.view(np.uint64), positions, nonces, stream)
    tensors = [torch.from_numpy(array).to(device) for array in (keys, positions, nonces)]
    got = device_uniforms(*tensors, stream).cpu().numpy()

    assert got.dtype == np.float64
    assert np.array_equal(got, want)


def test_numbers_made_in_a_kernel_have_the_same_bits():
    device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    keys, positions, nonces = (array[-40:] for array in inputs())
    keys, nonces = keys.copy(), nonces.copy()
    keys[: len(EXTREMES)] = EXTREMES
    want = uniforms(keys.view(np.uint64), positions, nonces, Stream.TARGET)
    tensors = [torch.tensor(array, device=device) for array in (keys, positions, nonces)]
    got = torch.empty(positions.shape, dtype=torch.float64, device=device)

    _numbers[positions.shape](*tensors, got, positions.shape[1], STREAM=int(Stream.TARGET))

    assert np.array_equal(got.cpu().numpy(), want)


def test_each_token_has_a_number_of_its_own_mixed_from_the_position_s():
    """Bit for bit: SplitMix64 seeded by the position, one step for each token."""
    keys, positions, nonces = inputs()
    keys, positions, nonces = keys[-40:], positions[-40:], nonces[-40:]
    with np.errstate(over="ignore"):
        gamma, one = np.uint64(0x9E3779B97F4A7C15), np.uint64(1)
        state = _mix(keys.view(np.uint64) + gamma * np.uint64(int(Stream.TARGET)))
        state = _mix(state + gamma * (nonces.view(np.uint64) + one))
        words = _mix(state[:, None] + gamma * (positions.view(np.uint64) + one))
        ids = np.arange(1, 101, dtype=np.uint64)
        bits = _mix(words[..., None] + gamma * ids) >> np.uint64(12)
    want = -torch.log1p(-(torch.from_numpy(bits.astype(np.float64)) + 0.5) * 2.0**-52)

    tensors = [torch.from_numpy(array) for array in (keys, positions, nonces)]
    got = device_exponentials(*tensors, Stream.TARGET, 100)

    assert torch.equal(got, want)


@triton.jit
def _race_numbers(keys_ptr, positions_ptr, nonces_ptr, out_ptr, V: tl.constexpr, S: tl.constexpr):
    row, ids = tl.program_id(0), tl.arange(0, V)
    nonce, position = tl.load(nonces_ptr + row), tl.load(positions_ptr + row)
    word = word_of(tl.load(keys_ptr + row), nonce, position, S)
    tl.store(out_ptr + row * V + ids, exponential(word, ids))


def test_a_kernel_races_with_the_same_numbers():
    device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    keys, positions, nonces = (torch.from_numpy(array[-200:]).to(device) for array in inputs())
    want = device_exponentials(keys, positions[:, :1], nonces, Stream.TARGET, 1024)[:, 0]
    got = torch.empty(want.shape, dtype=torch.float32, device=device)

    _race_numbers[(len(keys),)](
        keys, positions[:, 0].contiguous(), nonces, got, V=1024, S=int(Stream.TARGET)
    )

    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
    assert want.min() < 1e-5 and want.max() > 11


def test_race_numbers_are_exponential_and_independent_of_each_other():
    """Kolmogorov-Smirnov at p = 1e-9, within a position and from position to position."""
    keys = torch.arange(40) * 1_000_003
    positions = torch.arange(8).expand(40, 8).contiguous()
    numbers = device_exponentials(keys, positions, torch.zeros(40).long(), Stream.TARGET, 512)

    for values in (numbers.flatten(), numbers.diff(dim=1).abs().flatten()):
        ordered = values.sort().values
        law = 1 - torch.exp(-ordered)  # |E - E'| is exponential, too
        count = len(ordered)
        steps = torch.arange(count) / count
        assert (law - steps).abs().max() < 3.3 / count**0.5
    within = (numbers[..., 1:] < numbers[..., :-1]).double().mean()
    assert abs(within - 0.5) < 6 * 0.5 / numbers.numel() ** 0.5
    assert numbers.unique().numel() == numbers.numel()
