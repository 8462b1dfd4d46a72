"""The text of tokens that come one by one or many at once is the tokenizer's text of them all."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordPiece
from transformers import PreTrainedTokenizerFast

from oracles.support import REPOSITORY, tiny_tokenizer
from serving.engine.detokenize import Detokenizer, decoder_of
from targets.load import load_tokenizer

BUNDLED = load_tokenizer(REPOSITORY / "examples" / "target")
TINY = tiny_tokenizer()
TEXTS = st.text(st.sampled_from("aé ß€漢🙂\n,.' "), max_size=8)


@st.composite
def ids_of(draw, tokenizer):
    """Whole characters, halves of some, special tokens and anything else, in any order."""
    special = st.sampled_from(tokenizer.all_special_ids).map(lambda token: [token])
    any_token = st.integers(0, len(tokenizer) - 1).map(lambda token: [token])
    text = TEXTS.map(lambda text: tokenizer.encode(text, add_special_tokens=False))
    half = st.tuples(text, st.integers(0, 6)).map(lambda pair: pair[0][pair[1] :])
    pieces = draw(st.lists(st.one_of(special, any_token, text, half), max_size=8))
    return [token for piece in pieces for token in piece]


@pytest.mark.parametrize("tokenizer", [BUNDLED, TINY], ids=["bundled", "tiny"])
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_the_short_way_reads_as_the_wrapper_does(tokenizer, data):
    ids = data.draw(ids_of(tokenizer))
    decode = decoder_of(tokenizer)
    assert decode.func.__self__ is tokenizer.backend_tokenizer
    assert decode(ids) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("tokenizer", [BUNDLED, TINY], ids=["bundled", "tiny"])
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_the_pieces_make_the_text_of_all_tokens(tokenizer, data):
    ids = data.draw(ids_of(tokenizer))
    size = data.draw(st.integers(1, 5))
    stop = data.draw(st.sampled_from([[], ["never there"]]))
    detokenizer, text = Detokenizer(tokenizer, stop), ""
    for start in range(0, len(ids), size):
        for token in ids[start : start + size]:
            assert not detokenizer.add(token)
        text += detokenizer.take(final=False)
    text += detokenizer.take(final=True)
    assert text == tokenizer.decode(ids, skip_special_tokens=True)


class Louder(PreTrainedTokenizerFast):
    def _decode(self, *args, **kwargs):
        return super()._decode(*args, **kwargs).upper()


def word_pieces(kind=PreTrainedTokenizerFast, **options):
    backend = Tokenizer(WordPiece({"[UNK]": 0, "hi": 1, ".": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(cleanup=False)
    return kind(tokenizer_object=backend, unk_token="[UNK]", **options)


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [
        pytest.param(word_pieces(), "hi .", id="nothing is added"),
        pytest.param(word_pieces(clean_up_tokenization_spaces=True), "hi.", id="spaces tidied"),
        pytest.param(word_pieces(Louder), "HI .", id="a decoder of its own"),
    ],
)
def test_what_a_wrapper_adds_is_kept(tokenizer, text):
    assert decoder_of(tokenizer)([0, 1, 2]) == text == tokenizer.decode([1, 2])


def test_what_a_token_reads_as_may_depend_on_the_one_before():
    detokenizer, texts = Detokenizer(word_pieces(), []), []
    for token in [1, 1, 2]:
        detokenizer.add(token)
        texts.append(detokenizer.take(final=False))
    assert texts == ["hi", " hi", " ."]


def test_half_a_character_waits_for_its_other_half():
    ids = TINY.encode("a€b")
    assert len(ids) == 5
    detokenizer, texts = Detokenizer(TINY, []), []
    for token in ids:
        detokenizer.add(token)
        texts.append(detokenizer.take(final=False))
    assert texts == ["a", "", "", "€", "b"]


def test_a_stop_string_ends_the_text_before_it():
    detokenizer = Detokenizer(TINY, ["b c", "zz"])
    found = [detokenizer.add(token) for token in TINY.encode("a b c")]
    assert found == [False] * 4 + [True]
    assert detokenizer.take(final=True) == "a "


def test_what_may_begin_a_stop_string_stays_back():
    detokenizer = Detokenizer(TINY, ["xyz"])
    for token in TINY.encode("wxy"):
        detokenizer.add(token)
    assert detokenizer.take(final=False) == "w"
    assert detokenizer.take(final=True) == "xy"
