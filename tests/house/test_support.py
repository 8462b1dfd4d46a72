"""transformers loads the tiny target, and its tokenizer reproduces any text."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer


def test_tiny_target_loads_by_its_folder(tiny_target_dir: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_target_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_target_dir)

    assert model.config.num_hidden_layers == 4
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.decode(tokenizer.encode("naïve → 字\n\tdef")) == "naïve → 字\n\tdef"
    assert tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    ).endswith("assistant: ")
