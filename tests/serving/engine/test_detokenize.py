"""Text is given out in whole characters, up to a stop string, which may contain special tokens."""

from __future__ import annotations

import pytest

from oracles import tokenizer_kinds as kinds
from serving.engine.detokenize import Detokenizer
from serving.engine.vocabulary import Vocabulary

TOKENIZER = kinds.byte_level()
VOCABULARY = Vocabulary(TOKENIZER)
ASSISTANT = kinds.ASSISTANT
(MARKED,) = TOKENIZER.encode(ASSISTANT)


def encoded(*parts: str | int) -> list[int]:
    """Tokens of texts, in which nothing is taken for a special token, and single tokens."""
    ids: list[int] = []
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
        else:
            ids += TOKENIZER.encode(part, split_special_tokens=True)
    return ids


def streamed(tokens, *stop, vocabulary=VOCABULARY, step=1, **options) -> tuple[list[str], int]:
    """Text of each step and of the end, and how many tokens were read."""
    detokenizer = Detokenizer(vocabulary, stop=stop, **options)
    texts, count = [], 0
    for token in tokens:
        count += 1
        if detokenizer.add(token):
            break
        if count % step == 0:
            texts.append(detokenizer.take(final=False))
    return [*texts, detokenizer.take(final=True)], count


def read(tokens, *stop, **options) -> tuple[str, int]:
    texts, count = streamed(tokens, *stop, **options)
    for step in (2, 3, 100):
        again, same = streamed(tokens, *stop, step=step, **options)
        assert ("".join(again), same) == ("".join(texts), count)
    return "".join(texts), count


def test_half_a_character_waits_for_its_other_half():
    assert streamed(encoded("a€b")) == (["a", "", "", "€", "b", ""], 5)
    assert streamed(encoded("a€b"), "zz") == (["a", "", "", "€", "b", ""], 5)


def test_an_answer_may_end_within_a_character():
    assert read(encoded("a€")[:-1]) == ("a\ufffd", 3)
    assert read(encoded("a€")[:-1], "zz") == ("a\ufffd", 3)


def test_a_stop_string_ends_the_text_before_it():
    assert streamed(encoded("a b c"), "b c", "zz") == (["a", " ", "", "", ""], 5)


def test_what_may_begin_a_stop_string_stays_back():
    assert streamed(encoded("wxy"), "xyz") == (["w", "", "", "xy"], 3)
    assert streamed(encoded("xxyz"), "xyz") == (["", "x", "", ""], 4)


def test_the_first_stop_string_of_the_text_counts():
    assert read(encoded("a b c"), "c", "b") == ("a ", 3)


def test_a_stop_string_may_begin_with_the_space_after_the_prompt():
    tokenizer = kinds.sentencepiece()
    the, tree = tokenizer.convert_tokens_to_ids(["▁the", "▁tree"])
    options = {"vocabulary": Vocabulary(tokenizer), "prompt_ids": [the]}
    assert read([the, tree], " tree", **options) == (" the", 2)
    assert read([tree], " tree", **options) == ("", 1)


@pytest.mark.parametrize(
    ("tokens", "stop", "text", "count"),
    [
        pytest.param(["a", MARKED, "b"], [ASSISTANT], "a", 2, id="the token alone"),
        pytest.param(["a", MARKED, "bc"], [ASSISTANT + "b"], "a", 3, id="text after it"),
        pytest.param(["ab", MARKED], ["b" + ASSISTANT], "a", 3, id="text before it"),
        pytest.param(["a", MARKED, MARKED], [ASSISTANT * 2], "a", 3, id="two in a row"),
        pytest.param(["a", MARKED, 0], [ASSISTANT + "<|end|>"], "a", 3, id="two kinds"),
        pytest.param(["a", MARKED, "b"], ["b", ASSISTANT], "a", 2, id="one of several"),
        pytest.param(["a", ASSISTANT], [ASSISTANT], "a", 13, id="spelled out"),
        pytest.param(["a", MARKED, "b"], ["<|assist"], "ab", 3, id="a part of it is never text"),
        pytest.param(["a", MARKED, "b"], ["ab"], "", 3, id="it does not split a stop string"),
        pytest.param(
            ["a", MARKED, "b"], ["ab", ASSISTANT + "x"], "", 3, id="nor does one of another"
        ),
        pytest.param(
            ["ca", MARKED, "bd"], ["abd", ASSISTANT + "x"], "c", 5, id="nor in its middle"
        ),
        pytest.param(
            ["ca", *[MARKED] * 20, "bd"], ["abd", ASSISTANT + "x"], "c", 24, id="nor do many"
        ),
        pytest.param(["a", MARKED, "b"], [ASSISTANT + "x"], "ab", 3, id="another text after it"),
        pytest.param([MARKED], [ASSISTANT], "", 1, id="at once"),
        pytest.param(["a", 0, "b"], [ASSISTANT], "ab", 3, id="another special token"),
    ],
)
def test_a_stop_string_may_contain_special_tokens(tokens, stop, text, count):
    assert read(encoded(*tokens), *stop) == (text, count)


def test_a_special_token_between_the_halves_of_a_character_does_not_break_it():
    first, second = encoded("é")
    assert read([first, MARKED, second], ASSISTANT + "x") == ("é", 3)
    assert read([first, second, MARKED], ASSISTANT) == ("é", 3)


@pytest.mark.parametrize(
    ("tokens", "stop", "text"),
    [
        (["a", MARKED, "b"], ["x"], "a<|assistant|>b"),
        (["a", MARKED, "b"], [], "a<|assistant|>b"),
        (["a", MARKED, "b"], [ASSISTANT], "a"),
        (["a", MARKED, "b"], ["<|assist"], "a"),
        (["a", MARKED, "b"], ["ab"], "a<|assistant|>b"),
    ],
)
def test_special_tokens_may_be_shown(tokens, stop, text):
    assert read(encoded(*tokens), *stop, skip_special=False)[0] == text


@pytest.mark.parametrize(
    ("tokens", "stop", "text"),
    [
        pytest.param(["a b c d"], ["b c"], "a b c", id="a text"),
        pytest.param(["a", MARKED, "b"], [ASSISTANT], "a<|assistant|>", id="a special token"),
        pytest.param(["a", 0, "b"], ["b"], "ab", id="the others stay out"),
        pytest.param(["abc"], ["bcd"], "abc", id="none is complete"),
    ],
)
def test_the_stop_string_may_be_kept(tokens, stop, text):
    assert read(encoded(*tokens), *stop, keeps_stop=True)[0] == text


def test_a_stop_string_that_ends_within_a_token_is_kept_up_to_its_end():
    token = TOKENIZER.convert_tokens_to_ids("Ġright")
    if token is None or token == TOKENIZER.unk_token_id:
        token = max(range(len(TOKENIZER)), key=lambda i: len(TOKENIZER.decode([i], True)))
    text = TOKENIZER.decode([token])
    assert len(text) > 2
    assert read([token], text[1], keeps_stop=True) == (text[:2], 1)
    assert read([token], text[1]) == (text[:1], 1)


OVER_BYTES = {
    "sentencepiece": kinds.sentencepiece(),
    "gemma": kinds.sentencepiece(strips_first_space=False),
    "metaspace": kinds.metaspace_bpe("first"),
    "an unknown decoder": kinds.two_spaces_stripped(),
}
SMILE = [f"<0x{byte:02X}>" for byte in "🙂".encode()]


@pytest.mark.parametrize("name", OVER_BYTES)
@pytest.mark.parametrize(
    ("tokens", "stop", "text", "count"),
    [
        pytest.param(["a", *SMILE, "b"], "🙂", "a", 5, id="a character of four tokens"),
        pytest.param(
            ["a", *SMILE, ASSISTANT], "🙂" + ASSISTANT, "a", 6, id="a special token after"
        ),
        pytest.param(["a", ASSISTANT, *SMILE], ASSISTANT + "🙂", "a", 6, id="and before"),
        pytest.param(["a", *SMILE[:2], ASSISTANT, *SMILE[2:]], "🙂", "a", 6, id="and within it"),
        pytest.param(["a", ASSISTANT, "▁the"], ASSISTANT + " the", "a", 3, id="a space after it"),
        pytest.param([*SMILE, "▁the"], "🙂 t", "", 5, id="a space after a character"),
        pytest.param(["a", "<0x20>", "b"], " b", "a", 3, id="a space that is a byte"),
        pytest.param(["a", "<0x0A>", "b"], "\nb", "a", 3, id="a line end that is a byte"),
        pytest.param(["a", "</s>", "b"], "</s>b", "a", 3, id="the end of the text"),
        pytest.param(["a", *SMILE, "b"], SMILE[0], "a🙂b", 6, id="the name of a byte is no text"),
    ],
)
def test_stop_strings_over_byte_fallback(name, tokens, stop, text, count):
    tokenizer = OVER_BYTES[name]
    the, *ids = tokenizer.convert_tokens_to_ids(["▁the", *tokens])
    assert tokenizer.unk_token_id not in ids
    assert read(ids, stop, vocabulary=Vocabulary(tokenizer), prompt_ids=[the]) == (text, count)
