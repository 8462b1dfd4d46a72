"""Our own config and modules hold what those of ``transformers`` do, or leave it to them."""

from __future__ import annotations

import json
import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from oracles.forked import run_forked
from oracles.support import REPOSITORY
from serving.build import _eos_ids
from specops.attention import DecodePass, decode_slots
from targets.causal import config_json
from targets.config import load_config
from targets.fits import num_positions
from targets.load import load_model, load_served_model
from targets.own_config import OwnConfig, read_own_config
from targets.own_model import OwnCausalLM, load_own_model
from targets.target import Target
from targets.update import TargetWeights

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "eos_token_id": 3, "bos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
KINDS = {
    "llama": (LlamaForCausalLM, lambda: LlamaConfig(**SHAPE)),
    "tied llama": (LlamaForCausalLM, lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "llama 3": (LlamaForCausalLM, lambda: LlamaConfig(**SHAPE, rope_parameters=dict(LLAMA3))),
    "qwen2": (Qwen2ForCausalLM, lambda: Qwen2Config(**SHAPE)),
    "qwen3": (Qwen3ForCausalLM, lambda: Qwen3Config(**SHAPE, head_dim=16)),
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    kind, config = KINDS[request.param]
    torch.manual_seed(0)
    model = kind(config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    home = tmp_path_factory.mktemp("target")
    model.save_pretrained(home)
    return home


def changed(folder, tmp_path, **values):
    """A copy of a target whose config has other values; ``None`` takes one out."""
    copy = tmp_path / "changed"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text()) | values
    kept = {key: value for key, value in config.items() if value != "absent"}
    (copy / "config.json").write_text(json.dumps(kept))
    return copy


def test_a_config_has_the_values_that_transformers_finds(folder):
    own, theirs = read_own_config(folder), AutoConfig.from_pretrained(folder)

    assert own.get_text_config() is own
    for key, value in vars(own).items():
        assert getattr(theirs, key) == value, key
    assert num_positions(own) == num_positions(theirs)
    assert config_json(own) == config_json(theirs)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({"rope_parameters": "absent", "rope_theta": 1e5, "rope_scaling": None},
                     id="as in 2023"),
        pytest.param({"rope_parameters": "absent", "rope_theta": 5e5,
                      "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
                     id="scaled, as in 2024"),
        pytest.param({"eos_token_id": [3, 5], "torch_dtype": "float32", "dtype": "absent"},
                     id="several ends"),
        pytest.param({"rope_parameters": "absent", "tie_word_embeddings": "absent"}, id="defaults"),
    ],
)  # fmt: skip
def test_older_configs_mean_the_same(folder, tmp_path, values):
    copy = changed(folder, tmp_path, **values)

    own, theirs = read_own_config(copy), AutoConfig.from_pretrained(copy)

    assert isinstance(own, OwnConfig)
    for key, value in vars(own).items():
        assert getattr(theirs, key) == value, key


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "gemma3_text"},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"quantization_config": {"bits": 4}},
        {"auto_map": {"AutoModelForCausalLM": "evil.py"}},
        {"use_sliding_window": True},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                             "partial_rotary_factor": 0.5}},
        {"num_hidden_layers": "2"},
        {"rms_norm_eps": None},
        {"hidden_size": 33},
        {"something_new": 1},
    ],
    ids=lambda values: next(iter(values)),
)  # fmt: skip
def test_a_config_with_anything_else_is_left_to_transformers(folder, tmp_path, values):
    assert read_own_config(changed(folder, tmp_path, **values)) is None


def test_a_folder_without_a_config_has_none(tmp_path):
    assert read_own_config(tmp_path) is None
    (tmp_path / "config.json").write_text("[1, 2")
    assert read_own_config(tmp_path) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_has_the_same_weights_and_computes_the_same_bits(folder, dtype):
    own = load_served_model(folder, load_config(folder), dtype, CPU)
    theirs = load_model(folder, dtype, CPU)

    assert isinstance(own, OwnCausalLM)
    assert torch.equal(own.model.rotary_emb.inv_freq, theirs.model.rotary_emb.inv_freq)
    weights = theirs.state_dict()
    for name, tensor in own.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, weights[name]), name
    assert own.state_dict().keys() == weights.keys()
    for ours, its in zip(passes(own), passes(theirs), strict=True):
        assert torch.equal(ours, its)


def passes(model):
    """Tapped rows, hidden rows and logits of a pass by our decoder."""
    target = Target(model, (0, 2))
    assert target.fuse(num_positions=64) is None
    at = DecodePass(torch.tensor([[1, 2]]).int(), torch.tensor([0]).int(), 4)
    ids = torch.tensor([3, 1, 4, 1, 5])
    rows = target.decode(ids, at.positions(5).flatten(), decode_slots(at, 5), at,
                         target.make_pool(12))  # fmt: skip
    return rows.features_TmH, rows.hidden_TH, target.logits(rows.hidden_TH)


def test_the_files_may_go_once_a_model_is_loaded(folder, tmp_path):
    copy = tmp_path / "target"
    shutil.copytree(folder, copy)
    own = load_own_model(copy, read_own_config(copy), torch.float32, CPU)
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-4096, 2)
        file.write(b"\xff" * 4096)

    assert all(torch.equal(before[name], tensor) for name, tensor in own.state_dict().items())


@pytest.mark.parametrize("what", ["missing", "more", "shape"])
def test_other_tensors_are_left_to_transformers(folder, tmp_path, what):
    copy = tmp_path / "target"
    shutil.copytree(folder, copy)
    path = copy / "model.safetensors"
    tensors = load_file(path)
    if what == "missing":
        del tensors["model.norm.weight"]
    elif what == "more":
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    else:
        tensors["model.norm.weight"] = torch.ones(31)
    save_file(tensors, path, metadata={"format": "pt"})

    assert load_own_model(copy, read_own_config(copy), torch.float32, CPU) is None
    if what == "more":
        served = load_served_model(copy, load_config(copy), torch.float32, CPU)
        assert type(served).__module__.startswith("transformers.")
    else:
        with pytest.raises(ValueError, match="belong together"):
            load_served_model(copy, load_config(copy), torch.float32, CPU)


@pytest.mark.parametrize(
    ("generation", "ends"),
    [({"eos_token_id": [2, 7]}, {2, 7}), ({"eos_token_id": 9}, {9}), ({"bos_token_id": 1}, {3}),
     (None, {3})],
)  # fmt: skip
def test_texts_end_where_transformers_says(folder, tmp_path, generation, ends):
    copy = tmp_path / "target"
    shutil.copytree(folder, copy)
    path = copy / "generation_config.json"
    path.unlink(missing_ok=True)
    if generation is not None:
        path.write_text(json.dumps(generation))

    models = (
        load_served_model(copy, load_config(copy), torch.float32, CPU),
        load_model(copy, torch.float32, CPU),
    )

    assert [_eos_ids(model) for model in models] == [ends, ends]


def test_new_weights_are_read_by_our_own_modules(folder, tmp_path, monkeypatch):
    """Importing ``transformers`` beside serving would take seconds of the core that decodes."""
    own = load_served_model(folder, load_config(folder), torch.float32, CPU)
    assert isinstance(own, OwnCausalLM)
    target = Target(own, (1,))
    target.fuse(64)
    copy = tmp_path / "new"
    shutil.copytree(folder, copy)
    tensors = {name: 2 * t for name, t in load_file(copy / "model.safetensors").items()}
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    monkeypatch.setitem(sys.modules, "targets.causal", None)  # whoever imports it gets an error
    monkeypatch.setitem(sys.modules, "transformers", None)

    weights = TargetWeights(target)
    weights.read(copy)
    weights.take_over()
    assert weights.are_in_force()

    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(
        json.dumps(config | {"transformers_version": "9", "use_cache": False})
    )
    weights.read(copy)
    for key, value in (("rms_norm_eps", 0.5), ("max_position_embeddings", 64)):
        (copy / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match=rf"has {key} = {value}, but the running target has"):
            weights.read(copy)


SERVE = """
import queue, sys
for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
    del sys.modules[name]
sys.modules["transformers"] = None  # whoever imports it gets an error
from pathlib import Path
from configs.load import load_settings
from serving.build import build_service
from serving.requests import Request, SamplingParams

settings = load_settings([Path("configs/demo.yaml")], sys.argv[1:], {})
service = build_service(settings)
service.start()
outputs = queue.Queue()
ids = tuple(service.model.tokenizer("def add(left, right):")["input_ids"])
service.inbox.submit(Request("a", ids, SamplingParams(temperature=0.0, max_tokens=8)), outputs.put)
num_tokens = 0
while True:
    output = outputs.get(timeout=120)
    num_tokens += len(output.token_ids)
    if output.finish_reason is not None:
        break
service.stop()
print(num_tokens, output.finish_reason)
"""


def test_a_server_of_the_bundled_target_imports_no_transformers(tmp_path):
    env = os.environ | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'kernels'}"}
    found = run_forked(("-c", SERVE, f"run_dir={tmp_path}"), env, REPOSITORY, timeout=300)

    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.split()[0] != "0"
