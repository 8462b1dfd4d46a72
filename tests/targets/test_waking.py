"""Only a GPU is woken."""

from __future__ import annotations

import torch
from triton.runtime import cache

from targets.waking import wake


def test_a_cpu_is_awake():
    assert wake(torch.device("cpu")) == []


def test_triton_keeps_the_key_of_itself():
    assert cache.triton_key.cache_info().maxsize is not None, "otherwise it is computed twice"
