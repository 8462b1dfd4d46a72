"""Tensors of a message arrive as they were sent."""

from __future__ import annotations

import torch

from trainer.group import packed, unpacked

SENT = {
    "flag": torch.tensor(True),
    "odd": torch.arange(7, dtype=torch.uint8),
    "rows": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "nothing": torch.zeros(0, 4),
    "turned": torch.arange(12, dtype=torch.int64).view(3, 4).T,
    "gradient": torch.ones(2, 2, dtype=torch.float64, requires_grad=True),
}


def test_tensors_of_all_kinds_arrive_as_they_were_sent():
    facts, contents = packed(SENT)
    found = unpacked(facts, contents)

    assert list(found) == list(SENT)
    for name, tensor in SENT.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_tensors_are_aligned_whatever_lies_before_them():
    facts, contents = packed(SENT)
    found = unpacked(facts, contents)

    first = contents["cpu"].data_ptr()
    assert all((t.data_ptr() - first) % 16 == 0 for t in found.values() if t.numel())
    assert len(contents["cpu"]) % 16 == 0


def test_a_message_without_tensors_has_no_content():
    assert packed({}) == ({}, {})
