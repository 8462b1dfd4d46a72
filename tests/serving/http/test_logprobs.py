"""Log probabilities: where the text of a token begins, what it is called, and its bytes."""

from __future__ import annotations

import pytest

from oracles import tokenizer_kinds as kinds
from serving.engine.vocabulary import Vocabulary
from serving.http.logprobs import LOWEST, TextOffsets, chat_logprobs, completion_logprobs
from serving.requests import Request, SamplingParams, TokenLogprob

TOKENIZERS = {"byte level": kinds.byte_level(), "sentencepiece": kinds.sentencepiece()}
VOCABULARIES = {name: Vocabulary(tokenizer) for name, tokenizer in TOKENIZERS.items()}


def ids(name: str, *tokens: str | bytes) -> list[int]:
    """Bytes are byte tokens of SentencePiece."""
    found = []
    for token in tokens:
        spelled = [token] if isinstance(token, str) else [f"<0x{byte:02X}>" for byte in token]
        found += TOKENIZERS[name].convert_tokens_to_ids(spelled)
    assert TOKENIZERS[name].unk_token_id not in found
    return found


def offsets(name: str, prompt, *steps, skip_special: bool = True) -> list[int]:
    sampling = SamplingParams(skip_special_tokens=skip_special)
    reader = TextOffsets(VOCABULARIES[name], Request("r", tuple(prompt), sampling))
    return [offset for step in steps for offset in reader.of(step)]


@pytest.mark.parametrize(
    ("prompt", "tokens", "skip", "wanted"),
    [
        pytest.param(["▁tree"], ["▁the", "▁the", "."], True, [0, 4, 8], id="words"),
        pytest.param([], ["▁the", "▁the", "."], True, [0, 3, 7], id="the first space is stripped"),
        pytest.param(["▁t"], ["é", "é", "a"], True, [0, 1, 2], id="whole accents"),
        pytest.param(["▁t"], ["é".encode(), "a"], True, [0, 0, 1], id="an accent of bytes"),
        pytest.param(["▁t"], ["a", "🙂".encode(), "a"], True, [0, 1, 1, 1, 1, 2], id="an emoji"),
        pytest.param(["▁t"], ["漢字".encode(), "a"], True, [0, 0, 0, 1, 1, 1, 2], id="two"),
        pytest.param(["▁t"], [b"\xff\xc3", "a"], True, [0, 1, 2], id="malformed"),
        pytest.param(["▁t"], [b"\xe4\xbd", "a"], True, [0, 0, 2], id="two thirds"),
        pytest.param(["▁t"], [b"\xe4\xc3\xa9", "a"], True, [0, 1, 1, 2], id="one of three"),
        pytest.param(["▁t"], ["a", "</s>", "a"], True, [0, 1, 1], id="skipped special"),
        pytest.param(["▁t"], ["a", "</s>", "a"], False, [0, 1, 5], id="shown special"),
        pytest.param(["▁t"], [b"\xc3", "</s>", b"\xa9", "a"], True, [0, 0, 0, 1], id="between"),
        pytest.param([b"\xf0\x9f"], [b"\x99\x82", "a"], True, [0, 0, 1], id="prompt's emoji"),
        pytest.param([b"\xf0\x9f"], ["a", "a"], True, [0, 1], id="prompt's emoji, not completed"),
    ],
)
def test_offsets_count_characters_of_the_text(prompt, tokens, skip, wanted):
    prompt, tokens = ids("sentencepiece", *prompt), ids("sentencepiece", *tokens)
    assert offsets("sentencepiece", prompt, tokens, skip_special=skip) == wanted
    one_by_one = [[token] for token in tokens]
    assert offsets("sentencepiece", prompt, *one_by_one, skip_special=skip) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("añb", [0, 1, 1, 2]), ("🙂b", [0, 0, 0, 0, 1]), ("e\u0301b", [0, 1, 1, 2])],
)
def test_offsets_over_bytes(text, wanted):
    tokens = TOKENIZERS["byte level"].encode(text)
    assert offsets("byte level", [], tokens) == wanted
    for token, offset in zip(tokens, wanted, strict=True):
        data = VOCABULARIES["byte level"].bytes_of(token, skip_special=True)
        assert data in text[offset].encode()


def test_no_alternative_is_lost_to_another_of_the_same_text():
    tokens = ids("sentencepiece", "▁the", "the", b"a", "a", b"\xe4", b"\xbd", "▁", b" ")
    entry = TokenLogprob(tokens[0], -0.5, tuple((token, -float(token)) for token in tokens))
    offsets_ = TextOffsets(VOCABULARIES["sentencepiece"], Request("r", (5,), SamplingParams()))
    got = completion_logprobs([entry], VOCABULARIES["sentencepiece"], offsets_)
    assert got.tokens == [" the"]
    (top,) = got.top_logprobs
    assert list(top.values()) == [-float(token) for token in tokens]
    assert list(top) == [
        " the", "the", "token_id:101", "a", "token_id:232", "token_id:193", " ", "token_id:36",
    ]  # fmt: skip


@pytest.mark.parametrize("num_top", [0, 2, 3])
def test_the_token_that_was_drawn_is_among_the_most_probable_ones(num_top):
    """As in OpenAI's and vLLM's completions; a chat gives as many as it was asked for."""
    tokens = ids("sentencepiece", "▁the", "a", "the")
    likely = tuple((token, -1.0 - place) for place, token in enumerate(tokens))[:num_top]
    entry = TokenLogprob(tokens[2], -3.0, likely)
    vocabulary = VOCABULARIES["sentencepiece"]
    offsets_ = TextOffsets(vocabulary, Request("r", (5,), SamplingParams()))
    (top,) = completion_logprobs([entry], vocabulary, offsets_).top_logprobs
    wanted = {" the": -1.0, "a": -2.0, "the": -3.0}
    assert top == (wanted if num_top else {"the": -3.0})
    assert list(top)[-1] == "the"
    (chat,) = chat_logprobs([entry], vocabulary, skip_special=True).content
    assert len(chat.top_logprobs) == num_top


def test_the_names_of_tokens_add_up_to_the_text_where_it_begins():
    """A prompt of special tokens alone is no text: the space of the first token is left out."""
    prompt, tokens = ids("sentencepiece", "</s>"), ids("sentencepiece", "▁the", "▁the", ".")
    vocabulary = VOCABULARIES["sentencepiece"]
    likely = ((tokens[0], -1.0), (ids("sentencepiece", "the")[0], -2.0))
    entries = [TokenLogprob(token, -1.0, likely) for token in tokens]
    offsets_ = TextOffsets(vocabulary, Request("r", tuple(prompt), SamplingParams()))
    got = completion_logprobs(entries, vocabulary, offsets_)
    assert (got.tokens, got.text_offset) == (["the", " the", "."], [0, 3, 7])
    first, second, _ = got.top_logprobs
    assert list(first) == ["the", f"token_id:{likely[1][0]}"]  # both would begin the same text
    assert list(second) == [" the", "the"]


def test_names_are_told_apart_even_if_the_tokenizer_has_one_for_both():
    tokenizer = kinds.word_pieces(cleanup=True)
    vocabulary = Vocabulary(tokenizer)
    apostrophe = tokenizer.convert_tokens_to_ids("'")
    entry = TokenLogprob(apostrophe, 0.0, ((apostrophe, 0.0), (apostrophe, -1.0)))
    offsets_ = TextOffsets(vocabulary, Request("r", (1,), SamplingParams()))
    (top,) = completion_logprobs([entry], vocabulary, offsets_).top_logprobs
    assert list(top.values()) == [0.0, -1.0]


def test_chat_gives_the_bytes_of_parts_of_characters():
    tokens = ids("sentencepiece", "🙂".encode(), "▁the", "</s>")
    entries = [TokenLogprob(token, float("-inf"), ((token, -1.0),)) for token in tokens]
    content = chat_logprobs(entries, VOCABULARIES["sentencepiece"], skip_special=True).content
    data = [entry.bytes for entry in content]
    assert data == [[0xF0], [0x9F], [0x99], [0x82], [*b" the"], None]
    assert [entry.top_logprobs[0].bytes for entry in content] == data
    assert [entry.token for entry in content][-2:] == [" the", "</s>"]
    assert {entry.logprob for entry in content} == {LOWEST}


def test_a_special_token_that_is_shown_has_bytes():
    entries = [TokenLogprob(token, 0.0, ()) for token in ids("sentencepiece", "</s>")]
    (entry,) = chat_logprobs(entries, VOCABULARIES["sentencepiece"], skip_special=False).content
    assert entry.bytes == [*b"</s>"]
