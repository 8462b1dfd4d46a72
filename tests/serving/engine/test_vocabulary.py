"""Names of different tokens differ, and the bytes of tokens add up to the text."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken

from oracles import tokenizer_kinds as kinds
from oracles.support import REPOSITORY
from serving.engine.vocabulary import Vocabulary
from targets.tokenizer import load_tokenizer

BUNDLED = load_tokenizer(REPOSITORY / "examples" / "target")
SENTENCEPIECE = kinds.sentencepiece()
TOKENIZERS = {
    "bundled": BUNDLED,
    "byte level": kinds.byte_level(),
    "sentencepiece": SENTENCEPIECE,
    "gemma": kinds.sentencepiece(strips_first_space=False),
    "metaspace": kinds.metaspace(),
    "word pieces": kinds.word_pieces(),
    "no decoder": kinds.without_decoder(),
    **{f"metaspace {scheme}": kinds.metaspace_bpe(scheme) for scheme in ("always", "first")},
    "metaspace never": kinds.metaspace_bpe("never", split=False),
    "an unknown decoder": kinds.two_spaces_stripped(),
}


def id_of(token: str, tokenizer=SENTENCEPIECE) -> int:
    token_id = tokenizer.convert_tokens_to_ids(token)
    assert token_id != tokenizer.unk_token_id
    return token_id


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_two_tokens_have_one_name(name):
    tokenizer = TOKENIZERS[name]
    vocabulary = Vocabulary(tokenizer)
    num_ids = len(tokenizer) + 5  # a model may have more ids than its tokenizer
    assert len({vocabulary.name(token) for token in range(num_ids)}) == num_ids


@pytest.mark.parametrize(
    ("token", "name", "data"),
    [
        pytest.param("▁the", " the", b" the", id="a word"),
        pytest.param("the", "the", b"the", id="without its space"),
        pytest.param("▁", " ", b" ", id="a space"),
        pytest.param("é", "é", "é".encode(), id="an accent"),
        pytest.param("<0x0A>", "\n", b"\n", id="a byte that is a character"),
        pytest.param("<0xE4>", "token_id:232", b"\xe4", id="a part of a character"),
        pytest.param("<0x61>", "token_id:101", b"a", id="a byte that reads as another token"),
        pytest.param("<0x20>", "token_id:36", b" ", id="a space that does"),
        pytest.param("</s>", "</s>", b"</s>", id="a special token"),
    ],
)
def test_sentencepiece_tokens(token, name, data):
    vocabulary, token_id = Vocabulary(SENTENCEPIECE), SENTENCEPIECE.convert_tokens_to_ids(token)
    assert vocabulary.name(token_id) == name
    assert vocabulary.bytes_of(token_id, skip_special=False) == data


def test_a_special_token_that_is_skipped_has_a_name_but_no_bytes():
    vocabulary, end = Vocabulary(SENTENCEPIECE), id_of("</s>")
    assert vocabulary.name(end) == "</s>"
    assert vocabulary.bytes_of(end, skip_special=True) is None


def test_an_id_that_the_tokenizer_does_not_have_has_no_bytes():
    vocabulary = Vocabulary(SENTENCEPIECE)
    assert vocabulary.bytes_of(len(SENTENCEPIECE), skip_special=False) is None
    assert vocabulary.name(len(SENTENCEPIECE)) == f"token_id:{len(SENTENCEPIECE)}"


@pytest.mark.parametrize("text", ["café", "漢字", "🙂👍🏽", "e\u0301", " the tree", "a\nb"])
@pytest.mark.parametrize("name", ["bundled", "byte level", "sentencepiece", "gemma"])
def test_the_bytes_of_tokens_are_those_of_their_text(name, text):
    tokenizer = TOKENIZERS[name]
    vocabulary, tokens = Vocabulary(tokenizer), tokenizer.encode(text, add_special_tokens=False)
    data = [vocabulary.bytes_of(token, skip_special=True) for token in tokens]
    space = " " if name == "sentencepiece" else ""  # the one before a text
    assert b"".join(data).decode() == space + text


def test_an_added_token_in_plain_text_is_told_from_the_one_in_symbols():
    tokenizer = kinds.byte_level()
    tokenizer.add_tokens([AddedToken(" ", normalized=False)])
    vocabulary, added = Vocabulary(tokenizer), len(tokenizer) - 1
    assert tokenizer.convert_ids_to_tokens(added) == " "
    assert vocabulary.bytes_of(added, skip_special=True) == b" "
    assert vocabulary.name(added) == f"token_id:{added}"
    assert vocabulary.name(id_of("Ġ", tokenizer)) == " "


def test_the_longest_special_token_is_found():
    tokenizer = kinds.byte_level()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|a", "<|a|>", "[a"]})
    vocabulary = Vocabulary(tokenizer)
    found = [vocabulary.special_at("x<|a|><|ab[a", at) for at in range(12)]
    long, short, other = (id_of(token, tokenizer) for token in ("<|a|>", "<|a", "[a"))
    assert found == [None, long, *[None] * 4, short, *[None] * 3, other, None]
