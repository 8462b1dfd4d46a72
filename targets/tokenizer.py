"""Load the tokenizer of a target, without torch: a process that only speaks HTTP needs no more.

``transformers`` is imported only by what needs it: it takes seconds of a core.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from targets.gguf_cache import default_cache
from targets.kept_tokenizer import keep_tokenizer, kept_tokenizer
from targets.own_tokenizer import OwnTokenizer, as_written

log = logging.getLogger(__name__)


def load_tokenizer(folder: Path) -> Any:
    """The ``transformers`` tokenizer in ``folder``; runs no code from the folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


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
