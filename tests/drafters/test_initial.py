"""Version 0 of a run is the same whoever publishes it, and unsuitable bundles are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save

from buffer.bundles import read_bundle
from buffer.folder_weights import FolderWeights
from buffer.manifest import TENSORS
from drafters.initial import (
    TargetFacts,
    first_drafter,
    publish_initial,
    random_drafter,
    stored_drafter,
)
from oracles.engines import random_model

FINGERPRINT = "f" * 64


@pytest.fixture(scope="module")
def target():
    model = random_model("qwen3")
    return TargetFacts(model.config, model.lm_head.weight, FINGERPRINT)


def first(root, target, kind="eagle3", path=None, seed=1, layer_ids=None):
    store = FolderWeights(root)
    return first_drafter(store, kind, target, path=path, layer_ids=layer_ids, seed=seed)


def test_equal_settings_make_equal_bytes_and_seeds_differ(target):
    one = random_drafter("eagle3", target, None, 1)
    torch.manual_seed(99)  # the global generator has no influence

    assert random_drafter("eagle3", target, None, 1) == one
    assert random_drafter("eagle3", target, None, 2)[1] != one[1]


def test_the_second_to_publish_leaves_the_first_one_in_place(tmp_path, target):
    manifest, content = random_drafter("eagle3", target, None, 1)
    publish_initial(FolderWeights(tmp_path), manifest, content)

    publish_initial(FolderWeights(tmp_path), *random_drafter("eagle3", target, None, 2))

    assert FolderWeights(tmp_path).versions() == [0]
    assert read_bundle(tmp_path / "0").files[TENSORS] == content


def test_an_empty_store_gets_random_weights_and_the_next_process_reads_them(tmp_path, target):
    begun = first(tmp_path, target, layer_ids=(1, 2))

    again = first(tmp_path, target, seed=2)

    assert (begun.manifest.version, begun.layer_ids) == (0, (1, 2))
    assert again.manifest == begun.manifest
    assert all(again.tensors[name].equal(t) for name, t in begun.tensors.items())
    assert begun.tensors["lm_head.weight"].equal(target.lm_head_VH.detach())


def test_version_0_is_a_copy_of_the_bundle_in_drafter_path(tmp_path, target):
    other, root = tmp_path / "other", tmp_path / "run"
    given = first(other, target)
    FolderWeights(other).publish(
        replace(given.manifest, version=1, parent=0), {TENSORS: save(given.tensors)}
    )

    copied = first(root, target, path=other / "1", seed=2)

    assert (copied.manifest.version, copied.manifest.parent) == (0, None)
    assert read_bundle(root / "0").files == read_bundle(other / "1").files


def test_a_version_that_was_rolled_back_is_passed_over_with_a_warning(tmp_path, target, caplog):
    given = first(tmp_path, target)
    FolderWeights(tmp_path).publish(
        replace(given.manifest, version=1, parent=0), {TENSORS: save(given.tensors)}
    )
    FolderWeights(tmp_path).write_denied({1})

    assert first(tmp_path, target).manifest.version == 0

    assert caplog.messages == ["version 1 was rolled back. Starting with version 0."]


def spoiled(tmp_path, target, **changes):
    """Folder of a bundle with another manifest."""
    given = first(tmp_path / "given", target)
    folder = tmp_path / "spoiled"
    FolderWeights(folder).publish(
        replace(given.manifest, **changes), {TENSORS: save(given.tensors)}
    )
    return folder / "0"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"target_fingerprint": "0" * 64}, "was made for target 000000000000, but the target in"),
        ({"kind": "medusa"}, "of kind 'medusa', but drafter.kind is 'eagle3'"),
        ({"drafter_config": {"hidden_size": 3}}, "not an EAGLE-3 config"),
    ],
)
def test_a_bundle_that_does_not_fit_is_refused_before_it_is_published(
    tmp_path, target, changes, text
):
    path = spoiled(tmp_path, target, **changes)

    with pytest.raises(ValueError, match=text):
        first(tmp_path / "run", target, path=path)

    assert FolderWeights(tmp_path / "run").versions() == []


def test_a_drafter_for_another_vocabulary_is_refused(tmp_path, target):
    first(tmp_path, target)
    smaller = replace(target, lm_head_VH=target.lm_head_VH[1:])

    with pytest.raises(ValueError, match=r"vocabulary 96 .*, but the target has 95"):
        first(tmp_path, smaller)


def test_tensors_that_contradict_the_config_are_refused(tmp_path, target):
    given = first(tmp_path, target)
    tensors = load(read_bundle(tmp_path / "0").files[TENSORS])
    tensors["fc.weight"] = tensors["fc.weight"][:, 1:].contiguous()
    FolderWeights(tmp_path).publish(
        replace(given.manifest, version=1, parent=0), {TENSORS: save(tensors)}
    )

    with pytest.raises(ValueError, match=r"(?s)1 contradicts itself.*size mismatch for fc\.weight"):
        stored_drafter(tmp_path / "1", target)


def test_a_missing_folder_is_named_as_the_setting(tmp_path, target):
    with pytest.raises(ValueError, match=r"drafter\.path .*none is not a folder"):
        first(tmp_path, target, path=tmp_path / "none")


def test_a_kind_that_does_not_learn_has_no_version_0(tmp_path, target):
    with pytest.raises(ValueError, match="kind 'suffix' cannot be trained; kinds that learn: eag"):
        first(tmp_path, target, kind="suffix")

    assert list(tmp_path.iterdir()) == []
