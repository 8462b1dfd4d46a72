"""Long prompts: what cannot fit is refused before it is tokenized, and short ones never wait."""

from __future__ import annotations

import asyncio
import random
import threading

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from oracles import tokenizer_kinds as kinds
from oracles.support import REPOSITORY, tiny_tokenizer
from serving.http.fewest_tokens import FewestTokens
from serving.http.prompts import LONG_TEXT, PromptEncoder, TooManyTokensError
from targets.own_tokenizer import OwnTokenizer
from targets.tokenizer import load_tokenizer
from tests.serving.http.live import MODEL, LiveServer

BUNDLED = load_tokenizer(REPOSITORY / "examples" / "target")
CHARACTERS = [
    *"aeit \n\t.,0-=▁<>|xé漢🙂ᾂ가ﬁ`K", " " * 40, "e\u0301", "\u0323\u0307", "the tree ", "def ",
    "<|assistant|>", "<|endoftext|>", "<|end|>", "<0xE4>", "\u1112\u1161\u11ab", "</s>", "Ġ",
    "<|wide token|>",
]  # fmt: skip


def changed(tokenizer, **parts):
    for name, part in parts.items():
        setattr(tokenizer.backend_tokenizer, name, part)
    return tokenizer


def with_added(tokenizer, **options):
    token = AddedToken("<|wide token|>", **options)
    tokenizer.add_tokens([token])
    return tokenizer


def some_bytes(**options):
    """BPE over a few bytes only: others are unknown."""
    letters = "aeit Ġ<|é漢"
    vocab = {letter: place for place, letter in enumerate(dict.fromkeys(letters))}
    vocab |= {"<unk>": len(vocab), "ae": len(vocab) + 1}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "e")], **options))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def whole_words():
    """A word is one token, however long it is."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def split(behavior):
    """A byte-level tokenizer that treats spaces by itself."""
    steps = [pre_tokenizers.Split(" ", behavior), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    return changed(tiny_tokenizer(), pre_tokenizer=pre_tokenizers.Sequence(steps))


SPACES = normalizers.Replace(" ", "▁▁▁")
KNOWN = {
    "bundled": BUNDLED,
    "byte level": kinds.byte_level(),
    "a space before": changed(
        tiny_tokenizer(), pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)
    ),
    "NFC": changed(tiny_tokenizer(), normalizer=normalizers.NFC()),
    "NFKC": changed(tiny_tokenizer(), normalizer=normalizers.NFKC()),
    "NFD": changed(tiny_tokenizer(), normalizer=normalizers.NFD()),
    "an added token": with_added(kinds.byte_level(), normalized=False),
    "sentencepiece": kinds.sentencepiece(),
    "gemma": kinds.sentencepiece(strips_first_space=False),
    "an added token that is normalized": with_added(kinds.sentencepiece(), normalized=True),
    "an added token that is not": with_added(kinds.sentencepiece(), normalized=False),
    "metaspace always": kinds.metaspace_bpe("always"),
    "metaspace first": kinds.metaspace_bpe("first"),
    "metaspace never": kinds.metaspace_bpe("never"),
    "isolated spaces": split("isolated"),
    "wide spaces": changed(tiny_tokenizer(), normalizer=SPACES),
    "no spaces": changed(tiny_tokenizer(), normalizer=normalizers.Replace(" ", "")),
    "NFC, then spaces": changed(
        kinds.sentencepiece(),
        normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "▁")]),
    ),
    "unknown bytes are dropped": some_bytes(),
    "unknown bytes are one token": some_bytes(unk_token="<unk>", fuse_unk=True),
}
UNKNOWN = {
    "removed spaces": split("removed"),
    "an added token takes the spaces before it": with_added(kinds.byte_level(), lstrip=True),
    "an added token takes the spaces after it": with_added(kinds.byte_level(), rstrip=True),
    "lower case": changed(tiny_tokenizer(), normalizer=normalizers.Lowercase()),
    "stripped": changed(tiny_tokenizer(), normalizer=normalizers.Strip()),
    "NFC after spaces": changed(
        tiny_tokenizer(),
        normalizer=normalizers.Sequence([SPACES, normalizers.NFC()]),
    ),
    "unigram": kinds.metaspace(),
    "word pieces": kinds.word_pieces(),
    "whole words": whole_words(),
}


def number_of(tokenizer, text):
    return len(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("name", [*KNOWN, *UNKNOWN])
def test_no_text_has_fewer_tokens(name):
    tokenizer, rng = {**KNOWN, **UNKNOWN}[name], random.Random(0)
    fewest = FewestTokens(tokenizer)
    for round in range(400):
        some = rng.sample(CHARACTERS, k=rng.randint(1, 4))
        text = "".join(rng.choices(some, k=rng.randrange(40)))
        assert fewest(text) <= number_of(tokenizer, text), (round, text)


@pytest.mark.parametrize("name", UNKNOWN)
def test_nothing_is_promised_for_tokenizers_that_may_lose_text(name):
    assert FewestTokens(UNKNOWN[name])("the tree " * 1000) == 0


@pytest.mark.parametrize("name", KNOWN)
def test_the_bound_is_good_enough_to_refuse_words(name):
    text = " ".join("".join(random.Random(n).choices("aeit", k=6)) for n in range(5000))
    fewest, real = FewestTokens(KNOWN[name])(text), number_of(KNOWN[name], text)
    assert fewest >= real / 15


def test_the_bound_is_exact_for_runs_of_the_longest_token():
    fewest = FewestTokens(BUNDLED)
    longest = max(map(len, (BUNDLED.decode([i]) for i in range(len(BUNDLED)))))
    text = " " * longest
    assert number_of(BUNDLED, text) == 1
    assert [fewest(text * n) for n in (0, 1, 7, 1024)] == [0, 1, 7, 1024]
    assert fewest(text * 7 + " ") == 8


class Watched:
    """The Rust tokenizer of another one, with a list of the texts that it was given. It waits for
    ``may_go_on`` before the long ones."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        self.texts: list[str] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def encode_batch_fast(self, texts, **options):
        self.texts += texts
        if len(texts[0]) >= LONG_TEXT:
            self.may_go_on.wait(60)
        return self._backend.encode_batch_fast(texts, **options)


@pytest.fixture
def watched():
    return Watched(BUNDLED.backend_tokenizer)


@pytest.fixture
def encoder(watched):
    encoder = PromptEncoder(OwnTokenizer(watched, BUNDLED.chat_template, {}))
    yield encoder
    encoder.close()


WORDS = "every word is one of many " * 40_000
SPACES_1024 = " " * 32 * 1024
"""Exactly 1024 tokens of the bundled target."""


def test_what_cannot_fit_is_never_tokenized(encoder, watched):
    async def ask():
        many = ["a", "漢" * (LONG_TEXT // 2), "漢" * (LONG_TEXT // 2)]  # long together
        for texts in ([WORDS], ["a", WORDS], [SPACES_1024 + " "], many):
            with pytest.raises(TooManyTokensError) as caught:
                await encoder.encode(texts, most=1024)
            assert caught.value.at_least > 1024
        with pytest.raises(TooManyTokensError):
            await encoder.encode_chat([{"role": "user", "content": WORDS}], most=1024)

    asyncio.run(ask())
    assert watched.texts == []


def test_what_fits_exactly_is(encoder):
    (ids,) = asyncio.run(encoder.encode([SPACES_1024], most=1024))
    assert len(ids) == 1024


def test_a_short_text_may_have_too_many_tokens(encoder):
    """Its exact number is told then."""
    (ids,) = asyncio.run(encoder.encode(["漢" * 600], most=10))
    assert len(ids) > 600


def test_short_texts_do_not_wait_for_long_ones(encoder, watched):
    watched.may_go_on.clear()

    async def ask():
        long = [asyncio.create_task(encoder.encode([SPACES_1024], most=1024)) for _ in range(8)]
        chat = [{"role": "user", "content": "a"}]
        for _ in range(3):
            assert await encoder.encode(["short"], most=1024)
            assert await encoder.encode_chat(chat, most=1024)
        assert not any(task.done() for task in long)
        watched.may_go_on.set()
        await asyncio.gather(*long)

    try:
        asyncio.run(asyncio.wait_for(ask(), 60))
    finally:
        watched.may_go_on.set()
    assert len(watched.texts) == 14


BODIES = [
    pytest.param("/v1/completions", "prompt", {"prompt": WORDS}, id="a completion"),
    pytest.param("/v1/completions", "prompt", {"prompt": ["a", WORDS]}, id="one of several"),
    pytest.param(
        "/v1/chat/completions",
        "messages",
        {"messages": [{"role": "user", "content": WORDS}]},
        id="a chat",
    ),
]


@pytest.mark.parametrize(("path", "param", "body"), BODIES)
def test_the_refusal_says_how_many_tokens_there_are_at_least(server: LiveServer, path, param, body):
    with server.client() as client:
        answer = client.post(path, json={"model": MODEL, "max_tokens": 3, **body})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: at least ")
    assert "tokens and max_tokens 3, together at most engine.max_model_len" in error["message"]


def test_too_many_prompts_are_refused_before_they_are_tokenized(server: LiveServer):
    """Otherwise the length of the last one would be told."""
    with server.client() as client:
        body = {"model": MODEL, "prompt": ["a"] * 100_000 + ["漢" * 9000]}
        answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert "100001 choices in one request" in answer.json()["error"]["message"]
