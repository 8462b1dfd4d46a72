"""Tensors become the bytes that are published, in memory that is taken once."""

import numpy as np
import pytest
import torch
from safetensors.torch import load

from trainer import publish
from trainer.host import HostCopies
from trainer.publish import sealed_tensors


def tensors(fill, device="cpu"):
    return {
        "w": torch.full((3, 5), fill, device=device),
        "columns": torch.arange(12.0, device=device).view(3, 4).T * fill,
        "ids": torch.arange(7, device=device),
    }


def check_published(found, fill, dtype):
    """A file holds these tensors, floating ones rounded to a dtype."""
    for name, tensor in load(bytes(found.joined())).items():
        expected = tensors(fill)[name]
        torch.testing.assert_close(
            tensor,
            expected.to(dtype) if expected.is_floating_point() else expected,
            rtol=0,
            atol=0,
        )


def addresses(content):
    """Where the rounded tensors of a file lie; those of integers come first."""
    return [np.frombuffer(part, np.uint8).ctypes.data for part in content.parts[2:]]


def test_small_drafters_are_published_in_float32_where_they_lie():
    own = tensors(1.1)
    copied = HostCopies().of(own, {name: one.dtype for name, one in own.items()})
    assert not copied.sources
    assert copied.places["w"].data_ptr() == own["w"].data_ptr()
    check_published(sealed_tensors(own), 1.1, torch.float32)


def test_large_drafters_are_rounded_to_bfloat16_in_memory_that_is_used_again(monkeypatch):
    monkeypatch.setattr(publish, "LARGEST_FLOAT32_BYTES", 10)
    memory = HostCopies()
    first = sealed_tensors(tensors(1.1), memory)
    check_published(first, 1.1, torch.bfloat16)
    before = addresses(first)

    second = sealed_tensors(tensors(2.3), memory)
    check_published(second, 2.3, torch.bfloat16)
    assert addresses(second) == before
    check_published(sealed_tensors(tensors(0.7)), 0.7, torch.bfloat16)
    check_published(second, 2.3, torch.bfloat16)  # memory of its own


@pytest.mark.gpu
def test_tensors_of_a_gpu_are_rounded_there_and_copied_to_pinned_memory(monkeypatch):
    monkeypatch.setattr(publish, "LARGEST_FLOAT32_BYTES", 10)
    memory = HostCopies()
    own = tensors(1.1, "cuda")
    check_published(sealed_tensors(own, memory), 1.1, torch.bfloat16)
    dtypes = {"w": torch.bfloat16, "columns": torch.bfloat16, "ids": torch.int64}
    assert all(one.is_pinned() for one in memory.of(own, dtypes).places.values())
    check_published(sealed_tensors(tensors(2.3, "cuda"), memory), 2.3, torch.bfloat16)
