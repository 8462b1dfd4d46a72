"""Chat requests made from what is installed on any machine, in five domains.

``code``: write a function from its docstring. ``explain``: say what a function does.
``extract``: turn documentation into JSON. ``summary``: shorten a passage. ``rewrite``: say a
passage in other words.

Every function and every passage is in one domain only, which its text decides. The first ``n``
prompts of a domain are the same whatever is asked for besides.
"""

from __future__ import annotations

import hashlib
import itertools
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from examples.traffic.found import Function, functions, passages
from examples.traffic.prompts import Prompt, asked

Domain = Literal["code", "explain", "extract", "summary", "rewrite"]
DOMAINS: tuple[Domain, ...] = ("code", "summary", "extract", "rewrite", "explain")

_ASKED: dict[Domain, tuple[str, ...]] = {
    "code": (
        "Write this Python function. Answer with code only.\n\n{text}",
        "Please implement the following function:\n\n{text}",
        "Complete this Python function so that it does what its docstring says.\n\n{text}",
    ),
    "explain": (
        "What does this Python function do?\n\n{text}",
        "Explain this code step by step.\n\n{text}",
        "I found this function and do not understand it. Explain it in a few sentences.\n\n{text}",
    ),
    "extract": (
        "Extract the name, the parameters, the result and the errors of this function as JSON with "
        'the keys "name", "parameters", "returns" and "raises". Answer with JSON only.\n\n{text}',
        "Turn this documentation into a JSON object with the keys name, summary and arguments, "
        "where arguments is a list of objects with name and description.\n\n{text}",
    ),
    "summary": (
        "Summarize the following text in two sentences.\n\n{text}",
        "What are the main points of this text?\n\n{text}",
        "Give a short summary for somebody who has no time to read this:\n\n{text}",
    ),
    "rewrite": (
        "Rewrite this text so that a beginner understands it.\n\n{text}",
        "Rewrite the following as a list of short points.\n\n{text}",
        "Say this in a friendlier tone, keeping all facts.\n\n{text}",
        "Make this text more formal.\n\n{text}",
    ),
}
"""What people write around the text; its digest chooses among them."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A text and the domain that it is for."""

    domain: Domain
    text: str
    core: str
    """What tells it from others: of functions that share it, such as overloads with one docstring,
    one is asked about."""


def chat_prompts(
    counts: Mapping[Domain, int], seed: int, may_lack: bool = False
) -> dict[Domain, list[Prompt]]:
    """Different prompts of each domain, reproducible on one installation by ``seed``.

    Args:
        may_lack: return fewer if this installation holds fewer.

    Raises:
        ValueError: it holds fewer; the text says how many.
    """
    found = {**_found(_of_functions(seed), counts), **_found(_of_passages(seed), counts)}
    for domain, count in counts.items():
        if len(found[domain]) < count and not may_lack:
            raise ValueError(
                f"this installation holds {len(found[domain])} prompts of domain {domain!r} and "
                f"{count} were asked for; ask for fewer"
            )
    return {domain: list(found[domain].values()) for domain in counts}


def found_prompts(seed: int) -> dict[Domain, int]:
    """How many different prompts of each domain this installation holds. Reads all of it."""
    most = dict.fromkeys(DOMAINS, 1 << 40)
    found = {**_found(_of_functions(seed), most), **_found(_of_passages(seed), most)}
    return {domain: len(found[domain]) for domain in DOMAINS}


def _found(pieces: _Pieces, counts: Mapping[Domain, int]) -> dict[Domain, dict[str, Prompt]]:
    """Prompts of the domains that these pieces are for, until there are enough of each."""
    found: dict[Domain, dict[str, Prompt]] = {d: {} for d in pieces.domains}
    lacking = {d for d in pieces.domains if counts.get(d, 0)}
    for piece in pieces.all() if lacking else ():
        if piece.domain not in lacking:
            continue
        if piece.core not in found[piece.domain]:
            found[piece.domain][piece.core] = _prompt_of(piece)
        if len(found[piece.domain]) == counts[piece.domain]:
            lacking.remove(piece.domain)
            if not lacking:
                break
    return found


@dataclass(frozen=True, slots=True)
class _Pieces:
    """Where the pieces of some domains come from."""

    domains: tuple[Domain, ...]
    all: Callable[[], Iterator[_Piece]]


def _of_functions(seed: int) -> _Pieces:
    def pieces() -> Iterator[_Piece]:
        return filter(None, map(_piece_of, functions(seed)))

    return _Pieces(("code", "explain", "extract"), pieces)


def _of_passages(seed: int) -> _Pieces:
    """Two thirds of the passages are summarised; the paragraphs of the others are rewritten."""

    def pieces() -> Iterator[_Piece]:
        return itertools.chain.from_iterable(map(_passage_pieces, passages(seed)))

    return _Pieces(("summary", "rewrite"), pieces)


def _passage_pieces(passage: str) -> Iterator[_Piece]:
    if _digest(passage) % 3:
        yield _Piece("summary", passage, passage)
        return
    for paragraph in passage.split("\n\n"):
        if 120 <= len(paragraph) <= 700:
            yield _Piece("rewrite", paragraph, paragraph)


def _piece_of(function: Function) -> _Piece | None:
    """A function for the domain that its digest chooses, unless it does not suit."""
    which = _digest(function.name + function.doc) % 3
    code = f"{function.head}\n{function.body}"
    if which == 0 and len(function.doc) <= 600 and len(function.head) <= 300:
        doc = textwrap.indent(f'"""{function.doc}"""', "    ")
        return _Piece("code", _fenced(f"{function.head}\n{doc}"), function.doc)
    if which == 1 and 3 <= function.body.count("\n") <= 24 and len(code) <= 1200:
        return _Piece("explain", _fenced(code), function.body)
    if which == 2 and 80 <= len(function.doc) <= 1000 and len(function.head) <= 300:
        return _Piece("extract", f"{function.head}\n\n{function.doc}", function.doc)
    return None


def _prompt_of(piece: _Piece) -> Prompt:
    choices = _ASKED[piece.domain]
    chosen = choices[_digest(f"asked {piece.text}") % len(choices)]
    return asked(piece.domain, chosen.format(text=piece.text))


def _fenced(code: str) -> str:
    return f"```python\n{code.rstrip()}\n```"


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest())
