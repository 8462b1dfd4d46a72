"""Launches are counted without a GPU, and fused drafts consist of kernels and products alone."""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness.launches import counted
from benchmarks.ops.launches import lines

OF_TORCH = {"mm", "cat", "stack", "clone", "add_"}
"""Operations that a fused draft may have."""


def test_what_launches_is_counted_and_views_are_not():
    x, norm = torch.empty(4, 8, device="meta"), torch.empty(8, device="meta")
    with counted() as found:
        assert x.is_cuda and not torch.empty(1).is_cuda
        (x.view(2, 16).t() @ x.view(2, 16)[:, :3] + 1).chunk(2)
        torch.nn.functional.rms_norm(x, (8,), norm)
    assert found == {"mm": 1, "add": 1, "rms_norm": 1}
    assert not x.is_cuda


@pytest.mark.parametrize(
    ("kind", "most", "most_of_many"),
    [
        ("eagle3", 49, 60),
        ("p_eagle", 22, 27),
        ("dflash", 18, 23),
        ("mtp", 56, 64),
        ("draft_model", 51, 59),
    ],
)
def test_a_fused_draft_is_few_launches(kind, most, most_of_many):
    few, many = lines("tiny", (1, 32), [kind])

    assert few["fused"] <= most < few["own"]
    assert many["fused"] <= most_of_many < many["own"]
    for line in (few, many):
        launched = set().union(*line["fused_by_kernel"].values())
        assert {name for name in launched if not name.startswith("_")} <= OF_TORCH
