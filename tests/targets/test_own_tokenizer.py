"""A server's own tokenizer gives the ids, texts and prompts that ``transformers`` gives."""

from __future__ import annotations

import json
import random
import shutil
from functools import cache

import jinja2
import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from oracles.support import REPOSITORY, tiny_qwen3_config, tiny_tokenizer
from oracles.tokenizer_kinds import byte_level, metaspace, sentencepiece, without_decoder
from serving.engine.vocabulary import Vocabulary
from targets.own_tokenizer import OwnTokenizer, as_written
from targets.tokenizer import load_tokenizer, served_tokenizer

BUNDLED = REPOSITORY / "examples" / "target"
KINDS = {
    "byte level": byte_level,
    "sentencepiece": sentencepiece,
    "metaspace": metaspace,
    "without decoder": without_decoder,
}
_PARTS = [
    "the quick brown fox", "def add(left, right):\n    return left + right\n", "  \t\n\n",
    "naïve café",
    "<|end|>", "<|user|>", "<|assistant|>", "<|endoftext|>", "</s>", "<0x41>", "日本語", "🙂🏽‍🔬",
    "e\u0301", "\u202eabc", "123,456.789", "a" * 70, "\x00\x07",
    "%s {{ }} {% if %}", "'ll don't I'm",
]  # fmt: skip


@cache
def texts(count=120):
    """Ordinary and strange texts, among them special tokens in plain text."""
    rng = random.Random(7)
    found = ["", " ", *_PARTS]
    while len(found) < count:
        parts = rng.choices(_PARTS, k=rng.randint(1, 6))
        parts.append("".join(chr(rng.choice((rng.randrange(32, 127), rng.randrange(160, 0x2FFF))))
                             for _ in range(rng.randint(0, 20))))  # fmt: skip
        rng.shuffle(parts)
        found.append(rng.choice(("", " ", "\n")).join(parts))
    return found


def conversations():
    """Messages of a few shapes, with texts that templates may stumble over."""
    rng = random.Random(3)
    for number in range(24):
        turns = [{"role": "system", "content": rng.choice(texts())}] if number % 3 == 0 else []
        for turn in range(rng.randint(1, 4)):
            role = "assistant" if turn % 2 else "user"
            turns.append({"role": role, "content": rng.choice(texts())})
        yield turns


def saved(folder, tokenizer, **config):
    """A target's folder with a tokenizer; ``config`` goes into tokenizer_config.json."""
    tiny_qwen3_config(300, 0).save_pretrained(folder)
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(data | {"architectures": ["Qwen3ForCausalLM"]}))
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def assert_same(own, theirs):
    """Ids, texts, special tokens, and what a token adds to a text."""
    assert own.get_vocab() == theirs.get_vocab()
    assert len(own) == len(theirs)
    assert own.vocab_size == theirs.vocab_size
    assert own.special_tokens_map == theirs.special_tokens_map
    assert own.chat_template == theirs.chat_template
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        assert getattr(own, name) == getattr(theirs, name)
    added, wanted = own.added_tokens_decoder, theirs.added_tokens_decoder
    assert {i: str(t) for i, t in added.items()} == {i: str(t) for i, t in wanted.items()}
    ours, its = Vocabulary(own), Vocabulary(theirs)
    assert ours.special == its.special and ours.is_local == its.is_local
    rng = random.Random(1)
    for text in texts():
        ids = theirs(text)["input_ids"]
        assert own(text)["input_ids"] == ids
        bare = theirs(text, add_special_tokens=False)["input_ids"]
        assert own(text, add_special_tokens=False)["input_ids"] == bare
        mixed = [*ids, *(rng.randrange(len(own)) for _ in range(8))]
        for skips in (False, True):
            assert own.decode(mixed, skip_special_tokens=skips) == theirs.decode(
                mixed, skip_special_tokens=skips
            )
    if ours.is_local:
        for token in range(len(own)):
            assert ours.bytes_of(token, False) == its.bytes_of(token, False)


def asked(tokenizer, messages):
    """The prompt of a conversation, or what the template says against it."""
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except jinja2.TemplateError as error:
        return type(error).__name__, error.message


def test_the_bundled_tokenizer_is_taken_as_written():
    own, theirs = as_written(BUNDLED), AutoTokenizer.from_pretrained(BUNDLED)

    assert own is not None
    assert_same(own, theirs)
    assert own.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    for messages in conversations():
        assert asked(own, messages) == asked(theirs, messages)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tokenizer_is_the_same_from_the_first_start_on(kind, tmp_path):
    folder = saved(tmp_path / "target", KINDS[kind]())
    theirs = AutoTokenizer.from_pretrained(folder)
    first = served_tokenizer(folder, tmp_path / "cache")
    second = served_tokenizer(folder, tmp_path / "cache")

    assert isinstance(second, OwnTokenizer)
    for served in (first, second):
        if isinstance(served, OwnTokenizer):
            assert_same(served, theirs)


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizer"])
def test_what_transformers_makes_of_a_class_of_its_own_is_kept(name, tmp_path):
    """It builds these in Python from the vocabulary, not from what tokenizer.json says."""
    folder = saved(tmp_path / "target", tiny_tokenizer(), tokenizer_class=name, unk_token="<|end|>")
    assert as_written(folder) is None
    first = served_tokenizer(folder, tmp_path / "cache")
    assert isinstance(first, PreTrainedTokenizerFast)

    second = served_tokenizer(folder, tmp_path / "cache")

    assert isinstance(second, OwnTokenizer)
    assert_same(second, AutoTokenizer.from_pretrained(folder))
    for messages in conversations():
        assert asked(second, messages) == asked(first, messages)


def test_another_tokenizer_in_the_same_folder_is_not_taken_for_the_kept_one(tmp_path):
    folder = saved(tmp_path / "target", tiny_tokenizer(), tokenizer_class="GPT2Tokenizer")
    served_tokenizer(folder, tmp_path / "cache")
    saved(folder, tiny_tokenizer(270), tokenizer_class="GPT2Tokenizer")

    served = served_tokenizer(folder, tmp_path / "cache")
    assert served.get_vocab() == load_tokenizer(folder).get_vocab()
    assert len(served) < len(tiny_tokenizer())


@pytest.mark.parametrize("damage", ["", "{", '{"backend": "{}", "chat_template": null}', "cut"])
def test_a_damaged_kept_tokenizer_is_made_again(damage, tmp_path, caplog):
    folder = saved(tmp_path / "target", tiny_tokenizer(), tokenizer_class="GPT2Tokenizer")
    cache = tmp_path / "cache"
    served_tokenizer(folder, cache)
    (path,) = cache.iterdir()
    whole = path.read_text()
    path.write_text(whole.replace("ByteLevel", "BiteLevel") if damage == "cut" else damage)

    assert isinstance(served_tokenizer(folder, cache), PreTrainedTokenizerFast)
    assert "cannot be used" in caplog.text
    assert path.read_text() == whole


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path):
    folder = saved(tmp_path / "target", tiny_tokenizer(), tokenizer_class="GPT2Tokenizer")
    cache = tmp_path / "cache"
    cache.write_text("a file")

    assert isinstance(served_tokenizer(folder, cache), PreTrainedTokenizerFast)


@pytest.mark.parametrize(
    "config",
    [
        {"tokenizer_class": "LlamaTokenizer"},
        {"image_token": "<image>"},
        {"bos_token": "<new>"},
        {"extra_special_tokens": {"image_token": "<|end|>"}},
        {"split_special_tokens": True},
        {"eos_token": {"content": "<|end|>", "__type": "AddedToken"}},
    ],
    ids=lambda config: next(iter(config)),
)
def test_what_transformers_might_change_is_left_to_it(config, tmp_path):
    folder = saved(tmp_path / "target", tiny_tokenizer())
    assert as_written(folder) is not None

    assert as_written(saved(folder, tiny_tokenizer(), **config)) is None


@pytest.mark.parametrize(
    "name", ["special_tokens_map.json", "added_tokens.json", "tokenizer.model"]
)
def test_legacy_files_are_left_to_transformers(name, tmp_path):
    folder = saved(tmp_path / "target", tiny_tokenizer())
    (folder / name).write_text("{}")

    assert as_written(folder) is None


def test_tokens_that_transformers_would_add_are_left_to_it(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.add_tokens([AddedToken("<plain>", special=False)])
    folder = saved(tmp_path / "target", tokenizer, extra_special_tokens=["<plain>"])

    assert as_written(folder) is None


TEMPLATES = {
    "names of special tokens": "{{ bos_token }}{% for m in messages %}{{ m['content'] }}"
    "{{ eos_token }}{% endfor %}{{ unknown_token }}",
    "blocks and blanks": """
    {%- for message in messages %}
        {% if loop.first and message.role != 'system' %}
            System: {{ 'be <good> & kind' }}
        {% endif %}
        {%- if message.content is string %}
    {{ message.role | upper }}: {{ message.content | trim }}
        {%- endif %}
    {% endfor %}
    {% if add_generation_prompt %}A:{% endif %}
    """,
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2, sort_keys=true) }}"
    "{{ tools is none }}{{ documents is none }}",
    "loop controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
    "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}\n{% endgeneration %}"
    "{% endfor %}",
    "macros and namespaces": "{% set ns = namespace(n=0) %}{% macro show(m) %}<{{ m.role }}>"
    "{% endmacro %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ show(m) }}{{ ns.n }}"
    "{% endfor %}",
    "refusal": "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}{{ messages[-1].content }}",
    "year": "{{ strftime_now('%Y') }}{{ messages | length }}",
    "not allowed": "{{ messages.append(1) }}",
    "outside": "{{ ''.__class__.__mro__ }}",
    "not a template": "{% for m in messages %}{{ m.content }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(name):
    theirs = tiny_tokenizer()
    theirs.chat_template = TEMPLATES[name]
    own = OwnTokenizer(theirs.backend_tokenizer, TEMPLATES[name], theirs.special_tokens_map)

    for messages in conversations():
        assert asked(own, messages) == asked(theirs, messages)


def test_a_target_without_a_template_says_so(tmp_path):
    folder = saved(tmp_path / "target", tiny_tokenizer())
    shutil.move(folder / "chat_template.jinja", tmp_path / "elsewhere")

    own = as_written(folder)

    assert own is not None and own.chat_template is None
    with pytest.raises(ValueError, match="no chat template"):
        own.apply_chat_template([], add_generation_prompt=True, tokenize=False)
