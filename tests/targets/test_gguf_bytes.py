"""A GGUF file is converted into the bytes that ``transformers`` would write, without it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from oracles.gguf_files import MODELS, random_source, write_gguf
from oracles.gguf_library import convert_by_library
from oracles.support import REPOSITORY
from targets import gguf_convert
from targets.gguf_convert import convert
from targets.own_config import FAMILIES, read_own_config, shapes_of
from targets.own_model import OwnCausalLM


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def both(file: Path, tmp_path: Path) -> tuple[dict[str, bytes], dict[str, bytes]]:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder, write in ((ours, convert), (theirs, convert_by_library)):
        folder.mkdir()
        write(file, folder)
    return contents(ours), contents(theirs)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own head"])
@pytest.mark.parametrize("architecture", MODELS)
def test_every_file_is_that_of_the_library(architecture, tied, tmp_path):
    file = write_gguf(tmp_path / "model.gguf", random_source(architecture, tied=tied))

    ours, theirs = both(file, tmp_path)

    assert len(ours) == 6
    assert ours == theirs


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q4_1, GGMLQuantizationType.F16])
def test_weights_are_rounded_as_torch_rounds_them_whatever_the_blocks(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_convert, "_BLOCK", 1)  # one head at a time
    source = random_source("llama")
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_(std=0.05)  # nothing that bfloat16 holds exactly
    file = write_gguf(tmp_path / "model.gguf", source, stored_as=kind)

    ours, theirs = both(file, tmp_path)

    assert ours == theirs


def test_halfway_values_and_the_largest_ones_are_rounded_as_torch_rounds_them():
    bits = np.arange(0, 1 << 20, dtype=np.uint32) * 4093  # odd: ties and all exponents
    values = np.concatenate([bits, [0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x80000000, 0x00000001]])
    values = values.astype(np.uint32).view(np.float32)
    values = values[np.isfinite(values)]

    rounded = gguf_convert._rounded(values)

    wanted = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    assert np.array_equal(rounded, wanted)


@pytest.mark.parametrize(
    ("fields", "without"),
    [
        pytest.param({"tokenizer.ggml.eot_token_id": 7}, None, id="several ends"),
        pytest.param({}, "tokenizer.ggml.bos_token_id", id="no begin"),
        pytest.param({}, "tokenizer.ggml.padding_token_id", id="no padding"),
        pytest.param({}, "tokenizer.chat_template", id="no template"),
        pytest.param({"tokenizer.ggml.unknown_token_id": 5}, None, id="unknown"),
        pytest.param({}, "llama.attention.key_length", id="heads of the usual size"),
        pytest.param({}, "llama.rope.freq_base", id="left to the library"),
        pytest.param({"llama.vocab_size": 288}, None, id="said twice"),
        pytest.param(
            {"tokenizer.ggml.pre": "llama-bpe"}, None, id="texts begin with the begin token"
        ),
    ],
)
def test_whatever_the_metadata_say(fields, without, tmp_path, monkeypatch):
    import oracles.gguf_files as files

    source, every = random_source("llama"), files._fields
    if without == "llama.attention.key_length":
        source.config.head_dim = 16

        def some(model, architecture):
            return {k: v for k, v in every(model, architecture).items() if "key_length" not in k}
    else:

        def some(model, architecture):
            return {k: v for k, v in every(model, architecture).items() if k != without}

    monkeypatch.setattr(files, "_fields", some)
    if without == "llama.attention.key_length":
        source = type(source)(source.config)
    file = write_gguf(tmp_path / "model.gguf", source, fields=fields)

    ours, theirs = both(file, tmp_path)

    assert ours == theirs


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_shapes_are_those_of_our_modules(family, tied, tmp_path):
    random_source(family, tied=tied).save_pretrained(tmp_path)
    config = read_own_config(tmp_path)
    with torch.device("meta"):
        model = OwnCausalLM(config)

    wanted = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    if tied:
        del wanted["lm_head.weight"]
    assert shapes_of(config) == wanted


BARE = """
import sys
from pathlib import Path
sys.modules["torch"] = sys.modules["transformers"] = None
from targets.files import read_target
files = read_target(sys.argv[1], Path(sys.argv[2]))
text = files.tokenizer.apply_chat_template(
    [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
)
num = len(files.tokenizer(text)["input_ids"])
print(files.fingerprint, files.name, files.config.hidden_size, num)
"""


def test_a_first_start_needs_neither_torch_nor_transformers_for_it(tmp_path):
    file = write_gguf(tmp_path / "Tiny.gguf", random_source("llama"))
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])

    done = subprocess.run(
        [sys.executable, "-c", BARE, str(file), str(tmp_path / "cache")],
        env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    fingerprint, name, size, num = done.stdout.split()
    assert (len(fingerprint), name, size) == (64, "Tiny", "64") and int(num) > 0
