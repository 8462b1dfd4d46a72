"""Version 0 is the same whoever publishes it, and is published once."""

from __future__ import annotations

import torch

from buffer.folder_weights import FolderWeights
from buffer.manifest import TENSORS
from drafters.initial import publish_initial, random_drafter
from oracles.engines import random_model


def fresh(seed):
    model = random_model("qwen3")
    return random_drafter(model.config, model.lm_head.weight, None, seed, "f" * 64)


def test_equal_settings_make_equal_bytes_and_seeds_differ():
    assert fresh(1) == fresh(1)
    torch.manual_seed(99)  # the global generator has no part in it
    assert fresh(1)[1] != fresh(2)[1]


def test_the_second_to_publish_leaves_the_first_one_in_place(tmp_path):
    store = FolderWeights(tmp_path)
    manifest, content = fresh(1)
    publish_initial(store, manifest, content)

    publish_initial(store, *fresh(2))

    assert store.versions() == [0]
    assert store.read(0).files[TENSORS] == content
