"""Options of other servers on our command line: each is refused with the setting it stands for."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence

from configs.checks import ENV_PREFIX
from configs.load import SECRETS, keys_named
from configs.urls import shown_place

ANYTHING = {"ignore_unknown_options": True, "allow_extra_args": True}
"""``context_settings=`` of a command that passes what it does not know to ``unknown_words``."""

_OWN = ("--config", "--set", "--print-config", "--help")
_NAMES = {
    "model": "target",
    "model_path": "target",
    "model_name": "server.model_name",
    "served_model_name": "server.model_name",
    "alias": "server.model_name",
    "m": "target",
    "p": "server.port",
    "port": "server.port",  # and not launch.port
    "c": "engine.max_model_len",
    "ctx_size": "engine.max_model_len",
    "context_length": "engine.max_model_len",
    "max_num_seqs": "engine.max_batch",
    "max_running_requests": "engine.max_batch",
    "parallel": "engine.max_batch",
    "max_num_batched_tokens": "engine.prefill_chunk",
    "chunked_prefill_size": "engine.prefill_chunk",
    "block_size": "engine.page_size",
    "gpu_memory_utilization": "engine.kv_memory_fraction",
    "mem_fraction_static": "engine.kv_memory_fraction",
    "enable_prefix_caching": "engine.prefix_cache",
    "num_speculative_tokens": "drafter.max_draft",
    "draft_max": "drafter.max_draft",
    "learning_rate": "trainer.lr",
}
"""Options of vLLM, SGLang and llama.cpp that are not called like our setting -> our setting."""


def unknown_words(words: Sequence[str]) -> str:
    """What to say about words of a command line that are no option of the command; one line each.

    Args:
        words: options that are unknown, their values, and other arguments; empty: nothing to say.
    """
    return "\n".join(_lines(words))


def _lines(words: Sequence[str]) -> Iterator[str]:
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word == "--":
            shown = shown_place(word)
            yield f"unexpected argument {shown!r}; the target is named with --set target={shown}"
            continue
        option, equals, value = word.partition("=")
        if not equals and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        yield f"no such option: {option}; {_hint(option, value)}"


def _hint(option: str, value: str) -> str:
    name = option.lstrip("-").replace("-", "_").lower()
    own = difflib.get_close_matches(option, _OWN, n=1, cutoff=0.8)
    keys = [_NAMES[name]] if name in _NAMES else keys_named(name)
    if keys:
        return "settings are given as " + " or ".join(_setting(key, value) for key in keys)
    if own:
        return f"did you mean {own[0]}?"
    return "settings are given as --set KEY=VALUE, and --print-config lists them"


def _setting(key: str, value: str) -> str:
    """How a setting is given. A secret belongs in the environment, and is not repeated."""
    if key in SECRETS:
        return f"{ENV_PREFIX}{key.upper().replace('.', '__')} in the environment"
    return f"--set {key}={shown_place(value) or 'VALUE'}"
