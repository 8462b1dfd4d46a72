"""A GGUF file becomes a folder with the same weights, tokenizer and greedy text, once."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from buffer.fingerprint import target_fingerprint
from configs.schema import Settings
from oracles import gguf_files
from oracles.engines import request_of, run
from oracles.forked import Forked
from oracles.gguf_files import MODELS, random_source, write_gguf
from oracles.support import REPOSITORY, tiny_tokenizer
from serving.build import build_service, load_target
from targets.find import target_folder, target_name
from targets.gguf_cache import RECORD, default_cache
from targets.gguf_tokenizer import tokenizer_of
from targets.head import load_target_head
from targets.load import load_model
from targets.target import Target
from targets.tokenizer import load_tokenizer

CPU = torch.device("cpu")
NOT_OF_THE_SHAPE = {
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id",
    "transformers_version",
}  # fmt: skip
TEXTS = ["def add(left, right):\n    return left + right\n", "naïve → 字\n\t 12 , .", "a<|end|>b"]


@pytest.fixture(scope="module")
def source():
    return random_source("llama")


@pytest.fixture(scope="module")
def file(source, tmp_path_factory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "Tiny-1.gguf", source)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def folder(file, cache) -> Path:
    return target_folder(str(file), cache)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own head"])
@pytest.mark.parametrize("architecture", MODELS)
def test_weights_and_configuration_are_those_of_the_source(architecture, tied, tmp_path):
    source = random_source(architecture, tied=tied)
    file = write_gguf(tmp_path / "model.gguf", source)

    read = load_model(target_folder(str(file), tmp_path / "cache"), torch.float32, CPU)

    assert type(read) is type(source)
    wanted, got = source.state_dict(), read.state_dict()
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == []
    says = read.config.to_dict()
    unlike = {name for name, value in source.config.to_dict().items() if says[name] != value}
    assert unlike <= NOT_OF_THE_SHAPE
    ids = torch.arange(40, 80)[None]
    assert torch.equal(read(ids).logits, source(ids).logits)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_scaled_frequencies_of_llama_3_are_recognised(factor, tmp_path):
    source = random_source("llama")
    source.config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": 50_000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    scaled = LlamaRotaryEmbedding(source.config).inv_freq
    divisors = {"rope_freqs.weight": (source.model.rotary_emb.inv_freq / scaled).numpy()}
    assert divisors["rope_freqs.weight"].max() == factor
    file = write_gguf(tmp_path / "model.gguf", source, tensors=divisors)

    read = load_model(target_folder(str(file), tmp_path / "cache"), torch.float32, CPU)

    assert read.config.rope_parameters == source.config.rope_parameters
    torch.testing.assert_close(read.model.rotary_emb.inv_freq, scaled)
    other = {"rope_freqs.weight": divisors["rope_freqs.weight"] * 2}
    strange = write_gguf(tmp_path / "strange.gguf", source, tensors=other)
    with pytest.raises(ValueError, match=r"rotary frequencies .* otherwise than in Llama 3"):
        target_folder(str(strange), tmp_path / "cache")


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0])
def test_quantized_matrices_are_unpacked(kind, source, tmp_path):
    file = write_gguf(tmp_path / "model.gguf", source, stored_as=kind)

    read = load_model(target_folder(str(file), tmp_path / "cache"), torch.float32, CPU)

    steps = 15 if kind is GGMLQuantizationType.Q4_1 else 254
    for name, wanted in source.state_dict().items():
        got = read.state_dict()[name]
        if wanted.ndim == 2:
            # Half a step of the widest block of 32, and bfloat16's rounding of the largest weight.
            bound = 2 * wanted.abs().max() * (0.5 / steps + 2**-8)
            assert 0 < (got - wanted).abs().max() < bound, name


def test_the_tokenizer_is_that_of_the_file(folder):
    wanted, got = tiny_tokenizer(), load_tokenizer(folder)

    for text in TEXTS:
        assert got(text)["input_ids"] == wanted(text)["input_ids"]
        assert got.decode(wanted(text)["input_ids"]) == text
    assert got.eos_token == wanted.eos_token
    assert got.bos_token == "A"
    assert len(got) == len(wanted)
    talk = [{"role": "user", "content": "hi"}]
    assert got.apply_chat_template(talk, tokenize=False) == wanted.apply_chat_template(
        talk, tokenize=False
    )


def test_numbers_and_indentation_are_split_as_in_training():
    def split(rule: str, text: str) -> str:
        fields = {"tokenizer.ggml.pre": rule, "tokenizer.ggml.model": "gpt2"}
        more = {"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.token_type": [1]}
        made = tokenizer_of({**fields, **more, "tokenizer.ggml.merges": []})
        parts = made.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        return " ".join(part for part, _ in parts)

    text = "if x:\n    y = 2026"
    assert split("smollm", text) == "if Ġx : ĊĠĠĠ Ġy Ġ= Ġ 2 0 2 6"
    assert split("gpt-2", text) == "if Ġx : ĊĠĠĠ Ġy Ġ= Ġ2026"
    assert split("llama-bpe", text) == "if Ġx :Ċ ĠĠĠ Ġy Ġ= Ġ 202 6"
    assert split("qwen2", text) == "if Ġx :Ċ ĠĠĠ Ġy Ġ= Ġ 2 0 2 6"


def test_pieces_are_merged_by_score_and_unknown_characters_become_bytes():
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    types = [2, 3, 3, *[6] * 256]
    words = ["▁", *"helo", "he", "ll", "lo", "hello", "▁hello", "llo", "hell"]
    ranks = {"he": -1.0, "ll": -2.0, "lo": -3.0, "hell": -4.0, "hello": -5.0, "▁hello": -6.0}
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces + words,
        "tokenizer.ggml.token_type": types + [1] * len(words),
        "tokenizer.ggml.scores": [0.0] * len(pieces) + [ranks.get(word, -9.0) for word in words],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }

    made = tokenizer_of(metadata)

    def pieces_of(text: str) -> list[str]:
        return made.backend_tokenizer.encode(text, add_special_tokens=False).tokens

    assert pieces_of("hello") == ["▁hello"]
    assert pieces_of("hell") == ["▁", "hell"]
    assert pieces_of("lé") == ["▁", "l", "<0xC3>", "<0xA9>"]
    assert made("hello")["input_ids"] == [1, len(pieces) + words.index("▁hello")]
    assert made.decode(made("hello lé  o", add_special_tokens=False)["input_ids"]) == "hello lé  o"
    assert (made.bos_token, made.eos_token, made.unk_token) == ("<s>", "</s>", "<unk>")


def test_every_token_that_ends_a_text_or_a_turn_ends_an_answer(source, tmp_path):
    turn = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.bos_token_id": 3}
    file = write_gguf(tmp_path / "model.gguf", source, fields=turn)

    read = load_model(target_folder(str(file), tmp_path / "cache"), torch.float32, CPU)

    assert read.generation_config.eos_token_id == [source.config.eos_token_id, 7]
    assert read.generation_config.bos_token_id == 3


def settings_for(file: Path, cache: Path, run_dir: Path) -> Settings:
    return Settings.model_validate(
        {
            "target": str(file),
            "target_cache": cache,
            "run_dir": run_dir,
            "device": "cpu",
            "engine": {"max_batch": 2, "max_model_len": 100, "page_size": 4},
            "drafter": {"max_draft": 2},
            "policy": {"kind": "fixed", "draft_k": 2},
        }
    )


def test_greedy_text_is_that_of_transformers_on_the_file(file, cache, tmp_path):
    service = build_service(settings_for(file, cache, tmp_path))
    own = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )

    prompt = list(range(40, 60))
    got = run(service.engine, [request_of("0", prompt, 40, ignore_eos=True)])["0"].token_ids
    wanted = own.generate(
        torch.tensor([prompt]),
        max_new_tokens=40,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )

    assert got == wanted[0, len(prompt) :].tolist()
    assert service.model.model_name == "Tiny-1"


def test_a_llama_file_is_computed_by_our_decoder(folder):
    target = Target(load_model(folder, torch.float32, CPU), ())

    assert target.fuse(num_positions=64) is None
    assert target.is_fused


def test_server_and_trainer_find_one_target(file, cache, folder, source, tmp_path):
    served = load_target(settings_for(file, cache, tmp_path))
    head = load_target_head(folder, CPU, torch.float32)

    assert served.fingerprint == target_fingerprint(folder)
    assert torch.equal(head.embed_VH, source.get_input_embeddings().weight)
    assert target_name(str(file)) == "Tiny-1"


def test_the_same_file_gives_the_same_fingerprint_in_every_cache(file, folder, tmp_path):
    again = target_folder(str(file), tmp_path)

    assert again.name == folder.name and again != folder
    assert target_fingerprint(again) == target_fingerprint(folder)


def times_of(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_file_is_converted_once_wherever_it_lies(file, cache, folder, tmp_path):
    before = times_of(folder)
    moved = tmp_path / "elsewhere.gguf"
    shutil.copy(file, moved)

    assert target_folder(str(moved), cache) == folder
    assert times_of(folder) == before


def test_another_content_is_another_target(file, cache, folder, source, tmp_path):
    other = write_gguf(tmp_path / file.name, random_source("llama", seed=1))

    assert target_folder(str(other), cache) != folder


def changed_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        pytest.param("model.safetensors", changed_byte, id="a bit of the weights"),
        pytest.param("model.safetensors", lambda p: os.truncate(p, 9000), id="half the weights"),
        pytest.param("tokenizer.json", Path.unlink, id="no tokenizer"),
        pytest.param("config.json", changed_byte, id="configuration"),
        pytest.param(RECORD, lambda p: p.write_text("{"), id="record"),
        pytest.param("pytorch_model.bin", Path.touch, id="a file too many"),
    ],
)
def test_a_damaged_folder_is_converted_again(name, damage, file, tmp_path, caplog):
    folder = target_folder(str(file), tmp_path)
    sound = target_fingerprint(folder)
    damage(folder / name)
    caplog.clear()

    assert target_folder(str(file), tmp_path) == folder

    assert target_fingerprint(folder) == sound
    assert f"{folder} is damaged" in caplog.text
    before = times_of(folder)
    target_folder(str(file), tmp_path)
    assert times_of(folder) == before
    assert {path.name for path in tmp_path.iterdir()} == {folder.name, f"{folder.name}.lock"}


def test_what_a_killed_conversion_left_behind_is_removed(file, folder, tmp_path):
    left = tmp_path / f".{folder.name}.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")

    again = target_folder(str(file), tmp_path)

    assert times_of(again).keys() == times_of(folder).keys()
    assert not left.exists()


CONVERT = """
import logging, sys
from pathlib import Path
from targets.find import target_folder
logging.basicConfig(level="INFO", stream=sys.stdout, format="%(message)s")
print("folder", target_folder(sys.argv[1], Path(sys.argv[2])))
"""


def test_of_two_processes_at_once_one_converts(file, tmp_path):
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    env = {**os.environ, "PYTHONPATH": paths}
    command = ["-c", CONVERT, str(file), str(tmp_path / "new" / "cache")]
    logs = [tmp_path / f"{name}.log" for name in ("one", "other")]
    both = [Forked(command, env, tmp_path, log) for log in logs]

    assert [process.wait(timeout=100) for process in both] == [0, 0]
    outputs = [log.read_text() for log in logs]
    folders = {line for text in outputs for line in text.splitlines() if line.startswith("folder")}
    assert len(folders) == 1
    assert sum(text.count("converting ") - text.count("is converting") for text in outputs) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"general.architecture": "mamba"},
            "architecture 'mamba', and only those of llama, qwen2,",
        ),
        ({"split.count": 3}, "is one of 3 parts; join them with"),
        ({"llama.rope.scaling.type": "yarn"}, "scales rotary positions by the rule 'yarn'"),
        ({"llama.logit_scale": 2.0}, r"says llama\.logit_scale = 2\.0, which is not converted"),
        ({"tokenizer.ggml.pre": "tekken"}, "splits text by the rule 'tekken'; known are gpt-2"),
        ({"tokenizer.ggml.model": "t5"}, "tokenizer is of kind 't5'; known are"),
        (
            {"llama.block_count": 4},
            r"lacks 9 tensors, the first is blk\.3\.attn_k\.weight",
        ),
        ({"llama.block_count": 2}, r"LlamaForCausalLM has no place for its tensor blk\.2"),
        (
            {"llama.feed_forward_length": 80},
            r"ffn_gate\.weight has shape \(96, 64\), and by its metadata \(80, 64\)",
        ),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(fields, message, source, tmp_path):
    file = write_gguf(tmp_path / "model.gguf", source, fields=fields)

    with pytest.raises(ValueError, match=message):
        target_folder(str(file), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("gguf-*/"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"llama.block_count": 4_000_000_000}, "block_count = 4000000000; a whole number"),
        ({"llama.block_count": 2_000_000_000}, "block_count = 2000000000, and has 29 tensors"),
        ({"llama.block_count": 0}, "block_count = 0; a whole number above 0"),
        ({"llama.attention.head_count": 0}, "head_count = 0; a whole number above 0"),
        ({"llama.attention.head_count": [4, 4, 4]}, r"head_count = \[4, 4, 4\]; a whole number"),
        ({"llama.context_length": "2048"}, "context_length = '2048'; a whole number above 0"),
        (
            {"llama.attention.layer_norm_rms_epsilon": -1.0},
            r"epsilon = -1\.0; a finite number above 0",
        ),
        ({"llama.rope.freq_base": float("nan")}, "freq_base = nan; a finite number above 0"),
        ({"tokenizer.ggml.eos_token_id": 999_999}, "eos_token_id = 999999, and its vocabulary"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "has 288 tokens, and types of 2"),
        ({"tokenizer.ggml.tokens": "abc"}, r"no list tokenizer\.ggml\.tokens"),
        ({"tokenizer.ggml.merges": ["ab"]}, "has a merge of one part, 'ab'"),
    ],
)
def test_metadata_that_no_model_has_are_refused_by_name(fields, message, source, tmp_path):
    file = write_gguf(tmp_path / "model.gguf", source, fields=fields)

    with pytest.raises(ValueError, match=rf"(?s)cannot convert .*model\.gguf: .*{message}"):
        target_folder(str(file), tmp_path / "cache")


@pytest.mark.parametrize(
    "lacking", ["embedding_length", "block_count", "head_count", "tokens", "merges"]
)
def test_metadata_that_a_model_needs_are_named_if_they_are_missing(
    lacking, source, tmp_path, monkeypatch
):
    every = gguf_files._fields
    monkeypatch.setattr(
        gguf_files,
        "_fields",
        lambda *given: {k: v for k, v in every(*given).items() if not k.endswith(f".{lacking}")},
    )
    file = write_gguf(tmp_path / "model.gguf", source)

    with pytest.raises(ValueError, match=rf"cannot convert .*{lacking}"):
        target_folder(str(file), tmp_path / "cache")


def test_a_conversion_that_fails_leaves_nothing_of_what_it_wrote(source, tmp_path):
    last = {"output_norm.weight": np.full(64, np.inf, np.float32)}
    file = write_gguf(tmp_path / "model.gguf", source, tensors=last)

    with pytest.raises(ValueError, match="NaN or infinite"):
        target_folder(str(file), tmp_path / "cache")

    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_missing_and_unknown_tensors_are_refused_by_name(source, tmp_path):
    short = write_gguf(tmp_path / "short.gguf", source, without="blk.1.attn_q.weight")
    with pytest.raises(
        ValueError, match=r"short\.gguf: it lacks 1 tensors, the first is blk\.1\.attn_q"
    ):
        target_folder(str(short), tmp_path)

    more = {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}
    long = write_gguf(tmp_path / "long.gguf", source, tensors=more)
    with pytest.raises(ValueError, match=r"no place for its tensor blk\.0\.attn_sinks\.weight"):
        target_folder(str(long), tmp_path)


def test_values_that_are_not_finite_are_refused_by_name(source, tmp_path):
    broken = {"blk.1.ffn_norm.weight": np.full(64, np.nan, np.float32)}
    file = write_gguf(tmp_path / "model.gguf", source, tensors=broken)

    with pytest.raises(ValueError, match=r"blk\.1\.ffn_norm\.weight has values that are NaN"):
        target_folder(str(file), tmp_path)


@pytest.mark.parametrize("share", [0.99, 0.5, 0.02])
def test_a_file_that_is_cut_short_is_refused(share, file, tmp_path):
    content = file.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(content[: int(len(content) * share)])

    with pytest.raises(ValueError, match=r"cut\.gguf is cut short or damaged"):
        target_folder(str(cut), tmp_path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip"])
def test_another_kind_of_file_is_refused(content, tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(content)

    with pytest.raises(ValueError, match=r"model\.gguf' is not a GGUF file: it begins with b'"):
        target_folder(str(file), tmp_path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.gguf' does not exist"):
        target_folder(str(tmp_path / "none.gguf"), tmp_path)


def test_a_missing_package_is_named_with_its_extra(file, folder, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(ValueError, match=r"package gguf; install it with .*serving\[gguf\]"):
        target_folder(str(file), tmp_path)
    assert target_folder(str(file), cache) == folder


def test_a_cache_that_cannot_be_written_is_named(file, tmp_path):
    (tmp_path / "taken").write_text("a file")

    with pytest.raises(ValueError, match=r"cannot keep .*taken.*name another folder with target_c"):
        target_folder(str(file), tmp_path / "taken")


def test_the_cache_is_in_the_users_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "slipstream" / "targets"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "slipstream" / "targets"


def test_a_folder_is_loaded_by_auto_classes_without_gguf(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)

    assert tokenizer.backend_tokenizer.to_str() == load_tokenizer(folder).backend_tokenizer.to_str()
