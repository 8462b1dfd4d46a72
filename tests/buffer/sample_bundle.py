"""A small bundle that tests of weights publish."""

from __future__ import annotations

import numpy as np

from buffer.records import Manifest

MANIFEST = Manifest(
    version=0,
    parent=None,
    kind="eagle3",
    drafter_config={"hidden_size": 4},
    target_fingerprint="ab" * 32,
    files={},
    gate={"tokens_per_step": 2.5, "by_tenant": {"acme": [2.0, 3.0]}},
    policy={"acceptance_by_position": [0.8, 0.6]},
    created_unix_ms=1_700_000_000_000,
)
EXPECTED = {"fc.weight": ("BF16", (2, 4)), "norm": ("F32", (4,))}


def tensors(fill=1.0):
    return {
        "fc.weight": ("BF16", np.full((2, 4), 0x3F80, np.uint16)),
        "norm": ("F32", np.full(4, fill, np.float32)),
    }
