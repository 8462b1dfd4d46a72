"""The text of a completion is what its tokens add to the prompt's text, wherever steps end."""

from __future__ import annotations

from random import Random

import pytest
from transformers import PreTrainedTokenizerFast

from oracles import tokenizer_kinds as kinds
from oracles.support import REPOSITORY
from serving.engine.text import WindowReader, text_reader
from serving.engine.vocabulary import Vocabulary
from targets.tokenizer import load_tokenizer

TOKENIZERS = {
    "bundled": load_tokenizer(REPOSITORY / "examples" / "target"),
    "byte level": kinds.byte_level(),
    "sentencepiece": kinds.sentencepiece(),
    "gemma": kinds.sentencepiece(strips_first_space=False),
    "metaspace": kinds.metaspace(),
    "word pieces": kinds.word_pieces(),
    "tidied word pieces": kinds.word_pieces(cleanup=True),
    "no decoder": kinds.without_decoder(),
    **{f"metaspace {scheme}": kinds.metaspace_bpe(scheme) for scheme in ("always", "first")},
    "metaspace never": kinds.metaspace_bpe("never", split=False),
    "an unknown decoder": kinds.two_spaces_stripped(),
}
VOCABULARIES = {name: Vocabulary(tokenizer) for name, tokenizer in TOKENIZERS.items()}
SENTENCEPIECE = TOKENIZERS["sentencepiece"]
CHARACTERS = ["a", " ", "\n", "é", "ß", "€", "漢", "🙂", "\ufffd"]


def byte_ids(data: bytes) -> list[int]:
    return SENTENCEPIECE.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in data])


def ids(*tokens: str, tokenizer=SENTENCEPIECE) -> list[int]:
    found = tokenizer.convert_tokens_to_ids(list(tokens))
    assert tokenizer.unk_token_id not in found
    return found


def pieces(vocabulary, prompt, steps, skip_special=True) -> list[str]:
    """Text of each step, and what the end adds."""
    reader = text_reader(vocabulary, prompt, skip_special)
    return [*(reader.read(step) for step in steps), reader.end()]


def some_tokens(rng: Random, name: str, whole: bool) -> list[int]:
    """Any tokens, special and unknown ones included. Over byte fallback they form characters if
    ``whole``."""
    tokenizer, tokens = TOKENIZERS[name], []
    for _ in range(rng.randrange(8)):
        token = rng.randrange(len(tokenizer) + 3)
        if whole and token in BYTES and VOCABULARIES[name].errors != "replace":
            tokens += byte_ids(rng.choice(CHARACTERS).encode())
        elif rng.random() < 0.3:
            text = "".join(rng.choices(CHARACTERS, k=3))
            encoded = tokenizer.encode(text, add_special_tokens=False)
            tokens += encoded if whole else encoded[rng.randrange(3) :]
        else:
            tokens.append(token)
    return tokens


def some_steps(rng: Random, tokens: list[int]) -> list[list[int]]:
    """The tokens cut into steps of 0 to 5."""
    steps, start = [], 0
    while start < len(tokens):
        end = start + rng.randrange(6)
        steps.append(tokens[start:end])
        start = end
    return steps


BYTES = set(byte_ids(bytes(range(256))))


def rounds_of(name: str) -> int:
    """The decoder of the library is slow."""
    return 3000 if VOCABULARIES[name].is_local else 500


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_pieces_add_up_to_what_the_tokenizer_decodes(name):
    tokenizer, rng = TOKENIZERS[name], Random(0)
    for _ in range(rounds_of(name)):
        skip = rng.random() < 0.7
        prompt = some_tokens(rng, name, whole=True)
        if "\ufffd" in tokenizer.decode(prompt, skip_special_tokens=skip):
            prompt = []  # the tests of cut prompts say what happens then
        completion = some_tokens(rng, name, whole=True)
        got = pieces(VOCABULARIES[name], prompt, some_steps(rng, completion), skip)
        before = tokenizer.decode(prompt, skip_special_tokens=skip)
        both = tokenizer.decode(prompt + completion, skip_special_tokens=skip)
        assert before + "".join(got) == both, (prompt, completion, skip)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_text_does_not_depend_on_where_steps_end(name):
    rng = Random(1)
    for _ in range(rounds_of(name)):
        prompt = some_tokens(rng, name, whole=False)
        completion = some_tokens(rng, name, whole=False)
        steps = some_steps(rng, completion)
        at_once = pieces(VOCABULARIES[name], prompt, [completion])
        one_by_one = pieces(VOCABULARIES[name], prompt, [[token] for token in completion])
        got = pieces(VOCABULARIES[name], prompt, steps)
        assert "".join(got) == "".join(at_once) == "".join(one_by_one), (prompt, completion)


@pytest.mark.parametrize(
    ("prompt", "completion", "texts"),
    [
        pytest.param(["<s>", "▁tree"], ["▁the", "▁tree"], [" the", " tree"], id="a word follows"),
        pytest.param(["<s>", "▁t"], ["r", "▁the"], ["r", " the"], id="a word goes on"),
        pytest.param(["<s>"], ["▁the", "▁the"], ["the", " the"], id="the text begins"),
        pytest.param([], ["▁", "▁the"], ["", " the"], id="one space is stripped"),
        pytest.param([], ["▁▁", "▁the"], [" ", " the"], id="of two"),
        pytest.param(["<s>", "▁"], ["▁the"], [" the"], id="the prompt's was stripped"),
        pytest.param([], ["<s>", "▁the"], ["", "the"], id="a special token begins no text"),
        pytest.param([], ["<0x20>", "▁the"], ["", " the"], id="a space from a byte"),
        pytest.param(["<s>", "▁the"], ["<0x0A>", "▁the"], ["\n", " the"], id="a new line"),
    ],
)
def test_leading_spaces_are_kept_unless_the_text_begins_with_them(prompt, completion, texts):
    steps = [[token] for token in ids(*completion)]
    got = pieces(VOCABULARIES["sentencepiece"], ids(*prompt), steps)
    assert got == [*texts, ""]


def test_a_special_token_that_is_shown_begins_the_text():
    steps = [ids("<s>"), ids("▁the")]
    assert pieces(VOCABULARIES["sentencepiece"], [], steps, skip_special=False) == [
        "<s>", " the", "",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "prompt", "completion", "texts"),
    [
        ("gemma", [], ["▁the", "▁the"], [" the", " the"]),
        ("metaspace", [], ["▁the", "▁the"], ["the", " the"]),
        ("metaspace", ["▁the"], ["▁the", "caf"], [" the", "caf"]),
        ("word pieces", [], ["hi", "hi", "##the", "."], ["hi", " hi", "the", " ."]),
        ("word pieces", ["hi"], ["##the", "the"], ["the", " the"]),
        ("tidied word pieces", ["hi"], ["hi", ".", "n"], [" hi", ".", " n"]),
        ("no decoder", ["▁the"], ["the", "▁"], [" the", " ▁"]),
    ],
)
def test_other_decoders_know_the_end_of_the_prompt_too(name, prompt, completion, texts):
    tokenizer = TOKENIZERS[name]
    steps = [[token] for token in ids(*completion, tokenizer=tokenizer)]
    got = pieces(VOCABULARIES[name], ids(*prompt, tokenizer=tokenizer), steps)
    assert got == [*texts, ""]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        pytest.param("é".encode(), "é", id="two bytes"),
        pytest.param("🙂".encode(), "🙂", id="four bytes"),
        pytest.param("你".encode() + b"\xff", "你\ufffd", id="a character before a stray byte"),
        pytest.param(b"\xff" + "你".encode(), "\ufffd你", id="and after one"),
        pytest.param(b"\xe4\xbd" + b"a", "\ufffd\ufffda", id="two thirds of a character"),
        pytest.param(b"\xc0\x80", "\ufffd" * 2, id="an overlong NUL"),
        pytest.param(b"\xed\xa0\x80", "\ufffd" * 3, id="a surrogate"),
        pytest.param(b"\xf5\x80\x80\x80", "\ufffd" * 4, id="beyond Unicode"),
        pytest.param(b"\x80\x80", "\ufffd" * 2, id="two continuations"),
        pytest.param(b"\xe4", "\ufffd", id="cut by the end"),
    ],
)
def test_byte_fallback_reads_as_in_sentencepiece(data, text):
    prompt, tokens = ids("▁the"), byte_ids(data)
    for cut in range(len(tokens) + 1):
        steps = [tokens[:cut], tokens[cut:]]
        assert "".join(pieces(VOCABULARIES["sentencepiece"], prompt, steps)) == text


def test_characters_are_streamed_as_soon_as_they_are_whole():
    steps = [[token] for token in byte_ids("é漢🙂".encode())]
    got = pieces(VOCABULARIES["sentencepiece"], ids("▁the"), steps)
    assert got == ["", "é", "", "", "漢", "", "", "", "🙂", ""]


def test_a_skipped_special_token_does_not_split_a_character():
    first, second = byte_ids("é".encode())
    got = pieces(VOCABULARIES["sentencepiece"], [], [[first], ids("<s>"), [second]])
    assert got == ["", "", "é", ""]


@pytest.mark.parametrize(
    ("prompt", "completion", "text"),
    [
        pytest.param(b"\xf0\x9f", b"\x99\x82", "🙂", id="completed"),
        pytest.param(b"\xf0\x9f", b"a", "a", id="left alone"),
        pytest.param(b"\xf0\x9f", b"", "", id="nothing follows"),
        pytest.param(b"a\xc3", b"\xa9b", "éb", id="after a letter"),
    ],
)
def test_a_prompt_may_end_within_a_character(prompt, completion, text):
    vocabulary = VOCABULARIES["sentencepiece"]
    got = pieces(vocabulary, byte_ids(prompt), [[token] for token in byte_ids(completion)])
    assert "".join(got) == text


def test_so_may_a_prompt_of_byte_level_tokens():
    tokenizer = TOKENIZERS["byte level"]
    tokens = tokenizer.encode("a🙂b")
    assert len(tokens) == 6
    for cut, text in enumerate(["a🙂b", "🙂b", "🙂b", "🙂b", "🙂b", "b", ""]):
        got = pieces(VOCABULARIES["byte level"], tokens[:cut], [tokens[cut:]])
        assert "".join(got) == text


class Louder(PreTrainedTokenizerFast):
    def _decode(self, *args, **kwargs):
        return super()._decode(*args, **kwargs).upper()


@pytest.mark.parametrize(
    ("tokenizer", "texts"),
    [
        pytest.param(kinds.word_pieces(Louder), [" HI", " .", ""], id="a decoder of its own"),
        pytest.param(
            kinds.word_pieces(clean_up_tokenization_spaces=True), [" hi", ".", ""], id="tidied"
        ),
    ],
)
def test_what_a_wrapper_adds_is_kept(tokenizer, texts):
    vocabulary = Vocabulary(tokenizer)
    assert isinstance(text_reader(vocabulary, [], True), WindowReader)
    hi, stop = ids("hi", ".", tokenizer=tokenizer)
    assert pieces(vocabulary, [hi], [[hi], [stop]]) == texts
    assert "".join(pieces(vocabulary, [hi], [[hi, stop]])) == "".join(texts)


@pytest.mark.parametrize(
    ("prompt", "completion", "text"),
    [
        pytest.param(["▁the", *["<s>"] * 20], ["▁tree"], " tree", id="special tokens between"),
        pytest.param(
            [*"ab", *["<0xF0>", "<0x9F>", "<0x99>", "<0x82>"] * 3], ["a"], "a", id="bytes"
        ),
        pytest.param(["<s>"] * 20, ["▁tree"], "tree", id="the text begins"),
        pytest.param([], ["▁the", *["<s>"] * 20, "▁tree"], "the tree", id="in the completion"),
        pytest.param(
            [],
            ["a", *["<0xF0>", "<0x9F>", "<0x99>", "<0x82>"] * 3, "▁"],
            "a🙂🙂🙂 ",
            id="bytes in it",
        ),
    ],
)
def test_an_unknown_decoder_is_given_what_it_needs(prompt, completion, text):
    vocabulary = VOCABULARIES["an unknown decoder"]
    assert isinstance(text_reader(vocabulary, [], True), WindowReader)
    steps = [[token] for token in ids(*completion)]
    assert "".join(pieces(vocabulary, ids(*prompt), steps)) == text


def test_an_unknown_decoder_may_end_within_a_character():
    tokenizer = Louder(tokenizer_object=kinds.byte_level().backend_tokenizer)
    a, first, *_ = tokens = tokenizer.encode("a🙂")
    assert pieces(Vocabulary(tokenizer), [a], [[token] for token in tokens[1:]]) == [
        "", "", "", "🙂", "",
    ]  # fmt: skip
    assert pieces(Vocabulary(tokenizer), [a], [[first]]) == ["", "\ufffd"]


def test_spaces_of_bpe_are_not_tidied_as_transformers_does_not():
    backend = kinds.byte_level().backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=True)
    vocabulary = Vocabulary(tokenizer)
    assert vocabulary.is_local
    assert "".join(pieces(vocabulary, [], [tokenizer.encode("a .")])) == "a ."
