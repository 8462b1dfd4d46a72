"""Whether settings, tokenizer and weights of a target fit each other."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from targets.chat_template import problem_of

log = logging.getLogger(__name__)

_STRETCHED = ("linear", "dynamic")
"""Rules of scaled rotary positions that multiply ``max_position_embeddings``."""


def num_positions(config: Any) -> int | None:
    """Positions that a target was made for, with its scaled rotary positions; ``None``: it does not
    say.

    Args:
        config: Hugging Face config of the target.
    """
    text = config.get_text_config()
    most = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    if most is None:
        return None
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    rule, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
    if factor is None:
        return int(most)
    if rule == "yarn":  # its config may hold the positions before or after scaling
        before = rope.get("original_max_position_embeddings") or most
        return max(int(most), int(before * factor))
    return int(most * factor) if rule in _STRETCHED else int(most)


def check_tokenizer(tokenizer: Any, config: Any) -> None:
    """Refuse a tokenizer with tokens that the target lacks.

    Special tokens that only a prompt for another kind of input holds, such as Gemma's for images,
    are passed over with a warning: a request that uses one is refused.

    Raises:
        ValueError: ordinary text or the chat template could yield a token without an embedding.
    """
    size: int = config.get_text_config().vocab_size
    beyond = {name: i for name, i in tokenizer.get_vocab().items() if i >= size}
    if not beyond:
        return
    unused = {name for name, i in beyond.items() if _is_unused(tokenizer, name, i)}
    names = ", ".join(f"{name!r} ({i})" for name, i in sorted(beyond.items(), key=_by_id)[:3])
    if unused == beyond.keys():
        log.warning(
            "the tokenizer has %d special tokens that the target has not: %s; requests that hold "
            "one are refused",
            len(beyond),
            names,
        )
        return
    raise ValueError(
        f"the tokenizer has {len(beyond)} tokens that the target has not, whose vocabulary is "
        f"{size}: {names}; use the tokenizer that belongs to the target, or resize its embeddings"
    )


def warn_of_template(tokenizer: Any, folder: Path) -> None:
    """Log that a chat template is not valid: chats fail, but prompts of text work."""
    template = tokenizer.chat_template
    problem = problem_of(template) if isinstance(template, str) else None
    if problem is not None:
        log.warning(
            "the chat template of %s (chat_template.jinja or tokenizer_config.json) is not valid: "
            "%s. Every chat is answered with 500; /v1/completions works",
            folder,
            problem,
        )


def known_eos_ids(eos_ids: Iterable[Any], vocab_size: int) -> frozenset[int]:
    """The end-of-text ids that a target can emit; the others are logged."""
    given = frozenset(eos_ids)
    known = frozenset(i for i in given if isinstance(i, int) and 0 <= i < vocab_size)
    if given != known:
        log.warning(
            "eos_token_id names %s, but the target's vocabulary is %d: %s",
            ", ".join(sorted(map(repr, given - known))),
            vocab_size,
            "the others end a text" if known else "no token ends a text",
        )
    return known


def check_same_tokenizer(tokenizer: Any, other: Any, name: str) -> None:
    """Refuse a model whose token ids mean other text than the target's.

    Tokens added behind the ordinary ones may be missing in one of them.

    Args:
        tokenizer: the target's.
        other: that of the model ``name``.

    Raises:
        ValueError: an id stands for another token, or only one has an ordinary token; names the
            first.
    """
    ours, theirs = ({i: t for t, i in one.get_vocab().items()} for one in (tokenizer, other))
    for i in sorted(ours.keys() | theirs.keys()):
        mine, its = ours.get(i), theirs.get(i)
        is_added = i in tokenizer.added_tokens_decoder or i in other.added_tokens_decoder
        if mine == its or (is_added and (mine is None or its is None)):
            continue
        raise ValueError(
            f"the tokenizer of {name} is not the target's: id {i} is {_named(its)} there and "
            f"{_named(mine)} in the target; choose a model with the target's tokenizer"
        )


def _named(token: str | None) -> str:
    return "no token" if token is None else repr(token)


def _by_id(item: tuple[str, int]) -> int:
    return item[1]


def _is_unused(tokenizer: Any, name: str, token_id: int) -> bool:
    """Whether a token is a special one that neither the chat template nor the tokenizer adds."""
    added = tokenizer.added_tokens_decoder.get(token_id)
    if added is None or not added.special:
        return False
    named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token)
    return name not in named and name not in str(tokenizer.chat_template or "")
