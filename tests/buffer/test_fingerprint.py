"""Two targets have one fingerprint only if they are the same target."""

import os

import numpy as np
import pytest

from buffer import fingerprint
from buffer.fingerprint import target_fingerprint
from buffer.tensors import join_tensors


@pytest.fixture
def target(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 4}')
    for index in range(2):
        blob = join_tensors({f"w{index}": ("F32", np.full(1000, index, np.float32))}, {})
        (tmp_path / f"model-{index}.safetensors").write_bytes(blob)
    return tmp_path


def test_a_fingerprint_is_stable_and_ignores_what_is_not_the_model(target):
    first = target_fingerprint(target)
    (target / "README.md").write_text("new")
    assert target_fingerprint(target) == first
    assert len(first) == 64


@pytest.mark.parametrize("name", ["config.json", "model-0.safetensors", "model-1.safetensors"])
def test_a_changed_byte_changes_it(target, name):
    before = target_fingerprint(target)
    content = bytearray((target / name).read_bytes())
    content[-1] ^= 1
    (target / name).write_bytes(content)
    assert target_fingerprint(target) != before


def test_swapped_files_change_it(target):
    before = target_fingerprint(target)
    (target / "model-0.safetensors").rename(target / "other")
    (target / "model-1.safetensors").rename(target / "model-0.safetensors")
    (target / "other").rename(target / "model-1.safetensors")
    assert target_fingerprint(target) != before


@pytest.mark.parametrize("position", [0, 1 << 20, 40 << 20, (80 << 20) - 1])
def test_of_a_large_target_names_sizes_and_sampled_blocks_count(target, monkeypatch, position):
    monkeypatch.setattr(fingerprint, "FULL_BYTES", 10 << 20)
    big = target / "model-2.safetensors"
    with big.open("wb") as file:
        file.truncate(80 << 20)
    before = target_fingerprint(target)
    with big.open("r+b") as file:
        file.seek(position)
        file.write(b"\1" * (1 << 20) if position % 2 == 0 else b"\1")
        file.truncate(80 << 20)
    after = target_fingerprint(target)
    os.truncate(big, 70 << 20)
    assert len({before, after, target_fingerprint(target)}) == 3


def test_pickled_weights_are_refused_with_the_way_out(target):
    for path in target.glob("*.safetensors"):
        path.rename(path.with_name("pytorch_model.bin"))
    with pytest.raises(
        ValueError, match=r"pickle \(pytorch_model.bin\).*Convert them to safetensors"
    ):
        target_fingerprint(target)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        target_fingerprint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no \*.safetensors weights"):
        target_fingerprint(tmp_path)
