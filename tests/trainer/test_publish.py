"""Tensors become the bytes that are published, in memory that is taken once."""

import numpy as np
import pytest
import torch
from safetensors.torch import load

from trainer import publish
from trainer.host import HostCopies, OnHost
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


@pytest.mark.parametrize("most", [10, 1 << 20])
def test_tensors_are_made_in_memory_that_a_store_lends(monkeypatch, most):
    monkeypatch.setattr(publish, "LARGEST_FLOAT32_BYTES", most)
    own = tensors(1.1) | {"none": torch.zeros(0, 3), "one": torch.tensor(2.5)}
    lent = []

    def lend(num_bytes):
        lent.append(memoryview(bytearray(num_bytes)))
        return lent[0]

    found = sealed_tensors(own, HostCopies(), lend)

    assert found.place is lent[0] and len(lent) == 1
    expected = sealed_tensors(own)
    assert bytes(lent[0]) == found.joined() == expected.joined()
    assert found.digest == expected.digest
    assert sealed_tensors(own, HostCopies(), lambda num_bytes: None).joined() == found.joined()


def test_values_of_a_gpu_come_through_a_pinned_chunk():
    """Tried on a CPU, whose tensors need none."""
    place, chunk = torch.zeros(10, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.uint8)
    source = torch.arange(10.0)
    on_host = OnHost({"w": place}, {"w": source}, chunk)
    on_host.fill(place[2:7], source[2:7])
    torch.testing.assert_close(place, torch.tensor([0.0, 0, 2, 3, 4, 5, 6, 0, 0, 0]).bfloat16())
    assert chunk[:10].view(torch.bfloat16).tolist() == [2, 3, 4, 5, 6]


@pytest.mark.gpu
def test_tensors_of_a_gpu_come_into_memory_that_a_store_lends(monkeypatch):
    monkeypatch.setattr(publish, "LARGEST_FLOAT32_BYTES", 10)
    found = sealed_tensors(tensors(1.1, "cuda"), HostCopies(), lambda n: memoryview(bytearray(n)))
    assert found.place is not None
    check_published(found, 1.1, torch.bfloat16)


@pytest.mark.gpu
def test_tensors_of_a_gpu_are_rounded_there_and_copied_to_pinned_memory(monkeypatch):
    monkeypatch.setattr(publish, "LARGEST_FLOAT32_BYTES", 10)
    memory = HostCopies()
    own = tensors(1.1, "cuda")
    check_published(sealed_tensors(own, memory), 1.1, torch.bfloat16)
    dtypes = {"w": torch.bfloat16, "columns": torch.bfloat16, "ids": torch.int64}
    assert all(one.is_pinned() for one in memory.of(own, dtypes).places.values())
    check_published(sealed_tensors(tensors(2.3, "cuda"), memory), 2.3, torch.bfloat16)
