"""A tokenizer without ``transformers``: the Rust tokenizer, the chat template and special tokens.

``transformers`` decides what a folder's tokenizer is, which depends on its files, the target's
config and a table of exceptions, and often rebuilds the tokenizer in Python. So an ``OwnTokenizer``
is made in two ways only, from

- files that the library would take as they are (``as_written``): the common class, no legacy files,
  and every special token already in tokenizer.json;
- what the library itself made of the folder before, kept on the disk (``targets.kept_tokenizer``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from buffer.files import read_regular
from targets.chat_template import render

CONFIG, WHOLE = "tokenizer_config.json", "tokenizer.json"
_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
_MODEL_TYPES = ("llama", "qwen3")
"""Model types for which ``transformers`` (5.17) trusts the class that the folder names."""
NAMED = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
"""Special tokens that have a name."""
_KNOWN = {
    *NAMED, "add_bos_token", "add_eos_token", "backend", "chat_template",
    "clean_up_tokenization_spaces", "extra_special_tokens", "is_local", "local_files_only",
    "model_input_names", "model_max_length", "padding_side", "tokenizer_class", "truncation_side",
}  # fmt: skip
"""Keys of a tokenizer_config.json that change nothing about ids and texts, or are read here."""
_LEGACY = (
    "special_tokens_map.json", "added_tokens.json", "chat_template.json", "chat_templates",
    "additional_chat_templates", "tokenizer.model", "tekken.json",
)  # fmt: skip
_MOST_TOKENS = 100_000
"""Above it ``transformers`` may replace the pattern that splits text before merging."""
_MOST_BYTES = 256 << 20


class OwnTokenizer:
    """What a server needs of a ``transformers`` tokenizer, by the same names.

    Safe to use from several threads.
    """

    def __init__(
        self, backend: Tokenizer, chat_template: str | None, special_tokens: Mapping[str, str]
    ) -> None:
        """
        Args:
            special_tokens: those with a name, such as ``bos_token``.
        """
        self.backend_tokenizer = backend
        self.chat_template = chat_template
        self.special_tokens_map = dict(special_tokens)

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=True))

    def __call__(
        self, text: str, *, add_special_tokens: bool = True, **_: Any
    ) -> dict[str, list[int]]:
        encoded = self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return {"input_ids": list(encoded.ids)}

    @property
    def vocab_size(self) -> int:
        """Tokens, without the added ones."""
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=False))

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens_map.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens_map.get("eos_token")

    @property
    def unk_token(self) -> str | None:
        return self.special_tokens_map.get("unk_token")

    @property
    def pad_token(self) -> str | None:
        return self.special_tokens_map.get("pad_token")

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Added tokens by id."""
        found: dict[int, AddedToken] = self.backend_tokenizer.get_added_tokens_decoder()
        return found

    def get_vocab(self) -> dict[str, int]:
        """Ids by token, added ones included."""
        found: dict[str, int] = self.backend_tokenizer.get_vocab(with_added_tokens=True)
        return found

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of some tokens."""
        ids = list(token_ids)
        text: str = self.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tokenize: bool,
    ) -> str:
        """Text of a conversation, up to the start of the assistant's turn.

        Raises:
            ValueError: there is no chat template.
            jinja2.TemplateError: see ``render``.
        """
        assert add_generation_prompt and not tokenize, "a server asks for nothing else"
        if self.chat_template is None:
            raise ValueError("the target has no chat template")
        return render(self.chat_template, conversation, self.special_tokens_map)


def as_written(folder: Path) -> OwnTokenizer | None:
    """The tokenizer that a folder's files describe; ``None`` if ``transformers`` might make another
    one of them."""
    if any((folder / name).exists() for name in _LEGACY):
        return None
    try:
        config, model = (_object(folder / name) for name in (CONFIG, "config.json"))
        whole = read_regular(folder / WHOLE, _MOST_BYTES, follow=True).decode()
        found = json.loads(whole)
        if model.get("model_type") not in _MODEL_TYPES or not _is_taken_as_is(config, found):
            return None
        template = _template(folder, config)
        backend = backend_from(whole)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    special = {name: config[name] for name in NAMED if config.get(name) is not None}
    return OwnTokenizer(backend, template, special)


def backend_from(text: str) -> Tokenizer:
    """The Rust tokenizer that JSON describes.

    Raises:
        ValueError: the JSON describes none.
    """
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more special
        raise ValueError(f"not a tokenizer: {error}") from error


def _object(path: Path) -> dict[str, Any]:
    found = json.loads(read_regular(path, _MOST_BYTES, follow=True))
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return found


def _is_taken_as_is(config: dict[str, Any], whole: dict[str, Any]) -> bool:
    """Whether the library changes nothing about what is in tokenizer.json."""
    if config.get("tokenizer_class") not in _CLASSES or not config.keys() <= _KNOWN:
        return False
    if whole.get("truncation") is not None or whole.get("padding") is not None:
        return False
    model = whole["model"]
    if len(model["vocab"]) + len(whole["added_tokens"]) > _MOST_TOKENS:
        return False
    if config.get("clean_up_tokenization_spaces") and model["type"] != "BPE":
        return False
    extra = config.get("extra_special_tokens") or []
    if not isinstance(extra, list):
        return False
    tokens = [*extra, *(config[name] for name in NAMED if config.get(name) is not None)]
    return set(tokens) <= {t["content"] for t in whole["added_tokens"] if _is_plainly_special(t)}


def _is_plainly_special(token: dict[str, Any]) -> bool:
    flags = ("normalized", "lstrip", "rstrip", "single_word")
    return bool(token["special"]) and not any(token[flag] for flag in flags)


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    """The chat template: a file of its own, or a key of the config."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if template is not None and not isinstance(template, str):
        raise ValueError("several chat templates")
    return template
