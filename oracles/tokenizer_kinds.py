"""A small tokenizer of each kind whose text is hard to put together."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram, WordPiece
from transformers import PreTrainedTokenizerFast

from oracles.support import CHAT_TEMPLATE, tiny_tokenizer

ASSISTANT = "<|assistant|>"
END = "</s>"
_WORDS = ["the", "tree", "caf", "true"]
_LETTERS = "abcdefghijklmnopqrstuvwxyz.,:!é"


def sentencepiece(strips_first_space: bool = True) -> PreTrainedTokenizerFast:
    """BPE with ``▁`` for spaces and byte fallback, as in Llama 2; Gemma strips no space."""
    pieces = ["<unk>", "<s>", END, ASSISTANT, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁▁", *_LETTERS]
    merges = [("▁", "▁")]
    for word in _WORDS:
        for start in ("", "▁"):
            for end in range(1 if start else 2, len(word) + 1):
                left, right = start + word[: end - 1], word[end - 1]
                if left + right not in pieces:
                    pieces.append(left + right)
                    merges.append((left, right))
    model = BPE(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=merges,
        unk_token="<unk>",
        byte_fallback=True,
    )
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    normal: list[Any] = [normalizers.Replace(" ", "▁")]
    if strips_first_space:
        steps.append(decoders.Strip(" ", 1, 0))
        normal.insert(0, normalizers.Prepend("▁"))
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(normal)
    backend.decoder = decoders.Sequence(steps)
    return _with_special(backend)


def metaspace() -> PreTrainedTokenizerFast:
    """Unigram whose decoder drops the ``▁`` of the first token, as in T5."""
    pieces = ["<unk>", "<s>", END, ASSISTANT, "▁", *_LETTERS, *_WORDS, *(f"▁{w}" for w in _WORDS)]
    backend = Tokenizer(Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return _with_special(backend)


def metaspace_bpe(scheme: str = "always", split: bool = True) -> PreTrainedTokenizerFast:
    """The vocabulary of ``sentencepiece``; bytes and spaces are for pre-tokenizer and decoder, as
    in Mistral's later conversions.

    Args:
        scheme: where a space is added before a text: always, first or never.
    """
    tokenizer = sentencepiece()
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    space = decoders.Metaspace(prepend_scheme=scheme, split=split)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), space])
    return tokenizer


def two_spaces_stripped() -> PreTrainedTokenizerFast:
    """``sentencepiece`` with a decoder that ours does not know: it strips up to two spaces."""
    tokenizer = sentencepiece()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 2, 0)])
    return tokenizer


def word_pieces(
    kind: type[PreTrainedTokenizerFast] = PreTrainedTokenizerFast,
    cleanup: bool = False,
    **options: Any,
) -> PreTrainedTokenizerFast:
    """Words and their continuations, as in BERT.

    Args:
        cleanup: the decoder removes spaces before punctuation.
    """
    pieces = ["[UNK]", "hi", ".", "##the", "the", "caf", "##é", "n", "'", "##s"]
    backend = Tokenizer(WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(cleanup=cleanup)
    return kind(tokenizer_object=backend, unk_token="[UNK]", **options)


def byte_level() -> PreTrainedTokenizerFast:
    """The tiny byte-level BPE, with a special token in the middle of chats."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": [ASSISTANT]})
    return tokenizer


def without_decoder() -> PreTrainedTokenizerFast:
    """Its tokens are joined by spaces."""
    tokenizer = metaspace()
    tokenizer.backend_tokenizer.decoder = None
    return tokenizer


def _with_special(backend: Tokenizer) -> PreTrainedTokenizerFast:
    backend.add_special_tokens([AddedToken(ASSISTANT, special=True, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token=END
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
