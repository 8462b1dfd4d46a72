"""A target that cannot work is refused by name, before torch is imported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, GPT2Config

from buffer.fingerprint import target_fingerprint
from oracles.support import EOS, tiny_qwen3_config, tiny_tokenizer
from targets.config import load_config
from targets.find import checked_folder
from targets.fits import check_tokenizer, num_positions
from targets.load import load_model, load_served_model
from targets.surplus import surplus_of
from tests.serving.http.live import environment


@pytest.fixture
def target(tiny_target_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_target_dir, tmp_path / "target"))


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def split(target: Path) -> None:
    """Make two files of the weights, with their index."""
    tensors = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, part in files.items():
        save_file({n: tensors[n] for n in part}, target / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: f for f, part in files.items() for n in part}}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))


def test_finding_imports_no_torch():
    code = (
        "import sys; from targets.find import checked_folder; checked_folder(sys.argv[1]); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    command = [sys.executable, "-c", code, "examples/target"]
    assert subprocess.run(command, env=environment()).returncode == 0


@pytest.mark.parametrize(
    ("num_bytes", "said"),
    [
        (-1, "is cut off: by its header it holds"),
        (-100_000, "is cut off: by its header it holds"),
        (400, "is cut off: by its header it holds"),
        (8, "is cut off: by its header it holds"),
        (7, "is not a safetensors file (7 bytes)"),
        (0, "is not a safetensors file (0 bytes)"),
    ],
)
def test_weights_that_are_cut_off_are_refused(target: Path, num_bytes: int, said: str):
    file = target / "model.safetensors"
    cut(file, num_bytes)
    with pytest.raises(ValueError, match="download the target again") as refused:
        checked_folder(str(target))
    assert str(refused.value).startswith(f"{file} {said}")


def test_weights_that_are_too_long_are_refused_with_both_sizes(target: Path):
    file = target / "model.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes() + bytes(10))
    with pytest.raises(ValueError) as caught:
        checked_folder(str(target))
    said = f"is damaged: by its header it holds {size} bytes, but it has {size + 10};"
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<html>404 not found</html>" * 9, "is not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is not a safetensors file"),
        ((2).to_bytes(8, "little") + b"[]", "its header cannot be read"),
        ((2).to_bytes(8, "little") + b"{]", "its header cannot be read"),
        ((9).to_bytes(8, "little") + b'{"a": {}}', "its header cannot be read"),
        ((2).to_bytes(8, "little") + b"{}more", "is damaged: by its header it holds 10 bytes"),
    ],
)
def test_files_that_are_no_weights_are_refused(target: Path, content: bytes, said: str):
    (target / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        checked_folder(str(target))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param({"data_offsets": [4, 36_864]}, "tensors overlap", id="a gap"),
        pytest.param({"data_offsets": [4, 36_868]}, "tensors overlap", id="an overlap"),
        pytest.param(
            {"data_offsets": [36_864, 0]}, "tensors overlap", id="an end before its start"
        ),
        pytest.param({"shape": [287, 32]}, "another size than their shape", id="a row too few"),
        pytest.param({"dtype": "F64"}, "another size than their shape", id="numbers too wide"),
        pytest.param({"shape": ["a"]}, "another size than their shape", id="no shape"),
        pytest.param({"shape": None}, "its header cannot be read", id="none at all"),
        pytest.param({"data_offsets": [0, "9"]}, "its header cannot be read", id="no numbers"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(target: Path, change: dict, said: str):
    """The library raises errors of its own for it, once the server has begun to load."""
    path = target / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    first = next(n for n, e in header.items() if e.get("data_offsets", [1])[0] == 0)
    assert header[first]["data_offsets"] == [0, 36_864]
    header[first] |= change
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    with pytest.raises(ValueError, match=said) as caught:
        checked_folder(str(target))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.bool, "BOOL"),
        (torch.int32, "I32"),
        (torch.complex64, "C64"),
    ],
)
def test_quantized_weights_are_no_plain_numbers(target: Path, dtype: torch.dtype, name: str):
    """Without their scales they are nonsense."""
    path = target / "model.safetensors"
    tensors = load_file(path)
    layer = "model.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {layer: tensors[layer].to(dtype)}, path, {"format": "pt"})

    with pytest.raises(ValueError, match=f"{layer} has the type {name}; weights must be F64, F32"):
        checked_folder(str(target))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_may_have_any_type_of_plain_numbers(target: Path, dtype: torch.dtype):
    """And what is no weight may have any type."""
    path = target / "model.safetensors"
    tensors = {n: tensor.to(dtype) for n, tensor in load_file(path).items()}
    save_file(tensors | {"position_ids": torch.arange(9)}, path, {"format": "pt"})
    assert checked_folder(str(target)) == target


def test_a_folder_in_place_of_weights_is_refused(target: Path):
    (target / "model.safetensors").unlink()
    (target / "model.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read \(Is a directory\)"):
        checked_folder(str(target))


def test_a_split_target_needs_all_its_files_whole(target: Path):
    split(target)
    assert checked_folder(str(target)) == target
    cut(target / "b.safetensors", -1)
    with pytest.raises(ValueError, match=r"b\.safetensors is cut off"):
        checked_folder(str(target))
    (target / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of the files .*: b\.safetensors"):
        checked_folder(str(target))
    (target / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index\.json cannot be read"):
        checked_folder(str(target))


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_config_that_is_no_config_is_refused(target: Path, content: str):
    (target / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json (cannot be read|must hold)"):
        checked_folder(str(target))


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_without_config_or_weights_is_no_target(target: Path, missing: str):
    (target / missing).unlink()
    with pytest.raises(ValueError, match=r"has no (config\.json|\*\.safetensors)") as early:
        checked_folder(str(target))
    with pytest.raises(ValueError) as late:
        target_fingerprint(target)
    assert str(early.value) == str(late.value)


def test_weights_that_are_missing_or_misshapen_are_no_random_ones(target: Path):
    file, name = target / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    save_file({n: t for n, t in tensors.items() if n != name}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks 1 weights of the model: {name}"):
        load_model(target, torch.float32, torch.device("cpu"))
    save_file({**tensors, name: tensors[name][:-1].clone()}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name} has the shape \(63, 32\).*needs \(64, 32\)"):
        load_model(target, torch.float32, torch.device("cpu"))


def test_a_layer_that_the_config_denies_is_refused(target: Path):
    """Its absence would change every answer, and nobody would know why."""
    file = target / "config.json"
    read = json.loads(file.read_text())
    read["num_hidden_layers"] -= 1
    read["layer_types"] = read["layer_types"][:-1]
    file.write_text(json.dumps(read))
    with pytest.raises(ValueError) as caught:
        load_served_model(target, load_config(target), torch.float32, torch.device("cpu"))
    assert "has 11 weights that the model of its config.json has not: " in str(caught.value)
    assert ": model.layers.3.input_layernorm.weight; weights and" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "is_refused"),
    [
        ("model.layers.0.self_attn.q_proj.bias", True),
        ("model.layers.4.mlp.up_proj.weight", True),
        ("lm_head.bias", True),
        ("something.weight", True),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", False),
        ("mtp.layers.0.mlp.up_proj.weight", False),
        ("model.mtp_layers.0.norm.weight", False),
        ("model.layers.0.self_attn.k_scale", False),
        ("model.vision_tower.encoder.layers.0.weight", False),
        ("v_head.summary.weight", False),
    ],
)
def test_only_weights_that_do_not_matter_may_be_left_over(
    target: Path, name: str, is_refused: bool
):
    file = target / "model.safetensors"
    save_file({**load_file(file), name: torch.ones(2)}, file, {"format": "pt"})
    if is_refused:
        with pytest.raises(ValueError, match=f"config.json has not: {name}; "):
            load_model(target, torch.float32, torch.device("cpu"))
    else:
        load_model(target, torch.float32, torch.device("cpu"))


def test_a_head_beside_a_tied_one_and_layers_that_predict_are_left_over():
    tied, own = config(300, tie_word_embeddings=True), config(300, tie_word_embeddings=False)
    assert surplus_of(["lm_head.weight"], tied) == []
    assert surplus_of(["lm_head.weight"], own) == ["lm_head.weight"]
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in (6, 5, 4)]
    assert surplus_of(names, config(300, num_nextn_predict_layers=2)) == names[:1]


# ---- tokenizer and positions ---------------------------------------------------------------------


def config(vocab_size: int, **more: object):
    made = tiny_qwen3_config(vocab_size, 0)
    for name, value in more.items():
        setattr(made, name, value)
    return made


def test_a_tokenizer_as_large_as_the_target_or_smaller_fits(caplog):
    tokenizer = tiny_tokenizer()
    for vocab_size in (len(tokenizer), len(tokenizer) + 40):
        check_tokenizer(tokenizer, config(vocab_size))
    assert not caplog.records


def test_a_tokenizer_that_is_larger_is_refused_with_both_sizes():
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match=r"8 tokens that the target has not.* is 280: '.*' \(280"):
        check_tokenizer(tokenizer, config(280))


def test_an_added_token_that_text_or_the_template_can_yield_is_refused():
    for special in (False, True):
        tokenizer = tiny_tokenizer()
        size = len(tokenizer)
        tokenizer.add_tokens(["<|user|>"], special_tokens=special)
        if special:
            tokenizer.chat_template = "<|user|>" + tokenizer.chat_template
        with pytest.raises(ValueError, match=rf"1 tokens.*'<\|user\|>' \({size}\)"):
            check_tokenizer(tokenizer, config(size))
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|stop|>"})
    with pytest.raises(ValueError, match=r"<\|stop\|>"):
        check_tokenizer(tokenizer, config(size))


def test_a_special_token_for_images_is_passed_over_with_a_warning(caplog):
    """As in the text-only models of Gemma 3."""
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)
    check_tokenizer(tokenizer, config(size))
    [said] = [record.getMessage() for record in caplog.records]
    assert f"'<image_soft_token>' ({size})" in said
    assert EOS not in said


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ({}, 512),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 512),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 2048),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, 1024),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, 512),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, 2048),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0,
                                 "original_max_position_embeddings": 128}},
            512,
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}}, 512),
    ],
)  # fmt: skip
def test_positions_are_those_of_the_config_after_scaling(more: dict, wanted: int | None):
    assert num_positions(config(288, **more)) == wanted


def test_a_target_may_name_its_positions_otherwise_or_have_no_end():
    assert num_positions(GPT2Config(n_positions=300)) == 300
    assert num_positions(BloomConfig()) is None
