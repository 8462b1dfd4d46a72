"""The tokenizer of a GGUF file, rebuilt from its metadata.

Not by ``transformers`` (5.17): for Llama files it splits no text before merging, so that digits and
indentation become other tokens than the target was trained on; it takes the begin token for the
end token, and removes spaces before punctuation when it decodes. For Gemma it finds the most
probable pieces, where the file's scores are the order of merges.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from targets.own_tokenizer import CONFIG, WHOLE, OwnTokenizer

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
"""Types of tokens that matter here (``tokenizer.ggml.token_type``)."""

_WORDS_AND_DIGITS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _by_gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _by_single_digits() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _by_gpt2()])


def _by_words(digits: str) -> Any:
    """Words, runs of digits as the regular expression ``digits`` counts them, and white space."""
    words = Regex(_WORDS_AND_DIGITS.replace("DIGITS", digits))
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


SPLITS: dict[str, Callable[[], Any]] = {
    "gpt-2": _by_gpt2,
    "smollm": _by_single_digits,
    "llama-bpe": lambda: _by_words("{1,3}"),
    "qwen2": lambda: _by_words(""),
}
"""``tokenizer.ggml.pre`` -> how text is split before bytes are merged."""
_COMPOSES = frozenset({"qwen2"})
"""Those that compose characters first (Unicode NFC)."""
_MERGES_LAST = frozenset({"llama-bpe"})
"""Those that take a piece which is a token as it is, whatever the merges say."""
_BEGINS = frozenset({"llama-bpe"})
"""Those whose texts begin with the begin token, unless the file says otherwise."""


_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_NO_LIMIT = int(1e30)
"""``transformers``' longest text."""


def tokenizer_of(metadata: Mapping[str, Any]) -> OwnTokenizer:
    """The tokenizer that the metadata of a GGUF file describe, with its chat template.

    Raises:
        ValueError: its kind or its way to split text is not known.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _of_bytes(metadata)
    elif kind == "llama":
        tokenizer = _of_pieces(metadata)
    else:
        raise ValueError(f"its tokenizer is of kind {kind!r}; known are 'gpt2' and 'llama'")
    _add_special(tokenizer, metadata)
    special = {
        f"{role}_token": text
        for role, key in _ROLES.items()
        if (text := _special(metadata, key)) is not None
    }
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    named = [text for text in dict.fromkeys(special.values()) if text not in added]
    tokenizer.add_tokens([AddedToken(text, special=True) for text in named])
    return OwnTokenizer(tokenizer, metadata.get("tokenizer.chat_template"), special)


def save_tokenizer(tokenizer: OwnTokenizer, folder: Path) -> None:
    """Write a tokenizer as ``transformers`` (5.17) does, and find it as written (``as_written``)
    where the library would take it as it is."""
    tokenizer.backend_tokenizer.save(str(folder / WHOLE))
    said = {f"{role}_token": tokenizer.special_tokens_map.get(f"{role}_token") for role in _ROLES}
    fields = {
        **said,
        "backend": "tokenizers",
        "clean_up_tokenization_spaces": False,
        "model_max_length": _NO_LIMIT,
        "tokenizer_class": "TokenizersBackend",
    }
    text = json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    if tokenizer.chat_template is not None:
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")


def _special(metadata: Mapping[str, Any], key: str) -> str | None:
    """Text of the token with that role, e.g. ``eos``."""
    token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
    return None if token_id is None else metadata["tokenizer.ggml.tokens"][token_id]


def _of_bytes(metadata: Mapping[str, Any]) -> Tokenizer:
    """Merges of bytes, as in GPT-2, Llama 3 and Qwen."""
    split = metadata.get("tokenizer.ggml.pre", "gpt-2")
    if split not in SPLITS:
        raise ValueError(
            f"its tokenizer splits text by the rule {split!r}; known are {', '.join(SPLITS)}"
        )
    tokenizer = Tokenizer(
        BPE(
            vocab=_vocabulary(metadata),
            merges=[_pair(merge) for merge in metadata["tokenizer.ggml.merges"]],
            ignore_merges=split in _MERGES_LAST,
        )
    )
    if split in _COMPOSES:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = SPLITS[split]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _of_pieces(metadata: Mapping[str, Any]) -> Tokenizer:
    """Merges of characters with bytes for unknown ones, as in SentencePiece: Llama 2 and Gemma."""
    begins = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces: list[Any] = [normalizers.Replace(" ", "▁")]
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if begins:
        spaces.insert(0, normalizers.Prepend("▁"))
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    tokenizer = Tokenizer(
        BPE(
            vocab=_vocabulary(metadata),
            merges=_merges_by_score(metadata),
            unk_token=_special(metadata, "unknown"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _vocabulary(metadata: Mapping[str, Any]) -> dict[str, int]:
    return {token: n for n, token in enumerate(metadata["tokenizer.ggml.tokens"])}


def _pair(merge: str) -> tuple[str, str]:
    """Both sides of a merge; a space separates them, and may begin the first one."""
    at = merge.find(" ", 1)
    if at < 0:
        raise ValueError(f"its tokenizer has a merge of one part, {merge!r}")
    return merge[:at], merge[at + 1 :]


def _merges_by_score(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Each way to make a token from two others, best score first."""
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    scores = {
        token: (-score, n)
        for n, (token, score) in enumerate(
            zip(tokens, metadata["tokenizer.ggml.scores"], strict=True)
        )
        if types[n] == _NORMAL
    }
    ways = [
        (scores[token][0], scores[token[:at]][1], scores[token[at:]][1], token[:at], token[at:])
        for token in scores
        for at in range(1, len(token))
        if token[:at] in scores and token[at:] in scores
    ]
    return [(left, right) for *_, left, right in sorted(ways)]


def _add_special(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
    """Tokens that are found in a text as a whole, and the begin token of every text."""
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    whole = [
        AddedToken(token, normalized=False, special=type_ == _CONTROL)
        for token, type_ in zip(tokens, types, strict=True)
        if type_ in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(whole)
    begins = metadata["tokenizer.ggml.model"] == "llama"
    begins = begins or metadata.get("tokenizer.ggml.pre") in _BEGINS
    begin = _special(metadata, "bos")
    if begin is not None and metadata.get("tokenizer.ggml.add_bos_token", begins):
        begin_id = metadata["tokenizer.ggml.bos_token_id"]
        tokenizer.post_processor = TemplateProcessing(
            single=[begin, "$A"],
            pair=[begin, "$A", begin, "$B"],
            special_tokens=[(begin, begin_id)],
        )
    else:  # as ``transformers`` leaves it
        tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B:1")
