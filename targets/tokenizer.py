"""Load the tokenizer of a target, without torch: a process that only speaks HTTP needs no more.

``transformers`` is imported only by what needs it: it takes seconds of a core.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from targets.gguf_cache import default_cache
from targets.kept_tokenizer import keep_tokenizer, kept_tokenizer
from targets.own_tokenizer import CONFIG, OwnTokenizer, as_written

log = logging.getLogger(__name__)

_VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "tekken.json", "tiktoken.model",
    "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
"""Files that hold a vocabulary. Without any the library may make an empty tokenizer, unless the
config names a class that needs none."""
_JSON = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "config.json",
)  # fmt: skip
_BESIDE = ("merges.txt", "chat_template.jinja")
"""What else tokenizers read."""


def copy_tokenizer(folder: Path, to: Path) -> None:
    """Copy the files of the tokenizer in ``folder``, as far as it has them.

    Raises:
        OSError: one cannot be read or written.
    """
    names = {*_VOCABULARIES, *_JSON, *_BESIDE} - {"config.json"}
    for path in filter(Path.is_file, map(folder.joinpath, sorted(names))):
        shutil.copyfile(path, to / path.name)


def load_tokenizer(folder: Path) -> Any:
    """The ``transformers`` tokenizer in ``folder``; runs no code from the folder.

    Raises:
        ValueError: there is none, or it cannot be loaded; names the file where that is known.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).exists() for name in (*_VOCABULARIES, CONFIG)):
        raise ValueError(_none_in(folder))
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # JSON, Rust and missing packages: the library has no class for it
        raise ValueError(_why_not(folder, error)) from error


def _why_not(folder: Path, error: Exception) -> str:
    """Why a tokenizer cannot be loaded: what is wrong in the folder, or else what was said."""
    for path in filter(Path.is_file, map(folder.joinpath, _JSON)):
        try:
            if not isinstance(json.loads(path.read_bytes()), dict):
                return f"{path} must hold a JSON object; download the target again"
        except (OSError, ValueError) as problem:
            return f"{path} cannot be read: {problem}; download the target again"
    if not any((folder / name).exists() for name in _VOCABULARIES):
        return _none_in(folder)
    said = str(error).strip().partition("\n")[0]
    return f"the tokenizer in {folder} cannot be loaded ({type(error).__name__}: {said})"


def _none_in(folder: Path) -> str:
    return f"{folder} has no tokenizer: tokenizer.json is missing; download the target again"


def served_tokenizer(folder: Path, cache: Path | None = None) -> Any:
    """The tokenizer in ``folder`` for a server: an ``OwnTokenizer`` where it does the same as that
    of ``transformers``, otherwise the latter.

    Args:
        cache: folder of converted targets and tokenizers; ``None``: ``default_cache()``.
    """
    cache = (default_cache() if cache is None else cache).expanduser()
    own = as_written(folder) or kept_tokenizer(folder, cache)
    if own is not None:
        return own
    log.info("transformers makes the tokenizer of %s, once", folder)
    tokenizer = load_tokenizer(folder)
    if decodes_plainly(tokenizer):
        keep_tokenizer(folder, cache, tokenizer)
    return tokenizer


def decodes_plainly(tokenizer: Any) -> bool:
    """True if ``decode`` is the Rust tokenizer's. ``transformers`` ignores
    ``clean_up_tokenization_spaces`` for BPE, where it would corrupt the text."""
    if isinstance(tokenizer, OwnTokenizer):
        return True
    from transformers import PreTrainedTokenizerFast

    kind = type(tokenizer)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return False
    if (
        kind.decode is not PreTrainedTokenizerFast.decode
        or kind._decode is not PreTrainedTokenizerFast._decode
    ):
        return False
    is_bpe = type(tokenizer.backend_tokenizer.model).__name__ == "BPE"
    forced = tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
    return not tokenizer.clean_up_tokenization_spaces or (is_bpe and not forced)
