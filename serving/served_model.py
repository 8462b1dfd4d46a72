"""What clients may know of the target, and what its tokenizer is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The target and its limits; constant while the server runs."""

    model_name: str
    tokenizer: Any
    """The target's ``transformers`` tokenizer; ``None`` on its way to another process, which loads
    its own."""
    vocab_size: int
    max_model_len: int
    """Maximum number of tokens of a request, prompt and completion together."""
    max_draft: int
    """Largest K that may be chosen."""
    created_unix_s: int
    drafters: tuple[str, ...] | None = None
    """Kinds that a request may name; ``None``: requests may not choose."""
